"""Handing a graph on to the backend that compiles it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

from graphfuse.config import Config


def compile_inner(graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """Compile with the inner backend of `config`."""
    if config.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = dict(config.inner_options)
        if config.mode is not None and config.mode != "default":
            patches = {**torch._inductor.list_mode_options(config.mode), **patches}
        user = torch._inductor.config.joint_custom_pre_pass
        patches["joint_custom_pre_pass"] = Salt(user)
        compiled: Any = compile_fx(graph_module, example_inputs, config_patches=patches)
    else:
        compiled = torch._dynamo.lookup_backend(config.inner)(graph_module, list(example_inputs))
    result: Callable[..., Any] = compiled
    return result


# Their results are gradients: a checkpoint that runs them again in backward pays for all their products twice.
RUN_ONCE = {"graphfuse::linear_cross_entropy"}


class Salt(CustomGraphPass):
    """Puts graphfuse's own sources into the key of Inductor's and AOTAutograd's caches, and saves what runs once.

    The caches do not look into an op: without this, an edited backward would be served from before the edit. Passes
    that the user has set in the same place still run.
    """

    def __init__(self, user_passes: Any = None) -> None:
        several = isinstance(user_passes, (list, tuple))
        self.user_passes = [p for p in (user_passes if several else [user_passes]) if p is not None]

    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in self.user_passes:
            user_pass(graph)
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in RUN_ONCE:
                for value in (node, *node.users):
                    value.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        theirs = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.user_passes]
        if None in theirs:
            return None  # a pass that cannot be cached: then neither can this one
        return ("graphfuse", source_digest(), *theirs)


@functools.cache
def source_digest() -> str:
    """SHA-256 over every Python file of the installed package."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted({*root.glob("*.py"), *root.glob("*/*.py")}):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
