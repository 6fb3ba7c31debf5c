"""What every op does alike: the dtype it computes in, when its kernels run, and checks of what it is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from graphfuse.kernels._ahead import ahead
from graphfuse.kernels._repeat import repeated
from graphfuse.kernels._triton import HAS_TRITON

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
VECTOR_BYTES = 16  # of a load
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Operand = Tensor | torch.dtype | None

# What each op does, by its name, for callers that have no use for the dispatcher: torch.ops.graphfuse.direct.rms_norm
# takes what torch.ops.graphfuse.rms_norm.default does, and half as long on the host. Neither autograd nor modes see it.
direct = SimpleNamespace()
torch.ops.graphfuse.direct = direct  # type: ignore[attr-defined]


def implement(name: str, function: Callable[..., Any], *, repeats: bool = False) -> None:
    """Have an op that was defined do what the function does, on every device.

    Args:
        name: Of the op.
        function: Takes all of its arguments, in their order.
        repeats: Whether its calls on a GPU are worth recording: it does little but launch kernels.
    """
    if repeats:
        function = repeated(function, getattr(torch.ops.graphfuse, name).default._schema)
    torch.library.impl(f"graphfuse::{name}", "default", function)
    setattr(direct, name, function)


def run_ahead(tensors: Sequence[Tensor], mode: FakeTensorMode, run: Callable[[], Any]) -> None:
    """Have the kernels compiled that run when ops are given these tensors, which are fake."""
    if launches(*tensors):
        with torch.no_grad(), ahead(mode):
            run()


torch.ops.graphfuse.run_ahead = run_ahead  # type: ignore[attr-defined]


def compute_dtype(*operands: Operand) -> torch.dtype:
    """Return fp64 if anything is, else fp32."""
    dtypes = (operand.dtype if isinstance(operand, Tensor) else operand for operand in operands)
    return torch.float64 if torch.float64 in dtypes else torch.float32


def launches(x: Tensor, *others: Operand) -> bool:
    """Whether the kernels run, rather than the reference."""
    return x.is_cuda and HAS_TRITON and compute_dtype(x, *others) == torch.float32


def refuse_second_derivative(op: str) -> None:
    """Raise RuntimeError in a backward that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"create_graph: expected False, {op} has no second derivative, got True")


def check_operands(**operands: Operand) -> None:
    """Raise TypeError unless all dtypes are known, ValueError unless all tensors are on one device."""
    for name, operand in operands.items():
        dtype = operand.dtype if isinstance(operand, Tensor) else operand
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"{name}: expected fp16, bf16, fp32 or fp64, got {dtype}")
    check_device(**{name: operand for name, operand in operands.items() if isinstance(operand, Tensor)})


def check_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all that are given are on the device of the first one."""
    (first, device), *others = ((name, tensor.device) for name, tensor in tensors.items() if tensor is not None)
    for name, other in others:
        if other != device:
            raise ValueError(f"{name}: expected a tensor on {device}, as {first}, got one on {other}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value}")


def check_vectors(width: int, **vectors: Tensor | None) -> None:
    """Raise ValueError unless all that are given are (width,)."""
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != (width,):
            raise ValueError(f"{name}: expected shape ({width},), got {tuple(vector.shape)}")


def check_has_dims(x: Tensor) -> None:
    """Raise ValueError if there is no last dim."""
    if x.ndim == 0:
        raise ValueError("x: expected at least 1 dimension, got 0")
