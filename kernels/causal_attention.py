"""Attention under a mask that may turn out to be the causal one.

    out = softmax(scale * q kᵀ, where the mask allows) v

Whether a mask that depends on data (padding, packed documents) is the lower triangle is known only when it is there.
`is_lower_triangle` looks at it, once for all layers, and brings the answer to the host; `causal_attention` then calls
the kernel that skips the upper half and takes grouped keys and values as they are, or the one that reads the mask. The
kernels are PyTorch's own, chosen by its own rules, or by name.

Source: Dao 2023, https://arxiv.org/abs/2307.08691 (the logsumexp kept for backward); Ainslie et al. 2023,
https://arxiv.org/abs/2305.13245 (grouped heads)
"""
# Shape letters: B = sequences, H = heads of queries, G = heads of keys and values, S = positions, D = features of a
# head (E of values), T = positions of keys (S where the mask is causal).

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._sdpa_launch import (
    attend,
    backward,
    fake_backward,
    fake_forward,
    forward,
    key_gradient,
    laid_out,
    triangle,
)

__all__ = ["causal_attention", "causal_attention_reference", "is_lower_triangle", "paths"]

# An additive mask excludes what it pushes this low: exp() is 0 then, in any dtype. -1e4 is lower, as bfloat16 has it.
MASKED = -9e3
# Rows that see nothing whose weights are computed at a time.
ROWS = 128

# How many calls took the causal kernel and how many the one that reads the mask, forward passes only.
paths: Counter[str] = Counter()


def causal_attention_reference(
    query: Tensor,  # (B, H, S, D)
    key: Tensor,  # (B, G, T, D)
    value: Tensor,  # (B, G, T, E)
    mask: Tensor,  # broadcastable to (B, H, S, T); bool: True attends; floating: added
    is_causal: Tensor,  # (), bool
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Say what the op computes, in differentiable torch operations: the result and the scores' logsumexp."""
    causal = bool(is_causal)
    return attend(query, key, value, None if causal else mask, causal, scale)


def absorbing(dtype: torch.dtype) -> float:
    """The number beside which nothing is left of a score of 8 or less, if the two are added in this dtype.

    In a row in which all is hidden behind such numbers the weights go by the mask alone.
    """
    return -30.0 / torch.finfo(dtype).eps


def _blind(query: Tensor, mask: Tensor | None, absorbing_from: float) -> tuple[Tensor | None, Tensor | None]:
    """Which rows (B, H, S, 1) see nothing, all being hidden behind numbers; and the mask in which they see.

    No score is left beside such numbers, so the weights go by what lies between them: by the mask less its largest, and
    a query of 0. The kernels keep the logsumexp of a row, where that of its length is lost beside such a number: with
    the mask as it is, rows would have weights of 1 in backward.
    """
    if mask is None or mask.dtype == torch.bool or query.numel() == 0 or mask.numel() == 0:
        return None, mask
    largest = mask.amax(-1, keepdim=True)
    blind = (largest <= absorbing_from) & (largest > -torch.inf)
    return blind, mask - largest.masked_fill(~blind, 0.0)


def _without(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.masked_fill(rows, 0.0)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    is_causal: Tensor,
    scale: float,
    causal_kernel: str,
    masked_kernel: str,
    is_added: bool,
    absorbing_from: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    causal = bool(is_causal)
    blind, allowed = _blind(query, None if causal else mask, absorbing_from)
    paths["causal" if causal else "masked"] += 1
    kernel = causal_kernel if causal else masked_kernel
    return forward(_without(query, blind), key, value, allowed, causal, scale, kernel, window if causal else 0)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    is_causal: Tensor,
    scale: float,
    causal_kernel: str,
    masked_kernel: str,
    is_added: bool,
    absorbing_from: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    return fake_forward(query, value)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    is_causal: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal_kernel: str,
    masked_kernel: str,
    is_added: bool,
    absorbing_from: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    causal = bool(is_causal)
    blind, allowed = _blind(query, None if causal else mask, absorbing_from)
    kernel = causal_kernel if causal else masked_kernel
    seeing = _without(query, blind)
    slide = window if causal else 0
    q_grad, k_grad, v_grad = backward(grad, seeing, key, value, allowed, causal, out, lse, scale, kernel, slide)
    if blind is not None and allowed is not None and is_added:
        k_grad = laid_out(k_grad + _of_blind(grad, query, key, value, allowed, blind, scale), key)
    else:
        q_grad = _without(q_grad, blind)
    return laid_out(q_grad, query), k_grad, v_grad


def _of_blind(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, blind: Tensor, scale: float
) -> Tensor:
    """What rows that see nothing add to the gradient of the keys: the kernel has not seen their queries.

    Beside a number that is added nothing is left of a score, but autograd's formula of the sum has a gradient of it.
    """
    blind, mask = blind.expand(*query.shape[:3], 1), mask.expand(*query.shape[:3], key.shape[2])
    compute = _op.compute_dtype(query)
    total = torch.zeros_like(key, dtype=compute)
    for rows in blind.any(0).any(0).squeeze(-1).nonzero().squeeze(-1).split(ROWS):
        hidden = query[:, :, rows].masked_fill(~blind[:, :, rows], 0.0)
        weights = mask[:, :, rows].to(compute).masked_fill(~blind[:, :, rows], 0.0).softmax(-1)
        total += key_gradient(grad[:, :, rows], hidden, key, value, weights, scale)
    return total.to(key.dtype)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    is_causal: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal_kernel: str,
    masked_kernel: str,
    is_added: bool,
    absorbing_from: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_backward(query, key, value)


def _looks(mask: Tensor, window: int) -> Tensor:
    if mask.shape[-1] != mask.shape[-2]:
        return torch.tensor(False)
    seen = triangle(mask, window)
    same = mask == seen if mask.dtype == torch.bool else torch.where(seen, mask == 0, mask <= MASKED)
    return same.all().cpu()


_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

torch.library.define("graphfuse::is_lower_triangle", "(Tensor mask, int window) -> Tensor", tags=_TAGS)
torch.library.define(
    "graphfuse::causal_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor is_causal, float scale, str causal_kernel, "
    "str masked_kernel, bool is_added, float absorbing_from, int window) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "graphfuse::causal_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor mask, Tensor is_causal, Tensor out, Tensor lse, "
    "float scale, str causal_kernel, str masked_kernel, bool is_added, float absorbing_from, int window) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_op.implement("is_lower_triangle", _looks)
_op.implement("causal_attention", _forward)
_op.implement("causal_attention_backward", _backward)
torch.library.register_fake("graphfuse::causal_attention", _fake)
torch.library.register_fake("graphfuse::causal_attention_backward", _fake_backward)


@torch.library.register_fake("graphfuse::is_lower_triangle")
def _(mask, window):
    return torch.empty((), dtype=torch.bool, device="cpu")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, causal_kernel, masked_kernel, is_added, absorbing_from, window = inputs
    ctx.options = (scale, causal_kernel, masked_kernel, is_added, absorbing_from, window)
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mask, is_causal, out, lse = ctx.saved_tensors
    tensors = (query, key, value, mask, is_causal, out, lse)
    return *torch.ops.graphfuse.causal_attention_backward(grad, *tensors, *ctx.options), *(None,) * 8


torch.library.register_autograd("graphfuse::causal_attention", _autograd, setup_context=_setup_context)


def is_lower_triangle(mask: Tensor, window: int = 0) -> Tensor:
    """Whether a mask is the causal one, as a () bool tensor on the CPU: waits for the mask to be there.

    Args:
        mask: (..., S, T), bool (True attends) or floating (added to the scores: 0 attends, -9e3 and less does not).
            Where S is not T, the answer is no.
        window: how many keys a position sees, itself and those before it; 0: all of them.
    """
    found: Tensor = torch.ops.graphfuse.is_lower_triangle(mask, window)
    return found


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    is_causal: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
) -> Tensor:
    """Scaled dot-product attention that uses the causal kernel where the mask is the lower triangle.

    Args:
        query: (B, H, S, D), fp16, bf16, fp32 or fp64; any strides with dense features.
        key: (B, G, T, D), H a multiple of G; head h of the queries sees head h * G // H.
        value: (B, G, T, E).
        mask: broadcastable to (B, H, S, T), bool (True attends) or floating (added to the scores). Gets no gradient.
        is_causal: what `is_lower_triangle(mask, window)` returned: () bool, on the CPU.
        scale: of the scores; 1 / sqrt(D) by default.
        window: how many keys a position sees under the causal mask, itself and those before it; 0: all of them.

    Returns:
        (B, H, S, E), in the dtype of `query`.

    Raises:
        TypeError: several dtypes.
        ValueError: not four dimensions, or heads that do not group.
    """
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected {query.dtype} as the queries, got {tensor.dtype}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected (B, heads, S, features), got shape {tuple(tensor.shape)}")
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        heads = query.shape[1], key.shape[1], value.shape[1]
        raise ValueError(f"key: expected heads that divide those of the queries, got {heads}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    absorbing_from = absorbing(_op.compute_dtype(query))
    out: Tensor = torch.ops.graphfuse.causal_attention(
        query, key, value, mask, is_causal, scale, "", "", True, absorbing_from, window
    )[0]
    return out
