"""Logits followed forward through the shadow: which values are still rows of classes, and where they become numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from graphfuse.match import ADD, CASTS, DIV, IDENTITIES, MUL, SUB, argument
from graphfuse.patterns._head import (
    MEAN,
    NEG,
    RESHAPES,
    TRANSPOSES,
    Choice,
    Lane,
    Rows,
    Source,
    Term,
    Tokens,
    Trail,
    constant,
    keeps_order,
    origin,
    permutation,
    same_place,
    size,
)
from graphfuse.patterns._token_numbers import JOIN, is_apart, joined, of_tokens, picked
from graphfuse.shadow import Shadow, Value

aten = torch.ops.aten

PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}
TANH = {aten.tanh.default, aten.tanh_.default}
NLL = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}
ARANGE = {aten.arange.default, aten.arange.start, aten.arange.start_step}
REDUCTIONS = ("none", "mean", "sum")


def products(shadow: Shadow) -> dict[Value, Rows]:
    """All products in the shadow, each a start."""
    found = {}
    for value in shadow.values:
        if value.op in PRODUCTS and (value.op is not aten.bmm.default or value.shape[0] == 1):
            biases = ((value.args[0], 1.0),) if value.op is aten.addmm.default else ()
            found[value] = Rows(Source(value, biases=biases), "logits", len(value.shape) - 1)
    return found


def follow(shadow: Shadow, starts: Mapping[Value, Rows]) -> list[Trail]:
    """The trails of these values, in order of the shadow."""
    trail_of: dict[Value, Trail] = {}
    trails: list[Trail] = []
    for value in shadow.values:
        if value in starts:
            trail_of[value] = Trail([value], {value: starts[value]})
            trails.append(trail_of[value])
            if value.op is aten.addmm.default:
                _join(value, [value.args[0], value], trails, trail_of)
            continue
        operands = [operand for operand in value.operands() if operand in trail_of]
        if not operands or (value.op in NLL and value.output):
            continue
        if value.op in ADD | SUB and _join(value, value.args[:2], trails, trail_of):
            continue
        operand, trail = operands[0], trail_of[operands[0]]
        if value.op in JOIN:
            state: Rows | Tokens | None = joined(value, trail)
        elif operand in trail.tokens:
            state = of_tokens(trail.tokens[operand], operand, value, trail, shadow)
        else:
            state = _Row(value, operand, trail, shadow).state()
        if isinstance(state, Rows):
            trail.rows[value] = state
        elif isinstance(state, Tokens):
            trail.tokens[value] = state
        if state is not None:
            trail_of[value] = trail
    return trails


def _join(value: Value, parts: Sequence[Any], trails: list[Trail], trail_of: dict[Value, Trail]) -> bool:
    """Make one trail of two whose logits the value adds; whether it does just that."""
    if any(not isinstance(part, Value) or part not in trail_of or part.shape != value.shape for part in parts):
        return False
    into, other = (trail_of[part] for part in parts)
    first, second = (trail_of[part].rows.get(part) for part in parts)
    alpha = value.kwargs.get("alpha", 1)
    if into is other or first is None or second is None or not isinstance(alpha, (int, float)) or not alpha:
        return False
    if value.op is aten.addmm.default:
        if value.kwargs:
            return False
        second = replace(second, source=replace(second.source, biases=()))
    state = _added(first, second, -float(alpha) if value.op in SUB else float(alpha))
    if state is None:
        return False
    into.starts += other.starts
    into.rows |= {**other.rows, value: state}
    into.tokens |= other.tokens
    trail_of.update(dict.fromkeys([*other.rows, *other.tokens, value], into))
    trails.remove(other)
    return True


def _added(first: Rows, second: Rows, factor: float) -> Rows | None:
    """`first + factor * second` of products; that of most features is the first one then."""
    a, b = first.source, second.source
    is_linear = not any(source.softcap or source.classes or source.lane for source in (a, b))
    is_product = a.start.op in PRODUCTS and b.start.op in PRODUCTS
    alike = [
        replace(rows, source=Source(a.start, choices=rows.source.choices, lead=rows.source.lead))
        for rows in (first, second)
    ]
    if first.kind != "logits" or not is_linear or not is_product or alike[0] != alike[1]:
        return None
    ratio = factor * b.scale / a.scale
    if b.start.args[-2].shape[-1] > a.start.args[-2].shape[-1]:
        a, b, ratio = replace(b, scale=factor * b.scale), a, 1.0 / ratio
    others = (*a.others, (b.start, ratio), *((other, f * ratio) for other, f in b.others))
    biases = (*a.biases, *((bias, f * ratio) for bias, f in b.biases))
    return replace(first, source=replace(a, others=others, biases=biases))


class _Row:
    """One operation on rows of classes."""

    def __init__(self, value: Value, operand: Value, trail: Trail, shadow: Shadow) -> None:
        self.value, self.operand, self.trail, self.shadow = value, operand, trail, shadow
        self.op, self.args = value.op, value.args
        self.rows = trail.rows[operand]

    def state(self) -> Rows | Tokens | None:
        """What it makes of them; `None` if it is neither rows nor numbers."""
        op, rows, operand = self.op, self.rows, self.operand
        rank = len(operand.shape)
        if op in CASTS:
            return rows if self.value.dtype.is_floating_point else None
        if op in IDENTITIES or (op is aten.expand.default and operand.shape == self.value.shape):
            return rows
        if op in RESHAPES:
            dim = same_place(operand.shape, rows.dim, self.value.shape)
            return None if dim is None else replace(rows, dim=dim)
        if op in TRANSPOSES:
            return self._transposed()
        if op is aten.slice.Tensor:
            return self._sliced()
        if op in (aten.select.int, aten.unbind.int):
            return self._selected()
        if op in (aten._log_softmax.default, aten._softmax.default):
            kind = "log probs" if op is aten._log_softmax.default else "probs"
            return replace(rows, kind=kind) if rows.kind == "logits" and self.args[1] % rank == rows.dim else None
        if op is aten.log.default:
            return replace(rows, kind="log probs") if rows.kind == "probs" else None
        if op is aten.logsumexp.default:
            is_over_classes = [d % rank for d in self.args[1]] == [rows.dim]
            return Tokens((Term("lse", rows.source),)) if rows.kind == "logits" and is_over_classes else None
        if op in MUL | DIV | NEG | TANH | ADD | SUB:
            return self._arithmetic()
        if op in (aten.sum.dim_IntList, aten.mean.dim):
            return self._over_classes()
        if op is aten.gather.default:
            is_one_each = size(operand) == size(self.value) * operand.shape[rows.dim]
            is_along = self.args[0] is operand and self.args[1] % rank == rows.dim
            return picked(rows, self.args[2]) if is_one_each and is_along else None
        if op is aten.index.Tensor:
            return self._indexed()
        return self._nll() if op in NLL else None

    def _transposed(self) -> Rows | None:
        rows, shape = self.rows, self.operand.shape
        order = permutation(self.value)
        moved = replace(rows, dim=order.index(rows.dim))
        if keeps_order(order, rows.dim, shape):
            return moved
        return self._choose(moved, ("permute", tuple(d - (d > rows.dim) for d in order if d != rows.dim)))

    def _sliced(self) -> Rows | None:
        rows, shape = self.rows, self.operand.shape
        dim = argument(self.value, 1, "dim", 0) % len(shape)
        if argument(self.value, 4, "step", 1) != 1:
            return None
        bounds = self._bounds(dim)
        if bounds is None or bounds == (0, None):
            return None if bounds is None else rows
        start, end = bounds
        if dim != rows.dim:
            return self._choose(rows, ("slice", self._after(dim), start, end))
        if rows.kind != "logits" or rows.source.classes is not None:
            return None
        return replace(rows, source=replace(rows.source, classes=(start, end)))

    def _bounds(self, dim: int) -> tuple[int, int | None] | None:
        """Start of a slice, and its end counted from the end; `None` where they would not hold at another size."""
        start, end = argument(self.value, 2, "start") or 0, argument(self.value, 3, "end")
        length = self.operand.tensor.shape[dim]
        if isinstance(start, torch.SymInt) or (start < 0 and isinstance(length, torch.SymInt)):
            return None
        left_out = 0 if end in (None, sys.maxsize) else length - end
        if isinstance(end, int) and end < 0:
            left_out = -end
        if isinstance(left_out, torch.SymInt):
            if not left_out.node.expr.is_number:
                return None
            left_out = int(left_out.node.expr)
        start = max(start + int(length), 0) if start < 0 else start
        return start, -left_out if left_out > 0 else None

    def _selected(self) -> Rows | None:
        rows, shape = self.rows, self.operand.shape
        dim = argument(self.value, 1, "dim", 0) % len(shape)
        if dim == rows.dim:
            return None
        index = self.value.output if self.op is aten.unbind.int else self.args[2]
        if not isinstance(index, int):
            return None
        chosen = replace(rows, dim=rows.dim - (dim < rows.dim))
        lead = self._lead()
        if dim == 0 and rows.source.lane is None and rows.lead in (None, lead):
            # A loop over the first dimension, until it turns out that it is not.
            lane = Lane(self.operand, lead, index % shape[dim])
            return replace(chosen, source=replace(rows.source, lane=lane))
        return self._choose(chosen, ("select", self._after(dim), index))

    def _lead(self) -> tuple[int, ...]:
        """The leading sizes."""
        return (*self.operand.shape[: self.rows.dim], *self.operand.shape[self.rows.dim + 1 :])

    def _after(self, dim: int) -> int:
        """How many leading dimensions come after one."""
        return len(self._lead()) - 1 - (dim - (dim > self.rows.dim))

    def _choose(self, moved: Rows, choice: Choice) -> Rows | None:
        """Add a choice; `moved` says where the classes are after it."""
        source, lead = self.rows.source, self._lead()
        if source.lane is not None:
            return None
        if self.rows.lead not in (None, lead):  # flattened since the last choice
            if lead != (math.prod(self.rows.lead or ()),):
                return None
            source = replace(source, choices=(*source.choices, ("flatten",)))
        first = lead if source.lead is None else source.lead
        left = (*self.value.shape[: moved.dim], *self.value.shape[moved.dim + 1 :])
        return replace(moved, source=replace(source, choices=(*source.choices, choice), lead=first), lead=left)

    def _arithmetic(self) -> Rows | None:
        op, rows, source = self.op, self.rows, self.rows.source
        if op in TANH:
            is_first = rows.kind == "logits" and not source.softcap
            return replace(rows, source=replace(source, softcap=1.0)) if is_first else None
        if op in NEG:
            return self._scaled(-1.0)
        other = self.args[1] if self.args[0] is self.operand else self.args[0]
        factor = constant(other)
        if op in MUL and factor:
            return self._scaled(factor)
        if op in MUL and isinstance(other, Value):
            return self._weighted(other)
        if op in DIV and factor and other is self.args[1]:
            return self._scaled(1.0 / factor)
        if argument(self.value, 2, "alpha", 1) != 1:
            return None
        if op in ADD and isinstance(other, Value) and self._is_of_classes(other):
            is_linear = rows.kind == "logits" and not source.softcap and source.classes is None
            if not is_linear or self.value.shape != self.operand.shape or other in self.trail:
                return None
            return replace(rows, source=replace(source, biases=(*source.biases, (other, 1.0 / source.scale))))
        if op in SUB and other is self.args[1] and rows.kind == "logits":
            keeps = (*self.operand.shape[: rows.dim], 1, *self.operand.shape[rows.dim + 1 :])
            is_lse = self.trail.tokens.get(other) == Tokens((Term("lse", source),)) and other.shape == keeps
            return replace(rows, kind="log probs") if is_lse else None
        return None

    def _scaled(self, factor: float) -> Rows | None:
        rows, source = self.rows, self.rows.source
        if rows.kind == "log probs":
            return replace(rows, sign=rows.sign * factor)
        if rows.kind != "logits":
            return None
        if not source.softcap:
            return replace(rows, source=replace(source, scale=source.scale * factor))
        if source.softcap != 1.0 or factor <= 0:
            return None
        # cap * tanh(z / cap); an inner factor that is not 1 / cap is a scale.
        return replace(rows, source=replace(source, softcap=factor, scale=source.scale * factor))

    def _weighted(self, other: Value) -> Rows | None:
        rows = self.rows
        if rows.kind != "log probs" or rows.class_weight is not None or rows.picked is not None:
            return None
        if (ids := self._one_hot(other)) is not None:
            return replace(rows, picked=ids)
        if self._is_of_classes(other) and is_apart(other, self.value, self.trail, self.shadow):
            return replace(rows, class_weight=origin(other))
        return None

    def _is_of_classes(self, other: Value) -> bool:
        """Whether a value has one number for each class, the same for all tokens."""
        rank, sizes = len(self.operand.shape), other.shape
        aligned = (1,) * (rank - len(sizes)) + sizes
        classes = self.operand.shape[self.rows.dim]
        return len(aligned) == rank and aligned[self.rows.dim] == classes and math.prod(aligned) == classes

    def _one_hot(self, mask: Value) -> Value | None:
        """The classes that a mask of zeros and ones marks, one for each token."""
        while mask.op in CASTS:
            mask = mask.args[0]
        is_last = self.rows.dim == len(self.operand.shape) - 1
        if mask.op is not aten.eq.Tensor or mask.shape != self.operand.shape or not is_last:
            return None
        ids, counter = mask.args[:2]
        is_counter = origin(counter).op in ARANGE and counter.shape == mask.shape[-1:]
        return ids if is_counter and ids.shape[-1] == 1 else None

    def _over_classes(self) -> Tokens | None:
        rows = self.rows
        dims = [d % len(self.operand.shape) for d in self.args[1]]
        if rows.kind != "log probs" or dims != [rows.dim]:
            return None
        per_class: tuple[Any, ...] = (("per class",),) if self.op in MEAN else ()
        if rows.picked is not None:
            tokens = picked(rows, rows.picked)
            return None if tokens is None else tokens.then(*per_class)
        return Tokens((Term("smooth", rows.source, (), rows.class_weight, per_class, -rows.sign),))

    def _indexed(self) -> Tokens | None:
        """`log_probs[arange(tokens), target]`; that it counts all tokens is for the proof to see."""
        indices = self.args[1]
        if len(self.operand.shape) != 2 or self.rows.dim != 1 or len(indices) != 2 or None in indices:
            return None
        counter, target = indices
        is_one_each = target.shape == counter.shape == self.value.shape == self.operand.shape[:1]
        return picked(self.rows, target) if is_one_each and origin(counter).op in ARANGE else None

    def _nll(self) -> Tokens | None:
        _, target, class_weight, reduction, ignore_index = self.args[:5]
        rows = self.rows
        if rows.kind != "log probs" or rows.class_weight is not None or rows.picked is not None:
            return None
        if rows.dim != min(1, len(self.operand.shape) - 1):
            return None
        step = ("nll", int(ignore_index), REDUCTIONS[reduction], class_weight)
        term = Term("nll", rows.source, (origin(target),), None, (step,), rows.sign)
        return Tokens((term,), is_summed=REDUCTIONS[reduction] != "none")
