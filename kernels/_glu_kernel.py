"""The kernels of `glu`, and how they walk over strided tensors.

Tensors are matrices to them, and where all of them are dense and of one layout, one long row.
"""
# Shape letters: R = rows, C = columns, of what is left when dims are merged.

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._ahead import address
from graphfuse.kernels._softmax_device import tl_tanh
from graphfuse.kernels._strides import fold
from graphfuse.kernels._triton import launch, tl, triton

# Elements of a program. A thread has 8 of each tensor: one 16-byte access in bf16, two in fp32.
TILE = 1024
NUM_WARPS = 4


class GluOptions(NamedTuple):
    """What is fixed when a kernel is compiled."""

    activation: str
    alpha: float = 1.0
    gate_max: float = math.inf
    up_limit: float = math.inf
    up_offset: float = 0.0


@triton.jit
def tl_sigmoid(z):
    """Return sigmoid(z) and sigmoid(-z); nothing cancels or overflows."""
    decay = tl.exp2(tl.abs(z) * -1.4426950408889634)
    large = 1.0 / (1.0 + decay)
    small = decay * large
    return tl.where(z < 0.0, small, large), tl.where(z < 0.0, large, small)


@triton.jit
def tl_activate(z, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Return act(z) and act'(z), of which the compiler drops what is not used."""
    if ACTIVATION == "swish":
        s, rest = tl_sigmoid(z * ALPHA)
        value = z * s
        slope = s + ALPHA * value * rest
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        value = z * cdf
        slope = cdf + z * (0.3989422804014327 * tl.exp2(z * z * -0.7213475204444817))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), with 2u = sqrt(8 / pi) * (z + 0.044715 * z ** 3)
        s, rest = tl_sigmoid(1.5957691216057308 * (z + 0.044715 * (z * z * z)))
        value = z * s
        slope = s + value * rest * (1.5957691216057308 + 0.2140644488 * (z * z))
    elif ACTIVATION == "relu":
        value = tl.where(z <= 0.0, 0.0, z)
        slope = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        root = tl.where(z <= 0.0, 0.0, z)
        value = root * root
        slope = 2.0 * root
    elif ACTIVATION == "sigmoid":
        value, rest = tl_sigmoid(z)
        slope = value * rest
    elif ACTIVATION == "tanh":
        value = tl_tanh(z)
        s, rest = tl_sigmoid(2.0 * z)
        slope = 4.0 * s * rest
    else:
        tl.static_assert(ACTIVATION == "identity")
        value = z
        slope = tl.full(z.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def tl_place(
    R,
    C,
    num_col_blocks,
    WIDTH: tl.constexpr,  # columns in memory for one of C
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return the rows, the columns and the mask of this program's tile."""
    # R * C can exceed 2**31.
    row = (tl.program_id(0) // num_col_blocks).to(tl.int64) * BLOCK_R
    col = (tl.program_id(0) % num_col_blocks).to(tl.int64) * (WIDTH * BLOCK_C)
    rows = row + tl.arange(0, BLOCK_R)[:, None]
    cols = col + tl.arange(0, WIDTH * BLOCK_C)[None, :]
    return rows, cols, (rows < R) & (cols < tl.full((), WIDTH, tl.int64) * C)


@triton.jit
def tl_load_inputs(
    gate_ptr,
    up_ptr,
    gate_strides,
    up_strides,
    R,
    C,
    num_col_blocks,
    ARE_PAIRED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return this program's tile of gate and up in fp32."""
    if ARE_PAIRED:
        # gate and up alternate: one contiguous load of both, told apart in registers.
        rows, cols, mask = tl_place(R, C, num_col_blocks, 2, BLOCK_R, BLOCK_C)
        both = tl.load(gate_ptr + rows * gate_strides[0] + cols, mask=mask, other=0.0)
        gate, up = tl.split(tl.reshape(both, (BLOCK_R, BLOCK_C, 2)))
    else:
        rows, cols, mask = tl_place(R, C, num_col_blocks, 1, BLOCK_R, BLOCK_C)
        gate_ptrs = gate_ptr + rows * gate_strides[0] + cols * gate_strides[1]
        up_ptrs = up_ptr + rows * up_strides[0] + cols * up_strides[1]
        gate = tl.load(gate_ptrs, mask=mask, other=0.0)
        up = tl.load(up_ptrs, mask=mask, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def tl_clamp(gate, up, GATE_MAX: tl.constexpr, UP_LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr):
    """Return z and v. NaN stays NaN."""
    if GATE_MAX is not None:
        gate = tl.where(gate > GATE_MAX, GATE_MAX, gate)
    if UP_LIMIT is not None:
        up = tl.where(up > UP_LIMIT, UP_LIMIT, up)
        up = tl.where(up < -UP_LIMIT, -UP_LIMIT, up)
    return gate, up + UP_OFFSET


@triton.jit(do_not_specialize_on_alignment=["R", "num_col_blocks"])
def _glu_kernel(
    gate_ptr,  # [R, C]
    up_ptr,  # [R, C]
    y_ptr,  # [R, C]
    gate_strides,
    up_strides,
    y_strides,
    R,
    C,
    num_col_blocks,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_MAX: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    ARE_PAIRED: tl.constexpr,  # up[r, c] lies behind gate[r, c]
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, cols, mask = tl_place(R, C, num_col_blocks, 1, BLOCK_R, BLOCK_C)
    gate, up = tl_load_inputs(
        gate_ptr,
        up_ptr,
        gate_strides,
        up_strides,
        R,
        C,
        num_col_blocks,
        ARE_PAIRED,
        BLOCK_R,
        BLOCK_C,
    )
    z, v = tl_clamp(gate, up, GATE_MAX, UP_LIMIT, UP_OFFSET)
    value, _ = tl_activate(z, ACTIVATION, ALPHA)
    y = (value * v).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows * y_strides[0] + cols * y_strides[1], y, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["R", "num_col_blocks"])
def _glu_backward_kernel(
    gate_ptr,  # [R, C]
    up_ptr,  # [R, C]
    grad_ptr,  # [R, C]
    up_grad_ptr,  # [R, C]
    y_ptr,  # [R, C], what forward returned, or None
    gate_grad_ptr,  # [R, C]
    gate_strides,
    up_strides,
    grad_strides,
    up_grad_strides,
    y_strides,
    gate_grad_strides,
    R,
    C,
    num_col_blocks,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_MAX: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    ARE_PAIRED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IN_PLACE: tl.constexpr,  # gradients are written over gate and up
):
    rows, cols, mask = tl_place(R, C, num_col_blocks, 1, BLOCK_R, BLOCK_C)
    grad_ptrs = grad_ptr + rows * grad_strides[0] + cols * grad_strides[1]
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    gate, up = tl_load_inputs(
        gate_ptr,
        up_ptr,
        gate_strides,
        up_strides,
        R,
        C,
        num_col_blocks,
        ARE_PAIRED,
        BLOCK_R,
        BLOCK_C,
    )

    z, v = tl_clamp(gate, up, GATE_MAX, UP_LIMIT, UP_OFFSET)
    value, slope = tl_activate(z, ACTIVATION, ALPHA)
    gate_grad = grad * v * slope
    up_grad = grad * value
    if GATE_MAX is not None:
        gate_grad = tl.where(gate <= GATE_MAX, gate_grad, 0.0)
    if UP_LIMIT is not None:
        up_grad = tl.where(tl.abs(up) <= UP_LIMIT, up_grad, 0.0)
    if IN_PLACE:
        tl.debug_barrier()  # every read of this tile comes before any write to it
    if y_ptr is not None:
        y = (value * v).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + rows * y_strides[0] + cols * y_strides[1], y, mask=mask)

    gate_grad_ptrs = gate_grad_ptr + rows * gate_grad_strides[0] + cols * gate_grad_strides[1]
    up_grad_ptrs = up_grad_ptr + rows * up_grad_strides[0] + cols * up_grad_strides[1]
    tl.store(gate_grad_ptrs, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(up_grad_ptrs, up_grad.to(up_grad_ptr.dtype.element_ty), mask=mask)


class Launch(NamedTuple):
    """What follows from sizes, strides and options alone: computed once, since Python is slow."""

    grid: tuple[int]
    args: tuple[int | tuple[int, int], ...]
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def plan_launch(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],  # of gate, up, ..., and a dense output
    options: GluOptions,
    is_adjacent: bool,  # up begins one element after gate
    tile: int,
) -> Launch | None:
    """Merge the dims of all tensors into rows and columns; None if their strides forbid it."""
    # In the order of the output.
    dims = fold(shape, *reversed(strides))
    if len(dims) > 2:
        return None
    dims = [(1, (0,) * len(strides))] * (2 - len(dims)) + dims
    (rows, row_strides), (cols, col_strides) = dims
    walks = tuple(zip(reversed(row_strides), reversed(col_strides), strict=True))
    block_c = min(tile, triton.next_power_of_2(cols))
    block_r = min(tile // block_c, triton.next_power_of_2(rows))
    num_col_blocks = triton.cdiv(cols, block_c)
    return Launch(
        grid=(triton.cdiv(rows, block_r) * num_col_blocks,),
        args=(*walks, rows, cols, num_col_blocks),
        # The kernel knows silu as a case of swish, and only bounds that bind.
        constants={
            "ACTIVATION": "swish" if options.activation == "silu" else options.activation,
            "ALPHA": float(options.alpha) if options.activation == "swish" else 1.0,
            "GATE_MAX": None if options.gate_max == math.inf else float(options.gate_max),
            "UP_LIMIT": None if options.up_limit == math.inf else float(options.up_limit),
            "UP_OFFSET": float(options.up_offset),
            "ARE_PAIRED": is_adjacent and walks[0] == walks[1] and walks[0][1] == 2,
            "BLOCK_R": block_r,
            "BLOCK_C": block_c,
            "num_warps": NUM_WARPS,
        },
    )


def glu_triton_(gate: Tensor, up: Tensor, y: Tensor, options: GluOptions) -> None:
    """Launch the kernel, which writes `y`; arguments as in the reference."""
    if not _launch(_glu_kernel, (gate, up, y), options):
        _launch(_glu_kernel, (*_copies((gate, up), y), y), options)


def glu_backward_triton_(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_grad: Tensor,
    up_grad: Tensor,
    options: GluOptions,
    y: Tensor | None = None,
) -> None:
    """Launch the kernel, which writes `gate_grad` and `up_grad`, maybe over gate and up, and `y`, forward's result."""
    in_place = address(gate_grad) == address(gate)
    if _launch(_glu_backward_kernel, (gate, up, grad, up_grad, y, gate_grad), options, {"IN_PLACE": in_place}):
        return
    gate, up, grad = _copies((gate, up, grad), gate_grad)
    outputs = [None if out is None else torch.empty_like(gate, dtype=out.dtype) for out in (up_grad, y, gate_grad)]
    _launch(_glu_backward_kernel, (gate, up, grad, *outputs), options, {"IN_PLACE": False})
    for out, found in zip((up_grad, y, gate_grad), outputs, strict=True):
        if out is not None and found is not None:
            out.copy_(found)


def _copies(tensors: tuple[Tensor, ...], like: Tensor) -> list[Tensor]:
    """Return the tensors with the strides of a dense one."""
    return [torch.empty_like(like, dtype=tensor.dtype).copy_(tensor) for tensor in tensors]


def _launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    options: GluOptions,
    more: Mapping[str, bool] = MappingProxyType({}),
) -> bool:
    """Launch over gate, up, ..., and a dense output; False if they are no matrices."""
    gate, up = tensors[:2]
    assert gate is not None, "gate must be given"
    assert up is not None, "up must be given"
    assert all(tensor is None or tensor.shape == gate.shape for tensor in tensors), "tensors must share a shape"
    if gate.numel() == 0:
        return True
    is_adjacent = gate.dtype == up.dtype and address(up) - address(gate) == gate.element_size()
    strides = tuple(gate.stride() if tensor is None else tensor.stride() for tensor in tensors)
    plan = plan_launch(gate.shape, strides, options, is_adjacent, TILE)
    if plan is None:
        return False
    launch(kernel, plan.grid, *tensors, *plan.args, **plan.constants, **more)
    return True
