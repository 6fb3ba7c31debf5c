"""Cross-entropy of logits that are there, however the loss is spelled.

    what the tokens' losses add up to, or they themselves   ->   graphfuse::token_losses(logits, target, ...)

Anchor: a softmax that meets a target. The losses are those of `linear_cross_entropy`, which has been tried before: here
the logits are an input of the graph, or are read by something else too, or come out of what is no matrix product. From
the softmax the way leads back over casts, scales and a soft-cap, to the earliest logits from which `_logits.py` can
follow it forward again; the shift of a language model by slicing becomes one of the targets, so that nothing is copied.

Left alone: a few classes, whose rows Inductor holds in registers and reads once as well; log-probabilities that
something else reads, for they are as large as the logits; under Inductor, logits that it would not store.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphfuse.kernels import cross_entropy as _  # noqa: F401  (registers the ops)
from graphfuse.match import CASTS, DIV, IDENTITIES, MUL, Match, Pattern, Refusal, argument, short, unreachable
from graphfuse.patterns._head import (
    RESHAPES,
    TRANSPOSES,
    Obstacle,
    Rows,
    Source,
    Trail,
    constant,
    origin,
    permutation,
    same_place,
)
from graphfuse.patterns._head_formula import formula
from graphfuse.patterns._logits import NLL, PRODUCTS, TANH, follow
from graphfuse.patterns._losses import losses_of, normal, positive
from graphfuse.patterns._token_program import NotExpressible, replacement_of_logits
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

NAME = "cross_entropy"
COVERS = {NAME: 1}
# Rows up to here are one block of Inductor's reductions ("persistent"): read once, and held for all that follows.
MIN_CLASSES = 1025
# What Inductor computes in a kernel of its own, so that its result is in memory whoever reads it.
STORING = {LEAF, *PRODUCTS, aten.baddbmm.default, aten.convolution.default}
APART = "use the loss of each token instead: its negative is the log-probability of the target"


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every loss that is still in the graph."""
    known: set[Value] = set()  # what is made of losses that were found
    refusals: dict[Value, Refusal] = {}
    for softmax in _softmaxes(shadow):
        found = _of_softmax(softmax, known, shadow)
        if isinstance(found, Refusal):
            refusals.setdefault(found.anchor, found)
        elif found is not None:
            yield found
    yield from (refusal for anchor, refusal in refusals.items() if anchor not in known)


def _softmaxes(shadow: Shadow) -> list[Value]:
    """Those that no rewrite has taken away, and that may be part of a loss."""
    has_log = any(value.op is aten.log.default for value in shadow.values)
    kinds = {aten._log_softmax.default, aten.logsumexp.default, *([aten._softmax.default] if has_log else [])}
    return [value for value in shadow.values if value.op in kinds and not shadow.is_gone(value)]


def _of_softmax(softmax: Value, known: set[Value], shadow: Shadow) -> Match | Refusal | None:
    """The match on the earliest logits that lead over the softmax to a loss; or why the latest lead to none."""
    logits, dims = softmax.args[:2]
    dims = [dims] if isinstance(dims, int) else dims
    if len(dims) != 1 or is_traceable_wrapper_subclass(logits.tensor):
        return None
    dim = dims[0] % len(logits.shape)
    is_last = dim == len(logits.shape) - 1
    refusal = None
    for start in [*_before(logits, dim, shadow), logits]:
        rows = Rows(Source(start), "logits", dim if start is logits else len(start.shape) - 1)
        (trail,) = follow(shadow, {start: rows})
        anchor = trail.anchor
        if anchor is None or not known.isdisjoint(trail.tokens):
            continue
        if logits.shape[dim] < MIN_CLASSES:
            reason = f"logits: expected at least {MIN_CLASSES} classes, got {logits.shape[dim]}"
            return Refusal(NAME, anchor, reason, COVERS) if anchor.op in NLL else None
        try:
            if start is logits and not is_last:
                raise Obstacle(f"logits: expected the classes in the last dimension, got them in one of {logits.shape}")
            match = _match(trail, shadow)
        except (Obstacle, NotExpressible) as obstacle:
            refusal = Refusal(NAME, anchor, str(obstacle), COVERS, getattr(obstacle, "hint", ""))
            continue
        known.update(trail.tokens)
        return match
    return refusal


def _before(logits: Value, dim: int, shadow: Shadow) -> list[Value]:
    """What the logits were before casts, scales, a soft-cap and moves, with the classes last; the earliest first."""
    found: list[Value] = []
    value = logits
    while (step := _below(value, dim)) is not None:
        value, dim = step
        is_row = len(value.shape) > 1 and dim == len(value.shape) - 1
        if is_row and unreachable(value, shadow) is None:
            found.insert(0, value)
    return found


def _below(value: Value, dim: int) -> tuple[Value, int] | None:
    """What the value was before one operation, and where its classes were."""
    op = value.op
    operands = [arg for arg in value.args if isinstance(arg, Value) and constant(arg) is None]
    if op is LEAF or len(operands) != 1 or op._schema.is_mutable:
        return None
    (below,) = operands
    if op in CASTS:  # a narrowing one makes something smaller to read
        is_wider = below.dtype.is_floating_point and below.dtype.itemsize <= value.dtype.itemsize
        return (below, dim) if is_wider else None
    if op in RESHAPES:
        place = same_place(value.shape, dim, below.shape)
        return None if place is None else (below, place)
    if op in TRANSPOSES:
        return below, permutation(value)[dim]
    if op in IDENTITIES | MUL | DIV | TANH or op is aten.slice.Tensor:
        return below, dim
    if op in (aten.select.int, aten.unbind.int):
        chosen = argument(value, 1, "dim", 0) % len(below.shape)
        return below, dim + (chosen <= dim)
    return None


def _match(trail: Trail, shadow: Shadow) -> Match:
    _check_small(trail, shadow)
    losses = losses_of(trail, shadow, slices_targets=True)
    (logits,) = trail.starts
    lead = logits.shape[:-1]
    if losses.source.lead not in (None, lead):
        raise Obstacle(f"logits: expected rows to be chosen where they are, got them as {losses.source.lead}")
    if losses.source.biases:
        raise Obstacle("logits: expected nothing to be added to them, got a bias")
    inputs, params, samplers = losses.describe([logits], shadow)
    is_stored = origin(logits).op in STORING or logits in shadow.escaping
    return Match(
        pattern=NAME,
        outputs=losses.outputs,
        inputs=tuple(inputs.values),
        replacement=replacement_of_logits,
        params=params,
        variant=", ".join([*losses.words(), short(logits.dtype)]),
        covers=COVERS,
        samplers={**dict.fromkeys(range(1, len(inputs.values)), positive), **samplers, 0: normal},
        scalable=frozenset(losses.scalable(lead)),
        formula=formula(losses.terms, losses.source, is_total=losses.is_total, is_given=True),
        rounding=f"logits read in {short(logits.dtype)}, softmax and losses in float32",
        frees="logits",
        stored=None if is_stored else logits,
    )


def _check_small(trail: Trail, shadow: Shadow) -> None:
    """What is as large as the logits has to go with the region."""
    for value, rows in trail.rows.items():
        if rows.kind == "logits":
            continue
        if value in shadow.escaping:
            raise Obstacle("log-probabilities: expected no use besides the loss, got an output of the graph", APART)
        for user in value.users:
            if user not in trail and not (user.op in NLL and user.output):
                reason = f"log-probabilities: expected no use besides the loss, got {user.op} in {user.node.name}"
                raise Obstacle(reason, APART)


PATTERN = Pattern(NAME, find, "the logits are read once each way, and nothing of their size is kept or made in float32")
