"""The kernel of the backward of `norm_rope`.

As many programs are launched as the GPU runs at once: each walks over tiles and sums up its part of the weight's
gradient; the parts are added as for `rms_norm`.
"""
# Shape letters: H = heads, N = tokens (all other leading dims), D = features of a head, P = pairs, T = width of a
# table, G = programs, W = features of the weight: D, or H * D if the norm is across heads.

from __future__ import annotations

from graphfuse.kernels._norm_rope_kernel import tl_load_rest, tl_store_rest, tl_total
from graphfuse.kernels._parts import tl_let_next_begin
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
def tl_part(values, ACROSS: tl.constexpr):
    """Return what a program adds to the weight's gradient."""
    part = tl.sum(values, axis=0, keep_dims=True)
    if not ACROSS:
        part = tl.sum(part, axis=1, keep_dims=True)
    return part


@triton.jit
def tl_norm_and_rotate_backward(
    program,
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    x_grad_ptr,
    parts_ptr,
    grad_strides,
    x_strides,
    x_grad_strides,
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
    ACROSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Do what the kernel does with every tile of a program."""
    x_stride = x_strides[4]
    grad_stride = grad_strides[4]
    x_grad_stride = x_grad_strides[4]
    start = tl.full((), START, tl.int64)
    heads = tl.arange(0, BLOCK_H).to(tl.int64)[None, :, None]
    head_mask = heads < H
    # Across heads, a tile has all of them; otherwise they have one weight.
    weight_heads = heads * D if ACROSS else tl.zeros((1, 1, 1), tl.int64)
    part_mask = head_mask if ACROSS else weight_heads == 0
    if weight_ptr is not None:
        # By every token: in registers, scales stand where x does.
        every = tl.zeros((BLOCK_N, 1, 1), tl.int64)
        weight_ptrs = weight_ptr + (weight_heads + every)
        weight_mask = part_mask & (every == 0)
        scale_a, scale_b = tl_load_pairs(weight_ptrs + start, 1, weight_mask, P, LAYOUT, BLOCK_P)
        scale_a += OFFSET
        scale_b += OFFSET
        if REST < REST_END:
            scale = tl_load_rest(weight_ptrs, 1, weight_mask, REST, REST_END, BLOCK_REST) + OFFSET
    if parts_ptr is not None:
        part_a = tl.zeros((BLOCK_N, BLOCK_H, BLOCK_P), tl.float32)
        part_b = tl.zeros((BLOCK_N, BLOCK_H, BLOCK_P), tl.float32)
        if REST < REST_END:
            part_rest = tl.zeros((BLOCK_N, BLOCK_H, BLOCK_REST), tl.float32)

    num_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(H, BLOCK_H)
    for tile in tl.range(program, num_tiles, tl.num_programs(0), num_stages=STAGES):
        token_mask, mask, place = tl_place(tile, N, N1, N2, H, BLOCK_N, BLOCK_H)
        grad_ptrs = grad_ptr + tl_offsets(place, grad_strides)
        x_ptrs = x_ptr + tl_offsets(place, x_strides)
        x_grad_ptrs = x_grad_ptr + tl_offsets(place, x_grad_strides)
        p, q = tl_load_pairs(grad_ptrs + start * grad_stride, grad_stride, mask, P, OUT_LAYOUT, BLOCK_P)
        a, b = tl_load_pairs(x_ptrs + start * x_stride, x_stride, mask, P, LAYOUT, BLOCK_P)
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
        # The gradients of what was rotated.
        u = p * cos1 + q * sin2
        v = q * cos2 - p * sin1

        squares = tl_total(a * a + b * b, ACROSS)
        if REST < REST_END:
            rest = tl_load_rest(x_ptrs, x_stride, mask, REST, REST_END, BLOCK_REST)
            rest_grad = tl_load_rest(grad_ptrs, grad_stride, mask, REST, REST_END, BLOCK_REST)
            squares += tl_total(rest * rest, ACROSS)
        exists = token_mask if ACROSS else mask
        rstd, k = tl_rstd(tl.where(exists, squares / W, 1.0), EPS, GAIN, MODE)

        if parts_ptr is not None:
            part_a += u * (a * rstd)
            part_b += v * (b * rstd)
            if REST < REST_END:
                part_rest += rest_grad * (rest * rstd)
        if weight_ptr is not None:
            u = u * scale_a
            v = v * scale_b
            if REST < REST_END:
                rest_grad = rest_grad * scale
        products = tl_total(u * a + v * b, ACROSS)
        if REST < REST_END:
            products += tl_total(rest_grad * rest, ACROSS)
        slope = k * (products / W)
        u = rstd * (u - a * slope)
        v = rstd * (v - b * slope)
        tl_store_pairs(x_grad_ptrs + start * x_grad_stride, x_grad_stride, u, v, mask, P, LAYOUT, BLOCK_P)
        if REST < REST_END:
            rest_grad = rstd * (rest_grad - rest * slope)
            tl_store_rest(x_grad_ptrs, x_grad_stride, rest_grad, mask, REST, REST_END, BLOCK_REST)

    if parts_ptr is not None:
        part_ptrs = parts_ptr + program.to(tl.int64) * W + weight_heads
        part_a = tl_part(part_a, ACROSS)
        part_b = tl_part(part_b, ACROSS)
        tl_store_pairs(part_ptrs + start, 1, part_a, part_b, part_mask, P, LAYOUT, BLOCK_P)
        if REST < REST_END:
            part_rest = tl_part(part_rest, ACROSS)
            tl_store_rest(part_ptrs, 1, part_rest, part_mask, REST, REST_END, BLOCK_REST)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def norm_rope_backward_kernel(
    grad_ptr,  # [N0, N1, N2, H, D]
    x_ptr,  # [N0, N1, N2, H, D]
    weight_ptr,  # [W] or None, contiguous
    cos_ptr,  # [N0, N1, N2, T]
    sin_ptr,  # [N0, N1, N2, T]
    x_grad_ptr,  # [N0, N1, N2, H, D]
    parts_ptr,  # [G, W] or None
    other_grad_ptr,
    other_x_ptr,  # None, or what gets the same in the same launch, walked over in its own way
    other_weight_ptr,
    other_x_grad_ptr,
    other_parts_ptr,
    grad_strides,
    x_strides,
    x_grad_strides,
    cos_strides,
    sin_strides,
    N,
    N1,
    N2,
    H,
    other_grad_strides,
    other_x_strides,
    other_x_grad_strides,
    other_cos_strides,
    other_sin_strides,
    OTHER_N,
    OTHER_N1,
    OTHER_N2,
    OTHER_H,
    W: tl.constexpr,
    OTHER_W: tl.constexpr,
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
    ACROSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OTHER_BLOCK_N: tl.constexpr,
    OTHER_BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    tl_let_next_begin(OVERLAP)
    program = tl.program_id(0)
    tl_norm_and_rotate_backward(
        program, grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, x_grad_ptr, parts_ptr,
        grad_strides, x_strides, x_grad_strides, cos_strides, sin_strides, N, N1, N2, H,
        W, D, START, P, REST, REST_END, LAYOUT, OUT_LAYOUT, TABLE, REVERSE,
        EPS, GAIN, OFFSET, MODE, ACROSS, BLOCK_N, BLOCK_H, BLOCK_P, BLOCK_REST, STAGES,
    )  # fmt: skip
    if other_x_ptr is not None:
        tl_norm_and_rotate_backward(
            program, other_grad_ptr, other_x_ptr, other_weight_ptr, cos_ptr, sin_ptr, other_x_grad_ptr, other_parts_ptr,
            other_grad_strides, other_x_strides, other_x_grad_strides, other_cos_strides, other_sin_strides,
            OTHER_N, OTHER_N1, OTHER_N2, OTHER_H,
            OTHER_W, D, START, P, REST, REST_END, LAYOUT, OUT_LAYOUT, TABLE, REVERSE,
            EPS, GAIN, OFFSET, MODE, ACROSS, OTHER_BLOCK_N, OTHER_BLOCK_H, BLOCK_P, BLOCK_REST, STAGES,
        )  # fmt: skip
