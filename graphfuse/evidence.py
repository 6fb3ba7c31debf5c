"""What a report tells of a rewritten site: the region as it was, what stands there now, why, and what that saves.

Gathered before the rewrite, from the match and the shadow alone. It decides nothing: what cannot be found out is left
empty.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from graphfuse import algebra
from graphfuse.certify import Proof, prove
from graphfuse.evaluate import CannotEvaluate, evaluate, fingerprint
from graphfuse.match import Match
from graphfuse.origin import source_path
from graphfuse.shadow import Shadow, Value, hint, storage_key

INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.pow: "**",
    operator.matmul: "@",
}
SIZES = "BTUVW"  # names of dynamic sizes, in the order of the dimensions that they come from


@dataclass(frozen=True)
class Evidence:
    """What is known of one match besides the match itself."""

    before: tuple[str, ...] = ()
    """The nodes of the region, as code."""
    after: tuple[str, ...] = ()
    """What stands in their place."""
    kernel: str = ""
    """The ops among the latter."""
    kernel_reason: str = ""
    saved_bytes: int | None = None
    """Bytes that the region keeps for backward in eager torch and the replacement does not, for this input."""
    saved: str = ""
    """The same as a formula of the dynamic sizes."""
    proof: Proof = field(default_factory=Proof)


def gather(match: Match, shadow: Shadow, why: str = "", *, is_skipped: bool = False) -> Evidence:
    """Collect what a report shows of `match`, not yet rewritten.

    Args:
        match: what is about to be rewritten.
        shadow: where it was found.
        why: what the kernel does better, in a few words.
        is_skipped: nothing stands in the place of the region until somebody reads its output.
    """
    after = [] if is_skipped else _trace(match, shadow)
    ops = list(dict.fromkeys(_name(node.target) for node in after))
    ops = [name.replace(".", "::") for name in ops if name.startswith("graphfuse.")]
    names = ops or [_name(node.target) for node in after if node.op == "call_function"][-1:]
    saved_bytes, saved = (None, "")
    if match.frees:
        saved_bytes, saved = _outputs(match) if is_skipped else _kept(match, shadow)
    return Evidence(
        before=tuple(_line(node) for node in _nodes(match, shadow)),
        after=tuple(_line(node) for node in after) or ("# made when it is read",),
        kernel="lazy tensor" if is_skipped else ", ".join(names),
        kernel_reason=why if is_skipped or not ops else "; ".join(filter(None, (why, _where(match)))),
        saved_bytes=saved_bytes,
        saved=saved,
        proof=prove(match, shadow),
    )


def _where(match: Match) -> str:
    """Which implementation of an op runs on these tensors."""
    if match.implementation:
        return match.implementation
    device, dtype = match.anchor.tensor.device.type, match.anchor.dtype
    if dtype == torch.float64:
        return "in plain torch, as everything is float64"
    if device == "meta":
        return "in Triton on CUDA"
    return "in Triton" if device == "cuda" else f"in plain torch, as the tensors are on {device}"


def _nodes(match: Match, shadow: Shadow) -> list[fx.Node]:
    """The graph nodes of the region, in their order."""
    region = shadow.cone(match.outputs, match.inputs)
    inputs = {shadow.node_of.get(value) for value in match.inputs}
    return sorted({value.node for value in region} - inputs)


def _trace(match: Match, shadow: Shadow) -> list[fx.Node]:
    """The replacement as the nodes that it would become."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    nodes = [graph.placeholder(value.node.name) for value in match.inputs]
    for node, value in zip(nodes, match.inputs, strict=True):
        node.meta["written"] = _text(shadow.node_of.get(value, value.node))
    match.replacement(*(fx.Proxy(node, tracer) for node in nodes), **match.params)
    return [node for node in graph.nodes if node.op != "placeholder"]


def _line(node: fx.Node) -> str:
    """One node as a line of Python."""
    args = [_text(arg) for arg in node.args]
    kwargs = [f"{name}={_text(arg)}" for name, arg in node.kwargs.items()]
    if node.op == "call_method":
        return f"{node.name} = {args[0]}.{node.target}({', '.join([*args[1:], *kwargs])})"
    if node.target in INFIX and len(args) == 2:
        return f"{node.name} = {args[0]} {INFIX[node.target]} {args[1]}"
    if node.target is getattr:
        return f"{node.name} = {args[0]}.{node.args[1]}"
    if node.target is operator.getitem:
        index = args[1][1:-1] if isinstance(node.args[1], tuple) else args[1]
        return f"{node.name} = {args[0]}[{index}]"
    if isinstance(node.target, torch._ops.OpOverload):  # say what the numbers are
        names = [argument.name for argument in node.target._schema.arguments]
        known = [(arg, text, name) for arg, text, name in zip(node.args, args, names, strict=False) if arg is not None]
        args = [text if arg is node.args[0] else f"{name}={text}" for arg, text, name in known]
    return f"{node.name} = {_name(node.target)}({', '.join([*args, *kwargs])})"


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.replace("::", ".")
    name = str(getattr(target, "__name__", target))
    for space, prefix in ((torch, "torch"), (torch.nn.functional, "F")):
        if getattr(space, name, None) is target:
            return f"{prefix}.{name}"
    return name


def _text(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        path = source_path(arg) if arg.op == "placeholder" else ""
        return str(arg.meta.get("written", "")) or path or arg.name
    if arg is ...:
        return "..."
    if isinstance(arg, (list, tuple)):
        inside = ", ".join(_text(item) for item in arg)
        return f"[{inside}]" if isinstance(arg, list) else f"({inside}{',' if len(arg) == 1 else ''})"
    if isinstance(arg, slice):
        start, stop, step = ("" if part is None else _text(part) for part in (arg.start, arg.stop, arg.step))
        return f"{start}:{stop}" + (f":{step}" if step else "")
    return repr(hint(arg)) if not isinstance(arg, torch.SymInt) else str(arg)


def _outputs(match: Match) -> tuple[int, str]:
    """What the outputs take, which are not computed."""
    size = sum((_size(value) for value in match.outputs), sympy.Integer(0))
    return sum(value.tensor.dtype.itemsize * _count(value.shape) for value in match.outputs), _named(size, match)


_measured: dict[Any, tuple[int, tuple[int, ...]] | None] = {}


def _kept(match: Match, shadow: Shadow) -> tuple[int | None, str]:
    """What autograd keeps of the region, less what it keeps of the replacement."""
    if not (match.anchor.grad_mode and any(value.tensor.requires_grad for value in match.inputs)):
        return 0, "0"
    region = shadow.cone(match.outputs, match.inputs)
    key = (match.replacement, str(sorted(match.params.items())), fingerprint(region, match.inputs))
    if key not in _measured:
        try:
            _measured[key] = _measure(match, region)
        except (CannotEvaluate, RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            _measured[key] = None
    measured = _measured[key]
    if measured is None:
        return None, ""
    rest, places = measured
    total = sum((_size(region[place]) for place in places), sympy.Integer(rest))
    known = rest + sum(region[p].dtype.itemsize * _count(region[p].shape) for p in places)
    return known, _named(total, match)


def _measure(match: Match, region: Sequence[Value]) -> tuple[int, tuple[int, ...]]:
    """Which values of the region autograd keeps, as positions; and the bytes of all else, less the replacement's."""
    device = match.anchor.tensor.device
    with _disable_current_modes(), FakeTensorMode() as mode, torch.enable_grad():
        known = {value: _fake(value) for value in match.inputs}
        given = {storage_key(tensor) for tensor in known.values()}
        results: dict[Value, Tensor] = {}

        def run_region() -> None:
            results.update(evaluate(region, known, exact=False, device=device, sizes={}))

        theirs = _saved_by(run_region)
        ours = _saved_by(lambda: match.replacement(*known.values(), **match.params))
        del mode
    place_of: dict[int, int] = {}
    for place, value in enumerate(region):
        kept = place_of.setdefault(storage_key(results[value]), place)
        if _count(region[kept].shape) < _count(value.shape) and results[value].is_contiguous():
            place_of[storage_key(results[value])] = place
    places = tuple(place_of[key] for key in theirs if key in place_of and key not in given)
    rest = sum(size for key, size in theirs.items() if key not in place_of and key not in given)
    return rest - sum(size for key, size in ours.items() if key not in given), places


def _fake(value: Value) -> Tensor:
    strides = tuple(hint(stride) for stride in value.tensor.stride())
    tensor = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.tensor.device)
    return tensor.requires_grad_(value.tensor.requires_grad)


def _saved_by(run: Callable[[], object]) -> dict[int, int]:
    """The storages that autograd keeps, with their bytes."""
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor, so that its storage stays the only one of its name

    def pack(tensor: Tensor) -> Tensor:
        kept[storage_key(tensor)] = (int(tensor.untyped_storage().nbytes()), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return {key: size for key, (size, _) in kept.items()}


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _size(value: Value) -> sympy.Expr:
    """Bytes of the value, with symbols for its dynamic sizes."""
    count = value.tensor.numel()
    return value.dtype.itemsize * (count.node.expr if isinstance(count, torch.SymInt) else sympy.Integer(count))


def _named(size: sympy.Expr, match: Match) -> str:
    """The formula, with B for a dynamic first dimension of the graph's inputs, T for a second one."""
    symbols = sorted(size.free_symbols, key=str)
    names: Mapping[Any, Any] = dict(zip(symbols, (_origin(symbol, match) for symbol in symbols), strict=True))
    return algebra.write(size.xreplace(names))


def _origin(symbol: sympy.Symbol, match: Match) -> sympy.Symbol:
    env = getattr(getattr(match.anchor.tensor, "fake_mode", None), "shape_env", None)
    sources = getattr(env, "var_to_sources", {}).get(symbol, ())
    for source in sources:
        dim = getattr(source, "idx", None)
        if isinstance(dim, int) and dim < len(SIZES):
            return sympy.Symbol(SIZES[dim])
    return symbol
