"""Which of PyTorch's attention kernels a site calls: the one that was measured to be the fastest at its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from graphfuse.kernels._sdpa_times import Times, fastest, load
from graphfuse.match import Choice
from graphfuse.shadow import Value

NAMES = {"flash": "flash attention", "cudnn": "cuDNN", "efficient": "memory-efficient attention"}

States = Callable[[], tuple[Tensor, Tensor, Tensor]]


def trains(value: Value, *inputs: Value) -> bool:
    """Whether there will be a backward."""
    return value.grad_mode and any(one.tensor.requires_grad for one in inputs)


def choose_kernel(
    states: States, *, is_causal: bool, trains: bool, ahead: bool = False, **others: Any
) -> Choice | None:
    """The argument `kernel` of attention without a mask that is read; `others` are set along with it."""
    if ahead:
        load(*states(), is_causal=is_causal, trains=trains)
        return None
    found = fastest(*states(), is_causal=is_causal, trains=trains)
    if found is None:
        return None
    return Choice({"kernel": found.fastest, **others}, f"by {NAMES[found.fastest]}", _told(found, trains))


def choose_kernels(states: States, mask: Callable[[], Tensor], *, trains: bool, ahead: bool = False) -> Choice | None:
    """The arguments `causal_kernel` and `masked_kernel` of attention whose mask is looked at on every call."""
    query, key, value = states()
    if ahead:  # of kernels that read a mask, the libraries are the same
        load(query, key, value, is_causal=True, trains=trains)
        return None
    causal = fastest(query, key, value, is_causal=True, trains=trains)
    if causal is None:
        return None
    found = {"causal": causal, "masked": fastest(query, key, value, mask(), is_causal=False, trains=trains)}
    known = {way: times for way, times in found.items() if times is not None}
    params = {f"{way}_kernel": times.fastest if times is not None else "" for way, times in found.items()}
    ways = ", ".join(f"{way} by {NAMES[times.fastest]}" for way, times in known.items())
    return Choice(params, ways, "; ".join(f"{way}, {_told(times, trains)}" for way, times in known.items()))


def _told(found: Times, trains: bool) -> str:
    times = sorted(found.milliseconds.items(), key=lambda item: item[1])
    measured = ", ".join(f"{NAMES[name]} {ms:.3g} ms" for name, ms in times)
    what = "forward and backward" if trains else "forward"
    return f"in PyTorch's {NAMES[found.fastest]}, measured {what}: {measured}"
