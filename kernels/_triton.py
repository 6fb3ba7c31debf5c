"""Triton where it is installed, and the device helpers that several kernels share.

Triton exists on Linux only. Without it every op still runs, through its reference path, so this is the one file that
may see the import fail.

Numbers that only count rows, tokens or heads are `do_not_specialize_on_alignment` in kernels: that 4096 rows are a
multiple of 16 makes no kernel faster, and another number of rows would have it compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _ahead
from graphfuse.kernels._descriptor import Described, as_passed

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows: kernels are defined but never launched
    HAS_TRITON = False

    class _Missing:
        """Stands in for `triton` and `triton.language` so that kernel definitions still parse."""

        @staticmethod
        def constexpr(value: Any) -> Any:
            return value

        def jit(self, fn: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
            return (lambda fn: fn) if fn is None else fn

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"triton: expected it to be installed to run a kernel, got no module ({name})")

    triton = tl = _Missing()

# Whether kernels may have instructions of NVIDIA's GPUs in them.
HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None) if HAS_TRITON else False

__all__ = ["HAS_PTX", "HAS_TRITON", "launch", "tl", "triton"]

# What Triton compiled, by all that it compiles for: sizes, strides, dtypes, alignment, options. To call it takes 4 us,
# and to have Triton find it again 15 to 20.
MAX_COMPILED = 4096
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor; if that is fake, have it compiled ahead.

    Args:
        kernel: A function that `triton.jit` was applied to.
        grid: How many programs, in up to three dims.
        args: Its first arguments.
        options: The others, which are constants, and options of the compiler.
    """
    if _ahead.is_fake(args[0]):
        _ahead.hand_over(kernel, args, options)
        return
    index = args[0].get_device()
    if index < 0:  # in Triton's interpreter
        _ahead.wait_for(kernel, args, options)
        kernel[grid](*map(as_passed, args), **options)
        return
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            launch(kernel, grid, *args, **options)
        return
    key = (id(kernel), index, *map(_kind, args), *options.values())
    if key in _compiled:
        compiled, constants = _compiled[key]
        compiled[(*grid, 1, 1)[:3]](*map(as_passed, args), *constants)
        return
    _ahead.wait_for(kernel, args, options)
    compiled = kernel[grid](*map(as_passed, args), **options)
    if len(_compiled) >= MAX_COMPILED:
        _compiled.clear()
    _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])


def _kind(argument: Any) -> Any:
    """Return what of an argument Triton compiles for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, Described):
        return argument.tensor.dtype, *argument.block
    return argument
