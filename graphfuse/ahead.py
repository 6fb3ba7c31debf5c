"""The kernels of a graph, compiled in other processes while Inductor generates code: see `graphfuse.kernels._ahead`.

What the ops are given is known to the last stride after Inductor's passes, so they are run then, on fake tensors. Sizes
that are not known leave their kernels to the first launch.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import has_free_symbols
from torch.utils._pytree import tree_leaves

log = logging.getLogger("graphfuse")


def compile_ahead(graph: fx.Graph) -> None:
    """Have the kernels of graphfuse's ops compiled, of equal calls once; it fails in silence, as it only saves time."""
    called: set[Any] = set()
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "graphfuse":
            try:
                _call(node, called)
            except Exception as error:
                log.debug("kernels of %s are compiled when they are launched: %s", node.target, error)


def _call(node: fx.Node, called: set[Any]) -> None:
    op: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or any(map(_is_symbolic, leaves)):
        return
    call = (op, *map(_like, leaves))
    if call not in called:
        called.add(call)
        run = functools.partial(op, *args, **kwargs)
        torch.ops.graphfuse.run_ahead(tensors, detect_fake_mode(tensors), run)


def _is_symbolic(argument: Any) -> bool:
    """Whether it is, or has, a size that is not known."""
    return isinstance(argument, (torch.SymInt, Tensor)) and has_free_symbols(argument)


def _like(argument: Any) -> Any:
    """What of an argument decides which kernels an op runs."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape, argument.stride(), argument.storage_offset()
    return argument
