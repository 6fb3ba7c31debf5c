"""Kernels compiled ahead of their launch, side by side.

Triton compiles a kernel when it is first launched, and a training step launches two dozen: one after the other, that
takes longer than all else that graphfuse does. So ops are run on fake tensors before, in `ahead`. A launch that is
given fake tensors launches nothing: what Triton would compile for it is compiled elsewhere, and the launch that needs
it finds it in Triton's cache on disk, or waits for it.

Elsewhere are the processes in which Inductor compiles its own kernels. They take seconds to start; until then it is
threads of this one, few, as they and whoever wants the kernels wait for each other: what is still in their queue when
the processes are there goes to those.

It can only save time. What is not handed over, not done or not found is compiled by the launch, as without all this.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphfuse.kernels._descriptor import Described, as_passed

aten = torch.ops.aten
log = logging.getLogger("graphfuse")

PATIENCE = 60.0  # seconds, after which another process is taken for lost
MAX_THREADS = 4  # half of the time a compiler needs the interpreter, which there is once
SOME = 2  # stands for a number that only the device knows: for two Triton compiles what it does for any above
NUMBERS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default)

# What is being compiled elsewhere, by kernel and by Triton's own key of what it compiles for.
_pending: dict[tuple[str, str], Future[None]] = {}


class _Direct(TorchDispatchMode):
    """Where graphfuse's ops do with fake tensors what they do with others; to be entered inside a FakeTensorMode."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call what an op does, as its kernels are not asked for where tensors are fake."""
        kwargs = kwargs or {}
        if func in NUMBERS:
            return False if args[0].dtype == torch.bool or func is aten.is_nonzero.default else SOME
        if isinstance(kwargs.get("out"), Tensor):  # is what it was: PyTorch 2.11 logs an error of sums in a wider dtype
            return kwargs["out"]
        function = getattr(torch.ops.graphfuse.direct, func._opname, None) if func.namespace == "graphfuse" else None
        if function is None:
            return func(*args, **kwargs)
        others = func._schema.arguments[len(args) :]  # a function does not know the defaults of a schema
        with self:  # for what the op asks of its tensors
            return function(*args, *(kwargs.get(other.name, other.default_value) for other in others))


@contextlib.contextmanager
def ahead(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Where ops are run on fake tensors to have their kernels compiled, and what goes wrong is of no importance."""
    try:
        with mode or FakeTensorMode(allow_non_fake_inputs=True), _Direct():  # type: ignore[no-untyped-call]
            yield
    except Exception as error:
        log.debug("kernels are compiled when they are launched: %s", error, exc_info=error)


def wake() -> None:
    """Have Inductor start its processes, if it has any and they are not there, and Triton get ready, in a thread.

    They take seconds, as Dynamo's tracing does: so it is best done before, where a GPU is in use.
    """
    try:
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.wakeup()
    except Exception as error:
        log.debug("kernels are compiled in threads: %s", error)
    _getting_ready()


@functools.cache
def _getting_ready() -> threading.Thread:
    thread = threading.Thread(target=_get_ready, name="graphfuse-triton", daemon=True)
    thread.start()
    return thread


def _get_ready() -> None:
    """Do what Triton does before it compiles a first kernel: have a driver compiled, and read all files of its own."""
    try:
        from triton.runtime.cache import triton_key
        from triton.runtime.driver import driver

        driver.active.get_current_target()
        triton_key()
    except Exception as error:
        log.debug("Triton gets ready when it compiles: %s", error)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MAX_THREADS, max(1, (os.cpu_count() or 1) - 1)), "graphfuse")


def _forget() -> None:
    """A child has no threads, and hears of nothing."""
    _pending.clear()
    _threads.cache_clear()
    _getting_ready.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _executor() -> Any:
    """What takes jobs now."""
    from torch._inductor.async_compile import AsyncCompile

    return AsyncCompile.process_pool() if AsyncCompile.use_process_pool() else _threads()


def is_fake(argument: Any) -> bool:
    """Whether the argument of a launch is a tensor without memory."""
    return isinstance(argument, FakeTensor)


def address(tensor: Tensor) -> int:
    """Return where a tensor begins; a fake one where it might: 16-byte aligned but for its place in its storage."""
    if not is_fake(tensor):
        return tensor.data_ptr()
    begin: int = tensor.untyped_storage()._cdata * 16
    return begin + int(tensor.storage_offset()) * tensor.element_size()


class _Pointer:
    """What Triton asks of a tensor when it compiles."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.address = tensor.dtype, address(tensor)

    def data_ptr(self) -> int:
        """Where it begins."""
        return self.address

    def ptr_range(self) -> int:
        """What AMD's compiler asks: as of any tensor that is small enough."""
        return 0


def _without_memory(argument: Any) -> Any:
    if isinstance(argument, Described):
        return argument._replace(tensor=_Pointer(argument.tensor))
    return _Pointer(argument) if isinstance(argument, Tensor) else argument


def hand_over(kernel: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Have compiled elsewhere what Triton would compile for a launch."""
    _ask(_submit, kernel, args, options)


def wait_for(kernel: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Wait for what was handed over, if this launch needs it."""
    if _pending:
        _ask(_wait, kernel, args, options)


def _ask(do: Callable[..., None], kernel: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Call `do` with what Triton would compile now, if it has not already."""
    from triton import knobs

    _getting_ready().join()

    def instead(**what: Any) -> bool:
        do(kernel, (f"{kernel.fn.__module__}.{kernel.fn.__qualname__}", what["key"]), what["compile"])
        return True  # Triton does not compile

    try:
        args = tuple(as_passed(_without_memory(arg)) for arg in args)
        with mock.patch.object(knobs.runtime, "jit_cache_hook", instead):
            kernel.warmup(*args, grid=(1,), **options)
    except Exception as error:
        log.debug("%s is compiled when it is launched: %s", kernel, error)


def _submit(kernel: Any, name: tuple[str, str], what: Mapping[str, Any]) -> None:
    from triton.runtime.driver import driver

    if name in _pending:
        return
    options = json.loads(what["specialization_data"])["options"]
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    source = (what["signature"], what["constants"], what["configs"][0])
    target = driver.active.get_current_target()
    if not _is_on_disk(kernel, source, target, options):
        environment = _triton_environment()
        place = (kernel.fn.__module__, kernel.fn.__qualname__)
        _pending[name] = _start(place, source, target, options, environment)


def _start(*job: Any) -> Future[None]:
    """Have a kernel compiled by who takes jobs when its turn comes."""
    executor = _executor()
    if executor is not _threads():
        started: Future[None] = executor.submit(compile_here, *job)
        return started
    done: Future[None] = Future()
    executor.submit(_take_turn, done, job)
    return done


def _take_turn(done: Future[None], job: tuple[Any, ...]) -> None:
    """Compile in this thread, or hand on to a process."""
    try:
        executor = _executor()
        if executor is _threads():
            compile_here(*job)
            done.set_result(None)
        else:
            executor.submit(compile_here, *job).add_done_callback(functools.partial(_tell, done))
    except BaseException as error:
        done.set_exception(error)


def _tell(done: Future[None], other: Future[None]) -> None:
    error = other.exception()
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _wait(kernel: Any, name: tuple[str, str], what: Mapping[str, Any]) -> None:
    future = _pending.pop(name, None)
    if future is not None:
        future.result(PATIENCE)


def _is_on_disk(kernel: Any, source: tuple[Any, ...], target: Any, options: dict[str, Any]) -> bool:
    """Whether Triton has compiled it before."""
    from triton.compiler import compile

    class Known(_source_class(kernel)):  # type: ignore[misc]
        def make_ir(self, *_: Any, **__: Any) -> Any:
            raise LookupError("not in the cache")

    try:
        compile(Known(kernel, *source), target=target, options=options)
    except LookupError:
        return False
    return True


def compile_here(
    place: tuple[str, str],
    source: tuple[Any, ...],
    target: Any,
    options: dict[str, Any],
    environment: dict[str, str],
) -> None:
    """Compile a kernel into Triton's cache; not on a GPU.

    Args:
        place: Module and name of the kernel.
        source: What Triton takes beside it.
        target: The GPU.
        options: Of the compiler.
        environment: What the process that will launch it has of Triton's variables, the place of the cache among them.
    """
    from triton.compiler import compile

    module, name = place
    kernel = getattr(importlib.import_module(module), name)
    with _environment(target, environment):
        compile(_source_class(kernel)(kernel, *source), target=target, options=options)


def _source_class(kernel: Any) -> Any:
    """What Triton compiles a kernel as."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


@contextlib.contextmanager
def _environment(target: Any, environment: dict[str, str]) -> Iterator[None]:
    """Triton's variables, as another process has them."""
    from triton.compiler import make_backend

    if environment == _triton_environment():
        yield
        return
    # Inductor names another assembler to its processes, whose version is in the name of what is compiled.
    backend = vars(sys.modules[type(make_backend(target)).__module__])
    answers = [function for function in backend.values() if hasattr(function, "cache_clear")]
    with mock.patch.dict(os.environ):
        for variable in _triton_environment():
            del os.environ[variable]
        os.environ.update(environment)
        for function in answers:
            function.cache_clear()
        yield
    for function in answers:
        function.cache_clear()


def _triton_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith("TRITON_")}
