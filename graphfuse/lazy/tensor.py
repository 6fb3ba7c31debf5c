"""The tensor that stands for logits, where its values come from, and how autograd sees it."""

from __future__ import annotations

import copy
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from graphfuse.lazy.formula import Formula, version
from graphfuse.lazy.table import ABOUT_SHAPE, FUNCTIONS, turns, writes
from graphfuse.match import VIEWS

aten = torch.ops.aten

materialised: Counter[str] = Counter()
"""How often logits were computed after all, by the line (`file:line`) that read them. The user may clear it."""

_HERE = Path(__file__).resolve().parent
_SAME = {aten.detach.default, aten.alias.default}
_GRAD: Any = vars(torch._C.TensorBase)["grad"].__get__
_HOOKS = {Tensor.register_hook}  # FSDP hangs one on every output


class Source:
    """Where the values of a lazy tensor come from; shared by its aliases.

    Attributes:
        formula: see there; `None` where only the values are known.
        order: permutation of the dimensions of the formula's result, or `None`.
        parent: what this one was made from by `make`: a view (`shares`) or a copy.
        own: the plain tensor, once there is one.
        picked: entries that were computed without their rows, each with its version and the index it is from.
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
        self.picked: list[tuple[weakref.ref[Tensor], int | None, Tensor]] = []

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
            return make(parent.tensor(with_parent=with_parent))
        if self.own is not None and (self.own.requires_grad or not self._wants_history()):
            return self.own
        assert self.formula is not None, "formula: expected one, as there are no values yet"
        changed = self.own if self.is_changed else None
        if parent is not None and make is not None and parent.own is not None and not parent.is_changed:
            own = make(parent.tensor())
        else:
            materialised[_reader()] += 1
            own = self.formula.compute()
            own = own if self.order is None else own.permute(self.order)
        if changed is not None:
            with torch.no_grad():
                own.copy_(changed)
        self.own, self.own_version = own, version(own) or 0
        return own

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
            if func == _GRAD and not (args[0].is_leaf and args[0].requires_grad):
                if compiling or not args[0].source.is_read:
                    return None
            elif compiling or func == _GRAD:
                return func(*args, **kwargs)
            if func in _HOOKS and not args[0].source.is_read:
                return func(*args, **kwargs)  # from now on, values are read by way of this tensor's own history
            if func in FUNCTIONS:
                try:
                    result = FUNCTIONS[func](*args, **kwargs)
                except TypeError:  # arguments by names that nobody thought of here, or wrong ones, as torch will say
                    result = NotImplemented
                if result is not NotImplemented:
                    return result
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


def lazy(source: Source, like: Tensor | None = None) -> LazyLogits:
    """The lazy tensor over `source`, differentiable; `like` has its shape and strides (contiguous without)."""
    formula = source.formula
    assert formula is not None, "formula: expected one to compute from"
    if like is None:
        like = formula.like()
        like = like if source.order is None else like.permute(source.order)
    result: LazyLogits = _Attach.apply(source, like, *formula.tensors)  # type: ignore[no-untyped-call]
    return result


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
    return getattr(tensor.grad_fn, "source", None) is tensor.source and not tensor._backward_hooks


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


class _Attach(torch.autograd.Function):
    """Gives a lazy tensor the autograd history of its hidden states and weights, for whoever reads it from C++."""

    @staticmethod
    def forward(ctx: Any, source: Source, like: Tensor, *tensors: Tensor) -> LazyLogits:
        ctx.source = source
        ctx.set_materialize_grads(False)
        return wrap(source, like=like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if grad is None:
            return (None,) * (2 + len(wanted))
        source: Source = ctx.source
        assert source.formula is not None
        formula = source.formula.detach()
        needed = [t.requires_grad_() for t, need in zip(formula.tensors, wanted, strict=True) if need]
        with torch.enable_grad():
            output = formula.compute()
            output = output if source.order is None else output.permute(source.order)
        grads = iter(torch.autograd.grad(output, needed, grad))
        return (None, None, *(next(grads) if need else None for need in wanted))
