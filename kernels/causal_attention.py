"""Attention under a mask that may turn out to be the causal one.

    out = softmax(scale * q kᵀ, where the mask allows) v

Whether a mask that depends on data (padding, packed documents) is the lower triangle is known only when it is there.
`is_lower_triangle` looks at it, once for all layers, and brings the answer to the host; `causal_attention` then calls
the kernel that skips the upper half and takes grouped keys and values as they are, or the one that reads the mask. The
kernels are PyTorch's own, chosen by its own rules.

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
from torch.nn.attention import SDPBackend

from graphfuse.kernels import _op
from graphfuse.kernels._sdpa_kernel import sdpa_kernel

__all__ = ["causal_attention", "causal_attention_reference", "is_lower_triangle", "paths"]

aten = torch.ops.aten

# An additive mask excludes what it pushes this low: exp() is 0 then, in any dtype. -1e4 is lower, as bfloat16 has it.
MASKED = -9e3
# This low, nothing of a score is left beside it in float32: a row in which all is hidden has equal weights.
ABSORBING = -1e6

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
    scores = _scores(query, key, None if is_causal else mask, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    out = weights @ _repeat(value, query).to(weights.dtype)
    return out.to(query.dtype), lse


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled scores (B, H, S, T), -inf where nothing may be seen; `None` is the causal mask."""
    compute = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(compute) @ _repeat(key, query).to(compute).mT * scale
    if mask is None:
        mask = _triangle(scores)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(compute)


def _triangle(like: Tensor) -> Tensor:
    return torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device).tril()


def _repeat(states: Tensor, query: Tensor) -> Tensor:
    """One head of keys or values for each head of queries."""
    if states.shape[1] == query.shape[1]:
        return states
    return states.transpose(1, 2).repeat_interleave(query.shape[1] // states.shape[1], 2).transpose(1, 2)


def _sum_groups(grad: Tensor, states: Tensor) -> Tensor:
    """The gradient of what `_repeat` repeated."""
    return grad.unflatten(1, (states.shape[1], -1)).sum(2) if grad.shape[1] != states.shape[1] else grad


def _bias(mask: Tensor | None, query: Tensor, backend: SDPBackend) -> Tensor | None:
    """A mask as the fused kernels add it: in the dtype of the queries, with 4 dims.

    One kernel wants all heads, and rows aligned to 8 elements; the others want rows without gaps.
    """
    if mask is None or backend == SDPBackend.MATH:
        return None
    length = mask.shape[-1]
    is_padded = backend == SDPBackend.EFFICIENT_ATTENTION
    bias = query.new_empty((*mask.shape[:-1], -(-length // 8) * 8 if is_padded else length))[..., :length]
    if mask.dtype == torch.bool:
        bias.zero_().masked_fill_(~mask, -torch.inf)
    else:
        bias.copy_(mask)
    if is_padded:
        return bias.expand(*query.shape[:-1], length)
    return bias.view(*(1,) * (4 - bias.dim()), *bias.shape)


def _blind(query: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which rows (B, H, S, 1) see nothing, all being hidden behind numbers.

    Their weights are equal, which no query and no mask makes them too. The kernels keep the logsumexp of a row, where
    that of its length is lost beside such a number: with the mask they would have weights of 1 in backward.
    """
    if mask is None or mask.dtype == torch.bool or query.numel() == 0:
        return None
    largest = mask.amax(-1, keepdim=True)
    return (largest <= ABSORBING) & (largest > -torch.inf)


def _without(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.masked_fill(rows, 0.0)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Any, ...]:
    """The kernel, and query, key, value and mask as it takes them: groups are for the causal kernels on GPUs."""
    if mask is not None:
        key, value = _repeat(key, query), _repeat(value, query)
    backend = sdpa_kernel(query, key, value, mask, scale)
    knows_groups = query.is_cuda and backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    if query.shape[1] != key.shape[1] and not knows_groups:
        key, value = _repeat(key, query), _repeat(value, query)
        backend = sdpa_kernel(query, key, value, mask, scale)
    if backend == SDPBackend.CUDNN_ATTENTION:
        query, key, value = (_heads_within_tokens(states) for states in (query, key, value))
    return backend, query, key, value, _bias(mask, query, backend)


def _heads_within_tokens(states: Tensor) -> Tensor:
    """The states (B, H, S, D) as they come out of a linear layer: (B, S, H, D) in memory.

    The one layout in which cuDNN's backward is right whatever that of the result's gradient: where the queries have
    another one than the result or its gradient, it returns wrong gradients (torch 2.11, also under PyTorch's own call).
    """
    return states.transpose(1, 2).contiguous().transpose(1, 2)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, is_causal: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    allowed = None if is_causal else mask
    if (blind := _blind(query, allowed)) is not None:
        query, mask = _without(query, blind), _without(mask, blind)
        allowed = mask
    paths["causal" if allowed is None else "masked"] += 1
    backend, q, k, v, bias = _fits(query, key, value, allowed, scale)
    causal = allowed is None
    if query.numel() == 0 or backend == SDPBackend.MATH:
        out, lse = causal_attention_reference(query, key, value, mask, is_causal, scale)
    elif not query.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif backend == SDPBackend.FLASH_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True, scale=scale)
    elif backend == SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention.default(q, k, v, bias, True, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention.default(
            q, k, v, bias, True, 0.0, causal, scale=scale
        )
    lse = lse.reshape(*lse.shape[:2], -1)[..., : query.shape[2]]
    return _heads_within_tokens(out.to(query.dtype)), lse.contiguous().to(_lse_dtype(query))


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the dtype and strides that the compiler was told."""
    if tensor.stride() == like.stride() and tensor.dtype == like.dtype:
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=tensor.device).copy_(tensor)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, is_causal: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    return out, query.new_empty((batch, heads, length), dtype=_lse_dtype(query))


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
) -> tuple[Tensor, Tensor, Tensor]:
    allowed = None if is_causal else mask
    seeing = query
    if (blind := _blind(query, allowed)) is not None:
        seeing, allowed = _without(query, blind), _without(mask, blind)
    causal = allowed is None
    backend, q, k, v, bias = _fits(seeing, key, value, allowed, scale)
    unused = torch.empty((), dtype=torch.int64, device=query.device)  # the state of a dropout that there is not
    length, keys = query.shape[2], key.shape[2]
    if query.numel() == 0 or backend == SDPBackend.MATH:
        grads = _backward_reference(grad, seeing, key, value, allowed, lse, scale)
    elif not query.is_cuda:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif backend == SDPBackend.FLASH_ATTENTION:
        grads = aten._scaled_dot_product_flash_attention_backward.default(
            grad, q, k, v, out, lse, None, None, length, keys, 0.0, True, unused, unused, scale=scale
        )
    elif backend == SDPBackend.CUDNN_ATTENTION:
        grads = aten._scaled_dot_product_cudnn_attention_backward.default(
            _heads_within_tokens(grad),
            q,
            k,
            v,
            out,
            lse.unsqueeze(-1),
            unused,
            unused,
            bias,
            None,
            None,
            length,
            keys,
            0.0,
            causal,
            scale=scale,
        )
    else:
        rows = torch.nn.functional.pad(lse, (0, -length % 32), value=torch.inf)
        grads = aten._scaled_dot_product_efficient_attention_backward.default(
            grad, q, k, v, bias, out, rows, unused, unused, 0.0, [True, True, True, False], causal, scale=scale
        )
    q_grad, k_grad, v_grad, *_ = grads
    summed = (_without(q_grad, blind), _sum_groups(k_grad, key), _sum_groups(v_grad, value))
    likes = _fake_backward(grad, query, key, value, mask, is_causal, out, lse, scale, meta=True)
    wanted = [_laid_out(found, like) for found, like in zip(summed, likes, strict=True)]
    return wanted[0], wanted[1], wanted[2]


def _backward_reference(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (_scores(query, key, mask, scale) - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    grad = grad.to(weights.dtype)
    weights_grad = grad @ _repeat(value, query).to(weights.dtype).mT
    scores_grad = weights * (weights_grad - (weights * weights_grad).sum(-1, keepdim=True)) * scale
    q_grad = scores_grad @ _repeat(key, query).to(weights.dtype)
    return q_grad, scores_grad.mT @ query.to(weights.dtype), weights.mT @ grad


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
    *,
    meta: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    device = torch.device("meta") if meta else query.device
    likes = [torch.empty_like(tensor, device=device) for tensor in (query, key, value)]
    return likes[0], likes[1], likes[2]


def _looks(mask: Tensor) -> Tensor:
    if mask.shape[-1] != mask.shape[-2]:
        return torch.tensor(False)
    triangle = _triangle(mask)
    if mask.dtype == torch.bool:
        same = (mask == triangle).all()
    else:
        same = torch.where(triangle, mask == 0, mask <= MASKED).all()
    return same.cpu()


_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

torch.library.define("graphfuse::is_lower_triangle", "(Tensor mask) -> Tensor", tags=_TAGS)
torch.library.define(
    "graphfuse::causal_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor is_causal, float scale) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "graphfuse::causal_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor mask, Tensor is_causal, Tensor out, Tensor lse, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_op.implement("is_lower_triangle", _looks)
_op.implement("causal_attention", _forward)
_op.implement("causal_attention_backward", _backward)
torch.library.register_fake("graphfuse::causal_attention", _fake)
torch.library.register_fake("graphfuse::causal_attention_backward", _fake_backward)


@torch.library.register_fake("graphfuse::is_lower_triangle")
def _(mask):
    return torch.empty((), dtype=torch.bool, device="cpu")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mask, is_causal, out, lse = ctx.saved_tensors
    tensors = (query, key, value, mask, is_causal, out, lse)
    return *torch.ops.graphfuse.causal_attention_backward(grad, *tensors, ctx.scale), None, None, None


torch.library.register_autograd("graphfuse::causal_attention", _autograd, setup_context=_setup_context)


def is_lower_triangle(mask: Tensor) -> Tensor:
    """Whether a mask is the causal one, as a () bool tensor on the CPU: waits for the mask to be there.

    Args:
        mask: (..., S, T), bool (True attends) or floating (added to the scores: 0 attends, -9e3 and less does not).
            Where S is not T, the answer is no.
    """
    found: Tensor = torch.ops.graphfuse.is_lower_triangle(mask)
    return found


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, is_causal: Tensor, *, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention that uses the causal kernel where the mask is the lower triangle.

    Args:
        query: (B, H, S, D), fp16, bf16, fp32 or fp64; any strides with dense features.
        key: (B, G, T, D), H a multiple of G; head h of the queries sees head h * G // H.
        value: (B, G, T, E).
        mask: broadcastable to (B, H, S, T), bool (True attends) or floating (added to the scores). Gets no gradient.
        is_causal: what `is_lower_triangle(mask)` returned: () bool, on the CPU.
        scale: of the scores; 1 / sqrt(D) by default.

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
    out: Tensor = torch.ops.graphfuse.causal_attention(query, key, value, mask, is_causal, scale)[0]
    return out
