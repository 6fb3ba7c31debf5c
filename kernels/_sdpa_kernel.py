"""Which of PyTorch's kernels for scaled dot-product attention takes a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# The orders in which PyTorch itself tries them, by the numbers of SDPBackend: the second one where it prefers cuDNN's.
OWN_ORDERS = ((1, 2, 0, 3), (3, 1, 2, 0))
MOST_FEATURES = 256  # of flash attention
ALIGNMENT = 8  # features of a head; PyTorch pads others, above the kernels

# Answers, and how many of them are kept: asking PyTorch costs 12 us, twice a layer.
MAX_CALLS = 1024
_backends: dict[tuple[Any, ...], SDPBackend] = {}


def sdpa_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float, wanted: str = ""
) -> SDPBackend:
    """The kernel for this call: the one that is wanted, if it may and can take it; else PyTorch's own choice."""
    like = tuple((tensor.shape, tensor.stride()) for tensor in (query, key, value))
    masked = None if mask is None else (mask.shape, mask.stride(), mask.dtype)
    call = (like, query.dtype, query.device, masked, is_causal, scale, wanted, _settings())
    backend = _backends.get(call)
    if backend is None:
        if len(_backends) >= MAX_CALLS:  # another thread may do the same
            _backends.clear()
        backend = _backends[call] = _choose(query, key, value, mask, is_causal, scale, wanted)
    return backend


def can_slide(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel that skips what a sliding window hides: flash attention as PyTorch brings it.

    Of tensors that may be fake; at the call, PyTorch is asked as well.
    """
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    features = query.shape[-1]
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if not (query.is_cuda and torch.cuda.is_available() and torch.version.hip is None and is_half and may_choose()):
        return False
    fits = features == key.shape[-1] == value.shape[-1] <= MOST_FEATURES and features % ALIGNMENT == 0
    another = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()  # activated by the user
    return fits and another is None and torch.cuda.get_device_capability(query.device) >= (8, 0)


def may_choose() -> bool:
    """Whether nobody has said which kernels to use: switched one off, set an order, or asked for equal bits.

    `torch.nn.attention.sdpa_kernel` switches off all that it does not name.
    """
    order, is_deterministic, *enabled = _settings()
    return order[:4] in OWN_ORDERS and not is_deterministic and all(enabled)


def _settings() -> tuple[Any, ...]:
    return (
        tuple(torch._C._get_sdp_priority_order()),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_overrideable_sdp_enabled(),
    )


def _choose(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float, wanted: str
) -> SDPBackend:
    """Ask PyTorch, which asks the tensors whether there will be a backward: some kernels cannot at every size."""
    grouped = query.shape[1] != key.shape[1]
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        if wanted and may_choose() and _takes(wanted, query, key, value, mask, is_causal, grouped):
            return KERNELS[wanted]
        choice: int = torch._fused_sdp_choice(query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    return SDPBackend(choice)


def _takes(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, grouped: bool
) -> bool:
    """What PyTorch says of one kernel."""
    can_use = {
        "flash": cuda.can_use_flash_attention,
        "cudnn": cuda.can_use_cudnn_attention,
        "efficient": cuda.can_use_efficient_attention,
    }
    is_aligned = query.shape[-1] % ALIGNMENT == 0 and value.shape[-1] % ALIGNMENT == 0
    return is_aligned and can_use[name](cuda.SDPAParams(query, key, value, mask, 0.0, is_causal, grouped))
