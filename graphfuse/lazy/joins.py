"""Lazy logits with a second tensor, element by element: p · log p, logits over a temperature, a divergence.

The second one is lazy too, of the same rows, or holds a number for each token, or for each of its classes. What comes
out is lazy: nothing is computed until it is reduced, a chunk of rows at a time.
Everything here answers `NotImplemented` where it would have to guess; the function then gets plain tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphfuse.lazy.formula import Formula, Part
from graphfuse.lazy.functions import applied, is_last, stand_in, stepped
from graphfuse.lazy.table import FUNCTIONS, Function, handles
from graphfuse.lazy.tensor import LazyLogits, Source, lazy, live_formula


def formula_of(operand: Any, shape: torch.Size) -> Formula | None:
    """How to compute the rows of an operand of lazy logits of this shape."""
    if isinstance(operand, LazyLogits):
        is_plain = operand.shape == shape and operand.source.order is None
        return live_formula(operand) if is_plain else None
    if type(operand) not in (Tensor, torch.nn.Parameter) or operand.dim() > len(shape):
        return None
    if operand.shape != shape:
        if operand.dim() and operand.shape[-1] != 1:
            return None
        try:
            operand = operand.expand(*shape[:-1], 1).clone()  # a number for each row: it may change while nobody reads
        except RuntimeError:
            return None
    return Formula.of([operand], [Part(None)], ())


def _is_of_classes(operand: Tensor, like: LazyLogits) -> bool:
    """Whether it holds a number for each class, for all rows: a bias of the logits, a mask of tokens."""
    is_vector = operand.dim() and operand.shape[-1] == operand.numel() == like.shape[-1] and operand.dim() <= like.dim()
    if not is_vector or type(operand) not in (Tensor, torch.nn.Parameter) or operand.shape == like.shape:
        return False
    return operand.device == like.device and not (operand.requires_grad and torch.is_grad_enabled())


def _with_classes(func: Function, left: Any, right: Any) -> Any:
    if isinstance(left, LazyLogits):
        numbers = right.detach().reshape(-1).clone()  # it may change while nobody reads
        return applied(left, lambda rows: func(rows, numbers))
    numbers = left.detach().reshape(-1).clone()
    return applied(right, lambda rows: func(numbers, rows))


def joins(func: Function) -> Function:
    """For functions of two tensors, element by element, one of which at least is lazy."""

    def run(left: Any, right: Any, **kwargs: Any) -> Any:
        like = left if isinstance(left, LazyLogits) else right
        operands = [operand for operand in (left, right) if isinstance(operand, Tensor)]
        if kwargs or len(operands) < 2 or not isinstance(like, LazyLogits) or like.source.order is not None:
            return NotImplemented
        first, second = (formula_of(operand, like.shape) for operand in operands)
        if _is_of_classes(left if like is right else right, like):
            return _with_classes(func, left, right)
        if first is None or second is None or any(o.dim() and o.device != like.device for o in operands):
            return NotImplemented
        # On tensors without elements, for the dtype: a 0-d operand has less of a say.
        dtype = func(*(torch.empty([0] * o.dim(), dtype=o.dtype, device=o.device) for o in operands)).dtype

        def join(a: Tensor, b: Tensor) -> Any:
            wide = [x.to(torch.promote_types(x.dtype, dtype)) if dtype.is_floating_point else x for x in (a, b)]
            return func(*wide)

        def swapped(a: Tensor, b: Tensor) -> Any:
            return join(b, a)

        joined = first.with_other(second, join) if like is left else second.with_other(first, swapped)
        return lazy(Source(joined.then(("to", dtype))), stand_in(like))

    return run


def _scales(step: str, func: Function) -> Function:
    both = joins(func)

    def run(tensor: Any, other: Any, **kwargs: Any) -> Any:
        if kwargs or isinstance(other, (Tensor, bool)) or not isinstance(other, (int, float)):
            return both(tensor, other, **kwargs)
        return NotImplemented if live_formula(tensor) is None else stepped(tensor, (step, other))

    return run


handles("mul", "multiply", "__mul__", "__rmul__")(_scales("mul", torch.mul))
handles("div", "divide", "true_divide", "__truediv__", "__div__")(_scales("div", torch.div))
handles("add", "__add__", "__radd__")(joins(torch.add))
handles("sub", "subtract", "__sub__")(joins(torch.sub))
handles("rsub", "__rsub__")(joins(torch.rsub))
handles("logaddexp")(joins(torch.logaddexp))


@handles("masked_fill")
def _masked_fill(tensor: Any, mask: Any, value: Any) -> Any:
    if isinstance(value, Tensor) or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return NotImplemented
    return joins(lambda a, b: a.masked_fill(b.to(torch.bool), value))(tensor, mask)


@handles("where")
def _where(condition: Any, tensor: Any, value: Any) -> Any:
    if not isinstance(condition, Tensor) or isinstance(condition, LazyLogits) or condition.dtype != torch.bool:
        return NotImplemented
    tensor, mask, value = (value, condition, tensor) if isinstance(value, LazyLogits) else (tensor, ~condition, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NotImplemented
    return _masked_fill(tensor, mask, value)


@handles("scatter")
def _scatter(tensor: Any, dim: Any, index: Any, value: Any) -> Any:
    """A number in some entries of each row."""
    formula = live_formula(tensor)
    if formula is None or tensor.source.order is not None or not is_last(tensor, dim) or tensor.dim() < 2:
        return NotImplemented
    if isinstance(value, bool) or not isinstance(value, (int, float)) or index.shape[:-1] != tensor.shape[:-1]:
        return NotImplemented
    where = Formula.of([index.clone()], [Part(None)], ())  # it may change while nobody reads
    written = formula.with_other(where, lambda rows, at: rows.scatter(-1, at, value))
    return lazy(Source(written.then(("to", tensor.dtype))), stand_in(tensor))


def _pairs(name: str, *, takes_batchmean: bool = False, **defaults: Any) -> Function:
    """For losses of two tensors of one shape, element by element."""
    function = getattr(functional, name)
    reductions = ("none", "sum", "mean") + (("batchmean",) if takes_batchmean else ())

    def run(
        input: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean", **options: Any
    ) -> Any:
        options = {name: value for name, value in options.items() if value is not None}
        if size_average is not None or reduce is not None or reduction not in reductions or options.keys() - defaults:
            return NotImplemented

        def each(input: Tensor, target: Tensor) -> Any:
            return function(input, target, reduction="none", **options)

        if not isinstance(target, Tensor) or input.shape != target.shape:
            return NotImplemented
        losses = joins(each)(input, target)
        if losses is NotImplemented or reduction == "none" or losses.dim() < 2:
            return losses if reduction == "none" else NotImplemented
        total = FUNCTIONS[torch.sum](losses, -1).sum()
        return total / {"sum": 1, "mean": losses.numel(), "batchmean": losses.shape[0]}[reduction]

    return run


handles("kl_div")(_pairs("kl_div", takes_batchmean=True, log_target=False))
handles("mse_loss")(_pairs("mse_loss"))
handles("l1_loss")(_pairs("l1_loss"))
handles("smooth_l1_loss")(_pairs("smooth_l1_loss", beta=1.0))


@handles("broadcast_tensors")
def _broadcast(*tensors: Any) -> Any:
    parts = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    shape = torch.broadcast_shapes(*(part.shape for part in parts))
    if any(isinstance(part, LazyLogits) and (part.shape != shape or live_formula(part) is None) for part in parts):
        return NotImplemented
    return tuple(part if isinstance(part, LazyLogits) else part.expand(shape) for part in parts)
