"""Residual add and RMSNorm, in either order, in one pass over memory each way.

    add_rms_norm    total = round(x + residual)                 before attention and before an MLP
                    y     = rms_norm(total)
    rms_norm_add    y     = residual + round(rms_norm(x))       after them

    dtotal = what came back to total + dx of `rms_norm` at total
    dx, dresidual = dtotal

Backward reads the total (or x) again and adds the gradient that flows past the norm in the same pass: nothing else is
saved.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
"""
# Shape letters: D = features of a row.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _norm, _op
from graphfuse.kernels._norm import empty_gradients
from graphfuse.kernels._rms_norm_kernel import NormOptions
from graphfuse.kernels.rms_norm import differentiate, launch_backward, launch_forward, rms_norm_reference

__all__ = ["add_rms_norm", "add_rms_norm_reference", "rms_norm_add", "rms_norm_add_reference"]


def add_rms_norm_reference(
    x: Tensor,  # (..., D)
    residual: Tensor,  # (..., D)
    weight: Tensor | None,  # (D,)
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    total_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Say what the op computes, in differentiable torch operations."""
    total = (x + residual).to(total_dtype)
    return total, rms_norm_reference(total, weight, eps, gain, offset, mode, normalized_dtype, out_dtype)


def rms_norm_add_reference(
    x: Tensor,  # (..., D)
    residual: Tensor,  # (..., D)
    weight: Tensor | None,  # (D,)
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    rounded_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Say what the op computes, in differentiable torch operations."""
    y = rms_norm_reference(x, weight, eps, gain, offset, mode, normalized_dtype, rounded_dtype)
    return (y + residual).to(out_dtype)


_OPTIONS = "float eps, float gain, float offset, str mode"

torch.library.define(
    "graphfuse::add_rms_norm",
    f"(Tensor x, Tensor residual, Tensor? weight, {_OPTIONS}, ScalarType normalized_dtype, ScalarType total_dtype, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::add_rms_norm_backward",
    f"(Tensor grad, Tensor total_grad, Tensor total, Tensor? weight, {_OPTIONS}, bool need_weight) -> (Tensor, Tensor)",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::rms_norm_add",
    f"(Tensor x, Tensor residual, Tensor? weight, {_OPTIONS}, ScalarType normalized_dtype, ScalarType rounded_dtype, "
    "ScalarType out_dtype) -> Tensor",
    tags=_op.TAGS,
)


def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    total_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total, y = torch.empty_like(x, dtype=total_dtype), torch.empty_like(x, dtype=out_dtype)
    options = NormOptions(eps, gain, offset, mode)
    if _norm.launches(x, residual, weight, total_dtype, out_dtype):
        launch_forward(x, weight, y, options, normalized_dtype, residual, total)
        return total, y
    results = add_rms_norm_reference(x, residual, weight, *options, normalized_dtype, total_dtype, out_dtype)
    return total.copy_(results[0]), y.copy_(results[1])


def _add_rms_norm_backward(
    grad: Tensor,
    total_grad: Tensor,
    total: Tensor,
    weight: Tensor | None,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    options = NormOptions(eps, gain, offset, mode)
    x_grad, weight_grad = empty_gradients(total, weight, need_weight)
    wanted = weight_grad if weight is not None and need_weight else None
    if _norm.launches(total, weight, grad):
        launch_backward(grad, total, weight, x_grad, wanted, options, total_grad)
        return x_grad, weight_grad
    grads = differentiate(grad, total, weight, options)
    x_grad.copy_(grads[0] + total_grad)
    if wanted is not None:
        wanted.copy_(grads[1])
    return x_grad, weight_grad


def _rms_norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    rounded_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype)
    options = NormOptions(eps, gain, offset, mode)
    if _norm.launches(x, residual, weight, out_dtype):
        launch_forward(x, weight, y, options, normalized_dtype, residual, None, rounded_dtype)
        return y
    return y.copy_(rms_norm_add_reference(x, residual, weight, *options, normalized_dtype, rounded_dtype, out_dtype))


_op.implement("add_rms_norm", _add_rms_norm, repeats=True)
_op.implement("add_rms_norm_backward", _add_rms_norm_backward, repeats=True)
_op.implement("rms_norm_add", _rms_norm_add, repeats=True)


@torch.library.register_fake("graphfuse::add_rms_norm")
def _(x, residual, weight, eps, gain, offset, mode, normalized_dtype, total_dtype, out_dtype):
    return torch.empty_like(x, dtype=total_dtype), torch.empty_like(x, dtype=out_dtype)


@torch.library.register_fake("graphfuse::add_rms_norm_backward")
def _(grad, total_grad, total, weight, eps, gain, offset, mode, need_weight):
    return empty_gradients(total, weight, need_weight)


@torch.library.register_fake("graphfuse::rms_norm_add")
def _(x, residual, weight, eps, gain, offset, mode, normalized_dtype, rounded_dtype, out_dtype):
    return torch.empty_like(x, dtype=out_dtype)


def _setup_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, *options, _, _, _ = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.options, ctx.dtypes = options, (x.dtype, residual.dtype)
    ctx.set_materialize_grads(False)  # the total of the last layer is read by its norm alone


def _differentiate_add_rms_norm(ctx: Any, total_grad: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    _op.refuse_second_derivative("add_rms_norm")
    total, weight = ctx.saved_tensors
    need_weight = weight is not None and ctx.needs_input_grad[2]
    weight_grad = None
    if grad is None:
        x_grad = total_grad
    elif total_grad is None:
        args = (grad, total, weight, *ctx.options, need_weight)
        x_grad, weight_grad = torch.ops.graphfuse.rms_norm_backward(*args)
    else:
        args = (grad, total_grad, total, weight, *ctx.options, need_weight)
        x_grad, weight_grad = torch.ops.graphfuse.add_rms_norm_backward(*args)
    grads = (None if x_grad is None else x_grad.to(dtype) for dtype in ctx.dtypes)
    return *grads, weight_grad if need_weight else None, *[None] * 7


def _setup_rms_norm_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, weight, *options, _, _, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.options, ctx.residual_dtype = options, residual.dtype


def _differentiate_rms_norm_add(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _op.refuse_second_derivative("rms_norm_add")
    x, weight = ctx.saved_tensors
    need_weight = weight is not None and ctx.needs_input_grad[2]
    x_grad, weight_grad = torch.ops.graphfuse.rms_norm_backward(grad, x, weight, *ctx.options, need_weight)
    return x_grad, grad.to(ctx.residual_dtype), weight_grad if need_weight else None, *[None] * 7


torch.library.register_autograd(
    "graphfuse::add_rms_norm", _differentiate_add_rms_norm, setup_context=_setup_add_rms_norm
)
torch.library.register_autograd(
    "graphfuse::rms_norm_add", _differentiate_rms_norm_add, setup_context=_setup_rms_norm_add
)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    offset: float = 0.0,
    mode: str = "inside",
    normalized_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `residual` to `x`, and normalise the sum as `rms_norm` does.

        total = x + residual
        y     = rms_norm(total, weight)

    Args:
        x: (..., D), fp16, bf16, fp32 or fp64. Any strides, as in `rms_norm`.
        residual: Shape of `x`, any of these dtypes.
        weight: (D,), any of these dtypes, or None.
        eps: As `gain`, `offset`, `mode` and `normalized_dtype`: see `rms_norm`.
        gain: Factor of `rstd`.
        offset: Added to `weight`.
        mode: Where `eps` stands: "inside", "outside" or "clamp".
        normalized_dtype: Rounded to before the weight if it is fp16 or bf16.
        out_dtype: Dtype of `y`. Default: that of `x`.

    Returns:
        total: (..., D), of the dtype that `x + residual` has, in the layout that `torch.empty_like(x)` has.
        y: (..., D), of `out_dtype`, in the same layout.

    Raises:
        TypeError: A dtype is not one of those above.
        ValueError: Shapes do not fit, or `mode` is none of those above.

    Numerics: fp32 inside (fp64 if anything is fp64); the norm is that of the rounded total. Gradients are rounded
    once, the weight's is summed in fp32, and they are the same in every run. There is no second derivative.
    Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """
    total_dtype, out_dtype = torch.promote_types(x.dtype, residual.dtype), out_dtype or x.dtype
    _check(x, residual, weight, eps, mode, normalized_dtype, out_dtype)
    dtypes = (normalized_dtype, total_dtype, out_dtype)
    total, y = torch.ops.graphfuse.add_rms_norm(x, residual, weight, eps, gain, offset, mode, *dtypes)
    return total, y


def rms_norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    offset: float = 0.0,
    mode: str = "inside",
    normalized_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise `x` as `rms_norm` does, and add `residual`.

        y = residual + rms_norm(x, weight)

    Args:
        x: (..., D), fp16, bf16, fp32 or fp64. Any strides, as in `rms_norm`.
        residual: Shape of `x`, any of these dtypes.
        weight: (D,), any of these dtypes, or None.
        eps: As `gain`, `offset`, `mode` and `normalized_dtype`: see `rms_norm`.
        gain: Factor of `rstd`.
        offset: Added to `weight`.
        mode: Where `eps` stands: "inside", "outside" or "clamp".
        normalized_dtype: Rounded to before the weight if it is fp16 or bf16.
        out_dtype: Dtype of the norm's result, rounded to before the sum. Default: that of `x`.

    Returns:
        (..., D), of the dtype that a sum of `out_dtype` and `residual` has, in the layout that `torch.empty_like(x)`
        has.

    Raises:
        TypeError: A dtype is not one of those above.
        ValueError: Shapes do not fit, or `mode` is none of those above.

    Numerics: as `add_rms_norm`.
    Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """
    out_dtype = out_dtype or x.dtype
    _check(x, residual, weight, eps, mode, normalized_dtype, out_dtype)
    dtypes = (normalized_dtype, out_dtype, torch.promote_types(out_dtype, residual.dtype))
    y: Tensor = torch.ops.graphfuse.rms_norm_add(x, residual, weight, eps, gain, offset, mode, *dtypes)
    return y


def _check(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    mode: str,
    normalized_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    _op.check_operands(x=x, residual=residual, weight=weight, normalized_dtype=normalized_dtype, out_dtype=out_dtype)
    _op.check_has_dims(x)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    _op.check_vectors(x.shape[-1], weight=weight)
    _norm.check_root(eps, mode)
