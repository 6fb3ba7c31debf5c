"""rope against its reference: numbers, strides, gradients, compilers.

Without a GPU the kernel runs in Triton's interpreter on CPU tensors: `path` says what computes.
"""

import itertools
import re

import pytest
import torch

from graphfuse.kernels import _rope_launch as kernel
from graphfuse.kernels import rope as module
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.kernels.rope import LAYOUTS, TABLES, rope, rope_reference
from graphfuse.testing import assert_no_worse

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH, TOKENS, HEADS = 2, 5, 3
PLAIN = ("half", "half", "half", False, 0)
CONVENTIONS = list(itertools.product(LAYOUTS, LAYOUTS, TABLES, [False, True]))
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


def problem(device, features=16, table=None, heads=HEADS, dtype=torch.float32, table_dtype=None):
    """Return x as models have it, (B, H, S, D) with the heads inside the tokens, and its tables."""
    x = torch.randn(BATCH, TOKENS, heads * features, device=device).to(dtype)
    x = x.view(BATCH, TOKENS, heads, features).transpose(1, 2).requires_grad_()
    tables = torch.randn(2, BATCH, 1, TOKENS, table or features, device=device)
    return x, *tables.to(table_dtype or dtype)


def check(x, cos, sin, convention=PLAIN, out_dtype=None):
    """The op and its gradient are no worse than the reference in the same dtype."""
    inputs = (x, cos, sin, *convention, out_dtype or x.dtype)
    assert_no_worse(torch.ops.graphfuse.rope, rope_reference, inputs)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: "-".join(map(str, c)))
def test_no_worse_than_eager(path, device, convention):
    """10 of 17 features are rotated, from the fourth on: nothing is aligned."""
    table = 5 if convention[2] == "shared" else 10
    check(*problem(device, 17, table), (*convention, 3))


@pytest.mark.parametrize("start", [0, 8, 16], ids=["head", "middle", "tail"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_the_other_features_through(path, device, layout, start):
    x, cos, sin = problem(device, 32, 16)
    convention = (layout, layout, layout, False, start)
    check(x, cos, sin, convention)
    y = torch.ops.graphfuse.rope(x, cos, sin, *convention, x.dtype)
    for part in (slice(0, start), slice(start + 16, None)):
        assert torch.equal(y[..., part], x[..., part])


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "fp32"])
def test_mixes_dtypes(path, device, dtype, table_dtype, out_dtype):
    x, cos, sin = problem(device, 24, 16, dtype=dtype, table_dtype=table_dtype)
    check(x, cos, sin, ("interleaved", "half", "half", False, 8), out_dtype)


@pytest.mark.parametrize("heads", [1, 2, 7, 40, 70])
def test_covers_every_head_of_every_token(path, device, heads, monkeypatch):
    """More tokens and heads than a program holds, and not a multiple."""
    monkeypatch.setattr(kernel, "TILE", 512)
    check(*problem(device, 32, heads=heads))


def test_fills_programs_with_heads():
    """The largest power of two that leaves at most a quarter of the room empty."""
    blocks = {1: 1, 3: 4, 5: 2, 8: 8, 12: 16, 14: 16, 20: 8, 28: 32, 32: 32, 40: 16, 64: 32, 70: 16}
    assert {heads: kernel.heads_per_program(heads, 32) for heads in blocks} == blocks


def half_of_packed(x):
    return torch.cat((x, x), -1)[..., x.shape[-1] :]


STRIDES = {
    "heads outside": lambda x: x.contiguous(),
    "heads inside": lambda x: x,
    "slice of a projection": half_of_packed,
    "tokens from the second on": lambda x: torch.cat((x[:, :, :1], x), 2)[:, :, 1:],
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "features outside": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "one head for all": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "one for all": lambda x: x[:1, :1, :1, :1].expand(2, 3, 5, 16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STRIDES)
def test_accepts_any_strides_of_x(path, device, name, layout):
    x, cos, sin = problem(device)
    x = STRIDES[name](x.detach()).requires_grad_()
    convention = (layout, "half", layout, False, 0)
    check(x, cos, sin, convention)
    y = torch.ops.graphfuse.rope(x, cos, sin, *convention, x.dtype)
    assert y.stride() == torch.empty_like(x).stride()


def complex_parts(cos, sin):
    return torch.complex(cos, sin).real, torch.complex(cos, sin).imag


TABLE_STRIDES = {
    "one for all": lambda cos, sin: (cos[0, 0], sin[0, 0]),
    "batch of one": lambda cos, sin: (cos[:1], sin[:1]),
    "expanded over the batch": lambda cos, sin: (cos[:1].expand_as(cos), sin[0].expand_as(sin)),
    "for each head": lambda cos, sin: (cos.repeat(1, 3, 1, 1), sin.expand(-1, 3, -1, -1)),
    "one token": lambda cos, sin: (cos[:, :, :1], sin[:, :, :1]),
    "one angle": lambda cos, sin: (cos[..., :1].expand_as(cos), sin[..., :1].expand_as(sin)),
    "parts of a complex one": complex_parts,
    "of different strides": lambda cos, sin: (cos.mT.contiguous().mT, sin[:1, 0]),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", TABLE_STRIDES)
def test_accepts_any_strides_of_tables(path, device, name, table):
    features = 32 if table == "shared" else 16
    x, cos, sin = problem(device, features, 16)
    check(x, *TABLE_STRIDES[name](cos, sin), ("half", "half", table, False, 0))


SHAPES = [
    ((16,), (16,)),
    ((5, 16), (5, 16)),
    ((5, 16), (16,)),
    ((3, 5, 16), (5, 16)),
    ((2, 5, 3, 16), (5, 1, 16)),
    ((2, 3, 2, 5, 16), (2, 1, 1, 5, 16)),
    ((2, 3, 2, 5, 16), (3, 1, 5, 16)),
    ((2, 2, 3, 2, 5, 16), (2, 1, 3, 1, 5, 16)),
]


@pytest.mark.parametrize(("shape", "table_shape"), SHAPES, ids=str)
def test_accepts_any_rank(path, device, shape, table_shape):
    """The last one has more dims than the kernel can tell apart, and is left to torch."""
    x = torch.randn(shape, device=device, requires_grad=True)
    check(x, *torch.randn(2, *table_shape, device=device))


@pytest.mark.parametrize("shape", [(0, 3, 5, 16), (2, 0, 5, 16), (2, 3, 0, 16)], ids=str)
def test_accepts_no_rows(path, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    tables = torch.randn(2, shape[2], 16, device=device)
    y = rope(x, *tables)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


GRADS = {
    "contiguous": torch.ones,
    "expanded": lambda shape, device: torch.ones((), device=device).expand(shape),
}


@pytest.mark.parametrize("name", GRADS)
def test_gives_the_gradient_the_layout_of_x(path, device, name):
    """Whatever that of the incoming one: the projection's backward views it as rows."""
    x, cos, sin = problem(device)
    y = rope(x, cos, sin)
    (grad,) = torch.autograd.grad(y, x, GRADS[name](y.shape, device=device))
    (expected,) = torch.autograd.grad(rope_reference(x, cos, sin, *PLAIN, x.dtype).sum(), x)
    assert grad.stride() == x.stride() != y.contiguous().stride()
    torch.testing.assert_close(grad, expected)


def test_undoes_itself_in_reverse(path, device):
    """Of angles, unlike of any other numbers, the transpose is the inverse."""
    x, angles, _ = problem(device, 16, 8)
    cos, sin = angles.cos(), angles.sin()
    y = rope(x, cos, sin, table="shared", out_layout="interleaved")
    back = rope(y, cos, sin, table="shared", layout="interleaved", out_layout="half", reverse=True)
    torch.testing.assert_close(back, x)


def test_computes_fp64_in_full(device):
    x, cos, sin = problem(device, dtype=torch.float64)
    assert torch.equal(rope(x, cos, sin), rope_reference(x, cos, sin, *PLAIN, torch.float64))
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin, out_layout="interleaved"), (x,))


def test_has_a_second_derivative(device):
    x, cos, sin = problem(device, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: rope(x, cos, sin, start=0) ** 2, (x,))


def test_defaults_to_what_llama_does(path, device):
    x, cos, sin = problem(device)
    first, second = x.chunk(2, -1)
    expected = x * cos + torch.cat((-second, first), -1) * sin
    torch.testing.assert_close(rope(x, cos, sin), expected)


@pytest.mark.parametrize("name", ["heads inside", "slice of a projection", "one head for all"])
def test_opcheck(device, name):
    x, cos, sin = problem(device)
    x = STRIDES[name](x.detach()).requires_grad_()
    args = (*PLAIN, torch.float16)
    torch.library.opcheck(torch.ops.graphfuse.rope.default, (x, cos, sin, *args))
    grad, stride = torch.randn(x.shape, device=device), torch.empty_like(x).stride()
    args = (grad, cos, sin, stride, *args)
    torch.library.opcheck(torch.ops.graphfuse.rope_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(path, device, dynamic):
    def model(x, weight, cos, sin):
        q = (x @ weight).unflatten(-1, (HEADS, 16)).transpose(1, 2)
        return rope(q, cos, sin).square()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    weight = torch.randn(8, HEADS * 16, device=device, requires_grad=True)
    for tokens in (5, 7):
        x = torch.randn(2, tokens, 8, device=device)
        tables = torch.randn(2, tokens, 16, device=device)
        ours, expected = (run(f, x, weight, *tables) for f in (compiled, model))
        torch.testing.assert_close(ours, expected)


def run(model, x, weight, cos, sin):
    y = model(x, weight, cos, sin)
    return y, torch.autograd.grad(y.sum(), weight)[0]


FLOATS = "expected fp16, bf16, fp32 or fp64"
TABLE = "expected what broadcasts to"
ONES = torch.ones(4)
ERRORS = [
    ({"x": ONES.int()}, TypeError, f"x: {FLOATS}, got torch.int32"),
    ({"sin": ONES.bool()}, TypeError, f"sin: {FLOATS}, got torch.bool"),
    ({"out_dtype": torch.int8}, TypeError, f"out_dtype: {FLOATS}, got torch.int8"),
    ({"layout": "full"}, ValueError, "layout: expected one of half, interleaved, got full"),
    ({"out_layout": "full"}, ValueError, "out_layout: expected one of half, interleaved, got full"),
    ({"table": ""}, ValueError, "table: expected one of shared, half, interleaved, got "),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least 1 dimension, got 0"),
    ({"cos": torch.ones(3, 4)}, ValueError, f"cos: {TABLE} (5, 4), got shape (3, 4)"),
    ({"cos": torch.tensor(1.0)}, ValueError, f"cos: {TABLE} (5, 0), got shape ()"),
    ({"sin": torch.ones(5, 2)}, ValueError, f"sin: {TABLE} (5, 4), got shape (5, 2)"),
    ({"sin": torch.ones(1, 5, 4)}, ValueError, f"sin: {TABLE} (5, 4), got shape (1, 5, 4)"),
    ({"cos": ONES[:3], "sin": ONES[:3]}, ValueError, "cos: expected an even number of features"),
    ({"cos": ONES.repeat(3), "sin": ONES.repeat(3)}, ValueError, "cos: expected at most 8 features to rotate, got 12"),
    ({"sin": ONES.to("meta")}, ValueError, "sin: expected a tensor on cpu, as x, got one on meta"),
    ({"start": 5}, ValueError, "start: expected at least 0 and at most 4, got 5"),
    ({"start": -1}, ValueError, "start: expected at least 0 and at most 4, got -1"),
    ({"table": "shared", "start": 1}, ValueError, "at least 0 and at most 0, got 1"),
    ({"cos": ONES.clone().requires_grad_()}, ValueError, f"cos: {module.NO_GRADIENT}"),
]


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS)
def test_says_what_is_wrong(changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        rope(**({"x": torch.ones(5, 8), "cos": ONES, "sin": ONES} | changed))


def test_refuses_trained_tables():
    """Nobody would compute their gradient."""
    x, cos, sin = problem("cpu")
    with pytest.raises(RuntimeError, match=f"sin: {module.NO_GRADIENT}"):
        torch.ops.graphfuse.rope(x, cos, sin.requires_grad_(), *PLAIN, x.dtype)


def test_leaves_more_heads_than_it_counts_to_the_reference():
    for heads, is_walked in ((kernel.MAX_HEADS, True), (kernel.MAX_HEADS + 1, False)):
        walk = kernel.plan_walk((heads, 2), ((2, 1), (2, 1)), ((2,), (1,)), ((2,), (1,)))
        assert (walk is not None) == is_walked


@pytest.mark.gpu
def test_reaches_beyond_two_gigaelements():
    x = torch.zeros(2**31 // 1024 + 3, 8, 128, device="cuda", dtype=torch.bfloat16)
    tables = torch.randn(2, 1, 1, 128, device="cuda")
    x[-1] = torch.randn(8, 128)
    expected = rope_reference(x[-1:], *tables, *PLAIN, x.dtype)
    torch.testing.assert_close(rope(x, *tables)[-1:], expected)
