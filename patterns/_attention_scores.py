"""The way from the product of queries and keys to the softmax, and on to the weights: what happens to the scores.

Every value is `scale * q kᵀ`, and masks on it: added, or hiding scores behind a number so low that nothing is left of
them. Casts, views and what a softmax does not notice (a constant, the largest score) change nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from graphfuse.evaluate import CannotEvaluate, evaluate, exact_dtype
from graphfuse.kernels.causal_attention import MASKED
from graphfuse.match import ADD, CASTS, DIV, IDENTITIES, MUL, SUB, argument, number
from graphfuse.patterns._axes import MOVES
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

PRODUCTS = {aten.bmm.default, aten.baddbmm.default}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
LARGEST_OF = {aten.amax.default, aten.max.dim}
FLOORS = {aten.maximum.default, aten.clamp_min.default, aten.clamp_min.Tensor, aten.clamp.default}
# What lies above these is another layer's.
BORDERS = {aten.mm.default, aten.addmm.default, aten._softmax.default, aten.embedding.default}
LONGEST = 24  # operations from the product to the softmax
FEW = 16  # operations that make a number


@dataclass(frozen=True)
class Step:
    """What one operation does to the scores.

    Attributes:
        value: the scores after it.
        kind: "scale", "add", "times" (a tensor), "hide" or "keep" (where a mask is True), or "" for nothing.
        mask: what is added, multiplied or asked.
        number: the factor of what is added or of the scores; what hidden scores become.
    """

    value: Value
    kind: str = ""
    mask: Value | None = None
    number: float = 1.0


@dataclass(frozen=True)
class Scores:
    """The scores that a softmax takes."""

    product: Value
    path: tuple[Step, ...]  # from the product to the softmax's operand

    @property
    def scale(self) -> float:
        return math.prod(step.number for step in self.path if step.kind == "scale")

    def masks(self) -> list[Step]:
        """The masks, with their numbers as they are after what scales the scores later."""
        found: list[Step] = []
        later = 1.0
        for step in reversed(self.path):
            if step.kind == "scale":
                later *= step.number
            elif step.kind:
                found.append(step if step.kind == "times" else dataclasses.replace(step, number=step.number * later))
        return found[::-1]


def scores_of(value: Value, depth: int = 0, tried: set[Value] | None = None) -> Scores | None:
    """What the scores are made of, or `None` if they are no product of two tensors, scaled and masked."""
    tried = set() if tried is None else tried
    if value.op in PRODUCTS:
        return Scores(value, tuple(_product_steps(value)))
    if depth == LONGEST or value in tried:
        return None
    tried.add(value)
    for operand, step in _ways(value):
        below = scores_of(operand, depth + 1, tried)
        if below is not None:
            return Scores(below.product, (*below.path, step))
    return None


def _product_steps(value: Value) -> Iterator[Step]:
    if value.op is not aten.baddbmm.default:
        yield Step(value)
        return
    alpha, beta = (number(value.kwargs.get(name, 1)) for name in ("alpha", "beta"))
    yield Step(value, "scale", number=1.0 if alpha is None else alpha)
    if beta != 0:
        yield Step(value, "add", value.args[0], 1.0 if beta is None else beta)


def _ways(value: Value) -> Iterator[tuple[Value, Step]]:
    """The operands that may hold the scores, each with what the operation does to them then."""
    op, args = value.op, value.args
    if op in MOVES or (op in CASTS and value.dtype.is_floating_point):
        yield args[0], Step(value)
    elif op in MUL | DIV | ADD | SUB:
        yield from _arithmetic(value)
    elif op in FILLS and (fill := constant(args[2])) is not None:
        yield args[0], Step(value, "hide", args[1], fill)
    elif op is aten.where.self:
        if (fill := constant(args[2])) is not None:
            yield args[1], Step(value, "keep", args[0], fill)
        if (fill := constant(args[1])) is not None:
            yield args[2], Step(value, "hide", args[0], fill)
    elif op in FLOORS and argument(value, 2, "max") is None:
        floor = constant(args[1]) if len(args) > 1 else None
        if floor is not None and floor <= MASKED:
            yield args[0], Step(value)


def _arithmetic(value: Value) -> Iterator[tuple[Value, Step]]:
    op, (left, right) = value.op, value.args[:2]
    alpha = number(value.kwargs.get("alpha", 1))
    if alpha is None or "rounding_mode" in value.kwargs:
        return
    for operand, other, is_left in ((left, right, True), (right, left, False)):
        if not isinstance(operand, Value):
            continue
        known = constant(other)
        if op in DIV:
            if is_left and known:
                yield operand, Step(value, "scale", number=1.0 / known)
        elif op in MUL:
            if known is not None:
                yield operand, Step(value, "scale", number=known)
            elif isinstance(other, Value):
                yield operand, Step(value, "times", other)
        elif op in ADD or is_left:
            sign = -1.0 if op in SUB else 1.0
            if known is not None or (sign < 0 and _is_largest(other, operand)):
                yield operand, Step(value)
            elif alpha == 1 or is_left:  # `alpha` is of the second operand
                yield operand, Step(value, "add", other, sign * alpha)


def _is_largest(value: Any, scores: Value) -> bool:
    """Whether the value is the largest of each row of the scores, which a softmax takes off itself."""
    while isinstance(value, Value) and (value.op in MOVES or value.op is aten.detach.default):
        value = value.args[0]
    return isinstance(value, Value) and value.op in LARGEST_OF and value.args[0] is scores


def constant(item: Any) -> float | None:
    """A number, also one that the graph has as a tensor of one element, or of equal ones: before it is rounded."""
    if not isinstance(item, Value):
        return number(item)
    if item.op in (aten.full.default, aten.full_like.default):
        return number(item.args[1])
    if item.tensor.numel() != 1:
        return None
    region: list[Value] = []
    known: dict[Value, Tensor] = {}
    stack = [item]
    while stack:
        value = stack.pop()
        if is_written(value):
            known[value] = value.tensor.to(exact_dtype(value.dtype))
        if (value.op is LEAF and value not in known) or len(region) > FEW:
            return None
        region.append(value)
        stack.extend(value.operands())
    ordered = sorted(set(region), key=lambda value: value.index)
    try:
        with _disable_current_modes(), torch.no_grad():
            content = evaluate(ordered, known, exact=True, device=torch.device("cpu"), sizes={})[item]
    except CannotEvaluate:
        return None
    return float(content)


def is_written(value: Value) -> bool:
    """Whether the value is a number that the code has as a tensor, `torch.tensor(-1e9)`: a real one in the graph."""
    return value.op is LEAF and not isinstance(value.tensor, FakeTensor) and value.tensor.numel() == 1


@dataclass(frozen=True)
class Weights:
    """The operand of a product that is a softmax, and what was done to it that has no place in attention."""

    softmax: Value
    odd: str = ""
    dropout: float = 0.0


def weights_of(value: Value) -> Weights | None:
    """The softmax that the value is, but for casts and views, dropout and one thing more."""
    odd, dropout = "", 0.0
    for _ in range(LONGEST):
        if value.op is aten._softmax.default:
            return Weights(value, odd, dropout)
        if (probability := _dropout(value)) is not None:
            dropout = probability
        elif value.op not in MOVES | IDENTITIES and not (value.op in CASTS and value.dtype.is_floating_point):
            if odd or value.op is LEAF:
                return None
            odd = str(value.op)
        elif value.op is aten.slice.Tensor and value.shape != value.args[0].shape:
            odd = str(value.op)
        if not value.args or not isinstance(value.args[0], Value):
            return None
        value = value.args[0]
    return None


def _dropout(value: Value) -> float | None:
    """The probability of the dropout that the value is."""
    if value.op is aten.native_dropout.default and value.output == 0:
        return number(value.args[1])
    if value.op in MUL and isinstance(value.args[1], Value):
        noise = value.args[1]
        scale = noise.args[1] if noise.op in DIV and not isinstance(noise.args[1], Value) else None
        source = noise.args[0] if scale is not None else noise
        if isinstance(source, Value) and source.op is aten.bernoulli_.float:
            return 1.0 - float(source.args[1])
    return None


def foreign(value: Value, shadow: Shadow) -> str | None:
    """The operation that keeps a softmax's operand from being scores, if a product of two tensors lies above it."""
    seen: set[Value] = set()
    stack = [(value, "")]
    while stack and len(seen) < LONGEST:
        value, name = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.op in PRODUCTS:
            return name or None
        if value.op in BORDERS:
            continue
        if not name and not any(True for _ in _ways(value)):
            name = str(value.op)
        stack.extend((operand, name) for operand in reversed(list(value.operands())))
    return None
