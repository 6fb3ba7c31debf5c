"""A head with an adapter: a second product of few features is added to the logits, chunk by chunk."""

import pytest
import torch
from torch.nn import functional

from graphfuse.kernels._weight_grad import whole_loads
from graphfuse.kernels.linear_cross_entropy import (
    LossOptions,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
)
from graphfuse.testing import assert_no_worse
from tests.kernels.test_linear_cross_entropy_work import Watch

TOKENS, FEATURES, VOCAB, RANK, CHUNK = 19, 24, 77, 3, 8
PLAIN = LossOptions()
EVERYTHING = LossOptions(label_smoothing=0.2, logit_scale=1.7, softcap=4.0, z_loss=1e-2)


def problem(device, dtype=torch.float32, low_dtype=None, tokens=TOKENS):
    """Hidden, weight, bias; the two factors of the adapter; target."""
    shapes = [(tokens, FEATURES), (VOCAB, FEATURES), (VOCAB,), (tokens, RANK), (VOCAB, RANK)]
    dtypes = [dtype] * 3 + [low_dtype or dtype] * 2
    leaves = [
        (torch.randn(shape, device=device) * 0.4).to(own).requires_grad_()
        for shape, own in zip(shapes, dtypes, strict=True)
    ]
    target = torch.randint(0, VOCAB, (tokens,), device=device)
    target[1::5] = -100
    return *leaves, target


def ours(options=PLAIN, reduction="mean", **more):
    def call(hidden, weight, bias, low_hidden, low_weight, target):
        low_rank = (low_hidden, low_weight)
        settings = {"reduction": reduction, "chunk_size": CHUNK, **options._asdict(), **more}
        return linear_cross_entropy(hidden, weight, target, bias, low_rank=low_rank, **settings)

    return call


def eager(options=PLAIN, reduction="mean"):
    def call(hidden, weight, bias, low_hidden, low_weight, target):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return linear_cross_entropy_reference(
            hidden, weight, bias, target, None, options, reduction, dtype, (low_hidden, low_weight)
        )

    return call


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_no_worse_than_eager(options, reduction, device):
    assert_no_worse(ours(options, reduction), eager(options, reduction), problem(device))


@pytest.mark.parametrize("low_dtype", [None, torch.float32], ids=["same", "wide"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_no_worse_than_eager_in_half(options, dtype, low_dtype, device):
    """Eager rounds the second product by itself where it is as narrow.

    Over many tokens, in chunks of many: of few, luck would decide. A GPU sums the chunks' gradients in half precision,
    with an error that grows with the number of chunks. Beside a wide product eager keeps the logits wide, too, and the
    op does not.
    """
    tokens, slack = 2000, 1.1 if low_dtype is None else 1.25
    inputs = problem(device, dtype, low_dtype, tokens)
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]

    def results(call, inputs):
        losses = call(*inputs)
        return losses.detach(), *torch.autograd.grad(losses.sum(), inputs[:5])

    truth = results(eager(options, "none"), exact)
    theirs, mine = (
        results(call, inputs) for call in (eager(options, "none"), ours(options, "none", chunk_size=tokens // 8))
    )
    for eager_, our, true in zip(theirs, mine, truth, strict=True):
        assert our.dtype == eager_.dtype
        assert (our - true).norm() <= slack * (eager_ - true).norm()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_is_exact_in_float64(reduction, compact, device):
    *leaves, target = problem(device, torch.float64)
    found, expected = (
        make(EVERYTHING, reduction, **more)(*leaves, target).sum()
        for make, more in ((ours, {"compact": compact}), (eager, {}))
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    grads = (torch.autograd.grad(loss, leaves) for loss in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("trained", ["", "low_hidden low_weight", "hidden low_hidden", "weight", "low_weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_computes_the_gradients_that_are_needed(reduction, trained, device):
    """A frozen weight costs nothing beside the adapter."""
    *tensors, target = problem(device)
    whole = torch.autograd.grad(ours(reduction=reduction)(*tensors, target).sum(), tensors)
    names = ("hidden", "weight", "bias", "low_hidden", "low_weight")
    for name, tensor in zip(names, tensors, strict=True):
        tensor.requires_grad_(name in trained.split())
    with Watch() as watch:
        loss = ours(reduction=reduction)(*tensors, target).sum()
        if trained:
            loss.backward()
    classes = whole_loads(VOCAB, tensors[1])[0].stop
    of_weight = [gemm for gemm in watch.gemms if gemm[0] == classes and gemm[2] == FEATURES]
    assert bool(of_weight) is ("weight" in trained.split())
    for tensor, grad in zip(tensors, whole, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, grad)
        else:
            assert tensor.grad is None


def test_wide_factors_keep_their_bits(device):
    """Gradients of an fp32 adapter on a bf16 head come out of fp32 sums."""
    *leaves, target = problem(device, torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(ours()(*leaves, target), leaves[3:])
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    assert not any(torch.equal(grad, grad.bfloat16().float()) for grad in grads)


def test_no_token_counts(device):
    *leaves, target = problem(device)
    loss = ours(reduction="sum")(*leaves, target.fill_(-100))
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(dynamic, device):
    def step(hidden, weight, bias, low_hidden, low_weight, target):
        logps = linear_log_probs(hidden, weight, target, bias, low_rank=(low_hidden, low_weight), chunk_size=CHUNK)
        return ours()(hidden * 2, weight, bias, low_hidden, low_weight, target) + logps.mean()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    *leaves, target = problem(device)
    found, expected = (call(*leaves, target) for call in (compiled, step))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


def test_follows_autocast(device):
    *leaves, target = problem(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ours()(*leaves, target)
    narrow = [leaf.bfloat16() for leaf in leaves]
    assert torch.equal(loss, ours()(*narrow, target))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss, leaves))


def test_keeps_the_shape_of_the_tokens(device):
    hidden, weight, bias, low_hidden, low_weight, target = problem(device, tokens=15)
    shaped = (hidden.reshape(3, 5, -1), weight, bias, low_hidden.reshape(3, 5, -1), low_weight, target.reshape(3, 5))
    flat = ours(reduction="none")(hidden, weight, bias, low_hidden, low_weight, target)
    assert torch.equal(ours(reduction="none")(*shaped).flatten(), flat)


def test_is_the_sum_of_two_linear_layers(device):
    hidden, weight, bias, low_hidden, low_weight, target = problem(device)
    logits = functional.linear(hidden, weight, bias) + functional.linear(low_hidden, low_weight)
    expected = logits.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    found = linear_log_probs(hidden, weight, target.clamp(min=0), bias, low_rank=(low_hidden, low_weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("low_dtype", [None, torch.float32], ids=["same", "wide"])
def test_logits_never_exist_as_a_whole(low_dtype, device):
    tokens = 128
    *leaves, target = problem(device, torch.bfloat16, low_dtype, tokens)
    leaves[1].requires_grad_(False)
    with Watch() as watch:
        ours()(*leaves, target).backward()
    assert CHUNK * VOCAB <= watch.largest < tokens * VOCAB // 2
