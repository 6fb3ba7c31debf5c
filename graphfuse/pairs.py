"""Rotations of queries and keys by the same tables, in one launch.

    q, k = rope(q, cos, sin), rope(k, cos, sin)    ->    q, k = rope_pair(q, k, cos, sin)

So with `norm_rope`, and with the backward of both. Only in a compiled graph is it known that nothing keeps them apart:
neither needs the other's result, and nobody needs either's before the other can be made.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

OPS = ("rope", "rope_backward", "norm_rope", "norm_rope_backward")


def pair(graph: fx.Graph) -> None:
    """Change a graph as Inductor's own passes have left it."""
    for name in OPS:
        op, op_for_two = (getattr(torch.ops.graphfuse, each).default for each in (name, f"{name}_pair"))
        twice = {argument.name for argument in op_for_two._schema.arguments}
        own = [k for k, argument in enumerate(op._schema.arguments) if f"other_{argument.name}" in twice]
        waiting: dict[Any, fx.Node] = {}
        for node in graph.find_nodes(op="call_function", target=op):
            shared = tuple(argument for k, argument in enumerate(node.args) if k not in own)
            key = (shared, _features(node))
            first = waiting.pop(key, None)
            own_arguments = [each.args[k] for each in (first, node) if each is not None for k in own]
            if first is None or not _join(first, node, op_for_two, (*own_arguments, *shared)):
                waiting[key] = node


def _features(node: fx.Node) -> Any:
    tensor: Any = node.args[0]
    return tensor.meta["val"].shape[-1]


def _join(first: fx.Node, other: fx.Node, op: Any, arguments: tuple[Any, ...]) -> bool:
    """Replace two nodes by one, unless somebody needs a result before everything is there."""
    results = [result for node in (first, other) for result in _results(node)]
    # Not before the first: what backward computes again of a graph's inputs would be there from its start.
    ready = max(first, *other.all_input_nodes)
    if any(user <= ready for result in results for user in result.users):
        return False
    graph = first.graph
    with graph.inserting_after(ready):
        both = graph.call_function(op, arguments)
    values = [value for node in (first, other) for value in _values(node)]
    both.meta["val"] = tuple(values)
    after = both
    for node, offset in ((first, 0), (other, len(values) // 2)):
        for result in _results(node):
            position: Any = result.args[1] if result is not node else 0
            with graph.inserting_after(after):
                after = graph.call_function(operator.getitem, (both, offset + position))
            after.meta["val"] = values[offset + position]
            result.replace_all_uses_with(after)
            if result is not node:
                graph.erase_node(result)
        graph.erase_node(node)
    return True


def _values(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return value if isinstance(value, tuple) else (value,)


def _results(node: fx.Node) -> list[fx.Node]:
    """The tensors that it makes: itself, or what takes them out of its tuple."""
    return list(node.users) if isinstance(node.meta["val"], tuple) else [node]
