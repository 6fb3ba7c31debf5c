"""What torch functions do to lazy logits that stays lazy: rows, order, dtype, scale, soft cap, softmax.

Everything here answers `NotImplemented` where it would have to guess; the function then gets plain tensors.
Shape letters: V = vocabulary, always the last dimension of a formula; rows = all others.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from graphfuse.lazy.formula import Step, apply_steps
from graphfuse.lazy.table import FUNCTIONS, Function, handles
from graphfuse.lazy.tensor import LazyLogits, Source, lazy, live_formula, plain

_LIKE = "empty_like zeros_like ones_like full_like rand_like randn_like"
_NEW = "new_empty new_zeros new_ones new_full new_tensor"


# ------------------------------------------------------------------------------------------- stays lazy: choice of rows


def stand_in(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and strides, without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), device="meta")


def _made(tensor: LazyLogits, func: Function, like: Tensor, rows: Function, *, shares: bool) -> LazyLogits:
    formula = live_formula(tensor)
    assert formula is not None
    source = Source(formula.of_rows(rows), None, tensor.source, func, shares=shares)
    return lazy(source, like)


def _reshapes(func: Any) -> Function:
    """For functions that keep the order of the elements: rows stay whole if the last size stays."""

    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        formula = live_formula(tensor)
        if formula is None or tensor.source.order is not None:
            return NotImplemented
        if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):  # other numbers of the same bits
            return NotImplemented
        before = stand_in(tensor)
        after = func(before, *args, **kwargs)
        if after is before:
            return tensor
        if after.dim() == 0 or after.shape[-1] != tensor.shape[-1]:
            return NotImplemented
        shares = after.untyped_storage()._cdata == before.untyped_storage()._cdata

        def rows(hidden: Tensor) -> Tensor:
            return hidden.reshape(*after.shape[:-1], hidden.shape[-1])

        return _made(tensor, lambda v: func(v, *args, **kwargs), after, rows, shares=shares)

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

        def choose(values: Tensor) -> Any:
            return func(values, *args, **kwargs)

        likes = choose(stand_in(tensor))
        if isinstance(likes, Tensor):
            likes = torch.empty(likes.shape, device="meta") if copies else likes
            return _made(tensor, choose, likes, choose, shares=not copies)
        take = [lambda values, k=k: choose(values)[k] for k in range(len(likes))]
        return tuple(_made(tensor, one, like, one, shares=True) for one, like in zip(take, likes, strict=True))

    return run


for _name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "view_as", "reshape_as"):
    handles(_name)(_reshapes(getattr(Tensor, _name)))
_WHERE_DIM_IS = {
    "select": 0,
    "narrow": 0,
    "split": 1,
    "chunk": 1,
    "unbind": 0,
    "split_with_sizes": 1,
    "tensor_split": 1,
}
for _name, _at in _WHERE_DIM_IS.items():
    handles(_name)(_chooses(getattr(Tensor, _name), _at))
handles("index_select")(_chooses(Tensor.index_select, 0, copies=True))


@handles("__iter__")
def _iterate(tensor: Any) -> Any:
    rows = FUNCTIONS[Tensor.unbind](tensor, 0)
    return rows if rows is NotImplemented else iter(rows)


@handles("__getitem__")
def _item(tensor: Any, index: Any) -> Any:
    formula = live_formula(tensor)
    if formula is None or tensor.source.order is not None:
        return NotImplemented
    parts = [_as_index(part) for part in (index if isinstance(index, tuple) else (index,))]
    if any(part is NotImplemented for part in parts):
        return NotImplemented
    if len(parts) == tensor.dim() > 1 and all(isinstance(p, Tensor) and not _is_mask(p) for p in parts):
        return _entries(tensor, parts)
    free = tensor.dim() - sum(_dimensions(part) for part in parts)
    at = next((k for k, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts = [*parts[:at], *[slice(None)] * free, *parts[at + 1 :]]
    if free < 0:
        return NotImplemented
    if not isinstance(parts[-1], slice):
        return _of_few(tensor, parts)
    where = (*parts[:-1], slice(None))
    if parts[-1].indices(tensor.shape[-1]) != (0, tensor.shape[-1], 1):
        rows = tensor if all(part == slice(None) for part in where) else _item(tensor, where)
        return rows if rows is NotImplemented else _classes(rows, parts[-1])

    def choose(values: Tensor) -> Tensor:
        return values[where]

    copies = any(isinstance(part, Tensor) for part in parts)
    if copies:
        like = torch.empty((*formula.tensors[0][where].shape[:-1], tensor.shape[-1]), device="meta")
    else:
        like = choose(stand_in(tensor))
    return _made(tensor, choose, like, choose, shares=not copies)


def _as_index(part: Any) -> Any:
    """One part of an index, as numbers or a tensor of them."""
    if part is None or part is Ellipsis or (isinstance(part, (int, slice)) and not isinstance(part, bool)):
        return part
    if isinstance(part, Tensor):
        return part if part.dim() and not isinstance(part, LazyLogits) else NotImplemented
    try:
        return NotImplemented if isinstance(part, bool) else torch.as_tensor(part)
    except (TypeError, ValueError, RuntimeError):
        return NotImplemented


def _classes(tensor: Any, which: slice) -> Any:
    """Some classes in a row, as of a head that is padded."""
    start, stop, step = which.indices(tensor.shape[-1])
    formula = live_formula(tensor)
    chosen = formula.of_classes(start, stop) if formula is not None and step == 1 and start < stop else None
    if chosen is None:
        return NotImplemented

    def choose(values: Tensor) -> Tensor:
        return values[..., start:stop]

    return lazy(Source(chosen, None, tensor.source, choose, shares=True), choose(stand_in(tensor)))


def _of_few(tensor: Any, parts: list[Any]) -> Any:
    """Some classes of some rows, `logits[:, -1, [yes, no]]`: those rows are read, and no others."""
    *lead, classes = parts
    if all(part == slice(None) for part in lead) or any(isinstance(part, Tensor) for part in lead):
        return NotImplemented
    rows = _item(tensor, (*lead, slice(None)))
    return rows if rows is NotImplemented else plain(rows)[..., classes]


def _entries(tensor: Any, indices: list[Any]) -> Any:
    """One entry for each number of a row and of a class, `logits[arange, target]`."""
    *lead, last = torch.broadcast_tensors(*(index.to(torch.int64) for index in indices))
    rows = _item(tensor, tuple(lead))
    last = torch.where(last < 0, last + tensor.shape[-1], last)
    found = NotImplemented if rows is NotImplemented else FUNCTIONS[torch.gather](rows, -1, last.unsqueeze(-1))
    return found if found is NotImplemented else found.squeeze(-1)


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
        like = func(stand_in(tensor), *args, **kwargs)
        before = tensor.source.order or tuple(range(rank))
        order = tuple(before[d] for d in move)
        make = functools.partial(Tensor.permute, dims=move)
        if order[-1] == rank - 1:  # the vocabulary is last again: rows in another order
            rows = formula.of_rows(lambda hidden: hidden.permute(order))
            return lazy(Source(rows, None, tensor.source, make, shares=True), like)
        return lazy(Source(formula, order, tensor.source, make, shares=True), like)

    return run


for _name in ("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"):
    handles(_name)(_permutes(getattr(Tensor, _name)))
FUNCTIONS[Tensor.mT.__get__] = _permutes(Tensor.mT.__get__)  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------- stays lazy: dtype, scale, softmax


def stepped(tensor: LazyLogits, *steps: Step) -> LazyLogits:
    """The lazy result of a function of each row."""
    formula = live_formula(tensor, whole=True)
    assert formula is not None
    source = Source(formula.then(*steps), tensor.source.order, tensor.source, lambda v: apply_steps(v, steps))
    return lazy(source, stand_in(tensor))


def applied(tensor: Any, apply: Function) -> Any:
    """The lazy result of a function of each element, or of rows that keeps their shape."""
    if not isinstance(tensor, LazyLogits) or live_formula(tensor, whole=True) is None:
        return NotImplemented
    dtype = dtype_of(apply, tensor)
    wide = dtype if dtype.is_floating_point else tensor.dtype
    before: tuple[Step, ...] = (("to", wide),) if wide != tensor.dtype else ()
    after: tuple[Step, ...] = (("to", dtype),) if wide != dtype else ()
    return stepped(tensor, *before, ("apply", apply), *after)


def _cast(tensor: Any, dtype: Any) -> Any:
    if live_formula(tensor, whole=True) is None or not dtype.is_floating_point:
        return NotImplemented
    return tensor if dtype == tensor.dtype else stepped(tensor, ("to", dtype))


for _name, _dtype in {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
}.items():

    def _to_this(tensor: Any, *, dtype: torch.dtype = _dtype, **kwargs: Any) -> Any:
        return NotImplemented if kwargs else _cast(tensor, dtype)

    FUNCTIONS[getattr(Tensor, _name)] = _to_this


@handles("type_as")
def _type_as(tensor: Any, other: Tensor) -> Any:
    return _cast(tensor, other.dtype) if tensor.device == other.device else NotImplemented


@handles("to")
def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    if (
        live_formula(tensor, whole=True) is None
        or memory_format is not None
        or (device is not None and device != tensor.device)
    ):
        return NotImplemented
    wanted = tensor.dtype if dtype is None else dtype
    if wanted == tensor.dtype and kwargs.get("copy"):
        return _copy(tensor)
    return _cast(tensor, wanted)


@handles("clone")
def _clone(tensor: Any, *, memory_format: Any = torch.preserve_format) -> Any:
    preserved = memory_format in (torch.preserve_format, torch.contiguous_format)
    if live_formula(tensor, whole=True) is None or not preserved or not tensor.is_contiguous():
        return NotImplemented
    return _copy(tensor)


def _copy(tensor: LazyLogits) -> Tensor:
    """A copy of what has no history has no use but to outlive what it is made from.

    What has one may be copied without gradients by an autograd function that passes it on, as DDP's does.
    """
    return stepped(tensor) if tensor.requires_grad else tensor.source.values()


@handles("detach")
def _detach(tensor: Any) -> Any:
    if live_formula(tensor, whole=True) is None:
        return NotImplemented
    source = Source(tensor.source.formula.detach(), tensor.source.order, tensor.source, Tensor.detach, shares=True)
    return lazy(source, stand_in(tensor))


def log_softmax_of_rows(rows: Tensor) -> Tensor:
    """What a lazy log_softmax has among its steps."""
    return rows.log_softmax(-1)


def _softmax(rows: Tensor) -> Tensor:
    return rows.softmax(-1)


def _normalizes(apply: Function) -> Function:
    def run(tensor: Any, dim: Any = None, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("_stacklevel", None)
        args = tuple(arg for arg in args if not isinstance(arg, int) or isinstance(arg, bool))  # _stacklevel
        if args and isinstance(args[0], torch.dtype):
            dtype, args = args[0], args[1:]
        if args or kwargs or live_formula(tensor) is None or not is_last(tensor, dim):
            return NotImplemented
        dtype = dtype_of(apply, tensor) if dtype is None else dtype
        steps: tuple[Step, ...] = (("to", dtype),) if dtype != tensor.dtype else ()
        return stepped(tensor, *steps, ("apply", apply))

    return run


handles("log_softmax")(_normalizes(log_softmax_of_rows))
handles("softmax")(_normalizes(_softmax))


@handles("neg", "negative", "__neg__")
def _negative(tensor: Any) -> Any:
    return NotImplemented if live_formula(tensor) is None else stepped(tensor, ("mul", -1.0))


@handles("tanh")
def _tanh(tensor: Any) -> Any:
    return NotImplemented if live_formula(tensor) is None else stepped(tensor, ("tanh", None))


def is_last(tensor: Tensor, dim: Any) -> bool:
    """Whether `dim` is the vocabulary's."""
    source: Source = tensor.source  # type: ignore[attr-defined]
    last = tensor.dim() - 1 if source.order is None else source.order.index(tensor.dim() - 1)
    return isinstance(dim, int) and dim % max(tensor.dim(), 1) == last


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast applies to such a tensor now."""
    return torch.is_autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64


def dtype_of(apply: Function, tensor: Tensor) -> torch.dtype:
    """The dtype that a function of such a tensor has now, autocast or not."""
    result: Tensor = apply(torch.empty(0, 1, dtype=tensor.dtype, device=tensor.device))
    return result.dtype


# ---------------------------------------------------------------------------------------------------- shape and no more


def _like(func: Any) -> Function:
    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, LazyLogits):
            return NotImplemented
        return func(stand_in(tensor), *args, **{"device": tensor.device, "dtype": tensor.dtype, **kwargs})

    return run


for _name in (*_LIKE.split(), *_NEW.split()):
    handles(_name)(_like(getattr(torch, _name, None) or getattr(Tensor, _name)))
