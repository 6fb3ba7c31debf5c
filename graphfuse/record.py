"""Which graphs were compiled, and for which model: what reports are made of."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterable
from typing import Any

from torch import fx, nn
from torch._guards import CompileContext
from torch.utils.weak import WeakIdKeyDictionary

from graphfuse.match import Match, Refusal
from graphfuse.reporting import Report, Site


class GraphRecord:
    """One compiled graph: its sites, and the parameters that tell whose it is."""

    def __init__(self, example_inputs: Iterable[Any], owner: object = None) -> None:
        compile_id = CompileContext.current_compile_id()
        self.graph = str(compile_id) if compile_id is not None else "0/0"
        self.owner = owner
        self.root = _outermost_module()
        self.sites: list[Site] = []
        self.notes: list[str] = []
        self.parameters: Any = WeakIdKeyDictionary()  # used as a set
        for value in example_inputs:
            if isinstance(value, nn.Parameter):
                self.parameters[value] = None
        # Some wrappers hide the parameters from the backend: such a graph may be anybody's.
        self.anonymous = not self.parameters and owner is None

    def add(self, found: Match | Refusal) -> None:
        """Note a rewritten match or a refusal."""
        node = found.anchor.node
        place: dict[str, Any] = {"module": module_path(node), "source": source_line(node), "graph": self.graph}
        covers = dict(found.covers)
        if isinstance(found, Refusal):
            self.sites.append(Site(found.pattern, "refused", reason=found.reason, covers=covers, **place))
        else:
            params = {name: _plain(value) for name, value in found.params.items()}
            self.sites.append(Site(found.pattern, "rewritten", found.variant, params, covers=covers, **place))


def _outermost_module() -> weakref.ref[nn.Module] | None:
    """The module whose call led to this compilation: its graphs belong together, also where they share no weight."""
    found: nn.Module | None = None
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            found = frame.f_locals.get("self", found)
        frame = frame.f_back
    return None if found is None else weakref.ref(found)


_records: list[GraphRecord] = []


def keep(record: GraphRecord) -> None:
    """Remember a compiled graph for later reports."""
    _records.append(record)


def report_of(model: nn.Module) -> Report:
    """One report over all graphs that were compiled with a parameter of `model`."""
    own = {id(parameter) for parameter in model.parameters()}
    return _merge(r for r in _records if r.anonymous or any(id(p) in own for p in r.parameters))


def report_of_owner(owner: object) -> Report:
    """One report over all graphs that one compiled function led to."""
    return _merge(record for record in _records if record.owner is owner)


def last() -> Report:
    """The report of whatever was compiled last."""
    if not _records:
        return Report()
    newest = _records[-1]
    if newest.owner is not None:
        return report_of_owner(newest.owner)
    if newest.root is not None and (module := newest.root()) is not None:
        return _merge(r for r in _records if r.root is not None and r.root() is module)
    own = {id(parameter) for parameter in newest.parameters}
    return _merge(r for r in _records if r is newest or any(id(p) in own for p in r.parameters))


def _merge(records: Iterable[GraphRecord]) -> Report:
    report = Report()
    for record in records:
        report.sites.extend(record.sites)
        report.notes.extend(note for note in record.notes if note not in report.notes)
    return report


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose forward made the node; empty for the root.

    Dynamo names modules by how the compiled frame reached them (`L['self'].model.layers.0.mlp`).
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"\._modules\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    path = re.sub(r"\[['\"]?([\w.]+)['\"]?\]", r".\1", path)
    parts = [part for part in path.split(".") if part not in ("_orig_mod", "_modules", "")]
    return ".".join(parts[2:] if parts[:1] in (["L"], ["G"]) else parts)


def source_line(node: fx.Node) -> str:
    """`file:line` of the innermost user code that made the node."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{lines[-1][0]}:{lines[-1][1]}" if lines else ""


def _plain(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value).removeprefix("torch.")
