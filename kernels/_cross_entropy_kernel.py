"""The two passes of a loss over logits that are there: the numbers of each row, and its gradient; one read each.

The formulas are those of `_softmax_grad.py`. The first pass leaves for the second the largest z of each row, m, and the
sum of exponentials relative to it, s:

    p_c = exp(z_c - m) / s

Two numbers, not lse = m + log(s): where all logits of a row are large, that would round off digits of p. A row that was
skipped has s = -1, which no sum of exponentials is.

The second pass needs nothing of a row but these, so that it is cut into blocks of columns as well.
"""
# Shape letters: N = rows (tokens), V = classes (vocabulary), L = row stride, V or more.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphfuse.kernels._ahead import address
from graphfuse.kernels._op import VECTOR_BYTES, compute_dtype
from graphfuse.kernels._softmax_device import (
    tl_gradient,
    tl_load_or_zero,
    tl_losses,
    tl_on_target,
    tl_skip_losses,
    tl_vector_start,
    tl_weight_sum,
)
from graphfuse.kernels._softmax_grad import (
    NO_TARGET,
    Factors,
    Logits,
    TokenLosses,
    fused,
    gradient_reference,
    losses_reference,
    over_row,
)
from graphfuse.kernels._token_chunks import check_targets, chunk_tokens
from graphfuse.kernels._triton import launch, tl, triton

SKIPPED = -1.0
# Of a chunk of logits in fp32: little beside all logits, and in a last-level cache with what is made of it. Others,
# from 0.5 to 32 MiB, were neither faster nor slower.
CPU_CHUNK_BYTES = 2**22
# Of a row, for a program of the second pass: two loads for each lane.
GRAD_BLOCK_BYTES = 4096
GRAD_WARPS = 4


def token_losses_reference(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    counted: Tensor | None,  # (N,), whether a row is not skipped; None: all of them
    class_weight: Tensor | None,  # (V,)
    options: Logits,
    losses: TokenLosses,  # written
    top: Tensor,  # (N,), written
    total: Tensor,  # (N,), written
) -> None:
    """Do in torch operations, a chunk of rows at a time, what the kernel does."""
    losses.map(lambda found: found.zero_())
    top.zero_()
    total.fill_(SKIPPED)
    wants = [found is not None for found in losses]
    for places, kept in _chunks(logits, counted):
        if logits.device.type == "cpu":
            check_targets(target[places], logits.shape[1], Factors())
        rows = (logits[places], target[places], class_weight, options)
        found, highest, sums = losses_reference(*rows, top.dtype, wants, kept)
        for out, each in zip(losses, found, strict=True):
            if out is not None and each is not None:
                out[places] = each
        top[places] = highest
        total[places] = sums if kept is None else torch.where(kept, sums, SKIPPED)


def token_losses_gradient_reference(
    logits: Tensor,  # (N, V)
    grad: Tensor,  # (N, V), written
    target: Tensor,  # (N,)
    class_weight: Tensor | None,  # (V,)
    options: Logits,
    top: Tensor,  # (N,)
    total: Tensor,  # (N,)
    factors: Factors,  # without a square
) -> None:
    """Do in torch operations, a chunk of rows at a time, what the kernel does."""
    on_target = None if factors.nll is None else torch.where(target != NO_TARGET, factors.nll, 0)
    factors = factors._replace(nll=on_target)
    kept = factors.any()
    kept = total != SKIPPED if kept is None else kept & (total != SKIPPED)
    for places, chosen in _chunks(logits, kept):
        rows = (logits[places], target[places], class_weight, options, top[places], total[places])
        found = gradient_reference(*rows, factors.map(lambda f: f[places]), chosen)  # noqa: B023 - called now
        grad[places] = found if isinstance(places, slice) else found.to(grad.dtype)
    if logits.device.type == "cpu":
        grad[~kept] = 0


def _chunks(logits: Tensor, counted: Tensor | None) -> Iterator[tuple[slice | Tensor, Tensor | None]]:
    """Some rows at a time, and which of them count.

    On the CPU, where nobody waits for their number, there are only those, and `None` stands for all.
    """
    tokens, vocab = logits.shape
    itemsize = compute_dtype(logits).itemsize
    if logits.device.type != "cpu":
        size = chunk_tokens(tokens, vocab, itemsize, on_cpu=False)
        for start in range(0, tokens, size):
            yield slice(start, start + size), None if counted is None else counted[start : start + size]
        return
    order = None if counted is None or counted.all() else counted.nonzero()[:, 0]
    size = max(1, CPU_CHUNK_BYTES // (vocab * itemsize))
    for start in range(0, tokens if order is None else len(order), size):
        rows = slice(start, start + size)
        yield (rows if order is None else order[rows]), None


@triton.jit
def _token_losses_kernel(
    logits_ptr,  # [N, V], row stride L
    target_ptr,  # [N], int64
    counted_ptr,  # [N], bool, or None
    class_weight_ptr,  # [V], fp32, or None
    weight_sum_ptr,  # [], fp32, sum of the class weights, or None
    nll_ptr,  # [N], fp32, or None; the same for the two that follow
    smooth_ptr,
    lse_ptr,
    top_ptr,  # [N], fp32
    total_ptr,  # [N], fp32
    V,
    L,
    NO_TARGET: tl.constexpr,
    SKIPPED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,  # logits in a load of a lane
    IS_ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * L can exceed 2**31
    if counted_ptr is not None:  # noqa: SIM102 - decided when it is compiled, the next one for each row
        if tl.load(counted_ptr + row) == 0:
            tl_skip_losses(row, nll_ptr, smooth_ptr, lse_ptr)
            tl.store(top_ptr + row, 0.0)
            tl.store(total_ptr + row, SKIPPED)
            return

    top, total = tl_losses(
        logits_ptr,
        row,
        tl.load(target_ptr + row),
        class_weight_ptr,
        tl_weight_sum(weight_sum_ptr, V),
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
        IS_ALIGNED,
        "evict_first",
    )
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)


@triton.jit
def _token_losses_gradient_kernel(
    logits_ptr,  # [N, V], row stride L
    grad_ptr,  # [N, V], contiguous
    target_ptr,  # [N], int64
    class_weight_ptr,  # [V], fp32, or None
    weight_sum_ptr,  # [], fp32, sum of the class weights, or None
    top_ptr,  # [N], fp32
    total_ptr,  # [N], fp32
    nll_factor_ptr,  # [N], fp32, or None; the same for the two that follow
    smooth_factor_ptr,
    lse_factor_ptr,
    V,
    L,
    NO_TARGET: tl.constexpr,
    SKIPPED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,  # of a program
    VECTOR: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # logits_ptr is a multiple of a vector, rows of both tensors start alike in one
):
    row = tl.program_id(0).to(tl.int64)  # row * L can exceed 2**31
    base, before = tl_vector_start(row * L, VECTOR, IS_ALIGNED)
    grad_base, _ = tl_vector_start(row * V, VECTOR, IS_ALIGNED)
    start = tl.program_id(1) * (VECTORS * VECTOR)
    first = start + tl.arange(0, VECTORS)[:, None] * VECTOR
    place = first + tl.arange(0, VECTOR)[None, :]
    cols = place - before
    is_class = (cols >= 0) & (cols < V)
    is_read = is_class
    is_whole = is_class
    if IS_ALIGNED:
        is_read = first < V + before
        is_whole = (first >= before) & (first + VECTOR <= V + before)
    target = tl.load(target_ptr + row)
    total = tl.load(total_ptr + row)
    on_target = tl_on_target(tl_load_or_zero(nll_factor_ptr, row), target, V, NO_TARGET)
    smooth = tl_load_or_zero(smooth_factor_ptr, row)
    on_lse = tl_load_or_zero(lse_factor_ptr, row)

    if (total == SKIPPED) | ((on_target == 0.0) & (smooth == 0.0) & (on_lse == 0.0)):
        grad = tl.zeros((VECTORS, VECTOR), tl.float32)
    else:
        p_factor = SCALE * (on_target + smooth * tl_weight_sum(weight_sum_ptr, V) + on_lse) / total
        a = tl.load(logits_ptr + base + place, mask=is_read, other=0.0, eviction_policy="evict_first")
        a = tl.where(is_class, a.to(tl.float32), 0.0)
        is_smoothed: tl.constexpr = smooth_factor_ptr is not None
        grad = tl_gradient(
            a,
            cols,
            tl.where(cols == target, on_target * SCALE, 0.0),
            tl.load(top_ptr + row),
            p_factor,
            smooth * SCALE,
            class_weight_ptr,
            V,
            SCALE,
            SOFTCAP,
            logits_ptr.dtype.element_ty.primitive_bitwidth == 16,
            is_smoothed,
        )
    grad = grad.to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + grad_base + place, grad, mask=is_whole, eviction_policy="evict_first")
    if IS_ALIGNED:  # noqa: SIM102 - decided when it is compiled, the next one for each block
        # Vectors that belong to two rows, whose elements are stored one by one.
        if (start < before) | (start + VECTORS * VECTOR > (V + before) // VECTOR * VECTOR):
            tl.store(grad_ptr + grad_base + place, grad, mask=is_class & ~is_whole)


def token_losses_triton(
    logits: Tensor,
    target: Tensor,
    counted: Tensor | None,
    class_weight: Tensor | None,
    options: Logits,
    losses: TokenLosses,
    top: Tensor,
    total: Tensor,
) -> None:
    """Launch the kernel; arguments as in the reference, fp32 where they are not the logits or integers."""
    tokens, vocab = logits.shape
    if not tokens:
        return
    _check(logits, target, counted, class_weight, top, total, *losses)
    launch(
        _token_losses_kernel,
        (tokens,),
        logits,
        target,
        counted,
        class_weight,
        None if class_weight is None else class_weight.sum(),
        *losses,
        top,
        total,
        vocab,
        logits.stride(0),
        NO_TARGET=NO_TARGET,
        SKIPPED=SKIPPED,
        SCALE=float(options.scale),
        SOFTCAP=float(options.softcap),
        IS_ALIGNED=address(logits) % VECTOR_BYTES == 0,
        **over_row(vocab, logits.element_size(), options),
    )


def token_losses_gradient_triton(
    logits: Tensor,
    grad: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    options: Logits,
    top: Tensor,
    total: Tensor,
    factors: Factors,
) -> None:
    """Launch the kernel; arguments as in the reference, fp32 where they are not the logits or integers."""
    tokens, vocab = logits.shape
    if not tokens:
        return
    _check(logits, target, None, class_weight, top, total, *factors)
    assert grad.is_contiguous(), "the gradient must be dense"
    assert factors.square is None, "a square is made of the log-sum-exp outside"
    itemsize = logits.element_size()
    vector = VECTOR_BYTES // itemsize
    vectors = min(GRAD_BLOCK_BYTES // VECTOR_BYTES, max(32, triton.next_power_of_2(vocab) // vector))
    alike = (logits.stride(0) - vocab) % vector == 0 and grad.dtype == logits.dtype
    launch(
        _token_losses_gradient_kernel,
        (tokens, triton.cdiv(vocab + vector - 1, vectors * vector)),
        logits,
        grad,
        target,
        class_weight,
        None if class_weight is None else class_weight.sum(),
        top,
        total,
        *factors[:3],
        vocab,
        logits.stride(0),
        NO_TARGET=NO_TARGET,
        SKIPPED=SKIPPED,
        SCALE=float(options.scale),
        SOFTCAP=float(options.softcap),
        VECTORS=vectors,
        VECTOR=vector,
        IS_ALIGNED=alike and address(logits) % VECTOR_BYTES == 0,
        num_warps=min(GRAD_WARPS, vectors // 32),
        **fused(options),
    )


def _check(logits: Tensor, target: Tensor, counted: Tensor | None, *numbers: Tensor | None) -> None:
    assert logits.stride(1) == 1 or logits.shape[1] == 1, "logits must be dense along the classes"
    assert target.dtype == torch.int64, "targets must be int64"
    assert counted is None or counted.dtype == torch.bool, "rows count or do not"
    given = [number for number in numbers if number is not None]
    assert all(number.dtype == torch.float32 for number in given), "the kernel computes in fp32"
    assert all(vector is None or vector.is_contiguous() for vector in (target, counted, *given)), "no gaps"
