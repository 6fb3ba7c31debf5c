"""What a head is made of: the hidden states and the weight of each product in the sum that its logits are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphfuse.match import CASTS, IDENTITIES
from graphfuse.patterns._head import (
    RESHAPES,
    TRANSPOSES,
    Obstacle,
    Source,
    keeps_order,
    permutation,
    same_place,
)
from graphfuse.shadow import Shadow, Value


@dataclass(frozen=True)
class Summand:
    """`factor * hidden @ weight.T`."""

    hidden: Value  # (*tokens, features)
    weight: Value
    is_transposed: bool  # the weight, which has one row for each class otherwise
    factor: float = 1.0


def summands(source: Source, shadow: Shadow) -> list[Summand]:
    """The products of a head, that of most features first; all their hidden states have the same leading sizes."""
    products = [(source.start, 1.0), *source.others]
    vocabulary = source.start.shape[-1]
    for bias, _ in source.biases:
        if bias.shape[-1:] != (vocabulary,) or math.prod(bias.shape) != vocabulary:
            raise Obstacle(f"bias: expected shape ({vocabulary},), got {bias.shape}")
    # By their leading sizes, those nearest to the model last.
    choices = [{v.shape[:-1]: v for v in _before_flattening(p.args[-2], shadow)} for p, _ in products]
    leads = [lead for lead in choices[0] if source.lead in (None, lead) and all(lead in found for found in choices)]
    if not leads:
        raise Obstacle(f"logits: expected the leading sizes of the hidden states, got {source.lead}")
    hidden = [found[leads[-1]] for found in choices]
    if not set(shadow.cone(hidden[1:], hidden[:1])).isdisjoint(product for product, _ in products):
        raise Obstacle("hidden: expected to be known before the logits that it is added to, got made of them")
    found = []
    for (product, factor), states in zip(products, hidden, strict=True):
        weight, is_upright = _matrix(product.args[-1])
        found.append(Summand(states, weight, not is_upright, factor))
    return found


def common_dtype(found: Sequence[Summand]) -> torch.dtype:
    """The dtype in which the op gets all products but the first: that of the first, or fp32."""
    first = found[0].hidden.dtype
    dtype = first
    for other in found[1:]:
        for value in (other.hidden, other.weight):
            dtype = torch.promote_types(dtype, value.dtype)
    if dtype not in (first, torch.promote_types(first, torch.float32)):
        raise Obstacle(f"hidden: expected {first} or float32 for a product that is added, got {dtype}")
    return dtype


def _before_flattening(value: Value, shadow: Shadow) -> list[Value]:
    """The hidden states, and what they were flattened from: the features last, the tokens in the same order."""
    found, dim = [value], len(value.shape) - 1
    while value.op in RESHAPES | IDENTITIES | TRANSPOSES:
        below = value.args[0]
        if value.op in RESHAPES:
            place = same_place(value.shape, dim, below.shape)
            if place is None:
                break
            dim = place
        elif value.op in TRANSPOSES:
            order = permutation(value)
            if not keeps_order(order, order[dim], below.shape):
                break
            dim = order[dim]
        value = below
        if dim == len(value.shape) - 1:
            found.append(value)
    return [value for value in found if _is_held(value, shadow)] or found


def _is_held(value: Value, shadow: Shadow) -> bool:
    """Whether a node returns the value, or what it is a cast or a copy of."""
    while value not in shadow.node_of and value.op in CASTS | IDENTITIES:
        value = value.args[0]
    return value in shadow.node_of


def _matrix(value: Value) -> tuple[Value, bool]:
    """The matrix that the value is, or is the transpose of: which of both. Dimensions of size 1 do not matter."""
    found: tuple[Value, bool] | None = None
    is_transposed = False
    while True:
        if len(value.shape) == 2:
            found = (value, is_transposed)
        if value.op in TRANSPOSES:
            order = [d for d in permutation(value) if value.args[0].shape[d] != 1]
            is_transposed ^= order != sorted(order)
        elif value.op in RESHAPES:
            if [s for s in value.shape if s != 1] != [s for s in value.args[0].shape if s != 1]:
                break
        elif value.op not in IDENTITIES:
            break
        value = value.args[0]
    if found is None:
        raise Obstacle(f"weight: expected a matrix, got {value.shape}")
    return found
