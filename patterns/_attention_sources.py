"""Where the operands of the products in an attention come from, and where its result goes: no arithmetic between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from graphfuse.match import DIV, MUL, is_cast, narrows, unreachable
from graphfuse.patterns._attention_heads import settled
from graphfuse.patterns._attention_scores import constant
from graphfuse.patterns._axes import MOVES, Axes, Axis, Dims
from graphfuse.shadow import Shadow, Value


@dataclass(frozen=True)
class Source:
    """A tensor that an operand is a rearrangement of, but for a scale."""

    value: Value
    way: tuple[Value, ...]  # what is done to it, in order; the operand is the last
    scale: float

    def below(self, others: Iterable[Source]) -> Source:
        """The same read from another source, if that lies on the way: what is read in two places is one input."""
        met = [self.way.index(other.value) for other in others if other.value in self.way]
        if not met:
            return self
        rest = self.way[max(met) + 1 :]
        return Source(self.way[max(met)], rest, math.prod(above[1] for value in rest if (above := _above(value))))

    def follow(self, axes: Axes, dims: Dims) -> Dims | None:
        """The dimensions of the operand, from those of the source."""
        return follow(axes, dims, self.way)


def follow(axes: Axes, dims: Dims, way: Sequence[Value]) -> Dims | None:
    """The dimensions after every step of the way, scales among them."""
    found: Dims | None = dims
    for value in way:
        if value.op not in MUL | DIV and found is not None:
            found = axes.through(value, found)
    return found


def sources(operand: Value, dtype: torch.dtype, shadow: Shadow, *, through_scales: bool = True) -> list[Source]:
    """What the operand may be read from: the best of all, and the best that repeats nothing on the way.

    Best is what has the fewest elements, then what has its dimensions apart and in their order, then the nearest.
    """
    found: list[tuple[tuple[int, ...], Source]] = []
    way: list[Value] = []
    value, scale = operand, 1.0
    while True:
        if value.dtype == dtype and unreachable(value, shadow) is None:
            source = Source(value, tuple(way[::-1]), scale)
            order = _order(source)
            if order is not None:
                found.append(((value.tensor.numel(), *order, len(way)), source))
        step = _above(value)
        if step is None or (step[1] != 1 and not through_scales):
            break
        way.append(value)
        value, scale = step[0], scale * step[1]
    found.sort(key=lambda item: item[0])
    whole = [source for _, source in found if source.value.tensor.numel() == operand.tensor.numel()]
    return list(dict.fromkeys([*(source for _, source in found[:1]), *whole[:1]]))


def _above(value: Value) -> tuple[Value, float] | None:
    """The value before a rearrangement, a cast that loses nothing, or a number that multiplies it; and that number."""
    if value.op in MOVES or (is_cast(value) and not narrows(value)):
        return value.args[0], 1.0
    if value.op in MUL | DIV and isinstance(value.args[0], Value) and "rounding_mode" not in value.kwargs:
        known = constant(value.args[1])
        if known and value.shape == value.args[0].shape:
            return value.args[0], known if value.op in MUL else 1.0 / known
    return None


def _order(source: Source) -> tuple[int, int] | None:
    """How little the source is apart and in order; `None` if one of its dimensions becomes two of the operand's."""
    axes = Axes()
    dims = axes.new(source.value)
    operand = source.follow(axes, dims)
    if operand is None:
        return None
    groups = settled(axes, operand)
    flat = [axis for group in groups for axis in group]
    there: list[Axis] = []
    for group in settled(axes, dims):
        if group and not any(set(group) <= set(one) for one in groups):
            return None
        there.extend(group)
    moved = [axis for axis in flat if axis in there] != there
    return -sum(bool(group) for group in dims), int(moved)


def outputs(product: Value, shadow: Shadow) -> list[Value]:
    """The product, and what it successively becomes by rearrangements and casts that nothing else reads."""
    chain = [product]
    while True:
        user = shadow.sole_user(chain[-1])
        if user is None or not (user.op in MOVES or narrows(user)):
            return chain
        chain.append(user)
