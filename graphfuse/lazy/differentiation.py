"""Lazy logits among the arguments of autograd's own functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from graphfuse.lazy.gradients import read
from graphfuse.lazy.table import FUNCTIONS, handles
from graphfuse.lazy.tensor import LazyLogits, is_replaced, plain


def _gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Gradients of logits: where they are in the graph, and as plain tensors."""
    if kwargs.get("is_grads_batched"):
        return NotImplemented
    (outputs, inputs), one = tree_map_only(LazyLogits, _at_node, (outputs, inputs)), isinstance(inputs, LazyLogits)
    strict = not kwargs.get("allow_unused", len(args) > 3 and args[3]) and not kwargs.get("materialize_grads")
    try:
        found = torch.autograd.grad(outputs, inputs, *args, **kwargs)
    except RuntimeError as error:
        tensors = [inputs] if one else inputs
        if strict and "not have been used" in str(error) and any(isinstance(each, LazyLogits) for each in tensors):
            raise RuntimeError(
                "inputs: expected tensors that the outputs were computed from, got logits beside a loss of the same "
                "compiled graph; take the loss outside, of `logits`"
            ) from error
        raise
    return tuple(read(grad) if isinstance(grad, Tensor) else grad for grad in found)


def _backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    tensors, args, kwargs = tree_map_only(LazyLogits, _at_node, (tensors, args, kwargs))
    torch.autograd.backward(tensors, tree_map_only(LazyLogits, plain, grad_tensors), *args, **kwargs)


def _at_node(tensor: LazyLogits) -> Tensor:
    return plain(tensor) if is_replaced(tensor) else tensor


FUNCTIONS[torch.autograd.grad] = _gradients
FUNCTIONS[torch.autograd.backward] = _backward


@handles("detach_")
def _forget(tensor: Any) -> Any:
    """Its values stay those of the formula, whose history only others know."""
    return Tensor.detach_(tensor)
