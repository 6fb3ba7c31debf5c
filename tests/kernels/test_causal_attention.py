"""causal_attention against its reference: both paths, grouped heads, gradients, layouts, compilers."""

import sys

import pytest
import torch
import torch.nn.functional as F

from graphfuse.kernels import _sdpa_launch
from graphfuse.kernels.causal_attention import (
    absorbing,
    causal_attention,
    causal_attention_reference,
    is_lower_triangle,
    paths,
)
from graphfuse.testing import assert_no_worse

B, S, D = 2, 40, 16
LOW = absorbing(torch.float32)
TRIANGLE = torch.ones(S, S, dtype=torch.bool).tril()
PADDED = (TRIANGLE & (torch.arange(S) < torch.tensor([[S], [S - 13]]))[:, None, None, :]).contiguous()


def heads(device, heads=4, groups=2, dtype=torch.float32, values=D, length=S, layout="tokens"):
    """Queries, keys and values: (B, heads, S, D), as models have them with the heads inside the tokens, or dense.

    Or "packed": cut out of the result of one product.
    """
    sizes = ((heads, D), (groups, D), (groups, values))
    states = [torch.randn(B, length, n, d, device=device).to(dtype).transpose(1, 2) for n, d in sizes]
    if layout == "packed":
        whole = torch.cat([x.transpose(1, 2).flatten(2) for x in states], 2)
        parts = whole.split([n * d for n, d in sizes], 2)
        states = [x.unflatten(2, size).transpose(1, 2).detach() for x, size in zip(parts, sizes, strict=True)]
    return [(x.contiguous() if layout == "heads" else x).requires_grad_() for x in states]


def additive(mask, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.fixture(params=["fused", "math"])
def backend(request, monkeypatch):
    """PyTorch's choice, or the fallback for what no fused kernel takes."""
    if request.param == "math":
        monkeypatch.setattr(_sdpa_launch, "sdpa_kernel", lambda *args: torch.nn.attention.SDPBackend.MATH)
    return request.param


@pytest.mark.parametrize("mask", [TRIANGLE, PADDED, additive(TRIANGLE), additive(PADDED)], ids=range(4))
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["tokens", "heads", "packed"])
def test_no_worse_than_eager(device, backend, mask, groups, dtype, layout):
    mask = mask.to(device)
    mask = mask if mask.dtype == torch.bool else mask.clamp_min(torch.finfo(dtype).min).to(dtype)
    states = heads(device, groups=groups, dtype=dtype, layout=layout)
    inputs = (*states, mask, is_lower_triangle(mask), D**-0.5, "", "", True, LOW, 0)

    def op(*args):
        return torch.ops.graphfuse.causal_attention(*args)[0]

    def eager(q, k, v, mask, is_causal, scale, *kernels):
        k, v = (x.repeat_interleave(4 // groups, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    assert_no_worse(op, eager, inputs)


@pytest.mark.parametrize("mask", [TRIANGLE, PADDED], ids=["causal", "padded"])
def test_agrees_with_its_reference(device, mask):
    q, k, v = heads(device, dtype=torch.float64, values=24)
    mask = mask.to(device)
    flag = is_lower_triangle(mask)
    out, lse = torch.ops.graphfuse.causal_attention(q, k, v, mask, flag, 0.3, "", "", True, LOW, 0)
    wanted_out, wanted_lse = causal_attention_reference(q, k, v, mask, flag, 0.3)
    torch.testing.assert_close((out, lse), (wanted_out, wanted_lse))
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(wanted_out, (q, k, v), grad)
    )


@pytest.mark.parametrize(
    ("mask", "answer"),
    [
        (TRIANGLE, True),
        (TRIANGLE.expand(B, 1, S, S), True),
        (additive(TRIANGLE), True),
        (additive(TRIANGLE, torch.float16), True),
        (PADDED, False),
        (additive(PADDED), False),
        (TRIANGLE.T, False),
        (TRIANGLE | torch.eye(S, dtype=torch.bool).roll(1, 1), False),
        (additive(TRIANGLE) + 0.5, False),
    ],
    ids=range(9),
)
def test_looks_at_the_mask(device, mask, answer):
    found = is_lower_triangle(mask.to(device))
    assert (found.device.type, found.shape, bool(found)) == ("cpu", (), answer)


@pytest.mark.parametrize("window", [1, 3, S])
@pytest.mark.parametrize("change", [lambda mask: mask, additive], ids=["bool", "added"])
def test_looks_at_the_mask_of_a_window(device, change, window):
    mask = change(TRIANGLE.triu(1 - window)).to(device)
    assert [bool(is_lower_triangle(mask, size)) for size in (window, 0, window - 1 or S)] == [True, window == S, False]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_is_no_worse(device, dtype, groups):
    """Where the mask is that of the window, and where it hides more."""
    band = TRIANGLE.triu(-3).to(device)

    def eager(q, k, v, mask):
        k, v = (x.repeat_interleave(4 // groups, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask)

    def op(q, k, v, mask):
        return causal_attention(q, k, v, mask, is_lower_triangle(mask, 4), window=4)

    for mask in (band, band & PADDED.to(device) | torch.eye(S, dtype=torch.bool, device=device)):
        assert_no_worse(op, eager, (*heads(device, groups=groups, dtype=dtype), mask), slack=1.25)


def test_counts_the_paths(device):
    q, k, v = heads(device)
    before = paths.copy()
    for mask in (TRIANGLE, PADDED, PADDED):
        causal_attention(q, k, v, mask.to(device), is_lower_triangle(mask.to(device)))
    assert paths - before == {"causal": 1, "masked": 2}


def test_masks_are_not_read_on_the_causal_path(device):
    q, k, v = heads(device)
    mask = TRIANGLE.to(device)
    wrong = torch.zeros_like(mask)
    out = causal_attention(q, k, v, wrong, is_lower_triangle(mask))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 3, 33])
@pytest.mark.parametrize("is_causal", [True, False])
def test_takes_any_length(device, length, is_causal, dtype):
    inputs = heads(device, length=length, dtype=dtype)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    out = causal_attention(*inputs, mask, torch.tensor(is_causal))
    wanted = F.scaled_dot_product_attention(*inputs, mask, enable_gqa=True)
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    tolerance = {"rtol": bound, "atol": bound}  # another kernel, on a GPU
    torch.testing.assert_close(out, wanted, **tolerance)
    grads = [torch.autograd.grad(result.square().sum(), inputs) for result in (out, wanted)]
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize("is_causal", [True, False])
def test_passes_opcheck(device, backend, is_causal):
    inputs = (*heads(device), TRIANGLE.to(device), torch.tensor(is_causal), 0.25, "", "", True, LOW, 0)
    torch.library.opcheck(torch.ops.graphfuse.causal_attention, inputs)
    torch.library.opcheck(torch.ops.graphfuse.is_lower_triangle, (TRIANGLE.to(device), 0))


@pytest.mark.parametrize("permute", [(0, 1, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_tells_compilers_its_strides(device, permute, is_causal):
    q, k, v = (torch.randn(B, 4, S, D, device=device).permute(permute).contiguous().permute(permute) for _ in "qkv")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask, flag = TRIANGLE.to(device), torch.tensor(is_causal)

    def step(q, k, v):
        return torch.autograd.grad(causal_attention(q, k, v, mask, flag).square().sum(), (q, k, v))

    torch.testing.assert_close(torch.compile(step)(q, k, v), step(q, k, v))


@pytest.mark.parametrize("is_added", [False, True])
def test_tells_compilers_its_strides_where_states_are_parts_of_one_tensor(device, is_added):
    packed = torch.randn(B, S, 3, 4, D, device=device)
    states = [x.transpose(1, 2).requires_grad_() for x in packed.unbind(2)]
    seen = TRIANGLE.to(device) & (torch.arange(S, device=device) >= 5)
    mask = torch.zeros(S, S, device=device).masked_fill(~seen, -1e9)
    flag = is_lower_triangle(mask)
    out, lse = torch.ops.graphfuse.causal_attention(*states, mask, flag, 0.25, "", "", True, LOW, 0)
    given = (*(x.detach() for x in states), mask, flag, out.detach(), lse)
    inputs = (torch.randn_like(out), *given, 0.25, "", "", is_added, LOW, 0)
    torch.library.opcheck(torch.ops.graphfuse.causal_attention_backward, inputs)


@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("above", [0.0, -1e9, -torch.inf])
def test_rows_that_see_nothing_go_by_their_mask(device, backend, low, is_added, above, monkeypatch):
    """Forward and backward: a kernel that keeps the logsumexp has weights of 1 there in backward."""
    monkeypatch.setattr(sys.modules["graphfuse.kernels.causal_attention"], "ROWS", 3)
    q, k, v = heads(device, groups=2)
    seen = (torch.arange(S, device=device) >= torch.tensor([[0], [5]], device=device))[:, None, None, :]
    mask = torch.zeros(B, 1, S, S, device=device).masked_fill(~(TRIANGLE.to(device) & seen), low)
    mask = mask + torch.zeros(S, S, device=device).masked_fill(~TRIANGLE.to(device), above)
    inputs = (q, k, v, mask, is_lower_triangle(mask), D**-0.5, "", "", is_added, LOW, 0)
    out = torch.ops.graphfuse.causal_attention(*inputs)[0]
    scores = q @ k.repeat_interleave(2, 1).mT * D**-0.5
    scores = scores + mask if is_added else torch.where(mask == 0, scores, mask)
    wanted = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(out)
    grads = [torch.autograd.grad(end, (q, k, v), grad) for end in (out, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_rows_hidden_by_numbers_are_apart_from_rows_hidden_in_other_sequences(device):
    """Row 1 of one sequence sees nothing behind numbers, that of the other nothing at all."""
    q, k, v = heads(device, groups=4)
    mask = torch.zeros(B, 1, S, S, device=device).masked_fill(~TRIANGLE.to(device), -torch.inf)
    mask[0, 0, 1], mask[1, 0, 1] = -torch.inf, torch.finfo(torch.float32).min
    out = causal_attention(q, k, v, mask, torch.tensor(False))
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.isfinite().all()


def test_takes_masks_of_no_keys(device):
    q = torch.randn(B, 4, 3, D, device=device)
    k = torch.randn(B, 4, 0, D, device=device)
    out = causal_attention(q, k, k, torch.zeros(3, 0, device=device), torch.tensor(False))
    torch.testing.assert_close(out, torch.zeros_like(q))


def test_says_what_it_expected(device):
    q, k, v = heads(device, heads=3, groups=2)
    with pytest.raises(ValueError, match=r"key: expected heads that divide those of the queries, got \(3, 2, 2\)"):
        causal_attention(q, k, v, TRIANGLE, torch.tensor(True))
    with pytest.raises(TypeError, match=r"value: expected torch\.float32 as the queries, got"):
        causal_attention(q, k, v.half(), TRIANGLE, torch.tensor(True))
    with pytest.raises(ValueError, match=r"query: expected \(B, heads, S, features\), got shape"):
        causal_attention(q[0], k, v, TRIANGLE, torch.tensor(True))
