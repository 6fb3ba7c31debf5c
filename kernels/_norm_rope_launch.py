"""How the kernels of `norm_rope` are laid over heads, tokens and threads, and their launches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._norm import add_parts_
from graphfuse.kernels._norm_rope_kernel import norm_rope_backward_kernel, norm_rope_kernel
from graphfuse.kernels._rms_norm_kernel import NormOptions, num_sms
from graphfuse.kernels._rope_kernel import Rotation, Table, heads_per_program, plan_walk
from graphfuse.kernels._triton import launch, tl, triton

# Elements of a program at most, 32 to a thread. Forward it has one token, whose entries of the tables all its heads
# share; backward may have several, and loads the tables as it loads x, by every head.
TILE = 4096
FEW = 1024  # elements of a program forward, below which it has several tokens after all
MAX_ACROSS = 8192  # features of all heads together that a program holds
PER_SM = 2  # programs of backward that a multiprocessor runs at once
STAGES = 3  # backward loads the next tiles but one ahead


class Launch(NamedTuple):
    """What follows from sizes, strides and options alone: computed once, since Python is slow."""

    tiles: int
    args: tuple[int | tuple[int, ...], ...]
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def plan_launch(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],  # of the tensors before the tables, as the kernel takes them, a dense last
    cos: Table,
    sin: Table,
    rotation: Rotation,
    options: NormOptions,
    across: int,
    backward: bool,
) -> Launch | None:
    """Lay heads and tokens out over programs; None if no walk or no program can hold them."""
    head_dim = None if across < 0 else across
    walk = plan_walk(shape, strides[::-1], cos, sin, head_dim)
    if walk is None:
        return None
    features = shape[-1]
    pairs = rotation.features(cos[0][-1]) // 2
    start, stop = rotation.start, rotation.start + 2 * pairs
    if start > 0 and stop < features:
        return None
    rest, rest_end = (0, start) if start > 0 else (stop, features)
    block_p, block_rest = _power_of_two_above(pairs), _power_of_two_above(rest_end - rest)
    width = 2 * block_p + (block_rest if rest < rest_end else 0)
    if head_dim is None:
        block_h = heads_per_program(walk.heads, _power_of_two_below(TILE // width))
    else:
        if not fits_across(walk.heads, features, 2 * pairs):
            return None
        block_h = _power_of_two_above(walk.heads)
    room = TILE if backward else FEW
    block_n = min(triton.next_power_of_2(walk.tokens), _power_of_two_below(room // (width * block_h)))
    size = block_n * block_h * width
    num_warps = _power_of_two_below(max(size // 1024, min(4, size // 512)))
    return Launch(
        tiles=triton.cdiv(walk.tokens, block_n) * triton.cdiv(walk.heads, block_h),
        args=(*walk.strides[::-1], *walk.tables, walk.tokens, *walk.inner, walk.heads),
        constants={
            "W": features if head_dim is None else features * walk.heads,
            "D": features,
            "START": start,
            "P": pairs,
            "REST": rest,
            "REST_END": rest_end,
            "LAYOUT": rotation.layout,
            "OUT_LAYOUT": rotation.out_layout,
            "TABLE": rotation.table,
            "REVERSE": rotation.reverse,
            "EPS": options.eps,
            "GAIN": options.gain,
            "OFFSET": options.offset,
            "MODE": options.mode,
            "ACROSS": head_dim is not None,
            "BLOCK_N": block_n,
            "BLOCK_H": block_h,
            "BLOCK_P": block_p,
            "BLOCK_REST": block_rest,
            "SPREAD": backward,
            "num_warps": min(num_warps, 16),
        },
    )


def fits_across(heads: int, features: int, rotated: int) -> bool:
    """Return whether a program can hold all heads of a token."""
    rest = features - rotated
    width = 2 * _power_of_two_above(rotated // 2) + (_power_of_two_above(rest) if rest else 0)
    return _power_of_two_above(heads) * width <= MAX_ACROSS


def _power_of_two_above(number: int) -> int:
    """Return the smallest power of two that is not below a number, or 1."""
    return 1 << max(0, number - 1).bit_length()


def _power_of_two_below(number: int) -> int:
    """Return the largest power of two that is not above a number, or 1."""
    return 1 << (max(1, number).bit_length() - 1)


def _rounding(dtype: torch.dtype) -> Any:
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype)


def norm_rope_triton_(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    y: Tensor,
    options: NormOptions,
    dtypes: tuple[torch.dtype, torch.dtype],
    rotation: Rotation,
    across: int,
) -> bool:
    """Launch the kernel, which writes `y`; False if it cannot walk over such strides."""
    tables = ((cos.shape, cos.stride()), (sin.shape, sin.stride()))
    strides = (x.stride(), y.stride())
    plan = plan_launch(x.shape, strides, *tables, rotation, options, across, False)
    if plan is None:
        return False
    launch(
        norm_rope_kernel,
        (plan.tiles,),
        x,
        weight,
        cos,
        sin,
        y,
        *plan.args,
        **plan.constants,
        NORMALIZED=_rounding(dtypes[0]),
        ROUNDED=_rounding(dtypes[1]),
    )
    return True


def norm_rope_backward_triton_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    x_grad: Tensor,
    weight_grad: Tensor | None,
    options: NormOptions,
    rotation: Rotation,
    across: int,
) -> bool:
    """Launch the kernels, which write `x_grad`, and `weight_grad` unless that is None; False as above."""
    tables = ((cos.shape, cos.stride()), (sin.shape, sin.stride()))
    strides = (grad.stride(), x.stride(), x_grad.stride())
    plan = plan_launch(x.shape, strides, *tables, rotation, options, across, True)
    if plan is None:
        return False
    num_programs = min(plan.tiles, PER_SM * num_sms(x.device))
    width = plan.constants["W"]
    parts = None if weight_grad is None else x.new_empty(num_programs, width, dtype=torch.float32)
    launch(
        norm_rope_backward_kernel,
        (num_programs,),
        grad,
        x,
        weight,
        cos,
        sin,
        x_grad,
        parts,
        *plan.args,
        **plan.constants,
        STAGES=STAGES,
    )
    add_parts_(parts, weight_grad)
    return True
