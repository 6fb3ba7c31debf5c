"""RMSNorm, by algebra.

    x * gain * (mean(x ** 2) + eps) ** -1/2 * (offset + weight)   ->   graphfuse::rms_norm(x, weight, eps, ...)

Anchor: a reduction of a square over the last dimension. From there every value is followed as `c * (a * S + b) ** p`,
`S = sum(x ** 2)`, through scalar arithmetic, roots, clamps and casts, however they are spelled. Where it meets `x`
again with `p = -1/2` (or in a division with `p = 1/2`), eps and gain can be read off. The casts passed on the way say
where the original rounds: before the weight (Llama), or once at the end (Gemma, OLMo 2).

Paper: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
Left alone: norms over more than the last dimension; LayerNorm written out (`x - mean(x)` squared).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphfuse import algebra
from graphfuse.kernels import rms_norm as _  # noqa: F401  (registers the op)
from graphfuse.match import (
    DIV,
    INDEXING,
    MUL,
    Match,
    Pattern,
    Refusal,
    is_cast,
    is_last,
    narrows,
    rounded,
    scalar,
    short,
    strip,
    unrounded,
)
from graphfuse.patterns._mean import centred
from graphfuse.patterns._statistic import Statistic, follow, inverse_root, start, weight_of
from graphfuse.shadow import Shadow, Value, hint

aten = torch.ops.aten

HINT = "normalise over the last dimension: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)"
FUSED = {aten._fused_rms_norm.default} if hasattr(aten, "_fused_rms_norm") else set()


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every RMSNorm of the shadow, with its weight where it has one."""
    statistics: dict[Value, Statistic] = {}
    met: set[Value] = set()
    for value in shadow.values:
        if value.op in FUSED and value.output == 0:
            yield from _fused(value)
            continue
        statistic = start(value) or follow(value, statistics)
        if statistic is not None and not _is_layer_norm(statistic):
            statistics[value] = statistic
        for found in _meet(value, statistics, shadow):
            met.update(value.operands())
            yield found
    yield from _alone(statistics, met)


def _alone(statistics: dict[Value, Statistic], met: set[Value]) -> Iterator[Refusal]:
    """Refusals of inverse root mean squares that go to something else than x."""
    for value, statistic in statistics.items():
        if not statistic.is_norm or statistic.obstacle or value in met or statistic.floor or not statistic.b:
            continue
        for user in value.users:
            other = next((arg for arg in user.operands() if arg is not value), None)
            if user not in statistics and user not in met and user.op in MUL and other is not None:
                reason = f"x: expected to meet its own inverse root mean square, got {other.op} in {other.node.name}"
                yield Refusal(
                    "rms_norm", user, reason, {"rms_norm": 1}, "multiply x itself by the rsqrt of its mean square"
                )
                break


def _is_layer_norm(statistic: Statistic) -> bool:
    """Whether the mean was subtracted before, over the same dimension."""
    found = centred(statistic.x)
    return found is not None and (bool(statistic.obstacle) or is_last(found.dims, found.x))


def _meet(value: Value, statistics: dict[Value, Statistic], shadow: Shadow) -> Iterator[Match | Refusal]:
    """A match where `x` is multiplied by its statistic, or divided by it."""
    if value.op not in MUL | DIV or len(value.args) != 2 or value.kwargs:
        return
    left, right = value.args
    if not (isinstance(left, Value) and isinstance(right, Value)):
        return
    pairs = [(left, right)] if value.op in DIV else [(left, right), (right, left)]
    for x, by in pairs:
        if by not in statistics or x in statistics:
            continue
        statistic = statistics[by] if value.op in MUL else statistics[by].power(-1.0)
        if statistic is None or not statistic.is_norm:
            continue
        if (weight := _times_weight(x, statistic)) is not None:
            statistic = dataclasses.replace(statistic, weight=weight)
        elif _still(x) is not _still(statistic.x):
            continue
        if value.shape != x.shape:
            statistic = dataclasses.replace(
                statistic, obstacle=f"shape: expected that of x, {x.shape}, got {value.shape}"
            )
        if statistic.obstacle:
            yield Refusal("rms_norm", value, statistic.obstacle, {"rms_norm": 1}, HINT)
        else:
            yield _with_weight(value, statistic, shadow)
        return


def _times_weight(value: Value, statistic: Statistic) -> tuple[Value, float] | None:
    """The weight, if the value is `x * weight`: the product is made before the norm, as Python's precedence has it."""
    product = strip(value)
    if product.op not in MUL or len(product.args) != 2 or statistic.weight is not None:
        return None
    left, right = product.args
    for x, weight in ((left, right), (right, left)):
        if isinstance(x, Value) and isinstance(weight, Value) and _still(x) is _still(statistic.x):
            return weight_of(weight, statistic.width)
    return None


def _still(value: Value) -> Value:
    """The value before casts, copies and views that change nothing."""
    value = strip(value)
    while value.op in INDEXING and value.shape == value.args[0].shape and _strides(value) == _strides(value.args[0]):
        value = strip(value.args[0])
    return value


def _strides(value: Value) -> tuple[int, ...]:
    return tuple(hint(stride) for stride in value.tensor.stride())


def _with_weight(core: Value, statistic: Statistic, shadow: Shadow) -> Match:
    """Extend the bare norm over the casts, constant factors and the weight that follow it."""
    gain = statistic.gain
    weight, offset = statistic.weight or (None, 0.0)
    normalized_dtype = core.dtype
    best = (core, gain, weight, offset, normalized_dtype)  # as far as the result of a graph node
    value = core
    while (user := shadow.sole_user(value)) is not None:
        if is_cast(user):
            if narrows(user) and weight is None:
                normalized_dtype = user.dtype
            ends_here = narrows(user)
        elif user.op in MUL and len(user.args) == 2:
            factor = user.args[0] if user.args[1] is value else user.args[1]
            constant = scalar(factor)
            found = weight_of(factor, statistic.width) if isinstance(factor, Value) else None
            if constant is not None and weight is None and value.dtype == core.dtype:
                gain *= constant
            elif found is not None and weight is None and user.shape == core.shape:
                weight, offset = found
                normalized_dtype = value.dtype
            else:
                break
            ends_here = True
        else:
            break
        value = user
        if ends_here and (value in shadow.node_of or best[0] not in shadow.node_of):
            best = (value, gain, weight, offset, normalized_dtype)
    output, gain, weight, offset, normalized_dtype = best
    x = unrounded(statistic.x)
    params = {
        "eps": statistic.eps,
        "gain": gain,
        "offset": offset,
        "mode": statistic.mode,
        "normalized_dtype": normalized_dtype if weight is not None else output.dtype,
        "out_dtype": output.dtype,
    }
    return _match(output, x, weight, params)


def _fused(value: Value) -> Iterator[Match | Refusal]:
    """torch's own fused operation, which CUDA graphs hold in the place of `F.rms_norm`."""
    x, shape, weight, eps = (*value.args, None, None)[:4]
    if len(shape) != 1:
        yield Refusal(
            "rms_norm", value, f"normalized_shape: expected one dimension, got {list(shape)}", {"rms_norm": 1}, HINT
        )
        return
    params = {
        "eps": torch.finfo(torch.float32).eps if eps is None else float(eps),
        "gain": 1.0,
        "offset": 0.0,
        "mode": "inside",
        "normalized_dtype": torch.float32 if x.dtype.itemsize < 4 else x.dtype,
        "out_dtype": value.dtype,
    }
    yield _match(value, x, weight, params)


def _match(output: Value, x: Value, weight: Value | None, params: dict[str, Any]) -> Match:
    rounding = "" if weight is None else "weight after cast" if _rounds_early(params) else "weight before cast"
    formula = "no weight" if weight is None else "1 + weight" if params["offset"] == 1.0 else "weight"
    words = [formula, rounding, str(params["mode"]).replace("inside", ""), short(x.dtype)]
    return Match(
        pattern="rms_norm",
        outputs=(output,),
        inputs=(x,) if weight is None else (x, weight),
        replacement=replacement,
        params=params,
        variant=", ".join(word for word in words if word),
        covers={"rms_norm": 1},
        formula=_formula(params, weight),
        rounding=rounded(output.dtype, None if weight is None else params["normalized_dtype"]),
    )


def _formula(params: dict[str, Any], weight: Value | None) -> str:
    x = algebra.symbol("x")
    root = inverse_root(params["mode"], algebra.apply("mean", x**2), params["eps"])
    gain = algebra.number(params["gain"])
    scale = 1 if weight is None else algebra.total(algebra.number(params["offset"]), algebra.symbol("w"))
    return algebra.write(algebra.product(x, gain, root, scale))


def _rounds_early(params: dict[str, object]) -> bool:
    dtype = params["normalized_dtype"]
    return isinstance(dtype, torch.dtype) and dtype.itemsize < 4


def replacement(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """What stands in the place of the region."""
    result: Tensor = torch.ops.graphfuse.rms_norm.default(
        x, weight, eps, gain, offset, mode, normalized_dtype, out_dtype
    )
    return result


PATTERN = Pattern("rms_norm", find, "one pass over memory each way, and backward keeps x alone")
