"""What patterns of attention share: keys and values before they were repeated, and numbers for a proof."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from graphfuse.match import INDEXING, Sampler
from graphfuse.shadow import Value


def before_repeat(states: Value) -> Value | None:
    """The keys or values before every head was repeated for its group of queries, if that is what was done.

    Not before a cast: the gradients of a group are then summed in the dtype that it narrows from.
    """
    batch, heads, length, width = states.shape
    value = states
    while value.op in INDEXING and isinstance(value.args[0], Value):
        value = value.args[0]
        fewer = value.tensor.dim() == 4 and value.shape[1] < heads and heads % value.shape[1] == 0
        if fewer and (value.shape[0], *value.shape[2:]) == (batch, length, width):
            return value
    return None


def samplers(features: int, scale: float) -> dict[int, Sampler]:
    """Queries, keys and values with scores of everyday size.

    Under a saturated softmax most gradients are next to 0, and errors of them say nothing.
    """
    return {0: partial(_states, scale=features**-0.5 / scale), 1: _states, 2: _states}


def _states(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator, *, scale: float = 1.0
) -> Tensor:
    return (scale * torch.randn(shape, generator=generator)).to(device=device, dtype=dtype)
