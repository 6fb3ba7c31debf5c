"""What logits are made from, and how to make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter, functional

Age = tuple[int | None, int] | None  # version and address; writes through `.data` leave both alone
Step = tuple[str, Any]  # ("mul" | "div", number), ("tanh", None), ("to", dtype), ("apply", function of whole rows)


Choice = tuple[Any, ...]
"""("select", dimension, index), ("slice", dimension, start, end), ("copy", ...) of a slice; -1: of the classes."""


class Stack(NamedTuple):
    """How the outputs of several linear layers stand in one tensor."""

    dim: int
    flat: int  # how many leading dimensions are flattened then; 0: none

    def of(self, *parts: Tensor) -> Tensor:
        """Stack them."""
        stacked = torch.stack(parts, self.dim)
        return stacked.flatten(0, self.flat - 1) if self.flat else stacked


class Part(NamedTuple):
    """One of the tensors that a formula joins: the output of a linear layer, or rows that are given.

    Its tensors are `hidden` (*rows, H), `weight` (V, H) and maybe `bias` (V), or the rows alone, (*rows, V or 1).
    """

    dtype: (
        torch.dtype | None
    )  # in which the product runs; autocast may not be on any more when it does; None: no product
    has_bias: bool = False
    steps: tuple[Step, ...] = ()  # what follows the product

    @property
    def arity(self) -> int:
        """How many tensors it is made from."""
        return 1 if self.dtype is None else 2 + self.has_bias


@dataclass(frozen=True)
class Formula:
    """What logits are made from: `steps(hidden @ weight.T + bias)`, or a sum of such products.

    Attributes:
        tensors: those of all parts, one after the other; the first of each part has the rows of the logits.
        parts: how they are used; the first is a linear layer.
        steps: what follows, in order.
        ages: of the tensors, at the time when the model ran.
        join: what makes one tensor of those of the parts; `None`: their sum.
        is_whole: whether the join lays rows out anew, so that they cannot be chosen, or computed a chunk at a time.
    """

    tensors: tuple[Tensor, ...]
    parts: tuple[Part, ...]
    steps: tuple[Step, ...]
    ages: tuple[Age, ...]
    join: Callable[..., Tensor] | None = None
    is_whole: bool = False

    @classmethod
    def of(
        cls,
        tensors: Sequence[Tensor],
        parts: Sequence[Part],
        steps: Sequence[Step],
        stack: Stack | None = None,
    ) -> Formula:
        """Note how old the tensors are."""
        ages = tuple(map(_age, tensors))
        join = None if stack is None else stack.of
        return cls(tuple(tensors), tuple(parts), tuple(steps), ages, join, is_whole=stack is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits."""
        dtype = self.tensors[0].dtype
        for k, part in enumerate(self.parts):
            one = _dtype_after(part.steps, part.dtype or self.tensors[self._starts()[k]].dtype)
            dtype = torch.promote_types(dtype, one) if k else one
        return _dtype_after(self.steps, dtype)

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        return self.tensors[0].device

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits, (*rows, V)."""
        return (*self.tensors[0].shape[:-1], self.tensors[1].shape[0])

    def like(self) -> Tensor:
        """Return a tensor of the shape of the logits, without memory."""
        if not self.is_whole:
            return torch.empty(self.shape, device="meta")
        shapes = [(*hidden.shape[:-1], weight.shape[0]) for hidden, weight, _ in self.products()]
        return self.joined(*(torch.empty(shape, device="meta") for shape in shapes))

    def products(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Hidden states, weight and bias of each linear layer."""
        for start, part in zip(self._starts(), self.parts, strict=True):
            if part.dtype is not None:
                yield self.tensors[start], self.tensors[start + 1], self.tensors[start + 2] if part.has_bias else None

    def detach(self) -> Formula:
        """The same without autograd history."""
        return replace(self, tensors=tuple(tensor.detach() for tensor in self.tensors))

    def of_rows(self, change: Callable[[Tensor], Tensor]) -> Formula:
        """The same for other rows: what `change` makes of those of the parts."""
        tensors, ages = list(self.tensors), list(self.ages)
        for start in self._starts():
            tensors[start] = change(tensors[start])
            ages[start] = _age(tensors[start])
        return replace(self, tensors=tuple(tensors), ages=tuple(ages))

    def of_classes(self, start: int, stop: int) -> Formula | None:
        """The same for the classes from `start` to `stop`; `None` if others have a say in them."""
        steps = (*self.steps, *(step for part in self.parts for step in part.steps))
        if self.join is not None or any(part.dtype is None for part in self.parts) or "apply" in dict(steps):
            return None
        tensors: list[Tensor] = []
        for hidden, weight, bias in self.products():
            tensors += [hidden, weight[start:stop]] + ([] if bias is None else [bias[start:stop]])
        return replace(self, tensors=tuple(tensors), ages=tuple(map(_age, tensors)))

    def chosen(self, choices: Sequence[Choice]) -> Formula:
        """The same for some rows and some classes, which have to be slices of a sum of products."""
        rows = [choice for choice in choices if choice[1] != -1]
        formula = self.of_rows(lambda tensor: choose(tensor, rows)) if rows else self
        for _, _, *where in (choice for choice in choices if choice[1] == -1):
            start, stop, _ = slice(*where).indices(formula.shape[-1])
            some = formula if stop - start == formula.shape[-1] else formula.of_classes(start, stop)
            assert some is not None, "formula: expected a sum of products to choose classes of"
            formula = some
        return formula

    def then(self, *steps: Step) -> Formula:
        """The same, with more steps."""
        return replace(self, steps=(*self.steps, *steps))

    def with_other(self, other: Formula, function: Callable[[Tensor, Tensor], Tensor]) -> Formula:
        """`function` of the logits of both, of the same rows."""
        mine, theirs, first = self.after(), other.after(), len(self.parts)
        if _same(self.tensors, other.tensors) and (self.parts, self.join) == (other.parts, other.join):

            def once(*parts: Tensor) -> Tensor:
                joined = self.joined(*parts)
                return function(apply_steps(joined, self.steps), apply_steps(joined, other.steps))

            return replace(self, steps=(), join=once)

        def both(*parts: Tensor) -> Tensor:
            return function(mine(*parts[:first]), theirs(*parts[first:]))

        tensors, ages = (*self.tensors, *other.tensors), (*self.ages, *other.ages)
        return Formula(tensors, (*self.parts, *other.parts), (), ages, both)

    def joined(self, *parts: Tensor) -> Tensor:
        """One tensor of those of the parts."""
        if self.join is not None:
            return self.join(*parts)
        first, *others = parts
        for other in others:
            first = first + other
        return first

    def after(self) -> Callable[..., Tensor]:
        """What makes the logits of the tensors of the parts."""
        return lambda *parts: apply_steps(self.joined(*parts), self.steps)

    def check_fresh(self) -> None:
        """Refuse to compute from tensors that are no longer what they were.

        Raises:
            RuntimeError: one of them was changed in place since, or freed.
        """
        if any(t.numel() and not t.untyped_storage().nbytes() for t in self.tensors):
            raise RuntimeError(
                "logits: expected to be read while the weights of the head are there, got freed memory "
                "(FSDP reshards after forward); read them earlier, or compile with lazy_logits=False"
            )
        if tuple(map(_age, self.tensors)) != self.ages:
            raise RuntimeError(
                "logits: expected to be read before the weights of the head change, got an in-place change since, "
                "of them or what they met (an optimizer step?); read them earlier, or compile with lazy_logits=False"
            )

    def compute(self) -> Tensor:
        """The logits, differentiably."""
        self.check_fresh()
        return self.of_tensors(*self.tensors)

    def of_tensors(self, *tensors: Tensor) -> Tensor:
        """The logits of other tensors, such as some of the rows."""
        with torch.autocast(self.device.type, enabled=False):
            return self.after()(*_outputs(tensors, self.parts))

    def _starts(self) -> list[int]:
        """Where the tensors of each part begin."""
        counts = [part.arity for part in self.parts]
        return [sum(counts[:k]) for k in range(len(counts))]


def apply_formula(
    *tensors: Tensor,
    parts: Sequence[Part],
    steps: Sequence[Step],
    choices: Sequence[Choice] = (),
    stack: Stack | None = None,
) -> Tensor:
    """Compute logits, or some rows: the sum or a stack of linear layers, then `steps`, in the dtypes of the model."""
    formula = Formula.of(tensors, parts, steps, stack).chosen(choices)
    return formula.after()(*_outputs(formula.tensors, formula.parts))


def choose(rows: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Some rows, by their leading dimensions, and some classes."""
    for name, dim, *where in choices:
        if name == "select":
            rows = rows.select(dim, where[0])
        else:
            rows = rows[..., slice(*where)] if dim == -1 else rows[(slice(None),) * dim + (slice(*where),)]
            rows = rows.contiguous() if name == "copy" else rows
    return rows


def _outputs(tensors: Sequence[Tensor], parts: Sequence[Part]) -> Iterator[Tensor]:
    rest = iter(tensors)
    for part in parts:
        result = next(rest)
        if part.dtype is not None:
            weight = next(rest).to(part.dtype)
            bias = next(rest).to(part.dtype) if part.has_bias else None
            result = functional.linear(result.to(part.dtype), weight, bias)
        yield apply_steps(result, part.steps)


def apply_steps(result: Tensor, steps: Sequence[Step]) -> Tensor:
    """What follows a product."""
    for name, value in steps:
        if name == "mul":
            result = result * value
        elif name == "div":
            result = result / value
        elif name == "tanh":
            result = torch.tanh(result)
        elif name == "to":
            result = result.to(value)
        else:
            result = value(result)
    return result


def version(tensor: Tensor) -> int | None:
    """How often the tensor was written to; `None` where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _dtype_after(steps: Sequence[Step], dtype: torch.dtype) -> torch.dtype:
    return next((value for name, value in reversed(steps) if name == "to"), dtype)


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        a is b
        or (a.data_ptr(), a.shape, a.stride(), a.dtype, a.requires_grad)
        == (b.data_ptr(), b.shape, b.stride(), b.dtype, b.requires_grad)
        for a, b in zip(ours, theirs, strict=True)
    )


def _age(tensor: Tensor) -> Age:
    has_memory = type(tensor) in (Tensor, Parameter)  # a fake one, of a backend that tries graphs out, has none
    return version(tensor), tensor.data_ptr() if has_memory else 0
