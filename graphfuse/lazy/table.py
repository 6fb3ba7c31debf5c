"""Which torch functions lazy logits answer themselves; `functions` and `losses` fill the table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Function = Callable[..., Any]

FUNCTIONS: dict[Any, Function] = {}

_GETTERS = (
    "shape dtype device layout ndim requires_grad grad_fn is_leaf output_nr is_cuda is_cpu is_meta is_sparse "
    "is_quantized is_nested is_mkldnn is_mps is_xpu is_xla itemsize nbytes names _version _base _backward_hooks"
)
_METHODS = (
    "size dim ndimension numel nelement stride is_contiguous element_size is_floating_point is_complex is_inference "
    "__len__ get_device __hash__ is_signed is_same_size storage_offset untyped_storage"
)
ABOUT_SHAPE = {getattr(Tensor, name).__get__ for name in _GETTERS.split() if hasattr(Tensor, name)}
ABOUT_SHAPE |= {getattr(Tensor, name) for name in _METHODS.split() if hasattr(Tensor, name)}
# A detached copy may become a leaf, which then takes the gradients of whatever reads it.
ABOUT_SHAPE |= {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
ABOUT_SHAPE |= {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor}


def writes(func: Any) -> bool:
    """Whether the function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))


@functools.cache
def turns(func: Any) -> bool:
    """Whether the function changes shape, strides or history of its first argument in place."""
    packet = getattr(torch.ops.aten, getattr(func, "__name__", ""), None)
    overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()
    return any(torch.Tag.inplace_view in getattr(packet, name).tags for name in overloads)


def handles(*names: str) -> Callable[[Function], Function]:
    """Register a function under these names of `torch`, `Tensor` and `torch.nn.functional`, where they exist."""

    def register(function: Function) -> Function:
        for name in names:
            for space in (torch, Tensor, functional):
                if hasattr(space, name):
                    FUNCTIONS[getattr(space, name)] = function
        return function

    return register
