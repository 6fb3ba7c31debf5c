"""Attention under the mask of a sliding window, where there is a kernel that skips what it hides."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse.kernels.causal_attention import paths
from graphfuse.patterns import causal_attention
from tests.patterns.test_causal_attention import (
    RIGHT,
    B,
    S,
    attend,
    inputs,
    of_width,
    padded_window,
    strictly_below,
    upper,
    window,
)


@pytest.fixture
def slides(monkeypatch):
    """As if there were a kernel that knows windows; the op then makes a mask."""
    monkeypatch.setattr(causal_attention, "can_slide", lambda *states: True)


def window_added(q, k, v):
    rows = torch.arange(S)
    hidden = (rows[None, :] > rows[:, None]) | (rows[:, None] - rows[None, :] >= 4)
    return attend(q, k, v, torch.zeros(S, S).masked_fill(hidden, torch.finfo(torch.float32).min))


@pytest.mark.usefixtures("slides")
@pytest.mark.parametrize("spelling", [window, window_added])
def test_drops_the_mask_of_a_window(spelling, verify):
    report = verify(spelling, inputs())
    assert report.counts == {"causal_attention": 1}, report
    assert "positions dropped, 4 seen, grouped" in report.rewritten[0].variant


def holes(q, k, v):
    rows = torch.arange(S)
    distance = rows[:, None] - rows[None, :]
    return attend(q, k, v, (distance >= 0) & (distance < 4) & (distance != 2))


def chunks(q, k, v):
    rows = torch.arange(S)
    return attend(q, k, v, (rows[None, :] <= rows[:, None]) & (rows[None, :] // 4 == rows[:, None] // 4))


def both_sides(q, k, v):
    rows = torch.arange(S)
    return attend(q, k, v, (rows[:, None] - rows[None, :]).abs() < 4)


@pytest.mark.usefixtures("slides")
@pytest.mark.parametrize("lookalike", [strictly_below, upper, holes, chunks, both_sides])
def test_refuses_what_is_no_window(lookalike, verify):
    report = verify(lookalike, inputs())
    assert [site.reason for site in report.refused] == ["mask: expected the lower triangle, got another constant"]


@pytest.mark.usefixtures("slides")
@pytest.mark.parametrize("dynamic", [False, True])
def test_looks_at_masks_of_windows(dynamic, verify, agrees):
    report = verify(padded_window, (*inputs(), torch.ones_like(RIGHT)), dynamic=dynamic)
    assert report.counts == {"causal_attention": 1}, report
    assert "looked at on every call, 4 seen, grouped" in report.rewritten[0].variant
    compiled = graphfuse.optimize(padded_window, inner="eager", dynamic=dynamic, fullgraph=True, strict=True)
    for padding, path in [(torch.ones_like(RIGHT), "causal"), (RIGHT, "masked"), (torch.ones_like(RIGHT), "causal")]:
        before = paths.copy()
        agrees(compiled, padded_window, (*inputs(), padding))
        assert set(paths - before) == {path}


@pytest.mark.usefixtures("slides")
@pytest.mark.parametrize("widths", [(4, 6, 3), (20, 6, 3)])
def test_a_width_that_is_given_may_be_another_one_next_time(widths, agrees):
    compiled = graphfuse.optimize(of_width, inner="eager", dynamic=True, strict=True)
    for width in widths:
        agrees(compiled, of_width, (*inputs(), width))
    assert "looked at on every call" in graphfuse.report(compiled).rewritten[0].variant


def same_document(q, k, v, document):
    return attend(q, k, v, document[:, None, :, None] == document[:, None, None, :])


@pytest.mark.usefixtures("slides")
def test_documents_without_an_order_are_no_windows(verify):
    report = verify(same_document, (*inputs(), torch.tensor([[0] * 4 + [1] * (S - 4)] * B)))
    assert report.refused, report


@pytest.mark.usefixtures("slides")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_looks_at_both_masks_of_a_checkpoint(inner, agrees, counts_calls):
    def block(q, k, v, near, all_before):
        return attend(attend(q, k, v, near), k, v, all_before)

    def layers(q, k, v, padding):
        rows = torch.arange(S)
        distance = rows[:, None] - rows[None, :]
        kept = padding[:, None, None, :] != 0
        masks = ((distance >= 0) & (distance < 3) & kept, (distance >= 0) & kept)
        for _ in range(2):
            q = checkpoint(block, q, k, v, *masks, use_reentrant=False)
        return q

    compiled = graphfuse.optimize(layers, inner=inner, fullgraph=True, strict=True)
    for padding in (torch.ones_like(RIGHT), RIGHT):
        agrees(compiled, layers, (*inputs(), padding))
        with counts_calls() as calls:
            compiled(*inputs(), padding).sum().backward()
        assert calls["is_lower_triangle"] == 2
    assert graphfuse.report(compiled).counts == {"causal_attention": 4}


@pytest.mark.gpu
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slides_on_a_gpu(dtype, is_padded):
    """Flash attention runs in the place of a kernel that reads the mask."""

    def near(q, k, v, padding):
        rows = torch.arange(q.shape[2], device=q.device)
        mask = (rows[None, :] <= rows[:, None]) & (rows[:, None] - rows[None, :] < 100)
        return F.scaled_dot_product_attention(q, k, v, mask & padding[:, None, None] if is_padded else mask)

    states = [torch.randn(2, 4, 512, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    padding = torch.ones(2, 512, dtype=torch.bool, device="cuda")
    compiled = graphfuse.optimize(near, strict=True)
    compiled(*states, padding).sum().backward()
    with torch.profiler.profile() as found:
        compiled(*states, padding).sum().backward()
    names = [event.name for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for kernel, is_called in (("flash_fwd", True), ("flash_bwd", True), ("cudnn", False), ("fmha", False)):
        assert any(kernel in name for name in names) == is_called, names
    assert graphfuse.report(compiled).counts == {"causal_attention": 1}
