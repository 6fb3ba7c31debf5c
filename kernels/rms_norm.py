"""RMSNorm over the last dimension: one pass over memory forward, one backward.

    mean   = sum(x ** 2) / D
    rstd   = gain / sqrt(mean + eps)             mode "inside"
             gain / (sqrt(mean) + eps)           mode "outside"
             gain / max(sqrt(mean), eps)         mode "clamp"
    y      = round(x * rstd) * (offset + weight)
    u      = grad * (offset + weight)
    dx     = rstd * (u - x * k * sum(u * x) / D)
    dweight = sum over rows of grad * x * rstd

    k      = 1 / (mean + eps)                    mode "inside"
             1 / (sqrt(mean) * (sqrt(mean) + eps))        "outside"
             1 / mean if sqrt(mean) >= eps else 0         "clamp"

Backward reads x again and computes rstd anew: nothing else is saved.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
"""
# Shape letters: D = features of a row.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _norm, _op
from graphfuse.kernels._norm import empty_gradients, walk_over
from graphfuse.kernels._parts import add_parts_, overlap
from graphfuse.kernels._rms_norm_kernel import (
    STAGES,
    NormOptions,
    plan_backward,
    plan_forward,
    rms_norm_backward_kernel,
    rms_norm_kernel,
)
from graphfuse.kernels._triton import launch, num_sms, triton

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(
    x: Tensor,  # (..., D)
    weight: Tensor | None,  # (D,)
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Say what the op computes, in differentiable torch operations."""
    h = x.to(_op.compute_dtype(x, weight, out_dtype))
    h = h * (gain * _norm.reciprocal_root(h, eps, mode))
    return _norm.round_and_weigh(h, weight, offset, normalized_dtype).to(out_dtype)


def differentiate(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    options: NormOptions,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, in the dtype they are computed in."""
    eps, gain, offset, mode = options
    compute = _op.compute_dtype(x, weight, grad)
    grad, x = grad.to(compute), x.to(compute)
    inverse, k = _norm.reciprocal_root_and_slope(x, eps, mode)
    rstd = gain * inverse
    weight_grad = _norm.sum_rows(grad * (x * rstd))
    if weight is not None:
        grad = grad * (offset + weight.to(compute))
    return rstd * (grad - x * (k * (grad * x).mean(-1, keepdim=True))), weight_grad


def launch_forward(
    x: Tensor,
    weight: Tensor | None,
    y: Tensor,
    options: NormOptions,
    normalized_dtype: torch.dtype,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    rounded_dtype: torch.dtype = torch.float32,
) -> None:
    """Launch the kernel, which writes `y`, and `total` = x + residual.

    Without a `total`, the residual is added to what is normalized, after that was rounded.
    """
    if x.numel() == 0:
        return
    inputs, walk = walk_over((x,) if residual is None else (x, residual), y)
    x = inputs[0]
    x_strides, y_strides = walk.strides[0], walk.strides[-1]
    residual_strides = x_strides if residual is None else walk.strides[1]
    plan = plan_forward(x.shape[-1], walk.rows)
    launch(
        rms_norm_kernel,
        (triton.cdiv(walk.rows, plan.block_r),),
        x,
        weight,
        None if residual is None else inputs[1],
        total,
        y,
        x_strides,
        residual_strides,
        y_strides,  # a total has the layout of y
        y_strides,
        0 if weight is None else weight.stride(0),
        walk.rows,
        walk.n1,
        walk.n2,
        x.shape[-1],
        *options,
        NORMALIZED=_norm.rounding(normalized_dtype),
        ROUNDED=_norm.rounding(rounded_dtype),
        BLOCK_R=plan.block_r,
        BLOCK_D=plan.block_d,
        num_warps=plan.num_warps,
    )


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    x_grad: Tensor,
    weight_grad: Tensor | None,
    options: NormOptions,
    add: Tensor | None = None,
) -> None:
    """Launch the kernels, which write `x_grad`, with `add` added, and `weight_grad` unless that is None."""
    if x.numel() == 0:
        if weight_grad is not None:
            weight_grad.zero_()
        return
    inputs, walk = walk_over((grad, x) if add is None else (grad, x, add), x_grad)
    features = x.shape[-1]
    plan = plan_backward(features, walk.rows)
    tiles = triton.cdiv(walk.rows, plan.block_r)
    num_programs = min(tiles, plan.per_sm * num_sms(x.device))
    parts = None
    if weight_grad is not None:
        parts = torch.empty(num_programs, features, dtype=torch.float32, device=x.device)
    launch(
        rms_norm_backward_kernel,
        (num_programs,),
        inputs[0],
        inputs[1],
        weight,
        None if add is None else inputs[2],
        x_grad,
        parts,
        walk.strides[0],
        walk.strides[1],
        walk.strides[-1 if add is None else 2],
        walk.strides[-1],
        0 if weight is None else weight.stride(0),
        walk.rows,
        walk.n1,
        walk.n2,
        features,
        *options,
        OVERLAP=overlap(x.device),
        BLOCK_R=plan.block_r,
        BLOCK_D=plan.block_d,
        STAGES=STAGES,
        num_warps=plan.num_warps,
    )
    add_parts_((parts, weight_grad))


torch.library.define(
    "graphfuse::rms_norm",
    "(Tensor x, Tensor? weight, float eps, float gain, float offset, str mode, "
    "ScalarType normalized_dtype, ScalarType out_dtype) -> Tensor",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, float eps, float gain, float offset, str mode, "
    "bool need_weight) -> (Tensor, Tensor)",
    tags=_op.TAGS,
)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype)
    options = NormOptions(eps, gain, offset, mode)
    if _norm.launches(x, weight, out_dtype):
        launch_forward(x, weight, y, options, normalized_dtype)
        return y
    return y.copy_(rms_norm_reference(x, weight, *options, normalized_dtype, out_dtype))


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    x_grad, weight_grad = empty_gradients(x, weight, need_weight)
    options = NormOptions(eps, gain, offset, mode)
    if _norm.launches(x, weight, grad):
        wanted = weight_grad if weight is not None and need_weight else None
        launch_backward(grad, x, weight, x_grad, wanted, options)
        return x_grad, weight_grad
    grads = differentiate(grad, x, weight, options)
    x_grad.copy_(grads[0])
    if weight is not None and need_weight:
        weight_grad.copy_(grads[1])
    return x_grad, weight_grad


_op.implement("rms_norm", _forward, repeats=True)
_op.implement("rms_norm_backward", _backward, repeats=True)


@torch.library.register_fake("graphfuse::rms_norm")
def _(x, weight, eps, gain, offset, mode, normalized_dtype, out_dtype):
    return torch.empty_like(x, dtype=out_dtype)


@torch.library.register_fake("graphfuse::rms_norm_backward")
def _(grad, x, weight, eps, gain, offset, mode, need_weight):
    return empty_gradients(x, weight, need_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *options, _, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.options = options


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _op.refuse_second_derivative("rms_norm")
    x, weight = ctx.saved_tensors
    need_weight = weight is not None and ctx.needs_input_grad[1]
    args = (x, weight, *ctx.options, need_weight)
    x_grad, weight_grad = torch.ops.graphfuse.rms_norm_backward(grad, *args)
    return x_grad, weight_grad if need_weight else None, *[None] * 6


torch.library.register_autograd("graphfuse::rms_norm", _autograd, setup_context=_setup_context)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    offset: float = 0.0,
    mode: str = "inside",
    normalized_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Divide the last dim of `x` by its root mean square, then scale it by `weight`.

        y = round(x * rstd) * (offset + weight)

    Args:
        x: (..., D), fp16, bf16, fp32 or fp64. Any strides; without a copy if its leading dims can
            be seen as three, as those of heads cut out of one projection and transposed can.
        weight: (D,), any of these dtypes, or None: then y = round(x * rstd).
        eps: 0 or more; where it stands, see `mode`.
        gain: Factor of `rstd`.
        offset: Added to `weight`.
        mode: What `rstd` is, of mean = mean(x ** 2, -1): "inside", gain / sqrt(mean + eps),
            "outside", gain / (sqrt(mean) + eps), or "clamp", gain / max(sqrt(mean), eps).
        normalized_dtype: Rounded to before the weight if it is fp16 or bf16.
        out_dtype: Dtype of the result. Default: that of `x`.

    Returns:
        (..., D), of `out_dtype`, in the layout in memory that `torch.empty_like(x)` has.

    Raises:
        TypeError: A dtype is not one of those above.
        ValueError: `weight` is not (D,), `x` has no dims, or `mode` is none of those above.

    Numerics: fp32 inside (fp64 if anything is fp64), rounded to `normalized_dtype` and to
    `out_dtype`. Gradients are rounded once, the weight's is summed in fp32, and they are the same
    in every run. There is no second derivative.
    Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """
    out_dtype = out_dtype or x.dtype
    _op.check_operands(x=x, weight=weight, normalized_dtype=normalized_dtype, out_dtype=out_dtype)
    _op.check_has_dims(x)
    _op.check_vectors(x.shape[-1], weight=weight)
    _norm.check_root(eps, mode)
    options = (eps, gain, offset, mode, normalized_dtype, out_dtype)
    y: Tensor = torch.ops.graphfuse.rms_norm(x, weight, *options)
    return y
