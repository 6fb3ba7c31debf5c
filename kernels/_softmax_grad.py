"""What a loss needs of a chunk of logits, and its gradient written over them: a program per row, two reads, one write.

    z      = f(scale * a),  f(u) = cap * tanh(u / cap), or u without a soft cap     a: logits as the GEMM left them
    lse    = log sum_c exp(z_c)                                                     p = softmax(z)
    nll    = lse - z_y
    smooth = sum_c w_c * (lse - z_c)                                                w: class weights, 1 without

Every loss over logits is linear in these numbers and the square of one, L = A nll + S smooth + G lse + Q lse ** 2 with
factors of each row (cross-entropy, label smoothing, z-loss; log-probabilities with any gradient), and so

    dz_c = p_c * (A + S * sum w + G + 2 * Q * lse)  -  S * w_c  -  [c = y] * A
    a_c <- dz_c * f'(scale * a_c) * scale

A row without a target (`NO_TARGET`) has nll 0 and no use for A. A row whose factors are all 0 is skipped: its numbers
and its gradient are 0.

Source: Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867 (online softmax); Liger-Kernel (gradient in place).
"""
# Shape letters: C = rows of the chunk (tokens), V = classes (vocabulary), L = row stride of the chunk, V rounded up.

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._triton import tl, triton

NO_TARGET = -(2**63)  # what a target is replaced by where there is none: no class, and no number that a user marks with

# Row strides are multiples of this many elements: rows of an odd vocabulary start aligned, for cuBLAS and for 16-byte
# loads, and a mask that ends on a multiple of it does not split them.
ROW_MULTIPLE = 64

# Of one row held by a program at a time: one load of 16 bytes for each thread of 8 warps. An H200 takes 0.47 ms so for
# 2048 rows of 128256 bf16 classes (0.38 for the bytes alone); 0.75 with 32 KiB, 32 warps and loads two steps ahead.
MAX_BLOCK_BYTES = 4096
MAX_WARPS = 8

SCALE_BLOCK = 4096


class Logits(NamedTuple):
    """How logits follow from the product: what of the loss is fixed when the kernel is compiled."""

    scale: float = 1.0
    softcap: float = 0.0


class TokenLosses(NamedTuple):
    """What the pass finds out about each row; see the formulas. `None`: not asked for."""

    nll: Tensor | None = None  # (C,)
    smooth: Tensor | None = None  # (C,)
    lse: Tensor | None = None  # (C,)

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenLosses:
        """Change those that are not `None`."""
        return TokenLosses(*(None if loss is None else change(loss) for loss in self))


class Factors(NamedTuple):
    """What multiplies them in the loss, row by row: A, S, G and Q of the formulas. `None`: 0."""

    nll: Tensor | None = None  # (C,)
    smooth: Tensor | None = None  # (C,)
    lse: Tensor | None = None  # (C,)
    square: Tensor | None = None  # (C,)

    def given(self) -> list[Tensor]:
        """Those that are not `None`."""
        return [factor for factor in self if factor is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> Factors:
        """Change those that are not `None`."""
        return Factors(*(None if factor is None else change(factor) for factor in self))


def softmax_grad_reference(
    logits: Tensor,  # (C, V)
    grad: Tensor | None,  # (C, V), written over the logits, where it may have another dtype; None: not wanted
    target: Tensor,  # (C,)
    class_weight: Tensor | None,  # (V,)
    options: Logits,
    losses: TokenLosses,  # written
    factors: Factors,
) -> None:
    """Do in torch operations, in the dtype of `losses`, what the kernel does."""
    compute = next(found.dtype for found in losses if found is not None)
    rows, vocab = logits.shape
    has_target = target != NO_TARGET
    given = factors.given()
    kept = torch.stack([factor != 0 for factor in given]).any(0) if given else torch.ones_like(has_target)
    index = torch.where(has_target & kept, target, 0).unsqueeze(1)

    z = logits.to(compute) * options.scale
    slope = None
    if options.softcap:
        bent = torch.tanh(z / options.softcap)
        z = options.softcap * bent
        slope = 1 - bent * bent
    log_p = z.log_softmax(1)
    weight_sum = vocab if class_weight is None else class_weight.sum()

    def write(out: Tensor | None, value: Tensor, where: Tensor) -> None:
        if out is not None:
            out.copy_(torch.where(where, value, 0))

    lse = z.logsumexp(1)
    write(losses.nll, -log_p.gather(1, index)[:, 0], kept & has_target)
    write(losses.smooth, -(log_p if class_weight is None else log_p * class_weight).sum(1), kept)
    write(losses.lse, lse, kept)
    if grad is None:
        return

    zero = lse.new_zeros(rows)
    on_target, smooth, on_lse, square = (zero if factor is None else factor for factor in factors)
    on_target = torch.where(has_target, on_target, 0)
    dz = log_p.exp_().mul_((on_target + smooth * weight_sum + on_lse + 2 * square * lse).unsqueeze(1))
    if factors.smooth is not None:
        dz -= smooth.unsqueeze(1) if class_weight is None else smooth.unsqueeze(1) * class_weight
    dz.scatter_(1, index, dz.gather(1, index) - on_target.unsqueeze(1))
    if slope is not None:
        dz *= slope
    dz *= options.scale
    grad.copy_(dz.masked_fill_(~kept.unsqueeze(1), 0))


@triton.jit
def tl_tanh(u):
    """Return tanh(u) to 2e-7 of itself, from exp alone: portable, and able to run in the interpreter."""
    square = u * u
    series = square * (0.1333333333 + square * (-0.0539682540 + square * 0.0218694885))
    series = u * (1.0 + square * -0.3333333333 + square * series)
    decay = tl.exp(-2.0 * tl.abs(u))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(u) < 0.3, series, tl.where(u < 0.0, -ratio, ratio))


@triton.jit
def tl_load_or_zero(ptr, row):
    """Return the number of a row, 0 where the tensor is None."""
    number = 0.0
    if ptr is not None:
        number = tl.load(ptr + row)
    return number


@triton.jit
def _softmax_grad_kernel(  # noqa: PLR0912 - its branches are options, decided when it is compiled
    logits_ptr,  # [C, V], row stride L
    grad_ptr,  # the same memory, its dtype may be another of the same size; None: no gradient
    target_ptr,  # [C], int64
    class_weight_ptr,  # [V], fp32, or None
    weight_sum_ptr,  # [], fp32, sum of the class weights, or None
    nll_ptr,  # [C], fp32, or None; the same for the two that follow
    smooth_ptr,
    lse_ptr,
    nll_factor_ptr,  # [C], fp32, or None; the same for the three that follow
    smooth_factor_ptr,
    lse_factor_ptr,
    square_factor_ptr,
    V,
    L,
    NO_TARGET: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * L can exceed 2**31
    row_ptr = logits_ptr + row * L
    offs = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    on_target = tl_load_or_zero(nll_factor_ptr, row)
    smooth = tl_load_or_zero(smooth_factor_ptr, row)
    on_lse = tl_load_or_zero(lse_factor_ptr, row)
    square = tl_load_or_zero(square_factor_ptr, row)

    if HAS_FACTORS:  # noqa: SIM102 - decided when it is compiled, the next one for each row
        if (on_target == 0.0) & (smooth == 0.0) & (on_lse == 0.0) & (square == 0.0):
            if nll_ptr is not None:
                tl.store(nll_ptr + row, 0.0)
            if smooth_ptr is not None:
                tl.store(smooth_ptr + row, 0.0)
            if lse_ptr is not None:
                tl.store(lse_ptr + row, 0.0)
            if grad_ptr is not None:
                for start in tl.range(0, L, BLOCK):
                    zero = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
                    tl.store(grad_ptr + row * L + start + offs, zero, mask=start + offs < L)
            return

    # A target outside the classes reads nothing and makes NaN of what depends on it.
    has_target = target != NO_TARGET
    inside = (target >= 0) & (target < V)
    at_target = tl.load(row_ptr + tl.where(inside, target, 0)).to(tl.float32) * SCALE
    if SOFTCAP != 0.0:
        at_target = SOFTCAP * tl_tanh(at_target / SOFTCAP)
    # Sums over all classes are taken relative to one logit, so that a large common offset costs no digits.
    pivot = tl.where(at_target > float("-inf"), at_target, 0.0)

    top = float("-inf")
    total = 0.0
    spread = 0.0  # sum_c w_c * (z_c - pivot)
    for start in tl.range(0, L, BLOCK):
        cols = start + offs
        # L, not V: the mask then keeps whole vectors together. What lies between was never written.
        z = tl.load(row_ptr + cols, mask=cols < L, other=0.0, eviction_policy="evict_last").to(tl.float32)
        z = tl.where(cols < V, z, 0.0) * SCALE
        if SOFTCAP != 0.0:
            z = SOFTCAP * tl_tanh(z / SOFTCAP)
        if smooth_ptr is not None:
            distance = z - pivot
            if class_weight_ptr is not None:
                distance *= tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
            spread += tl.sum(tl.where(cols < V, distance, 0.0))
        z = tl.where(cols < V, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift))
        top = new_top

    # Shifted form: log(total) - (at_target - top), never (top + log(total)) - at_target.
    log_total = tl.log(total)
    weight_sum = V * 1.0
    if class_weight_ptr is not None:
        weight_sum = tl.load(weight_sum_ptr)
    if nll_ptr is not None:
        nll = log_total - (at_target - top)
        tl.store(nll_ptr + row, tl.where(has_target, tl.where(inside, nll, float("nan")), 0.0))
    if smooth_ptr is not None:
        tl.store(smooth_ptr + row, weight_sum * (log_total + (top - pivot)) - spread)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, top + log_total)

    if grad_ptr is not None:
        on_target = tl.where(has_target, on_target, 0.0) * SCALE
        on_target = tl.where(inside | (on_target == 0.0), on_target, float("nan"))
        smooth *= SCALE
        p_factor = on_target + smooth * weight_sum + SCALE * (on_lse + 2.0 * square * (top + log_total))
        p_factor /= total
        tl.debug_barrier()  # every read of this row so far comes before any write to it
        for start in tl.range(0, L, BLOCK):
            cols = start + offs
            z = tl.load(row_ptr + cols, mask=cols < L, other=0.0, eviction_policy="evict_first").to(tl.float32)
            z = tl.where(cols < V, z, 0.0) * SCALE
            if SOFTCAP != 0.0:
                bent = tl_tanh(z / SOFTCAP)
                z = SOFTCAP * bent
            grad = tl.exp(z - top) * p_factor
            if smooth_factor_ptr is not None:
                uniform = smooth
                if class_weight_ptr is not None:
                    uniform *= tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
                grad -= uniform
            grad = tl.where(cols == target, grad - on_target, grad)
            if SOFTCAP != 0.0:
                grad *= 1.0 - bent * bent
            grad = tl.where(cols < V, grad, 0.0).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + row * L + cols, grad, mask=cols < L, eviction_policy="evict_first")


def softmax_grad_triton(
    logits: Tensor,
    grad: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: Logits,
    losses: TokenLosses,
    factors: Factors,
) -> None:
    """Launch the kernel; arguments as in the reference, but dense, fp32 and int64, and rows are padded."""
    rows, vocab = logits.shape
    row_stride = logits.stride(0)
    assert logits.stride(1) == 1, "logits must be dense along the classes"
    assert row_stride >= vocab, "rows of logits must not overlap"
    assert row_stride % ROW_MULTIPLE == 0, "rows of logits must be padded"
    assert grad is None or (grad.data_ptr(), grad.stride()) == (logits.data_ptr(), logits.stride()), "same memory"
    assert target.dtype == torch.int64, "targets must be int64"
    vectors = [target, *(vector for vector in (*losses, *factors, class_weight) if vector is not None)]
    assert all(vector.is_contiguous() for vector in vectors), "one number a row, or a class, without gaps"
    assert all(vector.dtype == torch.float32 for vector in vectors[1:]), "the kernel computes in fp32"
    block = min(MAX_BLOCK_BYTES // logits.element_size(), triton.next_power_of_2(row_stride))
    with torch.cuda.device(logits.device.index if logits.is_cuda else -1):
        _softmax_grad_kernel[(rows,)](
            logits,
            grad,
            target,
            class_weight,
            None if class_weight is None else class_weight.sum(),
            *losses,
            *factors,
            vocab,
            row_stride,
            NO_TARGET=NO_TARGET,
            SCALE=float(options.scale),
            SOFTCAP=float(options.softcap),
            HAS_FACTORS=bool(factors.given()),
            BLOCK=block,
            num_warps=min(MAX_WARPS, max(4, block // 256)),
        )


@triton.jit
def _scale_kernel(
    x_ptr,  # [n], dense
    scale_ptr,  # []
    n,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n)
        tl.store(x_ptr + offs, (x.to(tl.float32) * scale).to(x_ptr.dtype.element_ty), mask=offs < n)


def scale_triton_(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply a contiguous `x` in place by a 0-d `scale`; where that is 1, its memory is not touched."""
    assert x.is_contiguous(), "the kernel walks over memory"
    if x.numel():
        with torch.cuda.device(x.device.index if x.is_cuda else -1):
            _scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](x, scale, x.numel(), BLOCK=SCALE_BLOCK)
    return x
