"""Backward passes that write over what they are the last to read.

    gradient = saved * upstream                          ->    scale_(saved, upstream)

Gradients that forward left behind (the head's) are multiplied where they are: not at all, where backward starts at the
loss. If the weight is the table of the embeddings, too, the rows of the tokens are added to it there:

    gradient = embedding_backward(grad, tokens) + saved * upstream
                         ->    scale_(saved, upstream), embedding_backward_(saved, grad, tokens)

    product = glu(gate, up)                                    (backward needs it again, for the weight behind it)
    gate_grad, up_grad = glu_backward(grad, gate, up)    ->    product = glu_backward_(grad, gate, up)

Backward is the last to read gate and up, which are the largest tensors of a layer. So their gradients find room where
they were, and the product comes out of the same pass. It is for Inductor to say what may be written over: what autograd
saved and nobody else can see.

Where the gradient is a matrix product (grad = out_grad @ weight) that nobody else reads, the op makes it itself, and
the product finds room where it was. Inductor could not be told that: it never frees what an op of its graph wrote over.

    gate, up = states @ gate_weight, states @ up_weight        (backward computes the layer again)
    product = glu(gate, up)
    gate_grad, up_grad = glu_backward(out_grad @ weight, gate, up)
                         ->    gate_grad, up_grad, product = glu_backward_of_products(out_grad, weight, states, ...)

Nor does the graph of a checkpointed layer get gate and up from outside, it makes them. So there the op makes all three.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx
from torch._inductor.utils import get_donated_idxs

VIEWS = {"aten::view", "aten::reshape", "aten::_unsafe_view"}
OPERANDS = {"glu": 2, "packed_glu": 1}  # of forward


def name_of(node: fx.Node) -> str:
    """The qualified name of the operation, empty if it is none of the dispatcher's."""
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def overwrite(graph: fx.Graph) -> bool:
    """Change a backward graph, as AOTAutograd and Inductor's own passes have left it; say if inputs are overwritten."""
    free = _donated(graph)
    found = [_scale(mul, free) for mul in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)]
    found += [
        _overwrite(graph, backward, op, count, free)
        for op, count in OPERANDS.items()
        for backward in graph.find_nodes(op="call_function", target=_overload(f"{op}_backward"))
    ]
    return any(found)


def _scale(mul: fx.Node, free: set[fx.Node]) -> bool:
    """Multiply a result of the graph in place; what is still to be computed with, Inductor multiplies on the way."""
    saved, upstream = mul.args
    if not isinstance(saved, fx.Node) or not isinstance(upstream, fx.Node) or saved not in free:
        return False
    added = _rows_added(mul)
    result = mul if added is None else next(iter(mul.users))
    is_result = [*saved.users] == [mul] and all(user.op == "output" for user in result.users)
    if not is_result or upstream.meta["val"].dim() or not (_is_alike(mul, saved) and _is_alike(result, saved)):
        return False
    with mul.graph.inserting_before(result):
        mul.graph.call_function(_overload("scale_"), (saved, upstream))
        if added is not None:
            grad, tokens, _, padding, _ = added.args
            mul.graph.call_function(_overload("embedding_backward_"), (saved, grad, tokens, padding))
    result.replace_all_uses_with(saved)
    for node in dict.fromkeys((result, mul, added)):
        if node is not None:
            mul.graph.erase_node(node)
    return True


def _rows_added(mul: fx.Node) -> fx.Node | None:
    """The gradient of embeddings to which a product is added, if nobody else reads either."""
    if len(mul.users) != 1:
        return None
    (add,) = mul.users
    if name_of(add) != "aten::add" or add.kwargs or len(add.all_input_nodes) < 2:
        return None
    (added,) = {*add.all_input_nodes} - {mul}
    if name_of(added) != "graphfuse::embedding_backward" or [*added.users] != [add] or added.args[4]:
        return None
    return added if _is_alike(added, mul) else None


def _overload(name: str) -> torch._ops.OpOverload:
    found: torch._ops.OpOverload = getattr(torch.ops.graphfuse, name).default
    return found


def _donated(graph: fx.Graph) -> set[fx.Node]:
    """The inputs of the graph that nobody reads after it, and that share no memory with another."""
    indices = set(get_donated_idxs() or ())
    placeholders = graph.find_nodes(op="placeholder")
    storages = [_storage(node) for node in placeholders]
    counts = Counter(storages)
    return {
        node
        for index, (node, storage) in enumerate(zip(placeholders, storages, strict=True))
        if index in indices and storage is not None and counts[storage] == 1
    }


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _overwrite(graph: fx.Graph, backward: fx.Node, op: str, count: int, free: set[fx.Node]) -> bool:
    arguments: list[Any] = list(backward.args)
    grad, operands, options = arguments[0], arguments[1 : 1 + count], arguments[1 + count :]
    bases = [_base(node) for node in (grad, *operands)]
    # The results of the op, by which operand they are going to be written over.
    results: dict[Any, fx.Node] = {0: backward} if count == 1 else {user.args[1]: user for user in backward.users}
    if len({*bases}) < 1 + count or any(not _is_alike(result, operands[k]) for k, result in results.items()):
        return False
    again = [
        node
        for node in graph.find_nodes(op="call_function", target=_overload(op))
        if list(node.args[:-1]) == [*operands, *options] and _is_alike(node, grad)
    ]
    # Whether earlier or later: Inductor may move what it computes by itself to behind this op.
    if any(reader not in (backward, *again) for base in bases[1:] for reader in _readers(base)):
        return False
    late = _before(graph, backward, again)  # who reads the product waits for it
    if not {grad, *late}.isdisjoint(again) or grad in late:
        return False
    factors = [_factors(base, [backward]) if base is bases[0] else _factors(base, [backward, *again]) for base in bases]
    arguments = [*options, bool(again)]
    with graph.inserting_before(backward):
        if is_free := free.issuperset(bases[1:]):
            target = _overload(f"{op}_backward_")
            product = graph.call_function(target, (*(factors[0] or (grad, None)), *operands, *arguments))
            grads = operands
            if again:
                product.meta["val"] = again[0].meta["val"]
        elif len(products := [pair for pair in factors if pair is not None]) == len(factors):
            target = _overload(f"{op}_backward_of_products")
            made = graph.call_function(target, (*itertools.chain.from_iterable(products), *arguments))
            *grads, product = (
                _like(graph.call_function(operator.getitem, (made, k)), base, node)
                for k, (base, node) in enumerate(zip([*bases[1:], bases[0]], [*operands, grad], strict=True))
            )
        else:
            return False
    for node in reversed(late):
        backward.append(node)
    for node in again:
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    for k, result in results.items():
        result.replace_all_uses_with(grads[k])
        if result is not backward:
            graph.erase_node(result)
    graph.erase_node(backward)
    return is_free


def _factors(product: fx.Node, readers: Collection[fx.Node]) -> tuple[Any, Any] | None:
    """The two whose matrix product it is, and nothing but that, if nobody else reads it."""
    if product.target is not torch.ops.aten.mm.default or not set(readers).issuperset(_readers(product)):
        return None
    return product.args[0], product.args[1]


def _like(made: fx.Node, base: fx.Node, view: fx.Node) -> fx.Node:
    """What takes the place of `base`, seen as `view` sees that."""
    made.meta["val"] = base.meta["val"]
    if view is base:
        return made
    seen = made.graph.call_function(torch.ops.aten.view.default, (made, list(view.meta["val"].shape)))
    seen.meta["val"] = view.meta["val"]
    return seen


def _before(graph: fx.Graph, end: fx.Node, sources: list[fx.Node]) -> list[fx.Node]:
    """What is made of the sources before `end`, in order."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        if node is end:
            break
        if not {*sources, *found}.isdisjoint(node.all_input_nodes):
            found.append(node)
    return found


def _base(node: fx.Node) -> fx.Node:
    """What a view is of."""
    while name_of(node) in VIEWS:
        node = node.all_input_nodes[0]
    return node


def _readers(base: fx.Node) -> Iterator[fx.Node]:
    """Everything but views that reads its memory."""
    for user in base.users:
        if name_of(user) in VIEWS:
            yield from _readers(user)
        else:
            yield user


def _is_alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether both are laid out alike, in one dtype."""
    a, b = node.meta.get("val"), other.meta.get("val")
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    )
