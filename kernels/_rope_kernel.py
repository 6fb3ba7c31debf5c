"""The kernel of `rope`.

A program holds a block of heads at one position, so that the tables are read once for all of them.
Where a position has few heads, it holds several positions.
"""
# Shape letters: H = heads, N = tokens (all other leading dims), D = features of a head, P = pairs,
# T = width of a table.

from __future__ import annotations

from graphfuse.kernels._bf16 import tl_widen
from graphfuse.kernels._triton import tl, triton


@triton.jit
def tl_load_pairs(ptrs, stride, mask, P: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return both members of P pairs in fp32, each [*, *, BLOCK_P]; `ptrs` is [*, *, 1]."""
    pairs = tl.arange(0, BLOCK_P).to(tl.int64)[None, None, :]
    if LAYOUT == "interleaved":
        # Both members in one contiguous load, told apart in registers.
        cols = tl.arange(0, 2 * BLOCK_P).to(tl.int64)[None, None, :]
        both = tl.load(ptrs + cols * stride, mask=mask & (cols < 2 * P), other=0.0)
        both = tl.reshape(both, (both.shape[0], both.shape[1], BLOCK_P, 2))
        first, second = tl.split(both)
    else:
        first = tl.load(ptrs + pairs * stride, mask=mask & (pairs < P), other=0.0)
        second = first
        if LAYOUT == "half":
            second = tl.load(ptrs + (P + pairs) * stride, mask=mask & (pairs < P), other=0.0)
    return tl_widen(first), tl_widen(second)


@triton.jit
def tl_store_pairs(
    ptrs,
    stride,
    first,
    second,
    mask,
    P: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Round both members of P pairs to the dtype of `ptrs` and store them."""
    first = first.to(ptrs.dtype.element_ty)
    second = second.to(ptrs.dtype.element_ty)
    if LAYOUT == "interleaved":
        cols = tl.arange(0, 2 * BLOCK_P).to(tl.int64)[None, None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], first.shape[1], 2 * BLOCK_P))
        tl.store(ptrs + cols * stride, both, mask=mask & (cols < 2 * P))
    else:
        pairs = tl.arange(0, BLOCK_P).to(tl.int64)[None, None, :]
        tl.store(ptrs + pairs * stride, first, mask=mask & (pairs < P))
        tl.store(ptrs + (P + pairs) * stride, second, mask=mask & (pairs < P))


@triton.jit
def tl_place(tile, N, N1, N2, H, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """Return the masks [BLOCK_N, 1, 1] and [BLOCK_N, BLOCK_H, 1] of a tile, and where its heads are."""
    # Tiles of one position follow each other: its tables stay in the cache.
    num_head_blocks = tl.cdiv(H, BLOCK_H)
    tokens = tile // num_head_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    heads = tile % num_head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    token_mask = (tokens < N)[:, None, None]
    mask = token_mask & (heads < H)[None, :, None]
    n2 = (tokens % N2).to(tl.int64)[:, None, None]  # offsets can exceed 2**31
    n1 = (tokens // N2 % N1).to(tl.int64)[:, None, None]
    n0 = (tokens // N2 // N1).to(tl.int64)[:, None, None]
    return token_mask, mask, (n0, n1, n2, heads.to(tl.int64)[None, :, None])


@triton.jit
def tl_offsets(place, strides):
    """Return where the heads of a tile begin."""
    n0, n1, n2, h = place
    return n0 * strides[0] + n1 * strides[1] + n2 * strides[2] + h * strides[3]


@triton.jit
def tl_load_tables(
    cos_ptr,
    sin_ptr,
    cos_strides,
    sin_strides,
    place,
    mask,
    P: tl.constexpr,
    TABLE: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Return cos1, cos2, sin1 and sin2 of the rotation that is meant."""
    n0, n1, n2, h = place
    if SPREAD:
        n2 = n2 + h * 0
    cos_ptrs = cos_ptr + n0 * cos_strides[0] + n1 * cos_strides[1] + n2 * cos_strides[2]
    sin_ptrs = sin_ptr + n0 * sin_strides[0] + n1 * sin_strides[1] + n2 * sin_strides[2]
    cos1, cos2 = tl_load_pairs(cos_ptrs, cos_strides[3], mask, P, TABLE, BLOCK_P)
    sin1, sin2 = tl_load_pairs(sin_ptrs, sin_strides[3], mask, P, TABLE, BLOCK_P)
    if REVERSE:
        sin1, sin2 = -sin1, -sin2
    if TRANSPOSE:
        sin1, sin2 = sin2, sin1
    return cos1, cos2, sin1, sin2


@triton.jit
def tl_copy_features(
    x_ptrs,
    x_stride,
    y_ptrs,
    y_stride,
    mask,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the features from FIRST to before END."""
    cols = FIRST + tl.arange(0, BLOCK).to(tl.int64)[None, None, :]
    x = tl.load(x_ptrs + cols * x_stride, mask=mask & (cols < END))
    y = x.to(tl.float32).to(y_ptrs.dtype.element_ty)
    tl.store(y_ptrs + cols * y_stride, y, mask=mask & (cols < END))


@triton.jit
def tl_rotate(
    tile,
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    x_strides,
    cos_strides,
    sin_strides,
    y_strides,
    N,
    N1,
    N2,
    H,
    D: tl.constexpr,
    START: tl.constexpr,
    P: tl.constexpr,
    LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TABLE: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_BEFORE: tl.constexpr,
    BLOCK_AFTER: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Do what the kernel does with one tile."""
    token_mask, mask, place = tl_place(tile, N, N1, N2, H, BLOCK_N, BLOCK_H)
    x_ptrs = x_ptr + tl_offsets(place, x_strides)
    y_ptrs = y_ptr + tl_offsets(place, y_strides)
    x_stride = x_strides[4]
    y_stride = y_strides[4]
    start = tl.full((), START, tl.int64)

    a, b = tl_load_pairs(x_ptrs + start * x_stride, x_stride, mask, P, LAYOUT, BLOCK_P)
    cos1, cos2, sin1, sin2 = tl_load_tables(
        cos_ptr,
        sin_ptr,
        cos_strides,
        sin_strides,
        place,
        mask if SPREAD else token_mask,
        P,
        TABLE,
        REVERSE,
        TRANSPOSE,
        BLOCK_P,
        SPREAD,
    )
    p = a * cos1 - b * sin1
    q = b * cos2 + a * sin2

    tl_store_pairs(y_ptrs + start * y_stride, y_stride, p, q, mask, P, OUT_LAYOUT, BLOCK_P)
    if START > 0:
        tl_copy_features(x_ptrs, x_stride, y_ptrs, y_stride, mask, 0, START, BLOCK_BEFORE)
    if START + 2 * P < D:
        tl_copy_features(x_ptrs, x_stride, y_ptrs, y_stride, mask, START + 2 * P, D, BLOCK_AFTER)


# What kernels of one tensor, or of two, count.
COUNTS = ["N", "N1", "N2", "H", "OTHER_N", "OTHER_N1", "OTHER_N2", "OTHER_H", "TILES"]


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def rope_kernel(
    x_ptr,  # [N0, N1, N2, H, D]
    cos_ptr,  # [N0, N1, N2, T]
    sin_ptr,  # [N0, N1, N2, T]
    y_ptr,  # [N0, N1, N2, H, D]
    other_x_ptr,  # None, or what is rotated by the same tables in the same launch, walked over in its own way
    other_y_ptr,
    x_strides,  # of N0, N1, N2, H, D
    cos_strides,  # of N0, N1, N2, T
    sin_strides,  # of N0, N1, N2, T
    y_strides,  # of N0, N1, N2, H, D
    N,  # N0 * N1 * N2
    N1,
    N2,
    H,
    other_x_strides,
    other_cos_strides,
    other_sin_strides,
    other_y_strides,
    OTHER_N,
    OTHER_N1,
    OTHER_N2,
    OTHER_H,
    TILES,  # of x; those of the other tensor follow
    D: tl.constexpr,
    START: tl.constexpr,
    P: tl.constexpr,
    LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TABLE: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OTHER_BLOCK_N: tl.constexpr,
    OTHER_BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,  # next power of two >= P
    BLOCK_BEFORE: tl.constexpr,  # >= START
    BLOCK_AFTER: tl.constexpr,  # >= D - START - 2 * P
    SPREAD: tl.constexpr,
):
    tile = tl.program_id(0)
    if other_x_ptr is None or tile < TILES:
        tl_rotate(
            tile, x_ptr, cos_ptr, sin_ptr, y_ptr, x_strides, cos_strides, sin_strides, y_strides, N, N1, N2, H,
            D, START, P, LAYOUT, OUT_LAYOUT, TABLE, REVERSE, TRANSPOSE,
            BLOCK_N, BLOCK_H, BLOCK_P, BLOCK_BEFORE, BLOCK_AFTER, SPREAD,
        )  # fmt: skip
    else:
        tl_rotate(
            tile - TILES, other_x_ptr, cos_ptr, sin_ptr, other_y_ptr,
            other_x_strides, other_cos_strides, other_sin_strides, other_y_strides,
            OTHER_N, OTHER_N1, OTHER_N2, OTHER_H,
            D, START, P, LAYOUT, OUT_LAYOUT, TABLE, REVERSE, TRANSPOSE,
            OTHER_BLOCK_N, OTHER_BLOCK_H, BLOCK_P, BLOCK_BEFORE, BLOCK_AFTER, SPREAD,
        )  # fmt: skip
