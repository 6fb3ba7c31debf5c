"""The pass over a chunk of logits with one read: programs hold a row in registers, each a part of it.

    part k:   m_k = max_c z_c,  s_k = sum_c exp(z_c - m_k)   told to the others, and theirs waited for
              m = max_k m_k,    s = sum_k s_k exp(m_k - m)   then as in `_softmax_grad.py`

What a part tells is one word of 64 bits, both numbers, in a slot that was 0, so nothing else has to be in order. Parts
are handed out in the order in which programs begin: the others of a row are running, or next, and none waits for what
cannot begin while it waits. All of them add up the same numbers in the same order: results are the same in every run.

Losses without smoothing, soft cap or a negative scale, logits of two bytes. An H200 takes 0.29 ms for 2048 rows of
128256 bf16 classes and 0.28 for 1664 of 151936, where two reads take 0.39 and one 0.25. Parts of 8 warps take 0.31, of
less than 18 loads a lane 0.30, a maximum and exponentials that do not share instructions 0.34 (packed pairs, and the
exponent as one multiply-add: the largest z is then not exactly 2 ** 0, by what every z has in common, which cancels).

Source: Merrill & Garland 2016, "Single-pass parallel prefix scan with decoupled look-back" (order by tickets, one word
of state and value)
"""
# Shape letters: C = rows of the chunk (tokens), V = classes (vocabulary), L = row stride of the chunk, V rounded up,
# P = parts of a row.

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from graphfuse.kernels._softmax_device import LOG2_E, tl_exp2, tl_load_or_zero, tl_on_target, tl_skip_losses
from graphfuse.kernels._triton import HAS_PTX, launch, num_sms, tl, triton

WARPS = 4
VECTOR = 8  # logits in a load of a lane
MAX_TILES = 20  # loads of a lane: 80 registers, so that four programs fit a multiprocessor
BLOCK = 32 * WARPS * VECTOR
REGISTERS = 128

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tl_larger(a, b):
    """Return the larger of each two, of two bytes, in pairs."""
    if HAS_PTX:
        if a.dtype == tl.bfloat16:
            larger = tl.inline_asm_elementwise(
                "max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            larger = tl.inline_asm_elementwise(
                "max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
            )
        return larger
    else:
        return tl.maximum(a, b)


@triton.jit
def tl_packed(a):
    """Return the same, anew, in half as many registers: what is made of it is not kept from one use to the next."""
    if HAS_PTX:
        a = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [a], dtype=a.dtype, is_pure=False, pack=2)
    return a


@triton.jit
def tl_unit(top, SCALE: tl.constexpr, COARSE: tl.constexpr):
    """Return what logits are multiplied by to be exponents of 2, where `top` is the largest of them.

    What is lost of a product is less than 1 and cancels; of huge numbers it would not. All but the largest of those
    are so far below it that their exponentials are 0 in a smaller unit, too: a power of two, which loses nothing.
    """
    FINE: tl.constexpr = SCALE * LOG2_E
    return tl.where(tl.abs(top) * FINE > 16777216.0, COARSE, FINE)


@triton.jit
def tl_rescale(total, top, new_top, SCALE: tl.constexpr, COARSE: tl.constexpr):
    """Return sums of exponentials relative to `new_top`, the largest of all, that were relative to `top`."""
    unit, new_unit = tl_unit(top, SCALE, COARSE), tl_unit(new_top, SCALE, COARSE)
    exponent = top * unit - tl.where(new_top == float("-inf"), 0.0, new_top * new_unit)
    return total * tl_exp2(tl.where(unit == new_unit, exponent, float("-inf")))


@triton.jit
def tl_exchange(slots_ptr, part, top, total, P, SCALE: tl.constexpr, COARSE: tl.constexpr, SLOTS: tl.constexpr):
    """Tell the other parts of the row, wait for theirs, and return the numbers of all."""
    top_bits = top.to(tl.int32, bitcast=True).to(tl.int64) << 32
    word = top_bits | (total.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    tl.atomic_xchg(slots_ptr + part, word, sem="release")
    slots = tl.arange(0, SLOTS)
    words = tl.load(slots_ptr + slots, mask=slots < P, other=1, volatile=True)
    while tl.sum((words == 0).to(tl.int32)) > 0:
        words = tl.load(slots_ptr + slots, mask=slots < P, other=1, volatile=True)
    tops = tl.where(slots < P, (words >> 32).to(tl.int32).to(tl.float32, bitcast=True), float("-inf"))
    totals = tl.where(slots < P, words.to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    top = tl.max(tops)
    return top, tl.sum(tl_rescale(totals, tops, top, SCALE, COARSE))


@triton.jit(do_not_specialize=["P"])
def _softmax_grad_parts_kernel(
    logits_ptr,  # [C, V], row stride L; its gradient is written over it
    target_ptr,  # [C], int64
    nll_ptr,  # [C], fp32, or None
    lse_ptr,  # [C], fp32, or None
    nll_factor_ptr,  # [C], fp32, or None; the same for the two that follow
    lse_factor_ptr,
    square_factor_ptr,
    state_ptr,  # [1 + C * P], int64, zeros: how many parts have begun, and a slot for each; None: a row is one part
    V,
    L,
    P,
    NO_TARGET: tl.constexpr,
    SCALE: tl.constexpr,
    COARSE: tl.constexpr,  # a power of two, less than what SCALE makes of logits
    HAS_FACTORS: tl.constexpr,
    IS_EVEN: tl.constexpr,  # whether classes end where a load does
    SLOTS: tl.constexpr,  # P, rounded up to a power of two
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    BLOCK: tl.constexpr = LANES * VECTOR
    ticket = tl.program_id(0)
    if state_ptr is not None:
        ticket = tl.atomic_add(state_ptr, 1, sem="relaxed").to(tl.int32)
    row = (ticket // P).to(tl.int64)  # row * L can exceed 2**31
    part = ticket % P
    first = part * (TILES * BLOCK)
    part_ptr = logits_ptr + row * L + first
    firsts = tl.arange(0, LANES)[:, None] * VECTOR
    places = firsts + tl.arange(0, VECTOR)[None, :]
    room, known = L - first, V - first

    on_target = tl_load_or_zero(nll_factor_ptr, row)
    on_lse = tl_load_or_zero(lse_factor_ptr, row)
    square = tl_load_or_zero(square_factor_ptr, row)
    if HAS_FACTORS:  # noqa: SIM102 - decided when it is compiled, the next one for each row
        if (on_target == 0.0) & (on_lse == 0.0) & (square == 0.0):
            if part == 0:
                tl_skip_losses(row, nll_ptr, None, lse_ptr)
            for start in tl.range(0, TILES * BLOCK, BLOCK):
                zero = tl.zeros((LANES, VECTOR), logits_ptr.dtype.element_ty)
                tl.store(part_ptr + start + places, zero, mask=start + firsts < room)
            return

    if not IS_EVEN:  # what the load with the last class reads behind it: cheaper written than looked for
        behind = known + tl.arange(0, VECTOR)
        has_last = (known > 0) & (known < TILES * BLOCK)
        end = tl.where(has_last, tl.cdiv(known, VECTOR) * VECTOR, known)
        tl.store(part_ptr + behind, float("-inf"), mask=behind < end)
        tl.debug_barrier()
    # As many loads as there are tiles, all of them on their way before the first is looked at.
    tiles = ()
    for k in tl.static_range(TILES):
        a = tl.load(part_ptr + places + k * BLOCK, mask=firsts + k * BLOCK < known, other=float("-inf"))
        tiles = tiles + (a,)  # type: ignore[assignment]  # noqa: RUF005 - Triton's tuples
    target = tl.load(target_ptr + row)
    is_known = (target >= 0) & (target < V)
    is_here = is_known & (target >= first) & (target < first + TILES * BLOCK)
    at_target = tl.load(part_ptr + tl.where(is_here, target - first, 0)).to(tl.float32)

    tops = tiles[0]  # type: ignore[misc]
    for k in tl.static_range(1, TILES):
        tops = tl_larger(tops, tiles[k])
    tops = tl.max(tops.to(tl.float32), 1)
    units = tl_unit(tops, SCALE, COARSE)
    shifts = tl.where(tops == float("-inf"), 0.0, tops * units)
    totals = tl.zeros((LANES, VECTOR), tl.float32)
    for k in tl.static_range(TILES):
        totals += tl_exp2(tl.fma(tl_packed(tiles[k]).to(tl.float32), units[:, None], -shifts[:, None]))
    top = tl.max(tops)
    total = tl.sum(tl_rescale(tl.sum(totals, 1), tops, top, SCALE, COARSE))
    if state_ptr is not None:
        top, total = tl_exchange(state_ptr + 1 + row * P, part, top, total, P, SCALE, COARSE, SLOTS)

    unit = tl_unit(top, SCALE, COARSE)
    shift = top * unit
    log_total = tl.log2(total) * LN_2
    lse = shift * (SCALE / unit) + log_total
    exponent = tl.fma(at_target, unit, -shift)  # of the target
    if nll_ptr is not None:  # noqa: SIM102
        if is_here | (part == 0) & (is_known == 0):
            nll = tl.where(is_known, log_total - exponent * (SCALE / unit), float("nan"))
            tl.store(nll_ptr + row, tl.where(target != NO_TARGET, nll, 0.0))
    if lse_ptr is not None:  # noqa: SIM102
        if part == 0:
            tl.store(lse_ptr + row, lse)

    on_target = tl_on_target(on_target, target, V, NO_TARGET) * SCALE
    p_factor = (on_target + SCALE * (on_lse + 2.0 * square * lse)) / total
    for k in tl.static_range(TILES):
        grad = tl_exp2(tl.fma(tl_packed(tiles[k]).to(tl.float32), unit, -shift)) * p_factor
        tl.store(
            part_ptr + places + k * BLOCK,
            grad.to(logits_ptr.dtype.element_ty),
            mask=firsts + k * BLOCK < room,
            eviction_policy="evict_first",
        )
    tl.debug_barrier()  # the target's comes last
    grad = tl_exp2(exponent) * p_factor - on_target
    tl.store(part_ptr + (target - first), grad.to(logits_ptr.dtype.element_ty), mask=is_here)


def parts_of(length: int, device: torch.device) -> int:
    """Return among how many programs a row of `length` logits, two bytes each, is shared; 0: there are not so many."""
    parts = triton.cdiv(length, MAX_TILES * BLOCK)
    # No more than a warp has lanes: the slots of all are then looked at by every warp for itself.
    return parts if parts <= min(_at_once(device), 32) else 0


@cache
def _at_once(device: torch.device) -> int:
    """How many programs certainly run at a time."""
    if not HAS_PTX:
        return 1 if device.type == "cpu" else 0  # the interpreter runs one after the other
    if device.type == "cpu":  # compiled for a GPU that is not there
        return 100
    has_pairs = torch.cuda.get_device_capability(device) >= (8, 0)
    # Four to a multiprocessor, of which others may have most: another stream's parts, which wait for each other, too.
    return num_sms(device) // 4 if has_pairs else 0


def softmax_grad_parts(
    logits: Tensor,  # (C, V), written
    target: Tensor,  # (C,)
    scale: float,
    nll: Tensor | None,  # (C,), written; the next as well
    lse: Tensor | None,
    nll_factor: Tensor | None,  # (C,); the same for the two that follow
    lse_factor: Tensor | None,
    square_factor: Tensor | None,
    no_target: int,
) -> None:
    """Launch the kernel."""
    (rows, vocab), length = logits.shape, logits.stride(0)
    parts = parts_of(length, logits.device)
    state = logits.new_zeros(1 + rows * parts, dtype=torch.int64) if parts > 1 else None
    launch(
        _softmax_grad_parts_kernel,
        (rows * parts,),
        logits,
        target,
        nll,
        lse,
        nll_factor,
        lse_factor,
        square_factor,
        state,
        vocab,
        length,
        parts,
        NO_TARGET=no_target,
        SCALE=scale,
        COARSE=2.0 ** (math.frexp(scale)[1] - 4),
        HAS_FACTORS=any(factor is not None for factor in (nll_factor, lse_factor, square_factor)),
        IS_EVEN=vocab % VECTOR == 0,
        SLOTS=triton.next_power_of_2(parts),
        TILES=triton.cdiv(triton.cdiv(length, parts), BLOCK),
        LANES=32 * WARPS,
        VECTOR=VECTOR,
        num_warps=WARPS,
        enable_fp_fusion=False,  # a lane's largest exponent is rounded once, wherever it is used
        **({"maxnreg": REGISTERS} if HAS_PTX else {}),
    )
