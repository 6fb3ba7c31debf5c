"""Which of PyTorch's kernels for scaled dot-product attention takes a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

# PyTorch's answers to which kernel it would take, and how many of them are kept: asking costs 12 us, twice a layer.
MAX_CALLS = 1024
_backends: dict[tuple[Any, ...], SDPBackend] = {}


def sdpa_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> SDPBackend:
    """PyTorch's kernel for this call."""
    like = tuple((tensor.shape, tensor.stride()) for tensor in (query, key, value))
    masked = None if mask is None else (mask.shape, mask.stride(), mask.dtype)
    settings = (
        torch._C._get_sdp_priority_order(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )
    call = (like, query.dtype, query.device, masked, scale, *map(repr, settings))
    if call not in _backends:
        if len(_backends) >= MAX_CALLS:
            _backends.clear()
        _backends[call] = _choose(query, key, value, mask, scale)
    return _backends[call]


def _choose(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> SDPBackend:
    """Ask PyTorch, which asks the tensors whether there will be a backward: some kernels cannot at every size."""
    grouped = query.shape[1] != key.shape[1]
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        choice: int = torch._fused_sdp_choice(
            query, key, value, mask, 0.0, mask is None, scale=scale, enable_gqa=grouped
        )
    return SDPBackend(choice)
