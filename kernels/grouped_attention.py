"""Attention of few queries for each head, over keys and values that several heads may share.

    out = softmax(scale * q kᵀ + mask) v

As many heads of keys as of queries is what PyTorch's kernels want where they read a mask, and repeating the keys and
values of a group copies all that a cache holds. With one query for each head, the queries of a group may as well be
the rows of one head: nothing is repeated, and a mask applies to all of them alike. PyTorch's kernels take that, with a
gradient; without one there is a kernel that shares out the keys of a head to as many programs as a GPU runs at once.

Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245 (grouped heads); Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html (keys shared out)
"""
# Shape letters: B = sequences, H = heads of queries, G = heads of keys and values, S = positions of queries,
# T = positions of keys, D = features of a head, E = features of a value.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphfuse.kernels import _op
from graphfuse.kernels._split_attention_kernel import launch_split_attention

__all__ = ["grouped_attention", "grouped_attention_reference"]


def grouped_attention_reference(
    query: Tensor,  # (B, H, S, D)
    key: Tensor,  # (B, G, T, D)
    value: Tensor,  # (B, G, T, E)
    mask: Tensor | None = None,  # broadcastable to (B, H, S, T); bool: True attends; floating: added
    *,
    scale: float,
) -> Tensor:
    """Say what is computed, in differentiable torch operations."""
    compute = torch.promote_types(query.dtype, torch.float32)
    key, value = (states.to(compute).repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    scores = query.to(compute) @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # A query that sees nothing gets 0, as from PyTorch's kernels; behind numbers, all weigh the same.
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    return (weights @ value).to(query.dtype)


def _forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    out = _empty(query, value)
    added = mask if mask is not None and mask.is_floating_point() else None
    if not _op.launches(query, key, value, added):
        return out.copy_(grouped_attention_reference(query, key, value, mask, scale=scale))
    if out.numel() and key.shape[2]:
        launch_split_attention(query, key, value, mask, out, scale)
        return out
    return out.zero_()


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return _empty(query, value)


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """The result, with the heads inside the tokens."""
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)


torch.library.define(
    "graphfuse::grouped_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
    tags=_op.TAGS,
)
_op.implement("grouped_attention", _forward, repeats=True)
torch.library.register_fake("graphfuse::grouped_attention", _fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError('kernel: expected "" where a gradient is wanted, got "split", which has none')


torch.library.register_autograd("graphfuse::grouped_attention", _autograd, setup_context=_setup_context)


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    kernel: str = "",
) -> Tensor:
    """Attention of one query for each head, or of a few.

    Args:
        query: (B, H, S, D), fp16, bf16, fp32 or fp64; S is 1 unless a kernel is named.
        key: (B, G, T, D), H a multiple of G; head h of the queries sees head h * G // H.
        value: (B, G, T, E).
        mask: broadcastable to (B, 1, 1, T), with a named kernel to (B, H, S, T); bool (True attends) or floating
            (added to the scores).
        scale: of the scores; `None`, where no kernel is named, is 1 / sqrt(D).
        kernel: "split" shares out the keys of a head, and has no gradient; by default one of PyTorch's runs.

    Returns:
        (B, H, S, E), in the dtype of `query`.

    Raises:
        RuntimeError: PyTorch's, of shapes that do not fit; a gradient of "split" is asked for.

    Numerics, of "split": scores, weights and sums in fp32, weights rounded to the dtype of the values before they
    weigh them, and the same bits in every run. What all keys are hidden from by False or -inf gets 0, as from PyTorch's
    kernels; by numbers, the mean of all values.
    """
    if kernel:
        split: Tensor = torch.ops.graphfuse.grouped_attention(query, key, value, mask, scale)
        return split
    rows = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.unsqueeze(3).flatten(1, 2)
