"""How the kernel of `rope` walks over strided tensors, and its launch."""
# Shape letters: H = heads, N = tokens (all other leading dims), D = features of a head, T = width of a table.

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from graphfuse.kernels._rope_kernel import rope_kernel
from graphfuse.kernels._strides import fold
from graphfuse.kernels._triton import launch, triton

TILE = 4096  # elements of a program: four 16-byte loads a thread in bf16
NUM_WARPS = 4
SPREAD = True  # whether tables are loaded as x is, by every head: from the cache, and no thread waits for another
MAX_TOKEN_DIMS = 3  # that the kernel can tell apart
MAX_HEADS = 2**31 - 2**16  # of all tokens: they are counted in int32, and a tile may run over the end
MAX_IDLE = 4 / 3  # room for heads in all programs, over heads there are


class Rotation(NamedTuple):
    """The options of `rope`, and whether it is its transpose that is meant."""

    layout: str
    out_layout: str
    table: str
    reverse: bool
    start: int
    transpose: bool = False

    def transposed(self) -> Rotation:
        """Return the map that takes gradients of the result to gradients of x."""
        return Rotation(
            layout=self.out_layout,
            out_layout=self.layout,
            table=self.table,
            reverse=not self.reverse,
            start=self.start,
            transpose=not self.transpose,
        )

    def features(self, width: int) -> int:
        """Return how many features tables of this width rotate."""
        return 2 * width if self.table == "shared" else width


def heads_per_program(heads: int, rows: int) -> int:
    """Return the largest power of two, up to `rows`, that leaves few lanes without a head."""
    block: int = min(triton.next_power_of_2(heads), rows)
    while block > 1 and triton.cdiv(heads, block) * block > MAX_IDLE * heads:
        block //= 2
    return block


def broadcast(
    sizes: tuple[int, ...],
    stride: tuple[int, ...],
    shape: tuple[int, ...],
) -> tuple[int, ...]:
    """Return the strides of a tensor expanded to a shape."""
    missing = len(shape) - len(sizes)
    fits = all(size in (1, other) for size, other in zip(sizes, shape[missing:], strict=False))
    assert missing >= 0, f"a table has more dims than {shape}"
    assert fits, f"a table of shape {sizes} does not broadcast to {shape}"
    steps = (0 if size == 1 else step for size, step in zip(sizes, stride, strict=True))
    return (*(0,) * missing, *steps)


Table = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


class Walk(NamedTuple):
    """Sizes and strides as the kernels take them."""

    tokens: int
    inner: tuple[int, int]  # N1, N2
    heads: int
    strides: tuple[tuple[int, ...], ...]  # of each tensor: N0, N1, N2, H, D
    tables: tuple[tuple[int, ...], ...]  # of each table: N0, N1, N2, T


@lru_cache(maxsize=4096)
def plan_walk(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],  # of each tensor, first of one that is dense
    cos: Table,
    sin: Table,
    head_dim: int | None = None,
) -> Walk | None:
    """Choose the heads, unless that is done, and fold the other leading dims; None if too many are left.

    That, or more heads than the kernels can count.
    """
    width = cos[0][-1]
    tables = [broadcast(*table, (*shape[:-1], width)) for table in (cos, sin)]
    leading = list(zip(shape[:-1], *(stride[:-1] for stride in (*strides, *tables)), strict=True))
    nothing = (1, (0,) * (len(strides) + 2))
    if head_dim is None:
        dims = fold(*zip(*leading, strict=True)) if leading else []
        # The innermost dim along which the tables do not change.
        heads = next((dim for dim in reversed(dims) if dim[1][-2:] == (0, 0)), nothing)
        tokens = [dim for dim in dims if dim is not heads]
    else:
        size, *steps = leading.pop(head_dim)
        heads = (size, tuple(steps))
        tokens = fold(*zip(*leading, strict=True)) if leading else []
    if len(tokens) > MAX_TOKEN_DIMS or math.prod(shape[:-1]) > MAX_HEADS:
        return None
    # Sizes of 1 cost nothing at the end: no division by them is left in the kernels.
    tokens += [nothing] * (MAX_TOKEN_DIMS - len(tokens))
    walks = list(zip(*(steps for _, steps in tokens), strict=True))
    (n0, _), (n1, _), (n2, _) = tokens
    return Walk(
        tokens=n0 * n1 * n2,
        inner=(n1, n2),
        heads=heads[0],
        strides=tuple((*walk, heads[1][k], strides[k][-1]) for k, walk in enumerate(walks[:-2])),
        tables=tuple((*walk, table[-1]) for walk, table in zip(walks[-2:], tables, strict=True)),
    )


class Launch(NamedTuple):
    """What follows from sizes, strides and options alone: computed once, since Python is slow."""

    grid: tuple[int]
    args: tuple[int | tuple[int, ...] | None, ...]
    constants: dict[str, Any]


Tensors = tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]  # shape, strides of x, strides of y


@lru_cache(maxsize=4096)
def plan_launch(tensors: Tensors, cos: Table, sin: Table, rotation: Rotation, tile: int) -> Launch | None:
    """Lay heads and tokens of one tensor, or of two with as many features, over programs; None if there is no walk."""
    walks = [plan_walk(shape, (y_stride, x_stride), cos, sin) for shape, x_stride, y_stride in tensors]
    features = tensors[0][0][-1]
    pairs = rotation.features(cos[0][-1]) // 2
    before, after = rotation.start, features - rotation.start - 2 * pairs
    block_p = triton.next_power_of_2(pairs)
    block_before = triton.next_power_of_2(before) if before else 0
    block_after = triton.next_power_of_2(after) if after else 0
    rows = max(1, tile // max(2 * block_p, block_before, block_after))
    args: list[Any] = []
    blocks, tiles = [], []
    for walk in walks:
        if walk is None:
            return None
        block_h = heads_per_program(walk.heads, rows)
        block_n = min(triton.next_power_of_2(walk.tokens), rows // block_h)
        y_walk, x_walk = walk.strides
        args += (x_walk, *walk.tables, y_walk, walk.tokens, *walk.inner, walk.heads)
        blocks.append((block_n, block_h))
        tiles.append(triton.cdiv(walk.tokens, block_n) * triton.cdiv(walk.heads, block_h))
    is_pair = len(tensors) > 1
    return Launch(
        grid=(sum(tiles),),
        args=(*args, tiles[0]) if is_pair else (*args, *[None] * (len(args) + 1)),
        constants={
            "D": features,
            "START": rotation.start,
            "P": pairs,
            "LAYOUT": rotation.layout,
            "OUT_LAYOUT": rotation.out_layout,
            "TABLE": rotation.table,
            "REVERSE": rotation.reverse,
            "TRANSPOSE": rotation.transpose,
            "BLOCK_N": blocks[0][0],
            "BLOCK_H": blocks[0][1],
            "OTHER_BLOCK_N": blocks[-1][0] if is_pair else None,
            "OTHER_BLOCK_H": blocks[-1][1] if is_pair else None,
            "BLOCK_P": block_p,
            "BLOCK_BEFORE": block_before,
            "BLOCK_AFTER": block_after,
            "SPREAD": SPREAD,
            "num_warps": NUM_WARPS,
        },
    )


def rotate_triton_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    y: Tensor,
    rotation: Rotation,
    other: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Launch the kernel, which writes `y`; False if it cannot walk over such strides.

    `other` is another x with as many features, and its y.
    """
    tensors: Tensors = ((x.shape, x.stride(), y.stride()),)
    if other is not None:
        tensors = (*tensors, (other[0].shape, other[0].stride(), other[1].stride()))
    plan = plan_launch(tensors, (cos.shape, cos.stride()), (sin.shape, sin.stride()), rotation, TILE)
    if plan is None:
        return False
    launch(rope_kernel, plan.grid, x, cos, sin, y, *(other or (None, None)), *plan.args, **plan.constants)
    return True
