"""Where the time of a step goes: what the profiler saw of one, by kind of kernel.

Kernels tell by their names what they are: libraries', Liger's and graphfuse's by the name of a function, Inductor's by
the operations that it fused. A kernel that does several things counts for the first of these kinds that its name shows.
On a CPU it is operations that have names; what Inductor compiled is one of them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

OTHER = "other"
LIBRARY = r"^(?!triton_(?:poi|red|per)_).*"  # what Inductor fuses around a library's kernel is named after it, too
CATEGORIES = {  # in this order: the first that is found
    "attention": LIBRARY + r"(flash|fmha|sdpa|attention|attn)",
    "GEMM": LIBRARY
    + r"(gemm|nvjet|cutlass|cublas|xmma|matmul|splitk|aten::linear|(?<![a-z])(add|b|ba)?mm(?![a-z]))|add_product",
    "head and loss": r"softmax|nll|cross_entropy|token_losses|logsumexp|scale_kernel|element_mul_kernel",
    "norm": r"norm|rsqrt|meanops|pow_tensor|add_parts_kernel",
    "rope": r"rope|rotary|(?<![a-z])(cos|sin)(?![a-z])",
    "gate": r"glu|silu|gelu|sigmoid|tanh",
    "embedding": r"embedding|indexing_backward|aten::index|(put|sum)_rows_kernel",
    "copy and cast": r"copy|cast|convert|clone|contiguous|memcpy|memset|fill|transpose|(?<![a-z])(cat|to)(?![a-z])",
}
_CATEGORIES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in CATEGORIES.items()}


def category(kernel: str) -> str:
    """The kind of a kernel, or of an operation, by its name."""
    return next((name for name, pattern in _CATEGORIES.items() if pattern.search(kernel)), OTHER)


def by_category(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds by category, the largest first, out of (name, microseconds)."""
    found: defaultdict[str, float] = defaultdict(float)
    for name, microseconds in times:
        found[category(name)] += microseconds / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Profile:
    """What the profiler saw of one step.

    Attributes:
        by_category: milliseconds, the largest first.
        peak_bytes: on a CPU, allocated at the peak beyond what was there before; on a GPU 0, its allocator knows.
    """

    by_category: dict[str, float]
    peak_bytes: int


def of(step: Callable[[], Any], device: torch.device) -> Profile:
    """Run one step under the profiler: its kernels, or on a CPU its operations, each without those inside it."""
    is_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity], profile_memory=not is_cuda) as profiler:
        step()
        if is_cuda:
            torch.cuda.synchronize()
    events = [event for event in profiler.events() or [] if not event.is_user_annotation]
    if is_cuda:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        return Profile(by_category((event.name, event.time_range.elapsed_us()) for event in kernels), 0)
    return Profile(by_category((event.name, event.self_cpu_time_total) for event in events), _peak(profiler))


def _peak(profiler: profile) -> int:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return max((event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"), default=0)
