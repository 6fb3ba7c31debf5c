"""The kernel of `norm_rope`: the tiles of `rope`, with the norm of each head, or of all of them, in between."""
# Shape letters: H = heads, N = tokens (all other leading dims), D = features of a head, P = pairs, T = width of a
# table, W = features of the weight: D, or H * D if the norm is across heads.

from __future__ import annotations

from graphfuse.kernels._bf16 import tl_widen
from graphfuse.kernels._rms_norm_kernel import tl_rstd
from graphfuse.kernels._rope_kernel import (
    COUNTS,
    tl_load_pairs,
    tl_load_tables,
    tl_offsets,
    tl_place,
    tl_store_pairs,
)
from graphfuse.kernels._triton import tl, triton


@triton.jit
def tl_load_rest(ptrs, stride, mask, FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    """Return the features from FIRST to before END in fp32, [*, *, BLOCK]."""
    cols = FIRST + tl.arange(0, BLOCK).to(tl.int64)[None, None, :]
    return tl_widen(tl.load(ptrs + cols * stride, mask=mask & (cols < END), other=0.0))


@triton.jit
def tl_store_rest(ptrs, stride, values, mask, FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    """Round the features from FIRST to before END to the dtype of `ptrs` and store them."""
    cols = FIRST + tl.arange(0, BLOCK).to(tl.int64)[None, None, :]
    tl.store(ptrs + cols * stride, values.to(ptrs.dtype.element_ty), mask=mask & (cols < END))


@triton.jit
def tl_total(values, ACROSS: tl.constexpr):
    """Return the sums over the features of a head, or of all heads."""
    total = tl.sum(values, axis=2, keep_dims=True)
    if ACROSS:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def tl_scaled(y, scale, OFFSET: tl.constexpr, NORMALIZED: tl.constexpr, ROUNDED: tl.constexpr):
    """Return the norm's result of x * rstd, rounded where it rounds; `scale` is the weight or None."""
    if NORMALIZED is not None:
        y = tl_widen(y.to(NORMALIZED))
    if scale is not None:
        if OFFSET != 0.0:
            scale = scale + OFFSET
        y = y * scale
    if ROUNDED is not None:
        y = tl_widen(y.to(ROUNDED))
    return y


@triton.jit
def tl_norm_and_rotate(
    tile,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    x_strides,
    y_strides,
    cos_strides,
    sin_strides,
    N,
    N1,
    N2,
    H,
    W: tl.constexpr,
    D: tl.constexpr,
    START: tl.constexpr,
    P: tl.constexpr,
    REST: tl.constexpr,
    REST_END: tl.constexpr,
    LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TABLE: tl.constexpr,
    REVERSE: tl.constexpr,
    EPS: tl.constexpr,
    GAIN: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROUNDED: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Do what the kernel does with one tile."""
    token_mask, mask, place = tl_place(tile, N, N1, N2, H, BLOCK_N, BLOCK_H)
    x_ptrs = x_ptr + tl_offsets(place, x_strides)
    y_ptrs = y_ptr + tl_offsets(place, y_strides)
    x_stride = x_strides[4]
    y_stride = y_strides[4]
    start = tl.full((), START, tl.int64)

    a, b = tl_load_pairs(x_ptrs + start * x_stride, x_stride, mask, P, LAYOUT, BLOCK_P)
    # Everything that is read is asked for before the first sum is waited for.
    cos1, cos2, sin1, sin2 = tl_load_tables(
        cos_ptr,
        sin_ptr,
        cos_strides,
        sin_strides,
        place,
        token_mask,
        P,
        TABLE,
        REVERSE,
        False,
        BLOCK_P,
        False,
    )
    scale_a, scale_b = None, None
    if weight_ptr is not None:
        # By every token, as the tables.
        weight_ptrs = weight_ptr + (place[3] * D if ACROSS else 0) + place[2] * 0
        weight_mask = mask if ACROSS else token_mask
        scale_a, scale_b = tl_load_pairs(weight_ptrs + start, 1, weight_mask, P, LAYOUT, BLOCK_P)

    squares = tl_total(a * a + b * b, ACROSS)
    if REST < REST_END:
        rest = tl_load_rest(x_ptrs, x_stride, mask, REST, REST_END, BLOCK_REST)
        squares += tl_total(rest * rest, ACROSS)
    # Heads and tokens beyond the end must not divide by zero.
    exists = token_mask if ACROSS else mask
    rstd, _ = tl_rstd(tl.where(exists, squares / W, 1.0), EPS, GAIN, MODE)
    a = tl_scaled(a * rstd, scale_a, OFFSET, NORMALIZED, ROUNDED)
    b = tl_scaled(b * rstd, scale_b, OFFSET, NORMALIZED, ROUNDED)
    p = a * cos1 - b * sin1
    q = b * cos2 + a * sin2
    tl_store_pairs(y_ptrs + start * y_stride, y_stride, p, q, mask, P, OUT_LAYOUT, BLOCK_P)
    if REST < REST_END:
        scale = None
        if weight_ptr is not None:
            scale = tl_load_rest(weight_ptrs, 1, weight_mask, REST, REST_END, BLOCK_REST)
        rest = tl_scaled(rest * rstd, scale, OFFSET, NORMALIZED, ROUNDED)
        tl_store_rest(y_ptrs, y_stride, rest, mask, REST, REST_END, BLOCK_REST)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def norm_rope_kernel(
    x_ptr,  # [N0, N1, N2, H, D]
    weight_ptr,  # [W] or None, contiguous
    cos_ptr,  # [N0, N1, N2, T]
    sin_ptr,  # [N0, N1, N2, T]
    y_ptr,  # [N0, N1, N2, H, D]
    other_x_ptr,  # None, or what gets the same in the same launch, walked over in its own way
    other_weight_ptr,
    other_y_ptr,
    x_strides,
    y_strides,
    cos_strides,
    sin_strides,
    N,  # N0 * N1 * N2
    N1,
    N2,
    H,
    other_x_strides,
    other_y_strides,
    other_cos_strides,
    other_sin_strides,
    OTHER_N,
    OTHER_N1,
    OTHER_N2,
    OTHER_H,
    TILES,  # of x; those of the other tensor follow
    W: tl.constexpr,
    OTHER_W: tl.constexpr,
    D: tl.constexpr,
    START: tl.constexpr,
    P: tl.constexpr,
    REST: tl.constexpr,  # first feature of those that are not rotated
    REST_END: tl.constexpr,
    LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TABLE: tl.constexpr,
    REVERSE: tl.constexpr,
    EPS: tl.constexpr,
    GAIN: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZED: tl.constexpr,  # dtype to round to before the weight, or None
    ROUNDED: tl.constexpr,  # dtype to round to before the rotation, or None
    ACROSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OTHER_BLOCK_N: tl.constexpr,
    OTHER_BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    tile = tl.program_id(0)
    if other_x_ptr is None or tile < TILES:
        tl_norm_and_rotate(
            tile, x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr,
            x_strides, y_strides, cos_strides, sin_strides, N, N1, N2, H,
            W, D, START, P, REST, REST_END, LAYOUT, OUT_LAYOUT, TABLE, REVERSE,
            EPS, GAIN, OFFSET, MODE, NORMALIZED, ROUNDED, ACROSS,
            BLOCK_N, BLOCK_H, BLOCK_P, BLOCK_REST,
        )  # fmt: skip
    else:
        tl_norm_and_rotate(
            tile - TILES, other_x_ptr, other_weight_ptr, cos_ptr, sin_ptr, other_y_ptr,
            other_x_strides, other_y_strides, other_cos_strides, other_sin_strides,
            OTHER_N, OTHER_N1, OTHER_N2, OTHER_H,
            OTHER_W, D, START, P, REST, REST_END, LAYOUT, OUT_LAYOUT, TABLE, REVERSE,
            EPS, GAIN, OFFSET, MODE, NORMALIZED, ROUNDED, ACROSS,
            OTHER_BLOCK_N, OTHER_BLOCK_H, BLOCK_P, BLOCK_REST,
        )  # fmt: skip
