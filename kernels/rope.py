"""Rotary position embedding.

Pair i of a head, (a, b), is turned by the angle that the tables hold for it:

    p = a * cos1 - sign * b * sin1
    q = b * cos2 + sign * a * sin2        sign = -1 if reverse else 1

Where the members of a pair stand, in x (layout), in the result (out_layout), in a table (table):

    half          i and P + i
    interleaved   2i and 2i + 1
    shared        tables only: one entry for both, at i

The map is linear, so backward is its transpose: the same kernel with the layouts exchanged, the
other sign, and sin1 and sin2 exchanged.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864
"""
# Shape letters: D = features of a head, P = pairs, T = width of a table.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._rope_launch import Rotation, rotate_triton_

__all__ = ["rope", "rope_reference"]

LAYOUTS = ("half", "interleaved")
TABLES = ("shared", "half", "interleaved")
NO_GRADIENT = "expected a table that needs no gradient, got one that requires it"


def rope_reference(
    x: Tensor,  # (..., D)
    cos: Tensor,  # (..., T), broadcastable to x
    sin: Tensor,  # as cos
    layout: str,
    out_layout: str,
    table: str,
    reverse: bool,
    start: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Say what the op computes, in differentiable torch operations."""
    return rotate(x, cos, sin, Rotation(layout, out_layout, table, reverse, start), out_dtype)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotation: Rotation,
    out_dtype: torch.dtype,
) -> Tensor:
    """Do what the reference does, or the transpose of it."""
    compute = _op.compute_dtype(x, cos, sin, out_dtype)
    start, stop = rotation.start, rotation.start + rotation.features(cos.shape[-1])
    a, b = _pairs(x[..., start:stop].to(compute), rotation.layout)
    cos1, cos2 = _pairs(cos.to(compute), rotation.table)
    sin1, sin2 = _pairs(sin.to(compute), rotation.table)
    if rotation.reverse:
        sin1, sin2 = -sin1, -sin2
    if rotation.transpose:
        sin1, sin2 = sin2, sin1
    p = a * cos1 - b * sin1
    q = b * cos2 + a * sin2
    is_half = rotation.out_layout == "half"
    turned = torch.cat((p, q), -1) if is_half else torch.stack((p, q), -1).flatten(-2)
    parts = (x[..., :start], turned, x[..., stop:])
    return torch.cat([part.to(out_dtype) for part in parts], -1)


def _pairs(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return the first and the second members of all pairs."""
    if layout == "shared":
        return values, values
    if layout == "interleaved":
        return values[..., 0::2], values[..., 1::2]
    middle = values.shape[-1] // 2
    return values[..., :middle], values[..., middle:]


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, rotation: Rotation) -> Tensor:
    """Write the rotated x into `y`, whatever its strides."""
    if y.numel() > 0 and _op.launches(x, cos, sin, y) and rotate_triton_(x, cos, sin, y, rotation):
        return y
    return y.copy_(rotate(x, cos, sin, rotation, y.dtype))


torch.library.define(
    "graphfuse::rope",
    "(Tensor x, Tensor cos, Tensor sin, str layout, str out_layout, str table, bool reverse, "
    "int start, ScalarType out_dtype) -> Tensor",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::rope_backward",
    "(Tensor grad, Tensor cos, Tensor sin, SymInt[] stride, str layout, str out_layout, "
    "str table, bool reverse, int start, ScalarType x_dtype) -> Tensor",
    tags=_op.TAGS,
)


def _forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    out_layout: str,
    table: str,
    reverse: bool,
    start: int,
    out_dtype: torch.dtype,
) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype)
    rotation = Rotation(layout, out_layout, table, reverse, start)
    return rotate_(x, cos, sin, y, rotation)


def _backward(
    grad: Tensor,
    cos: Tensor,
    sin: Tensor,
    stride: list[int],
    layout: str,
    out_layout: str,
    table: str,
    reverse: bool,
    start: int,
    x_dtype: torch.dtype,
) -> Tensor:
    x_grad = torch.empty_strided(grad.shape, stride, dtype=x_dtype, device=grad.device)
    rotation = Rotation(layout, out_layout, table, reverse, start).transposed()
    return rotate_(grad, cos, sin, x_grad, rotation)


_op.implement("rope", _forward, repeats=True)
_op.implement("rope_backward", _backward, repeats=True)


@torch.library.register_fake("graphfuse::rope")
def _(x, cos, sin, layout, out_layout, table, reverse, start, out_dtype):
    return torch.empty_like(x, dtype=out_dtype)


@torch.library.register_fake("graphfuse::rope_backward")
def _(grad, cos, sin, stride, layout, out_layout, table, reverse, start, x_dtype):
    return torch.empty_strided(grad.shape, stride, dtype=x_dtype, device=grad.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, *args, _ = inputs
    for index, name in ((1, "cos"), (2, "sin")):
        if ctx.needs_input_grad[index]:
            raise RuntimeError(f"{name}: {NO_GRADIENT}")
    ctx.save_for_backward(cos, sin)
    # The gradient gets the layout of x, whatever that of the incoming one: what x is a view of
    # takes it without a copy.
    ctx.stride, ctx.args, ctx.x_dtype = output.stride(), args, x.dtype


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    args = (ctx.stride, *ctx.args, ctx.x_dtype)
    return torch.ops.graphfuse.rope_backward(grad, cos, sin, *args), *[None] * 8


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, cos, sin, _, *args, _ = inputs
    ctx.save_for_backward(cos, sin)
    ctx.args, ctx.grad_dtype = args, grad.dtype


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Linear: the gradient of the gradient is the map itself.
    cos, sin = ctx.saved_tensors
    args = (*ctx.args, ctx.grad_dtype)
    return torch.ops.graphfuse.rope(grad, cos, sin, *args), *[None] * 9


torch.library.register_autograd("graphfuse::rope", _autograd, setup_context=_setup_context)
torch.library.register_autograd(
    "graphfuse::rope_backward",
    _autograd_backward,
    setup_context=_setup_context_backward,
)


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "half",
    out_layout: str | None = None,
    table: str = "half",
    reverse: bool = False,
    start: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate pairs of features of `x` by the angles whose cosine and sine are given.

        p = a * cos1 - sign * b * sin1
        q = b * cos2 + sign * a * sin2

    Args:
        x: (..., D), fp16, bf16, fp32 or fp64; any strides.
        cos: (..., T), broadcastable to the leading dims of `x`; any of these dtypes, any strides.
            Gets no gradient.
        sin: As `cos`.
        layout: Where the two members of pair i of P stand in `x`: "half" (i and P + i) or
            "interleaved" (2i and 2i + 1).
        out_layout: The same for the result. Default: `layout`.
        table: Where the two entries of pair i stand in `cos` and `sin`: "half", "interleaved", or
            "shared" if there is one for both, at i.
        reverse: Whether to turn the other way.
        start: First of the 2P rotated features; P is T for "shared" tables, else T / 2. The others
            are copied.
        out_dtype: Dtype of the result. Default: that of `x`.

    Returns:
        (..., D), of `out_dtype`, in the layout in memory that `torch.empty_like(x)` has.

    Raises:
        TypeError: A dtype is not one of those above.
        ValueError: Shapes do not fit, an option is none of those above, or a table requires a
            gradient.

    Numerics: fp32 inside (fp64 if anything is fp64), rounded once, to `out_dtype`.
    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864
    """
    out_layout = out_layout or layout
    out_dtype = out_dtype or x.dtype
    _op.check_operands(x=x, cos=cos, sin=sin, out_dtype=out_dtype)
    check_layouts(layout, out_layout, table)
    check_shapes(x, cos, sin, table, start)
    args = (layout, out_layout, table, reverse, start, out_dtype)
    y: Tensor = torch.ops.graphfuse.rope(x, cos, sin, *args)
    return y


def check_layouts(layout: str, out_layout: str, table: str) -> None:
    """Raise ValueError unless all are known."""
    _op.check_choice("layout", layout, LAYOUTS)
    _op.check_choice("out_layout", out_layout, LAYOUTS)
    _op.check_choice("table", table, TABLES)


def check_shapes(x: Tensor, cos: Tensor, sin: Tensor, table: str, start: int) -> None:
    """Raise ValueError unless x and its tables fit."""
    _op.check_has_dims(x)
    width = cos.shape[-1] if cos.ndim else 0
    wanted = (*x.shape[:-1], width)
    for name, values in (("cos", cos), ("sin", sin)):
        got = tuple(values.shape)
        sizes = zip(reversed(got), reversed(wanted), strict=False)
        fits = 0 < len(got) <= x.ndim and all(have in (1, want) for have, want in sizes)
        if not fits or got[-1] != width:
            raise ValueError(f"{name}: expected what broadcasts to {wanted}, got shape {got}")
        if values.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: {NO_GRADIENT}")
    features = 2 * width if table == "shared" else width
    if features == 0 or features % 2:
        raise ValueError(f"cos: expected an even number of features to rotate, got {features}")
    room = x.shape[-1] - features
    if room < 0:
        raise ValueError(f"cos: expected at most {x.shape[-1]} features to rotate, got {features}")
    if not 0 <= start <= room:
        raise ValueError(f"start: expected at least 0 and at most {room}, got {start}")
