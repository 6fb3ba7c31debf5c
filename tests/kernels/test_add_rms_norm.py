"""add_rms_norm and rms_norm_add against their references: numbers, rounding, strides, gradients, compilers, errors.

Without a GPU the kernels run in Triton's interpreter on CPU tensors: `path` says what computes.
"""

import re

import pytest
import torch

from graphfuse.kernels._norm import MODES
from graphfuse.kernels.add_rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm_add,
    rms_norm_add_reference,
)
from graphfuse.kernels.rms_norm import rms_norm
from graphfuse.testing import assert_no_worse

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SHAPES = [(8, 128), (7, 123), (2, 3, 2), (0, 64), (5,), (150, 320)]
NORM = (1e-6, 1.0, 0.0, "inside")
ORDERS = {
    "before": (torch.ops.graphfuse.add_rms_norm, add_rms_norm_reference),
    "after": (torch.ops.graphfuse.rms_norm_add, rms_norm_add_reference),
}
BOTH = pytest.mark.parametrize("order", ORDERS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)


def problem(shape, device, dtype=FP32, residual_dtype=None):
    """A row, its residual and a weight."""
    x, residual = torch.randn(2, *shape, device=device)
    weight = 1 + torch.randn(shape[-1], device=device) / 4
    tensors = (x.to(dtype), residual.to(residual_dtype or dtype), weight.to(dtype))
    return tuple(tensor.requires_grad_() for tensor in tensors)


def check(order, inputs, norm=NORM, dtypes=(FP32, None, None)):
    """The op and its gradients are no worse than the reference in the same dtype."""
    op, reference = ORDERS[order]
    dtype = inputs[0].dtype
    assert_no_worse(op, reference, (*inputs, *norm, dtypes[0], dtypes[1] or dtype, dtypes[2] or dtype))


@BOTH
@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_eager(path, device, shape, dtype, order):
    check(order, problem(shape, device, dtype), dtypes=(dtype, None, None))


@BOTH
@EVERY_DTYPE
@pytest.mark.parametrize("mode", MODES)
def test_knows_every_norm(path, device, in_blocks, mode, dtype, order):
    x, residual, weight = problem((9, 90), device, dtype)
    check(order, (x, residual, weight), (0.1, 0.7, 1.0, mode))
    check(order, (x, residual, None), (0.1, 0.7, 1.0, mode))


@BOTH
@pytest.mark.parametrize("residual_dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("normalized_dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("middle", [FP32, FP16], ids=str)  # of the total, or of the norm's result
def test_rounds_where_told(path, device, middle, normalized_dtype, residual_dtype, order):
    out_dtype = FP16 if order == "before" else torch.promote_types(middle, residual_dtype)
    check(order, problem((6, 72), device, FP16, residual_dtype), dtypes=(normalized_dtype, middle, out_dtype))


def test_is_a_sum_and_its_norm(path, device):
    x, residual, weight = problem((6, 72), device, FP16)
    total, y = add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight))


def test_is_a_norm_and_its_sum(path, device):
    x, residual, weight = problem((6, 72), device, FP16)
    assert torch.equal(rms_norm_add(x, residual, weight), residual + rms_norm(x, weight))


@pytest.mark.parametrize("used", ["total", "y"])
def test_needs_not_both_results(path, device, used):
    """The last layer's sum is read by its norm alone."""
    inputs = problem((6, 72), device)

    def one(f):
        total, y = f(*inputs)
        return torch.autograd.grad((total if used == "total" else y).square().sum(), inputs, allow_unused=True)

    def plain(x, residual, weight):
        total = x + residual
        return total, rms_norm(total, weight)

    for ours, theirs in zip(one(add_rms_norm), one(plain), strict=True):
        torch.testing.assert_close(ours, theirs)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slice": lambda x: torch.cat((x, x), -1)[..., x.shape[-1] :],
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one row for all": lambda x: x[:1, :1].expand_as(x),
}


@BOTH
@pytest.mark.parametrize("which", [0, 1], ids=["x", "residual"])
@pytest.mark.parametrize("name", STRIDES)
def test_accepts_any_strides(path, device, name, which, order):
    inputs = list(problem((4, 5, 24), device))
    inputs[which] = STRIDES[name](inputs[which].detach()).requires_grad_()
    check(order, inputs)


def test_gradients_are_the_same_in_every_run(path, device):
    inputs = problem((150, 320), device)
    runs = []
    for _ in range(2):
        total, y = add_rms_norm(*inputs)
        runs.append(torch.autograd.grad((total * y).sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_computes_fp64_in_full(device):
    inputs = problem((4, 6), device, FP64)
    assert torch.autograd.gradcheck(add_rms_norm, inputs)
    assert torch.autograd.gradcheck(rms_norm_add, inputs)


@pytest.mark.parametrize("call", [add_rms_norm, rms_norm_add])
def test_has_no_second_derivative(device, call):
    inputs = problem((4, 6), device)
    y = call(*inputs)
    y = y if isinstance(y, torch.Tensor) else y[1]
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(y.sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "no weight"])
def test_opcheck(device, has_weight):
    x, residual, weight = problem((4, 6), device, FP16)
    weight = weight if has_weight else None
    for op, _ in ORDERS.values():
        torch.library.opcheck(op.default, (x, residual, weight, *NORM, FP32, FP16, FP32))
    grad, total_grad, total = torch.randn(3, 4, 6, device=device)
    args = (grad, total_grad, total, None if weight is None else weight.detach(), *NORM, has_weight)
    torch.library.opcheck(torch.ops.graphfuse.add_rms_norm_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(path, device, dynamic):
    def model(x, residual, projection, weight):
        total, y = add_rms_norm(x @ projection, residual, weight)
        return rms_norm_add(y @ projection, total, weight)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    projection = torch.randn(16, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    for rows in (5, 7):
        inputs = (*torch.randn(2, rows, 16, device=device), projection, weight)
        ours, expected = (f(*inputs) for f in (compiled, model))
        torch.testing.assert_close(ours, expected)
        grads = (torch.autograd.grad(y.sum(), (projection, weight)) for y in (ours, expected))
        torch.testing.assert_close(*grads)


X = torch.ones(5, 8)
ERRORS = [
    ({"x": X.int()}, TypeError, "x: expected fp16, bf16, fp32 or fp64, got torch.int32"),
    ({"residual": X.bool()}, TypeError, "residual: expected fp16"),
    ({"out_dtype": torch.int8}, TypeError, "out_dtype: expected fp16"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least 1 dimension, got 0"),
    ({"residual": X[:1]}, ValueError, "residual: expected shape (5, 8), got (1, 8)"),
    ({"weight": torch.ones(7)}, ValueError, "weight: expected shape (8,), got (7,)"),
    ({"mode": "middle"}, ValueError, "mode: expected one of inside, outside, clamp, got middle"),
]


@pytest.mark.parametrize("call", [add_rms_norm, rms_norm_add])
@pytest.mark.parametrize(("changed", "error", "message"), ERRORS)
def test_says_what_is_wrong(changed, error, message, call):
    with pytest.raises(error, match=re.escape(message)):
        call(**({"x": X, "residual": X} | changed))


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    """Captured forward and backward give what they give outside."""
    inputs = problem((64, 256), "cuda", BF16)

    def model(x, residual, weight):
        total, y = add_rms_norm(x, residual, weight)
        return total * y

    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    expected = torch.autograd.grad(model(*inputs).sum(), inputs)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = [grad.clone() for grad in torch.autograd.grad(compiled(*inputs).sum(), inputs)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
