"""What a loss needs of a chunk of logits, and its gradient written over them: a program per row, two reads, one write.

Where rows can be held in registers, `_softmax_grad_parts.py` needs one read.

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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._ahead import address
from graphfuse.kernels._op import VECTOR_BYTES
from graphfuse.kernels._softmax_device import (
    tl_gradient,
    tl_load_or_zero,
    tl_losses,
    tl_on_target,
    tl_skip_losses,
    tl_weight_sum,
)
from graphfuse.kernels._softmax_grad_parts import parts_of, softmax_grad_parts
from graphfuse.kernels._triton import launch, tl, triton

NO_TARGET = -(2**63)  # what a target is replaced by where there is none: no class, and no number that a user marks with

# Row strides are multiples of this many elements: rows of an odd vocabulary start aligned, for cuBLAS and for 16-byte
# loads, and a mask that ends on a multiple of it does not split them.
ROW_MULTIPLE = 64

# Warps that share a row, each lane with one load under way: an H200 takes 0.40 ms so for 2048 rows of 128256 bf16
# classes (0.38 for two reads and a write). Two loads take as long, four 0.50 ms; 32 warps on one row for each
# multiprocessor, whose second read then meets the cache, 0.49 ms.
WARPS = 8


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

    def any(self) -> Tensor | None:
        """Whether a row has one that is not 0; `None` without factors."""
        found = None
        for factor in self.given():
            found = factor != 0 if found is None else found | (factor != 0)
        return found

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
    wants = [found is not None for found in losses]
    kept = factors.any()
    found, top, total = losses_reference(logits, target, class_weight, options, compute, wants, kept)
    for out, each in zip(losses, found, strict=True):
        if out is not None and each is not None:
            out.copy_(each)
    if grad is not None:
        grad.copy_(gradient_reference(logits, target, class_weight, options, top, total, factors, kept))


def losses_reference(
    logits: Tensor,  # (C, V)
    target: Tensor,  # (C,)
    class_weight: Tensor | None,  # (V,)
    options: Logits,
    compute: torch.dtype,
    wants: Sequence[bool],  # of the fields of TokenLosses
    kept: Tensor | None,  # (C,), whether a row is not skipped; None: no row is
) -> tuple[TokenLosses, Tensor, Tensor]:
    """Return the numbers of each row, its largest z, and the sum of the exponentials relative to that."""
    z, _ = _bend(logits, options, compute)
    has_target = target != NO_TARGET
    top = z.amax(1)
    at_target = z.gather(1, _index(target, kept))[:, 0]
    z = z - torch.where(top == -torch.inf, 0, top).unsqueeze(1)
    total = (z.exp() if wants[1] else z.exp_()).sum(1)
    log_total = total.log()
    found = TokenLosses(
        nll=torch.where(has_target, log_total - (at_target - top), 0) if wants[0] else None,
        smooth=_spread(z.sub_(log_total.unsqueeze(1)), class_weight) if wants[1] else None,
        lse=top + log_total if wants[2] else None,
    )
    return (found if kept is None else found.map(lambda each: torch.where(kept, each, 0))), top, total


def _spread(log_p: Tensor, class_weight: Tensor | None) -> Tensor:
    return -(log_p if class_weight is None else log_p.mul_(class_weight)).sum(1)


def _index(target: Tensor, kept: Tensor | None) -> Tensor:
    """Return a class for each row, its target where that counts."""
    counts = target != NO_TARGET
    return torch.where(counts if kept is None else counts & kept, target, 0).unsqueeze(1)


def gradient_reference(
    logits: Tensor,  # (C, V)
    target: Tensor,  # (C,)
    class_weight: Tensor | None,  # (V,)
    options: Logits,
    top: Tensor,  # (C,), the results of `losses_reference`
    total: Tensor,  # (C,)
    factors: Factors,
    kept: Tensor | None,  # (C,), whether a row is not skipped; None: no row is
) -> Tensor:
    """Return the gradient of the logits, in the dtype of `top`."""
    zero = torch.zeros_like(top)
    on_target, smooth, on_lse, square = (zero if factor is None else factor for factor in factors)
    on_target = torch.where(target != NO_TARGET, on_target, 0)
    weight_sum = logits.shape[1] if class_weight is None else class_weight.sum()
    on_p = on_target + smooth * weight_sum + on_lse
    if factors.square is not None:
        on_p = on_p + 2 * square * (top + total.log())

    z, slope = _bend(logits, options, top.dtype)
    dz = (z - top.unsqueeze(1)).exp_().mul_((on_p / total).unsqueeze(1))
    if factors.smooth is not None:
        dz -= smooth.unsqueeze(1) if class_weight is None else smooth.unsqueeze(1) * class_weight
    dz.scatter_add_(1, _index(target, kept), -on_target.unsqueeze(1))
    if slope is not None:
        dz *= slope
    if options.scale != 1.0:
        dz *= options.scale
    return dz if kept is None else dz.masked_fill_(~kept.unsqueeze(1), 0)


def _bend(logits: Tensor, options: Logits, compute: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return z, and f' where there is a soft cap."""
    z = logits.to(compute)
    if options.scale != 1.0:
        z = z * options.scale
    if not options.softcap:
        return z, None
    bent = torch.tanh(z / options.softcap)
    return options.softcap * bent, 1 - bent * bent


@triton.jit
def _softmax_grad_kernel(
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
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,  # logits in a load of a lane
):
    row = tl.program_id(0).to(tl.int64)  # row * L can exceed 2**31
    row_ptr = logits_ptr + row * L
    BLOCK: tl.constexpr = LANES * VECTOR
    offs = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    on_target = tl_load_or_zero(nll_factor_ptr, row)
    smooth = tl_load_or_zero(smooth_factor_ptr, row)
    on_lse = tl_load_or_zero(lse_factor_ptr, row)
    square = tl_load_or_zero(square_factor_ptr, row)

    if HAS_FACTORS:  # noqa: SIM102 - decided when it is compiled, the next one for each row
        if (on_target == 0.0) & (smooth == 0.0) & (on_lse == 0.0) & (square == 0.0):
            tl_skip_losses(row, nll_ptr, smooth_ptr, lse_ptr)
            if grad_ptr is not None:
                for start in tl.range(0, L, BLOCK):
                    zero = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
                    tl.store(grad_ptr + row * L + start + offs, zero, mask=start + offs < L)
            return

    weight_sum = tl_weight_sum(weight_sum_ptr, V)
    top, total = tl_losses(
        logits_ptr,
        row,
        target,
        class_weight_ptr,
        weight_sum,
        nll_ptr,
        smooth_ptr,
        lse_ptr,
        V,
        L,
        NO_TARGET,
        SCALE,
        SOFTCAP,
        LANES,
        VECTOR,
        True,
        "evict_last",
    )
    if grad_ptr is not None:
        on_target = tl_on_target(on_target, target, V, NO_TARGET) * SCALE
        smooth *= SCALE
        p_factor = on_target + smooth * weight_sum + SCALE * (on_lse + 2.0 * square * (top + tl.log(total)))
        p_factor /= total
        is_known = (target >= 0) & (target < V)
        at_target = tl.load(row_ptr + tl.where(is_known, target, 0)).to(tl.float32)
        is_smoothed: tl.constexpr = smooth_factor_ptr is not None
        narrow: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth == 16
        weights = class_weight_ptr
        tl.debug_barrier()  # every read of this row so far comes before any write to it
        # Backwards: what was read last is what the cache still has. Only the end of a row takes a mask.
        whole = V // BLOCK * BLOCK
        for start in tl.range(whole, L, BLOCK):
            cols = start + offs
            a = tl.load(row_ptr + cols, mask=cols < L, other=0.0).to(tl.float32)
            a = tl.where(cols < V, a, 0.0)
            grad = tl_gradient(a, cols, 0.0, top, p_factor, smooth, weights, V, SCALE, SOFTCAP, narrow, is_smoothed)
            grad = tl.where(cols < V, grad, 0.0).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + row * L + cols, grad, mask=cols < L, eviction_policy="evict_first")
        for back in tl.range(BLOCK, whole + BLOCK, BLOCK):
            cols = whole - back + offs
            a = tl.load(row_ptr + cols, eviction_policy="evict_first").to(tl.float32)
            grad = tl_gradient(a, cols, 0.0, top, p_factor, smooth, weights, V, SCALE, SOFTCAP, narrow, is_smoothed)
            grad = grad.to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + row * L + cols, grad, eviction_policy="evict_first")
        tl.debug_barrier()  # the target's comes last
        of_target = tl_gradient(
            at_target, target, on_target, top, p_factor, smooth, weights, V, SCALE, SOFTCAP, narrow, is_smoothed
        )
        tl.store(grad_ptr + row * L + target, of_target.to(grad_ptr.dtype.element_ty), mask=is_known)


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
    step = row_stride * logits.element_size()
    assert address(logits) % VECTOR_BYTES == step % VECTOR_BYTES == 0, "rows of logits must be aligned"
    assert grad is None or (address(grad), grad.stride()) == (address(logits), logits.stride()), "same memory"
    assert target.dtype == torch.int64, "targets must be int64"
    vectors = [target, *(vector for vector in (*losses, *factors, class_weight) if vector is not None)]
    assert all(vector.is_contiguous() for vector in vectors), "one number a row, or a class, without gaps"
    assert all(vector.dtype == torch.float32 for vector in vectors[1:]), "the kernel computes in fp32"
    if grad is not None and _reads_once(logits, grad, options, losses, factors):
        own = losses.nll, losses.lse, factors.nll, factors.lse, factors.square
        softmax_grad_parts(logits, target, float(options.scale), *own, no_target=NO_TARGET)
        return
    launch(
        _softmax_grad_kernel,
        (rows,),
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
        **over_row(row_stride, logits.element_size(), options),
    )


def _reads_once(logits: Tensor, grad: Tensor, options: Logits, losses: TokenLosses, factors: Factors) -> bool:
    """Whether rows can be held in registers while their numbers are added up."""
    is_plain = options.scale > 0 and not options.softcap and losses.smooth is None and factors.smooth is None
    is_narrow = logits.element_size() == 2 and grad.dtype == logits.dtype and logits.stride(0) % 16 == 0
    return is_plain and is_narrow and parts_of(logits.stride(0), logits.device) > 0


def over_row(length: int, itemsize: int, options: Logits) -> dict[str, Any]:
    """Return the sizes with which to go over a row of `length` logits, and the launch options."""
    vector = VECTOR_BYTES // itemsize
    warps = min(WARPS, max(1, triton.next_power_of_2(length) // (32 * vector)))
    return {"LANES": 32 * warps, "VECTOR": vector, "num_warps": warps, **fused(options)}


def fused(options: Logits) -> dict[str, bool]:
    """Return the launch option by which z = scale * a and z - max z stay two operations.

    As one they are more exact, but not of the same rounding as the maximum, which then is not itself any more.
    """
    return {"enable_fp_fusion": options.scale == 1.0 and options.softcap == 0.0}
