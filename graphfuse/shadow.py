"""The shadow of a Dynamo graph: the ATen operations that its nodes run.

A Dynamo graph holds what the user wrote: `x ** 2`, `x.pow(2)`, `F.rms_norm(x, ...)`. Replaying every node on its own
fake tensors and recording what reaches the dispatcher gives one vocabulary for all of them, autocast's hidden casts
included. Patterns are matched on this shadow; rewrites happen in the Dynamo graph, at node boundaries.

The record is in single-assignment form: an in-place operation defines a new `Value` for the tensor it changed, and a
view read after its storage was changed by way of another view is a fresh leaf, about which nothing is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

aten = torch.ops.aten

LEAF = "leaf"  # `Value.op` of a tensor that no recorded operation produced


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of the shadow, and the ATen operation that produced it.

    `args` and `kwargs` are those of the operation, with a `Value` in the place of every tensor.
    """

    index: int
    op: Any  # OpOverload, or LEAF
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensor: Tensor  # fake: shape, strides, dtype, device, requires_grad
    node: fx.Node  # the Dynamo node during which it was made
    output: int  # which of the operation's outputs
    grad_mode: bool
    users: list[Value] = field(default_factory=list)
    handed: Value | None = None  # for an input of a checkpointed region: the value of the graph around that it is

    def __repr__(self) -> str:
        return f"%{self.index} = {self.op} [{self.node.name}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as integers; symbolic sizes by their hint."""
        return tuple(hint(size) for size in self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def operands(self) -> Iterator[Value]:
        """The values among the arguments, in order, lists opened."""
        return _values_in((*self.args, *self.kwargs.values()))


def _values_in(items: Iterable[Any]) -> Iterator[Value]:
    for item in items:
        if isinstance(item, Value):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _values_in(item)


def hint(number: Any) -> Any:
    """The concrete number behind a symbolic one (its example for this compilation); others as they are."""
    if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        node = number.node
        return node.hint if node.has_hint() else node.shape_env.size_hint(node.expr, fallback=2)
    return number


def storage_key(tensor: Tensor) -> int:
    """What tells storages apart; tensors without one (subclasses) count as their own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


class Shadow:
    """The recorded values of one graph, and how they relate to its nodes."""

    def __init__(self, graph_module: fx.GraphModule, shape_env: ShapeEnv | None = None) -> None:
        self.graph_module = graph_module
        self.shape_env = shape_env
        self.values: list[Value] = []
        self.value_of: dict[fx.Node, Value] = {}  # Dynamo node -> the value it returns
        self.node_of: dict[Value, fx.Node] = {}  # value -> the first Dynamo node that returns it
        self.mutations: dict[int, list[int]] = {}  # storage -> indices of the values that changed it
        self.storage_nodes: dict[int, set[fx.Node]] = {}  # storage -> the nodes that return a view of it
        self.mutating_nodes: dict[fx.Node, set[int]] = {}  # node -> storages that it changed
        self.escaping: set[Value] = set()  # returned by the graph, or handed to a nested one
        self.bodies: list[Shadow] = []  # of checkpointed and other nested regions

    def without_guards(self) -> contextlib.AbstractContextManager[None]:
        """Where sizes may be asked about: the answers are those of this batch, and hold no later batch to them."""
        return contextlib.nullcontext() if self.shape_env is None else self.shape_env.suppress_guards()

    def sole_user(self, value: Value) -> Value | None:
        """The one operation that reads the value, if there is just one and nothing else can see it."""
        return value.users[0] if len(value.users) == 1 and value not in self.escaping else None

    def is_gone(self, value: Value) -> bool:
        """Whether a rewrite has removed the node that made the value."""
        return value.node._erased

    def cone(self, outputs: Iterable[Value], leaves: Iterable[Value]) -> list[Value]:
        """Every value between `leaves` (excluded) and `outputs` (included), in order of execution."""
        seen = set(leaves)
        found: list[Value] = []
        stack = [value for value in outputs if value not in seen]
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            found.append(value)
            stack.extend(value.operands())
        return sorted(found, key=lambda value: value.index)

    def history(self, outputs: Iterable[Value]) -> list[Value]:
        """Every value that `outputs` come from, themselves included, in order of execution; in graphs around, too."""
        own = self.cone(outputs, [])
        handed = [value.handed for value in own if value.handed is not None]
        return [*self.history(handed), *own] if handed else own


def is_nested(node: fx.Node) -> bool:
    """Whether the node runs a graph of its own (a higher-order operator)."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def operands_of(node: fx.Node) -> tuple[Any, ...]:
    """What a checkpoint hands to its region, in the order of the region's placeholders; nothing for other nodes."""
    return node.args[1:] if node.target is torch.ops.higher_order.tag_activation_checkpoint else ()


def bodies_of(node: fx.Node) -> list[str]:
    """The names of the graph modules that a nested node runs, unless they are somebody's hand-written autograd.

    The bodies of `autograd_function_apply` are a kernel with its own backward: there is nothing to improve in them
    that its author did not decide on.
    """
    if not is_nested(node) or "autograd_function" in str(node.target):
        return []
    arguments = (*node.args, *node.kwargs.values())
    return [str(a.target) for a in arguments if isinstance(a, fx.Node) and a.op == "get_attr"]
