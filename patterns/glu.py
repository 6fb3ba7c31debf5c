"""Gated MLP activation, by evaluation.

    act(gate) * up   ->   graphfuse::glu(gate, up, activation, ...)

Anchor: a product of two values of equal shape, each a function of one variable, where the variables are outputs of
matrix products (or inputs of the graph). The functions are identified by evaluating them: whatever is spelled
`x * sigmoid(x)` or `x / (1 + exp(-x))` is SiLU. Clamps on either side, a slope in the sigmoid and an offset on `up`
are parameters. Gate and up may be halves of one packed projection, or its even and odd columns; the op reads strides.

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

from graphfuse.evaluate import CannotEvaluate, evaluate, fingerprint
from graphfuse.kernels.glu import glu_reference
from graphfuse.match import CASTS, INDEXING, Match, Pattern, Refusal, narrows, number, short
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor}
POINTWISE = CASTS | {
    getattr(aten, name + suffix).default
    for name in ("silu", "gelu", "sigmoid", "tanh", "relu", "exp", "neg", "square", "reciprocal", "erf")
    for suffix in ("", "_")
    if hasattr(getattr(aten, name + suffix, None), "default")
}
POINTWISE |= {
    getattr(getattr(aten, name + suffix), overload)
    for name in ("mul", "add", "sub", "div")
    for suffix in ("", "_")
    for overload in ("Tensor", "Scalar")
}
POINTWISE |= {
    aten.pow.Tensor_Scalar,
    aten.rsub.Scalar,
    aten.clamp.default,
    aten.clamp_.default,
    aten.clamp_min.default,
    aten.clamp_min_.default,
    aten.clamp_max.default,
    aten.clamp_max_.default,
    aten.hardtanh.default,
    aten.log_sigmoid_forward.default,
    aten.threshold.default,
}
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
GRID = torch.linspace(-40.0, 40.0, 321, dtype=torch.float64)

Gate = tuple[str, float, float]  # activation, alpha, gate_max
Up = tuple[float, float]  # up_limit, up_offset

_gates: dict[Any, Gate | None] = {}
_ups: dict[Any, Up | None] = {}


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every gated activation of the shadow."""
    for value in shadow.values:
        if value.op not in PRODUCTS or len(value.args) != 2:
            continue
        left, right = value.args
        if not (isinstance(left, Value) and isinstance(right, Value)) or left.shape != right.shape:
            continue
        if value.tensor.dim() == 0 or value.dtype.is_complex:
            continue
        found = _match(value, shadow)
        if found is not None:
            yield found


def _match(value: Value, shadow: Shadow) -> Match | Refusal | None:
    unknown = False
    if _variables(value.args[0])[0] is _variables(value.args[1])[0]:
        return None  # one variable: an activation written out, not a gate
    for gate_side, up_side in (value.args, value.args[::-1]):
        for gate in _variables(gate_side):
            for up in _variables(up_side):
                if gate is up or gate is gate_side or gate.shape != value.shape or up.shape != value.shape:
                    continue
                if not (_is_projection(gate) and _is_projection(up)):
                    continue
                up_form = _identify_up(up_side, up, shadow)
                if up_form is None:
                    continue
                gate_form = _identify_gate(gate_side, gate, shadow)
                if gate_form is not None:
                    return _build(value, gate, up, gate_form, up_form, shadow)
                unknown = unknown or _is_bent(gate_side, gate, shadow)
    if unknown:
        expected = ", ".join(ACTIVATIONS)
        return Refusal("glu", value, f"activation: expected one of {expected}, got another function", {"glu": 1})
    return None


def _variables(value: Value) -> list[Value]:
    """The values of which `value` is a pointwise function, deepest first, itself included."""
    points: list[Value] = []
    frontier = {value}
    for _ in range(24):
        if len(frontier) == 1:
            (only,) = frontier
            points.append(only)
        latest = max(frontier, key=lambda v: v.index)
        operands = list(latest.operands())
        if latest.op not in POINTWISE or not operands or any(o.tensor.dim() == 0 for o in operands):
            break
        frontier.remove(latest)
        frontier.update(operands)
    # A value that is rounded before anything else happens to it is not the variable: its rounding is.
    rounded = {id(point.args[0]) for point in points if narrows(point)}
    return [point for point in points[::-1] if id(point) not in rounded]


def _is_projection(value: Value, depth: int = 12) -> bool:
    """Whether a matrix product made the value (views, sums, scales and casts aside), or the graph was given it."""
    if depth == 0:
        return False
    if value.op is LEAF or value.op in MATMULS or value.op.namespace not in ("aten", "prims"):
        return True
    if "grouped_mm" in value.op.name():
        return True
    if value.op not in THROUGH:
        return False
    operands = [o for o in value.operands() if o.tensor.dim() > 0]
    wide = [o for o in operands if o.tensor.dim() >= 2] or operands
    if value.op is aten.index.Tensor:
        wide = wide[:1]
    return bool(wide) and all(_is_projection(o, depth - 1) for o in wide)


def _evaluated(output: Value, variable: Value, shadow: Shadow) -> Tensor | None:
    """The function on the grid."""
    region = shadow.cone([output], [variable])
    try:
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            device = torch.device("cpu")
            return evaluate(region, {variable: GRID}, exact=True, device=device, sizes={})[output]
    except CannotEvaluate:
        return None


def _constants(output: Value, variable: Value, shadow: Shadow) -> set[float]:
    """The numbers that occur in the function."""
    found: set[float] = set()
    for value in shadow.cone([output], [variable]):
        for arg in (*value.args[1:], *value.kwargs.values()):
            k = number(arg)
            if k is not None and math.isfinite(k):
                found.add(abs(k))
    return found


def _identify_gate(side: Value, variable: Value, shadow: Shadow) -> Gate | None:
    key = fingerprint(shadow.cone([side], [variable]), [variable])
    if key not in _gates:
        _gates[key] = _search_gate(side, variable, shadow)
    return _gates[key]


def _search_gate(side: Value, variable: Value, shadow: Shadow) -> Gate | None:
    expected = _evaluated(side, variable, shadow)
    if expected is None:
        return None
    constants = _constants(side, variable, shadow)
    limits = [math.inf, *sorted(constants)]
    one = torch.ones_like(GRID)
    for gate_max, activation in itertools.product(limits, ACTIVATIONS):
        for alpha in [1.0] if activation != "swish" else sorted(constants):
            ours = glu_reference(GRID, one, activation, alpha, gate_max, math.inf, 0.0, torch.float64)
            if torch.allclose(ours, expected, rtol=1e-9, atol=1e-12):
                return activation, alpha, gate_max
    return None


def _identify_up(side: Value, variable: Value, shadow: Shadow) -> Up | None:
    if side is variable:
        return math.inf, 0.0
    key = fingerprint(shadow.cone([side], [variable]), [variable])
    if key not in _ups:
        _ups[key] = _search_up(side, variable, shadow)
    return _ups[key]


def _search_up(side: Value, variable: Value, shadow: Shadow) -> Up | None:
    expected = _evaluated(side, variable, shadow)
    if expected is None:
        return None
    constants = _constants(side, variable, shadow)
    for limit, offset in itertools.product([math.inf, *sorted(constants)], [0.0, *constants, *(-c for c in constants)]):
        if torch.allclose(GRID.clamp(-limit, limit) + offset, expected, rtol=1e-9, atol=1e-12):
            return limit, offset
    return None


def _is_bent(side: Value, variable: Value, shadow: Shadow) -> bool:
    """Whether the function is more than an affine one: a gate that we do not know."""
    expected = _evaluated(side, variable, shadow)
    if expected is None or not bool(expected.isfinite().all()):
        return expected is not None
    return bool(expected.diff().diff().abs().amax() > 1e-9 * expected.abs().amax())


def _build(value: Value, gate: Value, up: Value, gate_form: Gate, up_form: Up, shadow: Shadow) -> Match:
    activation, alpha, gate_max = gate_form
    up_limit, up_offset = up_form
    output = value
    user = shadow.sole_user(value)
    if user is not None and narrows(user) and user in shadow.node_of:
        output = user
    words = [f"{activation}({alpha:g})" if activation == "swish" else activation]
    if gate_max < math.inf or up_limit < math.inf:
        words.append("clamped")
    if up_offset:
        words.append(f"up {up_offset:+g}")
    if (packed := _packing(gate, up)) is not None:
        words.append(packed)
    return Match(
        pattern="glu",
        outputs=(output,),
        inputs=(gate, up),
        replacement=replacement,
        params={
            "activation": activation,
            "alpha": alpha,
            "gate_max": gate_max,
            "up_limit": up_limit,
            "up_offset": up_offset,
            "out_dtype": output.dtype,
        },
        variant=", ".join([*words, short(gate.dtype)]),
        covers={"glu": 1},
    )


def _packing(gate: Value, up: Value) -> str | None:
    """How gate and up lie in one packed projection, if they do."""
    if not gate.args or gate.args[0] is not (up.args[0] if up.args else None):
        return None
    return "interleaved" if gate.tensor.stride(-1) == 2 else "packed"


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


PATTERN = Pattern("glu", find)
