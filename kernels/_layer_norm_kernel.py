"""The kernels of `layer_norm`, and how they are laid over rows and threads.

LayerNorm is RMSNorm of what is left once the mean is subtracted: helpers, the walk over rows and the forward layout
are those of `rms_norm`. So is the shape of backward: as many programs as the GPU runs at once, each of which walks
over rows and sums up its part of the gradients of weight and bias, and a second kernel that adds the parts, always in
the same order.

The variance is that of x - shift, where shift is nearly the mean: the mean as far as fp32 goes of a row that fits in
registers, and is read once; the mean of the first block of a wide row, which is read in blocks, twice. What is left of
the mean, mean(x - shift), is summed up at the same time as the squares. Those do not cancel: its square is at most
D / BLOCK_D times the variance.
"""
# Shape letters: R = rows (all leading dims), D = features of a row, P = programs of backward.

from __future__ import annotations

from functools import lru_cache

from graphfuse.kernels._parts import tl_let_next_begin
from graphfuse.kernels._rms_norm_kernel import (
    Launch,
    tl_cols,
    tl_load_scale,
    tl_normalize,
    tl_row_offsets,
    tl_rstd,
)
from graphfuse.kernels._triton import tl, triton

MAX_BLOCK_BACKWARD = 8192  # features held in registers by backward, five times; more of them spill

# Elements of a program's tile of short rows in backward: 16 to a thread.
TILE_BACKWARD = 2048
# Warps of a program of backward and programs to a multiprocessor, by block; smaller blocks have 4 warps and 4 programs.
WARPS_BACKWARD = {4096: (8, 2), 8192: (16, 1)}
# Wide rows that backward takes at once, and elements of a block of them. The parts stand in memory and change once for
# all of these rows; more rows, and they are no longer in the L2 cache when they are read again.
WIDE_ROWS = 4
WIDE_BLOCK = 8192


@triton.jit
def tl_load_row(row_ptrs, stride, cols, mask):
    """Return a block of rows in fp32; zero where masked."""
    return tl.load(row_ptrs + cols * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def tl_mean(x, D: tl.constexpr):
    """Return the sum over the features, divided by D."""
    return tl.sum(x, axis=1, keep_dims=True) / D


@triton.jit
def tl_two_means(x, y, D: tl.constexpr):
    """Return `tl_mean` of both; the warps of a program exchange their sums once."""
    return tl.split(tl.sum(tl.join(x, y), axis=1, keep_dims=True) / D)


@triton.jit
def tl_four_means(x, y, z, w, D: tl.constexpr):
    """Return `tl_mean` of all four, likewise."""
    x_z, y_w = tl_two_means(tl.join(x, z), tl.join(y, w), D)
    x, z = tl.split(x_z)
    y, w = tl.split(y_w)
    return x, y, z, w


@triton.jit
def tl_variance(mean, square):
    """Return the variance, from mean(x - shift) and mean((x - shift) ** 2)."""
    variance = square - mean * mean
    # NaN stays NaN.
    return tl.where(variance < 0.0, 0.0, variance)


@triton.jit
def tl_store_normalized(
    y_ptrs,
    x,  # centred
    rstd,
    weight_ptr,
    weight_stride,
    bias_ptr,
    bias_stride,
    cols,
    mask,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """Write round(x * rstd) * (offset + weight) + bias."""
    scale = tl_load_scale(weight_ptr, weight_stride, cols, D, OFFSET)
    y = tl_normalize(x, rstd, scale, NORMALIZED)
    if bias_ptr is not None:
        y = y + tl_load_scale(bias_ptr, bias_stride, cols, D, 0.0)
    tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def tl_scale(grad, weight_ptr, weight_stride, cols, D: tl.constexpr, OFFSET: tl.constexpr):
    """Return grad * (offset + weight)."""
    if weight_ptr is not None:
        grad = grad * tl_load_scale(weight_ptr, weight_stride, cols, D, OFFSET)
    return grad


@triton.jit
def tl_add_part(parts_ptr, grad, num_before, cols, D: tl.constexpr):
    """Add the sum over rows to the part in memory; there is none yet with no rows before."""
    if parts_ptr is not None:
        before = tl.load(parts_ptr + cols, mask=cols < D * tl.minimum(num_before, 1), other=0.0)
        tl.store(parts_ptr + cols, before + tl.sum(grad, axis=0)[None, :], mask=cols < D)


@triton.jit(do_not_specialize_on_alignment=["R", "N1", "N2"])
def layer_norm_kernel(
    x_ptr,  # [N0, N1, N2, D]
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    y_ptr,  # [N0, N1, N2, D]
    x_strides,
    y_strides,
    weight_stride,
    bias_stride,
    R,  # N0 * N1 * N2
    N1,
    N2,
    D: tl.constexpr,
    EPS: tl.constexpr,
    GAIN: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZED: tl.constexpr,  # dtype to round to before the weight, or None
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    x_ptrs = x_ptr + tl_row_offsets(rows, N1, N2, x_strides)
    y_ptrs = y_ptr + tl_row_offsets(rows, N1, N2, y_strides)

    if D <= BLOCK_D:
        cols = tl_cols(0, BLOCK_D)
        mask = (rows < R) & (cols < D)
        x = tl_load_row(x_ptrs, x_strides[3], cols, mask)
        x = tl.where(mask, x - tl_mean(x, D), 0.0)
        mean, square = tl_two_means(x, x * x, D)
        # Rows beyond R must not divide by zero.
        rstd, _ = tl_rstd(tl.where(rows < R, tl_variance(mean, square), 1.0), EPS, GAIN, MODE)
        tl_store_normalized(
            y_ptrs + cols * y_strides[3],
            x - mean,
            rstd,
            weight_ptr,
            weight_stride,
            bias_ptr,
            bias_stride,
            cols,
            mask,
            D,
            OFFSET,
            NORMALIZED,
        )
    else:
        tl.static_assert(BLOCK_R == 1)
        shift = tl_mean(tl_load_row(x_ptrs, x_strides[3], tl_cols(0, BLOCK_D), rows < R), BLOCK_D)
        sums = tl.zeros((1, BLOCK_D), tl.float32)
        squares = tl.zeros((1, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_D):
            cols = tl_cols(first, BLOCK_D)
            x = tl_load_row(x_ptrs, x_strides[3], cols, cols < D)
            x = tl.where(cols < D, x - shift, 0.0)
            sums += x
            squares += x * x
        mean, square = tl_two_means(sums, squares, D)
        rstd, _ = tl_rstd(tl_variance(mean, square), EPS, GAIN, MODE)
        mean += shift
        for first in range(0, D, BLOCK_D):
            cols = tl_cols(first, BLOCK_D)
            x = tl_load_row(x_ptrs, x_strides[3], cols, cols < D) - mean
            tl_store_normalized(
                y_ptrs + cols * y_strides[3],
                x,
                rstd,
                weight_ptr,
                weight_stride,
                bias_ptr,
                bias_stride,
                cols,
                cols < D,
                D,
                OFFSET,
                NORMALIZED,
            )


@triton.jit(do_not_specialize_on_alignment=["R", "N1", "N2"])
def layer_norm_backward_kernel(
    grad_ptr,  # [N0, N1, N2, D]
    x_ptr,  # [N0, N1, N2, D]
    weight_ptr,  # [D] or None
    x_grad_ptr,  # [N0, N1, N2, D]
    weight_parts_ptr,  # [P, D] or None
    bias_parts_ptr,  # [P, D] or None
    grad_strides,
    x_strides,
    x_grad_strides,
    weight_stride,
    R,  # N0 * N1 * N2
    N1,
    N2,
    D: tl.constexpr,
    EPS: tl.constexpr,
    GAIN: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    tl_let_next_begin(OVERLAP)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    # program * D can exceed 2**31.
    if weight_parts_ptr is not None:
        weight_parts_ptr += program.to(tl.int64) * D
    if bias_parts_ptr is not None:
        bias_parts_ptr += program.to(tl.int64) * D

    if D <= BLOCK_D:
        cols = tl_cols(0, BLOCK_D)
        if weight_ptr is not None:
            # One scale for each element of the tile: in registers it stands where x does.
            tile_cols = tl.broadcast_to(cols, (BLOCK_R, BLOCK_D))
            scale = tl_load_scale(weight_ptr, weight_stride, tile_cols, D, OFFSET)
        if weight_parts_ptr is not None:
            weight_grad = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        if bias_parts_ptr is not None:
            bias_grad = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for tile in tl.range(program, tl.cdiv(R, BLOCK_R), num_programs, num_stages=STAGES):
            rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
            mask = (rows < R) & (cols < D)
            x_ptrs = x_ptr + tl_row_offsets(rows, N1, N2, x_strides)
            grad_ptrs = grad_ptr + tl_row_offsets(rows, N1, N2, grad_strides)
            x = tl_load_row(x_ptrs, x_strides[3], cols, mask)
            grad = tl_load_row(grad_ptrs, grad_strides[3], cols, mask)

            x = tl.where(mask, x - tl_mean(x, D), 0.0)
            scaled = grad
            if weight_ptr is not None:
                scaled = grad * scale
            mean, square, grad_mean, product = tl_four_means(x, x * x, scaled, scaled * x, D)
            rstd, k = tl_rstd(tl.where(rows < R, tl_variance(mean, square), 1.0), EPS, GAIN, MODE)
            slope = k * (product - mean * grad_mean)
            x -= mean
            if weight_parts_ptr is not None:
                weight_grad += grad * (x * rstd)
            if bias_parts_ptr is not None:
                bias_grad += grad
            x_grad = rstd * (scaled - grad_mean - x * slope)

            x_grad_ptrs = x_grad_ptr + tl_row_offsets(rows, N1, N2, x_grad_strides)
            x_grad_ptrs += cols * x_grad_strides[3]
            tl.store(x_grad_ptrs, x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)
        if weight_parts_ptr is not None:
            tl.store(weight_parts_ptr + cols, tl.sum(weight_grad, axis=0)[None, :], mask=cols < D)
        if bias_parts_ptr is not None:
            tl.store(bias_parts_ptr + cols, tl.sum(bias_grad, axis=0)[None, :], mask=cols < D)
    else:
        for tile in range(program, tl.cdiv(R, BLOCK_R), num_programs):
            rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
            x_ptrs = x_ptr + tl_row_offsets(rows, N1, N2, x_strides)
            grad_ptrs = grad_ptr + tl_row_offsets(rows, N1, N2, grad_strides)
            x_grad_ptrs = x_grad_ptr + tl_row_offsets(rows, N1, N2, x_grad_strides)
            shift = tl_mean(tl_load_row(x_ptrs, x_strides[3], tl_cols(0, BLOCK_D), rows < R), BLOCK_D)
            sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            grads = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            products = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            for first in range(0, D, BLOCK_D):
                cols = tl_cols(first, BLOCK_D)
                mask = (rows < R) & (cols < D)
                x = tl_load_row(x_ptrs, x_strides[3], cols, mask)
                x = tl.where(mask, x - shift, 0.0)
                grad = tl_load_row(grad_ptrs, grad_strides[3], cols, mask)
                grad = tl_scale(grad, weight_ptr, weight_stride, cols, D, OFFSET)
                sums += x
                squares += x * x
                grads += grad
                products += grad * x
            mean, square, grad_mean, product = tl_four_means(sums, squares, grads, products, D)
            rstd, k = tl_rstd(tl.where(rows < R, tl_variance(mean, square), 1.0), EPS, GAIN, MODE)
            slope = k * (product - mean * grad_mean)
            mean += shift
            for first in range(0, D, BLOCK_D):
                cols = tl_cols(first, BLOCK_D)
                mask = (rows < R) & (cols < D)
                x = tl_load_row(x_ptrs, x_strides[3], cols, mask) - mean
                grad = tl_load_row(grad_ptrs, grad_strides[3], cols, mask)
                tl_add_part(weight_parts_ptr, grad * (x * rstd), tile - program, cols, D)
                tl_add_part(bias_parts_ptr, grad, tile - program, cols, D)
                grad = tl_scale(grad, weight_ptr, weight_stride, cols, D, OFFSET)
                x_grad = (rstd * (grad - grad_mean - x * slope)).to(x_grad_ptr.dtype.element_ty)
                tl.store(x_grad_ptrs + cols * x_grad_strides[3], x_grad, mask=mask)
            # The threads of the next rows see the parts of these.
            tl.debug_barrier()


@lru_cache(maxsize=1024)
def plan_backward(features: int, rows: int) -> Launch:
    """Choose the tile of a program, and how many programs share a multiprocessor."""
    block_d = triton.next_power_of_2(features)
    if block_d > MAX_BLOCK_BACKWARD:
        block_r = min(WIDE_ROWS, triton.next_power_of_2(rows))
        return Launch(block_r, WIDE_BLOCK // block_r, 16, 1)
    block_r = max(1, min(TILE_BACKWARD // block_d, triton.next_power_of_2(rows)))
    num_warps, per_sm = WARPS_BACKWARD.get(block_d, (4, 4))
    return Launch(block_r, block_d, num_warps, per_sm)
