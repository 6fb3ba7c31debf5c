"""Scaled dot-product attention by any of PyTorch's kernels, forward and backward, with one convention for all of them.

The result has its heads inside the tokens, the scores' logsumexp is (B, H, S), and the gradients are laid out as what
they are of: so backward may run in another kernel than forward.
"""
# Shape letters: B = sequences, H = heads of queries, G = heads of keys and values, S = positions, T = positions of
# keys, D = features of a head, E = features of a value.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from graphfuse.kernels._ahead import address
from graphfuse.kernels._op import VECTOR_BYTES
from graphfuse.kernels._sdpa_kernel import can_slide, sdpa_kernel

aten = torch.ops.aten


def forward(
    query: Tensor,  # (B, H, S, D)
    key: Tensor,  # (B, G, T, D)
    value: Tensor,  # (B, G, T, E)
    mask: Tensor | None,  # broadcastable to (B, H, S, T); bool: True attends; floating: added
    is_causal: bool,
    scale: float,
    wanted: str = "",
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """The result (B, H, S, E), and the logsumexp of the scores; `wanted` names a kernel, or leaves it to PyTorch.

    With a `window`, a position of a causal mask sees that many keys, itself among them.
    """
    if window and _slides(query, key, value, scale):
        return _forward_sliding(query, key, value, scale, window)
    if window:
        mask, is_causal = triangle(query.new_empty(()).expand(query.shape[2], key.shape[2]), window), False
    backend, q, k, v = fitted(query, key, value, mask, is_causal, scale, wanted)
    bias = _bias(mask, query, backend)
    if query.numel() == 0 or backend == SDPBackend.MATH:
        out, lse = attend(query, key, value, mask, is_causal, scale)
    elif not query.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale
        )
    elif backend == SDPBackend.FLASH_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, is_causal, scale=scale)
    elif backend == SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention.default(
            q, k, v, bias, True, 0.0, is_causal, scale=scale
        )
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention.default(
            q, k, v, bias, True, 0.0, is_causal, scale=scale
        )
    lse = lse.reshape(*lse.shape[:2], -1)[..., : query.shape[2]]
    return _heads_within_tokens(out.to(query.dtype)), lse.contiguous().to(_lse_dtype(query))


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    out: Tensor,
    lse: Tensor,
    scale: float,
    wanted: str = "",
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    if window and _slides(query, key, value, scale):
        return _backward_sliding(grad, query, key, value, out, lse, scale, window)
    if window:
        mask, is_causal = triangle(query.new_empty(()).expand(query.shape[2], key.shape[2]), window), False
    backend, q, k, v = fitted(query, key, value, mask, is_causal, scale, wanted)
    bias = _bias(mask, query, backend)
    unused = torch.empty((), dtype=torch.int64, device=query.device)  # the state of a dropout that there is not
    length, keys = query.shape[2], key.shape[2]
    if query.numel() == 0 or backend == SDPBackend.MATH:
        grads = _attend_backward(grad, query, key, value, mask, is_causal, lse, scale)
    elif not query.is_cuda:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
        )
    elif backend == SDPBackend.FLASH_ATTENTION:
        grads = aten._scaled_dot_product_flash_attention_backward.default(
            grad, q, k, v, out, lse, None, None, length, keys, 0.0, is_causal, unused, unused, scale=scale
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
            is_causal,
            scale=scale,
        )
    else:
        rows = torch.nn.functional.pad(lse, (0, -length % 32), value=torch.inf)
        grads = aten._scaled_dot_product_efficient_attention_backward.default(
            grad, q, k, v, bias, out, rows, unused, unused, 0.0, [True, True, True, False], is_causal, scale=scale
        )
    q_grad, k_grad, v_grad, *_ = grads
    return _as_states((q_grad, k_grad, v_grad), (query, key, value))


def _slides(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether flash attention takes the call, which alone has a window."""
    fits = query.numel() > 0 and can_slide(query, key, value)
    return fits and sdpa_kernel(query, key, value, None, True, scale, "flash") == SDPBackend.FLASH_ATTENTION


def _forward_sliding(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    sizes, sides = (query.shape[2], key.shape[2]), {"window_size_left": window - 1, "window_size_right": 0}
    out, lse, *_ = aten._flash_attention_forward.default(
        q, k, v, None, None, *sizes, 0.0, True, False, scale=scale, **sides
    )
    return _heads_within_tokens(out.transpose(1, 2)), lse


def _backward_sliding(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [states.transpose(1, 2) for states in (grad, query, key, value, out)]
    sizes, sides = (query.shape[2], key.shape[2]), {"window_size_left": window - 1, "window_size_right": 0}
    unused = torch.empty((), dtype=torch.int64, device=query.device)  # the state of a dropout that there is not
    grads = aten._flash_attention_backward.default(
        *tensors, lse, None, None, *sizes, 0.0, True, unused, unused, scale=scale, **sides
    )
    q_grad, k_grad, v_grad = (found.transpose(1, 2) for found in grads)
    return _as_states((q_grad, k_grad, v_grad), (query, key, value))


def _as_states(
    grads: tuple[Tensor, Tensor, Tensor], states: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with the heads and the layout of what they are of."""
    q_grad, k_grad, v_grad = (laid_out(_sum_groups(grad, of), of) for grad, of in zip(grads, states, strict=True))
    return q_grad, k_grad, v_grad


def fake_forward(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What `forward` returns, without content."""
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    return out, query.new_empty((batch, heads, length), dtype=_lse_dtype(query))


def fake_backward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `backward` returns, without content."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fitted(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float, wanted: str = ""
) -> tuple[SDPBackend, Tensor, Tensor, Tensor]:
    """The kernel, and query, key and value as it takes them: some on GPUs take groups, where there is no mask."""
    if mask is not None or wanted == "efficient":
        key, value = _repeat(key, query), _repeat(value, query)
    backend = sdpa_kernel(query, key, value, mask, is_causal, scale, wanted)
    knows_groups = query.is_cuda and backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    if query.shape[1] != key.shape[1] and not knows_groups:
        key, value = _repeat(key, query), _repeat(value, query)
        backend = sdpa_kernel(query, key, value, mask, is_causal, scale, wanted)
    if backend == SDPBackend.CUDNN_ATTENTION:
        gaps = mask is None  # with one, nobody has looked
        query, key, value = (_heads_within_tokens(states, gaps=gaps) for states in (query, key, value))
    return backend, query, key, value


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """What the kernels compute, in differentiable torch operations."""
    scores = _scores(query, key, mask, is_causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    out = weights @ _repeat(value, query).to(weights.dtype)
    return out.to(query.dtype), lse


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (_scores(query, key, mask, is_causal, scale) - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    grad = grad.to(weights.dtype)
    scores_grad = _scores_grad(grad, weights, _repeat(value, query), scale)
    q_grad = scores_grad @ _repeat(key, query).to(weights.dtype)
    return q_grad, scores_grad.mT @ query.to(weights.dtype), weights.mT @ grad


def _scores_grad(grad: Tensor, weights: Tensor, value: Tensor, scale: float) -> Tensor:
    """The gradient of the products of queries and keys."""
    weights_grad = grad @ value.to(weights.dtype).mT
    return weights * (weights_grad - (weights * weights_grad).sum(-1, keepdim=True)) * scale


def key_gradient(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The gradient of the keys (B, G, T, D), under weights (B, H, S, T) that are known."""
    scores_grad = _scores_grad(grad.to(weights.dtype), weights, _repeat(value, query), scale)
    return _sum_groups(scores_grad.mT @ query.to(weights.dtype), key)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Scaled scores (B, H, S, T), -inf where nothing may be seen."""
    compute = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(compute) @ _repeat(key, query).to(compute).mT * scale
    if is_causal:
        mask = triangle(scores)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(compute)


def triangle(like: Tensor, window: int = 0) -> Tensor:
    """The causal mask (S, T) of these scores or masks; in a window, each position sees so many keys."""
    seen = torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device).tril()
    return seen.triu(1 - window) if window else seen


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


def _heads_within_tokens(states: Tensor, *, gaps: bool = False) -> Tensor:
    """The states (B, H, S, D) as they come out of a linear layer, (B, S, H, D) in memory; or what is cut out of such.

    The one order in which cuDNN's backward is right whatever that of the result's gradient: where the queries have
    another one than the result or its gradient, it returns wrong gradients (torch 2.11, also under PyTorch's own call).
    Gaps between tokens, where queries, keys and values are packed, are no matter: they may stay.
    """
    tokens = states.transpose(1, 2)
    return states if gaps and _is_in_order(tokens) else tokens.contiguous().transpose(1, 2)


def _is_in_order(tokens: Tensor) -> bool:
    """Whether every dim goes through the memory in longer steps than those behind it, and all start whole loads."""
    *sizes, features = tokens.shape
    *strides, last = tokens.stride()
    extent = features
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1:
            if stride < extent or stride * tokens.element_size() % VECTOR_BYTES:
                return False
            extent = size * stride
    return last == 1 and address(tokens) % VECTOR_BYTES == 0


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def laid_out(grad: Tensor, of: Tensor) -> Tensor:
    """The gradient with the dtype and strides that the compiler was told."""
    like = torch.empty_like(of, device="meta")
    if grad.stride() == like.stride() and grad.dtype == like.dtype:
        return grad
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=grad.device).copy_(grad)
