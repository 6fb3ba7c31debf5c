"""Gated linear unit: an activation times a second projection, in one pass over memory each way.

    z     = min(gate, gate_max)
    v     = clamp(up, -up_limit, up_limit) + up_offset
    y     = act(z) * v
    dgate = grad * v * act'(z)        0 where gate is clamped
    dup   = grad * act(z)             0 where up is clamped

Backward reads gate and up again and computes the activation anew: nothing else is saved.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphfuse.kernels import _op
from graphfuse.kernels._glu_kernel import GluOptions, glu_backward_triton_, glu_triton_

__all__ = ["ACTIVATIONS", "glu", "glu_reference"]


def _swish_slope(z: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(alpha * z)
    return s + alpha * z * s * torch.sigmoid(-alpha * z)


def _gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return torch.erfc(-z * math.sqrt(0.5)) / 2 + z * density


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    # gelu_tanh(z) = z * sigmoid(w)
    scale = math.sqrt(8 / math.pi)
    w = scale * (z + 0.044715 * z**3)
    s = torch.sigmoid(w)
    return s + z * s * torch.sigmoid(-w) * scale * (1 + 3 * 0.044715 * z * z)


# act(z) and act'(z); alpha counts for "swish" alone.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda z, alpha: functional.silu(z),
    "swish": lambda z, alpha: z * torch.sigmoid(alpha * z),
    "gelu": lambda z, alpha: functional.gelu(z),
    "gelu_tanh": lambda z, alpha: functional.gelu(z, approximate="tanh"),
    "relu": lambda z, alpha: functional.relu(z),
    "relu2": lambda z, alpha: functional.relu(z).square(),
    "sigmoid": lambda z, alpha: torch.sigmoid(z),
    "tanh": lambda z, alpha: torch.tanh(z),
    "identity": lambda z, alpha: z,
}
SLOPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda z, alpha: _swish_slope(z, 1.0),
    "swish": _swish_slope,
    "gelu": lambda z, alpha: _gelu_slope(z),
    "gelu_tanh": lambda z, alpha: _gelu_tanh_slope(z),
    "relu": lambda z, alpha: torch.where(z <= 0, 0.0, 1.0).to(z.dtype),
    "relu2": lambda z, alpha: 2 * functional.relu(z),
    "sigmoid": lambda z, alpha: torch.sigmoid(z) * torch.sigmoid(-z),
    "tanh": lambda z, alpha: 1 - torch.tanh(z).square(),
    "identity": lambda z, alpha: torch.ones_like(z),
}


def glu_reference(
    gate: Tensor,
    up: Tensor,
    activation: str,
    alpha: float,
    gate_max: float,
    up_limit: float,
    up_offset: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Say what the op computes, in differentiable torch operations."""
    compute = _op.compute_dtype(gate, up, out_dtype)
    options = GluOptions(activation, alpha, gate_max, up_limit, up_offset)
    z, v = _clamp(gate.to(compute), up.to(compute), options)
    return (ACTIVATIONS[activation](z, alpha) * v).to(out_dtype)


def _clamp(gate: Tensor, up: Tensor, options: GluOptions) -> tuple[Tensor, Tensor]:
    if options.gate_max != math.inf:
        gate = gate.clamp(max=options.gate_max)
    if options.up_limit != math.inf:
        up = up.clamp(-options.up_limit, options.up_limit)
    return gate, up + options.up_offset


def differentiate(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    options: GluOptions,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, in the dtype they are computed in."""
    compute = _op.compute_dtype(grad, gate, up)
    grad, gate, up = grad.to(compute), gate.to(compute), up.to(compute)
    z, v = _clamp(gate, up, options)
    gate_grad = grad * v * SLOPES[options.activation](z, options.alpha)
    up_grad = grad * ACTIVATIONS[options.activation](z, options.alpha)
    if options.gate_max != math.inf:
        gate_grad = torch.where(gate <= options.gate_max, gate_grad, 0)
    if options.up_limit != math.inf:
        up_grad = torch.where(up.abs() <= options.up_limit, up_grad, 0)
    return gate_grad, up_grad


def differentiate_(
    grad: Tensor, weight: Tensor | None, gate: Tensor, up: Tensor, options: GluOptions, with_result: bool
) -> Tensor:
    """Write the gradients over gate and up; return what forward did, in the dtype of `grad`, or nothing.

    Args:
        grad: Shape of `gate`; with a weight (N, H), the gradient of what was multiplied with that.
        weight: (H, D): `grad @ weight` is the gradient then, and what forward did is written over it.
        gate: (..., D), N rows.
        up: As `gate`.
        options: Of forward.
        with_result: Whether to return what forward did, in the layout of the gradient.
    """
    if weight is not None:
        grad = torch.mm(grad, weight).view(gate.shape)
    y = None if not with_result else torch.empty_like(grad) if weight is None else grad
    if _op.launches(grad, gate, up):
        glu_backward_triton_(grad, gate, up, gate, up, options, y)
    else:
        grads = differentiate(grad, gate, up, options)
        if y is not None:
            y.copy_(glu_reference(gate, up, *options, y.dtype))
        gate.copy_(grads[0])
        up.copy_(grads[1])
    return grad.new_empty(0) if y is None else y


torch.library.define(
    "graphfuse::glu",
    "(Tensor gate, Tensor up, str activation, float alpha, float gate_max, float up_limit, "
    "float up_offset, ScalarType out_dtype) -> Tensor",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::glu_backward",
    "(Tensor grad, Tensor gate, Tensor up, str activation, float alpha, float gate_max, "
    "float up_limit, float up_offset) -> (Tensor, Tensor)",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::glu_backward_",
    "(Tensor grad, Tensor? weight, Tensor(a!) gate, Tensor(b!) up, str activation, float alpha, float gate_max, "
    "float up_limit, float up_offset, bool with_result) -> Tensor",
    tags=_op.TAGS,
)


torch.library.define(
    "graphfuse::glu_backward_of_products",
    "(Tensor grad, Tensor weight, Tensor gate_states, Tensor gate_weight, Tensor up_states, Tensor up_weight, "
    "str activation, float alpha, float gate_max, float up_limit, float up_offset, bool with_result) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_op.TAGS,
)


def _forward(
    gate: Tensor,
    up: Tensor,
    activation: str,
    alpha: float,
    gate_max: float,
    up_limit: float,
    up_offset: float,
    out_dtype: torch.dtype,
) -> Tensor:
    y = torch.empty_like(gate, dtype=out_dtype)
    options = GluOptions(activation, alpha, gate_max, up_limit, up_offset)
    if _op.launches(gate, up, y):
        glu_triton_(gate, up, y, options)
        return y
    return y.copy_(glu_reference(gate, up, *options, out_dtype))


def _backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    alpha: float,
    gate_max: float,
    up_limit: float,
    up_offset: float,
) -> tuple[Tensor, Tensor]:
    gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
    options = GluOptions(activation, alpha, gate_max, up_limit, up_offset)
    if _op.launches(grad, gate, up):
        glu_backward_triton_(grad, gate, up, gate_grad, up_grad, options)
        return gate_grad, up_grad
    grads = differentiate(grad, gate, up, options)
    return gate_grad.copy_(grads[0]), up_grad.copy_(grads[1])


def _backward_in_place(
    grad: Tensor,
    weight: Tensor | None,
    gate: Tensor,
    up: Tensor,
    activation: str,
    alpha: float,
    gate_max: float,
    up_limit: float,
    up_offset: float,
    with_result: bool,
) -> Tensor:
    options = GluOptions(activation, alpha, gate_max, up_limit, up_offset)
    return differentiate_(grad, weight, gate, up, options, with_result)


def _backward_of_products(
    grad: Tensor,
    weight: Tensor,
    gate_states: Tensor,  # (N, H)
    gate_weight: Tensor,  # (H, D)
    up_states: Tensor,  # (N, H)
    up_weight: Tensor,  # (H, D)
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`glu_backward_` of gate and up that it makes itself, and returns as their gradients."""
    gate, up = torch.mm(gate_states, gate_weight), torch.mm(up_states, up_weight)
    return gate, up, _backward_in_place(grad, weight, gate, up, *others)


_op.implement("glu", _forward, repeats=True)
_op.implement("glu_backward", _backward, repeats=True)
_op.implement("glu_backward_", _backward_in_place, repeats=True)
_op.implement("glu_backward_of_products", _backward_of_products)


@torch.library.register_fake("graphfuse::glu")
def _(gate, up, activation, alpha, gate_max, up_limit, up_offset, out_dtype):
    return torch.empty_like(gate, dtype=out_dtype)


@torch.library.register_fake("graphfuse::glu_backward")
def _(grad, gate, up, activation, alpha, gate_max, up_limit, up_offset):
    return torch.empty_like(gate), torch.empty_like(up)


@torch.library.register_fake("graphfuse::glu_backward_")
def _(grad, weight, gate, *others: Any):
    return in_place_result(grad, weight, gate, others[-1])


@torch.library.register_fake("graphfuse::glu_backward_of_products")
def _(grad, weight, gate_states, gate_weight, up_states, up_weight, *others: Any):
    gate, up = torch.mm(gate_states, gate_weight), torch.mm(up_states, up_weight)
    return gate, up, in_place_result(grad, weight, gate, others[-1])


def in_place_result(grad: Tensor, weight: Tensor | None, like: Tensor, with_result: bool) -> Tensor:
    """What `differentiate_` returns, unwritten; `like` has the shape of gate."""
    if not with_result:
        return grad.new_empty(0)
    return torch.empty_like(grad) if weight is None else grad.new_empty(like.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *options, _ = inputs
    ctx.save_for_backward(gate, up)
    ctx.options = options


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _op.refuse_second_derivative("glu")
    grads = torch.ops.graphfuse.glu_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 6


torch.library.register_autograd("graphfuse::glu", _autograd, setup_context=_setup_context)


def glu(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    alpha: float = 1.0,
    gate_max: float = math.inf,
    up_limit: float = math.inf,
    up_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply an activation of `gate` with `up`.

        y = act(min(gate, gate_max)) * (clamp(up, -up_limit, up_limit) + up_offset)

    Args:
        gate: Any shape, fp16, bf16, fp32 or fp64. Any strides; without a copy if gate, up and the
            result can be seen as matrices, as the halves of one projection can, or its even and
            its odd columns.
        up: Shape of `gate`, any of these dtypes.
        activation: "silu", "swish" (z * sigmoid(alpha * z)), "gelu", "gelu_tanh", "relu", "relu2"
            (relu(z) ** 2), "sigmoid", "tanh" or "identity".
        alpha: Of "swish".
        gate_max: Upper bound of `gate`.
        up_limit: Bound of the absolute value of `up`.
        up_offset: Added to `up`.
        out_dtype: Dtype of the result. Default: that of `gate`.

    Returns:
        Shape of `gate`, of `out_dtype`, in the layout in memory that `torch.empty_like(gate)` has.

    Raises:
        TypeError: A dtype is not one of those above.
        ValueError: Shapes differ, or an option is none of those above.

    Numerics: fp32 inside (fp64 if anything is fp64), rounded once, to `out_dtype`. A clamped
    element has no gradient, one on the bound has, as with `torch.clamp`. There is no second
    derivative.
    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202
    """
    out_dtype = out_dtype or gate.dtype
    if up.shape != gate.shape:
        raise ValueError(f"up: expected shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    _op.check_operands(gate=gate, up=up, out_dtype=out_dtype)
    check_options(activation, up_limit)
    options = (activation, alpha, gate_max, up_limit, up_offset)
    y: Tensor = torch.ops.graphfuse.glu(gate, up, *options, out_dtype)
    return y


def check_options(activation: str, up_limit: float) -> None:
    """Raise ValueError unless the options are those of `glu`."""
    _op.check_choice("activation", activation, ACTIVATIONS)
    if not up_limit >= 0:
        raise ValueError(f"up_limit: expected 0 or a positive number, got {up_limit}")
