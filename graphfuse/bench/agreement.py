"""Whether variants compute the same: losses, logits and gradients, compared between processes.

Gradients are as large as the model. What goes from one process to another is a sketch of each: elements with random
signs are added up in a thousand buckets. That is linear, so the difference of two sketches is the sketch of the
difference; and its length is that of what was sketched, but for a few percent, wherever that is not zero.

How far apart two right answers may be depends on the model: a gradient in which everything cancels is all rounding.
So eager runs once more in a wider dtype, and what others may differ from eager is a multiple of eager's own error.

Source: Charikar, Chen, Farach-Colton 2002, https://doi.org/10.1007/3-540-45465-9_59 (count sketch)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphfuse.bench.rows import Measured, Row, Sketches

BUCKETS = 1021  # a prime: a column of a matrix must not meet a bucket
PART = BUCKETS << 14  # elements at a time
FACTOR = 4.0  # of eager's own error: two as good as it are twice that apart, and one may be luckier
VALUES = ("loss", "logits")  # the names among gradients that are none
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
# Relative errors that prove nothing: of a loss, and of logits and gradients.
FLOORS = {"bfloat16": (2e-3, 2e-2), "float16": (5e-4, 4e-3), "float32": (1e-5, 1e-4)}
SMALL = 1e-3  # of the largest gradient's norm: what is smaller counts as if it were as large


def sketch(tensor: Tensor) -> Tensor:
    """A tensor of any shape and dtype as (1021,) float64 on the CPU; the same numbers give the same sketch."""
    if tensor.numel() == 1:
        return torch.nn.functional.pad(tensor.detach().double().cpu().reshape(1), (0, BUCKETS - 1))
    generator = torch.Generator(tensor.device).manual_seed(0)
    found = torch.zeros(BUCKETS, dtype=torch.float64, device=tensor.device)
    for part in tensor.detach().reshape(-1).split(PART):
        signs = torch.randint(2, part.shape, generator=generator, device=part.device, dtype=torch.int8).mul_(2).sub_(1)
        signed = part.to(torch.promote_types(part.dtype, torch.float32)) * signs
        padded = torch.nn.functional.pad(signed, (0, -signed.numel() % BUCKETS))
        found += padded.view(-1, BUCKETS).sum(0, dtype=torch.float64)
    return found.cpu()


@dataclass(frozen=True)
class Difference:
    """What a variant computes against another: relative differences, and what is too far apart, in words."""

    value: float
    gradient: float | None
    worst: str
    """The parameter whose gradient is farthest from what it may be."""
    verdict: str


def compare(found: Sketches, wanted: Sketches, truth: Sketches | None, dtype: str) -> Difference:
    """Compare sketches of results and gradients.

    Args:
        found: of the variant.
        wanted: of the variant that it is compared with.
        truth: the same as `wanted`, computed in a wider dtype, if that was possible.
        dtype: of the model: how far apart right answers are at least taken to be.

    Returns:
        The differences relative to the norms of what was wanted. The verdict is empty where there is nothing to say.
    """
    if found.keys() != wanted.keys():
        name = min(found.keys() ^ wanted.keys())
        words = "a gradient, got none" if name in wanted else "no gradient, got one"
        return Difference(math.inf, math.inf, name, f"{name}: expected {words}")
    norms = {name: float(tensor.norm()) for name, tensor in wanted.items()}
    largest = max((norm for name, norm in norms.items() if name not in VALUES), default=0.0)
    values: list[_Apart] = []
    gradients: list[_Apart] = []
    for name, tensor in wanted.items():
        is_value = name in VALUES
        own = float((tensor - truth[name]).norm()) if truth is not None and name in truth else 0.0
        least = FLOORS[dtype][0 if name == "loss" else 1] * max(norms[name], 0.0 if is_value else SMALL * largest)
        apart = _Apart(name, float((found[name] - tensor).norm()), FACTOR * max(own, least), norms[name])
        (values if is_value else gradients).append(apart)
    worst = max(gradients, key=lambda apart: apart.excess, default=None)
    wrong = [apart for apart in (*values, *([worst] if worst else [])) if apart.excess > 1]
    return Difference(
        max(apart.relative for apart in values),
        worst.relative if worst else None,
        worst.name if worst else "",
        wrong[0].verdict if wrong else "",
    )


@dataclass(frozen=True)
class _Apart:
    name: str
    size: float
    limit: float
    norm: float

    @property
    def relative(self) -> float:
        return self.size / self.norm if self.norm else math.inf if self.size else 0.0

    @property
    def excess(self) -> float:
        """Over what is allowed: more than 1 is wrong."""
        if math.isnan(self.size) or math.isnan(self.limit):
            return math.inf
        return self.size / self.limit if self.limit else math.inf if self.size else 0.0

    @property
    def verdict(self) -> str:
        what = self.name if self.name in VALUES else f"gradient of {self.name}"
        bound = self.limit / self.norm if self.norm else 0.0
        return f"{what}: expected a relative difference of at most {bound:.1e}, got {self.relative:.1e}"


def judged(measured: Sequence[Measured]) -> list[Row]:
    """The rows of one workload, with what was found about their agreement.

    Eager is what the others are compared with; where it did not run, the first one that did.
    """
    ran = [one for one in measured if one.sketches]
    wanted = next((one for one in ran if one.row.variant == "eager"), ran[0] if ran else None)
    rows = []
    for one in measured:
        if wanted is None or one is wanted or not one.sketches:
            rows.append(one.row)
            continue
        found = compare(one.sketches, wanted.sketches, wanted.truth, one.row.dtype)
        rows.append(
            replace(
                one.row,
                against=wanted.row.variant,
                value_difference=found.value,
                gradient_difference=found.gradient,
                gradient_worst=found.worst,
                disagrees=found.verdict,
            )
        )
    return rows
