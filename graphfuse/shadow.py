"""The shadow of a Dynamo graph: the ATen operations that its nodes run.

A Dynamo graph holds what the user wrote: `x ** 2`, `x.pow(2)`, `F.rms_norm(x, ...)`. Replaying every node on its own
fake tensors and recording what reaches the dispatcher gives one vocabulary for all of them, autocast's hidden casts
included. Patterns are matched on this shadow; rewrites happen in the Dynamo graph, at node boundaries.

The record is in single-assignment form: an in-place operation defines a new `Value` for the tensor it changed, and a
view read after its storage was changed by way of another view is a fresh leaf, about which nothing is known.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
LEAF = "leaf"  # `Value.op` of a tensor that no recorded operation produced

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.select.int, aten.slice.Tensor)


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


class _Recorder(TorchDispatchMode):
    def __init__(self, shadow: Shadow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shadow = shadow
        self.node: fx.Node | None = None
        self.quiet = False
        self.current: dict[int, tuple[Value, int]] = {}  # id(tensor) -> value, version of its storage
        self.version: dict[int, int] = {}

    def define(self, op: Any, args: Any, kwargs: Any, tensor: Tensor, output: int) -> Value:
        assert self.node is not None, "define: expected a node to be running"
        shadow = self.shadow
        grad_mode = torch.is_grad_enabled()
        value = Value(len(shadow.values), op, args, kwargs, tensor, self.node, output, grad_mode)
        shadow.values.append(value)  # also keeps the tensor alive, so that its id stays its own
        self.current[id(tensor)] = (value, self.version.get(storage_key(tensor), 0))
        for operand in value.operands():
            operand.users.append(value)
        return value

    def lookup(self, tensor: Tensor) -> Value:
        entry = self.current.get(id(tensor))
        if entry is not None and entry[1] == self.version.get(storage_key(tensor), 0):
            return entry[0]
        return self.define(LEAF, (), {}, tensor, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.quiet:
            return func(*args, **kwargs)
        if _is_composite(func):  # inference mode dispatches these whole
            with self:
                return func.decompose(*args, **kwargs)
        recorded = tuple(self.record(arg) for arg in args)
        recorded_kwargs = {name: self.record(arg) for name, arg in kwargs.items()}
        result = func(*args, **kwargs)
        changed = self._note_mutation(func, args, kwargs)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        for position, output in enumerate(outputs):
            if isinstance(output, Tensor):
                value = self.define(func, recorded, recorded_kwargs, output, position)
                if (key := storage_key(output)) in changed:
                    self.shadow.mutations.setdefault(key, []).append(value.index)
        return result

    def record(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.lookup(arg)
        if isinstance(arg, (list, tuple)):
            return [self.record(item) for item in arg]
        return arg

    def _note_mutation(self, func: Any, args: Any, kwargs: Any) -> set[int]:
        """Give every storage that `func` wrote to a new version."""
        changed: set[int] = set()
        if not func._schema.is_mutable:
            return changed
        for position, spec in enumerate(func._schema.arguments):
            if spec.alias_info is None or not spec.alias_info.is_write:
                continue
            arg = args[position] if position < len(args) else kwargs.get(spec.name)
            for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(tensor, Tensor):
                    changed.add(storage_key(tensor))
        assert self.node is not None
        for key in changed:
            self.version[key] = self.version.get(key, 0) + 1
            self.shadow.mutations.setdefault(key, []).append(len(self.shadow.values))
        self.shadow.mutating_nodes.setdefault(self.node, set()).update(changed)
        return changed


class _Replay(fx.Interpreter):
    """Runs the graph on fake tensors; what it cannot run, it takes from Dynamo's own record."""

    def __init__(self, graph_module: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.recorder = recorder
        self.autocast: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.node = n
        example = n.meta.get("example_value")
        symbolic = isinstance(example, (torch.SymInt, torch.SymFloat, torch.SymBool))
        if is_nested(n) or (symbolic and n.op != "placeholder"):
            # A region of its own, or a number that Dynamo already has a symbol for: a replayed
            # `.item()` would make a fresh, unbacked one.
            return example
        try:
            result = self.run_attention(n) if n.target is _ATTENTION else super().run_node(n)
        except Exception:
            if "example_value" not in n.meta:
                raise
            return example
        if n.target is torch.amp.autocast_mode._enter_autocast:
            self.autocast.append(result)
        elif n.target is torch.amp.autocast_mode._exit_autocast and self.autocast:
            self.autocast.pop()
        return result

    def run_attention(self, n: fx.Node) -> Any:
        """Record attention as one operation: what it would dispatch to depends on the device and its mask."""
        recorder = self.recorder
        args, kwargs = tree_map_only(Tensor, _autocast, self.fetch_args_kwargs_from_env(n))
        recorded = tuple(recorder.record(arg) for arg in args)
        recorded_kwargs = {name: recorder.record(arg) for name, arg in kwargs.items()}
        recorder.quiet = True
        try:
            result = _ATTENTION(*args, **kwargs)
        finally:
            recorder.quiet = False
        recorder.define(aten.scaled_dot_product_attention.default, recorded, recorded_kwargs, result, 0)
        return result

    def close(self) -> None:
        """Leave autocast regions that an unfinished replay left open."""
        while self.autocast:
            torch.amp.autocast_mode._exit_autocast(self.autocast.pop())


def _autocast(tensor: Tensor) -> Tensor:
    """What autocast makes of an operand of an operation that it runs in lower precision."""
    device = tensor.device.type
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if eligible and torch.is_autocast_enabled(device) else tensor


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether the operation is defined by others, for autograd too, and makes tensors.

    Questions about a tensor (is it contiguous, how many elements) pass through the dispatcher as well.
    """
    if not any(isinstance(r.type, torch.TensorType) for r in func._schema.returns):
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def is_nested(node: fx.Node) -> bool:
    """Whether the node runs a graph of its own (a higher-order operator)."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def bodies_of(node: fx.Node) -> list[str]:
    """The names of the graph modules that a nested node runs, unless they are somebody's hand-written autograd.

    The bodies of `autograd_function_apply` are a kernel with its own backward: there is nothing to improve in them
    that its author did not decide on.
    """
    if not is_nested(node) or "autograd_function" in str(node.target):
        return []
    arguments = (*node.args, *node.kwargs.values())
    return [str(a.target) for a in arguments if isinstance(a, fx.Node) and a.op == "get_attr"]


def record(graph_module: fx.GraphModule, example_inputs: Iterable[Any] = ()) -> Shadow:
    """Replay `graph_module` on its fake tensors and return what it ran.

    Args:
        graph_module: a graph from Dynamo; not changed.
        example_inputs: what the backend was called with; used where a placeholder carries no fake tensor.

    The replay adds no guard and no symbol to the live shape environment.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    examples = [node.meta.get("example_value", node.meta.get("val")) for node in placeholders]
    mode = next((e.fake_mode for e in examples if isinstance(e, FakeTensor)), None)
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        examples = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in example_inputs]
    shadow = Shadow(graph_module, mode.shape_env)
    recorder = _Recorder(shadow)
    replay = _Replay(graph_module, recorder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(shadow.without_guards())
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        stack.callback(replay.close)
        # Autocast keeps casts of weights, Dynamo's too: a kept one would come from nowhere.
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        stack.enter_context(mode)
        stack.enter_context(recorder)
        for node, example in zip(placeholders, examples, strict=True):
            recorder.node = node
            if isinstance(example, Tensor):
                recorder.define(LEAF, (), {}, example, 0)
        replay.run(*examples)
    _relate(shadow, replay.env, recorder)
    for node in graph_module.graph.nodes:
        for name in bodies_of(node):
            body = graph_module.get_submodule(name)
            if isinstance(body, fx.GraphModule) and all(s.graph_module is not body for s in shadow.bodies):
                shadow.bodies.append(record(body))
    return shadow


def _relate(shadow: Shadow, env: dict[fx.Node, Any], recorder: _Recorder) -> None:
    """Fill the maps between nodes and values."""
    made: dict[int, list[Value]] = {}
    for value in shadow.values:
        made.setdefault(id(value.tensor), []).append(value)
    first: dict[int, fx.Node] = {}
    for node, result in env.items():
        if not isinstance(result, Tensor):
            continue
        shadow.storage_nodes.setdefault(storage_key(result), set()).add(node)
        if id(result) not in made:
            continue
        first.setdefault(id(result), node)
        own = [value for value in made[id(result)] if value.node is node]
        if own:  # the last version that this node made
            shadow.value_of[node] = own[-1]
            shadow.node_of.setdefault(own[-1], node)
        else:  # a no-op such as `.to(same dtype)`: whatever the tensor was by then
            before = [value for value in made[id(result)] if value.node < node]
            value = (before or made[id(result)])[-1]
            shadow.value_of[node] = value
            shadow.node_of.setdefault(value, node)  # an item of a tuple that an earlier node returned
    for node, value in shadow.value_of.items():
        if any(user.op == "output" or is_nested(user) for user in node.users):
            shadow.escaping.add(value)
    for value in shadow.values:
        if value not in shadow.node_of and value.op is LEAF and id(value.tensor) in first:
            shadow.node_of[value] = first[id(value.tensor)]
    _unstack(shadow)
    # What nothing reads is no use: what autograd detaches to save it, what a graph computes and drops.
    for value in reversed(shadow.values):
        if value.users or value in shadow.escaping or value.op is LEAF or value.op._schema.is_mutable:
            continue
        if value in shadow.node_of and value.op not in (aten.stack.default, *_VIEWS):
            continue
        for operand in value.operands():
            operand.users.remove(value)


def _unstack(shadow: Shadow) -> None:
    """Let what is taken out of a stack be what was put in: the logits of several heads, each with its loss."""
    for value in shadow.values:
        stack = value.args[0] if value.op is aten.select.int else None
        if stack is None or stack.op is not aten.stack.default or storage_key(stack.tensor) in shadow.mutations:
            continue
        parts, dim = stack.args[0], (stack.args[1] if len(stack.args) > 1 else 0)
        if value.args[1] % stack.tensor.dim() != dim % stack.tensor.dim() or not isinstance(value.args[2], int):
            continue
        part = parts[value.args[2]]
        value.op, value.args = aten.alias.default, (part,)
        stack.users.remove(value)
        part.users.append(value)
