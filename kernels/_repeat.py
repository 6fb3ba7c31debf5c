"""Calls of ops made again without what their Python has to find out.

How tensors are strided, which tile fits them, what Triton compiled for them: the answers are the same in every step,
and to find them takes longer than a small kernel runs. So when an op has been called on tensors of the same kind a few
times, a call is recorded: the tensors that it makes and the kernels that it launches. From then on these are made and
launched.

Only what makes tensors and launches kernels, and does nothing else, can be made again; other calls run as they are.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

RECORDED = 8  # which call of a kind is recorded: to do so takes as long as some calls, and some kinds never come back
MAX_KINDS = 1024  # that are remembered of an op
NEAR = 64  # bytes between tensors that an op may see: the halves of interleaved features, or the same one twice
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

# As generated code makes its tensors: half as long as torch.empty_strided.
empty_strided: Callable[..., Tensor] = vars(torch._C._dynamo.guards)["_empty_strided_cuda"]

Like = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape and strides of a tensor that is made


class Step(NamedTuple):
    """A launch: `run` takes the grid, the stream and the values, among these addresses of tensors, by their places."""

    run: Callable[..., None]
    grid: tuple[int, ...]
    values: list[Any]
    addresses: dict[int, tuple[int, int]]
    """Place among the values: number of the tensor (those that are given, then those that are made), and bytes from its
    first element."""


class Result(NamedTuple):
    """What is returned: a tensor that was made, or what is cut out of it."""

    number: int
    cut: tuple[tuple[int, ...], tuple[int, ...], int] | None


class Call(NamedTuple):
    """What a call does."""

    given: int
    made: list[Like]
    steps: list[Step]
    results: Result | list[Result] | None

    def function(self, index: int) -> Callable[..., Any]:
        """What does it on other tensors of the same kinds, on the current device, whose index this is.

        A function of its own for each call: to loop over what there is to do takes twice as long.
        """
        names: dict[str, Any] = {}

        def name(value: Any) -> str:
            names[f"c{len(names)}"] = value
            return f"c{len(names) - 1}"

        def address(number: int, offset: int) -> str:
            return f"t{number}.data_ptr() + {offset}" if offset else f"t{number}.data_ptr()"

        def returned(result: Result) -> str:
            cut = "" if result.cut is None else f".as_strided(*{name(result.cut)})"
            return f"t{result.number}{cut}"

        lines = [f"def call({', '.join(f't{number}' for number in range(self.given))}):"]
        for number, like in enumerate(self.made, self.given):
            lines.append(f"t{number} = {name(empty_strided)}(*{name(like)})")
        lines.append(f"stream = {name(torch._C._cuda_getCurrentRawStream)}({index})")
        for step in self.steps:
            values = [
                address(*step.addresses[place]) if place in step.addresses else name(value)
                for place, value in enumerate(step.values)
            ]
            lines.append(f"{name(step.run)}({', '.join([*map(str, step.grid), 'stream', *values])})")
        if isinstance(self.results, Result):
            lines.append(f"return {returned(self.results)}")
        elif self.results is not None:
            lines.append(f"return ({''.join(f'{returned(result)}, ' for result in self.results)})")
        exec("\n    ".join(lines), names)
        function: Callable[..., Any] = names["call"]
        return function


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
        found = {place: self._find(tensor) for place, tensor in enumerate(of) if isinstance(tensor, Tensor)}
        self.steps.append(Step(run, grid, values, found))

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
        made = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in self.made]
        if returned is None or isinstance(returned, Tensor):
            results = self._results([] if returned is None else [returned])
            return Call(len(self.tensors), made, self.steps, results[0] if results else None)
        return Call(len(self.tensors), made, self.steps, self._results(returned))

    def _results(self, returned: Sequence[Tensor]) -> list[Result]:
        """What is returned, by the tensors that were made; what a caller got of these may be another object."""
        results: list[Result] = []
        for tensor in returned:
            storage = tensor.untyped_storage().data_ptr()
            used = [result.number for result in results]
            found = [
                number
                for number, other in enumerate(self.made, len(self.tensors))
                if other.dtype == tensor.dtype
                and (
                    other.untyped_storage().data_ptr() == storage
                    if storage
                    else number not in used and other.shape == tensor.shape  # nothing tells those without memory apart
                )
            ]
            if not found:
                raise CannotRepeat
            other = self.made[found[0] - len(self.tensors)]
            kind, offset = (tuple(tensor.shape), tensor.stride()), int(tensor.storage_offset())
            is_whole = kind == (tuple(other.shape), other.stride()) and offset == 0
            results.append(Result(found[0], None if is_whole else (*kind, offset)))
        return results


class _Current(threading.local):
    """Who listens in this thread."""

    recorder: _Recorder | None = None


current = _Current()
_known: list[dict[Any, Any]] = []  # of all ops


def repeated(function: Callable[..., Any], schema: torch._C.FunctionSchema) -> Callable[..., Any]:
    """Have calls of an op on a GPU made again, once there were a few of their kind.

    Args:
        function: What the op does; takes all of its arguments, in their order.
        schema: Of the op.
    """
    known: dict[tuple[Any, ...], Callable[..., Any] | int | None] = {}  # or how many there were; None: it cannot be
    _known.append(known)
    types = [str(argument.type) for argument in schema.arguments]
    tensor_places = [place for place, kind in enumerate(types) if "Tensor" in kind]
    list_places = [place for place, kind in enumerate(types) if "List" in kind]
    others = [place for place in range(len(types)) if place not in {*tensor_places, *list_places}]
    rest = operator.itemgetter(*others) if len(others) > 1 else lambda args: tuple(args[place] for place in others)

    def call(*args: Any) -> Any:
        kinds: list[Any] = [*rest(args)]
        tensors: list[Tensor] = []
        index, last = -1, 0
        for place in tensor_places:
            arg = args[place]
            if arg is None:
                kinds.append(None)
                continue
            if type(arg) not in PLAIN or (device := _index(arg)) < 0 or (tensors and device != index):
                return function(*args)
            address = arg.data_ptr()
            near = address - last
            kinds += (arg.shape, arg.stride(), arg.dtype, address % 16, near if -NEAR < near < NEAR else None)
            tensors.append(arg)
            index, last = device, address
        if not tensors or current.recorder is not None or not _may_repeat(index):
            return function(*args)
        for place in list_places:
            kinds.append(tuple(args[place]))
        key = (index, *kinds)
        again = known.get(key, 0)
        if again is None:
            return function(*args)
        if not isinstance(again, int):
            return again(*tensors)
        if again + 1 == RECORDED:
            result, known[key] = _record(function, args, tensors, index)
            return result
        if again == 0 and len(known) >= MAX_KINDS:
            for old in list(known)[: MAX_KINDS // 2]:
                known.pop(old, None)  # another thread may do the same
        known[key] = again + 1
        return function(*args)

    return call


def _index(tensor: Tensor) -> int:
    """Of the GPU that the tensor is on; -1 if it is on none."""
    return tensor.get_device() if tensor.is_cuda else -1


def _may_repeat(index: int) -> bool:
    """Whether launches go to this GPU, and nobody wants memory filled that is not written yet."""
    fills = torch.are_deterministic_algorithms_enabled() and torch._C._get_deterministic_fill_uninitialized_memory()
    return not fills and index == torch.cuda.current_device()


def _record(
    function: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor], index: int
) -> tuple[Any, Callable[..., Any] | None]:
    """The result of a call, and what makes it again; None if it cannot be."""
    recorder = _Recorder(tensors)
    current.recorder = recorder
    try:
        with recorder:
            result = function(*args)
    finally:
        current.recorder = None
    try:
        return result, recorder.call(result, tensors[0].device).function(index)
    except CannotRepeat:
        return result, None


def forget() -> None:
    """Drop all that was recorded (after a kernel was changed in place, as tests do)."""
    for known in _known:
        known.clear()
