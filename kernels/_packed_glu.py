"""`glu` of one packed projection, whose gradient is one tensor too: what makes the projection's backward one product.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._glu_kernel import GluOptions, glu_backward_triton_, glu_triton_
from graphfuse.kernels.glu import check_options, differentiate, differentiate_, glu_reference, in_place_result

__all__ = ["PACKINGS", "packed_glu", "unpack"]

PACKINGS = ("gate first", "up first", "interleaved")

torch.library.define(
    "graphfuse::packed_glu",
    "(Tensor packed, str packing, str activation, float alpha, float gate_max, float up_limit, float up_offset, "
    "ScalarType out_dtype) -> Tensor",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::packed_glu_backward",
    "(Tensor grad, Tensor packed, str packing, str activation, float alpha, float gate_max, float up_limit, "
    "float up_offset) -> Tensor",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::packed_glu_backward_",
    "(Tensor grad, Tensor? weight, Tensor(a!) packed, str packing, str activation, float alpha, float gate_max, "
    "float up_limit, float up_offset, bool with_result) -> Tensor",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::packed_glu_backward_of_products",
    "(Tensor grad, Tensor weight, Tensor states, Tensor packed_weight, str packing, str activation, float alpha, "
    "float gate_max, float up_limit, float up_offset, bool with_result) -> (Tensor, Tensor)",
    tags=_op.TAGS,
)


def unpack(packed: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    """Return gate and up, which are views."""
    if packing == "interleaved":
        return packed[..., 0::2], packed[..., 1::2]
    first, second = packed.tensor_split(2, -1)
    return (first, second) if packing == "gate first" else (second, first)


def _empty_result(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2), dtype=dtype)


def _packed_forward(
    packed: Tensor,
    packing: str,
    activation: str,
    alpha: float,
    gate_max: float,
    up_limit: float,
    up_offset: float,
    out_dtype: torch.dtype,
) -> Tensor:
    y = _empty_result(packed, out_dtype)
    options = GluOptions(activation, alpha, gate_max, up_limit, up_offset)
    gate, up = unpack(packed, packing)
    if _op.launches(gate, up, y):
        glu_triton_(gate, up, y, options)
        return y
    return y.copy_(glu_reference(gate, up, *options, out_dtype))


def _packed_backward(
    grad: Tensor,
    packed: Tensor,
    packing: str,
    activation: str,
    alpha: float,
    gate_max: float,
    up_limit: float,
    up_offset: float,
) -> Tensor:
    packed_grad = torch.empty_like(packed)
    options = GluOptions(activation, alpha, gate_max, up_limit, up_offset)
    (gate, up), (gate_grad, up_grad) = unpack(packed, packing), unpack(packed_grad, packing)
    if _op.launches(grad, gate, up):
        glu_backward_triton_(grad, gate, up, gate_grad, up_grad, options)
        return packed_grad
    grads = differentiate(grad, gate, up, options)
    gate_grad.copy_(grads[0])
    up_grad.copy_(grads[1])
    return packed_grad


def _packed_backward_in_place(
    grad: Tensor,
    weight: Tensor | None,
    packed: Tensor,
    packing: str,
    activation: str,
    alpha: float,
    gate_max: float,
    up_limit: float,
    up_offset: float,
    with_result: bool,
) -> Tensor:
    options = GluOptions(activation, alpha, gate_max, up_limit, up_offset)
    return differentiate_(grad, weight, *unpack(packed, packing), options, with_result)


def _packed_backward_of_products(
    grad: Tensor,
    weight: Tensor,
    states: Tensor,  # (N, H)
    packed_weight: Tensor,  # (H, 2 D)
    *others: Any,
) -> tuple[Tensor, Tensor]:
    """`packed_glu_backward_` of a projection that it makes itself, and returns as its gradient."""
    packed = torch.mm(states, packed_weight)
    return packed, _packed_backward_in_place(grad, weight, packed, *others)


_op.implement("packed_glu", _packed_forward, repeats=True)
_op.implement("packed_glu_backward", _packed_backward, repeats=True)
_op.implement("packed_glu_backward_", _packed_backward_in_place, repeats=True)
_op.implement("packed_glu_backward_of_products", _packed_backward_of_products)


@torch.library.register_fake("graphfuse::packed_glu")
def _(packed, packing, activation, alpha, gate_max, up_limit, up_offset, out_dtype):
    return _empty_result(packed, out_dtype)


@torch.library.register_fake("graphfuse::packed_glu_backward")
def _(grad, packed, packing, activation, alpha, gate_max, up_limit, up_offset):
    return torch.empty_like(packed)


@torch.library.register_fake("graphfuse::packed_glu_backward_")
def _(grad, weight, packed, packing, *others: Any):
    return in_place_result(grad, weight, unpack(packed, packing)[0], others[-1])


@torch.library.register_fake("graphfuse::packed_glu_backward_of_products")
def _(grad, weight, states, packed_weight, packing, *others: Any):
    packed = torch.mm(states, packed_weight)
    return packed, in_place_result(grad, weight, unpack(packed, packing)[0], others[-1])


def _setup_context_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, *options, _ = inputs
    ctx.save_for_backward(packed)
    ctx.options = options


def _autograd_packed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _op.refuse_second_derivative("glu")
    (packed,) = ctx.saved_tensors
    return torch.ops.graphfuse.packed_glu_backward(grad, packed, *ctx.options), *[None] * 7


torch.library.register_autograd("graphfuse::packed_glu", _autograd_packed, setup_context=_setup_context_packed)


def packed_glu(
    packed: Tensor,
    *,
    packing: str = "gate first",
    activation: str = "silu",
    alpha: float = 1.0,
    gate_max: float = math.inf,
    up_limit: float = math.inf,
    up_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Do what `glu` does where one projection made gate and up; their gradients share one tensor too.

    Args:
        packed: (..., 2 * D), fp16, bf16, fp32 or fp64; any strides, as in `glu`.
        packing: "gate first" or "up first", halves of the last dim, or "interleaved", gate at even places.
        activation: As the other options: see `glu`.
        alpha: Of "swish".
        gate_max: Upper bound of gate.
        up_limit: Bound of the absolute value of up.
        up_offset: Added to up.
        out_dtype: Dtype of the result. Default: that of `packed`.

    Returns:
        (..., D), of `out_dtype`, contiguous.

    Raises:
        TypeError: A dtype is not one of those above.
        ValueError: The last dim is odd, or an option is none of those above.

    Numerics: as `glu`.
    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202
    """
    out_dtype = out_dtype or packed.dtype
    if packed.ndim == 0 or packed.shape[-1] % 2:
        raise ValueError(f"packed: expected an even number of features, got shape {tuple(packed.shape)}")
    _op.check_choice("packing", packing, PACKINGS)
    _op.check_operands(packed=packed, out_dtype=out_dtype)
    check_options(activation, up_limit)
    options = (activation, alpha, gate_max, up_limit, up_offset)
    y: Tensor = torch.ops.graphfuse.packed_glu(packed, packing, *options, out_dtype)
    return y
