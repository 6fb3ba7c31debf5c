"""What it costs that DDP's buckets cut a graph.

So that gradients can be exchanged while backward still runs, Dynamo's `DDPOptimizer` cuts the graph of a model inside
`DistributedDataParallel` before a backend sees it: at the parameter that fills a bucket, wherever that is. What spans a
cut cannot be fused. The whole graph is still there, up the stack, and tells what would have been.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphfuse.reporting import Site
from graphfuse.reporting.data import human


@dataclass(eq=False)
class Split:
    """One graph, and the parts that it was cut into.

    Attributes:
        parts: how many there are.
        bucket_bytes: of parameters, from which a bucket is full.
        whole: pattern -> sites that are rewritten where the graph is not cut.
        sites: those of the parts that were compiled so far.
        compiled: how many parts these are.
    """

    parts: int
    bucket_bytes: int
    whole: Counter[str]
    sites: list[Site] = field(default_factory=list)
    compiled: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether every part was compiled."""
        return self.compiled == self.parts

    def add(self, sites: Iterable[Site]) -> None:
        """Note what became of one part."""
        self.sites.extend(sites)
        self.compiled += 1

    @property
    def notes(self) -> list[str]:
        """What the cuts cost, and what helps: one line, or none."""
        found = Counter(site.pattern for site in self.sites if site.status == "rewritten")
        lost, instead = self.whole - found, found - self.whole
        if not self.is_complete or not lost:
            return []
        return [
            f"DDP: expected a graph in one piece, got {self.parts} (buckets of {human(self.bucket_bytes)}), "
            f"which costs {_list(lost)}{f' ({_list(instead)} instead)' if instead else ''}; "
            "torch._dynamo.config.optimize_ddp = False before the first call leaves it whole (gradients are then "
            "exchanged after backward, no longer during it), a larger bucket_cap_mb cuts it in fewer places"
        ]


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


_splits: weakref.WeakKeyDictionary[fx.GraphModule, Split] = weakref.WeakKeyDictionary()  # by the whole graph


def split_of(
    part: fx.GraphModule, rewritten: Callable[[fx.GraphModule, Sequence[Any]], Iterable[Site]]
) -> Split | None:
    """The split that `part` belongs to, or `None` if it is a graph of its own.

    Args:
        part: what the backend was called with.
        rewritten: the sites of a graph, which it may not change; called with the whole one, once.
    """
    reason = getattr(getattr(part, "compile_subgraph_reason", None), "reason", "")
    if "DDPOptimizer" not in str(reason):
        return None
    from torch._dynamo.backends.distributed import DDPOptimizer

    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not DDPOptimizer.compile_fn.__code__:
        frame = frame.f_back
    if frame is None:
        return None
    whole = frame.f_locals["gm"]
    if whole not in _splits:
        sites = rewritten(whole, frame.f_locals["example_inputs"])
        counts = Counter(site.pattern for site in sites if site.status == "rewritten")
        _splits[whole] = Split(len(frame.f_locals["buckets"]), frame.f_locals["self"].bucket_bytes_cap, counts)
    return _splits[whole]
