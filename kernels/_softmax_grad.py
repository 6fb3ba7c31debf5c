"""Cross-entropy of a chunk of logits, and its gradient written over them: one program per row, two reads, one write.

    z    = f(scale * a),  f(u) = cap * tanh(u / cap), or u without a soft cap       a: logits as the GEMM left them
    lse  = log sum_c exp(z_c)                                                       p = softmax(z)
    loss = (1 - s) * w_y * (lse - z_y)  +  s / V * sum_c w_c * (lse - z_c)  +  zl * lse ** 2
    dz_c = p_c * ((1 - s) * w_y + s / V * sum w + 2 * zl * lse)  -  s / V * w_c  -  [c = y] * (1 - s) * w_y
    a_c <- r * dz_c * f'(scale * a_c) * scale

with s the label smoothing, w the class weights (1 without), zl the z-loss and r the upstream gradient of the row.
A row whose target is `ignore_index` has loss 0 and gradient 0.

Source: Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867 (online softmax); Liger-Kernel (gradient in place).
"""
# Shape letters: C = rows of the chunk (tokens), V = classes (vocabulary), L = row stride of the chunk, V rounded up.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._triton import tl, triton

# Row strides are multiples of this many elements: rows of an odd vocabulary start aligned, for cuBLAS and for 16-byte
# loads, and a mask that ends on a multiple of it does not split them.
ROW_MULTIPLE = 64

MAX_BLOCK_BYTES = 32768  # of one row held by a program at a time: 16 elements a thread at 32 warps
MAX_WARPS = 32

SCALE_BLOCK = 4096


class LossOptions(NamedTuple):
    """What of the loss is fixed when the kernel is compiled."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float = 0.0
    z_loss: float = 0.0


def softmax_grad_reference(
    logits: Tensor,  # (C, V), overwritten by their gradient
    target: Tensor,  # (C,)
    scale: Tensor | None,  # (C,), upstream gradient of each row; None: only the loss
    class_weight: Tensor | None,  # (V,)
    options: LossOptions,
    losses: Tensor,  # (C,), written
) -> None:
    """Do in torch operations, in the dtype of `losses`, what the kernel does."""
    vocab = logits.shape[1]
    smoothing = options.label_smoothing
    counted = target != options.ignore_index
    index = torch.where(counted, target, 0).unsqueeze(1)

    z = logits.to(losses.dtype) * options.logit_scale
    slope = None
    if options.softcap:
        bent = torch.tanh(z / options.softcap)
        z = options.softcap * bent
        slope = 1 - bent * bent
    log_p = z.log_softmax(1)

    weight = torch.ones_like(losses) if class_weight is None else class_weight.to(losses.dtype)[index[:, 0]]
    factor = (1 - smoothing) * weight  # of p, in the gradient
    loss = -factor * log_p.gather(1, index)[:, 0]
    uniform: Tensor | float = smoothing / vocab
    if smoothing and class_weight is None:
        loss -= uniform * log_p.sum(1)
        factor = factor + smoothing
    elif smoothing and class_weight is not None:
        uniform = uniform * class_weight.to(losses.dtype)
        loss -= (uniform * log_p).sum(1)
        factor = factor + uniform.sum()
    if options.z_loss:
        lse = z.logsumexp(1)
        loss += options.z_loss * lse * lse
        factor = factor + 2 * options.z_loss * lse
    losses.copy_(torch.where(counted, loss, 0))
    if scale is None:
        return

    grad = log_p.exp_().mul_(factor.unsqueeze(1))
    if smoothing:
        grad -= uniform
    grad.scatter_(1, index, grad.gather(1, index) - ((1 - smoothing) * weight).unsqueeze(1))
    if slope is not None:
        grad *= slope
    grad *= (scale.to(losses.dtype) * options.logit_scale).unsqueeze(1)
    logits.copy_(grad.masked_fill_(~counted.unsqueeze(1), 0))


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
def _softmax_grad_kernel(  # noqa: PLR0912 - its branches are options, decided when it is compiled
    logits_ptr,  # [C, V], row stride L
    target_ptr,  # [C]
    scale_ptr,  # [C], any float dtype
    class_weight_ptr,  # [V], fp32
    weight_sum_ptr,  # [], fp32, sum of the class weights
    loss_ptr,  # [C], fp32
    target_stride,
    scale_stride,  # 0: one scale for all rows
    V,
    L,
    ignore_index,
    LABEL_SMOOTHING: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * L can exceed 2**31
    row_ptr = logits_ptr + row * L
    offs = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row * target_stride).to(tl.int64)

    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if HAS_GRAD:
            for start in tl.range(0, L, BLOCK):
                zero = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + start + offs, zero, mask=start + offs < L)
        return

    # A target outside the classes reads nothing and turns its row into NaN.
    inside = (target >= 0) & (target < V)
    at_target = tl.load(row_ptr + target, mask=inside, other=0.0).to(tl.float32) * LOGIT_SCALE
    if SOFTCAP != 0.0:
        at_target = SOFTCAP * tl_tanh(at_target / SOFTCAP)
    at_target = tl.where(inside, at_target, float("nan"))
    factor = 1.0 - LABEL_SMOOTHING
    if HAS_WEIGHT:
        factor *= tl.load(class_weight_ptr + target, mask=inside, other=0.0)
    # Sums over all classes are taken relative to the target's logit, so that a large common offset costs no digits.
    pivot = tl.where(at_target > float("-inf"), at_target, 0.0)

    top = float("-inf")
    total = 0.0
    spread = 0.0  # sum_c w_c * (z_c - pivot)
    for start in tl.range(0, L, BLOCK, num_stages=2):
        cols = start + offs
        # L, not V: the mask then keeps whole vectors together. What lies between was never written.
        z = tl.load(row_ptr + cols, mask=cols < L, other=0.0, eviction_policy="evict_last").to(tl.float32)
        z = tl.where(cols < V, z, 0.0) * LOGIT_SCALE
        if SOFTCAP != 0.0:
            z = SOFTCAP * tl_tanh(z / SOFTCAP)
        if LABEL_SMOOTHING != 0.0:
            distance = z - pivot
            if HAS_WEIGHT:
                distance *= tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
            spread += tl.sum(tl.where(cols < V, distance, 0.0))
        z = tl.where(cols < V, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift))
        top = new_top

    # Shifted form: log(total) - (at_target - top), never (top + log(total)) - at_target.
    log_total = tl.log(total)
    loss = factor * (log_total - (at_target - top))
    bracket = factor
    if LABEL_SMOOTHING != 0.0:
        weight_sum = V * 1.0
        if HAS_WEIGHT:
            weight_sum = tl.load(weight_sum_ptr)
        loss += LABEL_SMOOTHING / V * (weight_sum * (log_total + (top - pivot)) - spread)
        bracket += LABEL_SMOOTHING / V * weight_sum
    if Z_LOSS != 0.0:
        lse = top + log_total
        loss += Z_LOSS * lse * lse
        bracket += 2.0 * Z_LOSS * lse
    tl.store(loss_ptr + row, loss)

    if HAS_GRAD:
        upstream = tl.load(scale_ptr + row * scale_stride).to(tl.float32) * LOGIT_SCALE
        upstream = tl.where(inside, upstream, float("nan"))
        p_factor = upstream * bracket / total
        tl.debug_barrier()  # every read of this row so far comes before any write to it
        for start in tl.range(0, L, BLOCK, num_stages=2):
            cols = start + offs
            z = tl.load(row_ptr + cols, mask=cols < L, other=0.0, eviction_policy="evict_first").to(tl.float32)
            z = tl.where(cols < V, z, 0.0) * LOGIT_SCALE
            if SOFTCAP != 0.0:
                bent = tl_tanh(z / SOFTCAP)
                z = SOFTCAP * bent
            grad = tl.exp(z - top) * p_factor
            if LABEL_SMOOTHING != 0.0:
                uniform = upstream * (LABEL_SMOOTHING / V)
                if HAS_WEIGHT:
                    uniform *= tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
                grad -= uniform
            grad = tl.where(cols == target, grad - upstream * factor, grad)
            if SOFTCAP != 0.0:
                grad *= 1.0 - bent * bent
            grad = tl.where(cols < V, grad, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(row_ptr + cols, grad, mask=cols < L, eviction_policy="evict_first")


def softmax_grad_triton(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    losses: Tensor,
) -> None:
    """Launch the kernel; arguments as in the reference, but losses and class weights are fp32 and rows are padded."""
    rows, vocab = logits.shape
    row_stride = logits.stride(0)
    assert logits.stride(1) == 1, "logits must be dense along the classes"
    assert row_stride >= vocab, "rows of logits must not overlap"
    assert row_stride % ROW_MULTIPLE == 0, "rows of logits must be padded"
    assert losses.dtype == torch.float32, "the kernel computes in fp32"
    block = min(MAX_BLOCK_BYTES // logits.element_size(), triton.next_power_of_2(row_stride))
    with torch.cuda.device(logits.device.index if logits.is_cuda else -1):
        _softmax_grad_kernel[(rows,)](
            logits,
            target,
            scale,
            class_weight,
            None if class_weight is None else class_weight.sum(),
            losses,
            target.stride(0),
            0 if scale is None else scale.stride(0),
            vocab,
            row_stride,
            options.ignore_index,
            LABEL_SMOOTHING=float(options.label_smoothing),
            LOGIT_SCALE=float(options.logit_scale),
            SOFTCAP=float(options.softcap),
            Z_LOSS=float(options.z_loss),
            HAS_WEIGHT=class_weight is not None,
            HAS_GRAD=scale is not None,
            BLOCK=block,
            num_warps=min(MAX_WARPS, max(4, block // 512)),
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
