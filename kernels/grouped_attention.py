"""Attention of one query for each head, over keys and values that several heads share, by PyTorch's own kernels.

    out = softmax(scale * q kᵀ + mask) v

As many heads of keys as of queries is what PyTorch's kernels want where they read a mask, and repeating the keys and
values of a group copies all that a cache holds. With one query for each head, the queries of a group may as well be
the rows of one head: nothing is repeated, and a mask applies to all of them alike.

Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245 (grouped heads)
"""
# Shape letters: B = sequences, H = heads of queries, G = heads of keys and values, T = positions of keys, D = features
# of a head, E = features of a value.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["grouped_attention", "grouped_attention_reference"]


def grouped_attention_reference(
    query: Tensor,  # (B, H, 1, D)
    key: Tensor,  # (B, G, T, D)
    value: Tensor,  # (B, G, T, E)
    mask: Tensor | None = None,  # broadcastable to (B, 1, 1, T); bool: True attends; floating: added
    *,
    scale: float,
) -> Tensor:
    """Say what is computed, in differentiable torch operations."""
    compute = torch.promote_types(query.dtype, torch.float32)
    key, value = (states.to(compute).repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    scores = query.to(compute) @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).to(query.dtype)


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Attention of one query for each head.

    Args:
        query: (B, H, 1, D), fp16, bf16, fp32 or fp64.
        key: (B, G, T, D), H a multiple of G; head h of the queries sees head h * G // H.
        value: (B, G, T, E).
        mask: broadcastable to (B, 1, 1, T), bool (True attends) or floating (added to the scores).
        scale: of the scores; 1 / sqrt(D) by default.

    Returns:
        (B, H, 1, E), in the dtype of `query`.

    Raises:
        RuntimeError: PyTorch's, of shapes that do not fit.
    """
    rows = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.unsqueeze(3).flatten(1, 2)
