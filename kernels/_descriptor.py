"""Tensors that kernels read and write in blocks."""

from __future__ import annotations

from typing import Any, NamedTuple


class Described(NamedTuple):
    """What Triton's TensorDescriptor is made of, when a kernel is launched or compiled."""

    tensor: Any  # or what has its dtype and address
    shape: list[int]
    strides: list[int]
    block: list[int]
    layout: Any = None  # in shared memory, for a kernel in Gluon

    def descriptor(self) -> Any:
        """Return Triton's own, or Gluon's."""
        if self.layout is not None:
            from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

            return GluonDescriptor(*self)
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(*self[:4])


def as_passed(argument: Any) -> Any:
    """Return the argument of a launch as Triton takes it."""
    return argument.descriptor() if isinstance(argument, Described) else argument
