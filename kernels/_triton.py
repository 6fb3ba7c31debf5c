"""Triton where it is installed, and the device helpers that several kernels share.

Triton exists on Linux only. Without it every op still runs, through its reference path, so this is the one file that
may see the import fail.

Numbers that only count rows, tokens or heads are `do_not_specialize_on_alignment` in kernels: that 4096 rows are a
multiple of 16 makes no kernel faster, and another number of rows would have it compiled again.
"""

from __future__ import annotations

import logging
import operator
import tempfile
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels import _ahead
from graphfuse.kernels._descriptor import Described, as_passed
from graphfuse.kernels._repeat import current

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

INTERPRETER_SMS = 3  # more than one, and not a power of two

log = logging.getLogger("graphfuse")

__all__ = ["HAS_PTX", "HAS_TRITON", "launch", "num_sms", "tl", "triton"]


@lru_cache(maxsize=64)
def num_sms(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    if device.type != "cuda":
        return INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


class Launcher(NamedTuple):
    """What launches a compiled kernel.

    `run` takes the grid, the stream and values; `pick` finds these among the arguments when they have addresses for
    tensors and no tuples, and is None where `run` takes the arguments as they are.
    """

    run: Callable[..., None]
    pick: Callable[[list[Any]], tuple[Any, ...]] | None


# By all that Triton compiles for: sizes, strides, dtypes, alignment, options. To have it find that again takes 15 to
# 20 us.
MAX_LAUNCHERS = 4096
_launchers: dict[tuple[Any, ...], Launcher] = {}
# Of each compiled kernel on each GPU, by its id, and the kernel so that it keeps it: one serves many sizes, and what is
# loaded stays, as a CUDA graph may launch it.
_loaded: dict[tuple[int, int], tuple[Any, Launcher]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor; if that is fake, have it compiled ahead.

    Calls of ops that are made again do not come here: they call what launched their kernels (`_repeat`).

    Args:
        kernel: A function that `triton.jit` was applied to.
        grid: How many programs, in up to three dims.
        args: Its first arguments.
        options: The others, which are constants, and options of the compiler.

    Raises:
        ValueError: a tensor is on another device than the first.
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
    kinds: list[Any] = [id(kernel), index, *options.values()]
    flat: list[Any] = []
    for argument in args:
        if isinstance(argument, Tensor):
            if argument.get_device() != index:
                raise ValueError(
                    f"{kernel.fn.__name__}: expected tensors on cuda:{index}, got one on {argument.device}"
                )
            address = argument.data_ptr()
            flat.append(address)
            kinds += (argument.dtype, address % 16 == 0)
        elif isinstance(argument, Described):
            kinds += (argument.tensor.dtype, *argument.block)
        elif isinstance(argument, tuple):
            flat += argument
            kinds.append(argument)
        else:
            flat.append(argument)
            kinds.append(argument)
    key = tuple(kinds)
    launcher = _launchers.get(key)
    if launcher is None:
        _ahead.wait_for(kernel, args, options)
        compiled = kernel.warmup(*map(as_passed, args), grid=grid, **options)
        _, launcher = _loaded.get((id(compiled), index), (None, None))
        if launcher is None:
            constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
            launcher = launcher_by_torch(compiled, args, index) or _launcher_by_triton(compiled, constants)
            _loaded[id(compiled), index] = compiled, launcher
        if len(_launchers) >= MAX_LAUNCHERS:
            _launchers.clear()
        _launchers[key] = launcher
    (run, pick), sizes = launcher, (*grid, 1, 1)[:3]
    run(*sizes, torch._C._cuda_getCurrentRawStream(index), *(pick(flat) if pick is not None else map(as_passed, args)))
    if current.recorder is not None:
        _note(launcher, sizes, args, flat)


def _note(launcher: Launcher, sizes: tuple[int, ...], args: tuple[Any, ...], flat: list[Any]) -> None:
    """Tell who listens to this call of an op of the launch."""
    assert current.recorder is not None
    tensors: list[Any] = []
    for argument in args:
        tensors += argument if isinstance(argument, tuple) else (argument,)
    if launcher.pick is not None:
        current.recorder.launched(launcher.run, sizes, list(launcher.pick(flat)), list(launcher.pick(tensors)))
    elif any(isinstance(argument, tuple) for argument in args):
        current.recorder.fails = True  # what its kernel takes is more than these
    else:
        current.recorder.launched(launcher.run, sizes, flat, tensors)


def _launcher_by_triton(compiled: Any, constants: tuple[Any, ...]) -> Launcher:
    """What Triton has a C compiler make for every new list of types."""
    is_watched = _is_watched()

    def run(x: int, y: int, z: int, stream: int, *args: Any) -> None:
        if is_watched:
            compiled[x, y, z](*args, *constants, stream=stream)
        else:
            nobody = (None, None, None)
            compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, *nobody, *args, *constants)

    compiled._init_handles()
    return Launcher(run, None)


def _is_watched() -> bool:
    """Whether a profiler of Triton's listens to launches."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(bool(getattr(hook, "calls", hook)) for hook in hooks)  # chains of hooks, or one


def launcher_by_torch(compiled: Any, args: tuple[Any, ...], index: int) -> Launcher | None:
    """What launches Inductor's own kernels on NVIDIA's GPUs: twice as fast, and no C compiler is run for it.

    None for kernels that it does not know: that read tensors by descriptors, or ask for attributes of a launch. Nor
    where a profiler of Triton's listens, which would not hear of it, or the user has switched it off.
    """
    wanted = compiled.metadata
    types: list[str] = []
    for argument, kind in zip(args, compiled.src.signature.values(), strict=False):  # all others are constants
        types += kind if isinstance(kind, tuple) else [kind] * (len(argument) if isinstance(argument, tuple) else 1)
    where = [place for place, kind in enumerate(types) if kind != "constexpr"]
    try:
        from torch._inductor import config
        from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

        if torch.version.hip or not config.use_static_triton_launcher or _is_watched():
            return None
        if wanted.launch_pdl or wanted.launch_cooperative_grid:
            return None
        flat = SimpleNamespace(fn=compiled.src.fn, signature={k: types[k] for k in where}, constants={})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            known = {"asm": compiled.asm, "hash": compiled.hash, "metadata": wanted, "_cubin_path": file.name}
            static = StaticallyLaunchedCudaKernel(SimpleNamespace(src=flat, **known))
            static.load_kernel(index)
    except Exception as error:
        log.debug("%s is launched by Triton: %s", compiled.name, error, exc_info=error)
        return None
    # What its `run` does, which finds out anew in every call what else the kernel takes.
    extra = (None,) * (static.has_global_scratch + static.has_profile_scratch)
    options = (static.num_warps, static.shared, static.arg_tys + "O" * len(extra))

    def run(x: int, y: int, z: int, stream: int, *values: Any) -> None:
        static.C_impl._launch_kernel(static.function, x, y, z, *options, (*values, *extra), stream)

    return Launcher(run, operator.itemgetter(*where) if len(where) > 1 else lambda flat: tuple(flat[k] for k in where))
