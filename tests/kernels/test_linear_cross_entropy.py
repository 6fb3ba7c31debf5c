"""linear_cross_entropy and linear_log_probs against torch's linear, cross_entropy and log_softmax: the numbers.

Without a GPU the kernel runs in Triton's interpreter on CPU tensors: `path` says what handles a chunk of logits.
"""

import math

import pytest
import torch
from torch.nn import functional

from graphfuse.kernels.linear_cross_entropy import (
    LossOptions,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
)
from graphfuse.testing import assert_no_worse

TOKENS, FEATURES, VOCAB, CHUNK = 19, 24, 77, 8
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
PLAIN = LossOptions()
EVERYTHING = LossOptions(label_smoothing=0.2, logit_scale=1.7, softcap=4.0, z_loss=1e-2)
BOTH = pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])


def problem(device, dtype, options=PLAIN, tokens=TOKENS):
    """Inputs in the order of the op: hidden, weight, bias, target, class_weight."""
    hidden = torch.randn(tokens, FEATURES, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, FEATURES, device=device) * 0.3).to(dtype).requires_grad_()
    target = torch.randint(0, VOCAB, (tokens,), device=device)
    target[1::5] = options.ignore_index
    if options is not EVERYTHING:
        return hidden, weight, None, target, None
    bias = torch.randn(VOCAB, device=device).to(dtype).requires_grad_()
    return hidden, weight, bias, target, torch.rand(VOCAB, device=device) + 0.1


def fused(options=PLAIN, reduction="mean", chunk=CHUNK):
    def call(hidden, weight, bias, target, class_weight, logits_dtype=None):
        return linear_cross_entropy(
            hidden,
            weight,
            target,
            bias,
            class_weight=class_weight,
            reduction=reduction,
            logits_dtype=logits_dtype or hidden.dtype,
            chunk_size=chunk,
            **options._asdict(),
        )

    return call


def eager(options=PLAIN, reduction="mean"):
    def call(hidden, weight, bias, target, class_weight, logits_dtype=None):
        dtype = logits_dtype or hidden.dtype
        return linear_cross_entropy_reference(hidden, weight, bias, target, class_weight, options, reduction, dtype)

    return call


def losses_and_grads(call, inputs):
    loss = call(*inputs)
    leaves = [leaf for leaf in inputs if leaf is not None and leaf.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH
def test_no_worse_than_eager(options, dtype, reduction, path, device):
    assert_no_worse(fused(options, reduction), eager(options, reduction), problem(device, dtype, options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@BOTH
def test_no_worse_than_an_upcast_loss(options, dtype, path, device):
    """Eager upcasts logits that are rounded already, as models do."""
    assert_no_worse(fused(options), eager(options), (*problem(device, dtype, options), torch.float32))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@BOTH
def test_reference_path_is_exact_in_float64(options, reduction, device):
    inputs = problem(device, torch.float64, options)
    found, expected = (losses_and_grads(make(options, reduction), inputs) for make in (fused, eager))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tokens", [4096, 5000])
def test_loss_is_good_to_five_digits(tokens, device):
    inputs = problem(device, torch.float32, tokens=tokens)
    expected = eager()(
        *(value.double() if value is not None and value.is_floating_point() else value for value in inputs)
    )
    assert fused(chunk=0)(*inputs).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 8), (8, 8), (9, 8), (16, 8), (7, 1), (5, 0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_do_not_matter(reduction, tokens, chunk, path, device):
    inputs = problem(device, torch.float32, EVERYTHING, tokens)
    assert_no_worse(fused(EVERYTHING, reduction, chunk), eager(EVERYTHING, reduction), inputs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens(reduction, path, device):
    inputs = problem(device, torch.float32, EVERYTHING, tokens=0)
    found, expected = (losses_and_grads(make(EVERYTHING, reduction), inputs) for make in (fused, eager))
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_no_features(path, device):
    hidden, weight = (torch.empty(n, 0, device=device, requires_grad=True) for n in (5, 7))
    loss = linear_cross_entropy(hidden, weight, torch.zeros(5, dtype=torch.int64, device=device))
    assert loss.item() == pytest.approx(math.log(7))
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("reduction", "expected"), [("mean", math.nan), ("sum", 0.0)])
def test_no_token_counts(reduction, expected, dtype, path, device):
    inputs = problem(device, dtype, EVERYTHING)
    inputs[3].fill_(-100)
    loss, *grads = losses_and_grads(fused(EVERYTHING, reduction), inputs)
    assert loss.item() == pytest.approx(expected, nan_ok=True)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_have_no_gradient(reduction, path, device):
    inputs = problem(device, torch.float32, EVERYTHING)
    ignored = inputs[3] == -100
    grad = losses_and_grads(fused(EVERYTHING, reduction), inputs)[1]
    assert not grad[ignored].any()
    assert grad[~ignored].any(1).all()


@pytest.mark.parametrize("wrong", [VOCAB, -1, 2**40])
def test_target_out_of_range_raises_on_cpu(wrong):
    hidden, weight, _, target, _ = problem("cpu", torch.float32)
    target[4] = wrong
    with pytest.raises(IndexError, match=rf"target: expected classes in \[0, {VOCAB}\), got {wrong}"):
        linear_cross_entropy(hidden, weight, target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_accepts_any_strides(reduction, path, device):
    _, weight, _, target, _ = problem(device, torch.float32)
    hidden = torch.randn(TOKENS, 2, FEATURES, device=device)[:, 1].requires_grad_()
    weight = weight.detach().t().contiguous().t().requires_grad_()
    inputs = (hidden, weight, None, target.repeat_interleave(2)[::2], None)
    assert_no_worse(fused(reduction=reduction), eager(reduction=reduction), inputs)
    assert losses_and_grads(fused(reduction=reduction), inputs)[2].stride() == weight.stride()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_keeps_the_shape_of_the_tokens(reduction, path, device):
    hidden, weight, _, target, _ = problem(device, torch.float32, tokens=15)
    expected = losses_and_grads(fused(reduction=reduction), (hidden, weight, None, target, None))
    loss = linear_cross_entropy(
        hidden.reshape(3, 5, FEATURES), weight, target.reshape(3, 5).int(), reduction=reduction, chunk_size=CHUNK
    )
    assert loss.shape == ((3, 5) if reduction == "none" else ())
    assert torch.equal(loss.reshape(expected[0].shape), expected[0])
    assert torch.equal(torch.autograd.grad(loss.sum(), hidden)[0], expected[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_is_deterministic(reduction, path, device):
    inputs = problem(device, torch.float32, EVERYTHING)
    first, second = (losses_and_grads(fused(EVERYTHING, reduction), inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_half_precision_does_not_underflow(device):
    """1/count times a small gradient is below fp16; the loss scale that lifts it comes only in backward."""
    inputs = problem(device, torch.float16, tokens=4096)
    with torch.no_grad():
        inputs[1].mul_(1e-3)

    def scaled(call):
        return lambda *inputs: call(*inputs) * 2.0**12

    assert_no_worse(scaled(fused(chunk=1024)), scaled(eager()), (*inputs, torch.float32))


def test_tied_weight_sums_its_gradients(path, device):
    _, weight, _, target, _ = problem(device, torch.float32)
    tokens = torch.randint(0, VOCAB, (TOKENS,), device=device)

    def tied(call):
        return lambda weight: call(functional.embedding(tokens, weight).tanh(), weight, None, target, None)

    assert_no_worse(tied(fused()), tied(eager()), (weight,))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_classes_of_minus_infinity(reduction, path, device):
    """A bias that bans classes, among them the target of some tokens."""
    hidden, weight, bias, target, _ = problem(device, torch.float32, EVERYTHING)
    banned = [3, 40, 41]
    with torch.no_grad():
        bias[banned] = -math.inf
    target[torch.isin(target, torch.tensor(banned, device=device))] = 5
    inputs = (hidden, weight, bias, target, None)
    options = LossOptions(z_loss=1e-2)
    assert_no_worse(fused(options, reduction), eager(options, reduction), inputs)
    target[2] = 40
    loss, *grads = losses_and_grads(fused(reduction="sum"), inputs)
    assert loss == math.inf
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_are_no_worse_than_eager(dtype, softcap, path, device):
    *tensors, target, _ = problem(device, dtype, EVERYTHING)

    def ours(hidden, weight, bias, out_dtype):
        options = {"logit_scale": 1.7, "softcap": softcap, "chunk_size": CHUNK}
        return linear_log_probs(hidden, weight, target, bias, **options).to(out_dtype)

    def theirs(hidden, weight, bias, out_dtype):
        z = functional.linear(hidden, weight, bias).to(out_dtype) * 1.7
        z = softcap * torch.tanh(z / softcap) if softcap else z
        found = z.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(target != -100, found, 0)

    assert_no_worse(ours, theirs, (*tensors, torch.float32))


def test_log_probs_keep_the_shape_of_the_tokens(path, device):
    hidden, weight, _, target, _ = problem(device, torch.float32, tokens=15)
    found = linear_log_probs(hidden.reshape(3, 5, FEATURES), weight, target.reshape(3, 5).int())
    assert found.shape == (3, 5)
    assert torch.equal(found.flatten(), linear_log_probs(hidden, weight, target))
    assert not found.flatten()[target == -100].any()
