"""Which kernel for scaled dot-product attention is fastest at a size, measured on this GPU.

Measured once: the answer is kept in a file beside torch's caches, the first one for all processes, so that all go the
same way and a later one measures nothing.

The first call of a kernel takes long before it reaches the GPU, cuDNN's several seconds: libraries are loaded, and code
is generated. `load` makes that call in a thread, beside whatever else there is to do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from graphfuse.kernels._sdpa_kernel import KERNELS, may_choose
from graphfuse.kernels._sdpa_launch import backward, fake_forward, fitted, forward, triangle

log = logging.getLogger("graphfuse")

FORMAT = 3  # of the files; goes up when what is measured changes
REPEATS = 7
LOOKS = 3  # at each kernel, before one is left out for being slow: other work on the GPU may have got in its way
QUEUE = 4_000_000  # cycles that the GPU waits first, so that the host is ahead of it: its time is not the kernel's
SLOW = 1.5  # times as slow as the best so far is not measured again
MARGIN = 1.03  # times as slow as the fastest, PyTorch's own choice stays: so much may be noise
APART = 0.03  # relative difference to PyTorch's choice that the rounding of half precision explains
FEW_TOKENS = 5  # of a proof
COPIES = 16  # tensors of the size of the queries that measuring takes at most, gradients and what is repeated included


@dataclass(frozen=True)
class Times:
    """What was measured: milliseconds of each kernel that fits, and the one to take."""

    fastest: str
    milliseconds: dict[str, float]


class Like(NamedTuple):
    """A tensor by what its time depends on: a fake one is another for each thread that asks it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


# Attention without a gradient, of query, key, value, mask and scale.
Way = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class Call:
    """What is measured."""

    device: torch.device
    query: Like
    key: Like
    value: Like
    mask: Like | None
    is_causal: bool
    trains: bool
    ways: Mapping[str, Way] | None = None

    def described(self) -> dict[str, Any]:
        """All that the answer depends on."""
        states = (self.query, self.key, self.value)
        return {
            "format": FORMAT,
            **_machine(self.device),
            # activated by the user
            "flash": getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)(),
            "dtype": str(self.query.dtype),
            "tensors": [[list(like.shape), list(like.stride)] for like in states],
            "mask": None if self.mask is None else [str(self.mask.dtype), list(self.mask.shape)],
            "is_causal": self.is_causal,
            "trains": self.trains,
            **({} if self.ways is None else {"ways": list(self.ways), "kernels": _kernels()}),
        }


_known: dict[str, Times | None] = {}
_loading: dict[str, threading.Thread] = {}


def fastest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool,
    trains: bool,
    ways: Mapping[str, Way] | None = None,
) -> Times | None:
    """The kernel for tensors like these, which may be fake; `None` where there is nothing to choose.

    Args:
        query: (B, H, S, D).
        key: (B, G, T, D).
        value: (B, G, T, E).
        mask: broadcastable to (B, H, S, T), bool or floating.
        is_causal: whether position s sees keys 0 to s; then there is no mask.
        trains: whether forward and backward count, or forward alone.
        ways: what is timed in the place of PyTorch's kernels, by name, forward alone and with nothing hidden; the first
            stays unless another is faster by more than noise.
    """
    call = _call(query, key, value, mask, is_causal, trains)
    if call is None:
        return None
    call = replace(call, ways=ways)
    names = KERNELS if ways is None else ways
    described = call.described()
    name = _name(described)
    if name not in _known:
        file = _file(name)
        found = _read(file, names)
        if found is None:
            wait_until_loaded()  # what is loaded takes time of the GPU, too
            found = _measure(call)
        _known[name] = _keep(file, found, described, names) if found is not None else None
    return _known[name]


def load(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, trains: bool) -> None:
    """Start to run each kernel once that `fastest` would measure for these; if it is known which is, that one.

    And then for few tokens, as proofs have: cuDNN has other code for them, the same for other heads and sequences.

    In a thread, whose tensors, stream and random numbers are its own. Somebody has to wait for it: a graph that is
    captured meanwhile may hear of its allocations.
    """
    call = _call(query, key, value, None, is_causal, trains)
    if call is None:
        return
    name = _name(call.described())
    if name not in _known and name not in _loading:
        found = _read(_file(name))
        wanted = KERNELS if found is None else (found.fastest,)
        _loading[name] = threading.Thread(target=_load, args=(call, wanted), name="graphfuse-attention")
        _loading[name].start()


def wait_until_loaded() -> None:
    """Wait until what was to be loaded is."""
    for thread in list(_loading.values()):
        thread.join()  # at once, in the child of a fork, which has no such thread
    _loading.clear()


def _call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, trains: bool) -> Call | None:
    """The call on tensors like these, if a kernel can be chosen for it, and that be measured."""
    tensors = [query, key, value, *(() if mask is None else (mask,))]
    if not may_choose() or not _is_measurable(tensors):
        return None
    return Call(
        device=query.device,
        query=_like(query),
        key=_like(key),
        value=_like(value),
        mask=None if mask is None else _like(mask),
        is_causal=is_causal,
        trains=trains,
    )


def _like(tensor: Tensor) -> Like:
    return Like(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _name(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _is_measurable(tensors: Sequence[Tensor]) -> bool:
    """Whether such tensors can be made here: of known sizes, on a GPU that is not recording what it is given."""
    sizes = [size for tensor in tensors for size in (*tensor.shape, *tensor.stride())]
    is_real = all(isinstance(size, int) for size in sizes) and all(tensor.numel() for tensor in tensors)
    on_gpu = all(tensor.device.type == "cuda" for tensor in tensors)
    return is_real and on_gpu and torch.version.hip is None and not torch.cuda.is_current_stream_capturing()


@functools.cache
def _kernels() -> str:
    """A digest of the kernels that are not PyTorch's: what was measured of others says nothing of them."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }


Found = TypeVar("Found")


def _measure(call: Call) -> Times | None:
    """Run every kernel that fits, on random numbers; `None` if they are fewer than two, or memory is short."""
    return _with_kernels(call, _compare)


def _load(call: Call, wanted: Collection[str]) -> None:
    """Run each of these kernels once, if it fits; what goes wrong is of no importance."""

    def run_once(runs: dict[str, Run]) -> None:
        for name, run in runs.items():
            if name in wanted:
                run()
        if call.device.type == "cuda":
            torch.cuda.synchronize()

    try:
        _with_kernels(call, run_once)
        _with_kernels(replace(call, query=_few(call.query), key=_few(call.key), value=_few(call.value)), run_once)
    except Exception as error:
        log.debug("attention's kernels are loaded when they are called: %s", error, exc_info=error)


def _few(like: Like) -> Like:
    """The same with a few tokens."""
    shape = (*like.shape[:2], FEW_TOKENS, like.shape[3])
    return Like(shape, torch.empty(shape, device="meta").stride(), like.dtype)


def _with_kernels(call: Call, use: Callable[[dict[str, Run]], Found]) -> Found | None:
    """Hand over every kernel that takes the call, on random numbers; `None` if memory is short."""
    query, value, device = call.query, call.value, call.device
    size = max(query.elements(), value.elements() * query.shape[1] // value.shape[1]) * query.dtype.itemsize
    masked = 0 if call.mask is None else 2 * call.mask.elements() * query.dtype.itemsize
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.cuda.device(device))
        if COPIES * size + masked > _free_memory(device):
            return None
        try:
            return use(_runs(call))
        except (
            Exception
        ) as error:  # of memory, or of a kernel that says that it fits and does not: Triton's have no base
            log.debug("attention's kernels are left to PyTorch: %s", error, exc_info=error)
            return None


def _free_memory(device: torch.device) -> int:
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _random(like: Like, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=device).normal_(generator=generator)


def _triangle(like: Like, device: torch.device) -> Tensor:
    """A mask of this kind: what it hides makes no difference to the time of a kernel that reads it."""
    seen = triangle(torch.empty((), dtype=torch.bool, device=device).expand(like.shape))
    if like.dtype != torch.bool:
        seen = torch.zeros(seen.shape, dtype=like.dtype, device=device).masked_fill(~seen, -torch.inf)
    return seen.expand(like.shape)


def _open(like: Like, device: torch.device) -> Tensor:
    """A mask of this kind that hides nothing: some ways read no more than is seen, which may be all that there is."""
    kept = torch.ones if like.dtype == torch.bool else torch.zeros
    return kept(like.shape, dtype=like.dtype, device=device)


Run = Callable[[], tuple[Tensor, ...]]


def _runs(call: Call) -> dict[str, Run]:
    """Every kernel that takes the call, PyTorch's own choice first."""
    generator = torch.Generator(call.device).manual_seed(0)
    query, key, value = (_random(like, call.device, generator) for like in (call.query, call.key, call.value))
    if call.ways is not None:
        return _runs_of(call.ways, query, key, value, None if call.mask is None else _open(call.mask, call.device))
    mask = None if call.mask is None else _triangle(call.mask, call.device)
    is_causal, scale = call.is_causal, query.shape[-1] ** -0.5
    grad = fake_forward(query, value)[0].normal_(generator=generator)

    def run(name: str) -> tuple[Tensor, ...]:
        out, lse = forward(query, key, value, mask, is_causal, scale, name)
        if not call.trains:
            return (out,)
        return out, *backward(grad, query, key, value, mask, is_causal, out, lse, scale, name)

    def backend(name: str) -> Any:
        return fitted(query, key, value, mask, is_causal, scale, name)[0]

    own = backend("")
    names = [name for name in KERNELS if backend(name) == KERNELS[name]]
    return {name: functools.partial(run, name) for name in sorted(names, key=lambda name: KERNELS[name] != own)}


def _runs_of(ways: Mapping[str, Way], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> dict[str, Run]:
    def run(name: str) -> tuple[Tensor, ...]:
        return (ways[name](query, key, value, mask, query.shape[-1] ** -0.5),)

    return {name: functools.partial(run, name) for name in ways}


def _compare(runs: dict[str, Run]) -> Times | None:
    """The times of all that compute what the first one does; another must be faster by more than noise."""
    own = next(iter(runs), "")
    if len(runs) < 2:
        return None
    wanted = runs[own]()
    alike = {
        name: run for name, run in runs.items() if all(_is_near(*pair) for pair in zip(run(), wanted, strict=True))
    }
    if own not in alike:  # its own results differ: it draws lots, or is broken
        return None
    # In turn, and the least of each: what else the GPU does meets all alike, and makes none faster.
    times = dict.fromkeys(alike, math.inf)
    for repeat in range(REPEATS):
        for name, run in alike.items():
            if repeat < LOOKS or times[name] <= SLOW * min(times.values()):
                times[name] = min(times[name], _milliseconds(run))
    best = min(times, key=lambda name: times[name])
    return Times(own if times[own] <= MARGIN * times[best] else best, times)


def _is_near(found: Tensor, wanted: Tensor) -> bool:
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float32)
    return bool(norm(found - wanted) <= APART * norm(wanted))


def _milliseconds(run: Run) -> float:
    """The time of a run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _file(name: str) -> Path | None:
    """Where an answer is kept, unless the user keeps nothing."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return None if config.force_disable_caches else Path(cache_dir()) / "graphfuse" / "attention" / f"{name}.json"


def _read(file: Path | None, names: Container[str] = KERNELS) -> Times | None:
    if file is None:
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["times"]
        found = Times(str(kept["fastest"]), {str(name): float(ms) for name, ms in kept["milliseconds"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not ours
        return None
    return found if found.fastest in names else None


def _keep(file: Path | None, found: Times, described: dict[str, Any], names: Container[str] = KERNELS) -> Times:
    """Write what was found, unless another process was first: then that is the answer here, too."""
    if file is None:
        return found
    text = json.dumps({**described, "times": asdict(found)}, indent=2)
    with contextlib.suppress(OSError):  # a disk that takes no files costs a measurement in every process, no more
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8") as own:
            own.write(text)
            own.flush()
            if file.exists() and _read(file, names) is None:  # damaged
                file.unlink(missing_ok=True)
            os.link(own.name, file)
    return _read(file, names) or found
