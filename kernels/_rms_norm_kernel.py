"""The kernels of `rms_norm`, and how they are laid over rows and threads.

A residual may be added to rows before the norm, or to its result: `add_rms_norm`. A program holds one row, or several
short ones; rows beyond `MAX_BLOCK` are read in blocks, twice. Backward launches as many programs as the GPU runs at
once: each walks over rows and sums up its part of the weight's gradient, and a second kernel adds the parts. Always in
the same order.
"""
# Shape letters: R = rows (all leading dims), D = features of a row, P = programs of backward.

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from graphfuse.kernels._bf16 import tl_widen
from graphfuse.kernels._parts import tl_let_next_begin
from graphfuse.kernels._strides import fold
from graphfuse.kernels._triton import HAS_PTX, tl, triton

MAX_ROW_DIMS = 3  # that the kernels can tell apart
MAX_ROWS = 2**31 - 2**16  # rows are counted in int32, and a tile may run over the end
MAX_BLOCK = 16384  # features held in registers; more of them spill

# Elements of a program's tile of short rows. A thread has 32 of them forward: four 16-byte loads in
# bf16. Backward there are 16 of each of x, the gradient, weight and its gradient.
TILE = 4096
TILE_BACKWARD = 2048
# Rows of a program of backward, its warps, and programs to a multiprocessor, by block: more do not fit in registers,
# and fewer parts are sooner added up.
BACKWARD = {1024: (2, 4, 4), 2048: (2, 4, 2), 4096: (1, 8, 2), 8192: (1, 16, 1), 16384: (1, 16, 1)}
# The two reads of a wide row should meet in the L2 cache: large programs, few of them.
WIDE_BLOCK = 8192
# Backward loads the rows of so many turns of its loop, less one, ahead.
STAGES = 3


class NormOptions(NamedTuple):
    """What is fixed when a kernel is compiled."""

    eps: float
    gain: float = 1.0
    offset: float = 0.0
    mode: str = "inside"


@triton.jit
def tl_row_offsets(rows, N1, N2, strides):
    """Return where rows begin; `rows` is [BLOCK_R, 1]."""
    n2 = (rows % N2).to(tl.int64)  # offsets can exceed 2**31
    n1 = (rows // N2 % N1).to(tl.int64)
    n0 = (rows // N2 // N1).to(tl.int64)
    return n0 * strides[0] + n1 * strides[1] + n2 * strides[2]


@triton.jit
def tl_cols(first, BLOCK_D: tl.constexpr):
    """Return the features of a block, [1, BLOCK_D]."""
    return first + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]


@triton.jit
def tl_load_tile(ptr, rows, N1, N2, strides, cols, mask):
    """Return a tile in fp32, or 0 where there is no tensor."""
    if ptr is None:
        return 0.0
    else:
        ptrs = ptr + tl_row_offsets(rows, N1, N2, strides) + cols * strides[3]
        return tl_widen(tl.load(ptrs, mask=mask, other=0.0))


@triton.jit
def tl_load_scale(weight_ptr, stride, cols, D: tl.constexpr, OFFSET: tl.constexpr):
    """Return offset + weight, or None."""
    scale = None
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + cols * stride, mask=cols < D, other=0.0).to(tl.float32)
        if OFFSET != 0.0:
            scale = scale + OFFSET
    return scale


@triton.jit
def tl_rstd(mean, EPS: tl.constexpr, GAIN: tl.constexpr, MODE: tl.constexpr):
    """Return rstd, and k in d rstd / d x = -k * rstd * x / D."""
    if MODE == "inside":
        inverse = tl.rsqrt(mean + EPS)
        k = inverse * inverse
    elif MODE == "outside":
        root = tl.sqrt_rn(mean)
        inverse = 1.0 / (root + EPS)
        # A row of zeros has the gradient that torch's vector_norm has there: none.
        k = tl.where(root > 0.0, inverse / tl.where(root > 0.0, root, 1.0), 0.0)
    else:
        tl.static_assert(MODE == "clamp")
        root = tl.sqrt_rn(mean)
        # NaN stays NaN.
        inverse = 1.0 / tl.where(root < EPS, EPS, root)
        k = tl.where((root >= EPS) & (root > 0.0), inverse * inverse, 0.0)
    return GAIN * inverse, k


@triton.jit
def tl_add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def tl_sum_both(a, b):
    """Return the sums of both over the features of each row, for which the threads of a row meet once."""
    if HAS_PTX:
        return tl.reduce((a, b), 1, tl_add_both, keep_dims=True)
    else:
        # To the interpreter, any other reduction than a sum is a loop in Python.
        return tl.sum(a, axis=1, keep_dims=True), tl.sum(b, axis=1, keep_dims=True)


@triton.jit
def tl_normalize(
    x,
    rstd,
    scale,  # or None
    NORMALIZED: tl.constexpr,
):
    """Return y before its rounding."""
    y = x * rstd
    if NORMALIZED is not None:
        y = y.to(NORMALIZED).to(tl.float32)
    if scale is not None:
        y = y * scale
    return y


@triton.jit
def tl_load_sum(x_ptrs, residual_ptrs, total_ptrs, mask):
    """Return x, or where there is a total, the rounded sum with the residual, which is stored."""
    x = tl_widen(tl.load(x_ptrs, mask=mask, other=0.0))
    if total_ptrs is not None:
        total = x + tl_widen(tl.load(residual_ptrs, mask=mask, other=0.0))
        total = total.to(total_ptrs.dtype.element_ty)
        tl.store(total_ptrs, total, mask=mask)
        x = tl_widen(total)
    return x


@triton.jit
def tl_store_sum(y_ptrs, y, residual_ptrs, mask, ROUNDED: tl.constexpr):
    """Store y, or where there is a residual, its sum with the rounded y."""
    if residual_ptrs is not None:
        if ROUNDED is not None:
            y = tl_widen(y.to(ROUNDED))
        y += tl_widen(tl.load(residual_ptrs, mask=mask, other=0.0))
    tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["R", "N1", "N2"])
def rms_norm_kernel(
    x_ptr,  # [N0, N1, N2, D]
    weight_ptr,  # [D] or None
    residual_ptr,  # [N0, N1, N2, D] or None
    total_ptr,  # [N0, N1, N2, D] or None: then the residual is added to the norm's result
    y_ptr,  # [N0, N1, N2, D]
    x_strides,
    residual_strides,
    total_strides,
    y_strides,
    weight_stride,
    R,  # N0 * N1 * N2
    N1,
    N2,
    D: tl.constexpr,
    EPS: tl.constexpr,
    GAIN: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZED: tl.constexpr,  # dtype to round to before the weight, or None
    ROUNDED: tl.constexpr,  # dtype to round to before the residual, or None
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    x_ptrs = x_ptr + tl_row_offsets(rows, N1, N2, x_strides)
    y_ptrs = y_ptr + tl_row_offsets(rows, N1, N2, y_strides)
    cols = tl_cols(0, BLOCK_D)
    sum_ptrs, total_ptrs, after_ptrs = None, None, None
    if total_ptr is not None:
        sum_ptrs = residual_ptr + tl_row_offsets(rows, N1, N2, residual_strides) + cols * residual_strides[3]
        total_ptrs = total_ptr + tl_row_offsets(rows, N1, N2, total_strides) + cols * total_strides[3]
    elif residual_ptr is not None:
        after_ptrs = residual_ptr + tl_row_offsets(rows, N1, N2, residual_strides) + cols * residual_strides[3]
    x_ptrs += cols * x_strides[3]
    y_ptrs += cols * y_strides[3]

    if D <= BLOCK_D:
        mask = (rows < R) & (cols < D)
        x = tl_load_sum(x_ptrs, sum_ptrs, total_ptrs, mask)
        # Asked for before the sum is waited for.
        scale = tl_load_scale(weight_ptr, weight_stride, cols, D, OFFSET)
        squares = tl.sum(x * x, axis=1, keep_dims=True)
        # Rows beyond R must not divide by zero.
        rstd, _ = tl_rstd(tl.where(rows < R, squares / D, 1.0), EPS, GAIN, MODE)
        y = tl_normalize(x, rstd, scale, NORMALIZED)
        tl_store_sum(y_ptrs, y, after_ptrs, mask, ROUNDED)
    else:
        tl.static_assert(BLOCK_R == 1)
        squares = tl.zeros((1, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_D):
            mask = first + cols < D
            at = tl.full((), 0, tl.int64) + first
            if total_ptr is not None:
                x = tl_load_sum(
                    x_ptrs + at * x_strides[3],
                    sum_ptrs + at * residual_strides[3],
                    total_ptrs + at * total_strides[3],
                    mask,
                )
            else:
                x = tl_load_sum(x_ptrs + at * x_strides[3], None, None, mask)
            squares += x * x
        squares = tl.sum(squares, axis=1, keep_dims=True)
        rstd, _ = tl_rstd(squares / D, EPS, GAIN, MODE)
        for first in range(0, D, BLOCK_D):
            at = tl.full((), 0, tl.int64) + first
            mask = at + cols < D
            if total_ptr is not None:
                # A thread reads what it has written itself.
                x = tl_widen(tl.load(total_ptrs + at * total_strides[3], mask=mask, other=0.0))
            else:
                x = tl_widen(tl.load(x_ptrs + at * x_strides[3], mask=mask, other=0.0))
            scale = tl_load_scale(weight_ptr, weight_stride, first + cols, D, OFFSET)
            y = tl_normalize(x, rstd, scale, NORMALIZED)
            if after_ptrs is not None:
                tl_store_sum(y_ptrs + at * y_strides[3], y, after_ptrs + at * residual_strides[3], mask, ROUNDED)
            else:
                tl_store_sum(y_ptrs + at * y_strides[3], y, None, mask, ROUNDED)


@triton.jit(do_not_specialize_on_alignment=["R", "N1", "N2"])
def rms_norm_backward_kernel(
    grad_ptr,  # [N0, N1, N2, D]
    x_ptr,  # [N0, N1, N2, D]
    weight_ptr,  # [D] or None
    add_ptr,  # [N0, N1, N2, D], what is added to the gradient of x, or None
    x_grad_ptr,  # [N0, N1, N2, D]
    parts_ptr,  # [P, D] or None
    grad_strides,
    x_strides,
    add_strides,
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
    part_ptrs = parts_ptr
    if parts_ptr is not None:
        part_ptrs = parts_ptr + program.to(tl.int64) * D

    if D <= BLOCK_D:
        cols = tl_cols(0, BLOCK_D)
        if weight_ptr is not None:
            # One scale for each element of the tile: in registers it stands where x does.
            tile_cols = tl.broadcast_to(cols, (BLOCK_R, BLOCK_D))
            scale = tl_load_scale(weight_ptr, weight_stride, tile_cols, D, OFFSET)
        if parts_ptr is not None:
            weight_grad = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for tile in tl.range(program, tl.cdiv(R, BLOCK_R), num_programs, num_stages=STAGES):
            rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
            mask = (rows < R) & (cols < D)
            x = tl_load_tile(x_ptr, rows, N1, N2, x_strides, cols, mask)
            grad = tl_load_tile(grad_ptr, rows, N1, N2, grad_strides, cols, mask)
            add = tl_load_tile(add_ptr, rows, N1, N2, add_strides, cols, mask)

            scaled = grad
            if weight_ptr is not None:
                scaled = grad * scale
            squares, products = tl_sum_both(x * x, scaled * x)
            rstd, k = tl_rstd(tl.where(rows < R, squares / D, 1.0), EPS, GAIN, MODE)
            if parts_ptr is not None:
                weight_grad += grad * (x * rstd)
            x_grad = rstd * (scaled - x * (k * (products / D))) + add

            x_grad_ptrs = x_grad_ptr + tl_row_offsets(rows, N1, N2, x_grad_strides)
            x_grad_ptrs += cols * x_grad_strides[3]
            tl.store(x_grad_ptrs, x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)
        if parts_ptr is not None:
            tl.store(part_ptrs + cols, tl.sum(weight_grad, axis=0)[None, :], mask=cols < D)
    else:
        tl.static_assert(BLOCK_R == 1)
        for row in range(program, R, num_programs):
            rows = row + tl.arange(0, 1)[:, None]
            x_grad_ptrs = x_grad_ptr + tl_row_offsets(rows, N1, N2, x_grad_strides)
            squares = tl.zeros((1, BLOCK_D), tl.float32)
            products = tl.zeros((1, BLOCK_D), tl.float32)
            for first in range(0, D, BLOCK_D):
                cols = tl_cols(first, BLOCK_D)
                x = tl_load_tile(x_ptr, rows, N1, N2, x_strides, cols, cols < D)
                grad = tl_load_tile(grad_ptr, rows, N1, N2, grad_strides, cols, cols < D)
                if weight_ptr is not None:
                    grad = grad * tl_load_scale(weight_ptr, weight_stride, cols, D, OFFSET)
                squares += x * x
                products += grad * x
            mean = tl.sum(squares, axis=1, keep_dims=True) / D
            rstd, k = tl_rstd(mean, EPS, GAIN, MODE)
            slope = k * (tl.sum(products, axis=1, keep_dims=True) / D)
            for first in range(0, D, BLOCK_D):
                cols = tl_cols(first, BLOCK_D)
                x = tl_load_tile(x_ptr, rows, N1, N2, x_strides, cols, cols < D)
                grad = tl_load_tile(grad_ptr, rows, N1, N2, grad_strides, cols, cols < D)
                if parts_ptr is not None:
                    # The part stands in memory; the program's first row finds none there yet.
                    has_part = (cols < D) & (rows != program)
                    part = tl.load(part_ptrs + cols, mask=has_part, other=0.0)
                    tl.store(part_ptrs + cols, part + grad * (x * rstd), mask=cols < D)
                if weight_ptr is not None:
                    grad = grad * tl_load_scale(weight_ptr, weight_stride, cols, D, OFFSET)
                add = tl_load_tile(add_ptr, rows, N1, N2, add_strides, cols, cols < D)
                x_grad = (rstd * (grad - x * slope) + add).to(x_grad_ptr.dtype.element_ty)
                tl.store(x_grad_ptrs + cols * x_grad_strides[3], x_grad, mask=cols < D)
            # The next row's threads see this row's part.
            tl.debug_barrier()


class Walk(NamedTuple):
    """Sizes and strides as the kernels take them."""

    rows: int
    n1: int
    n2: int
    strides: tuple[tuple[int, ...], ...]  # of each tensor: N0, N1, N2, D


@lru_cache(maxsize=1024)
def plan_walk(shape: tuple[int, ...], *strides: tuple[int, ...]) -> Walk | None:
    """Merge the leading dims of all tensors; None if too many are left."""
    # In the order of the last tensor, an output, which is dense.
    dims = fold(shape[:-1], *(stride[:-1] for stride in reversed(strides)))
    if len(dims) > MAX_ROW_DIMS:
        return None
    # Sizes of 1 cost nothing at the end: no division by them is left in the kernel.
    dims += [(1, (0,) * len(strides))] * (MAX_ROW_DIMS - len(dims))
    (n0, _), (n1, _), (n2, _) = dims
    by_tensor = zip(*(reversed(steps) for _, steps in dims), strict=True)
    merged = ((*steps, stride[-1]) for steps, stride in zip(by_tensor, strides, strict=True))
    return Walk(n0 * n1 * n2, n1, n2, tuple(merged))


class Launch(NamedTuple):
    """How a row is laid out over threads."""

    block_r: int
    block_d: int
    num_warps: int
    per_sm: int = 0  # programs that run at once


@lru_cache(maxsize=1024)
def plan_forward(features: int, rows: int) -> Launch:
    """Choose the tile of a program."""
    block_d = triton.next_power_of_2(features)
    if block_d > MAX_BLOCK:
        return Launch(1, WIDE_BLOCK, 16)
    block_r = max(1, min(TILE // block_d, triton.next_power_of_2(rows)))
    return Launch(block_r, block_d, max(4, block_d // 1024))


@lru_cache(maxsize=1024)
def plan_backward(features: int, rows: int) -> Launch:
    """Choose the tile of a program, and how many programs share a multiprocessor."""
    block_d = triton.next_power_of_2(features)
    if block_d > MAX_BLOCK:
        return Launch(1, WIDE_BLOCK, 32, 1)
    block_r, num_warps, per_sm = BACKWARD.get(block_d, (TILE_BACKWARD // block_d, 4, 6))
    return Launch(max(1, min(block_r, triton.next_power_of_2(rows))), block_d, num_warps, per_sm)
