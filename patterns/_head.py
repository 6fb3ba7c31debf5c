"""What the values behind logits may be, while they are followed through the shadow.

Logits, the result of a matrix product or whatever else they start as, are `Rows`: for each token one row of classes.
Casts, scales, a soft cap, a choice of rows, the sum with another product keep them that; a softmax and its logarithm
too. What reduces the classes is a number per token (`Tokens`), and every such number that losses are made of is a sum
of three, with factors:

    nll    = logsumexp(z) - z[target]
    smooth = sum over the classes of class_weight * (logsumexp(z) - z)
    lse    = logsumexp(z), or its square

So is what is linear in them: masks, weights, sums, means. The factors are kept as a short program, as data:

    ("nll", ignore_index, reduction, class weight or None)      what `nll_loss` does to nll
    ("mul" | "div", operand)                                    by a number per token, or one for all
    ("fill" | "keep", mask)                                     0 where the mask is true, or where it is not
    ("per class",), ("sum",), ("mean",)

Operands are values while a head is followed, and expressions over the inputs in a match. Choices of rows are data too,
on the leading dimensions:

    ("slice" | "select", number of leading dimensions after it, start, end | index), ("permute", order), ("flatten",)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphfuse.match import IDENTITIES, VIEWS, scalar
from graphfuse.shadow import Value

aten = torch.ops.aten

RESHAPES = VIEWS | {aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default}
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}
NEG = {aten.neg.default, aten.neg_.default}
SUM = {aten.sum.default, aten.sum.dim_IntList}
MEAN = {aten.mean.default, aten.mean.dim}

Step = tuple[Any, ...]
Choice = tuple[Any, ...]


@dataclass(frozen=True)
class Lane:
    """One of the parts into which a loop takes rows apart."""

    whole: Value
    lead: tuple[int, ...]  # leading sizes of the whole
    index: int


class Obstacle(Exception):
    """Why a head cannot be fused, and what would help."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


Summands = tuple[tuple[Value, float], ...]  # each with its factor


@dataclass(frozen=True)
class Source:
    """Which logits, and of which rows: `softcap(scale * (start + others + biases))`."""

    start: Value  # a product, or rows that are given
    others: Summands = ()  # products of fewer features, as adapters add them
    biases: Summands = ()
    scale: float = 1.0
    softcap: float = 0.0
    classes: tuple[int, int | None] | None = None  # a slice of them; None: all
    choices: tuple[Choice, ...] = ()
    lead: tuple[int, ...] | None = None  # leading sizes before the first choice
    lane: Lane | None = None


@dataclass(frozen=True)
class Rows:
    """A row of classes for each token."""

    source: Source
    kind: str  # "logits", "probs", "log probs"
    dim: int  # where the classes are
    lead: tuple[int, ...] | None = None  # leading sizes after the last choice
    sign: float = 1.0  # factor of log probs
    class_weight: Value | None = None  # the same
    picked: Value | None = None  # classes that all others were multiplied by 0 for


@dataclass(frozen=True)
class Term:
    """`coefficient * program(loss)`."""

    loss: str  # "nll", "smooth", "lse", "square"
    source: Source
    targets: tuple[Value, ...] = ()  # one, or one for each lane
    class_weight: Value | None = None
    program: tuple[Step, ...] = ()
    coefficient: float = 1.0


@dataclass(frozen=True)
class Tokens:
    """A number for each token, or their sum: what all terms add up to."""

    terms: tuple[Term, ...]
    is_summed: bool = False

    @property
    def source(self) -> Source:
        return self.terms[0].source

    def times(self, factor: float) -> Tokens:
        """All of it multiplied by a number."""
        return replace(self, terms=tuple(replace(t, coefficient=t.coefficient * factor) for t in self.terms))

    def then(self, *steps: Step) -> Tokens:
        """What further steps make of it."""
        return replace(self, terms=tuple(replace(t, program=(*t.program, *steps)) for t in self.terms))

    @property
    def is_pure(self) -> bool:
        """Whether nothing was done to the numbers yet."""
        return not self.is_summed and all(not term.program for term in self.terms)


@dataclass
class Trail:
    """Everything that was made of one start, or of several that are added."""

    starts: list[Value]
    rows: dict[Value, Rows] = field(default_factory=dict)
    tokens: dict[Value, Tokens] = field(default_factory=dict)

    def __contains__(self, value: Value) -> bool:
        return value in self.rows or value in self.tokens

    @property
    def anchor(self) -> Value | None:
        """The first value that depends on a target: without one these are not the logits of a loss."""
        return next((v for v, t in self.tokens.items() if any(term.targets for term in t.terms)), None)


def size(value: Value) -> int:
    """The number of elements."""
    return math.prod(value.shape)


def constant(item: Any) -> float | None:
    """A number that does not change with the sizes of a batch; a symbolic float becomes one when it is rewritten."""
    made_of = [item, *item.args] if isinstance(item, Value) else [item]
    return None if any(isinstance(part, torch.SymInt) for part in made_of) else scalar(item)


def origin(value: Value) -> Value:
    """The value before it was only reshaped or copied."""
    moves = RESHAPES | IDENTITIES | {aten.detach.default, aten.expand.default}
    while value.op in moves and size(value) == size(value.args[0]):
        value = value.args[0]
    return value


def same_place(before: tuple[int, ...], dim: int, after: tuple[int, ...]) -> int | None:
    """Where a dimension is after a reshape, or `None` if it was split or merged."""
    outside = math.prod(before[:dim])
    places = (d for d, size in enumerate(after) if size == before[dim] and math.prod(after[:d]) == outside)
    return next(places, None)


def permutation(value: Value) -> list[int]:
    """The dimensions of the operand in the order in which a transpose leaves them."""
    rank = len(value.shape)
    if value.op is aten.permute.default:
        return [d % rank for d in value.args[1]]
    order = list(range(rank))
    if rank > 1:
        a, b = (0, 1) if value.op is aten.t.default else (value.args[1] % rank, value.args[2] % rank)
        order[a], order[b] = b, a
    return order


def keeps_order(order: list[int], but: int, shape: tuple[int, ...]) -> bool:
    """Whether a transpose leaves all dimensions but one, and those of size 1, in their order."""
    others = [d for d in order if d != but and shape[d] != 1]
    return others == sorted(others)
