"""Numbers that the host waits for, asked for at the start of a graph.

The head leaves out tokens that do not count, and needs their number on the host. They depend on labels alone, so the
device can count them before the trunk, and the number has come long before the host reaches the head.

    trunk, factors of the tokens, head      ->      factors of the tokens, count, trunk, head(count)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

HIDDEN, WEIGHT, FACTORS, COMPACT, NEEDS, KEPT = 0, 1, slice(7, 11), 14, 15, "kept"  # arguments of the head
MOST = 8  # elements for each token: what is more is not made of labels alone


def count_early(graph: fx.Graph) -> None:
    """Let the tokens that the heads of an ATen graph keep be counted first, where that is possible."""
    if torch._inductor.config.triton.cudagraphs:
        return  # a captured graph cannot wait
    counts: dict[Any, fx.Node] = {}
    for head in graph.find_nodes(op="call_function", target=torch.ops.graphfuse.linear_cross_entropy.default):
        arguments: Any = head.args
        factors = arguments[FACTORS]
        given = [factor for factor in factors if factor is not None]
        is_asked = KEPT not in head.kwargs and arguments[COMPACT] is None and given
        if not is_asked or (region := _made_of_inputs(given)) is None:
            continue
        work = _work(head)
        if (factors, work) not in counts:
            _to_front(graph, region)
            with graph.inserting_after(region[-1] if region else max(graph.find_nodes(op="placeholder"))):
                count = graph.call_function(torch.ops.graphfuse.count_kept.default, (*factors, work))
            with given[0].meta["val"].fake_mode:
                count.meta["val"] = torch.empty((), dtype=torch.int64, device="cpu")
            counts[factors, work] = count
        head.kwargs = {**head.kwargs, KEPT: counts[factors, work]}


def _work(head: fx.Node) -> int | None:
    """Its multiplications and additions; `None` if sizes are symbols."""
    arguments: Any = head.args
    hidden, weight = _numel(arguments[HIDDEN]), arguments[WEIGHT].meta["val"].shape[0]
    products = 1 + sum(arguments[NEEDS][:2])
    return 2 * products * hidden * weight if hidden is not None and isinstance(weight, int) else None


def _made_of_inputs(nodes: list[fx.Node]) -> list[fx.Node] | None:
    """What the nodes are computed by, in order, without inputs; `None` if that is more than labels go into."""
    tokens = _numel(nodes[0])
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in found or node.op == "placeholder":
            continue
        is_small = tokens is None or (_numel(node) or 0) <= MOST * tokens
        if not is_small or not _is_pure(node):
            return None
        found.add(node)
        pending += node.all_input_nodes
    return sorted(found)


def _is_pure(node: fx.Node) -> bool:
    """Whether it may run earlier: an operation of torch's on tensors, or on sizes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags
    return node.target.namespace in ("aten", "prims") and not node.target._schema.is_mutable and not is_random


def _numel(node: fx.Node) -> int | None:
    """`None` if sizes are symbols."""
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, torch.Tensor) else ()
    return math.prod(shape) if all(isinstance(size, int) for size in shape) else None


def _to_front(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Move nodes behind the inputs, in their order."""
    after = max(graph.find_nodes(op="placeholder"))
    for node in nodes:
        after.append(node)
        after = node
