"""What autograd hears of the gradient of lazy logits, which nothing computes unless somebody asks.

A fused loss has the gradients of hidden states and weights, and skips the logits between. It still tells them: a note
goes up to their autograd node in the place of a gradient, `LazyGrad`, from which that can be computed. A hook, a
`retain_grad`, an `autograd.grad(loss, logits)` read it; otherwise the node sees that nothing is owed to anybody.

    loss  --gradients-->  hidden, weight          what was used, as it always went
    loss  --note------->  logits  --owed-->  ...  owed: what a hook made of the gradient, less what the notes say
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from graphfuse.lazy.formula import Formula, version
from graphfuse.lazy.table import ABOUT_SHAPE, writes

aten = torch.ops.aten


@dataclass(eq=False)
class History:
    """The autograd node of lazy logits: what they are made from, and the notes of the backward pass that runs."""

    formula: Formula
    order: tuple[int, ...] | None
    notes: list[Note] = field(default_factory=list)

    def values(self) -> Tensor:
        """The logits, differentiably."""
        computed = self.formula.compute()
        return computed if self.order is None else computed.permute(self.order)

    def gradients(self, grad: Tensor | None, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Those of the formula's tensors by that of the logits."""
        if grad is None or not any(wanted):
            return [None] * len(wanted)
        create_graph = torch.is_grad_enabled()
        formula = self.formula if create_graph else self.formula.detach()
        if not create_graph:
            for tensor, want in zip(formula.tensors, wanted, strict=True):
                tensor.requires_grad_(want)
        with torch.enable_grad():
            output = History(formula, self.order).values()
        needed = [tensor for tensor, want in zip(formula.tensors, wanted, strict=True) if want]
        grads = iter(torch.autograd.grad(output, needed, grad, create_graph=create_graph))
        return [next(grads) if want else None for want in wanted]

    def take(self, note: Note) -> LazyGrad:
        """Keep a note until the backward pass ends, and return it as a gradient."""
        if not self.notes:
            torch.autograd.Variable._execution_engine.queue_callback(self.notes.clear)
        self.notes.append(note)
        return LazyGrad.of([note])

    def settle(self, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What of a gradient nothing has passed on to the formula's tensors yet, and what concerns its parents."""
        notes, passing = list(self.notes), [note for note in self.notes if note.passes]
        self.notes.clear()
        if isinstance(grad, LazyGrad) and grad.is_untouched and set(grad.notes) == set(notes):
            return None, LazyGrad.of(passing) if passing else None
        grad = read(grad)
        owed = grad - LazyGrad.of(notes).read() if notes else grad
        stays = [note for note in notes if not note.passes]
        return owed, grad - LazyGrad.of(stays).read() if stays else grad


@dataclass(eq=False)
class Note:
    """The gradient of one lazy operand, by those of what was made of it.

    Attributes:
        call: what was made; `None`: the values themselves.
        which: which of its operands.
        result: which of its results.
        grad: their gradient.
        like: a lazy tensor of that operand's shape.
        passes: whether what the operand was made of has to hear of it.
    """

    call: Call | None
    which: int
    result: int
    grad: Tensor
    like: Tensor
    passes: bool = True

    def read(self) -> Tensor:
        """Compute it."""
        grad = read(self.grad)
        return grad if self.call is None else self.call.pull(self.which, self.result, grad)


class LazyGrad(Tensor):
    """The sum of notes, in the place of a gradient."""

    notes: Sequence[Note]
    value: Tensor | None
    value_version: int | None

    @classmethod
    def of(cls, notes: Sequence[Note]) -> LazyGrad:
        """The gradient that the notes tell of; at least one."""
        like = notes[0].like
        tensor: LazyGrad = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        tensor.notes, tensor.value = notes, None
        return tensor

    @property
    def is_untouched(self) -> bool:
        """Whether nobody wrote to it."""
        return self.value is None or version(self.value) == self.value_version

    def to_write(self) -> Tensor:
        """The same, in memory of its own."""
        value = self.read()
        if self.is_untouched:
            self.value = value.clone()
            self.value_version = -1
        return self.value  # type: ignore[return-value]

    def read(self) -> Tensor:
        """Compute it, once."""
        if self.value is None:
            first, *others = (note.read() for note in self.notes)
            for other in others:
                first = first + other
            self.value, self.value_version = first, version(first)
        return self.value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A plain gradient for whoever uses it."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in ABOUT_SHAPE or isinstance(func, torch._ops.OpOverload):  # that, of a mode
                return func(*args, **(kwargs or {}))
            written = args[0] if writes(func) and isinstance(args[0], LazyGrad) else None
            if written is not None:
                args = (written.to_write(), *args[1:])
            args, kwargs = tree_map_only(LazyGrad, read, (args, kwargs or {}))
            result = func(*args, **kwargs)
            return written if written is not None and result is args[0] else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The same, where autograd itself uses it; it may add them up."""
        lazies = [arg for arg in args if isinstance(arg, LazyGrad) and arg.value is None]
        if func is aten.add.Tensor and len(lazies) == len(args) == 2 and not kwargs:
            return cls.of([*lazies[0].notes, *lazies[1].notes])
        if func is aten.record_stream.default and lazies:
            return None
        with enable_reentrant_dispatch():
            if func._schema.is_mutable and isinstance(args[0], LazyGrad):
                func(args[0].to_write(), *args[1:], **(kwargs or {}))
                return args[0]
            args, kwargs = tree_map_only(LazyGrad, read, (args, kwargs or {}))
        return func(*args, **kwargs)


def read(grad: Tensor) -> Tensor:
    """A gradient as a plain tensor."""
    return grad.read() if isinstance(grad, LazyGrad) else grad


class Operand:
    """A lazy operand of a call: where its values come from, and its autograd node."""

    def __init__(self, source: Any, like: Tensor, history: History | None) -> None:
        self.source, self.history = source, history
        self.like = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
        self.device = like.device

    def give(self, call: Call | None, which: int, result: int, grad: Tensor | None, *, passes: bool = True) -> Any:
        """A note for its autograd node."""
        if grad is None or self.history is None:
            return None
        like = torch.Tensor._make_wrapper_subclass(
            LazyGrad, self.like.shape, strides=self.like.stride(), dtype=self.like.dtype, device=self.device
        )
        return self.history.take(Note(call, which, result, grad, like, passes))


class Call:
    """A torch function that was answered without values, and can be called again with them.

    Attributes:
        operands: its lazy arguments.
        tensors: those of them, and of all other arguments, that require gradients: edges of the autograd graph.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any, operand_of: Any, lazy_type: type) -> None:
        self.func = func
        flat, self.spec = tree_flatten((args, kwargs))
        self.operands: list[Operand] = []
        self.tensors: list[Tensor] = []
        self.edges: list[int | None] = []  # number of the operand, None for other tensors
        self.flat: list[Any] = []
        for arg in flat:
            if isinstance(arg, Tensor) and isinstance(arg, lazy_type):
                operand = operand_of(arg)
                if operand.history is not None:
                    self.edges.append(len(self.operands))
                    self.tensors.append(arg)
                self.flat.append(operand)
                self.operands.append(operand)
                continue
            if isinstance(arg, Tensor) and arg.requires_grad:
                self.edges.append(None)
                self.tensors.append(arg)
            self.flat.append(arg)
        self.ages = [version(arg) if isinstance(arg, Tensor) else None for arg in self.flat]
        device = self.operands[0].device.type
        self.autocast: dict[str, Any] = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }

    def _again(self, values: Sequence[Tensor], result: int) -> Tensor:
        ages = [version(arg) if isinstance(arg, Tensor) else None for arg in self.flat]
        if ages != self.ages:
            raise RuntimeError(
                "gradient of logits: expected arguments of their functions as they were, got an in-place change since; "
                "call retain_grad() before the loss, or compile with lazy_logits=False"
            )
        rest = iter(values)
        args, kwargs = tree_unflatten([next(rest) if isinstance(a, Operand) else a for a in self.flat], self.spec)
        with torch.autocast(**self.autocast):
            results = self.func(*args, **kwargs)
        found: Tensor = results if isinstance(results, Tensor) else list(results)[result]
        return found

    def pull(self, which: int, result: int, grad: Tensor) -> Tensor:
        """The gradient of an operand by that of a result."""
        with torch.enable_grad():
            values = [operand.source.values() for operand in self.operands]
            values = [value.requires_grad_(value.is_floating_point()) for value in values]
            again = self._again(values, result)
        found: Tensor = torch.autograd.grad(again, values[which], grad, materialize_grads=True)[0]
        return found

    def differentiate(self, result: int, grad: Tensor) -> Sequence[Tensor | None]:
        """The gradients of all `tensors`, which have gradients in turn."""
        each = (operand.history or operand.source for operand in self.operands)
        values = [one.values() for one in each]
        others = (arg for arg in self.flat if isinstance(arg, Tensor) and arg.requires_grad)
        wanted = [next(others) if edge is None else values[edge] for edge in self.edges]
        again = self._again(values, result)
        return torch.autograd.grad(again, wanted, grad, create_graph=True, allow_unused=True)

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Entries that were picked from logits are known by another tensor."""
        for operand in self.operands:
            picked = operand.source.picked
            for k, (reference, _, index) in enumerate(picked):
                if reference() is old:
                    picked[k] = (weakref.ref(new), version(new), index)

    def notes(self, result: int, grad: Tensor | None) -> list[Any]:
        """What to tell `tensors` of the gradient of a result."""
        return [None if edge is None else self.operands[edge].give(self, edge, result, grad) for edge in self.edges]


class Used(torch.autograd.Function):
    """A result that was computed without the logits; its gradient is told to them."""

    @staticmethod
    def forward(ctx: Any, call: Call, result: int, tensor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.result = call, result
        ctx.set_materialize_grads(False)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        if grad is not None and torch.is_grad_enabled():  # create_graph: not by way of ops without second derivative
            return None, None, None, *call.differentiate(ctx.result, grad)
        return None, None, grad, *call.notes(ctx.result, grad)


class Known(torch.autograd.Function):
    """The values, in the place of lazy logits: their gradient is told to those too."""

    @staticmethod
    def forward(ctx: Any, operand: Operand, values: Tensor, logits: Tensor, passes: bool) -> Tensor:
        ctx.operand, ctx.passes = operand, passes
        ctx.set_materialize_grads(False)
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return None, None, grad, None
        return None, grad, ctx.operand.give(None, 0, 0, grad, passes=ctx.passes), None
