"""What runs over chunks of tokens: losses, log-probabilities, and whatever reduces the vocabulary.

Everything here answers `NotImplemented` where it would have to guess; the function then gets plain tensors.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from graphfuse import ops
from graphfuse.lazy.formula import Formula, Step, apply_steps, version
from graphfuse.lazy.functions import autocasts, is_last, log_softmax_of_rows
from graphfuse.lazy.table import FUNCTIONS, Function, handles
from graphfuse.lazy.tensor import LazyLogits, Source, live_formula

CHUNK_BYTES = 1 << 28  # of the float32 logits of one chunk, where no fused op does the work
MAX_GATHERED = 8  # entries per row, above which whole rows of logits are cheaper than dot products


# ------------------------------------------------------------------------------------------------ fused: loss, log p


class _Fused(NamedTuple):
    """What the fused ops make of a formula."""

    factors: tuple[float, ...]  # of the products, over that of the first
    scale: float
    softcap: float
    log_softmax: bool
    after: float  # factor of the log-probabilities
    low_dtype: torch.dtype  # of all products but the first

    @classmethod
    def of(cls, formula: Formula) -> _Fused | None:
        """`None` if they cannot."""
        found = _canonical(formula.steps)
        each = [_canonical(part.steps) for part in formula.parts]
        if formula.join is not None or found is None or any(part.dtype is None for part in formula.parts):
            return None
        factors = [canonical[0] for canonical in each if canonical is not None and not any(canonical[1:3])]
        if len(factors) < len(each) or not factors[0]:
            return None
        first = formula.parts[0].dtype
        assert first is not None
        low_dtype = first
        for hidden, weight, _ in list(formula.products())[1:]:
            low_dtype = torch.promote_types(low_dtype, torch.promote_types(hidden.dtype, weight.dtype))
        if low_dtype not in (first, torch.promote_types(first, torch.float32)):
            return None
        scale, softcap, log_softmax, after = found
        ratios = tuple(factor / factors[0] for factor in factors)
        return cls(ratios, factors[0] * scale, softcap, log_softmax, after, low_dtype)

    def head(self, formula: Formula) -> dict[str, Any]:
        """Arguments of the ops, for all rows in one dimension."""
        dtype = formula.parts[0].dtype
        (hidden, weight, _), *others = formula.products()
        bias = None
        for factor, (_, _, one) in zip(self.factors, formula.products(), strict=True):
            if one is not None:
                bias = one.to(dtype) * factor if bias is None else bias + one.to(dtype) * factor
        low_rank = None
        if others:
            factors = self.factors[1:]
            hiddens = [_rows(h).to(self.low_dtype) * f for (h, _, _), f in zip(others, factors, strict=True)]
            low_rank = torch.cat(hiddens, 1), torch.cat([w.to(self.low_dtype) for _, w, _ in others], 1)
        return {
            "hidden": _rows(hidden).to(dtype),
            "weight": weight.to(dtype),
            "bias": bias,
            "low_rank": low_rank,
            "logit_scale": self.scale,
            "softcap": self.softcap or None,
        }


def _canonical(steps: tuple[Step, ...]) -> tuple[float, float, bool, float] | None:
    """`(logit_scale, softcap, log_softmax, factor after it)` if the steps are those, and casts."""
    scale, softcap, log_softmax, after = 1.0, 0.0, False, 1.0
    inside, seen_tanh = 1.0, False
    for name, value in steps:
        if name == "to":
            continue
        if name == "mul" or (name == "div" and value):
            factor = value if name == "mul" else 1.0 / value
            scale, after = (scale, after * factor) if log_softmax else (scale * factor, after)
        elif log_softmax:
            return None
        elif name == "tanh" and not seen_tanh:
            inside, scale, seen_tanh = scale, 1.0, True
        elif name == "apply" and value is log_softmax_of_rows:
            log_softmax = True
        else:
            return None
    if seen_tanh:
        softcap, scale = scale, inside * scale
        if softcap <= 0:
            return None
    return scale, softcap, log_softmax, after


def _classes_last(tensor: Tensor) -> Any:
    if isinstance(tensor, LazyLogits):
        return FUNCTIONS[torch.movedim](tensor, 1, -1) if tensor.dim() > 2 else tensor
    return tensor.movedim(1, -1)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Loss(NamedTuple):
    """A loss as torch's functions describe it."""

    target: Any
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def of(self, tensor: Any, *, normal: bool) -> Any:
        """The loss of logits, or of log-probabilities if they are said to be normal."""
        formula, target = live_formula(tensor), self.target
        if formula is None or not isinstance(target, Tensor):
            return NotImplemented
        if target.dtype == tensor.dtype and target.shape == tensor.shape and not normal:
            return self._of_probabilities(tensor)
        if isinstance(target, LazyLogits):
            return NotImplemented
        if target.dtype not in (torch.int64, torch.int32) or self.reduction not in ("mean", "sum", "none"):
            return NotImplemented
        rank, order = tensor.dim(), tensor.source.order or tuple(range(tensor.dim()))
        classes_second = (0, rank - 1, *range(1, rank - 1)) if rank > 1 else (0,)
        if order != classes_second or tuple(target.shape) != (*tensor.shape[:1], *tensor.shape[2:])[: max(rank - 1, 0)]:
            return NotImplemented
        formula.check_fresh()
        fused = _Fused.of(formula)
        if fused is None or fused.log_softmax is not normal or fused.after != 1.0:
            return self._in_chunks(tensor, formula, functional.nll_loss if normal else functional.cross_entropy)
        with torch.autocast(tensor.device.type, enabled=False):
            loss = ops.linear_cross_entropy(
                **fused.head(formula),
                target=target.reshape(-1),
                class_weight=self.class_weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        loss = loss.reshape(target.shape) if self.reduction == "none" else loss
        return loss.to(torch.float32 if autocasts(tensor) else tensor.dtype)

    def _of_probabilities(self, tensor: LazyLogits) -> Any:
        """The target has a number for each class."""
        if (
            self.class_weight is not None
            or self.label_smoothing
            or self.reduction not in ("mean", "sum", "none")
            or tensor.dim() < 2
        ):
            return NotImplemented
        logits, target = _classes_last(tensor), _classes_last(self.target)
        if live_formula(logits) is None or logits.source.order is not None:
            return NotImplemented
        products = FUNCTIONS[torch.mul](FUNCTIONS[torch.log_softmax](logits, -1), target)
        if products is NotImplemented:
            return NotImplemented
        losses = -FUNCTIONS[torch.sum](products, -1)
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else losses.mean()

    def _in_chunks(self, tensor: LazyLogits, formula: Formula, function: Function) -> Tensor:
        options = {"ignore_index": self.ignore_index, "reduction": "none"}
        if self.label_smoothing:
            options["label_smoothing"] = self.label_smoothing

        def of_chunk(rows: Tensor, target: Tensor) -> Any:
            return function(rows, target, self.class_weight, **options)

        target = self.target.reshape(-1).to(torch.int64)
        losses = torch.cat(_in_chunks(formula, of_chunk, target, remembers=tensor.requires_grad))
        if self.reduction == "none":
            return losses.reshape(self.target.shape)
        if self.reduction == "sum":
            return losses.sum()
        counted = target != self.ignore_index
        weight = None if self.class_weight is None else self.class_weight[torch.where(counted, target, 0)]
        return losses.sum() / (counted if weight is None else torch.where(counted, weight, 0)).sum()


def _takes_targets(*, normal: bool) -> Function:
    """`cross_entropy`, or `nll_loss`, whose arguments are the same but for the last."""

    def run(
        tensor: Any,
        target: Any,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        if size_average is not None or reduce is not None:
            return NotImplemented
        return _Loss(target, weight, ignore_index, reduction, label_smoothing).of(tensor, normal=normal)

    return run


handles("cross_entropy")(_takes_targets(normal=False))
handles("nll_loss")(_takes_targets(normal=True))


@handles("gather")
def _gather(tensor: Any, dim: Any, index: Any = None, **kwargs: Any) -> Any:
    formula = live_formula(tensor)
    if formula is None or kwargs or not isinstance(index, Tensor) or isinstance(index, LazyLogits):
        return NotImplemented
    if tensor.source.order is not None or tensor.dim() < 2 or not is_last(tensor, dim):
        return NotImplemented
    if index.shape[:-1] != tensor.shape[:-1]:
        return NotImplemented
    formula.check_fresh()
    fused = _Fused.of(formula)
    if fused is None or index.shape[-1] > (1 if fused.log_softmax else MAX_GATHERED):
        return gathered(formula, index, remembers=tensor.requires_grad)
    with torch.autocast(tensor.device.type, enabled=False):
        if fused.log_softmax:
            picked = ops.linear_log_probs(**fused.head(formula), target=index.reshape(-1)).reshape(index.shape)
            picked = (picked * fused.after).to(tensor.dtype)
        else:
            picked = apply_steps(_dot_products(formula, index), formula.steps)
    tensor.source.picked.append((weakref.ref(picked), version(picked), index))
    return picked


def gathered(formula: Formula, index: Tensor, *, remembers: bool) -> Tensor:
    """The entries of logits at `index`, (*rows, k), taken from whole rows."""
    found = _in_chunks(formula, lambda rows, at: rows.gather(-1, at), _rows(index), remembers=remembers)
    return torch.cat(found).reshape(index.shape)


@handles("take_along_dim")
def _take_along(tensor: Any, indices: Any, dim: Any = None) -> Any:
    if not isinstance(indices, Tensor) or dim is None or indices.dim() != tensor.dim():
        return NotImplemented
    try:
        index = indices.expand(*tensor.shape[:-1], indices.shape[-1])
    except RuntimeError:  # more rows than logits
        return NotImplemented
    return _gather(tensor, dim, index)


def _dot_products(formula: Formula, index: Tensor) -> Tensor:
    """The entries of logits at `index`, (*rows, k), before the last steps."""
    total = None
    for part, (hidden, weight, bias) in zip(formula.parts, formula.products(), strict=True):
        rows = functional.embedding(index, weight.to(part.dtype))  # (*rows, k, H): a dot product for each entry
        picked = (hidden.to(part.dtype).unsqueeze(-2).float() * rows.float()).sum(-1)
        if bias is not None:
            picked = picked + bias.to(part.dtype).float()[index]
        picked = apply_steps(picked.to(part.dtype), part.steps)
        total = picked if total is None else total + picked
    assert total is not None, "formula: expected at least one product"
    return total


# --------------------------------------------------------------------------------------- over the vocabulary, in chunks


def _in_chunks(formula: Formula, func: Function, *others: Tensor, remembers: bool) -> list[Any]:
    """What a function makes of a chunk of logits, (C, V), and of the same rows of others, for each chunk in turn."""
    size = max(1, CHUNK_BYTES // (4 * formula.shape[-1]))
    rows = formula.of_rows(_rows)
    counts = [each.shape[0] for each in rows.tensors[0].split(size)]

    def of_chunk(start: int, *others: Tensor) -> Any:
        formula.check_fresh()  # backward too
        chunk = rows.of_rows(lambda tensor: tensor[start : start + size])
        return func(chunk.of_tensors(*chunk.tensors), *others)

    results = []
    for k in range(len(counts)):
        parts = [other[k * size : (k + 1) * size] for other in others]
        if remembers and torch.is_grad_enabled():
            results.append(checkpoint(of_chunk, k * size, *parts, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(of_chunk(k * size, *parts))
    return results


def _reduces(func: Any, dim_at: int = 0, default: int | None = None) -> Function:
    """For functions that reduce the vocabulary, or choose from it: a chunk of rows at a time."""

    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {_LIKE_NUMPY.get(name, name): value for name, value in kwargs.items()}
        formula = live_formula(tensor)
        if formula is None or tensor.source.order is not None or tensor.dim() < 2 or kwargs.get("out") is not None:
            return NotImplemented
        dim = args[dim_at] if len(args) > dim_at else kwargs.get("dim", default)
        dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        if (
            dim is None
            and not args
            and not kwargs.keys() - {"dtype"}
            and func in _OF_ALL
            and _is_read_once(tensor, formula)
        ):
            return _of_all(run, func, tensor, **kwargs)
        if not is_last(tensor, dim):
            return NotImplemented
        if len(args) > dim_at:
            args = (*args[:dim_at], -1, *args[dim_at + 1 :])
        else:
            kwargs["dim"] = -1
        results = _in_chunks(formula, lambda rows: func(rows, *args, **kwargs), remembers=tensor.requires_grad)
        lead = tensor.shape[:-1]
        if isinstance(results[0], Tensor):
            joined = torch.cat(results)
            return joined.reshape(*lead, *joined.shape[1:])
        parts = [torch.cat(part) for part in zip(*results, strict=True)]
        return type(results[0])([part.reshape(*lead, *part.shape[1:]) for part in parts])

    return run


def _is_read_once(tensor: Tensor, formula: Formula) -> bool:
    """Whether it is something made of logits, or a copy of them: logits with history are likely to be read again."""
    is_made = formula.join is not None or any(name == "apply" for name, _ in formula.steps)
    source: Source = tensor.source  # type: ignore[attr-defined]
    is_copy = source.parent is not None and not source.shares
    return is_made or is_copy or not tensor.requires_grad


def _of_all(of_rows: Function, func: Any, tensor: Tensor, dtype: torch.dtype | None = None) -> Any:
    """All rows reduced to one number, by way of one of each."""
    if not tensor.numel():
        return NotImplemented
    if func not in (torch.sum, torch.mean):
        is_shared = tensor.requires_grad and func in (torch.max, torch.min)  # equal ones share the gradient
        if is_shared or dtype is not None:
            return NotImplemented
        found = of_rows(tensor, -1)
        return func(found if isinstance(found, Tensor) else found.values)
    rounded = dtype or (tensor.dtype if tensor.is_floating_point() else torch.int64)
    if not rounded.is_floating_point:
        return func(of_rows(tensor, -1, dtype=rounded))
    return func(of_rows(tensor, -1, dtype=torch.promote_types(rounded, torch.float32))).to(rounded)


_LIKE_NUMPY = {"axis": "dim", "keepdims": "keepdim"}
_OF_ALL = (torch.sum, torch.mean, torch.max, torch.min, torch.any, torch.all)
for _name in ("argmax", "argmin", "amax", "amin", "max", "min", "logsumexp", "sum", "mean", "any", "all"):
    handles(_name)(_reduces(getattr(torch, _name)))
handles("topk")(_reduces(torch.topk, 1, -1))
