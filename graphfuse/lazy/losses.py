"""What runs over chunks of tokens: losses, log-probabilities, and whatever reduces the vocabulary.

Everything here answers `NotImplemented` where it would have to guess; the function then gets plain tensors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from graphfuse import ops
from graphfuse.lazy.formula import Formula, Step, apply_formula, apply_steps
from graphfuse.lazy.functions import autocasts, is_last, log_softmax_of_rows
from graphfuse.lazy.table import Function, handles
from graphfuse.lazy.tensor import LazyLogits, live_formula

CHUNK_BYTES = 1 << 28  # of the float32 logits of one chunk, where no fused op does the work
MAX_GATHERED = 8  # entries per row, above which whole rows of logits are cheaper than dot products


# ------------------------------------------------------------------------------------------------ fused: loss, log p


def _canonical(steps: tuple[Step, ...]) -> tuple[float, float, bool] | None:
    """`(logit_scale, softcap, log_softmax)` if the steps are those, and casts."""
    scale, softcap, log_softmax = 1.0, 0.0, False
    inside, seen_tanh = 1.0, False
    for name, value in steps:
        if name == "to":
            continue
        if log_softmax:
            return None
        if name == "mul" or (name == "div" and value):
            scale *= value if name == "mul" else 1.0 / value
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
    return scale, softcap, log_softmax


def _head(formula: Formula) -> dict[str, Any]:
    """Arguments of the fused ops."""
    canonical = _canonical(formula.steps)
    assert canonical is not None
    dtype, hidden = formula.product_dtype, formula.hidden
    return {
        "hidden": hidden.to(dtype),
        "weight": formula.weight.to(dtype),
        "bias": None if formula.bias is None else formula.bias.to(dtype),
        "logit_scale": canonical[0],
        "softcap": canonical[1] or None,
    }


@handles("cross_entropy")
def _cross_entropy(
    tensor: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    return _loss(tensor, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, normal=False)


@handles("nll_loss")
def _nll_loss(
    tensor: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    return _loss(tensor, target, weight, size_average, ignore_index, reduce, reduction, 0.0, normal=True)


def _loss(
    tensor: Any,
    target: Any,
    class_weight: Tensor | None,
    size_average: Any,
    ignore_index: int,
    reduce: Any,
    reduction: str,
    label_smoothing: float,
    *,
    normal: bool,
) -> Any:
    formula = live_formula(tensor)
    if formula is None or size_average is not None or reduce is not None:
        return NotImplemented
    canonical = _canonical(formula.steps)
    if canonical is None or canonical[2] is not normal or isinstance(target, LazyLogits):
        return NotImplemented
    if target.dtype not in (torch.int64, torch.int32) or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    rank, order = tensor.dim(), tensor.source.order or tuple(range(tensor.dim()))
    classes_second = (0, rank - 1, *range(1, rank - 1)) if rank > 1 else (0,)
    if order != classes_second or tuple(target.shape) != (*tensor.shape[:1], *tensor.shape[2:])[: max(rank - 1, 0)]:
        return NotImplemented
    formula.check_fresh()
    head = _head(formula)
    head["hidden"] = head["hidden"].reshape(-1, head["hidden"].shape[-1])
    with torch.autocast(tensor.device.type, enabled=False):
        loss = ops.linear_cross_entropy(
            **head,
            target=target.reshape(-1),
            class_weight=class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    loss = loss.reshape(target.shape) if reduction == "none" else loss
    return loss.to(torch.float32 if autocasts(tensor) else tensor.dtype)


@handles("gather")
def _gather(tensor: Any, dim: Any, index: Any = None, **kwargs: Any) -> Any:
    formula = live_formula(tensor)
    if formula is None or kwargs or not isinstance(index, Tensor) or isinstance(index, LazyLogits):
        return NotImplemented
    canonical = _canonical(formula.steps)
    if canonical is None or tensor.source.order is not None or not is_last(tensor, dim):
        return NotImplemented
    if index.shape[:-1] != tensor.shape[:-1] or index.shape[-1] > (1 if canonical[2] else MAX_GATHERED):
        return NotImplemented
    formula.check_fresh()
    head = _head(formula)
    with torch.autocast(tensor.device.type, enabled=False):
        if canonical[2]:
            head["hidden"] = head["hidden"].reshape(-1, head["hidden"].shape[-1])
            picked = ops.linear_log_probs(**head, target=index.reshape(-1)).reshape(index.shape)
            return picked.to(tensor.dtype)
        rows = functional.embedding(index, head["weight"])  # (*rows, k, H): a dot product for each entry
        picked = (head["hidden"].unsqueeze(-2).float() * rows.float()).sum(-1)
        if head["bias"] is not None:
            picked = picked + head["bias"].float()[index]
        return apply_steps(picked.to(formula.product_dtype), formula.steps)


# --------------------------------------------------------------------------------------- over the vocabulary, in chunks


def _reduces(func: Any, dim_at: int = 0, default: int | None = None) -> Function:
    """For functions that reduce the vocabulary, or choose from it: a chunk of rows at a time."""

    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        formula = live_formula(tensor)
        if formula is None or tensor.source.order is not None or tensor.dim() < 2 or kwargs.get("out") is not None:
            return NotImplemented
        dim = args[dim_at] if len(args) > dim_at else kwargs.get("dim", default)
        dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        if not is_last(tensor, dim):
            return NotImplemented
        if len(args) > dim_at:
            args = (*args[:dim_at], -1, *args[dim_at + 1 :])
        else:
            kwargs["dim"] = -1
        formula.check_fresh()

        def of_chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            with torch.autocast(hidden.device.type, enabled=False):
                rows = apply_formula(hidden, weight, bias, product_dtype=formula.product_dtype, steps=formula.steps)
            return func(rows, *args, **kwargs)

        remembers = torch.is_grad_enabled() and tensor.requires_grad
        run_chunk = (
            functools.partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)
            if remembers
            else of_chunk
        )
        flat = formula.hidden.reshape(-1, formula.hidden.shape[-1])
        chunks = flat.split(max(1, CHUNK_BYTES // (4 * tensor.shape[-1])))
        results = [run_chunk(hidden, formula.weight, formula.bias) for hidden in chunks]
        lead = tensor.shape[:-1]
        if isinstance(results[0], Tensor):
            joined = torch.cat(results)
            return joined.reshape(*lead, *joined.shape[1:])
        parts = [torch.cat(part) for part in zip(*results, strict=True)]
        return type(results[0])([part.reshape(*lead, *part.shape[1:]) for part in parts])

    return run


for _name in ("argmax", "argmin", "amax", "amin", "max", "min", "logsumexp", "sum", "mean"):
    handles(_name)(_reduces(getattr(torch, _name)))
handles("topk")(_reduces(torch.topk, 1, -1))
