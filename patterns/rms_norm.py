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
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphfuse import algebra
from graphfuse.kernels import rms_norm as _  # noqa: F401  (registers the op)
from graphfuse.match import (
    CASTS,
    INDEXING,
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
from graphfuse.patterns._mean import centred
from graphfuse.shadow import Shadow, Value, hint

aten = torch.ops.aten

ADD = {aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.add_.Scalar}
MUL = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar}
DIV = {aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar}
POW = {aten.pow.Tensor_Scalar, aten.pow_.Scalar}
SQRT = {aten.sqrt.default, aten.sqrt_.default}
RSQRT = {aten.rsqrt.default, aten.rsqrt_.default}
RECIPROCAL = {aten.reciprocal.default, aten.reciprocal_.default}
CLAMP_MIN = {aten.clamp_min.default, aten.clamp_min_.default, aten.clamp.default, aten.clamp_.default}
MAXIMUM = {aten.maximum.default, aten.clamp_min.Tensor}
NORMS = {aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim}
HINT = "normalise over the last dimension: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)"
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
FUSED = {aten._fused_rms_norm.default} if hasattr(aten, "_fused_rms_norm") else set()


@dataclass(frozen=True)
class Statistic:
    """`c * (a * S + b) ** p` with `S = sum(x ** 2)`; `floor` is added to, or bounds from below, the root."""

    x: Value
    width: int
    a: float
    b: float = 0.0
    c: float = 1.0
    p: float = 1.0
    mode: str = "inside"
    floor: float = 0.0
    weight: tuple[Value, float] | None = None  # already multiplied in, with its offset
    obstacle: str = ""  # why this cannot become a norm, although it looks like one

    def weighted(self, weight: tuple[Value, float]) -> Statistic | None:
        return dataclasses.replace(self, weight=weight) if self.is_norm and self.weight is None else None

    def times(self, k: float) -> Statistic | None:
        if self.p == 1 and self.mode == "inside":
            return dataclasses.replace(self, a=self.a * k, b=self.b * k)
        return dataclasses.replace(self, c=self.c * k)

    def plus(self, k: float) -> Statistic | None:
        if self.mode != "inside":
            return None
        if self.p == 1:
            return dataclasses.replace(self, b=self.b + k)
        if self.p == 0.5 and self.b == 0:
            return dataclasses.replace(self, mode="outside", floor=k / self.c)
        return None

    def at_least(self, k: float) -> Statistic | None:
        if self.mode != "inside" or self.b != 0:
            return None
        if self.p == 1:  # sqrt(max(a S, k)) = max(sqrt(a S), sqrt(k))
            return dataclasses.replace(self, mode="clamp", floor=math.sqrt(k)) if k >= 0 else None
        if self.p == 0.5:
            return dataclasses.replace(self, mode="clamp", floor=k / self.c)
        return None

    def power(self, q: float) -> Statistic | None:
        if self.c <= 0 or self.weight is not None:
            return None
        return dataclasses.replace(self, c=self.c**q, p=self.p * q)

    @property
    def is_norm(self) -> bool:
        return math.isclose(self.p, -0.5)

    @property
    def gain(self) -> float:
        return self.c / math.sqrt(self.a * self.width)

    @property
    def eps(self) -> float:
        scale = self.a * self.width
        return self.b / scale if self.mode == "inside" else self.floor / math.sqrt(scale)


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every RMSNorm of the shadow, with its weight where it has one."""
    statistics: dict[Value, Statistic] = {}
    met: set[Value] = set()
    for value in shadow.values:
        if value.op in FUSED and value.output == 0:
            yield from _fused(value)
            continue
        statistic = _start(value) or _follow(value, statistics)
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


def _start(value: Value) -> Statistic | None:
    """A reduction of a square."""
    if value.op in (aten.mean.dim, aten.sum.dim_IntList):
        x = _squared(value.args[0])
        dims = argument(value, 1, "dim")
    elif (x := _dotted_with_itself(value)) is not None:
        dims = -1
    elif value.op in NORMS and number(argument(value, 1, "ord", 2)) in (None, 2.0):
        x, dims = value.args[0], argument(value, 2, "dim")
    else:
        return None
    if x is None or x.tensor.dim() == 0:
        return None
    width = x.shape[-1]
    if width == 0:
        return None
    statistic = Statistic(x, width, a=1.0 / width if value.op is aten.mean.dim else 1.0)
    if value.op in NORMS:
        statistic = dataclasses.replace(statistic, p=0.5)
    if not is_last(dims, x):
        return dataclasses.replace(statistic, obstacle=f"dim: expected the last one, got {dims}")
    return statistic


def _dotted_with_itself(value: Value) -> Value | None:
    """`x`, if the value is a batch of products of rows of x with themselves, as einsum computes them."""
    if value.op is not aten.bmm.default or value.shape[1:] != (1, 1):
        return None
    left, right = (_in_order(arg) for arg in value.args)
    width = value.args[0].shape[-1]
    return next((x for x in left if x in right and x.shape[-1] == width), None)


def _in_order(value: Value) -> list[Value]:
    """The value, and what it was before casts and views that kept its elements in their order."""
    found = [value]
    while value.op in CASTS | INDEXING and value.args[0].tensor.numel() == value.tensor.numel():
        before = value.args[0]
        if [n for n in before.shape if n != 1] != [n for n in value.shape if n != 1] and value.op not in VIEWS:
            break
        value = before
        found.append(value)
    return found


def _squared(value: Value) -> Value | None:
    """`x`, if the value is `x ** 2`."""
    value = strip(value)
    x: Value | None = None
    if value.op in POW:
        x = value.args[0] if number(value.args[1]) == 2.0 else None
    elif value.op is aten.square.default:
        x = value.args[0]
    elif value.op in MUL and isinstance(value.args[1], Value):
        left, right = value.args
        x = left if strip(left) is strip(right) else None
    return x


def _is_layer_norm(statistic: Statistic) -> bool:
    """Whether the mean was subtracted before, over the same dimension."""
    found = centred(statistic.x)
    return found is not None and (bool(statistic.obstacle) or is_last(found.dims, found.x))


def _follow(value: Value, statistics: dict[Value, Statistic]) -> Statistic | None:
    """The statistic after one more scalar operation, if that is what the value is."""
    op, args = value.op, value.args
    known = [(i, statistics[a]) for i, a in enumerate(args) if isinstance(a, Value) and a in statistics]
    if len(known) != 1:
        return None
    position, statistic = known[0]
    other = scalar(args[1 - position]) if len(args) > 1 else None
    vector = None
    if op in MUL | DIV and other is None and len(args) == 2 and isinstance(args[1 - position], Value):
        vector = _weight(args[1 - position], statistic.width)
    result: Statistic | None = None
    if op in CASTS or op in INDEXING:
        result = statistic
    elif op in RSQRT:
        result = statistic.power(-0.5)
    elif op in SQRT:
        result = statistic.power(0.5)
    elif op in RECIPROCAL:
        result = statistic.power(-1.0)
    elif op in POW and other is not None:
        result = statistic.power(other)
    elif op in ADD and other is not None and number(value.kwargs.get("alpha", 1)) == 1.0:
        result = statistic.plus(other)
    elif op in MUL and other is not None:
        result = statistic.times(other)
    elif vector is not None and not value.kwargs:
        turned = statistic if op in MUL else statistic.power(-1.0) if position == 1 else None
        result = turned.weighted(vector) if turned is not None else None
    elif op in DIV and other is not None and not value.kwargs:
        if position == 0:
            result = statistic.times(1.0 / other) if other else None
        elif (inverse := statistic.power(-1.0)) is not None:
            result = inverse.times(other)
    elif op in CLAMP_MIN and number(argument(value, 2, "max")) is None:
        lower = number(argument(value, 1, "min"))
        result = statistic.at_least(lower) if lower is not None else None
    elif op in MAXIMUM and other is not None:
        result = statistic.at_least(other)
    return result


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
            return _weight(weight, statistic.width)
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
            found = _weight(factor, statistic.width) if isinstance(factor, Value) else None
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


def _weight(factor: Value, width: int) -> tuple[Value, float] | None:
    """`(weight, offset)` if the factor is `offset + weight`, one number per feature."""
    offset = 0.0
    value = _one_dimensional(strip(factor))
    if value.op in ADD and len(value.args) == 2:
        left, right = value.args
        constant, inner = (scalar(right), left) if isinstance(left, Value) else (scalar(left), right)
        if constant is not None and isinstance(inner, Value):
            offset, value = constant, _one_dimensional(strip(inner))
    return (value, offset) if value.shape == (width,) and value.dtype.is_floating_point else None


def _one_dimensional(value: Value) -> Value:
    """The value before views that only add dimensions of size one."""
    while value.op in INDEXING and value.tensor.dim() > 1 and value.args[0].tensor.numel() == value.shape[-1]:
        value = strip(value.args[0])
    return value


def _fused(value: Value) -> Iterator[Match | Refusal]:
    """torch's own fused operation, which CUDA graphs hold in the place of `F.rms_norm`."""
    x, shape, weight, eps = (*value.args, None, None)[:4]
    if len(shape) != 1:
        yield Refusal(
            "rms_norm", value, f"normalized_shape: expected one dimension, got {list(shape)}", {"rms_norm": 1}
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
    x, eps = algebra.symbol("x"), algebra.number(params["eps"])
    mean = algebra.apply("mean", x**2)
    root = {
        "inside": algebra.power(algebra.total(mean, eps), "-1/2"),
        "outside": algebra.power(algebra.total(algebra.power(mean, "1/2"), eps), -1),
        "clamp": algebra.power(algebra.apply("max", algebra.power(mean, "1/2"), eps), -1),
    }
    gain = algebra.number(params["gain"])
    scale = 1 if weight is None else algebra.total(algebra.number(params["offset"]), algebra.symbol("w"))
    return algebra.write(algebra.product(x, gain, root[params["mode"]], scale))


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
