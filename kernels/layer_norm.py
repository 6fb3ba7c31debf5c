"""LayerNorm over the last dimension: one pass over memory forward, one backward.

    c      = x - sum(x) / D
    var    = sum(c ** 2) / D
    rstd   = gain / sqrt(var + eps)              mode "inside"
             gain / (sqrt(var) + eps)            mode "outside"
             gain / max(sqrt(var), eps)          mode "clamp"
    y      = round(c * rstd) * (offset + weight) + bias
    u      = grad * (offset + weight)
    dx     = rstd * (u - sum(u) / D - c * k * sum(u * c) / D)
    dweight = sum over rows of grad * c * rstd
    dbias  = sum over rows of grad

    k      = 1 / (var + eps)                     mode "inside"
             1 / (sqrt(var) * (sqrt(var) + eps))         "outside"
             1 / var if sqrt(var) >= eps else 0          "clamp"

Backward reads x again and computes mean and rstd anew: nothing else is saved.

Source: Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450
"""
# Shape letters: D = features of a row.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphfuse.kernels import _norm, _op
from graphfuse.kernels._layer_norm_kernel import layer_norm_backward_kernel, layer_norm_kernel, plan_backward
from graphfuse.kernels._parts import add_parts_, overlap
from graphfuse.kernels._rms_norm_kernel import STAGES, NormOptions, plan_forward
from graphfuse.kernels._triton import launch, num_sms, triton

__all__ = ["layer_norm", "layer_norm_reference"]


def layer_norm_reference(
    x: Tensor,  # (..., D)
    weight: Tensor | None,  # (D,)
    bias: Tensor | None,  # (D,)
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Say what the op computes, in differentiable torch operations."""
    compute = _op.compute_dtype(x, weight, bias, out_dtype)
    h = x.to(compute)
    if mode == "inside":
        h = functional.layer_norm(h, h.shape[-1:], eps=eps) * gain
    else:
        h = h - h.mean(-1, keepdim=True)
        h = h * (gain * _norm.reciprocal_root(h, eps, mode))
    h = _norm.round_and_weigh(h, weight, offset, normalized_dtype)
    return (h if bias is None else h + bias.to(compute)).to(out_dtype)


def _differentiate(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    options: NormOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, in the dtype they are computed in."""
    eps, gain, offset, mode = options
    compute = _op.compute_dtype(x, weight, grad)
    grad, x = grad.to(compute), x.to(compute)
    x = x - x.mean(-1, keepdim=True)
    x = x - x.mean(-1, keepdim=True)  # what rounding had left of a large mean
    inverse, k = _norm.reciprocal_root_and_slope(x, eps, mode)
    rstd = gain * inverse
    weight_grad, bias_grad = _norm.sum_rows(grad * (x * rstd)), _norm.sum_rows(grad)
    if weight is not None:
        grad = grad * (offset + weight.to(compute))
    grad = grad - x * (k * (grad * x).mean(-1, keepdim=True)) - grad.mean(-1, keepdim=True)
    return rstd * grad, weight_grad, bias_grad


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    options: NormOptions,
    normalized_dtype: torch.dtype,
) -> None:
    """Launch the kernel, which writes `y`."""
    if x.numel() == 0:
        return
    (x,), walk = _norm.walk_over((x,), y)
    plan = plan_forward(x.shape[-1], walk.rows)
    launch(
        layer_norm_kernel,
        (triton.cdiv(walk.rows, plan.block_r),),
        x,
        weight,
        bias,
        y,
        *walk.strides,
        0 if weight is None else weight.stride(0),
        0 if bias is None else bias.stride(0),
        walk.rows,
        walk.n1,
        walk.n2,
        x.shape[-1],
        *options,
        NORMALIZED=_norm.rounding(normalized_dtype),
        BLOCK_R=plan.block_r,
        BLOCK_D=plan.block_d,
        num_warps=plan.num_warps,
    )


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    x_grad: Tensor,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
    options: NormOptions,
) -> None:
    """Launch the kernels, which write `x_grad`, and `weight_grad` and `bias_grad` unless they are None."""
    totals = (weight_grad, bias_grad)
    if x.numel() == 0:
        for total in totals:
            if total is not None:
                total.zero_()
        return
    (grad, x), walk = _norm.walk_over((grad, x), x_grad)
    features = x.shape[-1]
    plan = plan_backward(features, walk.rows)
    tiles = triton.cdiv(walk.rows, plan.block_r)
    num_programs = min(tiles, plan.per_sm * num_sms(x.device))
    parts = [
        None if total is None else torch.empty(num_programs, features, dtype=torch.float32, device=x.device)
        for total in totals
    ]
    launch(
        layer_norm_backward_kernel,
        (num_programs,),
        grad,
        x,
        weight,
        x_grad,
        *parts,
        *walk.strides,
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
    add_parts_(*zip(parts, totals, strict=True))


torch.library.define(
    "graphfuse::layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, float gain, float offset, str mode, "
    "ScalarType normalized_dtype, ScalarType out_dtype) -> Tensor",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, float eps, float gain, float offset, str mode, "
    "bool need_weight, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)",
    tags=_op.TAGS,
)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype)
    options = NormOptions(eps, gain, offset, mode)
    if _norm.launches(x, weight, bias, out_dtype):
        _launch_forward(x, weight, bias, y, options, normalized_dtype)
        return y
    return y.copy_(layer_norm_reference(x, weight, bias, *options, normalized_dtype, out_dtype))


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    need_weight: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty_gradients(x, weight, need_weight, bias_dtype)
    options = NormOptions(eps, gain, offset, mode)
    x_grad, weight_grad, bias_grad = grads
    wanted_weight = weight_grad if weight is not None and need_weight else None
    wanted_bias = None if bias_dtype is None else bias_grad
    if _norm.launches(x, weight, grad):
        _launch_backward(grad, x, weight, x_grad, wanted_weight, wanted_bias, options)
        return grads
    values = _differentiate(grad, x, weight, options)
    for result, value in zip((x_grad, wanted_weight, wanted_bias), values, strict=True):
        if result is not None:
            result.copy_(value)
    return grads


def _empty_gradients(
    x: Tensor, weight: Tensor | None, need_weight: bool, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of backward; what is not needed has no elements."""
    weight_grad = torch.empty_like(weight) if weight is not None and need_weight else x.new_empty(0)
    bias_grad = x.new_empty(0 if bias_dtype is None else x.shape[-1], dtype=bias_dtype)
    return torch.empty_like(x), weight_grad, bias_grad


_op.implement("layer_norm", _forward, repeats=True)
_op.implement("layer_norm_backward", _backward, repeats=True)


@torch.library.register_fake("graphfuse::layer_norm")
def _(x, weight, bias, eps, gain, offset, mode, normalized_dtype, out_dtype):
    return torch.empty_like(x, dtype=out_dtype)


@torch.library.register_fake("graphfuse::layer_norm_backward")
def _(grad, x, weight, eps, gain, offset, mode, need_weight, bias_dtype):
    return _empty_gradients(x, weight, need_weight, bias_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *options, _, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.options = options


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _op.refuse_second_derivative("layer_norm")
    x, weight = ctx.saved_tensors
    need_weight = weight is not None and ctx.needs_input_grad[1]
    bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[2] else None
    args = (x, weight, *ctx.options, need_weight, bias_dtype)
    x_grad, weight_grad, bias_grad = torch.ops.graphfuse.layer_norm_backward(grad, *args)
    weight_grad = weight_grad if need_weight else None
    return x_grad, weight_grad, None if bias_dtype is None else bias_grad, *[None] * 6


torch.library.register_autograd("graphfuse::layer_norm", _autograd, setup_context=_setup_context)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    gain: float = 1.0,
    offset: float = 0.0,
    mode: str = "inside",
    normalized_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Subtract the mean of the last dim of `x`, divide by its standard deviation, scale it by `weight`, add `bias`.

        y = round((x - mean) * rstd) * (offset + weight) + bias

    Args:
        x: (..., D), fp16, bf16, fp32 or fp64. Any strides; without a copy if its leading dims can
            be seen as three, as those of heads cut out of one projection and transposed can.
        weight: (D,), any of these dtypes, or None: then it is no factor.
        bias: (D,), any of these dtypes, or None: then it is no term.
        eps: 0 or more; where it stands, see `mode`.
        gain: Factor of `rstd`.
        offset: Added to `weight`.
        mode: What `rstd` is, of the biased variance: "inside", gain / sqrt(variance + eps),
            "outside", gain / (sqrt(variance) + eps), or "clamp", gain / max(sqrt(variance), eps).
        normalized_dtype: Rounded to before the weight if it is fp16 or bf16.
        out_dtype: Dtype of the result. Default: that of `x`.

    Returns:
        (..., D), of `out_dtype`, in the layout in memory that `torch.empty_like(x)` has.

    Raises:
        TypeError: A dtype is not one of those above.
        ValueError: `weight` or `bias` is not (D,), `x` has no dims, or `mode` is none of those above.

    Numerics: fp32 inside (fp64 if anything is fp64), rounded to `normalized_dtype` and to
    `out_dtype`. The variance is that of the centred row, not a difference of means. Gradients are
    rounded once, those of weight and bias are summed in fp32, and they are the same in every run.
    There is no second derivative.
    Source: Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450
    """
    out_dtype = out_dtype or x.dtype
    _op.check_operands(x=x, weight=weight, bias=bias, normalized_dtype=normalized_dtype, out_dtype=out_dtype)
    _op.check_has_dims(x)
    _op.check_vectors(x.shape[-1], weight=weight, bias=bias)
    _norm.check_root(eps, mode)
    options = (eps, gain, offset, mode, normalized_dtype, out_dtype)
    y: Tensor = torch.ops.graphfuse.layer_norm(x, weight, bias, *options)
    return y
