"""norm_rope against its reference: rounding, conventions, strides, heads, gradients, compilers, errors.

Without a GPU the kernels run in Triton's interpreter on CPU tensors: `path` says what computes.
"""

import itertools
import re

import pytest
import torch

from graphfuse.kernels import _norm_rope_launch as kernel
from graphfuse.kernels._norm import MODES
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.kernels.norm_rope import norm_rope, norm_rope_reference
from graphfuse.kernels.rms_norm import rms_norm
from graphfuse.kernels.rope import LAYOUTS, NO_GRADIENT, TABLES, rope
from graphfuse.testing import assert_no_worse

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
BATCH, TOKENS, HEADS = 2, 5, 3
PLAIN = ("half", "half", "half", False, 0)
NORM = (1e-6, 1.0, 0.0, "inside")
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
EVERY_DTYPE = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
ACROSS = pytest.mark.parametrize("across", [-1, 1], ids=["each head", "across heads"])


def problem(device, features=16, table=None, heads=HEADS, dtype=FP32, across=-1, tokens=TOKENS):
    """Return x as models have it, (B, H, S, D) with the heads inside the tokens, its weight and its tables."""
    x = torch.randn(BATCH, tokens, heads * features, device=device)
    x = x.to(dtype).view(BATCH, tokens, heads, features).transpose(1, 2).requires_grad_()
    weight = 1 + torch.randn(features if across < 0 else heads * features, device=device) / 4
    tables = torch.randn(2, BATCH, 1, tokens, table or features, device=device)
    return x, weight.to(dtype).requires_grad_(), *tables.to(dtype)


def check(inputs, norm=NORM, rounding=(FP32, None), convention=PLAIN, across=-1, out_dtype=None):
    """The op and its gradients are no worse than the reference in the same dtype."""
    x = inputs[0]
    dtypes = (rounding[0], rounding[1] or x.dtype)
    arguments = (*inputs, *norm, *dtypes, *convention, across, out_dtype or x.dtype)
    assert_no_worse(torch.ops.graphfuse.norm_rope, norm_rope_reference, arguments)


@EVERY_DTYPE
@ACROSS
@pytest.mark.parametrize("rounding", [*itertools.product([FP32, FP16], repeat=2)], ids=str)
def test_no_worse_than_eager(path, device, rounding, across, dtype):
    check(problem(device, dtype=dtype, across=across), (1e-6, 1.0, 1.0, "inside"), rounding, across=across)


@pytest.mark.parametrize("mode", MODES)
@ACROSS
def test_knows_every_norm(path, device, across, mode):
    check(problem(device, across=across), (0.1, 0.7, -0.5, mode), across=across)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("layouts", [*itertools.product(LAYOUTS, repeat=2)], ids="-".join)
@pytest.mark.parametrize("start", [0, 7], ids=["first features", "last features"])
def test_knows_every_rotation(path, device, start, layouts, table):
    """10 of 17 features are rotated, and all of them normalised."""
    check(problem(device, 17, 5 if table == "shared" else 10), convention=(*layouts, table, start > 0, start))


@ACROSS
def test_normalises_what_it_does_not_rotate(path, device, across):
    x, weight, cos, sin = problem(device, 16, 8, across=across)
    check((x, weight, cos, sin), convention=("half", "half", "half", False, 8), across=across)
    y = norm_rope(x, weight, cos, sin, start=8, across=None if across < 0 else across)
    rows = x if across < 0 else x.transpose(1, 2).flatten(-2)
    rest = (
        rms_norm(rows, weight) if across < 0 else rms_norm(rows, weight).view(x.transpose(1, 2).shape).transpose(1, 2)
    )
    torch.testing.assert_close(y[..., :8], rest[..., :8])


def test_is_rope_of_rms_norm(path, device):
    x, weight, cos, sin = problem(device, dtype=FP16)
    expected = rope(rms_norm(x, weight, normalized_dtype=FP16), cos, sin)
    found = norm_rope(x, weight, cos, sin, normalized_dtype=FP16)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@ACROSS
def test_needs_no_weight(path, device, across):
    x, _, cos, sin = problem(device)
    check((x, None, cos, sin), across=across)


@pytest.mark.parametrize("heads", [1, 2, 7, 24, 40])
@ACROSS
def test_covers_every_head_of_every_token(path, device, heads, across, monkeypatch):
    """More tokens and heads than a program holds, and not a multiple; more tiles than programs."""
    monkeypatch.setattr(kernel, "TILE", 256)
    kernel.plan_launch.cache_clear()
    check(problem(device, 16, heads=heads, across=across, tokens=11), across=across)
    kernel.plan_launch.cache_clear()


STRIDES = {
    "heads outside": lambda x: x.contiguous(),
    "slice of a projection": lambda x: torch.cat((x, x), -1)[..., x.shape[-1] :],
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one head for all": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


@ACROSS
@pytest.mark.parametrize("name", STRIDES)
def test_accepts_any_strides(path, device, name, across):
    x, weight, cos, sin = problem(device, across=across)
    x = STRIDES[name](x.detach()).requires_grad_()
    weight = weight.detach().repeat_interleave(2)[::2].requires_grad_()
    check((x, weight, cos.mT.contiguous().mT, sin[:1]), across=across)
    y = norm_rope(x, weight, cos, sin, across=None if across < 0 else across)
    assert y.stride() == torch.empty_like(x).stride()


def test_leaves_to_torch_what_no_program_holds(path, device, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_ACROSS", 32)
    kernel.plan_launch.cache_clear()
    check(problem(device, across=1), across=1)
    kernel.plan_launch.cache_clear()


@pytest.mark.parametrize("shape", [(0, 3, 5, 16), (2, 0, 5, 16), (2, 3, 0, 16)], ids=str)
def test_accepts_no_rows(path, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    y = norm_rope(x, weight, *torch.randn(2, shape[2], 16, device=device))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_gradients_are_the_same_in_every_run(path, device):
    inputs = problem(device, tokens=40)
    runs = [torch.autograd.grad(norm_rope(*inputs).square().sum(), inputs[:2]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_computes_fp64_in_full(device):
    x, weight, cos, sin = problem(device, dtype=FP64)
    assert torch.autograd.gradcheck(lambda x, w: norm_rope(x, w, cos, sin), (x, weight))
    x, weight, cos, sin = problem(device, dtype=FP64, across=1)
    assert torch.autograd.gradcheck(lambda x, w: norm_rope(x, w, cos, sin, across=1), (x, weight))


def test_has_no_second_derivative(device):
    inputs = problem(device)
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(norm_rope(*inputs).sum(), inputs[0], create_graph=True)


@ACROSS
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no weight"])
def test_opcheck(device, has_weight, across):
    x, weight, cos, sin = problem(device, across=across)
    weight = weight if has_weight else None
    args = (*NORM, FP32, FP16, *PLAIN, across)
    torch.library.opcheck(torch.ops.graphfuse.norm_rope.default, (x, weight, cos, sin, *args, FP16))
    grad = torch.randn(x.shape, device=device)
    args = (grad, x.detach(), None if weight is None else weight.detach(), cos, sin, *NORM, *PLAIN, across, has_weight)
    torch.library.opcheck(torch.ops.graphfuse.norm_rope_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(path, device, dynamic):
    def model(x, projection, weight, cos, sin):
        q = (x @ projection).unflatten(-1, (HEADS, 16)).transpose(1, 2)
        return norm_rope(q, weight, cos, sin).square()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    projection = torch.randn(8, HEADS * 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    for tokens in (5, 7):
        inputs = (
            torch.randn(2, tokens, 8, device=device),
            projection,
            weight,
            *torch.randn(2, tokens, 16, device=device),
        )
        ours, expected = (f(*inputs) for f in (compiled, model))
        torch.testing.assert_close(ours, expected)
        grads = (torch.autograd.grad(y.sum(), (projection, weight)) for y in (ours, expected))
        torch.testing.assert_close(*grads)


X, TABLE = torch.ones(2, 5, 8), torch.ones(8)
ERRORS = [
    ({"x": X.int()}, TypeError, "x: expected fp16, bf16, fp32 or fp64, got torch.int32"),
    ({"rotated_dtype": torch.int8}, TypeError, "rotated_dtype: expected fp16"),
    ({"mode": "middle"}, ValueError, "mode: expected one of inside, outside, clamp, got middle"),
    ({"layout": "full"}, ValueError, "layout: expected one of half, interleaved, got full"),
    ({"table": "full"}, ValueError, "table: expected one of shared, half, interleaved, got full"),
    ({"cos": torch.ones(3, 8)}, ValueError, "cos: expected what broadcasts to (2, 5, 8), got shape (3, 8)"),
    ({"cos": TABLE[:4], "sin": TABLE[:4], "start": 2}, ValueError, "start: expected 0 or 4, got 2"),
    ({"across": 2}, ValueError, "across: expected a leading dim of 2, got 2"),
    ({"weight": torch.ones(7)}, ValueError, "weight: expected shape (8,), got (7,)"),
    ({"across": 0}, ValueError, "weight: expected shape (16,), got (8,)"),
    ({"cos": TABLE.clone().requires_grad_()}, ValueError, f"cos: {NO_GRADIENT}"),
]


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS)
def test_says_what_is_wrong(changed, error, message):
    arguments = {"x": X, "weight": TABLE, "cos": TABLE, "sin": TABLE} | changed
    with pytest.raises(error, match=re.escape(message)):
        norm_rope(**arguments)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    """Captured forward and backward give what they give outside."""
    x, weight, cos, sin = problem("cuda", 128, heads=8, dtype=BF16, tokens=64)

    def model(x, weight):
        return norm_rope(x, weight, cos, sin).square()

    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    expected = torch.autograd.grad(model(x, weight).sum(), (x, weight))
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = [grad.clone() for grad in torch.autograd.grad(compiled(x, weight).sum(), (x, weight))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
