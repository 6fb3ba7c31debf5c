"""Timing on a GPU: what a call costs there, and what it costs the host.

A measured call finds the L2 cache full of other things, and starts when the GPU has nothing else left to do but while
the host is already ahead: neither a warm cache nor a slow host is in the figure. What is reported is the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CLOCK = 2.0e9  # cycles a second of a sleeping GPU: about right is enough
MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """What a call costs."""

    gpu_us: float
    host_us: float
    peak_mib: float  # allocated beyond what was before the call


def measure(fn: Callable[[], object], repetitions: int = 20) -> Timing:
    """Time a call on the current CUDA device.

    Args:
        fn: launches work on the current stream, and was not necessarily called before.
        repetitions: how many calls the medians are taken of.

    Returns:
        Medians of the time on the GPU and on the host, and the memory a call needs.
    """
    for _ in range(3):  # compilers, caches, the allocator
        fn()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = fn()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    del result
    host = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        host.append(time.perf_counter() - start)
    ahead = int(1.5 * statistics.median(host) * CLOCK)
    flush = torch.empty(2 * _cache_bytes(), dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start_event, end_event in events:
        flush.zero_()
        torch.cuda._sleep(ahead)
        start_event.record()
        fn()
        end_event.record()
        torch.cuda.synchronize()  # the queue of launches is short
    gpu = [start_event.elapsed_time(end_event) for start_event, end_event in events]
    return Timing(1e3 * statistics.median(gpu), 1e6 * statistics.median(host), peak)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.randint(256, (2**29,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = measure(lambda: target.copy_(source)).gpu_us * 1e-6
    return 2 * source.numel() / seconds


def _cache_bytes() -> int:
    size: int = torch.cuda.get_device_properties().L2_cache_size
    return max(size, 32 * MIB)
