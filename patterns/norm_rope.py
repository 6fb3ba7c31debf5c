"""RMSNorm of queries or keys and the rotation after it, as one op.

    rope(rms_norm(x, weight), cos, sin)   ->   graphfuse::norm_rope(x, weight, cos, sin, ...)

Anchor: a rotation that `rope` has found, whose `x` is, but for the order of its dimensions, the result of a norm that
`rms_norm` has found, and the only reader of it. What either of them computes is known by then; the norm is over the
features of a head, or, where a projection is cut into heads after the norm, over those of all heads.

Papers: Henry et al. 2020, https://arxiv.org/abs/2010.04245; Su et al. 2021, https://arxiv.org/abs/2104.09864
Left alone: norms that somebody else reads too, and rotations of features in the middle: two ops, then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import norm_rope as _  # noqa: F401  (registers the op)
from graphfuse.kernels._norm_rope_launch import fits_across
from graphfuse.match import IDENTITIES, VIEWS, Match, Pattern, Refusal
from graphfuse.patterns import rms_norm, rope
from graphfuse.shadow import Shadow, Value

aten = torch.ops.aten


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every rotation that follows a norm."""
    norms = {found.anchor: found for found in rms_norm.find(shadow) if isinstance(found, Match)}
    if not norms:
        return
    for rotation in rope.find(shadow):
        if isinstance(rotation, Match) and (match := _joined(rotation, norms, shadow)) is not None:
            yield match


def _joined(rotation: Match, norms: dict[Value, Match], shadow: Shadow) -> Match | None:
    x, *tables = rotation.inputs
    features = x.shape[-1]
    between, order, is_split = _path(x, norms)
    norm = norms.get(between[-1])
    if norm is None or not _fits(rotation, x, features, order, is_split):
        return None
    source, *weight = norm.inputs
    outputs, inputs = rotation.outputs, (source, *tables, *weight)
    region = set(shadow.cone(outputs, inputs))
    if any(value in shadow.escaping or not region.issuperset(value.users) for value in between):
        return None
    params = {**norm.params, "rotated_dtype": norm.params["out_dtype"], **rotation.params}
    across = order.index(len(order) - 2) if is_split else -1
    return Match(
        pattern="norm_rope",
        outputs=outputs,
        inputs=inputs,
        replacement=replacement,
        params={**params, "order": tuple(order), "features": features, "across": across, "tables": len(tables)},
        variant=f"{norm.variant.rpartition(', ')[0]}{' across heads' if is_split else ''}, {rotation.variant}",
        covers={"rms_norm": 1, "rope": 1},
        formula=f"{rotation.formula.removesuffix(' of x')} of {norm.formula}",
        rounding="; ".join(dict.fromkeys((norm.rounding, rotation.rounding))),
    )


def _path(x: Value, norms: dict[Value, Match]) -> tuple[list[Value], list[int], bool]:
    """Values from `x` back to a norm, the order of its dimensions in `x`, and whether heads were cut out on the way."""
    path, order, is_split = [x], list(range(len(x.shape))), False
    while (value := path[-1]) not in norms:
        if value.op in IDENTITIES:
            pass
        elif value.op is aten.transpose.int and not is_split:
            a, b = (dim % len(order) for dim in value.args[1:])
            swapped = {a: b, b: a}
            order = [swapped.get(dim, dim) for dim in order]
        elif value.op is aten.permute.default and not is_split:
            order = [value.args[1][dim] % len(order) for dim in order]
        elif value.op in VIEWS and not is_split and _cuts_heads(value):
            is_split = True
        else:
            break
        path.append(value.args[0])
    return path, order, is_split


def _cuts_heads(value: Value) -> bool:
    """Whether a view only turns the last dimension into two."""
    before = value.args[0].shape
    return len(value.shape) == len(before) + 1 and value.shape[:-2] == before[:-1]


def _fits(rotation: Match, x: Value, features: int, order: list[int], is_split: bool) -> bool:
    """Whether the op has this rotation: of the first or of the last features, and of heads that a program holds."""
    start, table = rotation.params["start"], rotation.inputs[1]
    rotated = table.shape[-1] * (2 if rotation.params["table"] == "shared" else 1)
    if 0 < start != features - rotated:
        return False
    return not is_split or fits_across(x.shape[order.index(len(order) - 2)], features, rotated)


def replacement(
    x: Tensor,
    *operands: Tensor,
    order: tuple[int, ...],
    features: int,
    tables: int,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    rotated_dtype: torch.dtype,
    **rotation: Any,
) -> Tensor:
    """What stands in the place of the region."""
    if tables == 1:  # complex
        parts = torch.view_as_real(operands[0].resolve_conj())
        cos, sin = parts.select(-1, 0), parts.select(-1, 1)
    else:
        cos, sin = operands[:2]
    weight = operands[tables] if len(operands) > tables else None
    if rotation["across"] >= 0:
        x = x.unflatten(-1, (-1, features))
    if order != tuple(sorted(order)):
        x = x.permute(order)
    norm = (eps, gain, offset, mode, normalized_dtype, rotated_dtype)
    names = ("layout", "out_layout", "table", "reverse", "start", "across", "out_dtype")
    result: Tensor = torch.ops.graphfuse.norm_rope.default(x, weight, cos, sin, *norm, *(rotation[n] for n in names))
    return result


PATTERN = Pattern("norm_rope", find, "the norm and the rotation in one pass over memory each way")
