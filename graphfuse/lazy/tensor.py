"""The tensor that stands for logits, where its values come from, and how autograd sees it."""

from __future__ import annotations

import copy
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from graphfuse.lazy.formula import Formula, version
from graphfuse.lazy.gradients import Call, History, Known, Operand, Used
from graphfuse.lazy.table import ABOUT_SHAPE, FUNCTIONS, turns, writes
from graphfuse.match import VIEWS

aten = torch.ops.aten

materialised: Counter[str] = Counter()
"""How often logits were computed after all, by the line (`file:line`) that read them. The user may clear it."""

_HERE = Path(__file__).resolve().parent
_SAME = {aten.detach.default, aten.alias.default}
_GRAD: Any = vars(torch._C.TensorBase)["grad"].__get__
_OF_NODES = {Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook}
_OF_NODES |= {_GRAD, vars(torch._C.TensorBase)["grad"].__set__, vars(torch._C.TensorBase)["retains_grad"].__get__}


class Source:
    """Where the values of a lazy tensor come from; shared by its aliases.

    Attributes:
        formula: see there; `None` where only the values are known.
        order: permutation of the dimensions of the formula's result, or `None`.
        parent: what this one was made from by `make`: a view (`shares`) or a copy.
        own: the plain tensor, once there is one.
        picked: entries that were computed without their rows, each with its version and the index it is from.
        stack: of what was stacked, in which dimension, the formula with that dimension last, and the shape of one.
    """

    def __init__(
        self,
        formula: Formula | None,
        order: tuple[int, ...] | None = None,
        parent: Source | None = None,
        make: Callable[[Tensor], Tensor] | None = None,
        *,
        shares: bool = False,
    ) -> None:
        self.formula, self.order, self.parent, self.make, self.shares = formula, order, parent, make, shares
        self.own: Tensor | None = None
        self.own_version = 0
        self.view: tuple[Tensor, Tensor] | None = None  # of the parent's plain tensor
        self.history: History | None = None
        self.owner: weakref.ref[LazyLogits] | None = None  # whose autograd node has that history
        self.picked: list[tuple[weakref.ref[Tensor], int | None, Tensor]] = []
        self.stack: tuple[int, Formula, Tensor] | None = None

    @property
    def is_read(self) -> bool:
        """Whether the values stand in memory, here or where this is a view of."""
        return self.own is not None or (self.shares and self.parent is not None and self.parent.is_read)

    def kind(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and device of the values, known before they are."""
        if self.formula is not None:
            return self.formula.dtype, self.formula.device
        assert self.own is not None, "source: expected a formula or values, got neither"
        return self.own.dtype, self.own.device

    def tensor(self, *, with_parent: bool = False) -> Tensor:
        """The plain tensor, computed at most once; with its autograd history if gradients are on.

        Args:
            with_parent: make what this is a view of a plain tensor too, because memory is about to be written.
        """
        parent, make = self.parent, self.make
        if parent is not None and make is not None and self.shares and (with_parent or parent.is_read):
            base = parent.tensor(with_parent=with_parent)
            if self.view is None or self.view[0] is not base or not torch.is_grad_enabled():
                view = make(base)
                self.view = (base, view) if torch.is_grad_enabled() else None
                return view
            return self.view[1]
        if self.own is not None and (self.own.requires_grad or not self._wants_history()):
            return self.own
        assert self.formula is not None, "formula: expected one, as there are no values yet"
        changed = self.own if self.is_changed else None
        of_parent = parent is not None and parent.own is not None and not parent.is_changed
        if parent is not None and make is not None and of_parent:
            own = make(parent.tensor())
        else:
            materialised[_reader()] += 1
            own = self.formula.compute()
            own = own if self.order is None else own.permute(self.order)
        owner = None if self.owner is None else self.owner()
        if own.requires_grad and owner is not None and _is_ours(owner):
            own = Known.apply(Operand(None, own, self.history), own, owner, not of_parent)  # type: ignore[no-untyped-call]
        if changed is not None:
            with torch.no_grad():
                own.copy_(changed)
        self.own, self.own_version = own, version(own) or 0
        return own

    def values(self) -> Tensor:
        """The values as they were when the model ran, without history."""
        if self.own is not None and not self.is_changed:
            return self.own.detach()
        assert self.formula is not None, "formula: expected one, as the values were written to"
        materialised[_reader()] += 1
        values = self.formula.detach().compute()
        return values if self.order is None else values.permute(self.order)

    @property
    def is_changed(self) -> bool:
        """Whether the plain tensor was written to."""
        return self.own is not None and (version(self.own) or 0) != self.own_version

    def _wants_history(self) -> bool:
        if self.formula is None or not torch.is_grad_enabled():
            return False
        return any(tensor.requires_grad for tensor in self.formula.tensors)


def _reader() -> str:
    """`file:line` of the innermost frame outside torch and these files."""
    package = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_stack(limit=60)):
        path = Path(frame.filename)
        if _HERE not in path.parents and package not in path.parents and not frame.filename.startswith("<"):
            return f"{frame.filename}:{frame.lineno}"
    return "unknown"


class LazyLogits(Tensor):
    """A tensor that knows how to compute itself; see the module."""

    source: Source
    _plain: Tensor  # for `__tensor_flatten__`
    _bridge: Tensor | None = None  # the plain tensor, where autograd nodes of others made this one

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Above autograd: what stays lazy, what runs in chunks, and plain tensors for all the rest."""
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        with torch._C.DisableTorchFunctionSubclass():
            if func in ABOUT_SHAPE:
                return func(*args, **kwargs)
            compiling = torch.compiler.is_compiling()
            if compiling or (func in _OF_NODES and not is_replaced(args[0])):
                return func(*args, **kwargs)
            if func in FUNCTIONS:
                try:
                    result = FUNCTIONS[func](*args, **kwargs)
                except TypeError:  # arguments by names that nobody thought of here, or wrong ones, as torch will say
                    result = NotImplemented
                if result is not NotImplemented:
                    return _told(result, func, args, kwargs)
            if turns(func):
                raise RuntimeError(
                    f"logits: expected no change of their shape in place, got {func.__name__}; "
                    "use the function without the underscore, or compile with lazy_logits=False"
                )
            written = args[0] if writes(func) and isinstance(args[0], LazyLogits) else None

            def values(tensor: LazyLogits) -> Tensor:
                return plain(tensor, with_parent=tensor is written)

            args, kwargs = tree_map_only(LazyLogits, values, (args, kwargs))
            result = func(*args, **kwargs)
            return written if written is not None and result is args[0] else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Below autograd, for what comes from C++: aliases stay lazy, everything else gets the values."""
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and (
            func in _SAME or (func in VIEWS and tuple(args[1]) == tuple(first.shape))
        ):
            source = first.source
            if source.formula is None:  # inside a trace, of which the values are part
                return _known(func(source.tensor(), *args[1:]))
            return wrap(source, like=first)
        args, kwargs = tree_map_only(LazyLogits, lambda t: t.source.tensor().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(plain(self), memo)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(plain(self))

    # Dynamo and AOTAutograd take a subclass as an input of a graph by the plain tensors inside it.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        if not hasattr(self, "_plain"):
            with _disable_current_modes():  # fake tensors are made of the values, not inside them
                values = self.source.tensor(with_parent=not self.is_contiguous()).detach()
                if values.stride() != self.stride():  # Dynamo compares them with those of this tensor
                    values = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device).copy_(
                        values
                    )
                self._plain = values
        return ["_plain"], None

    def _stable_hash_for_caching(self) -> str:
        """What AOTAutograd's cache tells graphs apart by."""
        return repr((self.shape, self.stride(), self.dtype, self.device, self.requires_grad))

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Tensor:
        return _known(inner["_plain"])


def wrap(source: Source, *, like: Tensor) -> LazyLogits:
    """A new lazy tensor over `source`, of the shape and strides of `like`, without autograd history."""
    dtype, device = source.kind()
    tensor: LazyLogits = Tensor._make_wrapper_subclass(
        LazyLogits, like.shape, strides=like.stride(), dtype=dtype, device=device
    )
    tensor.source = source
    return tensor


def _known(values: Tensor) -> LazyLogits:
    """A lazy tensor in name only."""
    source = Source(None)
    source.own = values
    tensor = wrap(source, like=values)
    tensor._plain = values
    return tensor


def lazy(source: Source, like: Tensor | None = None, made: tuple[Call, int] | None = None) -> LazyLogits:
    """The lazy tensor over `source`, differentiable.

    Args:
        source: where its values come from.
        like: has its shape and strides; contiguous without.
        made: the call that it is a result of, and which.
    """
    formula = source.formula
    assert formula is not None, "formula: expected one to compute from"
    if like is None:
        like = formula.like()
        like = like if source.order is None else like.permute(source.order)
    source.history = History(formula, source.order)
    parents = [] if made is None else made[0].tensors
    result: LazyLogits = _Attach.apply(source, like, made, *parents, *formula.tensors)  # type: ignore[no-untyped-call]
    source.owner = weakref.ref(result)
    return result


def _told(result: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """The result of a call, with edges to the lazy operands, which are told of its gradient."""
    if not torch.is_grad_enabled() or func is torch.autograd.grad or not isinstance(result, (Tensor, Iterable)):
        return result
    results = [result] if isinstance(result, Tensor) else list(result)
    lazies = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyLogits)}
    if not any(isinstance(each, Tensor) and each.requires_grad and id(each) not in lazies for each in results):
        return result if not isinstance(result, Iterator) else iter(results)
    call = Call(func, args, kwargs, _operand, LazyLogits)
    if not call.tensors:
        return result if not isinstance(result, Iterator) else iter(results)
    for k, each in enumerate(results):
        if not isinstance(each, Tensor) or not each.requires_grad or id(each) in lazies:
            continue
        if isinstance(each, LazyLogits):
            results[k] = lazy(each.source, like=each, made=(call, k))
        else:
            results[k] = Used.apply(call, k, each, *call.tensors)  # type: ignore[no-untyped-call]
            call.replace(each, results[k])
    if isinstance(result, Tensor):
        return results[0]
    if isinstance(result, Iterator):
        return iter(results)
    cls: Any = type(result)
    return cls(results)


def _operand(tensor: LazyLogits) -> Operand:
    return Operand(tensor.source, tensor, tensor.source.history if tensor.requires_grad and _is_ours(tensor) else None)


def plain(tensor: LazyLogits, *, with_parent: bool = False) -> Tensor:
    """The values of a lazy tensor as a plain one, of the same history."""
    if not tensor.requires_grad:
        return tensor.source.tensor(with_parent=with_parent).detach()
    if _is_ours(tensor):
        return tensor.source.tensor(with_parent=with_parent)
    if tensor._bridge is None:
        tensor._bridge = _Bridge.apply(tensor)  # type: ignore[no-untyped-call]
    return tensor._bridge


def _is_ours(tensor: LazyLogits) -> bool:
    """Whether the autograd history is that of the formula, and nothing else's: no hook waits for the gradient."""
    history = getattr(tensor.grad_fn, "history", None)
    return history is not None and history is tensor.source.history and not tensor._backward_hooks


class _Bridge(torch.autograd.Function):
    """The values, with the history that somebody else's autograd node gave to the lazy tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: LazyLogits) -> Tensor:
        return tensor.source.tensor().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def live_formula(tensor: Tensor, *, whole: bool = False) -> Formula | None:
    """The formula that a function may compute from instead of the values, or `None` if it must take those.

    It must not where they stand in memory already (and may have been changed), and where autograd nodes of others
    stand between the logits and this tensor. Nor where rows are laid out anew (see `is_whole`), unless it does not need
    them one by one: `whole`.
    """
    if not isinstance(tensor, LazyLogits) or tensor.source.is_read:
        return None
    formula = tensor.source.formula
    if formula is None or (formula.is_whole and not whole):
        return None
    if not tensor.requires_grad:
        return formula.detach()
    return formula if _is_ours(tensor) else None


def is_replaced(tensor: LazyLogits) -> bool:
    """Whether the plain tensor, which was written to or is a view, has the autograd node that counts."""
    source = tensor.source
    return source.is_changed or (source.own is None and source.is_read)


class _Attach(torch.autograd.Function):
    """Gives a lazy tensor the autograd history of its hidden states and weights."""

    @staticmethod
    def forward(ctx: Any, source: Source, like: Tensor, made: tuple[Call, int] | None, *tensors: Tensor) -> LazyLogits:
        ctx.history, ctx.made = source.history, made
        ctx.set_materialize_grads(False)
        return wrap(source, like=like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        history: History = ctx.history
        count = len(history.formula.tensors)
        parents: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3 - count)
        if grad is None:
            return (None, None, None, *parents, *[None] * count)
        if torch.is_grad_enabled() and ctx.made is not None:
            call, result = ctx.made
            return (None, None, None, *call.differentiate(result, grad), *[None] * count)
        owed, of_parents = history.settle(grad)
        if ctx.made is not None:
            call, result = ctx.made
            parents = call.notes(result, of_parents)
        wanted = ctx.needs_input_grad[-count:]
        return (None, None, None, *parents, *history.gradients(owed, wanted))
