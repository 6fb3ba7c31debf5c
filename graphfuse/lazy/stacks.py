"""Lazy logits stacked, and reduced where they meet: `logsumexp(stack([p, q]), 0)`, the mean of several models.

Everything here answers `NotImplemented` where it would have to guess; the function then gets plain tensors.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphfuse.lazy.formula import Formula
from graphfuse.lazy.functions import dtype_of, stand_in
from graphfuse.lazy.joins import formula_of
from graphfuse.lazy.table import FUNCTIONS, Function, handles
from graphfuse.lazy.tensor import LazyLogits, Source, lazy, live_formula

MAX_STACKED = 8  # tensors, above which they are no alternatives of each other but a batch


@handles("stack")
def _stack(tensors: Any, dim: int = 0) -> Any:
    if len(tensors) > MAX_STACKED:
        return NotImplemented
    first = next(k for k, tensor in enumerate(tensors) if isinstance(tensor, LazyLogits))
    like, dtype = tensors[first], functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    dim = dim % (like.dim() + 1)
    formulas = [formula_of(tensor, like.shape) if tensor.shape == like.shape else None for tensor in tensors]
    start, others = formulas[first], [(k, formula) for k, formula in enumerate(formulas) if k != first]
    if start is None or dim == like.dim() or any(tensor.device != like.device for tensor in tensors):
        return NotImplemented
    stacked = start.then(("apply", _unsqueeze))
    for k, formula in others:
        if formula is None:
            return NotImplemented
        stacked = stacked.with_other(formula, functools.partial(_insert, k))
    stacked = stacked.then(("to", dtype))
    whole = replace(stacked.then(("apply", lambda values: values.movedim(-1, dim))), is_whole=True)
    result = lazy(Source(whole), torch.stack([stand_in(tensor) for tensor in tensors], dim))
    result.source.stack = (dim, stacked, stand_in(like))
    return result


def _unsqueeze(rows: Tensor) -> Tensor:
    return rows.unsqueeze(-1)


def _insert(at: int, stacked: Tensor, rows: Tensor) -> Tensor:
    """Stacked along a last dimension of their own, the parts are found wherever their rows are."""
    return torch.cat([stacked[..., :at], rows.unsqueeze(-1), stacked[..., at:]], -1)


def _meets(func: Function) -> Function:
    """For functions that reduce one dimension: in that of a stack, its parts meet row by row."""
    otherwise = FUNCTIONS[func]

    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if live_formula(tensor, whole=True) is None or tensor.source.stack is None:
            return otherwise(tensor, *args, **kwargs)
        at, stacked, like = tensor.source.stack
        dim = args[0] if args else kwargs.get("dim")
        if len(args) + len(kwargs) != 1 or not isinstance(dim, int) or dim % tensor.dim() != at:
            return NotImplemented

        def reduce(values: Tensor) -> Any:
            return func(values, -1)

        dtype = dtype_of(reduce, tensor)
        formula: Formula = stacked if tensor.requires_grad else stacked.detach()
        return lazy(Source(formula.then(("to", dtype), ("apply", reduce), ("to", dtype))), like)

    return run


handles("logsumexp")(_meets(torch.logsumexp))
handles("mean")(_meets(torch.mean))
handles("sum")(_meets(torch.sum))
