"""What torch functions do to lazy logits: which stay lazy, and which run over chunks of tokens.

Everything here answers `NotImplemented` where it would have to guess; the function then gets plain tensors.
Shape letters: V = vocabulary, always the last dimension of a formula; rows = all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from graphfuse import ops
from graphfuse.lazy import Formula, LazyLogits, Source, Step, apply_formula, apply_steps, lazy, live_formula

Function = Callable[..., Any]

CHUNK_BYTES = 1 << 28  # of the float32 logits of one chunk, where no fused op does the work
MAX_GATHERED = 8  # entries per row, above which whole rows of logits are cheaper than dot products

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
ABOUT_SHAPE |= {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor}

_LIKE = "empty_like zeros_like ones_like full_like rand_like randn_like"
_NEW = "new_empty new_zeros new_ones new_full new_tensor"


def writes(func: Any) -> bool:
    """Whether the function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))


def _handles(*names: str) -> Callable[[Function], Function]:
    """Register a function under these names of `torch`, `Tensor` and `torch.nn.functional`, where they exist."""

    def register(function: Function) -> Function:
        for name in names:
            for space in (torch, Tensor, functional):
                if hasattr(space, name):
                    FUNCTIONS[getattr(space, name)] = function
        return function

    return register


# ------------------------------------------------------------------------------------------- stays lazy: choice of rows


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and strides, without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), device="meta")


def _made(tensor: LazyLogits, func: Function, like: Tensor, hidden: Tensor, *, shares: bool) -> LazyLogits:
    formula = live_formula(tensor)
    assert formula is not None
    source = Source(formula.of_rows(hidden), None, tensor.source, func, shares=shares)
    return lazy(source, like)


def _reshapes(func: Any) -> Function:
    """For functions that keep the order of the elements: rows stay whole if the last size stays."""

    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        formula = live_formula(tensor)
        if formula is None or tensor.source.order is not None:
            return NotImplemented
        before = _stand_in(tensor)
        after = func(before, *args, **kwargs)
        if after is before:
            return tensor
        if after.dim() == 0 or after.shape[-1] != tensor.shape[-1]:
            return NotImplemented
        hidden = formula.hidden.reshape(*after.shape[:-1], formula.hidden.shape[-1])
        shares = after.untyped_storage()._cdata == before.untyped_storage()._cdata
        return _made(tensor, lambda v: func(v, *args, **kwargs), after, hidden, shares=shares)

    return run


def _chooses(func: Any, dim_at: int, *, copies: bool = False) -> Function:
    """For functions that choose along one dimension, which must not be the last."""

    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        formula = live_formula(tensor)
        dim = kwargs.get("dim", args[dim_at] if len(args) > dim_at else 0)
        if formula is None or tensor.source.order is not None or not isinstance(dim, int):
            return NotImplemented
        if dim % tensor.dim() == tensor.dim() - 1:
            return NotImplemented
        if len(args) > dim_at:
            args = (*args[:dim_at], dim % tensor.dim(), *args[dim_at + 1 :])
        else:
            kwargs["dim"] = dim % tensor.dim()
        hidden = func(formula.hidden, *args, **kwargs)
        if isinstance(hidden, Tensor):
            like = torch.empty((*hidden.shape[:-1], tensor.shape[-1]), device="meta")
            like = like if copies else func(_stand_in(tensor), *args, **kwargs)
            return _made(tensor, lambda v: func(v, *args, **kwargs), like, hidden, shares=not copies)
        likes = func(_stand_in(tensor), *args, **kwargs)
        return tuple(
            _made(tensor, lambda v, k=k: func(v, *args, **kwargs)[k], like, rows, shares=True)
            for k, (like, rows) in enumerate(zip(likes, hidden, strict=True))
        )

    return run


for _name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "view_as", "reshape_as"):
    _handles(_name)(_reshapes(getattr(Tensor, _name)))
for _name, _at in {"select": 0, "narrow": 0, "split": 1, "chunk": 1, "unbind": 0, "split_with_sizes": 1}.items():
    _handles(_name)(_chooses(getattr(Tensor, _name), _at))
_handles("index_select")(_chooses(Tensor.index_select, 0, copies=True))


@_handles("__iter__")
def _iterate(tensor: Any) -> Any:
    rows = FUNCTIONS[Tensor.unbind](tensor, 0)
    return rows if rows is NotImplemented else iter(rows)


@_handles("__getitem__")
def _item(tensor: Any, index: Any) -> Any:
    formula = live_formula(tensor)
    if formula is None or tensor.source.order is not None:
        return NotImplemented
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, (list, bool)) for part in parts):
        return NotImplemented
    free = tensor.dim() - sum(_dimensions(part) for part in parts)
    at = next((k for k, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts = [*parts[:at], *[slice(None)] * free, *parts[at + 1 :]]
    if free < 0 or not isinstance(parts[-1], slice) or parts[-1].indices(tensor.shape[-1]) != (0, tensor.shape[-1], 1):
        return NotImplemented
    where = (*parts[:-1], slice(None))
    hidden = formula.hidden[where]
    copies = any(isinstance(part, Tensor) for part in parts)
    like = torch.empty((*hidden.shape[:-1], tensor.shape[-1]), device="meta") if copies else _stand_in(tensor)[where]
    return _made(tensor, lambda v: v[where], like, hidden, shares=not copies)


def _dimensions(part: Any) -> int:
    """How many dimensions a part of an index consumes."""
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if _is_mask(part) else 1


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)


def _permutes(func: Any) -> Function:
    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        formula = live_formula(tensor)
        if formula is None:
            return NotImplemented
        rank = tensor.dim()
        # Sizes that tell the dimensions apart.
        numbered = func(torch.empty(tuple(range(1, rank + 1)), device="meta"), *args, **kwargs)
        move = tuple(size - 1 for size in numbered.shape)
        like = func(_stand_in(tensor), *args, **kwargs)
        before = tensor.source.order or tuple(range(rank))
        order = tuple(before[d] for d in move)
        make = functools.partial(Tensor.permute, dims=move)
        if order[-1] == rank - 1:  # the vocabulary is last again: rows in another order
            rows = formula.of_rows(formula.hidden.permute(order))
            return lazy(Source(rows, None, tensor.source, make, shares=True), like)
        return lazy(Source(formula, order, tensor.source, make, shares=True), like)

    return run


for _name in ("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"):
    _handles(_name)(_permutes(getattr(Tensor, _name)))


# --------------------------------------------------------------------------------- stays lazy: dtype, scale, softmax


def _stepped(tensor: LazyLogits, *steps: Step) -> LazyLogits:
    """The lazy result of a function of each row."""
    formula = live_formula(tensor)
    assert formula is not None
    source = Source(formula.then(*steps), tensor.source.order, tensor.source, lambda v: apply_steps(v, steps))
    return lazy(source, _stand_in(tensor))


def _cast(tensor: Any, dtype: Any) -> Any:
    if live_formula(tensor) is None or not dtype.is_floating_point:
        return NotImplemented
    return tensor if dtype == tensor.dtype else _stepped(tensor, ("to", dtype))


for _name, _dtype in {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
}.items():

    def _to_this(tensor: Any, *, dtype: torch.dtype = _dtype, **kwargs: Any) -> Any:
        return NotImplemented if kwargs else _cast(tensor, dtype)

    FUNCTIONS[getattr(Tensor, _name)] = _to_this


@_handles("type_as")
def _type_as(tensor: Any, other: Tensor) -> Any:
    return _cast(tensor, other.dtype) if tensor.device == other.device else NotImplemented


@_handles("to")
def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    if live_formula(tensor) is None or memory_format is not None or (device is not None and device != tensor.device):
        return NotImplemented
    wanted = tensor.dtype if dtype is None else dtype
    if wanted == tensor.dtype and kwargs.get("copy"):
        return _stepped(tensor)
    return _cast(tensor, wanted)


@_handles("clone")
def _clone(tensor: Any, *, memory_format: Any = torch.preserve_format) -> Any:
    preserved = memory_format in (torch.preserve_format, torch.contiguous_format)
    if live_formula(tensor) is None or not preserved or not tensor.is_contiguous():
        return NotImplemented
    return _stepped(tensor)


@_handles("detach")
def _detach(tensor: Any) -> Any:
    if live_formula(tensor) is None:
        return NotImplemented
    source = Source(tensor.source.formula.detach(), tensor.source.order, tensor.source, Tensor.detach, shares=True)
    return lazy(source, _stand_in(tensor))


def _scales(step: str) -> Function:
    def run(tensor: Any, other: Any, **kwargs: Any) -> Any:
        if isinstance(other, LazyLogits):
            return _of_both(tensor, other) if step == "mul" and not kwargs else NotImplemented
        if kwargs or live_formula(tensor) is None or isinstance(other, bool) or not isinstance(other, (int, float)):
            return NotImplemented
        return _stepped(tensor, (step, other))

    return run


_handles("mul", "multiply", "__mul__", "__rmul__")(_scales("mul"))
_handles("div", "divide", "true_divide", "__truediv__", "__div__")(_scales("div"))


def _of_both(left: Any, right: LazyLogits) -> Any:
    """The product of two functions of the same logits, such as p * log p."""
    first, second = live_formula(left), live_formula(right)
    if first is None or second is None or left.source.order or right.source.order:
        return NotImplemented
    same = first.hidden is second.hidden or (
        first.hidden.data_ptr() == second.hidden.data_ptr() and first.hidden.stride() == second.hidden.stride()
    )
    if not same or first.weight.data_ptr() != second.weight.data_ptr() or left.shape != right.shape:
        return NotImplemented
    if first.dtype != second.dtype or first.product_dtype != second.product_dtype:
        return NotImplemented
    if left.requires_grad != right.requires_grad:
        return NotImplemented
    ours, theirs = first.steps, second.steps

    def product(rows: Tensor) -> Tensor:
        return apply_steps(rows, ours) * apply_steps(rows, theirs)

    formula = Formula(
        first.hidden,
        first.weight,
        first.bias,
        first.product_dtype,
        (("apply", product), ("to", first.dtype)),
        first.versions,
    )
    return lazy(Source(formula), _stand_in(left))


def _log_softmax(rows: Tensor) -> Tensor:
    return rows.log_softmax(-1)


def _softmax(rows: Tensor) -> Tensor:
    return rows.softmax(-1)


def _normalizes(apply: Function) -> Function:
    def run(tensor: Any, dim: Any = None, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("_stacklevel", None)
        args = tuple(arg for arg in args if not isinstance(arg, int) or isinstance(arg, bool))  # _stacklevel
        if args and isinstance(args[0], torch.dtype):
            dtype, args = args[0], args[1:]
        if args or kwargs or live_formula(tensor) is None or not _is_last(tensor, dim):
            return NotImplemented
        if dtype is None:
            dtype = torch.float32 if _autocasts(tensor) else tensor.dtype
        steps: tuple[Step, ...] = (("to", dtype),) if dtype != tensor.dtype else ()
        return _stepped(tensor, *steps, ("apply", apply))

    return run


_handles("log_softmax")(_normalizes(_log_softmax))
_handles("softmax")(_normalizes(_softmax))


@_handles("exp")
def _exp(tensor: Any) -> Any:
    return NotImplemented if live_formula(tensor) is None else _stepped(tensor, ("apply", torch.exp))


def _is_last(tensor: Tensor, dim: Any) -> bool:
    """Whether `dim` is the vocabulary's."""
    source: Source = tensor.source  # type: ignore[attr-defined]
    last = tensor.dim() - 1 if source.order is None else source.order.index(tensor.dim() - 1)
    return isinstance(dim, int) and dim % max(tensor.dim(), 1) == last


def _autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64


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
        if name in ("mul", "div"):
            scale *= value if name == "mul" else 1.0 / value
        elif name == "tanh" and not seen_tanh:
            inside, scale, seen_tanh = scale, 1.0, True
        elif name == "apply" and value is _log_softmax:
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


@_handles("cross_entropy")
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


@_handles("nll_loss")
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
    if target.is_floating_point() or reduction not in ("mean", "sum", "none"):
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
    return loss.to(torch.float32 if _autocasts(tensor) and not normal else tensor.dtype)


@_handles("gather")
def _gather(tensor: Any, dim: Any, index: Any = None, **kwargs: Any) -> Any:
    formula = live_formula(tensor)
    if formula is None or kwargs or not isinstance(index, Tensor) or isinstance(index, LazyLogits):
        return NotImplemented
    canonical = _canonical(formula.steps)
    if canonical is None or tensor.source.order is not None or not _is_last(tensor, dim):
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
        if not _is_last(tensor, dim):
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
        run_chunk = functools.partial(checkpoint, of_chunk, use_reentrant=False) if remembers else of_chunk
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
    _handles(_name)(_reduces(getattr(torch, _name)))
_handles("topk")(_reduces(torch.topk, 1, -1))


# ---------------------------------------------------------------------------------------------------- shape and no more


def _like(func: Any) -> Function:
    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, LazyLogits):
            return NotImplemented
        return func(_stand_in(tensor), *args, **{"device": tensor.device, "dtype": tensor.dtype, **kwargs})

    return run


for _name in (*_LIKE.split(), *_NEW.split()):
    _handles(_name)(_like(getattr(torch, _name, None) or getattr(Tensor, _name)))
