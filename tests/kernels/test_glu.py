"""glu against its reference: numbers, clamps, strides, gradients, compilers.

Without a GPU the kernels run in Triton's interpreter on CPU tensors: `path` says what computes.
"""

import math
import re

import pytest
import torch

from graphfuse.kernels import _glu_kernel as kernel
from graphfuse.kernels._packed_glu import PACKINGS, packed_glu, unpack
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.kernels.glu import ACTIVATIONS, glu, glu_reference
from graphfuse.testing import assert_no_worse

# numpy warns where a GPU returns inf and nan.
QUIET = "ignore:(overflow|invalid value) encountered:RuntimeWarning"
pytestmark = pytest.mark.filterwarnings(QUIET)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF = math.inf
SILU = ("silu", 1.0, INF, INF, 0.0)
GPT_OSS = ("swish", 1.702, 7.0, 7.0, 1.0)
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


def problem(device, shape=(3, 5, 24), dtype=torch.float32, size=4.0):
    """Return gate and up, large enough to be clamped at 7."""
    gate, up = (torch.randn(2, *shape, device=device) * size).to(dtype)
    return gate.requires_grad_(), up.requires_grad_()


def check(gate, up, options=SILU, out_dtype=None):
    """The op and its gradients are no worse than the reference in the same dtype."""
    inputs = (gate, up, *options, out_dtype or gate.dtype)
    assert_no_worse(torch.ops.graphfuse.glu, glu_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_worse_than_eager(path, device, activation, dtype):
    check(*problem(device, dtype=dtype), (activation, 1.3, INF, INF, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        GPT_OSS,
        ("silu", 1.0, 10.0, INF, 0.0),
        ("silu", 1.0, INF, 2.0, 0.0),
        ("gelu", 1.0, -1.0, 3.0, -0.5),
        ("identity", 1.0, 0.0, 0.0, 1.0),
    ],
    ids=str,
)
def test_clamps(path, device, options, dtype):
    check(*problem(device, dtype=dtype), options)


def test_gives_the_bound_a_gradient_and_what_is_beyond_none(path, device):
    """As torch.clamp does."""
    around = torch.tensor([-7.5, -7.0, -6.5, 0.0, 6.5, 7.0, 7.5], device=device)
    inputs = [values.requires_grad_() for values in torch.cartesian_prod(around, around).mT]
    y = glu(*inputs, activation="identity", gate_max=7.0, up_limit=7.0)
    expected = inputs[0].clamp(max=7.0) * inputs[1].clamp(-7.0, 7.0)
    ours, theirs = (torch.autograd.grad(result.sum(), inputs) for result in (y, expected))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


EXTREMES = [0.0, -0.0, 1e-30, 80.0, -80.0, 1e4, -1e4, 1e30, -1e30, INF, -INF, math.nan]


OPTIONS = [GPT_OSS, *[(name, *SILU[1:]) for name in ACTIVATIONS]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_treats_extremes_as_eager_does(path, device, options, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # its gelu of infinity is NaN on some CPUs
    extremes = torch.tensor(EXTREMES, device=device)
    ones = torch.ones_like(extremes)
    for inputs in ((extremes, ones), (ones, extremes)):
        y = torch.ops.graphfuse.glu(*inputs, *options, torch.float32)
        expected = glu_reference(*inputs, *options, torch.float32)
        torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_smooth_far_out(path, device, activation):
    """Gradients stay finite where the activation is flat or straight."""
    gate = torch.tensor([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4], device=device)
    options = (activation, 1.0, INF, INF, 0.0)
    ones = torch.ones_like(gate)
    ours = torch.ops.graphfuse.glu_backward(ones, gate, ones, *options)
    for grad, expected in zip(ours, reference_grads(ones, gate, ones, options), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def reference_grads(grad, gate, up, options):
    gate, up = (tensor.double().requires_grad_() for tensor in (gate, up))
    y = glu_reference(gate, up, *options, torch.float64)
    return [found.float() for found in torch.autograd.grad(y, (gate, up), grad.double())]


@pytest.mark.parametrize("up_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "fp32"])
def test_mixes_dtypes(path, device, dtype, up_dtype, out_dtype):
    gate, up = problem(device)
    gate, up = gate.detach().to(dtype), up.detach().to(up_dtype)
    check(gate.requires_grad_(), up.requires_grad_(), GPT_OSS, out_dtype)


SHAPES = [(), (1,), (7,), (3, 1), (33, 41), (2, 3, 128), (0, 24), (3, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accepts_any_shape(path, device, shape):
    check(*problem(device, shape))


def turned(x):
    return x.mT.contiguous().mT


STRIDES = {
    "halves": lambda packed: packed.chunk(2, -1),
    "halves, up first": lambda packed: packed.chunk(2, -1)[::-1],
    "interleaved": lambda packed: (packed[..., ::2], packed[..., 1::2]),
    "interleaved, up first": lambda packed: (packed[..., 1::2], packed[..., ::2]),
    "interleaved, some rows": lambda packed: (packed[:, 1:, ::2], packed[:, 1:, 1::2]),
    "interleaved, some columns": lambda packed: (packed[..., 2:40:2], packed[..., 3:40:2]),
    "turned": lambda packed: tuple(turned(half) for half in packed.chunk(2, -1)),
    "gate turned": lambda packed: (turned(packed[..., :24]), packed[..., 24:]),
    "some rows of gate": lambda packed: (packed[:, 2:, :24], packed[:, :3, 24:]),
    "expanded": lambda packed: [part.expand(3, 5, 24) for part in packed[:1, :, :2].split(1, -1)],
    "the same": lambda packed: (packed, packed),
}


@pytest.mark.parametrize("name", STRIDES)
def test_accepts_any_strides(path, device, name, monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 16)  # several blocks of columns, the last not full
    packed = torch.randn(3, 5, 48, device=device)
    gate, up = (part.detach().requires_grad_() for part in STRIDES[name](packed))
    check(gate, up)
    y = glu(gate, up)
    assert y.stride() == torch.empty_like(gate).stride()
    for grad, of in zip(torch.autograd.grad(y.sum(), (gate, up)), (gate, up), strict=True):
        assert grad.stride() == torch.empty_like(of).stride()


@NEEDS_TRITON
def test_reads_interleaved_inputs_at_once(monkeypatch):
    """Only where up follows gate in memory; elsewhere one by one."""
    plans = []
    plan_launch = kernel.plan_launch.__wrapped__
    monkeypatch.setattr(kernel, "plan_launch", lambda *args: plans.append(plan_launch(*args)))
    packed = torch.randn(4, 48)
    views = (packed[:, ::2], packed[:, 1::2], torch.randn(4, 48)[:, 1::2])
    for gate, up in ((0, 1), (1, 0), (0, 2)):
        kernel._launch(None, (views[gate], views[up], torch.empty(4, 24)), kernel.GluOptions(*SILU))
    assert [plan.constants["ARE_PAIRED"] for plan in plans] == [True, False, False]
    assert plans[0].args == ((0, 2), (0, 2), (0, 1), 1, 96, 1)


def test_takes_a_gradient_of_other_strides(path, device):
    gate, up = problem(device)
    y = glu(gate, up)
    grad = torch.randn(5, 3, 24, device=device).transpose(0, 1)
    ours = torch.autograd.grad(y, (gate, up), grad, retain_graph=True)
    for found, expected in zip(ours, reference_grads(grad, gate, up, SILU), strict=True):
        torch.testing.assert_close(found, expected)


def test_keeps_only_its_inputs(path, device):
    gate, up = problem(device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):
        glu(gate, up)
    assert [tensor.data_ptr() for tensor in saved] == [gate.data_ptr(), up.data_ptr()]


def test_computes_fp64_in_full(device):
    inputs = problem(device, (6, 7), torch.float64, 1.0)
    for activation in ACTIVATIONS:
        args = (activation, 1.3, 2.0, 1.5, 0.5, torch.float64)
        assert torch.equal(torch.ops.graphfuse.glu(*inputs, *args), glu_reference(*inputs, *args))
        assert torch.autograd.gradcheck(torch.ops.graphfuse.glu, (*inputs, *args))


def test_has_no_second_derivative(device):
    gate, up = problem(device)
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(glu(gate, up).sum(), gate, create_graph=True)


@pytest.mark.parametrize("options", [SILU, GPT_OSS], ids=["silu", "gpt_oss"])
@pytest.mark.parametrize("name", ["halves", "interleaved", "turned", "expanded"])
def test_opcheck(device, name, options):
    packed = torch.randn(3, 5, 48, device=device)
    gate, up = (part.detach().requires_grad_() for part in STRIDES[name](packed))
    torch.library.opcheck(torch.ops.graphfuse.glu.default, (gate, up, *options, torch.float16))
    grad, gate, up = torch.randn(3, 5, 24, device=device), gate.detach(), up.detach()
    torch.library.opcheck(torch.ops.graphfuse.glu_backward.default, (grad, gate, up, *options))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(path, device, dynamic):
    def model(x, weight):
        gate, up = (x @ weight).chunk(2, -1)
        return glu(gate, up, gate_max=1.0).square()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    weight = torch.randn(8, 48, device=device, requires_grad=True)
    for tokens in (5, 7):
        x = torch.randn(2, tokens, 8, device=device)
        ours, expected = (run(f, x, weight) for f in (compiled, model))
        torch.testing.assert_close(ours, expected)


def run(model, x, weight):
    y = model(x, weight)
    return y, torch.autograd.grad(y.sum(), weight)[0]


FLOATS = "expected fp16, bf16, fp32 or fp64"
ONES = torch.ones(4)
ERRORS = [
    ({"gate": ONES.int()}, TypeError, f"gate: {FLOATS}, got torch.int32"),
    ({"up": ONES.bool()}, TypeError, f"up: {FLOATS}, got torch.bool"),
    ({"out_dtype": torch.int8}, TypeError, f"out_dtype: {FLOATS}, got torch.int8"),
    ({"up": torch.ones(2, 4)}, ValueError, "up: expected shape (4,), got (2, 4)"),
    ({"activation": "mish"}, ValueError, f"expected one of {', '.join(ACTIVATIONS)}, got mish"),
    ({"up_limit": -1.0}, ValueError, "up_limit: expected 0 or a positive number, got -1.0"),
]


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS)
def test_says_what_is_wrong(changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        glu(**({"gate": ONES, "up": ONES} | changed))


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["halves", "interleaved"])
def test_reaches_beyond_two_gigaelements(which):
    packed = torch.zeros(2**31 // 4096 + 3, 2 * 4096, device="cuda", dtype=torch.bfloat16)
    packed[-1] = torch.randn(2 * 4096)
    gate, up = STRIDES[which](packed)
    expected = glu_reference(gate[-1:], up[-1:], *SILU, packed.dtype)
    torch.testing.assert_close(glu(gate, up)[-1:], expected)


def packed_reference(packed, packing, *options):
    return glu_reference(*unpack(packed, packing), *options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("options", [SILU, GPT_OSS], ids=str)
def test_packed_is_no_worse_than_eager(path, device, options, packing, dtype):
    packed = (torch.randn(3, 5, 46, device=device) * 4).to(dtype).requires_grad_()
    assert_no_worse(torch.ops.graphfuse.packed_glu, packed_reference, (packed, packing, *options, dtype))


def test_packed_gradients_share_a_tensor(path, device):
    packed = torch.randn(7, 32, device=device, requires_grad=True)
    gate, up = unpack(packed.detach(), "up first")
    y = packed_glu(packed, packing="up first", activation="gelu")
    assert torch.equal(y, glu(gate, up, activation="gelu"))
    (grad,) = torch.autograd.grad(y.sum(), packed)
    separate = glu(gate.requires_grad_(), up.requires_grad_(), activation="gelu")
    grads = torch.autograd.grad(separate.sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(unpack(grad, "up first"), grads, strict=True))


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_opcheck(device, packing):
    packed = torch.randn(3, 10, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.graphfuse.packed_glu.default, (packed, packing, *GPT_OSS, torch.float16))
    args = (torch.randn(3, 5, device=device), packed.detach(), packing, *GPT_OSS)
    torch.library.opcheck(torch.ops.graphfuse.packed_glu_backward.default, args)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"packed": torch.ones(3, 5)}, ValueError, "packed: expected an even number of features, got shape (3, 5)"),
        ({"packing": "halves"}, ValueError, "packing: expected one of gate first, up first, interleaved, got halves"),
        ({"packed": torch.ones(4).int()}, TypeError, "packed: expected fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"activation": "sin"}, ValueError, "activation: expected one of"),
    ],
)
def test_packed_says_what_is_wrong(changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        packed_glu(**({"packed": torch.ones(3, 4)} | changed))


SIZES = ((15, 8), (8, 24), (15, 8), (15, 8))  # of a gradient, of the weight it comes through, and of two layers' states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_result", [False, True])
@pytest.mark.parametrize("options", [SILU, GPT_OSS], ids=["silu", "gpt-oss"])
@pytest.mark.parametrize("is_product", [False, True], ids=["given", "product"])
@pytest.mark.parametrize("layout", ["dense", "no matrix", *PACKINGS])
def test_in_place(path, device, layout, is_product, options, with_result, dtype):
    """Gradients over gate and up, and forward's result, are those of the ops that allocate."""
    shape = (3, 5, 24)
    if layout in PACKINGS:
        packed = (torch.randn(3, 5, 48, device=device) * 4).to(dtype)
        gate, up = unpack(packed, layout)
    elif layout == "dense":
        gate, up = (t.detach() for t in problem(device, shape, dtype))
    else:
        gate, up = (t.detach()[:, :5:2, :12].transpose(0, 1) for t in problem(device, (3, 6, 24), dtype))
    grad, weight = torch.randn(gate.shape, device=device).to(dtype), None
    given = grad
    if is_product:
        given = torch.randn(gate[..., 0].numel(), 8, device=device).to(dtype)
        weight = torch.randn(8, gate.shape[-1], device=device).to(dtype)
        grad = (given @ weight).view(gate.shape)
    product = torch.ops.graphfuse.glu(gate, up, *options, dtype)
    expected = torch.ops.graphfuse.glu_backward(grad, gate, up, *options)
    if layout in PACKINGS:
        found = torch.ops.graphfuse.packed_glu_backward_(given, weight, packed, layout, *options, with_result)
    else:
        found = torch.ops.graphfuse.glu_backward_(given, weight, gate, up, *options, with_result)
    torch.testing.assert_close((gate, up), expected, rtol=0, atol=0)
    if with_result:
        torch.testing.assert_close(found, product, rtol=0, atol=0)
    else:
        assert found.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_result", [False, True])
@pytest.mark.parametrize("layout", ["separate", *PACKINGS])
def test_of_products(path, device, layout, with_result, dtype):
    """What the op in place does, of products that it makes itself."""
    grad, weight, states, others = (torch.randn(size, device=device).to(dtype) for size in SIZES)
    gate_weight, up_weight, packed_weight = (torch.randn(8, width, device=device).to(dtype) for width in (24, 24, 48))
    gate, up, packed = states @ gate_weight, others @ up_weight, states @ packed_weight
    options = (*GPT_OSS, with_result)
    if layout in PACKINGS:
        args = (grad, weight, states, packed_weight, layout, *options)
        *found, result = torch.ops.graphfuse.packed_glu_backward_of_products(*args)
        expected = torch.ops.graphfuse.packed_glu_backward_(grad, weight, packed, layout, *options)
        wanted = [packed]
        torch.library.opcheck(torch.ops.graphfuse.packed_glu_backward_of_products.default, args)
    else:
        args = (grad, weight, states, gate_weight, others, up_weight, *options)
        *found, result = torch.ops.graphfuse.glu_backward_of_products(*args)
        expected = torch.ops.graphfuse.glu_backward_(grad, weight, gate, up, *options)
        wanted = [gate, up]
        torch.library.opcheck(torch.ops.graphfuse.glu_backward_of_products.default, args)
    torch.testing.assert_close([*found, result], [*wanted, expected], rtol=0, atol=0)


@pytest.mark.parametrize("with_result", [False, True])
@pytest.mark.parametrize("weight", [None, torch.randn(8, 8)], ids=["given", "product"])
def test_in_place_opcheck(device, weight, with_result):
    grad, gate, up = torch.randn(3, 3, 8, device=device)
    weight = None if weight is None else weight.to(device)
    torch.library.opcheck(torch.ops.graphfuse.glu_backward_.default, (grad, weight, gate, up, *SILU, with_result))
    packed = torch.randn(3, 16, device=device)
    args = (grad, weight, packed, "gate first", *SILU, with_result)
    torch.library.opcheck(torch.ops.graphfuse.packed_glu_backward_.default, args)
