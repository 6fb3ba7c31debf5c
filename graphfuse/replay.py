"""Replaying a Dynamo graph on its fake tensors, to record the ATen operations that each node runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from graphfuse.shadow import LEAF, Shadow, Value, bodies_of, is_nested, operands_of, storage_key

aten = torch.ops.aten

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.alias.default,
)


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
        self.note_writes(changed)
        return changed

    def note_writes(self, changed: set[int]) -> None:
        assert self.node is not None
        if not changed:
            return
        for key in changed:
            self.version[key] = self.version.get(key, 0) + 1
            self.shadow.mutations.setdefault(key, []).append(len(self.shadow.values))
        self.shadow.mutating_nodes.setdefault(self.node, set()).update(changed)


class _Replay(fx.Interpreter):
    """Runs the graph on fake tensors; what it cannot run, it takes from Dynamo's own record."""

    def __init__(self, graph_module: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.recorder = recorder
        self.autocast: list[Any] = []
        self.modes: dict[fx.Node, _Modes] = {}  # that a nested node runs in
        self.handed: dict[fx.Node, list[Value | None]] = {}  # the values that it hands to its region
        self.bodies: dict[fx.GraphModule, Shadow] = {}  # of its graphs, as the first node ran them

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.node = n
        if is_nested(n):
            self.modes[n] = _Modes.now(self.recorder.shadow)
            operands = (self.env[a] if isinstance(a, fx.Node) else a for a in operands_of(n))
            self.handed[n] = [self.recorder.lookup(t) if isinstance(t, Tensor) else None for t in operands]
            self.run_bodies(n)
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

    def run_bodies(self, n: fx.Node) -> None:
        """Replay the graphs of a nested node; what one writes to may be any tensor that the node is given."""
        recorder, writes = self.recorder, False
        for name in bodies_of(n):
            body = recorder.shadow.graph_module.get_submodule(name)
            if not isinstance(body, fx.GraphModule):
                continue
            if body not in self.bodies:
                recorder.quiet = True
                try:
                    self.bodies[body] = record(body)
                finally:
                    recorder.quiet = False
            shadow = self.bodies[body]
            given = (shadow.value_of.get(node) for node in body.graph.find_nodes(op="placeholder"))
            writes |= any(value is not None and storage_key(value.tensor) in shadow.mutations for value in given)
        if writes:
            tensors = (self.env[node] for node in n.all_input_nodes)
            recorder.note_writes({storage_key(tensor) for tensor in tensors if isinstance(tensor, Tensor)})

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
    known = torch.amp.autocast_mode.is_autocast_available(device)  # not for meta tensors
    eligible = known and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if eligible and torch.is_autocast_enabled(device) else tensor


@dataclass(frozen=True)
class _Modes:
    """What a graph runs in: autograd's mode, and for each kind of device whether autocast is on, and its dtype."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, shadow: Shadow) -> _Modes:
        known = torch.amp.autocast_mode.is_autocast_available
        devices = sorted(device for device in {value.tensor.device.type for value in shadow.values} if known(device))
        of = ((device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices)
        return cls(torch.is_grad_enabled(), tuple(of))


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether the operation is defined by others, for autograd too, and makes tensors.

    Questions about a tensor (is it contiguous, how many elements) pass through the dispatcher as well.
    """
    if not any(isinstance(r.type, torch.TensorType) for r in func._schema.returns):
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


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
    shadow.bodies = _record_bodies(replay)
    return shadow


def _record_bodies(replay: _Replay) -> list[Shadow]:
    """The graphs of nested nodes, but such as run in several modes: they do not compute one thing."""
    nested: dict[fx.GraphModule, list[fx.Node]] = {}
    for node in replay.modes:
        for name in bodies_of(node):
            body = replay.recorder.shadow.graph_module.get_submodule(name)
            if isinstance(body, fx.GraphModule):
                nested.setdefault(body, []).append(node)
    bodies = []
    for body, nodes in nested.items():
        around = {replay.modes[node] for node in nodes}
        if len(around) > 1:
            continue
        shadow = replay.bodies[body]
        if len(nodes) == 1:
            for placeholder, value in zip(
                body.graph.find_nodes(op="placeholder"), replay.handed[nodes[0]], strict=False
            ):
                if placeholder in shadow.value_of:
                    shadow.value_of[placeholder].handed = value
        bodies.append(shadow)
    return bodies


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
    """Let what is taken out of a stack be what was put in: the logits of several heads, each with its loss.

    A slice of the whole stack may come in between: it becomes one of the part.
    """
    for value in shadow.values:
        if value.op is not aten.select.int:
            continue
        source, cut = _above(value.args[0]), None
        if source.op is aten.slice.Tensor:
            cut, source = source, _above(source.args[0])
        if source.op is not aten.stack.default or storage_key(source.tensor) in shadow.mutations:
            continue
        rank = source.tensor.dim()
        dim = (source.args[1] if len(source.args) > 1 else 0) % rank
        if value.args[1] % rank != dim or not isinstance(value.args[2], int):
            continue
        part = source.args[0][value.args[2]]
        taken_from = value.args[0]
        if cut is None:
            value.op, value.args = aten.alias.default, (part,)
        else:
            along = (cut.args[1] if len(cut.args) > 1 else 0) % rank
            if along == dim:
                continue
            value.op, value.args = aten.slice.Tensor, (part, along - (along > dim), *cut.args[2:])
        taken_from.users.remove(value)
        part.users.append(value)


def _above(value: Value) -> Value:
    """The value before views that change nothing."""
    while value.op in (aten.alias.default, aten.slice.Tensor) and value.args[0].shape == value.shape:
        value = value.args[0]
    return value
