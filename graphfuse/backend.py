"""The `torch.compile` backend: shadow, match, certify, rewrite, hand on.

Nothing here may make a model fail that ran without it. Whatever goes wrong before the inner backend is called leaves
the graph as it was, one warning and a line in the report.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import get_dynamic_layer_stack_depth, pop_dynamic_layer_stack_and_undo_to_depth
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import dynamo_timed

from graphfuse import logs
from graphfuse.breaks import ignore_messages_said_once
from graphfuse.buckets import split_of
from graphfuse.certify import certify, rehearse
from graphfuse.config import Config
from graphfuse.errors import GraphfuseError, GraphfuseWarning
from graphfuse.evidence import Evidence, gather
from graphfuse.inner import compile_inner
from graphfuse.kernels import _op, _pairs, _rows, _scale, _sum_of_products  # noqa: F401 - ops that no pattern imports
from graphfuse.kernels._ahead import ahead, wake
from graphfuse.kernels._sdpa_times import wait_until_loaded
from graphfuse.lazy import outputs as lazy_outputs
from graphfuse.lazy.outputs import Plan
from graphfuse.match import Match, Pattern, Refusal
from graphfuse.patterns import CATALOGUE
from graphfuse.policy import left_to_inductor, may_choose, settled
from graphfuse.record import GraphRecord, keep
from graphfuse.replay import record as record_shadow
from graphfuse.reporting import Site
from graphfuse.rewrite import hoist, rewrite, share
from graphfuse.shadow import Shadow, Value, bodies_of

Found = dict[Shadow, list[tuple[Pattern, Match | Refusal]]]

VMAP = "vmap"

logs.set_up()


def begin() -> None:
    """What is best done before Dynamo traces: on a GPU, the start of the processes that compile kernels."""
    ignore_messages_said_once()
    if torch.cuda.is_initialized():
        wake()


begin()  # torch.compile imports this file when it is told the backend's name


def graphfuse(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """What `torch.compile(model, backend="graphfuse", options={...})` calls with every graph.

    Args:
        graph_module: Dynamo's graph.
        example_inputs: its inputs, as Dynamo hands them over.
        mode: Inductor's mode.
        options: see `graphfuse.config.Config`; unknown names that are Inductor's go to Inductor.

    Returns:
        The compiled graph, with the calling convention of `graph_module.forward`.

    Raises:
        ConfigError: an unknown option, inner backend or pattern.
    """
    settings = dict(options or {})
    if mode is not None:
        settings.setdefault("mode", mode)
    return compile_graph(graph_module, example_inputs, Config.parse(settings, pattern_names()))


class Backend:
    """The backend with its options bound, for functions: the graphs that it compiles are its own."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        return compile_graph(graph_module, example_inputs, self.config, owner=self)


def pattern_names() -> list[str]:
    """The names in the catalogue, in its order."""
    return [pattern.name for pattern in CATALOGUE]


def calls(names: Iterable[str]) -> dict[str, dict[str, int]]:
    """How many calls of this process took which way, for the patterns of these names whose kernels have several."""
    return {p.name: dict(p.ways) for p in CATALOGUE if p.name in names and p.ways}


def compile_graph(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: Config, owner: object = None
) -> Callable[..., Any]:
    """Rewrite one graph and compile it; if that fails, compile it as it was."""
    graph_record = GraphRecord(graph_module, example_inputs, owner)
    compiled = graph_record.watch(_compile(graph_module, example_inputs, config, graph_record))
    keep(graph_record)  # not before: Dynamo may abandon a graph and start over
    logs.tell(graph_record.graph, graph_record.sites, graph_record.notes)
    split = graph_record.split
    if split is not None:
        split.add(graph_record.sites)
    says_something = bool(graph_record.sites or graph_record.parameters)  # a graph may hold no more than a mask
    if graph_record.root is not None and (says_something if split is None else split.is_complete):
        sites, notes = (graph_record.sites, []) if split is None else (split.sites, split.notes)
        logs.announce(graph_record.root(), sites, [*graph_record.notes, *notes])
    return compiled


def _compile(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: Config, graph_record: GraphRecord
) -> Callable[..., Any]:
    transforms = _transforms_in(graph_module)
    if transforms and transforms[0] != VMAP:
        _note_transform(transforms[0], graph_record)
        return compile_inner(graph_module, example_inputs, config)
    original, depth = _duplicate(graph_module), get_dynamic_layer_stack_depth()
    try:
        # A checkpoint around the call that compiles counts what is saved: replay and proofs are not part of it.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            graph_record.split = split_of(graph_module, functools.partial(_sites, config=config))
            plan = rewrite_graph(graph_module, example_inputs, config, graph_record)
    except Exception as error:
        pop_dynamic_layer_stack_and_undo_to_depth(depth)
        if config.strict and not transforms:
            raise
        _fall_back("rewriting", error, graph_record, transforms)
        return compile_inner(original, example_inputs, config)
    if not any(site.status == "rewritten" for site in graph_record.sites):
        return compile_inner(graph_module, example_inputs, config)
    try:
        return plan.around(compile_inner(graph_module, example_inputs, config))
    except (TorchDynamoException, GraphfuseError):
        raise  # Dynamo steers itself with exceptions
    except Exception as error:
        pop_dynamic_layer_stack_and_undo_to_depth(depth)
        if config.strict and not transforms:
            raise
        compiled = compile_inner(original, example_inputs, config)  # fails too if it is not our doing
        _fall_back(f"compiling the rewritten graph with {config.inner}", error, graph_record, transforms)
        return compiled


def _transforms_in(graph_module: fx.GraphModule) -> list[str]:
    """The transforms of torch.func that begin inside the graph, `vmap` last: `grad`, `jvp`, `vmap`.

    Whole regions of tensors that are batched can be replaced, within them the ops have no rules. Of tensors that are
    differentiated once more nothing can, nor may such a graph be replayed: it forbids hooks on saved tensors.
    """
    found = set()
    for module in graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            name = str(getattr(node.target, "__name__", ""))
            if node.op == "call_function" and name.endswith("_increment_nesting"):
                found.add(name.removesuffix("_increment_nesting").removeprefix("_"))
    return sorted(found, key=lambda name: (name == VMAP, name))


def _note_transform(name: str, graph_record: GraphRecord) -> None:
    graph_record.sites.clear()
    graph_record.notes.append(f"torch.func: expected no transform inside the graph, got {name}")


def _sites(graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> list[Site]:
    """What would be rewritten in a graph that somebody else has cut into pieces."""
    graph_record = GraphRecord(graph_module, example_inputs)
    rewrite_graph(_duplicate(graph_module), example_inputs, config, graph_record)
    return graph_record.sites


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _fall_back(stage: str, error: Exception, graph_record: GraphRecord, transforms: Sequence[str]) -> None:
    """Say why the graph is compiled as it was: no fault of anybody's, and no warning, where torch.func transforms."""
    if transforms:
        _note_transform(transforms[0], graph_record)
        return
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    note = f"{stage}: expected no error, got {type(error).__name__}: {first_line}; the graph was compiled as it was"
    graph_record.sites.clear()
    graph_record.notes.append(note)
    logs.log.info("%s", note, exc_info=error)
    warnings.warn(f"graphfuse: {note}", GraphfuseWarning, stacklevel=2)


def rewrite_graph(
    graph_module: fx.GraphModule, example_inputs: Iterable[Any], config: Config, graph_record: GraphRecord
) -> Plan:
    """Rewrite `graph_module` in place, bodies of checkpoints included; the plan says which outputs it has lost."""
    chosen = [p for p in CATALOGUE if config.patterns is None or p.name in config.patterns]
    if any(isinstance(given, Tensor) and given.is_cuda for given in example_inputs):
        wake()
    with dynamo_timed("graphfuse.replay"):
        shadow = record_shadow(graph_module, example_inputs)
    with shadow.without_guards():
        outputs = lazy_outputs.find(shadow) if config.lazy_logits else []
    chooses = may_choose(graph_module, config)
    found = _find(shadow, chosen)
    try:
        _prepare(found, chooses=chooses)
        taken = _rewrite_shadow(shadow, found, graph_record, config, chooses=chooses)
    finally:
        wait_until_loaded()
    with shadow.without_guards():
        plan = lazy_outputs.settle(outputs, shadow, taken)
    for output, evidence in zip(plan.outputs, plan.evidence, strict=True):
        graph_record.add(output.match, evidence)
    _finish(shadow)
    return plan


def _find(shadow: Shadow, patterns: Sequence[Pattern]) -> Found:
    """What the patterns say of a graph and of the bodies in it, in the order in which they are asked."""
    found: Found = {shadow: []}
    for pattern in patterns:
        with shadow.without_guards(), dynamo_timed("graphfuse.match"):
            found[shadow] += [(pattern, match) for match in pattern.find(shadow)]
    for body in shadow.bodies:
        found |= _find(body, patterns)
    return found


def _prepare(found: Found, *, chooses: bool) -> None:
    """Have loaded what will be measured, and all kernels of proofs compiled; meanwhile, make those that need neither.

    Proofs are kept, so the rewrite finds them.
    """
    sites = list(_sites_of(found))
    is_loading = False
    for _, match, shadow in sites:
        if chooses and match.choose is not None:
            with shadow.without_guards(), dynamo_timed("graphfuse.choose"):
                match.choose(ahead=True)
            is_loading = True
    for pattern, match, shadow in sites:
        if _op.launches(match.anchor.tensor):
            with shadow.without_guards(), dynamo_timed("graphfuse.rehearse"), _uncounted(pattern):
                rehearse(match, shadow, ahead)
    for pattern, match, shadow in sites if is_loading else ():
        if match.choose is None:
            with shadow.without_guards(), dynamo_timed("graphfuse.evidence"), _uncounted(pattern):
                certify(match, shadow)


def _sites_of(found: Found) -> Iterator[tuple[Pattern, Match, Shadow]]:
    """The matches that will be rewritten, if nothing speaks against any: the first one of each place."""
    taken: set[Value] = set()
    for shadow, of_shadow in found.items():
        for pattern, match in of_shadow:
            if isinstance(match, Match):
                region = shadow.cone(match.outputs, match.inputs)
                if taken.isdisjoint(region):
                    taken.update(region)
                    yield pattern, match, shadow


def _rewrite_shadow(
    shadow: Shadow, found: Found, graph_record: GraphRecord, config: Config, *, chooses: bool
) -> set[Value]:
    taken: set[Value] = set()  # values that a rewritten region has made disappear
    decisions: list[Decision] = []
    for pattern, match in found[shadow]:
        if shadow.is_gone(match.anchor):
            continue
        if isinstance(match, Refusal):
            decide(decisions, match, {match.anchor})
            continue
        region = shadow.cone(match.outputs, match.inputs)
        if taken.isdisjoint(region):
            refusal = _uncapturable(match, config) or left_to_inductor(match, config)
            with _uncounted(pattern):
                with shadow.without_guards(), dynamo_timed("graphfuse.choose"):
                    settlement = settled(match, shadow) if chooses and refusal is None else match
                if settlement is match and match.needs_choice:
                    continue
                refusal = settlement if isinstance(settlement, Refusal) else refusal
                chosen = settlement if isinstance(settlement, Match) else match
                with shadow.without_guards(), dynamo_timed("graphfuse.evidence"):
                    evidence = gather(chosen, shadow, pattern.why)
                refusal = refusal or rewrite(chosen, shadow)
            decide(decisions, refusal or chosen, region, evidence)
            if refusal is None:
                taken.update(region)
    for decision in decisions:
        graph_record.add(decision.found, decision.evidence, decision.others)
    for body in shadow.bodies:
        _rewrite_shadow(body, found, graph_record, config, chooses=chooses)
    return taken


@dataclass(eq=False)
class Decision:
    """What becomes of one site, and what other patterns have refused there."""

    found: Match | Refusal
    evidence: Evidence | None = None
    others: list[Refusal] = field(default_factory=list)


def decide(
    decisions: list[Decision], found: Match | Refusal, region: Collection[Value], evidence: Evidence | None = None
) -> None:
    """Add what a pattern says of a region; a refusal of another pattern in it is one of the same site.

    A site is rewritten if any pattern rewrites it, and else has the reason of the first.
    """
    same = [
        decision
        for decision in decisions
        if isinstance(decision.found, Refusal)
        and decision.found.pattern != found.pattern
        and decision.found.anchor in region
    ]
    if isinstance(found, Match):
        others = [refusal for d in same for refusal in (d.found, *d.others) if isinstance(refusal, Refusal)]
        decisions[:] = [d for d in decisions if d not in same]
        decisions.append(Decision(found, evidence, others))
    elif same:
        same[0].others.append(found)
    else:
        decisions.append(Decision(found))


@contextlib.contextmanager
def _uncounted(pattern: Pattern) -> Iterator[None]:
    """Calls of a proof are nobody's."""
    before = pattern.ways.copy()
    try:
        yield
    finally:
        pattern.ways.clear()
        pattern.ways.update(before)


def _uncapturable(match: Match, config: Config) -> Refusal | None:
    """What waits for the device would cost the graph its CUDA graphs."""
    if not match.waits or not config.captures or match.anchor.tensor.device.type != "cuda":
        return None
    reason = f"mode: expected one without CUDA graphs, as the host has to wait here, got {config.mode!r}"
    hint = "use another mode; or give no attention_mask where nothing is padded, and the mask is a constant"
    return Refusal(match.pattern, match.anchor, reason, match.covers, hint)


def _finish(shadow: Shadow) -> None:
    for body in shadow.bodies:
        _finish(body)
    hoist(shadow)
    share(shadow)
    shadow.graph_module.graph.lint()
    shadow.graph_module.recompile()


def _duplicate(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graphs, nested ones included, can be compiled after the original was changed."""
    graph = copy.deepcopy(graph_module.graph)
    twin = fx.GraphModule(graph_module, graph)
    twin.meta = dict(graph_module.meta)
    for node, other in zip(graph_module.graph.nodes, graph.nodes, strict=True):
        if hasattr(node, "_dynamo_source"):  # AOTAutograd reads parameters' origins off the placeholders
            other._dynamo_source = node._dynamo_source
        for name in bodies_of(node):
            body = graph_module.get_submodule(name)
            if isinstance(body, fx.GraphModule):
                twin.set_submodule(name, _duplicate(body))
    return twin
