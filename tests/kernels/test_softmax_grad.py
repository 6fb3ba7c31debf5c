"""The pass over a chunk of logits: the kernel and its reference, against torch's cross_entropy and autograd."""

import math

import pytest
import torch

from graphfuse.kernels import _softmax_grad
from graphfuse.kernels._softmax_grad import (
    ROW_MULTIPLE,
    LossOptions,
    scale_triton_,
    softmax_grad_reference,
    softmax_grad_triton,
)
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.testing import assert_no_worse

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
PASSES = [softmax_grad_reference, pytest.param(softmax_grad_triton, marks=needs_triton)]
# The interpreter multiplies bf16 as bit patterns.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

EVERYTHING = LossOptions(label_smoothing=0.2, logit_scale=1.7, softcap=4.0, z_loss=1e-2)
OPTIONS = {
    "plain": LossOptions(),
    "smoothing": LossOptions(label_smoothing=0.1),
    "only_smoothing": LossOptions(label_smoothing=1.0),
    "z_loss": LossOptions(z_loss=1e-2),
    "softcap": LossOptions(softcap=3.0),
    "logit_scale": LossOptions(logit_scale=-0.3),
    "ignored_class": LossOptions(ignore_index=1),
    "everything": EVERYTHING,
}


@pytest.fixture
def blocks_of_64(monkeypatch):
    """Rows that take several steps."""
    monkeypatch.setattr(_softmax_grad, "MAX_BLOCK_BYTES", 256)


def padded(logits):
    """Copy logits to where a kernel finds them: rows of aligned length, whose ends nobody wrote."""
    rows, vocab = logits.shape
    chunk = logits.new_full((rows, -(-vocab // ROW_MULTIPLE) * ROW_MULTIPLE), math.nan)[:, :vocab]
    return chunk.copy_(logits)


def fused(softmax_grad, target, options):
    def losses_and_grad(logits, scale, class_weight=None):
        chunk = padded(logits)
        losses = chunk.new_empty(chunk.shape[0], dtype=torch.float32)
        softmax_grad(chunk, target, scale, class_weight, options, losses)
        return losses.to(logits.dtype), chunk

    return losses_and_grad


def eager(target, options):
    def losses_and_grad(logits, scale, class_weight=None):
        leaf = logits.detach().requires_grad_()
        z = leaf * options.logit_scale
        if options.softcap:
            z = options.softcap * torch.tanh(z / options.softcap)
        losses = torch.nn.functional.cross_entropy(
            z,
            target,
            None if class_weight is None else class_weight.to(z.dtype),
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            reduction="none",
        )
        if options.z_loss:
            losses = losses + options.z_loss * (z.logsumexp(1) ** 2).masked_fill(target == options.ignore_index, 0)
        return losses.detach(), torch.autograd.grad(losses, leaf, scale.to(losses.dtype))[0]

    return losses_and_grad


def case(device, dtype, vocab, rows=6):
    logits = (torch.randn(rows, vocab, device=device) * 2).to(dtype)
    target = torch.randint(0, vocab, (rows,), device=device)
    target[1] = -100
    return logits, target, torch.randn(rows, device=device)


@pytest.mark.parametrize("softmax_grad", PASSES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_worse_than_eager(options, dtype, weighted, softmax_grad, device):
    logits, target, scale = case(device, dtype, vocab=100)
    target[target == -100] = options.ignore_index
    inputs = (logits, scale, torch.rand(100, device=device)) if weighted else (logits, scale)
    assert_no_worse(fused(softmax_grad, target, options), eager(target, options), inputs)


@needs_triton
@pytest.mark.usefixtures("blocks_of_64")
@pytest.mark.parametrize("options", [LossOptions(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("vocab", [2, 63, 64, 65, 128, 257])
def test_rows_of_any_length(vocab, options, device):
    logits, target, scale = case(device, torch.float32, vocab)
    class_weight = torch.rand(vocab, device=device)
    assert_no_worse(fused(softmax_grad_triton, target, options), eager(target, options), (logits, scale, class_weight))


@pytest.mark.parametrize("softmax_grad", PASSES)
def test_one_class_is_certain(softmax_grad, device):
    target = torch.zeros(3, dtype=torch.int64, device=device)
    run = fused(softmax_grad, target, LossOptions())
    losses, grad = run(torch.randn(3, 1, device=device), torch.ones(3, device=device))
    assert not losses.any()
    assert not grad.any()


@pytest.mark.parametrize("softmax_grad", PASSES)
@pytest.mark.parametrize("options", [LossOptions(), EVERYTHING], ids=["plain", "everything"])
def test_ignored_rows_are_zero_whatever_they_hold(options, softmax_grad, device):
    logits, target, scale = case(device, torch.float32, vocab=100)
    logits[1] = math.nan
    scale[1] = math.inf
    losses, grad = fused(softmax_grad, target, options)(logits, scale)
    assert losses[1] == 0
    assert not grad[1].any()
    assert grad[2:].any(1).all()


@pytest.mark.parametrize("softmax_grad", PASSES)
def test_no_scale_leaves_the_logits(softmax_grad, device):
    logits, target, scale = case(device, torch.float32, vocab=100)
    run = fused(softmax_grad, target, EVERYTHING)
    losses, untouched = run(logits, None)
    assert torch.equal(untouched, logits)
    assert torch.equal(losses, run(logits, scale)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.usefixtures("blocks_of_64")
@pytest.mark.parametrize("softmax_grad", PASSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes_of_minus_infinity(smoothing, softmax_grad, device):
    """Masked classes: a whole first block, a target, every class of a row."""
    logits, target, scale = case(device, torch.float32, vocab=150)
    logits[:, :70] = -math.inf
    logits[5] = -math.inf
    target[[0, 2, 3, 4]] = torch.tensor([3, 70, 149, 100], device=device)
    options = LossOptions(label_smoothing=smoothing)
    assert_no_worse(fused(softmax_grad, target, options), eager(target, options), (logits, scale))


@pytest.mark.parametrize("softmax_grad", PASSES)
@pytest.mark.parametrize("options", [LossOptions(), LossOptions(label_smoothing=0.1)], ids=["plain", "smoothing"])
def test_large_offset_costs_no_digits(options, softmax_grad, device):
    logits, target, scale = case(device, torch.float32, vocab=300)
    inputs = (logits + 1e4, scale, torch.rand(300, device=device))
    assert_no_worse(fused(softmax_grad, target, options), eager(target, options), inputs)


@needs_triton
@pytest.mark.parametrize("options", [LossOptions(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("wrong", [77, -1, 2**40])
def test_kernel_turns_a_target_out_of_range_into_nan(wrong, options, device):
    logits, target, scale = case(device, torch.float32, vocab=77)
    target[2] = wrong
    for class_weight in (None, torch.rand(77, device=device)):
        losses, grad = fused(softmax_grad_triton, target, options)(logits, scale, class_weight)
        assert losses.isnan().tolist() == [False, False, True, False, False, False]
        assert grad.isnan().all(1).tolist() == losses.isnan().tolist()
        assert grad.isnan().any(1).tolist() == losses.isnan().tolist()


@needs_triton
def test_reads_any_strides(device):
    """Targets with gaps and one scale for all rows are not copied."""
    logits, target, _ = case(device, torch.float32, vocab=77)
    one = torch.tensor(0.7, device=device)
    expected = fused(softmax_grad_triton, target, LossOptions())(logits, torch.full((6,), 0.7, device=device))
    target = target.to(torch.int32).repeat_interleave(2)[::2]
    for ours, theirs in zip(
        fused(softmax_grad_triton, target, LossOptions())(logits, one.expand(6)), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


@needs_triton
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("size", [0, 5, 4096, 9001])
def test_scales_in_place(size, factor, device):
    x = torch.randn(size, device=device)
    expected = x * factor
    assert scale_triton_(x, torch.tensor(factor, device=device)) is x
    torch.testing.assert_close(x, expected)


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31():
    rows, vocab = 8200, 262144
    logits = torch.randn(1, vocab, device="cuda", dtype=torch.bfloat16).repeat(rows, 1)
    losses = torch.empty(rows, device="cuda")
    target, scale = torch.full((rows,), 7, device="cuda"), torch.ones((), device="cuda").expand(rows)
    softmax_grad_triton(logits, target, scale, None, LossOptions(), losses)
    assert torch.equal(losses, losses[:1].expand(rows))
    assert torch.equal(logits[-1], logits[0])
