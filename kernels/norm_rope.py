"""RMSNorm of heads and rotary position embedding, as queries and keys get them, in one pass over memory each way.

    n  = round(round(x * rstd) * (offset + weight))     as `rms_norm` has it
    y  = the rotation of n                              as `rope` has it
    dn = the transposed rotation of grad
    dx, dweight = those of `rms_norm` for dn

The norm is over the features of a head, or across those of all heads. Backward reads x again: nothing else is saved.

Source: Henry et al. 2020, https://arxiv.org/abs/2010.04245 (normalised queries and keys); Su et al. 2021,
https://arxiv.org/abs/2104.09864 (the rotation)
"""
# Shape letters: D = features of a head, H = heads, T = width of a table.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _norm, _op
from graphfuse.kernels._norm import empty_gradients
from graphfuse.kernels._norm_rope_launch import Backward, Forward, norm_rope_backward_triton_, norm_rope_triton_
from graphfuse.kernels._rms_norm_kernel import NormOptions
from graphfuse.kernels._rope_launch import Rotation
from graphfuse.kernels.rms_norm import differentiate, rms_norm_reference
from graphfuse.kernels.rope import NO_GRADIENT, check_layouts, check_shapes, rope_reference, rotate

__all__ = ["norm_rope", "norm_rope_reference"]


def norm_rope_reference(
    x: Tensor,  # (..., D)
    weight: Tensor | None,  # (D,), or (H * D,) across heads
    cos: Tensor,  # (..., T), broadcastable to x
    sin: Tensor,  # as cos
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    rotated_dtype: torch.dtype,
    layout: str,
    out_layout: str,
    table: str,
    reverse: bool,
    start: int,
    across: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Say what the op computes, in differentiable torch operations."""
    # Between the two only 16-bit dtypes round.
    middle = rotated_dtype if rotated_dtype.itemsize < 4 else _op.compute_dtype(x, weight, cos, sin, out_dtype)
    rows = _rows(x, across)
    n = rms_norm_reference(rows, weight, eps, gain, offset, mode, normalized_dtype, middle)
    n = _heads(n, x, across)
    return rope_reference(n, cos, sin, layout, out_layout, table, reverse, start, out_dtype)


def _rows(x: Tensor, across: int) -> Tensor:
    """Put the features that are normalised together into the last dim."""
    return x if across < 0 else x.movedim(across, -2).flatten(-2)


def _heads(rows: Tensor, x: Tensor, across: int) -> Tensor:
    """Undo `_rows` for a tensor of the shape of x."""
    return rows if across < 0 else rows.unflatten(-1, (x.shape[across], x.shape[-1])).movedim(-2, across)


_OPTIONS = (
    "float eps, float gain, float offset, str mode, {dtypes}str layout, str out_layout, str table, bool reverse, "
    "int start, int across"
)

torch.library.define(
    "graphfuse::norm_rope",
    "(Tensor x, Tensor? weight, Tensor cos, Tensor sin, "
    + _OPTIONS.format(dtypes="ScalarType normalized_dtype, ScalarType rotated_dtype, ")
    + ", ScalarType out_dtype) -> Tensor",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::norm_rope_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor cos, Tensor sin, "
    + _OPTIONS.format(dtypes="")
    + ", bool need_weight) -> (Tensor, Tensor)",
    tags=_op.TAGS,
)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    normalized_dtype: torch.dtype,
    rotated_dtype: torch.dtype,
    layout: str,
    out_layout: str,
    table: str,
    reverse: bool,
    start: int,
    across: int,
    out_dtype: torch.dtype,
) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype)
    options, rotation = NormOptions(eps, gain, offset, mode), Rotation(layout, out_layout, table, reverse, start)
    dtypes = (normalized_dtype, rotated_dtype)
    if x.numel() > 0 and _op.launches(x, weight, cos, sin, out_dtype):
        plain = None if weight is None else weight.contiguous()
        if norm_rope_triton_([Forward(x, plain, y)], cos, sin, options, dtypes, rotation, across):
            return y
    args: tuple[Any, ...] = (*options, *dtypes, *rotation[:5], across, out_dtype)
    return y.copy_(norm_rope_reference(x, weight, cos, sin, *args))


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    gain: float,
    offset: float,
    mode: str,
    layout: str,
    out_layout: str,
    table: str,
    reverse: bool,
    start: int,
    across: int,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    x_grad, weight_grad = empty_gradients(x, weight, need_weight)
    options, rotation = NormOptions(eps, gain, offset, mode), Rotation(layout, out_layout, table, reverse, start)
    wanted = weight_grad if weight is not None and need_weight else None
    if x.numel() > 0 and _op.launches(x, weight, cos, sin, grad):
        plain = None if weight is None else weight.contiguous()
        each = Backward(grad, x, plain, x_grad, wanted)
        if norm_rope_backward_triton_([each], cos, sin, options, rotation, across):
            return x_grad, weight_grad
    compute = _op.compute_dtype(x, weight, cos, sin, grad)
    turned = _rows(rotate(grad, cos, sin, rotation.transposed(), compute), across)
    grads = differentiate(turned, _rows(x, across), weight, options)
    x_grad.copy_(_heads(grads[0], x, across))
    if wanted is not None:
        wanted.copy_(grads[1])
    return x_grad, weight_grad


_op.implement("norm_rope", _forward, repeats=True)
_op.implement("norm_rope_backward", _backward, repeats=True)


@torch.library.register_fake("graphfuse::norm_rope")
def _(x, *args: Any):
    return torch.empty_like(x, dtype=args[-1])


@torch.library.register_fake("graphfuse::norm_rope_backward")
def _(grad, x, weight, *args: Any):
    return empty_gradients(x, weight, args[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, cos, sin, *options = inputs
    for index, name in ((2, "cos"), (3, "sin")):
        if ctx.needs_input_grad[index]:
            raise RuntimeError(f"{name}: {NO_GRADIENT}")
    ctx.save_for_backward(x, weight, cos, sin)
    ctx.options = (*options[:4], *options[6:-1])


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _op.refuse_second_derivative("norm_rope")
    x, weight, cos, sin = ctx.saved_tensors
    need_weight = weight is not None and ctx.needs_input_grad[1]
    args = (x, weight, cos, sin, *ctx.options, need_weight)
    x_grad, weight_grad = torch.ops.graphfuse.norm_rope_backward(grad, *args)
    return x_grad, weight_grad if need_weight else None, *[None] * 15


torch.library.register_autograd("graphfuse::norm_rope", _autograd, setup_context=_setup_context)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    offset: float = 0.0,
    mode: str = "inside",
    normalized_dtype: torch.dtype = torch.float32,
    rotated_dtype: torch.dtype | None = None,
    layout: str = "half",
    out_layout: str | None = None,
    table: str = "half",
    reverse: bool = False,
    start: int = 0,
    across: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise the heads of queries or keys, as `rms_norm` does, and rotate them, as `rope` does.

        y = rope(rms_norm(x, weight, out_dtype=rotated_dtype), cos, sin)

    Args:
        x: (..., D), fp16, bf16, fp32 or fp64; any strides.
        weight: (D,), or (H * D,) with `across`; any of these dtypes, or None.
        cos: (..., T), broadcastable to the leading dims of `x`; any of these dtypes, any strides. Gets no gradient.
        sin: As `cos`.
        eps: As `gain`, `offset`, `mode` and `normalized_dtype`: see `rms_norm`.
        gain: Factor of `rstd`.
        offset: Added to `weight`.
        mode: Where `eps` stands: "inside", "outside" or "clamp".
        normalized_dtype: Rounded to before the weight if it is fp16 or bf16.
        rotated_dtype: Rounded to before the rotation if it is fp16 or bf16. Default: the dtype of `x`.
        layout: As `out_layout`, `table`, `reverse` and `start`: see `rope`.
        out_layout: Where pairs stand in the result. Default: `layout`.
        table: Where the entries of a pair stand in the tables.
        reverse: Whether to turn the other way.
        start: First of the rotated features; either it is 0, or the last feature is rotated.
        across: The dim of the H heads, if the norm is over the features of all of them. Default: over those of each.
        out_dtype: Dtype of the result. Default: that of `x`.

    Returns:
        (..., D), of `out_dtype`, in the layout in memory that `torch.empty_like(x)` has.

    Raises:
        TypeError: A dtype is not one of those above.
        ValueError: Shapes do not fit, an option is none of those above, or a table requires a gradient.

    Numerics: fp32 inside (fp64 if anything is fp64), rounded to `normalized_dtype`, `rotated_dtype` and `out_dtype`.
    Gradients are rounded once, the weight's is summed in fp32, and they are the same in every run. There is no second
    derivative.
    Source: Henry et al. 2020, https://arxiv.org/abs/2010.04245; Su et al. 2021, https://arxiv.org/abs/2104.09864
    """
    out_dtype, rotated_dtype, out_layout = out_dtype or x.dtype, rotated_dtype or x.dtype, out_layout or layout
    given: dict[str, _op.Operand] = {"x": x, "weight": weight, "cos": cos, "sin": sin}
    _op.check_operands(**given, normalized_dtype=normalized_dtype, rotated_dtype=rotated_dtype, out_dtype=out_dtype)
    _norm.check_root(eps, mode)
    check_layouts(layout, out_layout, table)
    check_shapes(x, cos, sin, table, start)
    rotated = cos.shape[-1] * (2 if table == "shared" else 1)
    if 0 < start != x.shape[-1] - rotated:
        raise ValueError(f"start: expected 0 or {x.shape[-1] - rotated}, got {start}")
    if across is not None and not 0 <= across < x.ndim - 1:
        raise ValueError(f"across: expected a leading dim of {x.ndim - 1}, got {across}")
    width = x.shape[-1] * (1 if across is None else x.shape[across])
    _op.check_vectors(width, weight=weight)
    norm = (eps, gain, offset, mode, normalized_dtype, rotated_dtype)
    rotation = (layout, out_layout, table, reverse, start)
    across = -1 if across is None else across
    y: Tensor = torch.ops.graphfuse.norm_rope(x, weight, cos, sin, *norm, *rotation, across, out_dtype)
    return y
