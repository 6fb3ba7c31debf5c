"""`rope` and `norm_rope` for queries and keys in one launch, forward and backward.

Both are rotated by the same tables, in the same way. What graphs are rewritten to are ops for one of them each, which
nothing keeps apart from each other; those that meet in a compiled graph become one of these. Their arguments are the
first one's own, the other one's own, and those that they share; their results are the first one's and the other one's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._norm import empty_gradients
from graphfuse.kernels._norm_rope_launch import Backward, Forward, norm_rope_backward_triton_, norm_rope_triton_
from graphfuse.kernels._rms_norm_kernel import NormOptions
from graphfuse.kernels._rope_launch import Rotation, rotate_triton_

ROTATION = "str layout, str out_layout, str table, bool reverse, int start"
NORM = "float eps, float gain, float offset, str mode"
OWN = {  # which arguments of the op for one tensor are its own
    "rope": (0,),
    "rope_backward": (0, 3),
    "norm_rope": (0, 1),
    "norm_rope_backward": (0, 1, 2),
}
SCHEMAS = {
    "rope": f"(Tensor x, Tensor other_x, Tensor cos, Tensor sin, {ROTATION}, ScalarType out_dtype) -> (Tensor, Tensor)",
    "rope_backward": "(Tensor grad, SymInt[] stride, Tensor other_grad, SymInt[] other_stride, "
    f"Tensor cos, Tensor sin, {ROTATION}, ScalarType x_dtype) -> (Tensor, Tensor)",
    "norm_rope": "(Tensor x, Tensor? weight, Tensor other_x, Tensor? other_weight, Tensor cos, Tensor sin, "
    f"{NORM}, ScalarType normalized_dtype, ScalarType rotated_dtype, {ROTATION}, int across, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
    "norm_rope_backward": "(Tensor grad, Tensor x, Tensor? weight, Tensor other_grad, Tensor other_x, "
    f"Tensor? other_weight, Tensor cos, Tensor sin, {NORM}, {ROTATION}, int across, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
}


def apart(name: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the arguments of the op for one tensor, for each of the two."""
    own = OWN[name]
    first, other, shared = args[: len(own)], args[len(own) : 2 * len(own)], args[2 * len(own) :]
    both = ([*shared], [*shared])
    for each, ones in zip(both, (first, other), strict=True):
        for position, value in zip(own, ones, strict=True):
            each.insert(position, value)
    return tuple(both[0]), tuple(both[1])


def _one_by_one(name: str, args: tuple[Any, ...], ops: Any) -> tuple[Tensor, ...]:
    results = [getattr(ops, name)(*each) for each in apart(name, args)]
    return tuple(tensor for each in results for tensor in (each if isinstance(each, tuple) else (each,)))


def _launches(x: Tensor, other: Tensor, *tensors: Tensor | None) -> bool:
    is_like = x.shape[-1] == other.shape[-1] and x.numel() > 0 and other.numel() > 0
    return is_like and _op.launches(x, other, *tensors)


def _rope(x: Tensor, other: Tensor, cos: Tensor, sin: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *rotation, out_dtype = options
    if _launches(x, other, cos, sin, out_dtype):
        y, other_y = torch.empty_like(x, dtype=out_dtype), torch.empty_like(other, dtype=out_dtype)
        if rotate_triton_(x, cos, sin, y, Rotation(*rotation), (other, other_y)):
            return y, other_y
    return _one_by_one("rope", (x, other, cos, sin, *options), _op.direct)


def _rope_backward(
    grad: Tensor,
    stride: list[int],
    other_grad: Tensor,
    other_stride: list[int],
    cos: Tensor,
    sin: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    *rotation, x_dtype = options
    if _launches(grad, other_grad, cos, sin, x_dtype):
        x_grad, other_x_grad = (
            torch.empty_strided(g.shape, s, dtype=x_dtype, device=g.device)
            for g, s in ((grad, stride), (other_grad, other_stride))
        )
        transposed = Rotation(*rotation).transposed()
        if rotate_triton_(grad, cos, sin, x_grad, transposed, (other_grad, other_x_grad)):
            return x_grad, other_x_grad
    args = (grad, stride, other_grad, other_stride, cos, sin, *options)
    return _one_by_one("rope_backward", args, _op.direct)


def _norm_rope(
    x: Tensor,
    weight: Tensor | None,
    other: Tensor,
    other_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    norm, dtypes, rotation, (across, out_dtype) = options[:4], options[4:6], options[6:11], options[11:]
    if _launches(x, other, weight, other_weight, cos, sin, out_dtype) and (weight is None) == (other_weight is None):
        results = [torch.empty_like(each, dtype=out_dtype) for each in (x, other)]
        tensors = [Forward(x, _plain(weight), results[0]), Forward(other, _plain(other_weight), results[1])]
        if norm_rope_triton_(tensors, cos, sin, NormOptions(*norm), dtypes, Rotation(*rotation), across):
            return tuple(results)
    return _one_by_one("norm_rope", (x, weight, other, other_weight, cos, sin, *options), _op.direct)


def _norm_rope_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    other_grad: Tensor,
    other_x: Tensor,
    other_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    norm, rotation, (across, need_weight) = options[:4], options[4:9], options[9:]
    given = ((grad, x, weight), (other_grad, other_x, other_weight))
    others = (weight, other_weight, cos, sin, grad, other_grad)
    if _launches(x, other_x, *others) and (weight is None) == (other_weight is None):
        results = [empty_gradients(one, scale, need_weight) for _, one, scale in given]
        each = [
            Backward(g, one, _plain(scale), x_grad, weight_grad if scale is not None and need_weight else None)
            for (g, one, scale), (x_grad, weight_grad) in zip(given, results, strict=True)
        ]
        if norm_rope_backward_triton_(each, cos, sin, NormOptions(*norm), Rotation(*rotation), across):
            return (*results[0], *results[1])
    return _one_by_one("norm_rope_backward", (*given[0], *given[1], cos, sin, *options), _op.direct)


def _plain(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _register(name: str, function: Any) -> None:
    torch.library.define(f"graphfuse::{name}_pair", SCHEMAS[name], tags=_op.TAGS)
    _op.implement(f"{name}_pair", function, repeats=True)

    @torch.library.register_fake(f"graphfuse::{name}_pair")
    def _(*args: Any) -> tuple[Tensor, ...]:
        return _one_by_one(name, args, torch.ops.graphfuse)


_register("rope", _rope)
_register("rope_backward", _rope_backward)
_register("norm_rope", _norm_rope)
_register("norm_rope_backward", _norm_rope_backward)
