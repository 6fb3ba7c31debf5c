"""One type: a training step in eager and through graphfuse, compared; its sites against the census."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import CompileContext
from torch.nn import functional

import graphfuse
from graphfuse.record import module_path
from graphfuse.reporting import Site
from tests.zoo.census import Places, census, path_of, running
from tests.zoo.recipes import RECIPES, build, inputs

TOLERANCE = 1e-5
# A parameter whose gradient is rounding noise (a key's bias: softmax does not see it) is compared with the others.
FLOOR = 1e-3

Step = tuple[float, dict[str, Tensor]]
Loss = Callable[[], Tensor]


class Ledger:
    """A backend that hands graphs on to another, and counts how often each one runs, and in which module.

    With graph breaks one graph may serve many layers, and its sites know their module from where the graph starts.
    """

    def __init__(self, model: nn.Module, inner: str) -> None:
        self.paths = path_of(model)
        self.inner = torch._dynamo.lookup_backend(inner)
        self.name = f"ledger of {id(self)} for {inner}"
        self.runs: Counter[tuple[str, str]] = Counter()
        self.causal: list[Site] = []
        torch._dynamo.register_backend(self, name=self.name)

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        compiled = self.inner(graph_module, list(example_inputs))
        graph = str(CompileContext.current_compile_id())
        for node in graph_module.graph.nodes:
            if node.target is functional.scaled_dot_product_attention and node.kwargs.get("is_causal"):
                place = {"module": module_path(node), "graph": graph}
                self.causal.append(Site("causal_attention", "rewritten", covers={"causal_attention": 1}, **place))

        def run(*args: Any) -> Any:
            self.runs[graph, running(self.paths, sys._getframe(1))] += 1
            return compiled(*args)

        return run

    @property
    def graphs(self) -> int:
        return len({graph for graph, _ in self.runs})


def measure(name: str, inner: str = "eager") -> dict[str, Any]:
    """What graphfuse does to one type, as plain data."""
    start = time.perf_counter()
    model, arguments = build(name), inputs(name)

    def loss() -> Tensor:
        outputs = model(**arguments)
        result: Tensor = outputs.loss
        return result

    with census(model, RECIPES[name]["classes"]) as expected:
        loss()
    reference = _step(model, loss)
    ledger = Ledger(model, inner)
    compiled = graphfuse.optimize(loss, inner=ledger.name, strict=True)
    ours = _step(model, compiled)
    graphs, sites = ledger.graphs, graphfuse.report(compiled).sites
    rewritten = [site for site in sites if site.status == "rewritten"]
    refused = [site for site in sites if site.status == "refused"]
    # A head whose loss alone is rewritten is one that was refused.
    refused += [
        replace(site, pattern=pattern, reason=reason, covers={pattern: 1})
        for site in rewritten
        for pattern, reason in site.others.items()
    ]
    found, known = _located(rewritten, ledger, expected), _located(refused, ledger, expected)
    # Attention that was causal without a mask before is no site.
    causal = _located(ledger.causal, ledger, expected)["causal_attention"]
    by_hand = [site for site in rewritten if site.pattern == "attention" and "dropped" in site.variant]
    written = _located(by_hand, ledger, {"attention": expected["causal_attention"]})["attention"]
    expected["causal_attention"] -= causal - found["causal_attention"] - written
    exact = False
    difference = _difference(reference, ours)
    if not agree(*difference):
        # Rounding that the model amplifies, or another function? The same in float64 tells.
        exact = True
        model.double()
        arguments.update({k: v.double() for k, v in arguments.items() if torch.is_tensor(v) and v.is_floating_point()})
        difference = _difference(_step(model, loss), _step(model, compiled))
    return {
        "expected": {pattern: places.total() for pattern, places in expected.items()},
        "covered": {pattern: (places & found[pattern]).total() for pattern, places in expected.items()},
        "missing": {pattern: dict(places - found[pattern] - known[pattern]) for pattern, places in expected.items()},
        "beyond": {pattern: dict(places - expected.get(pattern, Counter())) for pattern, places in found.items()},
        "rewritten": len(rewritten),
        "refused": [f"{site.pattern}: {site.reason}" for site in refused],
        "graphs": graphs,
        "loss": difference[0],
        "gradient": difference[1],
        "float64": exact,
        "seconds": time.perf_counter() - start,
    }


def agree(loss: float, gradient: float) -> bool:
    """Whether relative differences are rounding; NaN is not."""
    return loss <= TOLERANCE and gradient <= TOLERANCE


def _step(model: nn.Module, call: Loss) -> Step:
    torch.manual_seed(2)
    model.zero_grad()
    loss = call()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _difference(reference: Step, ours: Step) -> tuple[float, float]:
    """Relative differences: of the loss, and of the gradient that differs most."""
    (expected, gradients), (loss, found) = reference, ours
    if not gradients.keys() == found.keys():
        raise AssertionError(f"gradients: expected those of the same parameters, got {gradients.keys() ^ found.keys()}")
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    floor = FLOOR * torch.stack(list(norms.values())).max()
    worst = [(found[name] - g).norm() / torch.maximum(norms[name], floor) for name, g in gradients.items()]
    return abs(loss - expected) / abs(expected), torch.stack(worst).max().item()


def _located(sites: list[Site], ledger: Ledger, expected: Places) -> Places:
    """The computations that sites stood for while the model ran, at the paths where the census has them."""
    found: Places = {pattern: Counter() for pattern in expected}
    # A report has the sites of a graph once for each layer that shares it; the ledger counts those itself.
    first: dict[str, str] = {}
    for site in sites:
        first.setdefault(site.graph, site.instance)
    located = [
        (start, site, times)
        for site in sites
        if site.instance == first[site.graph]
        for (graph, start), times in ledger.runs.items()
        if graph == site.graph
    ]
    # Those that name a path of the census take it before others look for what is left.
    located.sort(
        key=lambda item: not all(_full(item[0], item[1].module) in expected.get(p, ()) for p in item[1].covers)
    )
    for start, site, times in located:
        # A refusal may not know what it would have covered.
        for pattern, count in (site.covers or {site.pattern: 1}).items():
            places = found.setdefault(pattern, Counter())
            places[_nearest(start, site.module, expected.get(pattern, Counter()), places)] += times * count
    return found


def _full(start: str, relative: str) -> str:
    return ".".join(filter(None, (start, relative)))


def _nearest(start: str, relative: str, expected: Counter[str], found: Counter[str]) -> str:
    """The path of the census that a site is at: of its module or of one around it.

    Else it is one with computations left: of a module right inside, if the site took in what happens to its output; or,
    behind a graph break, of one that ends like the site's, as Dynamo may name it by a local variable (`layer.mlp`).
    """
    full = _full(start, relative)
    parts = full.split(".")
    for length in range(len(parts), -1, -1):
        if (around := ".".join(parts[:length])) in expected:
            return around
    left = [path for path in expected - found if path.startswith(start)]
    inside = [path for path in left if path.rpartition(".")[0] == full]
    endings = ["." + relative.split(".", count)[-1] for count in range(relative.count(".") + 1)]
    alike = [path for ending in endings for path in left if path.endswith(ending)]
    return next(iter(inside + alike), full)
