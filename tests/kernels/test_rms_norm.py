"""rms_norm against its reference: numbers, rounding, strides, gradients, autograd, compilers, errors.

Without a GPU the kernels run in Triton's interpreter on CPU tensors: `path` says what computes.
"""

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphfuse.kernels import _rms_norm_kernel as kernels
from graphfuse.kernels._norm import MODES
from graphfuse.kernels._op import DTYPES
from graphfuse.kernels.rms_norm import rms_norm, rms_norm_reference
from graphfuse.testing import assert_no_worse

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# Aligned, ragged, one feature, no rows, no leading dims, more tiles than programs.
SHAPES = [(8, 128), (7, 123), (2, 3, 1), (0, 64), (5,), (150, 320)]
OPTIONS = {
    "plain": {},
    "offset": {"offset": 1.0},
    "gain": {"gain": 0.3, "offset": -0.5},
    "outside": {"mode": "outside", "eps": 0.1},
    "clamp": {"mode": "clamp", "eps": 1.4},
    "no eps": {"eps": 0.0},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
EVERY_MODE = pytest.mark.parametrize("mode", MODES)


def problem(shape, dtype, device, weight_dtype=None):
    """An input whose rows have root mean squares from 1 to 2, and a weight."""
    x = torch.randn(shape, device=device) * torch.rand(*shape[:-1], 1, device=device).exp2()
    weight = 1 + torch.randn(shape[-1], device=device) / 4
    return x.to(dtype).requires_grad_(), weight.to(weight_dtype or dtype).requires_grad_()


def fused(**options):
    def call(x, weight, normalized_dtype=FP32, out_dtype=None):
        return rms_norm(x, weight, normalized_dtype=normalized_dtype, out_dtype=out_dtype, **options)

    return call


def eager(eps=1e-6, gain=1.0, offset=0.0, mode="inside"):
    def call(x, weight, normalized_dtype=FP32, out_dtype=None):
        args = (eps, gain, offset, mode, normalized_dtype, out_dtype or x.dtype)
        return rms_norm_reference(x, weight, *args)

    return call


def run(call, *inputs, grad=None):
    """The result and the gradients of the inputs that have one."""
    y = call(*inputs)
    leaves = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if grad is None else grad)


@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_eager(shape, dtype, path, device):
    # With one feature and no eps all of the gradient cancels.
    eps = 0.5 if shape[-1] == 1 else 1e-6
    assert_no_worse(fused(eps=eps), eager(eps=eps), problem(shape, dtype, device))


@EVERY_DTYPE
@EVERY_OPTION
def test_no_worse_with_options(options, dtype, in_blocks, path, device):
    x, weight = problem((9, 90), dtype, device)
    assert_no_worse(fused(**options), eager(**options), (x, weight, dtype))
    assert_no_worse(fused(**options), eager(**options), (x, None, FP32, FP32))


@pytest.mark.parametrize("weight_dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("x_dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("out_dtype", [FP32, FP16], ids=str)
def test_no_worse_with_mixed_dtypes(out_dtype, x_dtype, weight_dtype, path, device):
    inputs = problem((6, 72), x_dtype, device, weight_dtype)
    assert_no_worse(fused(), eager(), (*inputs, FP32, out_dtype))


@pytest.mark.parametrize("size", [1e-18, 1e-3, 1e3, 1e18])
@EVERY_MODE
def test_no_worse_far_from_one(mode, size, path, device):
    x, weight = problem((6, 72), FP32, device)
    x = (x.detach() * size).requires_grad_()
    assert_no_worse(fused(mode=mode), eager(mode=mode), (x, weight))


@EVERY_DTYPE
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rounds_where_told(offset, dtype, path, device):
    # Sums of these squares are exact, in any order.
    x = (torch.randint(-16, 17, (33, 200), device=device) / 8).to(dtype)
    weight = problem((33, 200), dtype, device)[1].detach()
    scale = weight.float() + offset
    late = rms_norm(x, out_dtype=FP32)
    early = rms_norm(x)
    assert torch.equal(early, late.to(dtype))
    assert torch.equal(rms_norm(x, weight, offset=offset), (late * scale).to(dtype))
    found = rms_norm(x, weight, offset=offset, normalized_dtype=dtype)
    assert torch.equal(found, (early.float() * scale).to(dtype))
    found = rms_norm(x, weight, offset=offset, normalized_dtype=dtype, out_dtype=FP32)
    assert torch.equal(found, early.float() * scale)


@EVERY_OPTION
def test_is_exact_in_float64(options, device):
    """So it is the reference path that computes."""
    x, weight = problem((5, 7), FP64, device)
    found, expected = (run(make(**options), x, weight, FP64) for make in (fused, eager))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(fused(**options), (x, weight), fast_mode=True)
    assert torch.autograd.gradcheck(fused(**options), (x, None), fast_mode=True)


@EVERY_MODE
def test_any_float64_input_makes_it_exact(mode, device):
    x, weight = problem((5, 7), FP32, device)
    expected = eager(mode=mode)(x.double(), weight.double())
    for dtypes in ((FP64, FP32, FP32), (FP32, FP64, FP32), (FP32, FP32, FP64)):
        found = rms_norm(x.to(dtypes[0]), weight.to(dtypes[1]), mode=mode, out_dtype=dtypes[2])
        assert torch.equal(found, expected.to(dtypes[2]))


LAYOUTS = {
    # Views of shape (2, 5, 3, 16).
    "transposed heads": lambda t: t(2, 3, 5, 16).transpose(1, 2),
    "packed heads": lambda t: t(2, 5, 9, 16)[:, :, 3:6],
    "packed, transposed": lambda t: t(2, 3, 3, 5, 16)[:, 1].transpose(1, 2),
    "cut features": lambda t: t(2, 5, 3, 40)[..., 8:24],
    "every other row": lambda t: t(2, 10, 3, 16)[:, ::2],
    "every other feature": lambda t: t(2, 5, 3, 32)[..., ::2],
    "features outermost": lambda t: t(16, 2, 5, 3).permute(1, 2, 3, 0),
    "features in the middle": lambda t: t(2, 5, 16, 3).transpose(2, 3),
    "expanded": lambda t: t(2, 1, 3, 16).expand(2, 5, 3, 16),
    "expanded features": lambda t: t(2, 5, 3, 1).expand(2, 5, 3, 16),
}


@pytest.mark.parametrize("grad_layout", ["transposed heads", "packed heads", "expanded features"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_strides_as_they_come(layout, grad_layout, path, device):
    """And returns those of empty_like, without a copy of an input."""
    x = LAYOUTS[layout](lambda *shape: torch.randn(shape, device=device)).detach().requires_grad_()
    grad = LAYOUTS[grad_layout](lambda *shape: torch.randn(shape, device=device))
    weight = problem((16,), FP32, device)[1]
    found = run(fused(), x, weight, grad=grad)
    dense = (x.detach().contiguous().requires_grad_(), weight)
    expected = run(fused(), *dense, grad=grad.contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[0].stride() == torch.empty_like(x).stride()
    assert kernels.plan_walk(x.shape, grad.stride(), x.stride(), found[0].stride())


def test_gradient_has_the_layout_of_x(path, device):
    x = torch.randn(2, 3, 5, 16, device=device).transpose(1, 2)
    weight = torch.ones(16, device=device)
    args = (torch.ones(2, 5, 3, 16, device=device), x, weight, 1e-6, 1.0, 0.0, "inside", True)
    x_grad, weight_grad = torch.ops.graphfuse.rms_norm_backward(*args)
    assert x_grad.stride() == x.stride()
    assert weight_grad.stride() == weight.stride()


def test_takes_more_dims_than_the_kernels_do(path, device):
    x = torch.randn(4, 5, 6, 7, 8, device=device)[::2, ::2, ::2, ::2].requires_grad_()
    weight = problem((8,), FP32, device)[1]
    assert kernels.plan_walk(x.shape, x.stride(), torch.empty_like(x).stride()) is None
    assert_no_worse(fused(), eager(), (x, weight))
    assert run(fused(), x, weight)[0].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("make", [lambda w: w[::2], lambda w: w[:1].expand(24), lambda w: w.flip(0)[24:]])
def test_takes_any_weight(make, path, device):
    x, weight = problem((6, 24), FP32, device)
    weight = make(torch.randn(48, device=device)).detach().requires_grad_()
    found, expected = (run(call, x, weight) for call in (fused(), eager()))
    torch.testing.assert_close(found, expected)


@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=4),
    st.permutations(range(5)),
    st.lists(st.integers(1, 2), min_size=5, max_size=5),
    st.integers(0, 31),
)
def test_walk_visits_every_row_in_step(leading, order, steps, kept):
    """Row r of the walk is at the same indices in all tensors, or there is no walk."""
    shape = (*leading, 3)
    order = [dim for dim in order if dim < len(shape)]
    sliced = [size * step for size, step in zip(shape, steps, strict=False)]
    x = torch.empty([sliced[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])
    x = x[tuple(slice(None, None, step) for step in steps[: len(shape)])]
    # Some dims are expanded.
    x = x[tuple(slice(None) if kept >> dim & 1 else slice(1) for dim in range(len(shape)))].expand(shape)
    y = torch.empty_like(x)
    walk = kernels.plan_walk(tuple(shape), x.stride(), y.stride())
    if walk is None:
        assert len(leading) > 3
        return
    assert walk.strides[0][3] == x.stride(-1)
    assert walk.strides[1][3] == y.stride(-1)
    rows = torch.arange(walk.rows)
    numbers = (rows // walk.n2 // walk.n1, rows // walk.n2 % walk.n1, rows % walk.n2)
    walked = [sum(n * s for n, s in zip(numbers, strides, strict=False)) for strides in walk.strides]
    offsets = [
        tuple(sum(i * s for i, s in zip(index, t.stride(), strict=False)) for t in (x, y))
        for index in itertools.product(*map(range, leading))
    ]
    assert sorted(map(tuple, torch.stack(walked, 1).tolist())) == sorted(offsets)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3), (4, 0)], ids=str)
def test_empty_gradients_are_zero(shape, path, device):
    x, weight = problem(shape, FP32, device)
    y, x_grad, weight_grad = run(fused(), x, weight)
    assert y.shape == x_grad.shape == shape
    assert torch.equal(weight_grad, torch.zeros_like(weight))


@EVERY_MODE
def test_rows_of_zeros_have_gradients(mode, in_blocks, path, device):
    x, weight = problem((4, 90), FP32, device)
    x = (x.detach() * torch.tensor([[1], [0], [1], [0]], device=device)).requires_grad_()
    found, expected = (run(call, x, weight) for call in (fused(mode=mode), eager(mode=mode)))
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@EVERY_MODE
def test_nan_stays_in_its_row(mode, value, in_blocks, path, device):
    x, weight = problem((8, 90), FP32, device)
    with torch.no_grad():
        x[3, 5] = value
    y, x_grad, _ = run(fused(mode=mode), x, weight)
    for tensor in (y, x_grad):
        assert tensor[3, 5].isnan()
        assert tensor[torch.arange(8) != 3].isfinite().all()


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(1000, 24), (8, 300)], ids=str)
def test_is_the_same_every_time(shape, dtype, in_blocks, path, device):
    inputs = problem(shape, dtype, device)
    assert all(map(torch.equal, run(fused(), *inputs), run(fused(), *inputs)))


def test_computes_only_the_gradients_asked_for(in_blocks, path, device):
    x, weight = problem((8, 90), FP32, device)
    expected = run(fused(), x, weight)
    torch.testing.assert_close(run(fused(), x, weight.detach())[1], expected[1])
    torch.testing.assert_close(run(fused(), x.detach(), weight)[1], expected[2])
    args = (torch.ones_like(x), x.detach(), weight.detach(), 1e-6, 1.0, 0.0, "inside", False)
    x_grad, weight_grad = torch.ops.graphfuse.rms_norm_backward(*args)
    torch.testing.assert_close(x_grad, expected[1])
    assert weight_grad.shape == (0,)


def test_saves_nothing_but_its_inputs(path, device):
    x, weight = problem((8, 24), FP32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=str)
@pytest.mark.parametrize("has_weight", [True, False])
def test_opcheck(has_weight, dtype):
    x = torch.randn(2, 3, 5, 16).to(dtype).transpose(1, 2).requires_grad_()
    weight = torch.randn(16).requires_grad_() if has_weight else None
    options = (1e-6, 1.0, 1.0, "inside")
    torch.library.opcheck(torch.ops.graphfuse.rms_norm.default, (x, weight, *options, dtype, dtype))
    grad, weight = torch.randn(2, 5, 3, 16).to(dtype), weight if weight is None else weight.detach()
    for need_weight in (True, False):
        args = (grad, x.detach(), weight, *options, need_weight)
        torch.library.opcheck(torch.ops.graphfuse.rms_norm_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(dynamic, path, device):
    def step(x, weight):
        return rms_norm((x * 2).transpose(1, 2), weight, normalized_dtype=FP16, mode="clamp") * 3

    inputs, grad = problem((2, 3, 5, 16), FP16, device), torch.randn(2, 5, 3, 16, device=device).half()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    found, expected = (run(call, *inputs, grad=grad) for call in (compiled, step))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found, expected)


def test_second_derivative_raises(path, device):
    x, weight = problem((3, 8), FP32, device)
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(rms_norm(x, weight).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5, 4).int()}, TypeError, r"x: expected fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"x": torch.tensor(0.0)}, ValueError, r"x: expected at least 1 dimension, got 0"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: expected shape \(4,\), got \(3,\)"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight: expected shape \(4,\), got \(5, 4\)"),
        ({"weight": torch.zeros(4).long()}, TypeError, r"weight: expected fp16, .* got torch.int64"),
        ({"weight": torch.zeros(4, device="meta")}, ValueError, r"weight: .* on cpu, as x, got one on meta"),
        ({"eps": -1e-6}, ValueError, r"eps: expected 0 or a positive number, got -1e-06"),
        ({"eps": float("nan")}, ValueError, r"eps: expected 0 or a positive number, got nan"),
        ({"mode": "above"}, ValueError, r"mode: expected one of inside, outside, clamp, got above"),
        ({"normalized_dtype": torch.int8}, TypeError, r"normalized_dtype: expected fp16, .* got torch.int8"),
        ({"out_dtype": torch.bool}, TypeError, r"out_dtype: expected fp16, .* got torch.bool"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rejects(change, error, message):
    with pytest.raises(error, match=message):
        rms_norm(**({"x": torch.zeros(5, 4), "weight": torch.zeros(4)} | change))


def test_takes_every_dtype_it_names(device):
    for x_dtype, weight_dtype, out_dtype in itertools.product(DTYPES, repeat=3):
        x, weight = problem((3, 8), x_dtype, device, weight_dtype)
        y, x_grad, weight_grad = run(fused(), x, weight, x_dtype, out_dtype)
        assert (y.dtype, x_grad.dtype, weight_grad.dtype) == (out_dtype, x_dtype, weight_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [128, 2048, 4096, 5120, 8192, 16384, 65536])
@pytest.mark.parametrize("rows", [1, 3000])
def test_no_worse_at_the_widths_of_models(rows, features):
    assert_no_worse(fused(), eager(), (*problem((rows, features), BF16, "cuda"), BF16))


@pytest.mark.gpu
def test_counts_beyond_32_bits():
    rows, features = 2**20 + 3, 2048
    x = torch.randn(rows, features, device="cuda", dtype=BF16).requires_grad_()
    y, x_grad = run(fused(), x, None)
    expected = run(fused(), x[-5:].detach().requires_grad_(), None)
    assert torch.equal(y[-5:], expected[0])
    assert torch.equal(x_grad[-5:], expected[1])


@pytest.mark.gpu
def test_never_waits_for_the_gpu():
    """Forward and backward run with host syncs forbidden, and replay from a CUDA graph on new inputs."""
    x, weight = problem((64, 4096), BF16, "cuda")

    step = functools.partial(run, fused(), x, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, replayed, step()))
