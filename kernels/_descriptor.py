"""Tensors that kernels read and write in blocks."""

from __future__ import annotations

from typing import Any, NamedTuple


class Described(NamedTuple):
    """What Triton's TensorDescriptor is made of, when a kernel is launched or compiled."""

    tensor: Any  # or what has its dtype and address
    shape: list[int]
    strides: list[int]
    block: list[int]

    def descriptor(self) -> Any:
        """Return Triton's own."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(*self)


def as_passed(argument: Any) -> Any:
    """Return the argument of a launch as Triton takes it."""
    return argument.descriptor() if isinstance(argument, Described) else argument
