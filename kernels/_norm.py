"""What the norms of rows share around their kernels: roots, rounding, weights, the walk over rows."""
# Shape letters: D = features of a row.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._rms_norm_kernel import MAX_ROWS, Walk, plan_walk
from graphfuse.kernels._triton import tl

MODES = ("inside", "outside", "clamp")


def check_root(eps: float, mode: str) -> None:
    """Raise ValueError unless these are options of `reciprocal_root`."""
    _op.check_choice("mode", mode, MODES)
    if not eps >= 0:
        raise ValueError(f"eps: expected 0 or a positive number, got {eps}")


def reciprocal_root(h: Tensor, eps: float, mode: str) -> Tensor:  # (..., D) -> (..., 1)
    """Return what rows are multiplied by, differentiably."""
    if mode == "inside":
        return (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    # Has a gradient, 0, in a row of zeros too.
    root = torch.linalg.vector_norm(h, dim=-1, keepdim=True) / math.sqrt(max(h.shape[-1], 1))
    divisor: Tensor = root + eps if mode == "outside" else root.clamp(min=eps)
    return divisor.reciprocal()


def reciprocal_root_and_slope(h: Tensor, eps: float, mode: str) -> tuple[Tensor, Tensor]:
    """Return `reciprocal_root`, and k in its gradient, -k * reciprocal_root * h / D."""
    mean = h.square().mean(-1, keepdim=True)
    if mode == "inside":
        inverse = (mean + eps).rsqrt()
        return inverse, inverse.square()
    root = mean.sqrt()
    if mode == "outside":
        inverse = 1 / (root + eps)
        return inverse, torch.where(root > 0, inverse / root, 0)
    inverse = 1 / root.clamp(min=eps)
    return inverse, torch.where((root >= eps) & (root > 0), inverse.square(), 0)


def round_and_weigh(h: Tensor, weight: Tensor | None, offset: float, normalized_dtype: torch.dtype) -> Tensor:
    """Return round(h) * (offset + weight), in the dtype of h."""
    if normalized_dtype.itemsize < 4:
        h = h.to(normalized_dtype).to(h.dtype)
    return h if weight is None else h * (offset + weight.to(h.dtype))


def sum_rows(values: Tensor) -> Tensor:  # (..., D) -> (D,)
    """Sum over all leading dims."""
    return values.flatten(end_dim=-2).sum(0) if values.ndim > 1 else values


def empty_gradients(x: Tensor, weight: Tensor | None, need_weight: bool) -> tuple[Tensor, Tensor]:
    """Allocate the results of backward; that of weight has no elements if not needed."""
    if weight is not None and need_weight:
        return torch.empty_like(x), torch.empty_like(weight)
    return torch.empty_like(x), (x if weight is None else weight).new_empty(0)


def launches(x: Tensor, *others: _op.Operand) -> bool:
    """Whether the kernels run, rather than the reference."""
    return _op.launches(x, *others) and x.numel() <= MAX_ROWS * x.shape[-1]


def rounding(dtype: torch.dtype) -> Any:
    """Return what Triton calls a dtype that rounds fp32, or None."""
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype)


def walk_over(inputs: tuple[Tensor, ...], output: Tensor) -> tuple[tuple[Tensor, ...], Walk]:
    """Return the walk, and the inputs, copied if their strides allow none."""
    walk = plan_walk(output.shape, *(x.stride() for x in inputs), output.stride())
    if walk is None:
        inputs = tuple(torch.empty_like(output, dtype=x.dtype).copy_(x) for x in inputs)
        walk = plan_walk(output.shape, *(x.stride() for x in inputs), output.stride())
    assert walk is not None, "dense tensors of one layout have at most two leading dims"
    return inputs, walk
