"""The kernel of `rope`, and how it walks over strided tensors.

A program holds a block of heads at one position, so that the tables are read once for all of them.
Where a position has few heads, it holds several positions.
"""
# Shape letters: H = heads, N = tokens (all other leading dims), D = features of a head, P = pairs,
# T = width of a table.

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from graphfuse.kernels._strides import fold
from graphfuse.kernels._triton import launch, tl, triton

TILE = 4096  # elements of a program: four 16-byte loads a thread in bf16
NUM_WARPS = 4
SPREAD = True  # whether tables are loaded as x is, by every head: from the cache, and no thread waits for another
MAX_TOKEN_DIMS = 3  # that the kernel can tell apart
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
    return first.to(tl.float32), second.to(tl.float32)


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


@triton.jit(do_not_specialize_on_alignment=["N", "N1", "N2", "H"])
def _rope_kernel(
    x_ptr,  # [N0, N1, N2, H, D]
    cos_ptr,  # [N0, N1, N2, T]
    sin_ptr,  # [N0, N1, N2, T]
    y_ptr,  # [N0, N1, N2, H, D]
    x_strides,  # of N0, N1, N2, H, D
    cos_strides,  # of N0, N1, N2, T
    sin_strides,  # of N0, N1, N2, T
    y_strides,  # of N0, N1, N2, H, D
    N,  # N0 * N1 * N2
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
    BLOCK_P: tl.constexpr,  # next power of two >= P
    BLOCK_BEFORE: tl.constexpr,  # >= START
    BLOCK_AFTER: tl.constexpr,  # >= D - START - 2 * P
    SPREAD: tl.constexpr,
):
    token_mask, mask, place = tl_place(tl.program_id(0), N, N1, N2, H, BLOCK_N, BLOCK_H)
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
    """Choose the heads, unless that is done, and fold the other leading dims; None if too many are left."""
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
    if len(tokens) > MAX_TOKEN_DIMS:
        return None
    tokens = [nothing] * (MAX_TOKEN_DIMS - len(tokens)) + tokens
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
    args: tuple[int | tuple[int, ...], ...]
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def plan_launch(
    shape: tuple[int, ...],
    x_stride: tuple[int, ...],
    y_stride: tuple[int, ...],
    cos: Table,
    sin: Table,
    rotation: Rotation,
    tile: int,
) -> Launch | None:
    """Lay heads and tokens out over programs; None if there is no walk."""
    walk = plan_walk(shape, (y_stride, x_stride), cos, sin)
    if walk is None:
        return None
    (y_walk, x_walk), tables = walk.strides, walk.tables
    num_tokens, num_heads = walk.tokens, walk.heads

    width = cos[0][-1]
    pairs = rotation.features(width) // 2
    before, after = rotation.start, shape[-1] - rotation.start - 2 * pairs
    block_p = triton.next_power_of_2(pairs)
    block_before = triton.next_power_of_2(before) if before else 0
    block_after = triton.next_power_of_2(after) if after else 0
    rows = max(1, tile // max(2 * block_p, block_before, block_after))
    block_h = heads_per_program(num_heads, rows)
    block_n = min(triton.next_power_of_2(num_tokens), rows // block_h)
    return Launch(
        grid=(triton.cdiv(num_tokens, block_n) * triton.cdiv(num_heads, block_h),),
        args=(
            x_walk,
            *tables,
            y_walk,
            num_tokens,
            *walk.inner,
            num_heads,
        ),
        constants={
            "D": shape[-1],
            "START": rotation.start,
            "P": pairs,
            "LAYOUT": rotation.layout,
            "OUT_LAYOUT": rotation.out_layout,
            "TABLE": rotation.table,
            "REVERSE": rotation.reverse,
            "TRANSPOSE": rotation.transpose,
            "BLOCK_N": block_n,
            "BLOCK_H": block_h,
            "BLOCK_P": block_p,
            "BLOCK_BEFORE": block_before,
            "BLOCK_AFTER": block_after,
            "SPREAD": SPREAD,
            "num_warps": NUM_WARPS,
        },
    )


def rotate_triton_(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, rotation: Rotation) -> bool:
    """Launch the kernel, which writes `y`; False if it cannot walk over such strides."""
    tables = ((cos.shape, cos.stride()), (sin.shape, sin.stride()))
    plan = plan_launch(x.shape, x.stride(), y.stride(), *tables, rotation, TILE)
    if plan is None:
        return False
    launch(_rope_kernel, plan.grid, x, cos, sin, y, *plan.args, **plan.constants)
    return True
