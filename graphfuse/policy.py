"""Whether a kernel is worth it where it matches: measured, not guessed."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx

from graphfuse.certify import certify
from graphfuse.config import Config
from graphfuse.match import Match, Refusal
from graphfuse.shadow import Shadow

ALWAYS = 'policy="always" rewrites it nevertheless'
COSTS = Path(__file__).with_name("costs.toml")


@dataclass(frozen=True)
class Slower:
    """Where Inductor is faster: a row of `costs.toml`.

    Attributes:
        pattern: name of the pattern.
        graphfuse: time of the kernel, as a multiple of the time its bytes take.
        inductor: that of Inductor's own code.
        measured: on what.
        features_over: only rows of more features than this.
    """

    pattern: str
    graphfuse: float
    inductor: float
    measured: str
    features_over: int = 0

    def covers(self, match: Match) -> bool:
        """Whether the site is one of those measured."""
        return match.pattern == self.pattern and match.anchor.shape[-1] > self.features_over


@functools.cache
def costs() -> tuple[Slower, ...]:
    """The rows of `costs.toml`."""
    return tuple(Slower(**row) for row in tomllib.loads(COSTS.read_text(encoding="utf-8"))["slower"])


def left_to_inductor(match: Match, config: Config) -> Refusal | None:
    """The refusal of a site that Inductor's own code computes faster, or in less memory.

    Other inner backends, and `policy="always"`, have every site rewritten. The figures are those of GPUs.
    """
    if config.policy == "always" or config.inner != "inductor":
        return None
    if match.stored is not None:
        reason = f"cost: expected an input that is stored anyway, got {match.stored.op}, which Inductor need not store"
        return Refusal(match.pattern, match.anchor, reason, match.covers, ALWAYS)
    if match.anchor.tensor.device.type != "cuda":
        return None
    for row in costs():
        if row.covers(match):
            reason = (
                f"cost: expected less than Inductor's {row.inductor:g} times the time of its bytes, "
                f"got {row.graphfuse:g} ({row.measured})"
            )
            return Refusal(match.pattern, match.anchor, reason, match.covers, ALWAYS)
    return None


def may_choose(graph_module: fx.GraphModule, config: Config) -> bool:
    """Whether measurements choose between kernels: not where the code does, by `torch.nn.attention.sdpa_kernel`."""
    graphs = (module.graph for module in graph_module.modules() if isinstance(module, fx.GraphModule))
    set_kernels = torch.nn.attention._sdpa_kernel  # what Dynamo makes of it
    return config.policy == "measured" and not any(
        graph.find_nodes(op="call_function", target=set_kernels) for graph in graphs
    )


def settled(match: Match, shadow: Shadow) -> Match | Refusal:
    """The match with what measuring chooses, if that is proved as well; or why the code is left as it is."""
    choice = None if match.choose is None else match.choose()
    if choice is None:
        return match
    if isinstance(choice, Refusal):
        return choice
    chosen = replace(
        match,
        params={**match.params, **choice.params},
        variant=f"{match.variant}, {choice.variant}",
        implementation=choice.implementation,
    )
    return chosen if certify(chosen, shadow) is None else match
