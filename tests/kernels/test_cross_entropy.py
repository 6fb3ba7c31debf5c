"""cross_entropy against torch's own: the numbers, in every layout.

Without a GPU the kernels run in Triton's interpreter on CPU tensors: `path` says what computes.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphfuse.kernels import _cross_entropy_kernel as kernels
from graphfuse.kernels import _op, _softmax_grad
from graphfuse.kernels._loss import LossOptions, cross_entropy_reference
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.kernels.cross_entropy import cross_entropy
from graphfuse.testing import assert_no_worse

TOKENS, VOCAB = 19, 77
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
PLAIN = LossOptions()
EVERYTHING = LossOptions(label_smoothing=0.2, logit_scale=1.7, softcap=4.0, z_loss=1e-2)
KINDS = {
    "plain": PLAIN,
    "smoothed": LossOptions(label_smoothing=0.1),
    "z-loss": LossOptions(z_loss=1e-2),
    "soft-cap": LossOptions(softcap=3.0),
    "scaled": LossOptions(logit_scale=-0.3, ignore_index=5),
    "everything": EVERYTHING,
}
EVERY_KIND = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
BOTH = pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows that take several steps, of 128 fp32 classes, and several programs."""
    monkeypatch.setattr(_softmax_grad, "WARPS", 1)
    monkeypatch.setattr(kernels, "GRAD_BLOCK_BYTES", 512)


def problem(device, dtype, options=PLAIN, tokens=TOKENS, vocab=VOCAB):
    """Logits, targets of which some do not count, and class weights where everything is asked for."""
    logits = (torch.randn(tokens, vocab, device=device) * 2).to(dtype).requires_grad_()
    target = torch.randint(0, vocab, (tokens,), device=device)
    target[1::5] = options.ignore_index
    return logits, target, torch.rand(vocab, device=device) + 0.1 if options is EVERYTHING else None


def fused(options=PLAIN, reduction="mean"):
    def call(logits, target, class_weight, logits_dtype=None):
        loss = {"class_weight": class_weight, "reduction": reduction, "logits_dtype": logits_dtype or logits.dtype}
        return cross_entropy(logits, target, **loss, **options._asdict())

    return call


def eager(options=PLAIN, reduction="mean"):
    def call(logits, target, class_weight, logits_dtype=None):
        return cross_entropy_reference(logits, target, class_weight, options, reduction, logits_dtype or logits.dtype)

    return call


def loss_and_grad(call, inputs):
    loss = call(*inputs)
    return loss.detach(), torch.autograd.grad(loss.sum(), inputs[0])[0]


@EVERY_REDUCTION
@EVERY_DTYPE
@EVERY_KIND
def test_no_worse_than_eager(options, dtype, reduction, path, device):
    assert_no_worse(fused(options, reduction), eager(options, reduction), problem(device, dtype, options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@BOTH
def test_no_worse_than_an_upcast_loss(options, dtype, path, device):
    assert_no_worse(fused(options), eager(options), (*problem(device, dtype, options), torch.float32))


@EVERY_REDUCTION
@EVERY_KIND
def test_reference_path_is_exact_in_float64(options, reduction, device):
    inputs = problem(device, torch.float64, options)
    found, expected = (loss_and_grad(make(options, reduction), inputs) for make in (fused, eager))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("small_blocks")
@BOTH
@pytest.mark.parametrize("vocab", [2, 127, 128, 129, 513])
def test_rows_of_any_length(vocab, options, path, device):
    inputs = problem(device, torch.float32, options, vocab=vocab)
    assert_no_worse(fused(options, "none"), eager(options, "none"), inputs, ulps=8)  # four terms that may cancel


@settings(max_examples=30)
@given(
    st.integers(0, 6),
    st.integers(2, 70),
    st.sampled_from(["dense", "padded", "turned", "expanded", "every other"]),
    st.sampled_from([*KINDS]),
    st.sampled_from(["mean", "sum", "none"]),
    st.booleans(),
)
def test_any_layout(device, tokens, vocab, layout, kind, reduction, use_triton):
    """Rows further apart than they are long, classes that are not neighbours, one row for all tokens."""
    options = KINDS[kind]
    logits, target, class_weight = problem(device, torch.float32, options, tokens, vocab)
    target = target.clamp(max=vocab - 1)
    logits = logits.detach()
    if layout == "padded":
        logits = torch.cat((logits, torch.full((tokens, 3), math.nan, device=device)), 1)[:, :vocab]
    elif layout == "turned":
        logits = logits.t().contiguous().t()
    elif layout == "expanded" and tokens:
        logits = logits[:1].expand(tokens, -1)
    elif layout == "every other":
        logits = logits.repeat_interleave(2, 1)[:, ::2]
    launches = _op.launches
    _op.launches = lambda *_: use_triton and HAS_TRITON
    try:
        inputs = (logits.requires_grad_(), target, class_weight)
        assert_no_worse(fused(options, reduction), eager(options, reduction), inputs, ulps=8)
    finally:
        _op.launches = launches


@EVERY_REDUCTION
def test_no_tokens(reduction, path, device):
    inputs = problem(device, torch.float32, EVERYTHING, tokens=0)
    found, expected = (loss_and_grad(make(EVERYTHING, reduction), inputs) for make in (fused, eager))
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_one_class_is_certain(path, device):
    inputs = problem(device, torch.float32, vocab=1, tokens=1)
    loss, grad = loss_and_grad(fused(), inputs)
    assert not loss
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("reduction", "expected"), [("mean", math.nan), ("sum", 0.0)])
def test_no_token_counts(reduction, expected, dtype, path, device):
    inputs = problem(device, dtype, EVERYTHING)
    inputs[1].fill_(-100)
    loss, grad = loss_and_grad(fused(EVERYTHING, reduction), inputs)
    assert loss.item() == pytest.approx(expected, nan_ok=True)
    assert not grad.any()


@EVERY_REDUCTION
def test_tokens_that_do_not_count_are_not_read(reduction, path, device):
    logits, target, class_weight = problem(device, torch.float32, EVERYTHING)
    with torch.no_grad():
        logits[target == -100] = math.nan
    loss, grad = loss_and_grad(fused(EVERYTHING, reduction), (logits, target, class_weight))
    assert not loss.isnan().any()
    assert not grad[target == -100].any()
    assert grad[target != -100].any(1).all()


def test_rows_without_an_upstream_gradient_have_none(path, device):
    logits, target, _ = problem(device, torch.float32)
    upstream = torch.zeros(TOKENS, device=device)
    upstream[3] = 2.0
    with torch.no_grad():
        logits[4] = math.nan
    (grad,) = torch.autograd.grad(cross_entropy(logits, target, reduction="none"), logits, upstream)
    assert grad.any(1).tolist() == [row == 3 for row in range(TOKENS)]


@pytest.mark.parametrize("wrong", [VOCAB, -1, 2**40])
def test_target_out_of_range_raises_on_cpu(wrong):
    logits, target, _ = problem("cpu", torch.float32)
    target[4] = wrong
    with pytest.raises(IndexError, match=rf"target: expected classes in \[0, {VOCAB}\), got {wrong}"):
        cross_entropy(logits, target)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@BOTH
@pytest.mark.parametrize("wrong", [VOCAB, -1, 2**40])
def test_kernel_turns_a_target_out_of_range_into_nan(wrong, options, monkeypatch, device):
    monkeypatch.setattr(_op, "launches", lambda *_: True)
    logits, target, class_weight = problem(device, torch.float32, options)
    target[4] = wrong
    loss, grad = loss_and_grad(fused(options, "none"), (logits, target, class_weight))
    assert loss.isnan().nonzero().tolist() == [[4]]
    assert grad.isnan().all(1).nonzero().tolist() == grad.isnan().any(1).nonzero().tolist() == [[4]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.usefixtures("small_blocks")
@EVERY_REDUCTION
def test_classes_of_minus_infinity(reduction, path, device):
    """Masked classes: a whole first block, a target, every class of a row."""
    logits, target, _ = problem(device, torch.float32, vocab=300)
    with torch.no_grad():
        logits[:, :130] = -math.inf
    target[target != -100] = 190
    assert_no_worse(fused(PLAIN, reduction), eager(PLAIN, reduction), (logits, target, None))
    with torch.no_grad():
        logits[5] = -math.inf
    target[7] = 3
    assert_no_worse(fused(PLAIN, "none"), eager(PLAIN, "none"), (logits, target, None))


@BOTH
def test_large_offset_costs_no_digits(options, path, device):
    options = options._replace(softcap=0.0, z_loss=0.0)
    logits, *others = problem(device, torch.float32, options, vocab=300)
    inputs = ((logits.detach() + 1e4).requires_grad_(), *others)
    assert_no_worse(fused(options), eager(options), inputs)


@EVERY_REDUCTION
def test_keeps_the_shape_of_the_tokens(reduction, path, device):
    logits, target, _ = problem(device, torch.float32, tokens=15)
    expected = loss_and_grad(fused(reduction=reduction), (logits, target, None))
    loss = cross_entropy(logits.reshape(3, 5, VOCAB), target.reshape(3, 5).int(), reduction=reduction)
    assert loss.shape == ((3, 5) if reduction == "none" else ())
    assert torch.equal(loss.reshape(expected[0].shape), expected[0])
    assert torch.equal(torch.autograd.grad(loss.sum(), logits)[0], expected[1])


def test_half_precision_does_not_underflow(device):
    """1/count times a small gradient is below fp16; the loss scale that lifts it comes with the upstream one."""
    inputs = problem(device, torch.float16, tokens=4096)

    def scaled(call):
        return lambda *inputs: call(*inputs) * 2.0**12

    assert_no_worse(scaled(fused()), scaled(eager()), (*inputs, torch.float32))


@BOTH
def test_is_deterministic(options, path, device):
    inputs = problem(device, torch.float32, options)
    first, second = (loss_and_grad(fused(options), inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31():
    rows, vocab = 8200, 262144
    logits = torch.randn(1, vocab, device="cuda", dtype=torch.bfloat16).repeat(rows, 1).requires_grad_()
    losses = cross_entropy(logits, torch.full((rows,), 7, device="cuda"), reduction="none")
    assert torch.equal(losses, losses[:1].expand(rows))
    losses.sum().backward()
    assert torch.equal(logits.grad[-1], logits.grad[0])


@pytest.mark.parametrize("stride", [513, 516, 521])
@EVERY_DTYPE
def test_rows_that_share_a_vector_of_a_load(stride, dtype, path, device):
    """Rows of 513 begin anywhere in a load of 16 bytes, with those of the gradient or elsewhere in it."""
    fn = fused(PLAIN, "none")

    def in_wider_rows(logits, *others):
        return fn(torch.nn.functional.pad(logits, (0, stride - 513), value=math.nan)[:, :513], *others)

    inputs = problem(device, dtype, vocab=513)
    assert_no_worse(in_wider_rows, eager(PLAIN, "none"), inputs)
