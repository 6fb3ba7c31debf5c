"""layer_norm against its reference: numbers, rounding, strides, gradients, autograd, compilers, errors.

Without a GPU the kernels run in Triton's interpreter on CPU tensors: `path` says what computes.
"""

import functools
import itertools

import pytest
import torch

from graphfuse.kernels import _layer_norm_kernel as backward_kernels
from graphfuse.kernels import _rms_norm_kernel as forward_kernels
from graphfuse.kernels import layer_norm as module
from graphfuse.kernels._norm import MODES
from graphfuse.kernels._op import DTYPES
from graphfuse.kernels.layer_norm import layer_norm, layer_norm_reference
from graphfuse.testing import assert_no_worse

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# Aligned, ragged, two features, no rows, no leading dims, more tiles than programs.
SHAPES = [(8, 128), (7, 123), (2, 3, 2), (0, 64), (5,), (150, 320)]
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
EVERY_AFFINE = pytest.mark.parametrize(
    ("has_weight", "has_bias"),
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["weight and bias", "weight", "bias", "neither"],
)


@pytest.fixture(params=[False, True], ids=["", "in blocks"])
def in_blocks(request, monkeypatch):
    """Whether rows of more than 64 features count as wide, and are read in blocks of 32."""
    if request.param:
        monkeypatch.setattr(forward_kernels, "MAX_BLOCK", 64)
        monkeypatch.setattr(forward_kernels, "WIDE_BLOCK", 32)
        monkeypatch.setattr(backward_kernels, "MAX_BLOCK_BACKWARD", 64)
        monkeypatch.setattr(backward_kernels, "WIDE_BLOCK", 32 * backward_kernels.WIDE_ROWS)
        # Neither out of their caches nor into them.
        monkeypatch.setattr(module, "plan_forward", forward_kernels.plan_forward.__wrapped__)
        monkeypatch.setattr(module, "plan_backward", backward_kernels.plan_backward.__wrapped__)


def problem(shape, dtype, device, other_dtype=None):
    """An input whose rows have standard deviations from 1 to 2 and means of that size, a weight, and a bias."""
    mean, deviation = torch.randn(*shape[:-1], 1, device=device), torch.rand(*shape[:-1], 1, device=device).exp2()
    x = (torch.randn(shape, device=device) + mean) * deviation
    weight, bias = torch.randn(2, shape[-1], device=device) / 4 + torch.tensor([[1], [0]], device=device)
    return x.to(dtype).requires_grad_(), *(t.to(other_dtype or dtype).requires_grad_() for t in (weight, bias))


def fused(**options):
    def call(x, weight, bias, normalized_dtype=FP32, out_dtype=None):
        return layer_norm(x, weight, bias, normalized_dtype=normalized_dtype, out_dtype=out_dtype, **options)

    return call


def eager(eps=1e-5, gain=1.0, offset=0.0, mode="inside"):
    def call(x, weight, bias, normalized_dtype=FP32, out_dtype=None):
        args = (eps, gain, offset, mode, normalized_dtype, out_dtype or x.dtype)
        return layer_norm_reference(x, weight, bias, *args)

    return call


def run(call, *inputs, grad=None):
    """The result and the gradients of the inputs that have one."""
    y = call(*inputs)
    leaves = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if grad is None else grad)


@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_eager(shape, dtype, path, device):
    # With two features and no eps all of the gradient cancels.
    eps = 0.5 if shape[-1] == 2 else 1e-5
    assert_no_worse(fused(eps=eps), eager(eps=eps), problem(shape, dtype, device))


@EVERY_DTYPE
@EVERY_OPTION
def test_no_worse_with_options(options, dtype, in_blocks, path, device):
    x, weight, bias = problem((9, 90), dtype, device)
    assert_no_worse(fused(**options), eager(**options), (x, weight, bias, dtype))
    assert_no_worse(fused(**options), eager(**options), (x, None, None, FP32, FP32))


@EVERY_AFFINE
def test_no_worse_without_weight_or_bias(has_weight, has_bias, in_blocks, path, device):
    x, weight, bias = problem((9, 90), FP32, device)
    assert_no_worse(fused(), eager(), (x, weight if has_weight else None, bias if has_bias else None))


@pytest.mark.parametrize("other_dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("x_dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("out_dtype", [FP32, FP16], ids=str)
def test_no_worse_with_mixed_dtypes(out_dtype, x_dtype, other_dtype, path, device):
    inputs = problem((6, 72), x_dtype, device, other_dtype)
    assert_no_worse(fused(), eager(), (*inputs, FP32, out_dtype))


@pytest.mark.parametrize("size", [1e-17, 1e-3, 1e3, 1e17])
@EVERY_MODE
def test_no_worse_far_from_one(mode, size, in_blocks, path, device):
    x, weight, bias = problem((6, 72), FP32, device)
    x = (x.detach() * size).requires_grad_()
    assert_no_worse(fused(mode=mode), eager(mode=mode), (x, weight, bias))


def test_no_worse_where_the_mean_is_large(in_blocks, path, device):
    """A difference of mean(x ** 2) and mean(x) ** 2 would have no digit left."""
    x, weight, bias = problem((40, 100), FP32, device)
    x = (x.detach() + 3e3).requires_grad_()
    assert_no_worse(fused(), eager(), (x, weight, bias))


def test_no_worse_where_the_first_block_differs(in_blocks, path, device):
    """The shift of a wide row is the mean of its first block."""
    x, weight, bias = problem((6, 200), FP32, device)
    with torch.no_grad():
        x[:, 32:] += 1e3
    assert_no_worse(fused(), eager(), (x, weight, bias), ulps=32)


@EVERY_DTYPE
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rounds_where_told(offset, dtype, path, device):
    # Sums of these and of their squares are exact, in any order: each stands beside its opposite.
    x = torch.randint(1, 17, (33, 128), device=device) / 8
    x = torch.cat([x, -x], dim=-1).to(dtype)
    weight = problem((33, 256), dtype, device)[1].detach()
    bias = torch.full((256,), 0.5, device=device, dtype=dtype)
    scale = weight.float() + offset
    late, early = layer_norm(x, mode="outside", out_dtype=FP32), layer_norm(x, mode="outside")
    assert torch.equal(early, late.to(dtype))
    normalize = functools.partial(layer_norm, x, weight, offset=offset, mode="outside")
    assert torch.equal(normalize(), (late * scale).to(dtype))
    assert torch.equal(normalize(normalized_dtype=dtype), (early.float() * scale).to(dtype))
    assert torch.equal(normalize(normalized_dtype=dtype, out_dtype=FP32), early.float() * scale)
    found = normalize(bias, normalized_dtype=dtype, out_dtype=FP32)
    torch.testing.assert_close(found, early.float() * scale + 0.5, rtol=1e-6, atol=1e-6)


@EVERY_OPTION
def test_is_exact_in_float64(options, device):
    """So it is the reference path that computes."""
    x, weight, bias = problem((5, 7), FP64, device)
    found, expected = (run(make(**options), x, weight, bias, FP64) for make in (fused, eager))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(fused(**options), (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(fused(**options), (x, None, None), fast_mode=True)


@EVERY_MODE
def test_any_float64_input_makes_it_exact(mode, device):
    x, weight, bias = problem((5, 7), FP32, device)
    expected = eager(mode=mode)(x.double(), weight.double(), bias.double())
    for position in range(4):
        *dtypes, out_dtype = [FP64 if k == position else FP32 for k in range(4)]
        inputs = [tensor.to(dtype) for tensor, dtype in zip((x, weight, bias), dtypes, strict=True)]
        assert torch.equal(layer_norm(*inputs, mode=mode, out_dtype=out_dtype), expected.to(out_dtype))


LAYOUTS = {
    # Views of shape (2, 5, 3, 16).
    "transposed heads": lambda t: t(2, 3, 5, 16).transpose(1, 2),
    "packed heads": lambda t: t(2, 5, 9, 16)[:, :, 3:6],
    "packed, transposed": lambda t: t(2, 3, 3, 5, 16)[:, 1].transpose(1, 2),
    "cut features": lambda t: t(2, 5, 3, 40)[..., 8:24],
    "every other feature": lambda t: t(2, 5, 3, 32)[..., ::2],
    "channels first": lambda t: t(2, 16, 5, 3).permute(0, 2, 3, 1),
    "expanded": lambda t: t(2, 1, 3, 16).expand(2, 5, 3, 16),
}


@pytest.mark.parametrize("grad_layout", ["transposed heads", "packed heads", "channels first"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_strides_as_they_come(layout, grad_layout, path, device):
    """And returns those of empty_like."""
    x = LAYOUTS[layout](lambda *shape: torch.randn(shape, device=device)).detach().requires_grad_()
    grad = LAYOUTS[grad_layout](lambda *shape: torch.randn(shape, device=device))
    _, *others = problem((16,), FP32, device)
    found = run(fused(), x, *others, grad=grad)
    expected = run(fused(), x.detach().contiguous().requires_grad_(), *others, grad=grad.contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[0].stride() == found[1].stride() == torch.empty_like(x).stride()


def test_takes_more_dims_than_the_kernels_do(path, device):
    x = torch.randn(4, 5, 6, 7, 8, device=device)[::2, ::2, ::2, ::2].requires_grad_()
    _, weight, bias = problem((8,), FP32, device)
    assert_no_worse(fused(), eager(), (x, weight, bias))
    assert run(fused(), x, weight, bias)[0].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("make", [lambda w: w[::2], lambda w: w[:1].expand(24), lambda w: w.flip(0)[24:]])
def test_takes_any_weight_and_bias(make, path, device):
    x, *_ = problem((6, 24), FP32, device)
    weight, bias = (make(torch.randn(48, device=device)).detach().requires_grad_() for _ in range(2))
    found, expected = (run(call, x, weight, bias) for call in (fused(), eager()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 3), (4, 0)], ids=str)
def test_empty_gradients_are_zero(shape, path, device):
    y, x_grad, *others = run(fused(), *problem(shape, FP32, device))
    assert y.shape == x_grad.shape == shape
    assert all(torch.equal(grad, torch.zeros(shape[-1:], device=device)) for grad in others)


@pytest.mark.parametrize("value", [0.0, 1.0])
@EVERY_MODE
def test_constant_rows_have_gradients(mode, value, in_blocks, path, device):
    x, weight, bias = problem((4, 90), FP32, device)
    with torch.no_grad():
        x[1::2] = value
    found, expected = (run(call, x, weight, bias) for call in (fused(mode=mode), eager(mode=mode)))
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][::2], expected[1][::2], rtol=1e-5, atol=1e-5)


def test_one_feature_is_the_bias(path, device):
    x, weight, bias = problem((5, 1), FP32, device)
    y, x_grad, weight_grad, bias_grad = run(fused(), x, weight, bias)
    assert torch.equal(y, bias.expand(5, 1))
    assert torch.equal(x_grad, torch.zeros_like(x))
    assert (weight_grad.item(), bias_grad.item()) == (0.0, 5.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@EVERY_MODE
def test_nan_stays_in_its_row(mode, value, in_blocks, path, device):
    x, weight, bias = problem((8, 90), FP32, device)
    with torch.no_grad():
        x[3, 5] = x[4, 85] = value
    y, x_grad, _, _ = run(fused(mode=mode), x, weight, bias)
    others = [row for row in range(8) if row not in (3, 4)]
    for tensor in (y, x_grad):
        assert tensor[[3, 4]].isnan().all()
        assert tensor[others].isfinite().all()


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(300, 24), (8, 100)], ids=str)
def test_is_the_same_every_time(shape, dtype, in_blocks, path, device):
    inputs = problem(shape, dtype, device)
    assert all(map(torch.equal, run(fused(), *inputs), run(fused(), *inputs)))


def test_computes_only_the_gradients_asked_for(in_blocks, path, device):
    inputs = problem((8, 90), FP32, device)
    expected = run(fused(), *inputs)
    for position in range(3):
        own = [tensor if k == position else tensor.detach() for k, tensor in enumerate(inputs)]
        torch.testing.assert_close(run(fused(), *own)[1], expected[1 + position])
    x, weight, _ = (tensor.detach() for tensor in inputs)
    args = (torch.ones_like(x), x, weight, 1e-5, 1.0, 0.0, "inside", False, None)
    x_grad, weight_grad, bias_grad = torch.ops.graphfuse.layer_norm_backward(*args)
    torch.testing.assert_close(x_grad, expected[1])
    assert weight_grad.shape == bias_grad.shape == (0,)


def test_saves_nothing_but_its_inputs(path, device):
    x, weight, bias = problem((8, 24), FP32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_norm(x, weight, bias)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=str)
@EVERY_AFFINE
def test_opcheck(has_weight, has_bias, dtype):
    x = torch.randn(2, 3, 5, 16).to(dtype).transpose(1, 2).requires_grad_()
    weight, bias = (torch.randn(16).requires_grad_() if there else None for there in (has_weight, has_bias))
    options = (1e-5, 1.0, 1.0, "inside")
    torch.library.opcheck(torch.ops.graphfuse.layer_norm.default, (x, weight, bias, *options, dtype, dtype))
    grad, weight = torch.randn(2, 5, 3, 16).to(dtype), weight if weight is None else weight.detach()
    for need_weight in (True, False):
        args = (grad, x.detach(), weight, *options, need_weight, FP32 if has_bias else None)
        torch.library.opcheck(torch.ops.graphfuse.layer_norm_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(dynamic, path, device):
    def step(x, weight, bias):
        return layer_norm((x * 2).transpose(1, 2), weight, bias, normalized_dtype=FP16, mode="clamp") * 3

    inputs, grad = problem((2, 3, 5, 16), FP16, device), torch.randn(2, 5, 3, 16, device=device).half()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    found, expected = (run(call, *inputs, grad=grad) for call in (compiled, step))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found, expected)


def test_second_derivative_raises(path, device):
    x, weight, bias = problem((3, 8), FP32, device)
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(layer_norm(x, weight, bias).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5, 4).int()}, TypeError, r"x: expected fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"x": torch.tensor(0.0)}, ValueError, r"x: expected at least 1 dimension, got 0"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: expected shape \(4,\), got \(3,\)"),
        ({"bias": torch.zeros(5, 4)}, ValueError, r"bias: expected shape \(4,\), got \(5, 4\)"),
        ({"bias": torch.zeros(4).bool()}, TypeError, r"bias: expected fp16, .* got torch.bool"),
        ({"mode": "above"}, ValueError, r"mode: expected one of inside, outside, clamp, got above"),
        ({"normalized_dtype": torch.int8}, TypeError, r"normalized_dtype: expected fp16, .* got torch.int8"),
        ({"out_dtype": torch.bool}, TypeError, r"out_dtype: expected fp16, .* got torch.bool"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rejects(change, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**({"x": torch.zeros(5, 4), "weight": torch.zeros(4), "bias": torch.zeros(4)} | change))


def test_takes_every_dtype_it_names(device):
    for x_dtype, weight_dtype, bias_dtype, out_dtype in itertools.product(DTYPES, repeat=4):
        x, weight, bias = problem((3, 8), x_dtype, device, weight_dtype)
        bias = bias.detach().to(bias_dtype).requires_grad_()
        y, *gradients = run(fused(), x, weight, bias, x_dtype, out_dtype)
        assert y.dtype == out_dtype
        assert [gradient.dtype for gradient in gradients] == [x_dtype, weight_dtype, bias_dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("features", [128, 768, 2048, 4096, 5120, 8192, 12288, 65536])
@pytest.mark.parametrize("rows", [1, 3000])
def test_no_worse_at_the_widths_of_models(rows, features):
    assert_no_worse(fused(), eager(), (*problem((rows, features), BF16, "cuda"), BF16))


@pytest.mark.gpu
def test_counts_beyond_32_bits():
    rows, features = 2**20 + 3, 2048
    x = torch.randn(rows, features, device="cuda", dtype=BF16).requires_grad_()
    y, x_grad = run(fused(), x, None, None)
    expected = run(fused(), x[-5:].detach().requires_grad_(), None, None)
    assert torch.equal(y[-5:], expected[0])
    assert torch.equal(x_grad[-5:], expected[1])


@pytest.mark.gpu
def test_never_waits_for_the_gpu():
    """Forward and backward run with host syncs forbidden, and replay from a CUDA graph on new inputs."""
    x, weight, bias = problem((64, 4096), BF16, "cuda")

    step = functools.partial(run, fused(), x, weight, bias)
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
