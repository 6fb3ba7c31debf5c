"""A sum of squares over the last dimension, followed through scalar arithmetic to the inverse root that a norm takes.

Every value is `c * (a * S + b) ** p`, `S = sum(x ** 2)`, whatever scalar arithmetic, roots, clamps and casts made it,
however they are spelled. RMSNorm reads x for S, LayerNorm what is left of x without its mean.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import sympy
import torch

from graphfuse import algebra
from graphfuse.match import ADD, CASTS, DIV, INDEXING, MUL, VIEWS, argument, is_last, number, scalar, strip
from graphfuse.shadow import Value

aten = torch.ops.aten

POW = {aten.pow.Tensor_Scalar, aten.pow_.Scalar}
SQRT = {aten.sqrt.default, aten.sqrt_.default}
RSQRT = {aten.rsqrt.default, aten.rsqrt_.default}
RECIPROCAL = {aten.reciprocal.default, aten.reciprocal_.default}
CLAMP_MIN = {aten.clamp_min.default, aten.clamp_min_.default, aten.clamp.default, aten.clamp_.default}
MAXIMUM = {aten.maximum.default, aten.clamp_min.Tensor}
NORMS = {aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim}


@dataclass(frozen=True)
class Statistic:
    """`c * (a * S + b) ** p` with `S = sum(x ** 2)`; `floor` is added to, or bounds from below, the root."""

    x: Value
    width: int
    a: float
    b: float = 0.0
    c: float = 1.0
    p: float = 1.0
    mode: str = "inside"
    floor: float = 0.0
    weight: tuple[Value, float] | None = None  # already multiplied in, with its offset
    obstacle: str = ""  # why this cannot become a norm, although it looks like one

    def weighted(self, weight: tuple[Value, float]) -> Statistic | None:
        return dataclasses.replace(self, weight=weight) if self.is_norm and self.weight is None else None

    def times(self, k: float) -> Statistic | None:
        if self.p == 1 and self.mode == "inside":
            return dataclasses.replace(self, a=self.a * k, b=self.b * k)
        return dataclasses.replace(self, c=self.c * k)

    def plus(self, k: float) -> Statistic | None:
        if self.mode != "inside":
            return None
        if self.p == 1:
            return dataclasses.replace(self, b=self.b + k)
        if self.p == 0.5 and self.b == 0:
            return dataclasses.replace(self, mode="outside", floor=k / self.c)
        return None

    def at_least(self, k: float) -> Statistic | None:
        if self.mode != "inside" or self.b != 0:
            return None
        if self.p == 1:  # sqrt(max(a S, k)) = max(sqrt(a S), sqrt(k))
            return dataclasses.replace(self, mode="clamp", floor=math.sqrt(k)) if k >= 0 else None
        if self.p == 0.5:
            return dataclasses.replace(self, mode="clamp", floor=k / self.c)
        return None

    def power(self, q: float) -> Statistic | None:
        if self.c <= 0 or self.weight is not None:
            return None
        return dataclasses.replace(self, c=self.c**q, p=self.p * q)

    @property
    def is_norm(self) -> bool:
        return math.isclose(self.p, -0.5)

    @property
    def gain(self) -> float:
        return self.c / math.sqrt(self.a * self.width)

    @property
    def eps(self) -> float:
        scale = self.a * self.width
        return self.b / scale if self.mode == "inside" else self.floor / math.sqrt(scale)


def start(value: Value) -> Statistic | None:
    """A reduction of a square."""
    if value.op in (aten.mean.dim, aten.sum.dim_IntList):
        x = squared(value.args[0])
        dims = argument(value, 1, "dim")
    elif (x := _dotted_with_itself(value)) is not None:
        dims = -1
    elif value.op in NORMS and number(argument(value, 1, "ord", 2)) in (None, 2.0):
        x, dims = value.args[0], argument(value, 2, "dim")
    else:
        return None
    if x is None or x.tensor.dim() == 0:
        return None
    width = x.shape[-1]
    if width == 0:
        return None
    statistic = Statistic(x, width, a=1.0 / width if value.op is aten.mean.dim else 1.0)
    if value.op in NORMS:
        statistic = dataclasses.replace(statistic, p=0.5)
    if not is_last(dims, x):
        return dataclasses.replace(statistic, obstacle=f"dim: expected the last one, got {dims}")
    return statistic


def _dotted_with_itself(value: Value) -> Value | None:
    """`x`, if the value is a batch of products of rows of x with themselves, as einsum computes them."""
    if value.op is not aten.bmm.default or value.shape[1:] != (1, 1):
        return None
    left, right = (_in_order(arg) for arg in value.args)
    width = value.args[0].shape[-1]
    return next((x for x in left if x in right and x.shape[-1] == width), None)


def _in_order(value: Value) -> list[Value]:
    """The value, and what it was before casts and views that kept its elements in their order."""
    found = [value]
    while value.op in CASTS | INDEXING and value.args[0].tensor.numel() == value.tensor.numel():
        before = value.args[0]
        if [n for n in before.shape if n != 1] != [n for n in value.shape if n != 1] and value.op not in VIEWS:
            break
        value = before
        found.append(value)
    return found


def squared(value: Value) -> Value | None:
    """`x`, if the value is `x ** 2`."""
    value = strip(value)
    x: Value | None = None
    if value.op in POW:
        x = value.args[0] if number(value.args[1]) == 2.0 else None
    elif value.op is aten.square.default:
        x = value.args[0]
    elif value.op in MUL and isinstance(value.args[1], Value):
        left, right = value.args
        x = left if strip(left) is strip(right) else None
    return x


def follow(value: Value, statistics: dict[Value, Statistic]) -> Statistic | None:
    """The statistic after one more scalar operation, if that is what the value is."""
    op, args = value.op, value.args
    known = [(i, statistics[a]) for i, a in enumerate(args) if isinstance(a, Value) and a in statistics]
    if len(known) != 1:
        return None
    position, statistic = known[0]
    other = scalar(args[1 - position]) if len(args) > 1 else None
    vector = None
    if op in MUL | DIV and other is None and len(args) == 2 and isinstance(args[1 - position], Value):
        vector = weight_of(args[1 - position], statistic.width)
    result: Statistic | None = None
    if op in CASTS or op in INDEXING:
        result = statistic
    elif op in RSQRT:
        result = statistic.power(-0.5)
    elif op in SQRT:
        result = statistic.power(0.5)
    elif op in RECIPROCAL:
        result = statistic.power(-1.0)
    elif op in POW and other is not None:
        result = statistic.power(other)
    elif op in ADD and other is not None and number(value.kwargs.get("alpha", 1)) == 1.0:
        result = statistic.plus(other)
    elif op in MUL and other is not None:
        result = statistic.times(other)
    elif vector is not None and not value.kwargs:
        turned = statistic if op in MUL else statistic.power(-1.0) if position == 1 else None
        result = turned.weighted(vector) if turned is not None else None
    elif op in DIV and other is not None and not value.kwargs:
        if position == 0:
            result = statistic.times(1.0 / other) if other else None
        elif (inverse := statistic.power(-1.0)) is not None:
            result = inverse.times(other)
    elif op in CLAMP_MIN and number(argument(value, 2, "max")) is None:
        lower = number(argument(value, 1, "min"))
        result = statistic.at_least(lower) if lower is not None else None
    elif op in MAXIMUM and other is not None:
        result = statistic.at_least(other)
    return result


def weight_of(factor: Value, width: int) -> tuple[Value, float] | None:
    """`(weight, offset)` if the factor is `offset + weight`, one number per feature."""
    offset = 0.0
    value = one_dimensional(strip(factor))
    if value.op in ADD and len(value.args) == 2:
        left, right = value.args
        constant, inner = (scalar(right), left) if isinstance(left, Value) else (scalar(left), right)
        if constant is not None and isinstance(inner, Value):
            offset, value = constant, one_dimensional(strip(inner))
    return (value, offset) if value.shape == (width,) and value.dtype.is_floating_point else None


def one_dimensional(value: Value) -> Value:
    """The value before views that only add dimensions of size one."""
    while value.op in INDEXING and value.tensor.dim() > 1 and value.args[0].tensor.numel() == value.shape[-1]:
        value = strip(value.args[0])
    return value


def inverse_root(mode: str, square: sympy.Expr, eps: float) -> sympy.Expr:
    """How a report writes the inverse root of a mean of squares."""
    floor, root = algebra.number(eps), algebra.power(square, "1/2")
    return {
        "inside": algebra.power(algebra.total(square, floor), "-1/2"),
        "outside": algebra.power(algebra.total(root, floor), -1),
        "clamp": algebra.power(algebra.apply("max", root, floor), -1),
    }[mode]
