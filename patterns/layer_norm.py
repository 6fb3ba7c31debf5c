"""LayerNorm, by algebra.

    (x - mean(x)) * gain * (var(x) + eps) ** -1/2 * (offset + weight) + bias   ->   graphfuse::layer_norm(x, ...)

Anchor: torch's own native_layer_norm, or where `x - mean(x)` meets the inverse root of its variance. A variance is a
sum of squares, `S = sum((x - mean(x)) ** 2)`, whether it is spelled so, as var, std, var_mean, as a norm, or as
mean(x ** 2) - mean(x) ** 2; from there it is followed as in `rms_norm`. Casts, constant factors, weight and bias that
come after are taken in.

Paper: Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450
Seen in: GPT-2, BERT, ViT (nn.LayerNorm), Cohere and DeBERTa (written out), Nemotron (1 + weight), OLMo (no weight).
Left alone: norms over more than the last dimension, the unbiased variance, values inside that something else reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphfuse import algebra
from graphfuse.kernels import layer_norm as _  # noqa: F401  (registers the op)
from graphfuse.match import (
    ADD,
    DIV,
    MUL,
    SUB,
    Match,
    Pattern,
    Refusal,
    argument,
    is_cast,
    is_last,
    narrows,
    number,
    rounded,
    scalar,
    short,
    strip,
    unrounded,
)
from graphfuse.patterns._mean import WITH_MEAN, Over, centred, mean_of
from graphfuse.patterns._statistic import (
    CLAMP_MIN,
    Statistic,
    follow,
    inverse_root,
    one_dimensional,
    squared,
    start,
    weight_of,
)
from graphfuse.shadow import Shadow, Value, hint

aten = torch.ops.aten

STD = {aten.std.correction, aten.std_mean.correction}
VARIANCES = {aten.var.correction} | STD | WITH_MEAN
COVERS = {"layer_norm": 1}


@dataclass(frozen=True)
class Norm:
    """A LayerNorm as far as it has been followed: what the op would be told."""

    core: Value  # x - mean(x), normalised
    output: Value  # the core, and what came after
    x: Value
    eps: float
    normalized_dtype: torch.dtype
    gain: float = 1.0
    mode: str = "inside"
    weight: Value | None = None
    offset: float = 0.0
    bias: Value | None = None

    @property
    def is_plain(self) -> bool:
        return self.weight is None and self.bias is None

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(value for value in (self.x, self.weight, self.bias) if value is not None)


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every LayerNorm of the shadow, with its weight and bias where it has them."""
    statistics: dict[Value, Statistic] = {}
    for value in shadow.values:
        found: Norm | Refusal | None = None
        if value.op is aten.native_layer_norm.default:
            found = _native(value) if value.output == 0 else None
        else:
            statistic = _variance(value, statistics) or follow(value, statistics)
            if statistic is not None:
                statistics[value] = statistic
            found = _meet(value, statistics)
        if isinstance(found, Norm):
            norm = _absorb(found, shadow)
            yield _used_elsewhere(norm, shadow) or _match(norm)
        elif found is not None:
            yield found


def _native(value: Value) -> Norm | Refusal:
    """torch's own operation: nn.LayerNorm and F.layer_norm."""
    x, shape, weight, bias, eps = value.args
    width = x.shape[-1]
    if len(shape) != 1:
        reason = f"normalized_shape: expected one dimension, got {[hint(n) for n in shape]}"
        return Refusal("layer_norm", value, reason, COVERS, "normalise over the last dimension alone")
    norm = Norm(value, value, unrounded(x), float(eps), torch.float32 if x.dtype.itemsize < 4 else x.dtype)
    if weight is not None:
        weight, offset = weight_of(weight, width) or (weight, 0.0)
        norm = dataclasses.replace(norm, weight=weight, offset=offset)
    if bias is not None:
        norm = dataclasses.replace(norm, bias=_vector(bias, width) or bias)
    return norm


def _variance(value: Value, statistics: dict[Value, Statistic]) -> Statistic | None:
    """The sum of squares of what is left of `x` without its mean, `x` being that of the statistic."""
    if value.op in VARIANCES and value.output == 0:
        return _of_variance(value)
    if value.op in SUB and isinstance(value.args[1], Value) and not value.kwargs:
        return _of_difference(*value.args)
    if value.op in CLAMP_MIN | {aten.relu.default} and value.args[0] in statistics:
        statistic = statistics[value.args[0]]  # a variance is not below zero
        at_zero = value.op is aten.relu.default or number(argument(value, 1, "min")) == 0.0
        upper = number(argument(value, 2, "max"))
        return statistic if at_zero and upper is None and statistic.b == 0.0 and statistic.c > 0 else None
    moment = start(value)
    found = centred(moment.x) if moment is not None else None
    if moment is None or found is None:
        return None
    return dataclasses.replace(moment, x=found.x, obstacle=_obstacle(found))


def _obstacle(over: Over) -> str:
    return "" if is_last(over.dims, over.x) else f"dim: expected the last one, got {over.dims}"


def _of_variance(value: Value) -> Statistic | None:
    """torch's variance and standard deviation."""
    x, dims = value.args[0], argument(value, 1, "dim")
    correction = number(value.kwargs.get("correction"))
    correction = 1.0 if correction is None else correction
    if not x.shape or x.shape[-1] <= correction:
        return None
    p = 0.5 if value.op in STD else 1.0
    return Statistic(x, x.shape[-1], a=1 / (x.shape[-1] - correction), p=p, obstacle=_obstacle(Over(x, dims)))


def _of_difference(left: Value, right: Value) -> Statistic | None:
    """mean(x ** 2) - mean(x) ** 2."""
    statistic, mean = start(strip(left)), squared(right)
    found = mean_of(mean) if mean is not None else None
    if statistic is None or found is None or strip(statistic.x) is not strip(found.x):
        return None
    is_mean = statistic.p == 1.0 and math.isclose(statistic.a * statistic.width, 1.0)
    return dataclasses.replace(statistic, x=found.x, obstacle=_obstacle(found)) if is_mean else None


def _meet(value: Value, statistics: dict[Value, Statistic]) -> Norm | Refusal | None:
    """A norm where `x - mean(x)` is multiplied by its inverse deviation, or divided by its deviation."""
    if value.op not in MUL | DIV or len(value.args) != 2 or value.kwargs:
        return None
    left, right = value.args
    if not (isinstance(left, Value) and isinstance(right, Value)):
        return None
    for product, by in [(left, right)] if value.op in DIV else [(left, right), (right, left)]:
        if by not in statistics:
            continue
        statistic = statistics[by] if value.op in MUL else statistics[by].power(-1.0)
        norm = _multiplied(value, product, statistic) if statistic is not None and statistic.is_norm else None
        if statistic is None or norm is None:
            continue
        obstacle, hint = statistic.obstacle, "normalise over the last dimension: x.mean(-1), x.var(-1, correction=0)"
        if math.isclose(statistic.a * (statistic.width - 1), 1.0) and statistic.width > 2:
            obstacle = f"variance: expected a division by {statistic.width}, got one by {statistic.width - 1}"
            hint = "use the biased variance: x.var(-1, keepdim=True, correction=0)"
        if value.shape != product.shape:
            obstacle = f"shape: expected that of x, {product.shape}, got {value.shape}"
            hint = "keep the reduced dimension: x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)"
        return Refusal("layer_norm", value, obstacle, COVERS, hint) if obstacle else norm
    return None


def _multiplied(core: Value, product: Value, statistic: Statistic) -> Norm | None:
    """The norm, if `product` is what is left of `x` without its mean, or that times a weight or a number."""
    found, gain, factor = centred(product), 1.0, None
    inner = strip(product)
    if found is None and inner.op in MUL and len(inner.args) == 2:
        left, right = inner.args
        for rest, other in ((left, right), (right, left)):
            if isinstance(rest, Value) and found is None:
                found, factor, inner = centred(rest), other, strip(rest)
    if found is None or strip(statistic.x) not in (strip(found.x), inner):  # without its mean it varies as much
        return None
    if bool(_obstacle(found)) != bool(statistic.obstacle):  # over different dimensions
        return None
    weight = statistic.weight
    if (constant := scalar(factor)) is not None:
        gain = constant
    elif isinstance(factor, Value) and (weight is not None or (weight := weight_of(factor, statistic.width)) is None):
        return None
    x = unrounded(found.x)
    if x is not unrounded(statistic.x) and strip(x) is strip(statistic.x):
        x = strip(x)  # one of the two was rounded on its own
    norm = Norm(core, core, x, statistic.eps, core.dtype, gain * statistic.gain, statistic.mode)
    return norm if weight is None else dataclasses.replace(norm, weight=weight[0], offset=weight[1])


def _absorb(norm: Norm, shadow: Shadow) -> Norm:
    """Extend the norm over the casts, constant factors, weight and bias that follow it."""
    best = norm  # as far as the result of a graph node
    while (user := shadow.sole_user(norm.output)) is not None:
        grown = _after(norm, user)
        if grown is None:
            break
        norm = grown
        ends_here = narrows(user) or not is_cast(user)
        if ends_here and (user in shadow.node_of or best.output not in shadow.node_of):
            best = norm
    return best


def _after(norm: Norm, user: Value) -> Norm | None:
    """The norm after one more operation, if that belongs to it."""
    if is_cast(user):
        return dataclasses.replace(norm, output=user)
    if user.op not in MUL | ADD or len(user.args) != 2 or number(user.kwargs.get("alpha", 1)) != 1.0:
        return None
    factor = user.args[0] if user.args[1] is norm.output else user.args[1]
    constant = scalar(factor)
    if constant is not None:
        is_gain = user.op in MUL and norm.is_plain and norm.output.dtype == norm.core.dtype
        return dataclasses.replace(norm, output=user, gain=norm.gain * constant) if is_gain else None
    if not isinstance(factor, Value) or user.shape != norm.core.shape:
        return None
    width = user.shape[-1]
    dtype = norm.output.dtype if norm.is_plain else norm.normalized_dtype
    grown = dataclasses.replace(norm, output=user, normalized_dtype=dtype)
    if user.op in MUL and norm.is_plain and (weight := weight_of(factor, width)) is not None:
        return dataclasses.replace(grown, weight=weight[0], offset=weight[1])
    if user.op in ADD and norm.bias is None and (bias := _vector(factor, width)) is not None:
        return dataclasses.replace(grown, bias=bias)
    return None


def _vector(value: Value, width: int) -> Value | None:
    """The value as one number per feature, before casts and views, if that is what it is."""
    value = one_dimensional(strip(value))
    return value if value.shape == (width,) and value.dtype.is_floating_point else None


def _used_elsewhere(norm: Norm, shadow: Shadow) -> Refusal | None:
    """Refuse a norm whose inside something else reads: it would still be computed, and the op come on top."""
    region = shadow.cone([norm.output], norm.inputs)
    # torch's own operation returns the mean and rstd too.
    inside = [v for v in shadow.values[norm.core.index + 1 : norm.core.index + 3] if v.args is norm.core.args]
    reached = {norm.x}
    for value in region:
        if not reached.isdisjoint(value.operands()):
            reached.add(value)
            if value is not norm.output and unrounded(value) is not norm.x:
                inside.append(value)
    for value in inside:
        other = next((user for user in value.users if user not in region), None)
        if value in shadow.escaping:
            reader = "an output of the graph"
        elif other is not None:
            reader = f"{other.op} in {other.node.name}"
        else:
            continue
        reason = f"{value.node.name}: expected no use besides the norm, got {reader}"
        hint = "compute what else is needed from x and the norm's result, not from the inside of the norm"
        return Refusal("layer_norm", norm.output, reason, COVERS, hint)
    return None


def _match(norm: Norm) -> Match:
    dtype = norm.output.dtype if norm.is_plain else norm.normalized_dtype
    weight = "" if norm.weight is None else "1 + weight" if norm.offset == 1.0 else "weight"
    bias = "" if norm.bias is None else "bias"
    rounding = "" if norm.weight is None else f"weight {'after' if dtype.itemsize < 4 else 'before'} cast"
    formula = " and ".join(filter(None, (weight, bias))) or "no weight"
    words = [formula, rounding, norm.mode.replace("inside", ""), short(norm.x.dtype)]
    return Match(
        pattern="layer_norm",
        outputs=(norm.output,),
        inputs=norm.inputs,
        replacement=replacement if norm.bias is None or norm.weight is not None else replacement_without_weight,
        params={
            "eps": norm.eps,
            "gain": norm.gain,
            "offset": norm.offset,
            "mode": norm.mode,
            "normalized_dtype": dtype,
            "out_dtype": norm.output.dtype,
        },
        variant=", ".join(filter(None, words)),
        covers=COVERS,
        formula=_formula(norm),
        rounding=rounded(norm.output.dtype, None if norm.weight is None else dtype),
    )


def _formula(norm: Norm) -> str:
    x = algebra.symbol("x")
    root = inverse_root(norm.mode, algebra.apply("var", x), norm.eps)
    centre = algebra.total(x, -algebra.apply("mean", x))
    scale = 1 if norm.weight is None else algebra.total(algebra.number(norm.offset), algebra.symbol("w"))
    normalized = algebra.product(centre, algebra.number(norm.gain), root, scale)
    return algebra.write(algebra.total(normalized, 0 if norm.bias is None else algebra.symbol("b")))


def replacement(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """What stands in the place of the region."""
    result: Tensor = torch.ops.graphfuse.layer_norm.default(
        x, weight, bias, eps, gain, offset, mode, normalized_dtype, out_dtype
    )
    return result


def replacement_without_weight(x: Tensor, bias: Tensor, **params: Any) -> Tensor:
    """The same, where there is a bias alone."""
    return replacement(x, None, bias, **params)


PATTERN = Pattern("layer_norm", find, "one pass over memory each way, and backward keeps x alone")
