"""Putting a replacement in the place of a region, in the Dynamo graph.

A match is in terms of ATen values; a graph is rewritten at node boundaries. What a region may not contain, or cross, is
decided here, in one place, for all patterns.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import dynamo_timed
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from graphfuse.certify import certify
from graphfuse.match import Match, Refusal, unreachable
from graphfuse.overwrite import name_of
from graphfuse.shadow import LEAF, Shadow, Value, bodies_of, hint, operands_of, storage_key

TAKE_APART = "call the operations that it is made of one by one"
ONE_MODE = "compute all of it inside the no_grad block, or all of it outside"
NEW_TENSOR = "make a new tensor instead of changing one in place: x = x + y, not x += y"
IN_ORDER = "compute it before the results that are used together with it"

# They take states in any order of dims, and that of what they return is their own.
ANY_LAYOUT = {"graphfuse::attention", "graphfuse::causal_attention"}


def obstacle(match: Match, shadow: Shadow) -> Refusal | None:
    """Why the region cannot be replaced as a whole, or `None` if it can."""
    region = shadow.cone(match.outputs, match.inputs)
    for value in (*match.inputs, *region):
        if is_traceable_wrapper_subclass(value.tensor):
            kind = type(value.tensor).__name__
            return _refuse(match, f"{value.node.name}: expected a plain tensor, got a {kind}")
    for value in match.outputs:
        if value not in shadow.node_of:
            reason = f"output: expected the result of a graph node, got a value inside {value.node.name}"
            return _refuse(match, reason, TAKE_APART)
    for value in match.inputs:
        if (inside := unreachable(value, shadow)) is not None:
            reason = f"input: expected the result of a graph node, got a value inside {inside.node.name}"
            return _refuse(match, reason, TAKE_APART)
    for value in region:
        if value.op is LEAF:
            return _refuse(match, f"{value.node.name}: expected a computed value, got one from outside the region")
    modes = {value.grad_mode for value in region}
    if len(modes) > 1:
        return _refuse(match, "grad mode: expected one for the whole region, got a change inside", ONE_MODE)
    changed = _mutation(match, region, shadow)
    return None if changed is None else _refuse(match, changed, NEW_TENSOR)


def _refuse(match: Match, reason: str, hint: str = "") -> Refusal:
    return Refusal(match.pattern, match.anchor, reason, match.covers, hint)


def _mutation(match: Match, region: Sequence[Value], shadow: Shadow) -> str | None:
    """Reads must see at the output what they saw in the region, and the region may write only to its own."""
    last = max(value.index for value in match.outputs)
    for value in match.inputs:
        writes = shadow.mutations.get(storage_key(value.tensor), [])
        if any(value.index < write <= last for write in writes):
            return f"{value.node.name}: expected no in-place change between its use and the output, got one"
    own = {storage_key(value.tensor) for value in region}
    for value in match.inputs:
        own.discard(storage_key(value.tensor))
    for value in region:
        if value.op._schema.is_mutable and storage_key(value.tensor) not in own:
            return f"{value.node.name}: expected no in-place operation on an input, got {value.op}"
    return None


def specialise(match: Match, shadow: Shadow) -> None:
    """Turn the symbolic numbers that the match depends on into guards on their value.

    Those are the numbers of the region (an eps under dynamic shapes) and the feature sizes of its inputs: batch and
    sequence stay dynamic.
    """

    def visit(arg: Any) -> None:
        if isinstance(arg, torch.SymFloat):
            float(arg)
        elif isinstance(arg, (list, tuple)):
            for item in arg:
                visit(item)

    for value in match.inputs:
        if value.tensor.dim() and (value.dtype.is_floating_point or value.dtype.is_complex):
            int(value.tensor.shape[-1])
    for value in shadow.cone(match.outputs, match.inputs):
        visit([*value.args, *value.kwargs.values()])


def rewrite(match: Match, shadow: Shadow) -> Refusal | None:
    """Check, certify and commit one match. The graph is changed only if the answer is `None`."""
    with shadow.without_guards(), dynamo_timed("graphfuse.certify"):
        refusal = obstacle(match, shadow)
        if refusal is None and (reason := certify(match, shadow)) is not None:
            refusal = _refuse(match, reason)
    if refusal is None:
        with dynamo_timed("graphfuse.commit"):
            specialise(match, shadow)
            refusal = _commit(match, shadow)
    return refusal


def _commit(match: Match, shadow: Shadow) -> Refusal | None:
    graph = shadow.graph_module.graph
    old = [shadow.node_of[value] for value in match.outputs]
    region = set(shadow.cone(match.outputs, match.inputs))
    # Also what returns a value of the region as it is, such as a cast to the dtype that it has.
    returning = {node for node, value in shadow.value_of.items() if value in region}
    region_nodes = {value.node for value in region} | returning
    with graph.inserting_before(min(old)):
        inputs = [_node_for(value, shadow) for value in match.inputs]
        late = [n for n in inputs if not n < min(old)]
        if late:
            reason = f"{late[0].name}: expected to be known before the first output, got a later node"
            return _refuse(match, reason, IN_ORDER)
        before = min(old).prev
        tracer = fx.proxy.GraphAppendingTracer(graph)
        proxies = [fx.Proxy(node, tracer) for node in inputs]
        result = match.replacement(*proxies, **match.params)
        results = result if isinstance(result, (tuple, list)) else [result]
        new = [_same_layout(proxy, node, value) for proxy, node, value in zip(results, old, match.outputs, strict=True)]
    _describe(before, min(old))
    for node, proxy, value in zip(old, new, match.outputs, strict=True):
        proxy.node.meta.update({k: v for k, v in node.meta.items()})
        node.replace_all_uses_with(proxy.node)
        shadow.node_of[value] = proxy.node
        shadow.value_of[proxy.node] = value
        shadow.storage_nodes.setdefault(storage_key(value.tensor), set()).add(proxy.node)
    erase(region_nodes, shadow)
    return None


def _node_for(value: Value, shadow: Shadow) -> fx.Node:
    """The node that holds the value; what lies inside a node (autocast's casts) is made again."""
    if value in shadow.node_of:
        return shadow.node_of[value]

    def plain(arg: Any) -> Any:
        return _node_for(arg, shadow) if isinstance(arg, Value) else hint(arg)

    args = tuple(plain(arg) for arg in value.args)
    kwargs = {name: plain(arg) for name, arg in value.kwargs.items()}
    node = shadow.graph_module.graph.call_function(value.op, args, kwargs)
    node.meta["example_value"] = value.tensor
    shadow.node_of[value] = node
    return node


def _same_layout(proxy: fx.Proxy, node: fx.Node, value: Value) -> fx.Proxy:
    """Give the result the strides that later views of it count on, if there are any."""
    if node.users and all(name_of(user) in ANY_LAYOUT for user in node.users):
        return proxy
    example = node.meta.get("example_value", value.tensor)
    order = _stride_order(example)
    ours = _stride_order(_fake_result(proxy, example))
    if ours == order:
        return proxy
    if order == list(range(example.dim())):
        return proxy.contiguous()
    inverse = [order.index(d) for d in range(example.dim())]
    return proxy.permute(order).contiguous().permute(inverse)


def _fake_result(proxy: fx.Proxy, example: Tensor) -> Tensor:
    """The fake tensor that the traced replacement returns."""
    mode = example.fake_mode if isinstance(example, FakeTensor) else None
    if mode is None:
        return example
    known: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        if "example_value" in node.meta:
            return node.meta["example_value"]
        if node not in known:
            args = tree_map(lambda a: value_of(a) if isinstance(a, fx.Node) else a, node.args)
            kwargs = tree_map(lambda a: value_of(a) if isinstance(a, fx.Node) else a, node.kwargs)
            if node.op == "call_method":
                known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]

    quiet = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with quiet, mode, torch.no_grad():
        result: Tensor = value_of(proxy.node)
    return result


def _stride_order(tensor: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest; those of size one, and ties, in their own order."""
    strides = [hint(s) for s in tensor.stride()]
    sizes = [hint(s) for s in tensor.shape]
    order = sorted((d for d in range(len(sizes)) if sizes[d] != 1), key=lambda d: (-strides[d], d))
    for d in range(len(sizes)):
        if sizes[d] == 1:
            order.insert(d, d)
    return order


def _describe(before: fx.Node, after: fx.Node) -> None:
    """Let the nodes in between tell the same origin as the node that they came for, and which overload they call."""
    node = before.next
    while node is not after:
        if isinstance(node.target, torch._ops.OpOverloadPacket):
            node.target = node.target.default
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if name in after.meta:
                node.meta.setdefault(name, after.meta[name])
        node = node.next


def share(shadow: Shadow) -> None:
    """Make equal calls of our ops once: one look at a mask serves all layers."""
    first: dict[Any, fx.Node] = {}
    for node in list(shadow.graph_module.graph.nodes):
        if getattr(node.target, "namespace", None) != "graphfuse":
            continue
        read = [shadow.value_of[arg] for arg in node.all_input_nodes if arg in shadow.value_of]
        if any(storage_key(value.tensor) in shadow.mutations for value in read):
            continue
        key = (node.target, tuple(node.args), tuple(node.kwargs.items()))
        if first.setdefault(key, node) is not node:
            node.replace_all_uses_with(first[key])
            node.graph.erase_node(node)


def hoist(shadow: Shadow) -> None:
    """Look at a mask before the checkpoint that uses it: in its region it would be looked at again in backward."""
    graph = shadow.graph_module.graph
    look_at = torch.ops.graphfuse.is_lower_triangle.default
    uses = Counter(name for node in graph.nodes for name in bodies_of(node))
    bodies: dict[torch.nn.Module, Shadow] = {body.graph_module: body for body in shadow.bodies}
    for node in list(graph.nodes):
        names = bodies_of(node) if operands_of(node) else []
        body = bodies.get(shadow.graph_module.get_submodule(names[0])) if names and uses[names[0]] == 1 else None
        inputs = [] if body is None else body.graph_module.graph.find_nodes(op="placeholder")
        if body is None or len(inputs) != len(operands_of(node)):
            continue
        handed = dict(zip(inputs, operands_of(node), strict=True))
        for look in body.graph_module.graph.find_nodes(op="call_function", target=look_at):
            mask = look.args[0]
            if mask not in handed or storage_key(mask.meta["example_value"]) in body.mutations:
                continue
            with graph.inserting_before(node):
                outside = graph.call_function(look_at, (handed[mask], *look.args[1:]))
            with body.graph_module.graph.inserting_after(inputs[-1]):
                # fx makes names of nodes differ, but not those of arguments.
                inside = body.graph_module.graph.placeholder(f"is_causal_{len(inputs)}")
            _describe(outside.prev, node)
            look.replace_all_uses_with(inside)
            body.graph_module.graph.erase_node(look)
            node.args = (*node.args, outside)
            inputs.append(inside)
        body.graph_module.recompile()


def erase(nodes: set[fx.Node], shadow: Shadow) -> None:
    """Remove what nothing reads any more.

    Dead-code elimination would also take in-place operations whose result nobody names. A node that writes is removed
    only together with every node that could see what it wrote.
    """
    doomed = {n for n in nodes if n.op not in ("placeholder", "output", "get_attr") and not n._erased}
    changed = True
    while changed:
        changed = False
        for node in list(doomed):
            witnesses = set().union(
                *(shadow.storage_nodes.get(key, set()) for key in shadow.mutating_nodes.get(node, ()))
            )
            if any(user not in doomed for user in node.users) or any(
                w not in doomed and w.graph is node.graph and not w._erased for w in witnesses
            ):
                doomed.discard(node)
                changed = True
    for node in sorted(doomed, reverse=True):
        node.graph.erase_node(node)
