"""Residual add and RMSNorm, in either order, as one op.

    total = x + residual; rms_norm(total, weight)   ->   graphfuse::add_rms_norm(x, residual, weight, ...)
    residual + rms_norm(x, weight)                  ->   graphfuse::rms_norm_add(x, residual, weight, ...)

Anchor: a norm that `rms_norm` has found whose input is a sum of two tensors of its shape, or whose result goes into
such a sum and nowhere else. Where a sum lies between two norms, it belongs to the second one: that saves more.

Paper: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
Left alone: sums of what a pointwise operation has just made (a dropout, a scaled residual). The compiler behind us
makes one kernel of those and the sum, which an op between them would break up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphfuse.kernels import add_rms_norm as _  # noqa: F401  (registers the ops)
from graphfuse.match import Match, Pattern, Refusal, number, short
from graphfuse.patterns import rms_norm
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every norm before or after a residual add."""
    norms = {found.anchor: found for found in rms_norm.find(shadow) if isinstance(found, Match)}
    totals: set[Value] = set()
    for norm in norms.values():
        if (match := _before(norm, norms, totals, shadow)) is not None:
            totals.add(norm.inputs[0])
            yield match
    for norm in norms.values():
        if norm.inputs[0] not in totals and (match := _after(norm, norms, totals, shadow)) is not None:
            yield match


def _before(norm: Match, norms: dict[Value, Match], totals: set[Value], shadow: Shadow) -> Match | None:
    """The match if the norm's input is a sum."""
    total, *weight = norm.inputs
    terms = _terms(total)
    if terms is None or total in totals or total not in shadow.node_of:
        return None
    if not all(_is_there(term, norms, shadow) for term in terms):
        return None
    return Match(
        pattern="add_rms_norm",
        outputs=(norm.anchor, total),  # the report names the norm's module
        inputs=(*terms, *weight),
        replacement=add_then_norm,
        params={**norm.params, "total_dtype": total.dtype},
        variant=f"add before, {norm.variant}",
        covers={"rms_norm": 1},
        formula=f"{norm.formula}, x = a + b",
        rounding=f"sum {short(total.dtype)}; {norm.rounding}",
    )


def _after(norm: Match, norms: dict[Value, Match], totals: set[Value], shadow: Shadow) -> Match | None:
    """The match if a sum is all that reads the norm's result."""
    total = shadow.sole_user(norm.anchor)
    terms = None if total is None else _terms(total)
    if total is None or terms is None or total in totals or total not in shadow.node_of:
        return None
    residual = terms[0] if terms[1] is norm.anchor else terms[1]
    if residual is norm.anchor or not _is_there(residual, norms, shadow):
        return None
    x, *weight = norm.inputs
    return Match(
        pattern="add_rms_norm",
        outputs=(total,),
        site=norm.anchor,  # its module, and not the one that adds
        inputs=(x, residual, *weight),
        replacement=norm_then_add,
        params={**norm.params, "rounded_dtype": norm.params["out_dtype"], "out_dtype": total.dtype},
        variant=f"add after, {norm.variant}",
        covers={"rms_norm": 1},
        formula=f"residual + {norm.formula}",
        rounding=f"{norm.rounding}; sum {short(total.dtype)}",
    )


def _terms(total: Value) -> tuple[Value, Value] | None:
    """The two tensors that the value is the sum of."""
    if total.op is not aten.add.Tensor or number(total.kwargs.get("alpha", 1)) != 1.0:
        return None
    left, right = total.args
    if not (isinstance(left, Value) and isinstance(right, Value)) or left is right:
        return None
    fits = all(term.shape == total.shape and term.dtype.is_floating_point for term in (left, right))
    return (left, right) if fits and len(total.shape) > 1 else None


def _is_there(term: Value, norms: dict[Value, Match], shadow: Shadow) -> bool:
    """Whether the term is in memory anyway: made by an op, or read by others too."""
    if term.op is LEAF or term in norms or torch.Tag.pointwise not in term.op.tags:
        return True
    return shadow.sole_user(term) is None


def add_then_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    total_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What stands in the place of the norm of a sum, and of the sum."""
    dtypes = (normalized_dtype, total_dtype, out_dtype)
    results = torch.ops.graphfuse.add_rms_norm.default(x, residual, weight, eps, gain, offset, mode, *dtypes)
    return results[1], results[0]


def norm_then_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    rounded_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """What stands in the place of a norm and the sum with it."""
    dtypes = (normalized_dtype, rounded_dtype, out_dtype)
    result: Tensor = torch.ops.graphfuse.rms_norm_add.default(x, residual, weight, eps, gain, offset, mode, *dtypes)
    return result


PATTERN = Pattern("add_rms_norm", find, "the sum and the norm in one pass over memory each way")
