"""How the kernels of `norm_rope` are laid over heads, tokens and threads, and their launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._norm_rope_backward_kernel import norm_rope_backward_kernel
from graphfuse.kernels._norm_rope_kernel import norm_rope_kernel
from graphfuse.kernels._parts import add_parts_, overlap
from graphfuse.kernels._rms_norm_kernel import NormOptions
from graphfuse.kernels._rope_launch import Rotation, Table, heads_per_program, plan_walk
from graphfuse.kernels._triton import launch, num_sms, tl, triton

TILE = 4096  # elements of a program at most, 32 to a thread
# Heads of a program, at most, and as many tokens as there is room for. A thread has the same features of all of these
# heads, so that their entries of the tables, and of the weight, are in its registers once.
HEADS = 2
MAX_ACROSS = 8192  # features of all heads together that a program holds
# Programs of backward that a multiprocessor has registers for, and of what takes more: two tensors, or all heads.
PER_SM, PER_SM_LARGE = 3, 2
STAGES = 3  # backward loads the next tiles but one ahead


class Launch(NamedTuple):
    """What follows from sizes, strides and options alone: computed once, since Python is slow."""

    tiles: tuple[int, ...]  # of each tensor
    args: tuple[int | tuple[int, ...] | None, ...]
    constants: dict[str, Any]


Tensors = tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]  # shape, strides as the kernel takes them


@lru_cache(maxsize=4096)
def plan_launch(
    tensors: Tensors,  # one, or two with as many features; of the strides those of a dense one last
    cos: Table,
    sin: Table,
    rotation: Rotation,
    options: NormOptions,
    across: int,
    backward: bool,
) -> Launch | None:
    """Lay heads and tokens out over programs; None if no walk or no program can hold them."""
    features = tensors[0][0][-1]
    pairs = rotation.features(cos[0][-1]) // 2
    start, stop = rotation.start, rotation.start + 2 * pairs
    if start > 0 and stop < features:
        return None
    rest, rest_end = (0, start) if start > 0 else (stop, features)
    block_p, block_rest = _power_of_two_above(pairs), _power_of_two_above(rest_end - rest)
    width = 2 * block_p + (block_rest if rest < rest_end else 0)
    walks, blocks_h = [], []
    for shape, strides in tensors:
        walk = plan_walk(shape, strides[::-1], cos, sin, None if across < 0 else across)
        if walk is None:
            return None
        if across < 0:
            block_h = heads_per_program(walk.heads, min(HEADS, _power_of_two_below(TILE // width)))
        elif fits_across(walk.heads, features, 2 * pairs):
            block_h = _power_of_two_above(walk.heads)
        else:
            return None
        walks.append(walk)
        blocks_h.append(block_h)
    args: list[Any] = []
    blocks, tiles = [], []
    for walk, block_h in zip(walks, blocks_h, strict=True):
        block_n = min(triton.next_power_of_2(walk.tokens), _power_of_two_below(TILE // (width * block_h)))
        blocks.append((block_n, block_h))
        tiles.append(triton.cdiv(walk.tokens, block_n) * triton.cdiv(walk.heads, block_h))
        args += (*walk.strides[::-1], *walk.tables, walk.tokens, *walk.inner, walk.heads)
    is_pair = len(tensors) > 1
    size = width * max(block_n * block_h for block_n, block_h in blocks)
    num_warps = _power_of_two_below(max(size // 1024, min(4, size // 512)))
    widths = [features if across < 0 else features * walk.heads for walk in walks]
    return Launch(
        tiles=tuple(tiles),
        args=tuple(args) if is_pair else (*args, *[None] * len(args)),
        constants={
            "W": widths[0],
            "OTHER_W": widths[-1] if is_pair else None,
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
            "ACROSS": across >= 0,
            "BLOCK_N": blocks[0][0],
            "BLOCK_H": blocks[0][1],
            "OTHER_BLOCK_N": blocks[-1][0] if is_pair else None,
            "OTHER_BLOCK_H": blocks[-1][1] if is_pair else None,
            "BLOCK_P": block_p,
            "BLOCK_REST": block_rest,
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


class Forward(NamedTuple):
    """What `norm_rope` reads and writes for one tensor."""

    x: Tensor
    weight: Tensor | None
    y: Tensor

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        return self.x.stride(), self.y.stride()


class Backward(NamedTuple):
    """What its backward reads and writes for one tensor."""

    grad: Tensor
    x: Tensor
    weight: Tensor | None
    x_grad: Tensor
    weight_grad: Tensor | None  # None if it is not wanted

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        return self.grad.stride(), self.x.stride(), self.x_grad.stride()


def norm_rope_triton_(
    tensors: Sequence[Forward],
    cos: Tensor,
    sin: Tensor,
    options: NormOptions,
    dtypes: tuple[torch.dtype, torch.dtype],
    rotation: Rotation,
    across: int,
) -> bool:
    """Launch the kernel for one tensor, or for two with as many features; False if it cannot walk over such strides."""
    shapes = tuple((each.x.shape, each.strides) for each in tensors)
    tables = ((cos.shape, cos.stride()), (sin.shape, sin.stride()))
    plan = plan_launch(shapes, *tables, rotation, options, across, False)
    if plan is None:
        return False
    (x, weight, y), *others = tensors
    launch(
        norm_rope_kernel,
        (sum(plan.tiles),),
        x,
        weight,
        cos,
        sin,
        y,
        *(others[0] if others else (None, None, None)),
        *plan.args,
        plan.tiles[0] if others else None,
        **plan.constants,
        NORMALIZED=_rounding(dtypes[0]),
        ROUNDED=_rounding(dtypes[1]),
    )
    return True


def norm_rope_backward_triton_(
    tensors: Sequence[Backward],
    cos: Tensor,
    sin: Tensor,
    options: NormOptions,
    rotation: Rotation,
    across: int,
) -> bool:
    """Launch the kernels for one tensor or two, as above."""
    shapes = tuple((each.x.shape, each.strides) for each in tensors)
    tables = ((cos.shape, cos.stride()), (sin.shape, sin.stride()))
    plan = plan_launch(shapes, *tables, rotation, options, across, True)
    if plan is None:
        return False
    per_sm = PER_SM if len(tensors) == 1 and across < 0 else PER_SM_LARGE
    num_programs = min(max(plan.tiles), per_sm * num_sms(cos.device))
    widths = (plan.constants["W"], plan.constants["OTHER_W"])
    parts = [
        None if each.weight_grad is None else each.x.new_empty(num_programs, width, dtype=torch.float32)
        for each, width in zip(tensors, widths, strict=False)
    ]
    (grad, x, weight, x_grad, _), *others = tensors
    launch(
        norm_rope_backward_kernel,
        (num_programs,),
        grad,
        x,
        weight,
        cos,
        sin,
        x_grad,
        parts[0],
        *((*others[0][:-1], parts[1]) if others else [None] * 5),
        *plan.args,
        **plan.constants,
        OVERLAP=overlap(cos.device),
        STAGES=STAGES,
    )
    add_parts_(*((part, each.weight_grad) for each, part in zip(tensors, parts, strict=True)))
    return True
