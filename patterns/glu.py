"""Gated MLP activation, by evaluation.

    act(gate) * up   ->   graphfuse::glu(gate, up, activation, ...)

Anchor: a product that is a function of two variables, element by element, where the variables are outputs of matrix
products (or inputs of the graph). The function is identified by evaluating it: whatever is spelled `x * sigmoid(x)` or
`x / (1 + exp(-x))` is SiLU, in whatever order the factors come. Clamps on either side, a slope in the sigmoid and an
offset on `up` are parameters. Gate and up may be halves of one packed projection, or its even and odd columns; the op
reads strides.

Paper: Shazeer 2020, https://arxiv.org/abs/2002.05202
Left alone: gates on what no matrix product made (attention outputs, state-space scans): not an MLP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from graphfuse import algebra
from graphfuse.evaluate import CannotEvaluate, evaluate, fingerprint
from graphfuse.kernels import _packed_glu  # noqa: F401  (registers the op)
from graphfuse.kernels._glu_kernel import GluOptions
from graphfuse.kernels.glu import glu_reference
from graphfuse.match import CASTS, INDEXING, Match, Pattern, Refusal, argument, narrows, number, rounded, short
from graphfuse.shadow import LEAF, Shadow, Value, hint

aten = torch.ops.aten

ANCHORS = {aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor}
ANCHORS |= {aten.addcmul.default, aten.addcmul_.default}
# Functions of one element at a time that torch does not tag as such.
POINTWISE = CASTS | {aten.log_sigmoid_forward.default, aten.hardswish.default, aten.special_ndtr.default}
POINTWISE |= {aten.detach.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
MATMULS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.linear.default,
    aten.matmul.default,
    aten.einsum.default,
    aten.convolution.default,
}
THROUGH = INDEXING | CASTS | {aten.cat.default, aten.stack.default, aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor}
THROUGH |= {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.index.Tensor, aten.clone.default}
# What a projection may be compared with and cut off by: a gate on few large values is still a gate.
THROUGH |= {aten.relu.default, aten.mean.dim, aten.std.correction, aten.var.correction, aten.sqrt.default}

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "swish")
GATES = torch.linspace(-40.0, 40.0, 321, dtype=torch.float64)
UPS = torch.linspace(-21.0, 20.0, 42, dtype=torch.float64)
STEPS = 24  # operations of an activation and what is done to `up`
REACH = 48  # operations between a projection and its use

UNKNOWN = GluOptions("", 1.0, math.inf, math.inf, 0.0)

_identified: dict[Any, GluOptions | None] = {}


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every gated activation of the shadow."""
    sites: list[Match | Refusal] = []
    inside: set[Value] = set()
    for value in reversed(shadow.values):  # a product may be part of a longer one
        if value in inside:
            continue
        site = _packed(value, shadow) if value.op is aten.glu.default else _match(value, shadow)
        if isinstance(site, Match):
            inside.update(shadow.cone(site.outputs, site.inputs))
        if site is not None:
            sites.append(site)
    yield from reversed(sites)


def _match(value: Value, shadow: Shadow) -> Match | Refusal | None:
    if value.op not in ANCHORS or value.tensor.dim() == 0 or not value.dtype.is_floating_point:
        return None
    unknown = False
    for cut in _cuts(value):
        for gate, up in (cut, cut[::-1]):
            options = _identify(value, gate, up, shadow)
            if options is not None and options is not UNKNOWN:
                return _build(value, gate, up, options, shadow)
            unknown = unknown or options is UNKNOWN
    if unknown:
        expected = ", ".join(ACTIVATIONS)
        reason = f"activation: expected one of {expected}, got another function"
        return Refusal("glu", value, reason, {"glu": 1}, "use one of these activations, in whatever spelling")
    return None


def _cuts(value: Value) -> list[tuple[Value, Value]]:
    """The pairs of projections of which `value` is a pointwise function, farthest first."""
    cuts: list[tuple[Value, Value]] = []
    frontier: set[Value] = {value}
    rounded: set[Value] = set()
    for _ in range(STEPS):
        # A value that is rounded before anything else happens to it is not the variable: its rounding is.
        if len(frontier) == 2 and not frontier & rounded and all(_may_be_variable(v) for v in frontier):
            first, second = sorted(frontier, key=lambda v: v.index)
            cuts.append((first, second))
        opened = {v: _operands(v) for v in frontier if _is_pointwise(v)}
        opened = {v: operands for v, operands in opened.items() if all(o.shape == value.shape for o in operands)}
        if not opened:
            break
        latest = max(opened, key=lambda v: (not _is_projection(v), v.index))
        if narrows(latest):
            rounded.add(latest.args[0])
        frontier.remove(latest)
        frontier.update(opened[latest])
        if len(frontier) == 1 and latest is not value:
            return []  # one variable: an activation written out, not a gate
    return cuts[::-1]


def _may_be_variable(value: Value) -> bool:
    return value.dtype.is_floating_point and _is_projection(value)


def _operands(value: Value) -> list[Value]:
    """Its operands, without constants made from Python numbers."""
    return [o for o in value.operands() if o.tensor.dim() > 0 or o.op is LEAF or any(o.operands())]


def _is_pointwise(value: Value) -> bool:
    return value.op is not LEAF and (value.op in POINTWISE or torch.Tag.pointwise in value.op.tags)


def _is_projection(value: Value) -> bool:
    """Whether a matrix product made the value (views, sums, scales and casts aside), or the graph was given it."""
    seen: set[Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current in seen or _makes_projection(current):
            continue
        seen.add(current)
        operands = [o for o in current.operands() if o.tensor.dim() > 0]
        if current.op is aten.index.Tensor:
            operands = operands[:1]
        if current.op not in THROUGH or not operands or len(seen) > REACH:
            return False
        stack.extend([o for o in operands if o.tensor.dim() >= 2] or operands)
    return True


def _makes_projection(value: Value) -> bool:
    if value.op is LEAF or value.op in MATMULS or value.op.namespace not in ("aten", "prims"):
        return True
    return "grouped_mm" in value.op.name()


def _identify(value: Value, gate: Value, up: Value, shadow: Shadow) -> GluOptions | None:
    """What `value` is as a function of both; `UNKNOWN` if only the activation is not known, or else `None`."""
    region = shadow.cone([value], [gate, up])
    key = fingerprint(region, [gate, up])
    if key not in _identified:
        _identified[key] = _search(value, gate, up, region)
    return _identified[key]


def _search(value: Value, gate: Value, up: Value, region: list[Value]) -> GluOptions | None:
    everywhere = {gate: GATES[:, None].expand(-1, len(UPS)), up: UPS.expand(len(GATES), -1)}
    try:
        with _disable_current_modes(), torch.no_grad():
            found = evaluate(region, everywhere, exact=True, device=torch.device("cpu"), sizes={})[value]
    except CannotEvaluate:
        return None
    constants = _constants(region)
    limits = [math.inf, *constants]
    for up_limit, up_offset in itertools.product(limits, [0.0, 1.0, *constants, *(-c for c in constants)]):
        factor = UPS.clamp(-up_limit, up_limit) + up_offset
        curve = found @ factor / (factor @ factor)
        if not _equal(curve[:, None] * factor, found):
            continue
        for gate_max, activation in itertools.product(limits, ACTIVATIONS):
            for alpha in [1.0] if activation != "swish" else constants:
                options = GluOptions(activation, alpha, gate_max, math.inf, 0.0)
                if _equal(glu_reference(GATES, torch.ones_like(GATES), *options, torch.float64), curve):
                    return options._replace(up_limit=up_limit, up_offset=up_offset)
        return UNKNOWN if _is_bent(curve) else None
    row, column = divmod(int(found.abs().argmax()), found.shape[1])
    curve, factor = found[:, column], found[row] / found[row, column]
    is_product = _equal(curve[:, None] * factor, found)
    return UNKNOWN if is_product and _is_bent(curve) and _is_bent(factor) else None


def _is_bent(curve: Tensor) -> bool:
    return bool(curve.diff().diff().abs().amax() > 1e-9 * curve.abs().amax())


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def _constants(region: list[Value]) -> list[float]:
    """The sizes of the numbers that occur in the function."""
    numbers = (number(arg) for value in region for arg in (*value.args, *value.kwargs.values()))
    return sorted({abs(k) for k in numbers if k is not None and math.isfinite(k)})


def _build(value: Value, gate: Value, up: Value, options: GluOptions, shadow: Shadow) -> Match:
    words = [f"swish({options.alpha:g})" if options.activation == "swish" else options.activation]
    if options.gate_max < math.inf or options.up_limit < math.inf:
        words.append("clamped")
    if options.up_offset:
        words.append(f"up {options.up_offset:+g}")
    packing = _packing(gate, up)
    if packing is not None:
        words.append("interleaved" if packing == "interleaved" else "packed")
    output = _rounded(value, shadow)
    params = {**options._asdict(), "out_dtype": output.dtype}
    is_one = packing is not None and gate.args[0] in shadow.node_of
    return Match(
        pattern="glu",
        outputs=(output,),
        inputs=(gate.args[0],) if is_one else (gate, up),
        replacement=packed_replacement if is_one else replacement,
        params=params | ({"packing": packing, "rank": len(gate.shape)} if is_one else {}),
        variant=", ".join([*words, short(gate.dtype)]),
        covers={"glu": 1},
        formula=_formula(options),
        rounding=rounded(output.dtype),
    )


def _formula(options: GluOptions) -> str:
    gate, up = algebra.symbol("gate"), algebra.symbol("up")
    if options.gate_max < math.inf:
        gate = algebra.apply("min", gate, algebra.number(options.gate_max))
    if options.up_limit < math.inf:
        limit = algebra.number(options.up_limit)
        up = algebra.apply("clamp", up, -limit, limit)
    if options.activation == "swish":
        slope = algebra.apply("sigmoid", algebra.product(algebra.number(options.alpha), gate))
        activated = algebra.product(gate, slope)
    else:
        activated = algebra.apply(options.activation, gate)
    return algebra.write(algebra.product(activated, algebra.total(up, algebra.number(options.up_offset))))


def _packed(value: Value, shadow: Shadow) -> Match | None:
    """torch's own `glu`: `up` and gate are the halves of one tensor, and the graph has a name for neither."""
    packed = value.args[0]
    if not _is_projection(packed):
        return None
    output = _rounded(value, shadow)
    params = {**GluOptions("sigmoid")._asdict(), "out_dtype": output.dtype}
    dim = argument(value, 1, "dim", -1)
    is_last = dim % packed.tensor.dim() == packed.tensor.dim() - 1
    return Match(
        pattern="glu",
        outputs=(output,),
        inputs=(packed,),
        replacement=packed_replacement if is_last else halves_replacement,
        params=params | ({"packing": "up first", "rank": packed.tensor.dim()} if is_last else {"dim": dim}),
        variant=f"sigmoid, packed, {short(packed.dtype)}",
        covers={"glu": 1},
        formula=_formula(GluOptions("sigmoid")),
        rounding=rounded(output.dtype),
    )


def _rounded(value: Value, shadow: Shadow) -> Value:
    """The value after the rounding that follows, if one does."""
    user = shadow.sole_user(value)
    return user if user is not None and narrows(user) and user in shadow.node_of else value


def _packing(gate: Value, up: Value) -> str | None:
    """How gate and up lie in one packed projection, if they are all of it."""
    if gate.op not in INDEXING or up.op not in INDEXING or gate.args[0] is not up.args[0]:
        return None
    whole = gate.args[0]
    sizes, steps = list(whole.shape), [hint(step) for step in whole.tensor.stride()]
    if len(sizes) == len(gate.shape) + 1 and steps[-2] == sizes[-1] * steps[-1]:  # gate and up have a dimension
        sizes[-2:], steps[-2:] = [sizes[-2] * sizes[-1]], steps[-1:]
    if gate.shape != up.shape or sizes != [*gate.shape[:-1], 2 * gate.shape[-1]]:
        return None
    start = hint(whole.tensor.storage_offset())
    begins = [(hint(half.tensor.storage_offset()) - start) // steps[-1] for half in (gate, up)]
    strides = {hint(half.tensor.stride(-1)) // steps[-1] for half in (gate, up)}
    if strides == {2} and begins == [0, 1]:
        return "interleaved"
    if strides == {1} and sorted(begins) == [0, sizes[-1] // 2]:
        return "gate first" if begins[0] == 0 else "up first"
    return None


def replacement(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str,
    alpha: float,
    gate_max: float,
    up_limit: float,
    up_offset: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """What stands in the place of the region."""
    result: Tensor = torch.ops.graphfuse.glu.default(
        gate, up, activation, alpha, gate_max, up_limit, up_offset, out_dtype
    )
    return result


def packed_replacement(
    packed: Tensor,
    *,
    packing: str,
    rank: int,
    activation: str,
    alpha: float,
    gate_max: float,
    up_limit: float,
    up_offset: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """The same where gate and up are all of one tensor: so are their gradients."""
    packed = packed.flatten(rank - 1)
    result: Tensor = torch.ops.graphfuse.packed_glu.default(
        packed, packing, activation, alpha, gate_max, up_limit, up_offset, out_dtype
    )
    return result


def halves_replacement(packed: Tensor, *, dim: int, **params: Any) -> Tensor:
    """The same where `up` and gate are halves of one tensor along another dimension."""
    halves = packed.chunk(2, dim)
    return replacement(halves[1], halves[0], **params)


PATTERN = Pattern("glu", find, "one pass over memory each way, and backward keeps gate and up alone")
