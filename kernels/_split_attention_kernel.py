"""Attention of few queries, the keys of a head shared out to many programs: its kernels, and how they are laid out.

One program for each head of keys leaves most of a GPU idle where there are few sequences, as when text is generated.
So the keys are cut into blocks, dealt out in turn to as many programs as the GPU runs at once. Each keeps for its rows
the largest score, the sum of the weights relative to it, and the sum of the values; a second kernel adds up what the
programs of a row have, always in the same order.

A program looks at the mask of all its blocks first, and reads keys and values from the first to the last of which a key
is seen: a cache that is made for more tokens than it holds costs what it holds. Dealt out in turn, blocks that lie side
by side are with different programs.

Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html
"""
# Shape letters: B = sequences, H = heads of queries, G = heads of keys and values, S = positions of queries,
# T = positions of keys, D = features of a head, E = features of a value, R = rows (B * S * H).

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._triton import launch, num_sms, tl, triton

MIN_ROWS, MAX_ROWS = 16, 64  # queries of a program: fewest of a tensor core's product, and what fits in registers
MIN_KEYS, MAX_KEYS = 16, 128  # of a block
BLOCK_BYTES = 32768  # of the keys and values of a block
STAGES = 2  # blocks that a program has loaded or is loading
PER_SM = 2  # programs to a multiprocessor
LOOK_BLOCKS = 16  # blocks whose mask is looked at at once
WARPS = 4
LARGE = 8192  # elements of a result in registers, above which twice as many warps share them
MERGED_PARTS, MERGED_FEATURES = 64, 64  # that a program adds up at a time

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tl_allowed(mask):
    """Return where a key is seen, or adds something other than -inf; NaN is no reason to leave it out."""
    if mask.dtype == tl.int1:
        return mask
    else:
        return mask != float("-inf")


@triton.jit(
    do_not_specialize=["T", "splits"],
    do_not_specialize_on_alignment=["G", "group", "S", "mask_b", "mask_h", "mask_s", "mask_t"],
)
def _split_attention_kernel(
    query_ptr,  # [B, H, S, D]
    key_ptr,  # [B, G, T, D]
    value_ptr,  # [B, G, T, E]
    mask_ptr,  # [B, H, S, T]
    parts_ptr,  # [R, splits, E]; the result [R, E] where splits is 1
    sums_ptr,  # [R, splits, 2]: largest score, sum of weights
    query_strides,
    key_strides,
    value_strides,
    mask_b,
    mask_h,
    mask_s,
    mask_t,
    G,
    group,  # queries' heads of a head of keys
    S,
    T,
    splits,
    D: tl.constexpr,
    E: tl.constexpr,
    SCALE: tl.constexpr,
    IS_MERGED: tl.constexpr,  # whether another kernel adds up the parts
    ROW_MASKS: tl.constexpr,  # whether the rows of a program have masks of their own
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LOOK: tl.constexpr,  # keys whose mask is looked at at once
):
    split = tl.program_id(1)
    g = tl.program_id(0) % G
    b = (tl.program_id(0) // G).to(tl.int64)  # offsets can exceed 2**31
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    is_row = rows < group * S
    head = (g * group + rows // S).to(tl.int64)
    s = rows % S
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)

    queries = query_ptr + b * query_strides[0] + (head * query_strides[1] + s * query_strides[2])[:, None]
    q = tl.load(queries + d[None, :] * query_strides[3], mask=is_row[:, None] & (d < D)[None, :], other=0.0)

    blocks = tl.cdiv(T, BLOCK_N)
    first = 0
    last = tl.cdiv(tl.maximum(blocks - split, 0), splits)
    mask_offset = b * mask_b
    if mask_ptr is not None:
        if ROW_MASKS:
            mask_rows = (head * mask_h + s * mask_s)[:, None]
            is_mask_row = is_row[:, None]
        else:  # that of the first head of the group
            mask_rows = tl.zeros((1, 1), tl.int64) + g.to(tl.int64) * group * mask_h
            is_mask_row = tl.full((1, 1), True, tl.int1)
        seen_first = tl.zeros((1, LOOK), tl.int32) + last
        seen_last = tl.zeros((1, LOOK), tl.int32)
        place = tl.arange(0, LOOK)[None, :]
        for start in range(0, last, LOOK // BLOCK_N):
            turn = start + place // BLOCK_N
            keys = (split + turn * splits).to(tl.int64) * BLOCK_N + place % BLOCK_N
            inside = (keys < T) & is_mask_row
            mask = tl.load(mask_ptr + mask_offset + mask_rows + keys * mask_t, mask=inside, other=0)
            seen = tl_allowed(mask) & inside
            if ROW_MASKS:
                seen = tl.max(seen.to(tl.int32), 0)[None, :] > 0
            seen_first = tl.where(seen, tl.minimum(seen_first, turn), seen_first)
            seen_last = tl.where(seen, tl.maximum(seen_last, turn + 1), seen_last)
        first = tl.min(seen_first)
        last = tl.max(seen_last)

    key_ptr += b * key_strides[0] + g.to(tl.int64) * key_strides[1]
    value_ptr += b * value_strides[0] + g.to(tl.int64) * value_strides[1]

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for step in range(0, last - first):  # from 0: Triton knows nothing of addresses that an unknown bound goes into
        turn = first + step
        keys = (split + turn * splits).to(tl.int64) * BLOCK_N + n
        inside = keys < T
        k_at = key_ptr + keys[None, :] * key_strides[2] + d[:, None] * key_strides[3]
        k = tl.load(k_at, mask=inside[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * SCALE
        is_seen = inside[None, :]
        if mask_ptr is not None:
            mask_at = mask_ptr + mask_offset + mask_rows + keys[None, :] * mask_t
            mask = tl.load(mask_at, mask=is_seen & is_mask_row, other=0)
            if mask.dtype == tl.int1:
                is_seen = is_seen & mask
            else:
                scores += mask.to(tl.float32)
        scores = tl.where(is_seen, scores, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(scores, 1))
        # All may be hidden so far. And differences are scaled, not scores: the lowest mask would become -inf.
        base = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2((scores - base[:, None]) * LOG2_E)
        shrink = tl.exp2((before - base) * LOG2_E)
        total = total * shrink + tl.sum(weights, 1)
        v_at = value_ptr + keys[:, None] * value_strides[2] + e[None, :] * value_strides[3]
        v = tl.load(v_at, mask=inside[:, None] & (e < E)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")

    row = (b * S + s) * (G * group) + head
    if IS_MERGED:
        row = row * splits + split
        tl.store(sums_ptr + row * 2, largest, mask=is_row)
        tl.store(sums_ptr + row * 2 + 1, total, mask=is_row)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a row that sees nothing is 0
    # Where nothing is seen, the merge reads no sum of values.
    wanted = is_row & ((total != 0.0) | (not IS_MERGED))
    at = parts_ptr + row[:, None] * E + e[None, :]
    tl.store(at, acc.to(parts_ptr.dtype.element_ty), mask=wanted[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _merge_attention_kernel(
    parts_ptr,  # [R, splits, E]
    sums_ptr,  # [R, splits, 2]
    out_ptr,  # [R, E]
    splits,
    E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    largest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, splits, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        part = row * splits + place
        scores = tl.load(sums_ptr + part * 2, mask=place < splits, other=float("-inf"))
        sums = tl.load(sums_ptr + part * 2 + 1, mask=place < splits, other=0.0)
        at = parts_ptr + part[:, None] * E + e[None, :]
        values = tl.load(at, mask=(sums != 0.0)[:, None] & (e < E)[None, :], other=0.0)
        before = largest
        largest = tl.maximum(largest, tl.max(scores, 0))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2((scores - base) * LOG2_E)
        shrink = tl.exp2((before - base) * LOG2_E)
        total = total * shrink + tl.sum(weights * sums, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * values, 0)
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)


class SplitPlan(NamedTuple):
    """How the kernel is laid over the keys of a head."""

    rows: int
    block_n: int
    block_d: int
    block_e: int
    splits: int
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1024)
def plan_splits(
    heads: int, rows: int, keys: int, features: int, width: int, itemsize: int, has_row_masks: bool, sms: int
) -> SplitPlan:
    """Lay the kernel out.

    Args:
        heads: Of keys, in all sequences.
        rows: Queries of each.
        keys: Of each.
        features: Of a key.
        width: Features of a value.
        itemsize: Bytes of one.
        has_row_masks: Whether the queries of a head have masks of their own.
        sms: Multiprocessors of the GPU.
    """
    # Products of fp32 are sums of each thread, whose operands all lie in registers.
    max_rows = MIN_ROWS if itemsize > 2 else MAX_ROWS // 2 if has_row_masks else MAX_ROWS
    block_rows = min(max_rows, max(MIN_ROWS, triton.next_power_of_2(rows)))
    block_d, block_e = (max(16, triton.next_power_of_2(size)) for size in (features, width))
    fitting = BLOCK_BYTES // ((block_d + block_e) * itemsize)
    block_n = MIN_KEYS if itemsize > 2 else min(MAX_KEYS, max(MIN_KEYS, 1 << (fitting.bit_length() - 1)))
    blocks = triton.cdiv(keys, block_n)
    programs = heads * triton.cdiv(rows, block_rows)
    splits = min(blocks, max(1, PER_SM * sms // programs))
    splits = triton.cdiv(blocks, triton.cdiv(blocks, splits))  # none with a block less than it might have
    is_large = block_rows * block_e > LARGE or (has_row_masks and block_rows > MIN_ROWS)
    num_warps = 2 * WARPS if itemsize > 2 or is_large else WARPS
    return SplitPlan(block_rows, block_n, block_d, block_e, splits, num_warps, STAGES)


def launch_split_attention(
    query: Tensor,  # (B, H, S, D)
    key: Tensor,  # (B, G, T, D)
    value: Tensor,  # (B, G, T, E)
    mask: Tensor | None,  # broadcastable to (B, H, S, T)
    out: Tensor,  # (B, H, S, E), (B, S, H, E) in memory
    scale: float,
) -> None:
    """Launch the kernels, which write `out`."""
    batch, heads, length, features = query.shape
    groups, keys, width = key.shape[1], key.shape[2], value.shape[3]
    group = heads // groups
    allowed = None if mask is None else mask.expand(batch, heads, length, keys)
    mask_strides = (0, 0, 0, 0) if allowed is None else allowed.stride()
    has_row_masks = (group > 1 and mask_strides[1] != 0) or (length > 1 and mask_strides[2] != 0)
    sizes = (batch * groups, group * length, keys, features, width, key.element_size())
    plan = plan_splits(*sizes, has_row_masks, num_sms(query.device))
    is_merged = plan.splits > 1
    parts, sums = out, out
    if is_merged:
        parts = out.new_empty((batch * length * heads, plan.splits, width), dtype=torch.float32)
        sums = out.new_empty((batch * length * heads, plan.splits, 2), dtype=torch.float32)
    launch(
        _split_attention_kernel,
        (batch * groups, plan.splits, triton.cdiv(group * length, plan.rows)),
        query,
        key,
        value,
        allowed,
        parts,
        sums,
        query.stride(),
        key.stride(),
        value.stride(),
        *mask_strides,
        groups,
        group,
        length,
        keys,
        plan.splits,
        D=features,
        E=width,
        SCALE=scale,
        IS_MERGED=is_merged,
        ROW_MASKS=has_row_masks,
        ROWS=plan.rows,
        BLOCK_N=plan.block_n,
        BLOCK_D=plan.block_d,
        BLOCK_E=plan.block_e,
        LOOK=plan.block_n * (1 if has_row_masks else LOOK_BLOCKS),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    if is_merged:
        block_e = min(MERGED_FEATURES, plan.block_e)
        launch(
            _merge_attention_kernel,
            (batch * length * heads, triton.cdiv(width, block_e)),
            parts,
            sums,
            out,
            plan.splits,
            E=width,
            BLOCK_P=MERGED_PARTS,
            BLOCK_E=block_e,
            num_warps=4,
        )
