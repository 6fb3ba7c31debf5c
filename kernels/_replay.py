"""Calls of ops made again without what their Python has to find out.

How tensors are strided, which tile fits them, what Triton compiled for them: the answers are the same in every step,
and to find them takes longer than a small kernel runs. So the second call of an op on tensors of the same kind is
recorded, the tensors that it makes and the kernels that it launches, and from then on these are made and launched.

Only what makes tensors and launches kernels, and does nothing else, can be made again; other calls run as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

MAX_CALLS = 4096  # that are remembered of an op
PLAIN = frozenset({Tensor, Parameter})  # other classes have ideas of their own
MAKES = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)

empty_strided: Callable[..., Tensor] = vars(torch._C._dynamo.guards)[
    "_empty_strided_cuda"
]  # as generated code calls it

Like = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape and strides of a tensor that is made


class Step(NamedTuple):
    """A launch: `run` takes the grid, the stream and the values, among these addresses of tensors, by their places."""

    run: Callable[..., None]
    grid: tuple[int, ...]
    values: list[Any]
    addresses: tuple[tuple[int, int, int], ...]
    """Place among the values, number of the tensor (those that are given, then those that are made), and bytes from its
    first element."""


class Result(NamedTuple):
    """What is returned: a tensor that was made, or what is cut out of it."""

    made: int
    cut: tuple[tuple[int, ...], tuple[int, ...], int] | None


class Call(NamedTuple):
    """What a call does."""

    made: tuple[Like, ...]
    steps: tuple[Step, ...]
    results: Result | tuple[Result, ...] | None

    def again(self, tensors: list[Tensor], index: int) -> Any:
        """Do it on other tensors of the same kinds, on the current device, whose index this is."""
        made = [empty_strided(*like) for like in self.made]
        starts = [tensor.data_ptr() for tensor in (*tensors, *made)]
        stream = torch._C._cuda_getCurrentRawStream(index)
        for run, grid, values, addresses in self.steps:
            handed = values.copy()
            for place, number, offset in addresses:
                handed[place] = starts[number] + offset
            run(*grid, stream, *handed)
        if self.results is None:
            return None
        if isinstance(self.results, Result):
            return _cut(made[self.results.made], self.results.cut)
        return tuple(_cut(made[result.made], result.cut) for result in self.results)


def _cut(tensor: Tensor, cut: tuple[tuple[int, ...], tuple[int, ...], int] | None) -> Tensor:
    return tensor if cut is None else tensor.as_strided(*cut)


class CannotRepeat(Exception):
    """The call does something else, or it is not known on which tensors."""


class _Recorder(TorchDispatchMode):
    """Listens to a call of an op."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors = tensors
        self.made: list[Tensor] = []
        self.steps: list[Step] = []
        self.fails = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in MAKES:
            self.made.append(result)
        elif not func.is_view:
            self.fails = True
        return result

    def launched(self, run: Callable[..., None], grid: tuple[int, ...], values: list[Any], of: list[Any]) -> None:
        """Note a launch; `of` has the tensor in the place of every address."""
        found = [(place, *self._find(tensor)) for place, tensor in enumerate(of) if isinstance(tensor, Tensor)]
        self.steps.append(Step(run, grid, values, tuple(found)))

    def _find(self, tensor: Tensor) -> tuple[int, int]:
        """The number of the tensor that this is, or is cut out of, and where it begins in it."""
        known = [*self.tensors, *self.made]
        for number, other in enumerate(known):
            if other is tensor:
                return number, 0
        storage = tensor.untyped_storage().data_ptr()
        sharing = [number for number, other in enumerate(known) if other.untyped_storage().data_ptr() == storage]
        if len(sharing) != 1:
            self.fails = True
            return 0, 0
        return sharing[0], tensor.data_ptr() - known[sharing[0]].data_ptr()

    def call(self, returned: Any, device: torch.device) -> Call:
        """What was recorded.

        Raises:
            CannotRepeat: that is not all that was done.
        """
        addresses = {tensor.data_ptr() for tensor in self.tensors}
        is_clear = len(addresses) == len(self.tensors) and all(tensor.device == device for tensor in self.made)
        if self.fails or not is_clear:
            raise CannotRepeat
        made = tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in self.made)
        if isinstance(returned, tuple | list):
            return Call(made, tuple(self.steps), tuple(map(self._result, returned)))
        return Call(made, tuple(self.steps), None if returned is None else self._result(returned))

    def _result(self, tensor: Tensor) -> Result:
        for number, other in enumerate(self.made):
            if other is tensor:
                return Result(number, None)
        storage = tensor.untyped_storage().data_ptr()
        for number, other in enumerate(self.made):
            if other.dtype == tensor.dtype and other.untyped_storage().data_ptr() == storage != 0:
                return Result(number, (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())))
        raise CannotRepeat


class _Current(threading.local):
    """Who listens in this thread."""

    recorder: _Recorder | None = None


current = _Current()
_forgettable: list[dict[Any, Any]] = []


def repeated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have calls of an op on a GPU made again, from the third of each kind on."""
    known: dict[tuple[Any, ...], Call | str] = {}
    _forgettable.append(known)

    def call(*args: Any) -> Any:
        tensors: list[Tensor] = []
        kinds: list[Any] = []
        for arg in args:
            if type(arg) in PLAIN:
                tensors.append(arg)
                kinds += (arg.shape, arg.stride(), arg.dtype, arg.data_ptr() % 16 == 0)
            elif isinstance(arg, Tensor):
                return function(*args)
            else:
                kinds.append(tuple(arg) if isinstance(arg, list) else arg)
        index = _index(tensors[0])
        if index is None or current.recorder is not None:
            return function(*args)
        key = (index, *kinds)
        found = known.get(key)
        if isinstance(found, Call):
            return found.again(tensors, index)
        if found == "seen":
            result, known[key] = _record(function, args, tensors)
            return result
        if found is None:
            if len(known) >= MAX_CALLS:
                known.clear()
            known[key] = "seen"
        return function(*args)

    return call


def _index(tensor: Tensor) -> int | None:
    """Of the device, if that is the current GPU."""
    index = tensor.get_device()
    return index if index >= 0 and index == torch.cuda.current_device() else None


def _record(function: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> tuple[Any, Call | str]:
    """The result of a call, and what it did, or that it cannot be repeated."""
    recorder = _Recorder(tensors)
    current.recorder = recorder
    try:
        with recorder:
            result = function(*args)
    finally:
        current.recorder = None
    try:
        return result, recorder.call(result, tensors[0].device)
    except CannotRepeat:
        return result, "as it is"


def forget() -> None:
    """Drop all that was recorded (after a kernel was changed in place, as tests do)."""
    for known in _forgettable:
        known.clear()
