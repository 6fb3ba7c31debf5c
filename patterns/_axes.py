"""Which axes of its sources each dimension of a tensor runs along.

A dimension is a group of axes: `(batch, heads)` after they were flattened, none where its size is 1. Views split and
merge groups, products join those of their operands. Sizes of this batch tell where a view cuts; which axes are the
same is known from how they came there, never from their size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphfuse.match import CASTS, IDENTITIES, INDEXING, VIEWS
from graphfuse.shadow import Value, hint

aten = torch.ops.aten

SQUEEZES = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
MOVES = INDEXING | {aten.repeat.default}


@dataclass(eq=False)
class Axis:
    """One axis of a source, or part of one."""

    size: int


Group = tuple[Axis, ...]  # the axes of one dimension, slowest first
Dims = tuple[Group, ...]


class Axes:
    """The axes of one computation, and into what they were split."""

    def __init__(self) -> None:
        self.parts: dict[Axis, Group] = {}

    def new(self, value: Value) -> Dims:
        """One axis for each dimension that has more than one element."""
        return tuple((Axis(size),) if size > 1 else () for size in value.shape)

    def now(self, group: Group) -> Group:
        """The group as it is after what was split and found equal since."""
        found: list[Axis] = []
        for axis in group:
            found.extend(self.now(self.parts[axis]) if axis in self.parts else (axis,))
        return tuple(found)

    def through(self, value: Value, dims: Dims) -> Dims | None:
        """The dimensions of `value`, from those of its operand; `None` if it does more than move elements."""
        op, before, after = value.op, value.args[0].shape, value.shape
        rank = len(before)
        if op in VIEWS:
            return self._regrouped(dims, after)
        if op in IDENTITIES or op in CASTS or (op is aten.slice.Tensor and before == after):
            return dims
        if op is aten.permute.default:
            return tuple(dims[d] for d in value.args[1])
        if op is aten.t.default:
            return dims[::-1]
        if op is aten.transpose.int:
            order = list(range(rank))
            a, b = value.args[1], value.args[2]
            order[a], order[b] = order[b], order[a]
            return tuple(dims[d] for d in order)
        if op is aten.unsqueeze.default:
            at = value.args[1] % len(after)
            return (*dims[:at], (), *dims[at:])
        if op in SQUEEZES:
            named = value.args[1] if len(value.args) > 1 else range(rank)
            gone = {d % rank for d in ([named] if isinstance(named, int) else named)}
            return tuple(group for d, group in enumerate(dims) if d not in gone or before[d] != 1)
        if op is aten.expand.default:
            padded = ((),) * (len(after) - rank) + dims
            sizes = (1,) * (len(after) - rank) + before
            return tuple(g if n == m else _fresh(m) for g, n, m in zip(padded, sizes, after, strict=True))
        if op is aten.repeat.default:
            padded = ((),) * (len(after) - rank) + dims
            return tuple((*_fresh(hint(n)), *g) for g, n in zip(padded, value.args[1], strict=True))
        return None

    def product(self, left: Dims, right: Dims) -> Dims | None:
        """The dimensions of a batch of matrix products."""
        if not self.equate(left[0], right[0]) or not self.equate(left[2], right[1]):
            return None
        return (left[0], left[1], right[2])

    def equate(self, left: Group, right: Group) -> bool:
        """Find the axes of two groups equal, one by one; `False` if they do not fit."""
        a, b = list(self.now(left)), list(self.now(right))
        while a and b:
            x, y = a.pop(0), b.pop(0)
            if x is y:
                continue
            if x.size == y.size:
                self.parts[y] = (x,)
            elif x.size > y.size:
                if x.size % y.size:
                    return False
                head, rest = self._split(x, y.size)
                self.parts[y] = (head,)
                a.insert(0, rest)
            else:
                if y.size % x.size:
                    return False
                head, rest = self._split(y, x.size)
                self.parts[head] = (x,)
                b.insert(0, rest)
        return not a and not b

    def _split(self, axis: Axis, size: int) -> tuple[Axis, Axis]:
        parts = Axis(size), Axis(axis.size // size)
        self.parts[axis] = parts
        return parts

    def _regrouped(self, dims: Dims, shape: tuple[int, ...]) -> Dims | None:
        """The same axes in their order, in dimensions of other sizes."""
        left = [axis for group in dims for axis in self.now(group)]
        groups: list[Group] = []
        for size in shape:
            group: list[Axis] = []
            missing = size
            while missing > 1:
                if not left:
                    return None
                axis = left.pop(0)
                if axis.size > missing:
                    if axis.size % missing:
                        return None
                    axis, rest = self._split(axis, missing)
                    left.insert(0, rest)
                if missing % axis.size:
                    return None
                group.append(axis)
                missing //= axis.size
            groups.append(tuple(group))
        return None if left else tuple(groups)


def _fresh(size: int) -> Group:
    """What repetition makes: an axis that the source does not have."""
    return (Axis(size),) if size > 1 else ()
