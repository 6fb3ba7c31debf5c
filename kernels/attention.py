"""Attention that was written by hand, by PyTorch's own fused kernels.

    out = softmax(scale * q kᵀ + mask) v

Written as two matrix products and a softmax it keeps the scores and the weights, S x T numbers a head, for backward,
and computes those too that a causal mask hides. `scaled_dot_product_attention` keeps neither; which of PyTorch's
kernels runs is decided by PyTorch's own rules, or by name.

Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Dao 2023, https://arxiv.org/abs/2307.08691
"""
# Shape letters: B = sequences, H = heads of queries, G = heads of keys and values, S = positions, T = positions of
# keys, D = features of a head, E = features of a value.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphfuse.kernels import _op
from graphfuse.kernels._sdpa_launch import backward, fake_backward, fake_forward, forward

__all__ = ["attention", "attention_reference", "mask_of"]


def attention_reference(
    query: Tensor,  # (B, H, S, D)
    key: Tensor,  # (B, G, T, D)
    value: Tensor,  # (B, G, T, E)
    mask: Tensor | None = None,  # broadcastable to (B, H, S, T); bool: True attends; floating: added
    *,
    scale: float,
) -> Tensor:
    """Say what is computed, in differentiable torch operations."""
    groups = query.shape[1] // key.shape[1]
    compute = torch.promote_types(query.dtype, torch.float32)
    key, value = (tensor.to(compute).repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query.to(compute) @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).to(query.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    is_causal: bool = False,
    is_grouped: bool = False,
    takes_groups: bool = True,
    kernel: str = "",
    window: int = 0,
) -> Tensor:
    """Attention of every query to every key, or to those up to its own position, or to the last of those.

    Args:
        query: (B, H, S, D), fp16, bf16, fp32 or fp64.
        key: (B, G, T, D), H a multiple of G; head h of the queries sees head h * G // H.
        value: (B, G, T, E).
        scale: of the scores; `None`, where there is neither a kernel named nor a window, is 1 / sqrt(D).
        is_causal: whether position s sees no more than keys 0 to s.
        is_grouped: whether G is not H.
        takes_groups: whether PyTorch's choice takes fewer heads of keys than of queries; else they are repeated.
        kernel: "flash", "cudnn" or "efficient", where that one takes the call and may; or PyTorch's choice.
        window: how many keys a position sees, itself and those before it, if that is causal; 0: all of them.

    Returns:
        (B, H, S, E), in the dtype of `query`.

    Raises:
        RuntimeError: PyTorch's, of shapes that do not fit.
        ValueError: a window that is not causal.
    """
    if window and not is_causal:
        raise ValueError(f"window: expected 0 where attention is not causal, got {window}")
    if kernel or window:
        out: Tensor = torch.ops.graphfuse.attention(query, key, value, is_causal, scale, kernel, window)[0]
        return out
    if is_grouped and not takes_groups:
        times = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=is_grouped and takes_groups
    )


def _forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, kernel: str, window: int
) -> tuple[Tensor, Tensor]:
    return forward(query, key, value, None, is_causal, scale, kernel, window)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, kernel: str, window: int
) -> tuple[Tensor, Tensor]:
    return fake_forward(query, value)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    out: Tensor,
    lse: Tensor,
    scale: float,
    kernel: str,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, query, key, value, None, is_causal, out, lse, scale, kernel, window)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    out: Tensor,
    lse: Tensor,
    scale: float,
    kernel: str,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_backward(query, key, value)


torch.library.define(
    "graphfuse::attention",
    "(Tensor query, Tensor key, Tensor value, bool is_causal, float scale, str kernel, int window) -> (Tensor, Tensor)",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, bool is_causal, Tensor out, Tensor lse, float scale, "
    "str kernel, int window) -> (Tensor, Tensor, Tensor)",
    tags=_op.TAGS,
)
_op.implement("attention", _forward)
_op.implement("attention_backward", _backward)
torch.library.register_fake("graphfuse::attention", _fake)
torch.library.register_fake("graphfuse::attention_backward", _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale, ctx.kernel, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse = ctx.saved_tensors
    grads = torch.ops.graphfuse.attention_backward(
        grad, query, key, value, ctx.is_causal, out, lse, ctx.scale, ctx.kernel, ctx.window
    )
    return *grads, None, None, None, None


torch.library.register_autograd("graphfuse::attention", _autograd, setup_context=_setup_context)


def mask_of(parts: Sequence[Tensor], steps: Sequence[tuple[str, float]], lowest: float) -> Tensor:
    """The one mask that several make, in the order in which the scores meet them.

    Args:
        parts: broadcastable to each other; bool where they hide or keep, numbers where they are added.
        steps: for each its kind, "add", "hide" (where True) or "keep" (where True), and a number: the factor of what is
            added, or what a hidden score becomes.
        lowest: the number below which no mask goes. What hides stands far below what leaves something of a score, so
            that a row in which all is hidden goes by what hides it, as it did.

    Returns:
        bool, True attends, if nothing is added and all that is hidden is -inf; else numbers to add.
    """
    hiding = sorted({number for kind, number in steps if kind != "add" and number > -torch.inf})
    fills = {number: lowest / 2**k for k, number in enumerate(hiding)} | {-torch.inf: -torch.inf}
    is_bool = not hiding and all(kind != "add" for kind, _ in steps)
    mask: Any = None
    for part, (kind, number) in zip(parts, steps, strict=True):
        if kind == "add":
            term = part if number == 1 else part * number
            mask = term if mask is None else mask + term
        else:
            seen = part.logical_not() if kind == "hide" else part
            if is_bool:
                mask = seen if mask is None else mask.logical_and(seen)
            else:
                mask = torch.where(seen, 0.0 if mask is None else mask, fills[number])
    found: Tensor = mask
    return found
