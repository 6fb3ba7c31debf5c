"""What `graphfuse bench model` finds about one variant of a workload, and how it was asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from graphfuse.bench.workloads import Workload

Sketches = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """What one variant costs and computes.

    Attributes:
        step_ms: median of the timed steps; `fastest_ms` and `slowest_ms` are the spread.
        tokens_per_s: of the batch, at the median; in "decode", new tokens.
        peak_gib: allocated at the peak of a step, the model included.
        first_step_s: until the first step was done, from empty caches.
        compile_s: the same less the median step.
        value: the loss, or the mean of the logits where there is no loss.
        where_ms: of one step under the profiler, by category: time of kernels, on a CPU of operations.
        clock_mhz: of a GPU's multiprocessors during the timed steps, and `watts` what it drew, where the driver says.
        rewritten: computations by pattern, as in `Report.counts`.
        sites: how many sites of each pattern are of which variant: what of a mask is known at compile time, is here.
        calls: of these steps, where a kernel decides on every call, as in `Report.calls`.
        notes: what kept something from being known.
        against: the variant whose results these were compared with; empty for itself.
        value_difference: relative; `gradient_difference` is that of the parameter that is farthest from what it may be.
        disagrees: in words; empty where loss and gradients agree.
        error: why there are no figures; empty where there are.
    """

    workload: str
    variant: str
    phase: str
    mask: str
    dtype: str
    batch: int
    seq: int
    checkpointing: bool
    step_ms: float = 0.0
    fastest_ms: float = 0.0
    slowest_ms: float = 0.0
    tokens_per_s: float = 0.0
    peak_gib: float = 0.0
    first_step_s: float = 0.0
    compile_s: float = 0.0
    value: float = 0.0
    where_ms: dict[str, float] = field(default_factory=dict)
    clock_mhz: float | None = None
    watts: float | None = None
    rewritten: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    sites: dict[str, dict[str, int]] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    against: str = ""
    value_difference: float | None = None
    gradient_difference: float | None = None
    gradient_worst: str = ""
    disagrees: str = ""
    error: str = ""


@dataclass(frozen=True)
class Measured:
    """A row, what was computed, and that in a wider dtype (of eager alone, if it fits)."""

    row: Row
    sketches: Sketches = field(default_factory=dict)
    truth: Sketches | None = None


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: where.
        repeats: timed steps, after some that are not.
        inner: what compiles the graph that graphfuse rewrote.
        mode: Inductor's.
        truth: whether eager runs once more in a wider dtype.
    """

    device: str = "cpu"
    repeats: int = 10
    inner: str = "inductor"
    mode: str | None = None
    truth: bool = True


def row_of(workload: Workload, variant: str, **known: Any) -> Row:
    """A row of this workload."""
    names = ("phase", "mask", "dtype", "batch", "seq", "checkpointing")
    return Row(workload.name, variant, **{name: getattr(workload, name) for name in names}, **known)
