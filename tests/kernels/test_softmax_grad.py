"""The pass over a chunk of logits: the kernel and its reference, against torch's own losses and autograd."""

import math
from unittest import mock

import pytest
import torch
from torch.nn import functional

from graphfuse.kernels import _softmax_grad, _softmax_grad_parts
from graphfuse.kernels._softmax_grad import (
    NO_TARGET,
    ROW_MULTIPLE,
    Factors,
    Logits,
    TokenLosses,
    softmax_grad_reference,
    softmax_grad_triton,
)
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.testing import assert_no_worse

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


def softmax_grad_two_reads(*args):
    """The kernel for rows that are not held in registers."""
    with mock.patch.object(_softmax_grad, "_reads_once", return_value=False):
        softmax_grad_triton(*args)


KERNELS = [pytest.param(kernel, marks=needs_triton) for kernel in (softmax_grad_two_reads, softmax_grad_triton)]
PASSES = [softmax_grad_reference, *KERNELS]
# The interpreter multiplies bf16 as bit patterns.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

NLL, EVERYTHING = ("nll",), ("nll", "smooth", "lse", "square")
BENT = Logits(scale=1.7, softcap=4.0)
KINDS = {
    "nll": (NLL, Logits()),
    "smooth": (("smooth",), Logits()),
    "lse": (("lse",), Logits()),
    "square": (("square",), Logits()),
    "smoothed": (("nll", "smooth"), Logits()),
    "z_loss": (("nll", "square"), Logits()),
    "softcap": (NLL, Logits(softcap=3.0)),
    "scale": (NLL, Logits(scale=-0.3)),
    "scaled": (NLL, Logits(scale=1.7)),
    "everything": (EVERYTHING, BENT),
}
ONCE = ["nll", "lse", "square", "z_loss", "scaled"]  # what one read is enough for
NARROW = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
BOTH = pytest.mark.parametrize(("names", "options"), [(NLL, Logits()), (EVERYTHING, BENT)], ids=["plain", "everything"])


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows that take several steps, of 128 fp32 classes."""
    monkeypatch.setattr(_softmax_grad, "WARPS", 1)


def padded(logits):
    """Copy logits to where a kernel finds them: rows of aligned length, whose ends nobody wrote."""
    rows, vocab = logits.shape
    chunk = logits.new_full((rows, -(-vocab // ROW_MULTIPLE) * ROW_MULTIPLE), math.nan)[:, :vocab]
    return chunk.copy_(logits)


def fused(softmax_grad, target, names, options):
    """The losses that `names` need, in the order of the pass, and the gradient of their sum with factors."""

    def losses_and_grad(logits, factors, class_weight=None):
        chunk = padded(logits)
        wanted = ("nll" in names, "smooth" in names, bool({"lse", "square"} & {*names}))
        losses = TokenLosses(*(chunk.new_empty(len(chunk), dtype=torch.float32) if want else None for want in wanted))
        by_name = Factors(**{name: factors[k].contiguous() for k, name in enumerate(names)})
        softmax_grad(chunk, chunk, target, class_weight, options, losses, by_name)
        return *(loss.to(logits.dtype) for loss in losses if loss is not None), chunk

    return losses_and_grad


def eager(target, names, options):
    def losses_and_grad(logits, factors, class_weight=None):
        leaf = logits.detach().requires_grad_()
        z = leaf * options.scale
        if options.softcap:
            z = options.softcap * torch.tanh(z / options.softcap)
        log_p = z.log_softmax(1)
        weights = torch.ones_like(z[0]) if class_weight is None else class_weight.to(z.dtype)
        found = {
            "nll": functional.nll_loss(log_p, target, ignore_index=NO_TARGET, reduction="none"),
            "smooth": -(log_p * weights).sum(1),
            "lse": z.logsumexp(1),
        }
        found["square"] = found["lse"] ** 2
        kept = (factors != 0).any(0)
        factors = factors.to(z.dtype)
        total = sum((torch.where(kept, found[name], 0) * factors[k]).sum() for k, name in enumerate(names))
        grad = torch.autograd.grad(total, leaf)[0]
        needed = [name for name in ("nll", "smooth") if name in names]
        needed += ["lse"] if {"lse", "square"} & {*names} else []
        return *(torch.where(kept, found[name], 0).detach() for name in needed), grad

    return losses_and_grad


def case(device, dtype, vocab, names, rows=6):
    """One row without a target, and one without a factor."""
    logits = (torch.randn(rows, vocab, device=device) * 2).to(dtype)
    target = torch.randint(0, vocab, (rows,), device=device)
    target[1] = NO_TARGET
    factors = torch.randn(len(names), rows, device=device)
    factors[:, 4] = 0
    return logits, target, factors


@pytest.mark.parametrize("softmax_grad", PASSES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("names", "options"), KINDS.values(), ids=KINDS)
def test_no_worse_than_eager(names, options, dtype, weighted, softmax_grad, device):
    logits, target, factors = case(device, dtype, 100, names)
    inputs = (logits, factors, torch.rand(100, device=device)) if weighted else (logits, factors)
    assert_no_worse(fused(softmax_grad, target, names, options), eager(target, names, options), inputs)


@needs_triton
@pytest.mark.usefixtures("small_blocks")
@BOTH
@pytest.mark.parametrize("vocab", [2, 127, 128, 129, 256, 513])
def test_rows_of_any_length(vocab, names, options, device):
    logits, target, factors = case(device, torch.float32, vocab, names)
    inputs = (logits, factors, torch.rand(vocab, device=device))
    run = fused(softmax_grad_triton, target, names, options)
    assert_no_worse(run, eager(target, names, options), inputs, ulps=8)  # four terms that may cancel


@pytest.mark.parametrize("softmax_grad", PASSES)
def test_one_class_is_certain(softmax_grad, device):
    target = torch.zeros(3, dtype=torch.int64, device=device)
    run = fused(softmax_grad, target, NLL, Logits())
    losses, grad = run(torch.randn(3, 1, device=device), torch.ones(1, 3, device=device))
    assert not losses.any()
    assert not grad.any()


@pytest.mark.parametrize("softmax_grad", PASSES)
@BOTH
def test_rows_without_factors_are_zero_whatever_they_hold(names, options, softmax_grad, device):
    logits, target, factors = case(device, torch.float32, 100, names)
    logits[4], target[4] = math.nan, 10**6
    *losses, grad = fused(softmax_grad, target, names, options)(logits, factors)
    assert not any(loss[4] for loss in losses)
    assert not grad[4].any()
    assert grad[[0, 2, 3, 5]].any(1).all()


@pytest.mark.parametrize("softmax_grad", PASSES)
def test_rows_without_a_target_have_no_use_for_its_factor(softmax_grad, device):
    logits, target, factors = case(device, torch.float32, 100, NLL)
    losses, grad = fused(softmax_grad, target, NLL, Logits())(logits, factors)
    assert losses[1] == 0
    assert not grad[1].any()


@pytest.mark.parametrize("softmax_grad", PASSES)
@pytest.mark.parametrize("has_factors", [False, True])
def test_no_gradient_leaves_the_logits(has_factors, softmax_grad, device):
    logits, target, factors = case(device, torch.float32, 100, NLL)
    chunk, found = padded(logits), torch.empty(6, device=device)
    factors = Factors(factors[0]) if has_factors else Factors()
    softmax_grad(chunk, None, target, None, BENT, TokenLosses(found), factors)
    assert torch.equal(chunk, logits)
    expected = fused(softmax_grad, target, NLL, BENT)(logits, torch.ones(1, 6, device=device))[0]
    if has_factors:
        expected = torch.where(factors.nll == 0, 0, expected)
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("softmax_grad", PASSES)
@NARROW
@pytest.mark.parametrize("names", [NLL, ("nll", "smooth")], ids=["plain", "smoothed"])
def test_classes_of_minus_infinity(names, dtype, softmax_grad, device):
    """Masked classes: a whole first block, a target, every class of a row."""
    logits, target, factors = case(device, dtype, 300, names)
    logits[:, :130] = -math.inf
    logits[5] = -math.inf
    target[[0, 2, 3, 4]] = torch.tensor([3, 130, 299, 200], device=device)
    assert_no_worse(fused(softmax_grad, target, names, Logits()), eager(target, names, Logits()), (logits, factors))


@pytest.mark.parametrize("softmax_grad", PASSES)
@NARROW
@pytest.mark.parametrize("names", [NLL, ("nll", "smooth")], ids=["plain", "smoothed"])
def test_large_offset_costs_no_digits(names, dtype, softmax_grad, device):
    logits, target, factors = case(device, dtype, 300, names)
    inputs = (logits + 1e4, factors, torch.rand(300, device=device))
    assert_no_worse(fused(softmax_grad, target, names, Logits()), eager(target, names, Logits()), inputs)


@needs_triton
@NARROW
@BOTH
@pytest.mark.parametrize("wrong", [77, -1, 2**40])
def test_kernel_turns_a_target_out_of_range_into_nan(wrong, names, options, dtype, device):
    logits, target, factors = case(device, dtype, 77, names)
    target[2] = wrong
    for class_weight in (None, torch.rand(77, device=device)):
        losses, *_, grad = fused(softmax_grad_triton, target, names, options)(logits, factors, class_weight)
        assert losses.isnan().tolist() == [False, False, True, False, False, False]
        assert grad.isnan().all(1).tolist() == losses.isnan().tolist()
        assert grad.isnan().any(1).tolist() == losses.isnan().tolist()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("vocab", [2, 7, 1023, 1024, 1031, 2500])
def test_rows_held_in_registers(vocab, kind, dtype, device, monkeypatch):
    names, options = KINDS[kind]
    logits, target, factors = case(device, dtype, vocab, names)
    monkeypatch.setattr(_softmax_grad, "softmax_grad_parts", mock.Mock(wraps=_softmax_grad.softmax_grad_parts))
    run = fused(softmax_grad_triton, target, names, options)
    assert_no_worse(run, eager(target, names, options), (logits, factors))
    assert _softmax_grad.softmax_grad_parts.called


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("extent", [1e4, 6e4, 1e30, 3e38])
def test_huge_logits(extent, scale, dtype, device):
    """Of some classes, as a bias leaves them that hides by a number, of all, of the largest, and two that are equal."""
    if extent * scale > torch.finfo(torch.float32).max or extent > torch.finfo(dtype).max:
        pytest.skip("infinite")
    logits, target, factors = case(device, dtype, 1500, NLL, rows=9)
    target = target.clamp(max=500)
    logits[0, 512:] = -extent
    logits[2] -= extent
    logits[3, 512:] = extent
    logits[5, target[5]] = extent
    logits[6] = extent
    logits[7] *= extent / 10
    logits[8, :512] = extent
    logits[8, 512:] = -extent
    losses, grad = fused(softmax_grad_triton, target, NLL, Logits(scale))(logits, factors)
    right, right_grad = eager(target, NLL, Logits(scale))(logits.double(), factors.double())
    torch.testing.assert_close(losses.float(), right.to(dtype).float())
    apart = torch.finfo(dtype).eps * 2
    torch.testing.assert_close(grad, right_grad.to(dtype), rtol=apart, atol=1e-7 * scale)  # of what cancels


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1500, 10007, 49155, 151936])
@pytest.mark.parametrize("tiles", [1, 3, 20])
def test_rows_shared_by_programs(tiles, vocab, dtype, kind, monkeypatch):
    """As many programs to a row as there may be, in more rows than run at a time; the same bits in every run."""
    monkeypatch.setattr(_softmax_grad_parts, "MAX_TILES", tiles)
    names, options = KINDS[kind]
    logits, target, factors = case("cuda", dtype, vocab, names, rows=300)
    logits[5, : vocab // 2] = -math.inf
    logits[6] = -math.inf
    logits[7] += 1e4
    target[8] = vocab
    run = fused(softmax_grad_triton, target, names, options)
    *losses, grad = run(logits, factors)
    *expected, right = fused(softmax_grad_two_reads, target, names, options)(logits, factors)
    for found, other in zip(losses, expected, strict=True):
        torch.testing.assert_close(found.float(), other.float(), rtol=1e-2, atol=1e-2, equal_nan=True)
    apart = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]  # two units in the last place
    torch.testing.assert_close(grad, right, rtol=apart, atol=1e-6, equal_nan=True)
    for _ in range(3):
        assert all(
            map(torch.equal, map(torch.nan_to_num, run(logits, factors)), map(torch.nan_to_num, (*losses, grad)))
        )


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31():
    rows, vocab = 8200, 262144
    logits = torch.randn(1, vocab, device="cuda", dtype=torch.bfloat16).repeat(rows, 1)
    losses = TokenLosses(torch.empty(rows, device="cuda"))
    target, factors = torch.full((rows,), 7, device="cuda"), Factors(torch.ones(rows, device="cuda"))
    softmax_grad_triton(logits, logits, target, None, Logits(), losses, factors)
    assert torch.equal(losses.nll, losses.nll[:1].expand(rows))
    assert torch.equal(logits[-1], logits[0])
