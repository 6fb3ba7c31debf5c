"""attention against its reference, and the one mask that several make."""

import pytest
import torch

from graphfuse.kernels.attention import attention, attention_reference, mask_of
from graphfuse.testing import assert_no_worse

B, S, D = 2, 40, 16
TRIANGLE = torch.ones(S, S, dtype=torch.bool).tril()
LOWEST = torch.finfo(torch.float32).min


def heads(device, groups=4, dtype=torch.float32, length=S):
    sizes = (4, S), (groups, length), (groups, length)
    return [torch.randn(B, n, s, D, device=device).to(dtype).requires_grad_() for n, s in sizes]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("takes_groups", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_by_hand(device, dtype, groups, takes_groups, is_causal):
    def by_hand(q, k, v):
        k, v = (x.repeat_interleave(4 // groups, 1) for x in (k, v))
        scores = q @ k.mT * 0.3
        scores = scores.masked_fill(~TRIANGLE.to(device), -torch.inf) if is_causal else scores
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    def fused(q, k, v):
        grouped = {"is_grouped": groups != 4, "takes_groups": takes_groups}
        return attention(q, k, v, scale=0.3, is_causal=is_causal, **grouped)

    # In float32 both do the same sums, in another order: the largest of few errors says little.
    assert_no_worse(fused, by_hand, heads(device, groups, dtype), slack=1.1 if dtype == torch.bfloat16 else 4.0)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(("is_causal", "length"), [(True, S), (False, S), (False, S - 7)])
def test_agrees_with_its_reference(device, groups, is_causal, length):
    q, k, v = heads(device, groups, torch.float64, length)
    out = attention(q, k, v, scale=0.3, is_causal=is_causal, is_grouped=groups != 4)
    wanted = attention_reference(q, k, v, TRIANGLE.to(device) if is_causal else None, scale=0.3)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(end, (q, k, v), grad) for end in (out, wanted)))


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_by_its_name_is_no_worse(device, dtype, groups, is_causal, kernel):
    """Named kernels run on GPUs; elsewhere the call is PyTorch's to place."""
    torch.use_deterministic_algorithms(False)

    def named(q, k, v):
        return attention(q, k, v, scale=0.3, is_causal=is_causal, kernel=kernel)

    def eager(q, k, v):
        k, v = (x.repeat_interleave(4 // groups, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3)

    assert_no_worse(named, eager, heads(device, groups, dtype), slack=1.25)


@pytest.mark.parametrize("window", [1, 7, S, S + 9])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_window_is_no_worse(device, dtype, groups, window):
    """Flash attention's on GPUs, in half precision; elsewhere a mask."""

    def sliding(q, k, v):
        return attention(q, k, v, scale=0.3, is_causal=True, is_grouped=groups != 4, window=window)

    def eager(q, k, v):
        k, v = (x.repeat_interleave(4 // groups, 1) for x in (k, v))
        seen = TRIANGLE.to(device).triu(1 - window)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3)

    assert_no_worse(sliding, eager, heads(device, groups, dtype), slack=1.25)


def test_a_window_is_causal(device):
    with pytest.raises(ValueError, match=r"window: expected 0 where attention is not causal, got 3"):
        attention(*heads(device), scale=0.3, window=3)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [64, 128, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_a_window_of_many_positions(features, packed):
    """Blocks that are skipped, and those that are cut: what is far away makes no difference."""
    length, window = 1500, 300
    shape = (2, length, 3, 4, features) if packed else (3, 2, length, 4, features)
    states = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in states.unbind(2 if packed else 0))
    seen = torch.ones(length, length, dtype=torch.bool, device="cuda").tril().triu(1 - window)
    out = attention(q, k, v, scale=0.1, is_causal=True, window=window)
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), seen, scale=0.1)
    grad = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    right = [wanted, *torch.autograd.grad(wanted, (q, k, v), grad.double())]
    for one, other in zip(found, right, strict=True):
        assert (one.double() - other).norm() < 6e-3 * other.norm()


@pytest.mark.parametrize(("is_causal", "window"), [(False, 0), (True, 0), (True, 5)])
def test_passes_opcheck(device, is_causal, window):
    q, k, v = heads(device, 2)
    torch.library.opcheck(torch.ops.graphfuse.attention, (q, k, v, is_causal, 0.25, "flash", window))
    states = [x.detach() for x in (q, k, v)]
    out, lse = torch.ops.graphfuse.attention(*states, is_causal, 0.25, "flash", window)
    inputs = (torch.randn_like(out), *states, is_causal, out, lse, 0.25, "flash", window)
    torch.library.opcheck(torch.ops.graphfuse.attention_backward, inputs)


@pytest.mark.parametrize("permute", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_tells_compilers_its_strides(device, permute):
    states = (x.detach().permute(permute).contiguous().permute(permute).requires_grad_() for x in heads(device))

    def step(q, k, v):
        out = attention(q, k, v, scale=0.25, is_causal=True, kernel="flash")
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    inputs = tuple(states)
    torch.testing.assert_close(torch.compile(step)(*inputs), step(*inputs))


PADDING = torch.arange(S) < torch.tensor([[S], [S - 9]])[:, None, None]
ADDED = torch.zeros(S, S).masked_fill(~TRIANGLE, -1e4)


@pytest.mark.parametrize(
    ("parts", "steps", "wanted"),
    [
        ([TRIANGLE], [("keep", -torch.inf)], TRIANGLE),
        ([~TRIANGLE], [("hide", -torch.inf)], TRIANGLE),
        ([~TRIANGLE, PADDING], [("hide", -torch.inf), ("keep", -torch.inf)], TRIANGLE & PADDING),
        ([TRIANGLE], [("keep", -1e9)], torch.zeros(S, S).masked_fill(~TRIANGLE, LOWEST)),
        ([ADDED], [("add", 1.0)], ADDED),
        ([-ADDED / 2], [("add", -2.0)], ADDED),
        ([ADDED, PADDING], [("add", 1.0), ("keep", -1e9)], ADDED.expand(B, 1, S, S).masked_fill(~PADDING, LOWEST)),
        (
            [ADDED, PADDING],
            [("add", 1.0), ("keep", -torch.inf)],
            ADDED.expand(B, 1, S, S).masked_fill(~PADDING, -torch.inf),
        ),
        ([ADDED, ADDED], [("add", 1.0), ("add", 0.5)], 1.5 * ADDED),
    ],
    ids=range(9),
)
def test_makes_one_mask_of_all(parts, steps, wanted):
    found = mask_of(parts, steps, LOWEST)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found.expand(wanted.shape), wanted, rtol=0, atol=0)
