"""Sums of matrix products made in one go.

    a @ b + c @ d + ...    ->    sum_of_products([a, c, ...], [b, d, ...])

So the gradients meet of all projections that read one tensor: queries, keys and values, or gate and up. Inductor adds
what the products left in memory, all of them there at once, in a pass of its own.
"""

from __future__ import annotations

import torch
from torch import fx

from graphfuse.overwrite import VIEWS, name_of

aten = torch.ops.aten


def add_up_products(graph: fx.Graph) -> None:
    """Change a graph as Inductor's own passes have left it."""
    for node in reversed(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if not node.users:  # part of a sum that has been dealt with
            graph.erase_node(node)
            continue
        products = _products(node)
        if len(products) < 2 or not all(_is_like(product, products[0]) for product in products):
            continue
        factors = [[product.args[k] for product in products] for k in (0, 1)]
        with graph.inserting_before(node):
            total = graph.call_function(torch.ops.graphfuse.sum_of_products.default, tuple(factors))
            total.meta["val"] = products[0].meta["val"]
            view = graph.call_function(aten.reshape.default, (total, list(node.meta["val"].shape)))
            view.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(view)
        graph.erase_node(node)


def _products(node: fx.Node) -> list[fx.Node]:
    """The matrix products that a sum consists of; none if there is something else in it, or one is read elsewhere."""
    if node.kwargs or len(node.args) != 2:
        return []
    found: list[fx.Node] = []
    for operand in node.args:
        if not isinstance(operand, fx.Node) or operand.meta["val"].shape != node.meta["val"].shape:
            return []
        inner = operand
        while name_of(inner) in VIEWS and len(inner.users) == 1:
            inner = inner.all_input_nodes[0]
        if len(inner.users) != 1:
            return []
        if inner.target is aten.mm.default and not inner.kwargs:
            found.append(inner)
        elif inner.target is aten.add.Tensor and inner is operand and (products := _products(inner)):
            found += products
        else:
            return []
    return found


def _is_like(product: fx.Node, other: fx.Node) -> bool:
    a, b = product.meta["val"], other.meta["val"]
    return (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
