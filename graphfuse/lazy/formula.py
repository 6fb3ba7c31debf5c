"""What logits are made from, and how to make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Age = tuple[int | None, int] | None  # version and address; writes through `.data` leave both alone
Step = tuple[str, Any]  # ("mul" | "div", number), ("tanh", None), ("to", dtype), ("apply", function of whole rows)


@dataclass(frozen=True)
class Formula:
    """What logits are made from: `steps(hidden @ weight.T + bias)`.

    Attributes:
        hidden: (*rows, H).
        weight: (V, H).
        bias: (V), or `None`.
        product_dtype: dtype in which the product runs; autocast may not be on any more when it does.
        steps: what follows the product, in order.
        ages: of the three tensors, at the time when the model ran.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    product_dtype: torch.dtype
    steps: tuple[Step, ...]
    ages: tuple[Age, ...]

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product_dtype: torch.dtype,
        steps: Sequence[Step],
    ) -> Formula:
        """Note how old the tensors are."""
        ages = tuple(_age(t) for t in (hidden, weight, bias))
        return cls(hidden, weight, bias, product_dtype, tuple(steps), ages)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits."""
        casts = [value for name, value in self.steps if name == "to"]
        return casts[-1] if casts else self.product_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits, (*rows, V)."""
        return (*self.hidden.shape[:-1], self.weight.shape[0])

    def detach(self) -> Formula:
        """The same without autograd history."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def of_rows(self, hidden: Tensor) -> Formula:
        """The same for other rows."""
        return replace(self, hidden=hidden, ages=(_age(hidden), *self.ages[1:]))

    def then(self, *steps: Step) -> Formula:
        """The same, with more steps."""
        return replace(self, steps=(*self.steps, *steps))

    def check_fresh(self) -> None:
        """Refuse to compute from tensors that are no longer what they were.

        Raises:
            RuntimeError: one of them was changed in place since, or freed.
        """
        tensors = (self.hidden, self.weight, self.bias)
        if any(t is not None and t.numel() and not t.untyped_storage().nbytes() for t in tensors):
            raise RuntimeError(
                "logits: expected to be read while the weights of the head are there, got freed memory "
                "(FSDP reshards after forward); read them earlier, or compile with lazy_logits=False"
            )
        if tuple(_age(t) for t in tensors) != self.ages:
            raise RuntimeError(
                "logits: expected to be read before the weights of the head change, got an in-place change since "
                "(an optimizer step?); read them earlier, or compile with lazy_logits=False"
            )

    def compute(self) -> Tensor:
        """The logits, differentiably."""
        self.check_fresh()
        with torch.autocast(self.hidden.device.type, enabled=False):
            return apply_formula(
                self.hidden, self.weight, self.bias, product_dtype=self.product_dtype, steps=self.steps
            )


def apply_formula(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    product_dtype: torch.dtype,
    steps: Sequence[Step],
) -> Tensor:
    """Compute logits: a linear layer, then `steps` in the order and dtypes of the model."""
    bias = None if bias is None else bias.to(product_dtype)
    result = functional.linear(hidden.to(product_dtype), weight.to(product_dtype), bias)
    return apply_steps(result, steps)


def apply_steps(result: Tensor, steps: Sequence[Step]) -> Tensor:
    """What follows the product."""
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


def _age(tensor: Tensor | None) -> Age:
    return None if tensor is None else (version(tensor), tensor.data_ptr())
