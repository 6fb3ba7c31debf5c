"""Numbers per token followed forward: what stays linear in them, up to their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from graphfuse.match import ADD, CASTS, DIV, IDENTITIES, MUL, SUB, argument, scalar
from graphfuse.patterns._head import MEAN, NEG, RESHAPES, SUM, Rows, Term, Tokens, Trail, constant, origin, size
from graphfuse.shadow import Shadow, Value

aten = torch.ops.aten

FILL = {aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
SQUARE = {aten.pow.Tensor_Scalar, aten.pow_.Scalar, aten.square.default}
JOIN = {aten.stack.default, aten.cat.default}
ZEROS = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default}


def of_tokens(tokens: Tokens, operand: Value, value: Value, trail: Trail, shadow: Shadow) -> Tokens | None:
    """What the operation of `value` makes of numbers per token; `None` if that is not linear in them."""
    op = value.op
    if op in CASTS:
        return tokens if value.dtype.is_floating_point else None
    if op in IDENTITIES | RESHAPES or (op is aten.expand.default and operand.shape == value.shape):
        return tokens
    if op in NEG:
        return tokens.times(-1.0)
    if op in MUL | DIV:
        other = value.args[0] if value.args[1] is operand else value.args[1]
        if other is operand:
            return _squared(tokens) if op in MUL else None
        if (number := constant(other)) is not None:
            return tokens.times(number if op in MUL else 1.0 / number) if number else None
        if op in DIV and value.args[0] is not operand:
            return None
        return _with_operand(tokens, "mul" if op in MUL else "div", other, operand, value, trail, shadow)
    if op in ADD | SUB:
        return _added(tokens, value, trail)
    if op in SQUARE and (op is aten.square.default or scalar(value.args[1]) == 2):
        return _squared(tokens)
    if op in FILL and scalar(value.args[2]) == 0:
        return _with_operand(tokens, "fill", value.args[1], operand, value, trail, shadow)
    if op is aten.where.self:
        other = value.args[1] if value.args[2] is operand else value.args[2]
        is_zero = scalar(other) == 0 or (isinstance(other, Value) and other.op in ZEROS)
        name = "keep" if value.args[1] is operand else "fill"
        return _with_operand(tokens, name, value.args[0], operand, value, trail, shadow) if is_zero else None
    if op in SUM | MEAN and not tokens.is_summed and size(value) == 1:
        return replace(tokens.then(("sum",) if op in SUM else ("mean",)), is_summed=True)
    return None


def is_apart(value: Value, made: Value, trail: Trail, shadow: Shadow) -> bool:
    """Whether the value is known before the logits are, and needs no gradient of what is made with it."""
    if value.tensor.requires_grad and made.grad_mode:
        return False
    return not set(trail.starts) & set(shadow.cone([value], []))


def _with_operand(
    tokens: Tokens, name: str, other: Any, operand: Value, value: Value, trail: Trail, shadow: Shadow
) -> Tokens | None:
    """A step with a number for each token, or one for all of them."""
    if not isinstance(other, Value) or value.shape != operand.shape:
        return None
    if other.shape not in (operand.shape, ()) or not is_apart(other, value, trail, shadow):
        return None
    return tokens.then((name, other))


def _added(tokens: Tokens, value: Value, trail: Trail) -> Tokens | None:
    """Sums and differences of such numbers; terms that differ in their coefficients only become one, or vanish."""
    first, second = value.args[:2]
    if argument(value, 2, "alpha", 1) != 1 or first not in trail.tokens or second not in trail.tokens:
        return None
    left, right = trail.tokens[first], trail.tokens[second]
    if left.is_summed is not right.is_summed or first.shape != second.shape:
        return None
    sums: dict[Term, float] = {}
    for term in (*left.terms, *(right if value.op in ADD else right.times(-1.0)).terms):
        like = replace(term, coefficient=1.0)
        sums[like] = sums.get(like, 0.0) + term.coefficient
    kept = tuple(replace(term, coefficient=c) for term, c in sums.items() if c)
    return Tokens(kept, tokens.is_summed) if kept else None


def _squared(tokens: Tokens) -> Tokens | None:
    if len(tokens.terms) != 1 or not tokens.is_pure or tokens.terms[0].loss != "lse":
        return None
    (term,) = tokens.terms
    return Tokens((replace(term, loss="square", coefficient=term.coefficient**2),))


def picked(rows: Rows, target: Value) -> Tokens | None:
    """The entry of each row at its target."""
    if rows.class_weight is not None:
        return None
    nll = Term("nll", rows.source, (origin(target),), coefficient=-rows.sign)
    if rows.kind == "log probs":
        return Tokens((nll,))
    return Tokens((Term("lse", rows.source), nll)) if rows.kind == "logits" else None


def joined(value: Value, trail: Trail) -> Tokens | None:
    """Numbers of all the rows that a loop took apart, put together again."""
    states = [trail.tokens[part] for part in value.args[0] if part in trail.tokens]
    lane = states[0].source.lane if states else None
    if lane is None or len(states) != len(value.args[0]) or argument(value, 1, "dim", 0) != 0:
        return None
    if [state.source.lane for state in states] != [replace(lane, index=k) for k in range(lane.lead[0])]:
        return None
    if any(not state.is_pure or len(state.terms) != len(states[0].terms) for state in states):
        return None
    terms = []
    for parts in zip(*(state.terms for state in states), strict=True):
        alike = {replace(part, targets=(), source=replace(part.source, lane=None)) for part in parts}
        if len(alike) != 1:
            return None
        targets = _whole([target for part in parts for target in part.targets])
        terms.append(replace(alike.pop(), targets=targets))
    return Tokens(tuple(terms))


def _whole(parts: Sequence[Value]) -> tuple[Value, ...]:
    """All parts of one tensor, in order, are that tensor."""
    if parts and all(part.op in (aten.unbind.int, aten.select.int) for part in parts):
        whole = parts[0].args[0]
        places = [
            (p.args[0], argument(p, 1, "dim", 0), p.output if p.op is aten.unbind.int else p.args[2]) for p in parts
        ]
        if places == [(whole, 0, k) for k in range(whole.shape[0])]:
            return (origin(whole),)
    return tuple(parts)
