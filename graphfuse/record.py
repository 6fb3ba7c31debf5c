"""Which graphs were compiled, and for which model: what reports are made of."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from graphfuse.buckets import Split
from graphfuse.evidence import Evidence
from graphfuse.match import Match, Refusal
from graphfuse.origin import module_class, module_path, source_line, source_path
from graphfuse.reporting import Report, Site


class GraphRecord:
    """One compiled graph: its sites, and the parameters that tell whose it is.

    A graph of a layer may serve all equal layers, whose parameters are then its inputs in turn. They are told apart by
    one parameter, the `marker`. FSDP puts other parameters in the place of a module's own while that runs: markers are
    looked up by name as well, which they have at that time.
    """

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], owner: object = None) -> None:
        context = CompileContext.try_get()
        self.graph = str(context.compile_id) if context is not None and context.compile_id is not None else "0/0"
        self.compilation = None if context is None else weakref.ref(context)
        self.attempt = 0 if context is None else context.attempt
        self.owner = owner
        self.root = _outermost_module()
        self.sites: list[Site] = []
        self.notes: list[str] = []
        self.split: Split | None = None
        self.parameters: Any = WeakIdKeyDictionary()  # used as a set
        self.marker = next((k for k, value in enumerate(example_inputs) if isinstance(value, nn.Parameter)), None)
        self.marker_path = ""  # from the module whose frame was compiled
        self.markers: list[tuple[weakref.ref[Tensor], str]] = []  # with their names in `root`
        for value in example_inputs:
            if _is_real(value):
                self.parameters[value] = None
        if self.marker is not None:
            placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
            self.marker_path = source_path(placeholders[self.marker])
            if _is_real(example_inputs[self.marker]):
                self._mark(example_inputs[self.marker])

    def replaces(self, other: GraphRecord) -> bool:
        """Whether Dynamo abandoned the other graph, and started over with this one."""
        context = self.compilation and self.compilation()
        theirs = other.compilation and other.compilation()
        return context is not None and context is theirs and other.attempt < self.attempt

    def may_be_of(self, model: nn.Module) -> bool:
        """Whether nothing speaks against a graph being one of the model's where parameters do not tell.

        Some wrappers hide them from the backend, or show it others than the model has afterwards.
        """
        root = None if self.owner is not None or self.root is None else self.root()
        if root is None:
            return False
        own = {id(parameter) for parameter in root.parameters()}
        if any(id(parameter) in own for parameter in self.parameters):
            return False
        if model is root or root in model.modules():
            return True
        names = [name for _, name in self.markers]
        return model in root.modules() and (not names or any(_seen_from(model, root, name) for name in names))

    def watch(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, noting for which module each call is."""
        position = self.marker
        if position is None or not self.sites:
            return compiled
        seen = {id(marker()) for marker, _ in self.markers}

        def call(*args: Any) -> Any:
            marker = args[position]
            if id(marker) not in seen and _is_real(marker):
                seen.add(id(marker))
                self._mark(marker)
                self.parameters[marker] = None
            return compiled(*args)

        return call

    def _mark(self, marker: Tensor) -> None:
        root = None if self.root is None else self.root()
        named = () if root is None else root.named_parameters(remove_duplicate=False)
        found = [_plain_path(name) for name, parameter in named if parameter is marker]
        name = next((name for name in found if name.endswith(self.marker_path)), "")
        self.markers.append((weakref.ref(marker), name))

    def instances(self, model: nn.Module | None, names: Mapping[int, Sequence[str]]) -> list[tuple[int, str]]:
        """For which modules the graph has run: the id of the marker, and the path in `model`, as far as it is known.

        `names` are those of the model's parameters, by id.
        """
        root = None if self.root is None else self.root()
        found: list[tuple[int, str]] = []
        others: list[tuple[int, str]] = []
        for marker, name_in_root in self.markers:
            full = next((n for n in names.get(id(marker()), ()) if n.endswith(self.marker_path)), None)
            if full is None and model is not None and root is not None:
                full = _seen_from(model, root, name_in_root)
            path = full[: len(full) - len(self.marker_path)].rstrip(".") if full else ""
            (found if full else others).append((id(marker()), path))
        return found or others or [(0, "")]

    def add(self, found: Match | Refusal, evidence: Evidence | None = None, others: Sequence[Refusal] = ()) -> None:
        """Note a rewritten match, with what is known of it besides, or a refusal; `others` are of the same site."""
        at = found.site if isinstance(found, Match) else None
        node = (at or found.anchor).node
        known: dict[str, Any] = {
            "module": module_path(node),
            "module_class": module_class(node),
            "source": source_line(node),
            "graph": self.graph,
            "covers": dict(found.covers),
            "others": {other.pattern: other.reason for other in others},
        }
        if isinstance(found, Refusal):
            self.sites.append(Site(found.pattern, "refused", reason=found.reason, hint=found.hint, **known))
            return
        known["hint"] = next((other.hint for other in others if other.hint), "")
        params = {name: _plain(value) for name, value in found.params.items()}
        known |= {"formula": found.formula, "rounding": found.rounding, "frees": found.frees}
        if evidence is not None:
            known |= {
                "kernel": evidence.kernel,
                "kernel_reason": evidence.kernel_reason,
                "saved_bytes": evidence.saved_bytes,
                "saved": evidence.saved,
                "exact_error": evidence.proof.exact,
                "region_error": evidence.proof.region_error,
                "replacement_error": evidence.proof.replacement_error,
                "before": "\n".join(evidence.before),
                "after": "\n".join(evidence.after),
            }
        self.sites.append(Site(found.pattern, "rewritten", found.variant, params, **known))


def _is_real(value: Any) -> bool:
    """Whether it is a parameter of a model: what compiles a graph piece by piece calls the pieces with fake ones."""
    return isinstance(value, nn.Parameter) and not isinstance(value, FakeTensor)


def _plain_path(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _seen_from(model: nn.Module, root: nn.Module, name: str) -> str | None:
    """The name that a parameter of `root` has in `model`, where one contains the other; `None` if it is not in both."""
    if not name or model is root:
        return name or None
    for path, module in root.named_modules():
        if module is model:
            prefix = _plain_path(f"{path}.")
            return name.removeprefix(prefix) if name.startswith(prefix) else None
    for path, module in model.named_modules():
        if module is root:
            return _plain_path(f"{path}.{name}")
    return None


def _outermost_module() -> weakref.ref[nn.Module] | None:
    """The module whose call led to this compilation: its graphs belong together, also where they share no weight."""
    found: nn.Module | None = None
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            found = frame.f_locals.get("self", found)
        frame = frame.f_back
    found = getattr(found, "_orig_mod", found)  # what torch.compile returns may be gone before the model is
    return None if found is None else weakref.ref(found)


_records: list[GraphRecord] = []


def keep(record: GraphRecord) -> None:
    """Remember a compiled graph for later reports."""
    _records[:] = [*(other for other in _records if not record.replaces(other)), record]


def report_of(model: nn.Module) -> Report:
    """One report over all graphs that were compiled with a parameter of `model`."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_plain_path(name))
    own = (r for r in _records if r.may_be_of(model) or any(id(p) in names for p in r.parameters))
    return _merge(own, model, names)


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


def _merge(
    records: Iterable[GraphRecord], model: nn.Module | None = None, names: Mapping[int, Sequence[str]] | None = None
) -> Report:
    """All sites, once for every module that their graph has run for."""
    report = Report()
    numbers: dict[int, int] = {}  # of modules whose path is not known
    splits: dict[str, Split] = {}  # the newest of each frame
    for record in records:
        if record.split is not None:
            splits[record.graph.rpartition("/")[0]] = record.split
        for marker, path in record.instances(model, names or {}):
            instance = path or f"#{numbers.setdefault(marker, len(numbers))}"
            for site in record.sites:
                module = ".".join(part for part in (path, site.module) if part)
                report.sites.append(replace(site, module=module, instance=instance))
        report.notes.extend(note for note in record.notes if note not in report.notes)
    for split in splits.values():
        report.notes.extend(note for note in split.notes if note not in report.notes)
    return report


def _plain(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value).removeprefix("torch.")
