"""Sums of parts: any number of them, in the same order in every run, and early only behind the kernel that wrote them.

Without a GPU the kernel runs in Triton's interpreter on CPU tensors.
"""

import pytest
import torch

from graphfuse.kernels import _parts as kernel
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.kernels.rms_norm import rms_norm

NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


@NEEDS_TRITON
@pytest.mark.parametrize("programs", [1, 3, 256, 257, 1024, 1025, 2500])
@pytest.mark.parametrize("features", [1, 17, 128])
def test_adds_all_parts(device, programs, features):
    parts = torch.randn(programs, features, device=device)
    total = torch.empty(features, device=device)
    kernel.add_parts_((parts, total))
    torch.testing.assert_close(total.double(), parts.double().sum(0), rtol=1e-5, atol=1e-4)
    again = torch.empty_like(total)
    kernel.add_parts_((parts, again))
    assert torch.equal(total, again)


@NEEDS_TRITON
def test_adds_two_totals_at_once(device):
    sizes = ((300, 40), (300, 7))
    parts = [torch.randn(size, device=device) for size in sizes]
    totals = [torch.empty(features, device=device, dtype=torch.float16) for _, features in sizes]
    kernel.add_parts_(*zip(parts, totals, strict=True))
    for part, total in zip(parts, totals, strict=True):
        torch.testing.assert_close(total, part.double().sum(0).half(), rtol=2e-3, atol=1e-2)


def test_adds_nothing_where_nothing_is_wanted():
    kernel.add_parts_((None, None), (None, None))


def test_is_early_on_no_other_device():
    assert not kernel.overlap(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("overlaps", [True, False])
def test_gradients_are_the_same_on_streams_at_once(overlaps, monkeypatch):
    """Many short backwards, each of whose parts would be wrong if the sum did not wait for them."""
    monkeypatch.setattr(kernel, "OVERLAPS", overlaps)
    x, weight = torch.randn(4096, 2048, device="cuda").bfloat16(), torch.randn(2048, device="cuda").bfloat16()
    grad = torch.randn_like(x)

    def run():
        leaves = (x.detach().requires_grad_(), weight.detach().requires_grad_())
        return torch.autograd.grad(rms_norm(*leaves), leaves, grad)

    expected = run()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run())
    torch.cuda.synchronize()
    for grads in found:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected, strict=True))
