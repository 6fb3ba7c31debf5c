"""The backend: found by name, checked options, never the reason that a model fails."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse import backend, certify
from graphfuse.match import Pattern
from graphfuse.patterns import rms_norm

D = 16


class Block(nn.Module):
    """A norm and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.rand(D))
        self.gate, self.up = nn.Linear(D, 24, bias=False), nn.Linear(D, 24, bias=False)
        self.down = nn.Linear(24, D, bias=False)

    def forward(self, x):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    """Blocks, each recomputed in backward if asked to."""

    def __init__(self, depth=2, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Broken(Stack):
    """Two graphs."""

    def forward(self, x):
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


@pytest.fixture(autouse=True)
def no_old_proofs():
    certify.forget()
    yield
    certify.forget()


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_as_eager(model, compiled, x):
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(compiled, x), gradients(model, x), rtol=1e-4, atol=1e-5)


def twins(**kwargs):
    torch.manual_seed(0)
    model = Stack(**kwargs)
    twin = Stack(**kwargs)
    twin.load_state_dict(model.state_dict())
    return model, twin


def test_is_found_by_name_without_an_import():
    script = (
        "import sys, torch\n"
        "assert 'graphfuse' not in sys.modules\n"
        "f = torch.compile(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), backend='graphfuse',"
        " options={'inner': 'eager'})\n"
        "f(torch.ones(2, 8))\n"
        "import graphfuse\n"
        "assert graphfuse.last_report().counts == {'rms_norm': 1}, graphfuse.last_report()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_optimizes_in_place():
    model = Stack()
    keys = list(model.state_dict())
    assert graphfuse.optimize(model, inner="eager") is model
    assert type(model) is Stack
    assert list(model.state_dict()) == keys
    model(torch.randn(3, D))
    assert graphfuse.report(model).counts == {"rms_norm": 2, "glu": 2}


@pytest.mark.parametrize(
    ("model", "paths"),
    [
        (nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D)), ["1"]),
        (nn.Sequential(Block(), nn.Sequential(Block())), ["0", "1.0"]),
        (nn.RMSNorm(D), [""]),
    ],
    ids=["modules of torch", "own modules", "one module"],
)
def test_optimizes_modules_of_torch(model, paths):
    """Dynamo passes over their frames, and would compile nothing, without a word."""
    twin = copy.deepcopy(model)
    graphfuse.optimize(twin, inner="aot_eager", fullgraph=True, strict=True)
    assert_as_eager(model, twin, torch.randn(5, D))
    report = graphfuse.report(twin)
    assert sorted(site.module for site in report.sites if "rms_norm" in site.covers) == paths
    assert report.refused == []


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_agrees_with_eager_through_every_inner_backend(inner):
    model, twin = twins()
    graphfuse.optimize(twin, inner=inner, fullgraph=True, strict=True)
    assert_as_eager(model, twin, torch.randn(5, D))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "nothing"}, r"inner: expected one of \[.*'inductor'.*\], got 'nothing'"),
        ({"patterns": ["rms_nrom"]}, r"patterns: expected names among \[.*'rms_norm'.*\], got 'rms_nrom'"),
        ({"stirct": True}, r"options: expected names among \[.*'strict'.*\].*, got 'stirct'"),
        ({"strict": "yes"}, r"strict: expected a bool, got 'yes'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_the_valid_options(options, message):
    with pytest.raises(graphfuse.ConfigError, match=message):
        graphfuse.optimize(Stack(), **options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        torch.compile(lambda x: x + 1, backend="graphfuse", options=options)(torch.ones(1))


def test_runs_an_empty_batch():
    model, compiled = twins()
    graphfuse.optimize(compiled, inner="eager", strict=True)
    for size in (3, 0, 3):
        assert_as_eager(model, compiled, torch.randn(size, 4, D))


def test_uses_the_chosen_patterns_only():
    model = Stack()
    graphfuse.optimize(model, inner="eager", patterns=["glu"])
    model(torch.randn(3, D))
    assert graphfuse.report(model).counts == {"glu": 2}


def test_reports_several_graphs_as_one():
    model = graphfuse.optimize(Broken().requires_grad_(False), inner="eager")
    model(torch.randn(3, D))
    report = graphfuse.report(model)
    assert report.counts == {"rms_norm": 2, "glu": 2}
    assert len({site.graph for site in report.sites}) == 2
    assert graphfuse.last_report().counts == report.counts


def test_tells_models_apart():
    first, second = graphfuse.optimize(Stack(1), inner="eager"), graphfuse.optimize(Stack(3), inner="eager")
    first(torch.randn(3, D))
    second(torch.randn(3, D))
    assert graphfuse.report(first).counts == {"rms_norm": 1, "glu": 1}
    del first
    assert graphfuse.report(second).counts == {"rms_norm": 3, "glu": 3}


def test_tells_graphs_without_parameters_apart():
    """What lies between graph breaks may hold no weight: it is of the model that was called."""

    class Plain(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    plain, other = graphfuse.optimize(Plain(), inner="eager"), graphfuse.optimize(Stack(1), inner="eager")
    plain(torch.randn(3, D))
    other(torch.randn(3, D))
    assert graphfuse.report(plain).counts == {"rms_norm": 1}
    assert graphfuse.report(nn.Sequential(plain)).counts == {"rms_norm": 1}
    assert graphfuse.report(other).counts == {"rms_norm": 1, "glu": 1}


def test_a_function_compiled_by_itself_is_of_no_model():
    @torch.compile(backend="graphfuse", options={"inner": "eager"})
    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    norm(torch.randn(3, D), torch.rand(D))
    assert graphfuse.last_report().counts == {"rms_norm": 1}
    model = graphfuse.optimize(Stack(1), inner="eager")
    model(torch.randn(3, D))
    assert graphfuse.report(model).counts == {"rms_norm": 1, "glu": 1}


def test_forgets_a_graph_that_dynamo_abandons():
    """Dynamo may start over after the backend has returned, with the same compile id."""
    calls = []

    def impatient(graph_module, example_inputs):
        compiled = backend.graphfuse(graph_module, example_inputs, options={"inner": "eager", "strict": True})
        calls.append(compiled)
        if len(calls) == 1:
            raise torch._dynamo.exc.TensorifyScalarRestartAnalysis
        return compiled

    model = Stack(1)
    torch.compile(model, backend=impatient)(torch.randn(3, D))
    assert len(calls) == 2
    assert sorted(site.pattern for site in graphfuse.report(model).sites) == ["glu", "rms_norm"]


def test_says_where_a_site_is():
    model = graphfuse.optimize(Stack(), inner="eager")
    model(torch.randn(3, D))
    site = next(site for site in graphfuse.report(model).sites if site.pattern == "rms_norm")
    assert site.module == "blocks.0"
    assert site.source.rpartition(":")[0] == __file__


@pytest.mark.parametrize("reentrant", [False, True])
def test_rewrites_inside_checkpoints(reentrant):
    model, twin = twins(reentrant=reentrant)
    graphfuse.optimize(twin, inner="aot_eager", strict=True)
    assert_as_eager(model, twin, torch.randn(5, D, requires_grad=True))
    assert graphfuse.report(twin).counts == {"rms_norm": 2, "glu": 2}


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference", "autocast"])
def test_rewrites_in_every_mode(mode):
    model, twin = twins()
    graphfuse.optimize(twin, inner="aot_eager", strict=True)
    contexts = {
        "eval": torch.enable_grad(),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    if mode == "eval":
        model.eval()
        twin.eval()
    with contexts[mode]:
        x = torch.randn(5, D)
        tolerance = 2e-2 if mode == "autocast" else 1e-5
        torch.testing.assert_close(twin(x), model(x), rtol=tolerance, atol=tolerance)
    assert graphfuse.report(twin).counts == {"rms_norm": 2, "glu": 2}


def wrong_forward(*args, **kwargs):
    return original_replacement(*args, **kwargs) * 1.001


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def wrong_backward(*args, **kwargs):
    return WrongBackward.apply(original_replacement(*args, **kwargs))


original_replacement = rms_norm.replacement


@pytest.mark.parametrize(("broken", "what"), [(wrong_forward, "output"), (wrong_backward, "gradient")])
def test_refuses_a_broken_kernel(broken, what, monkeypatch):
    monkeypatch.setattr(rms_norm, "replacement", broken)
    model, twin = twins()
    graphfuse.optimize(twin, inner="eager", strict=True, patterns=["rms_norm", "glu"])
    assert_as_eager(model, twin, torch.randn(5, D))
    report = graphfuse.report(twin)
    assert report.counts == {"glu": 2}
    assert all(site.reason.startswith(f"certify: expected the same {what} in float64") for site in report.refused)
    assert len(report.refused) == 2


def test_refuses_a_kernel_of_the_wrong_dtype(monkeypatch):
    def widened(*args, **kwargs):
        return original_replacement(*args, **{**kwargs, "out_dtype": torch.float64})

    monkeypatch.setattr(rms_norm, "replacement", widened)
    model = graphfuse.optimize(Stack(1), inner="eager", strict=True)
    model(torch.randn(3, D))
    (site,) = graphfuse.report(model).refused
    assert site.reason == "certify: expected output of dtype torch.float32, got torch.float64"


def fail(*args, **kwargs):
    raise RuntimeError("planted")


STAGES = {
    "shadow": ("graphfuse.backend.record_shadow", fail),
    "match": ("graphfuse.patterns.rms_norm.start", fail),
    "certify": ("graphfuse.rewrite.certify", fail),
    "commit": ("graphfuse.rewrite.erase", fail),
}


@pytest.mark.parametrize("stage", STAGES)
def test_falls_through_with_one_warning(stage, monkeypatch):
    monkeypatch.setattr(*STAGES[stage])
    model, twin = twins()
    graphfuse.optimize(twin, inner="aot_eager")
    x = torch.randn(5, D)
    with pytest.warns(graphfuse.GraphfuseWarning, match="planted") as caught:
        ours = twin(x)
    assert len(caught) == 1
    torch.testing.assert_close(ours, model(x))
    report = graphfuse.report(twin)
    assert report.counts == {}
    assert ["RuntimeError: planted" in note for note in report.notes] == [True]


@pytest.mark.parametrize("stage", STAGES)
def test_raises_when_strict(stage, monkeypatch):
    monkeypatch.setattr(*STAGES[stage])
    model = graphfuse.optimize(Stack(1), inner="eager", strict=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="planted"):
        model(torch.randn(3, D))


def test_compiles_the_original_where_the_inner_backend_refuses_the_rewritten(monkeypatch):
    calls = []

    def picky(graph_module, example_inputs, config):
        calls.append(graph_module)
        if any("graphfuse" in str(node.target) for node in graph_module.graph.nodes):
            fail()
        return graph_module.forward

    monkeypatch.setattr(backend, "compile_inner", picky)
    model, twin = twins()
    graphfuse.optimize(twin)
    x = torch.randn(5, D)
    with pytest.warns(graphfuse.GraphfuseWarning, match="planted") as caught:
        ours = twin(x)
    assert len(caught) == 1
    torch.testing.assert_close(ours, model(x))
    assert graphfuse.report(twin).counts == {}


def test_keeps_in_place_operations_that_nobody_names():
    def f(x, total):
        total.add_(x.sum())
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    x = torch.randn(4, D)
    ours, theirs = torch.zeros(()), torch.zeros(())
    compiled = graphfuse.optimize(f, inner="eager", strict=True)
    torch.testing.assert_close(compiled(x, ours), f(x, theirs))
    assert torch.equal(ours, theirs)
    assert graphfuse.report(compiled).counts == {"rms_norm": 1}


def test_lets_patterns_ask_about_sizes_that_stay_dynamic(monkeypatch):
    """A question is no promise: only what a rewrite depends on becomes a guard."""
    asked = []

    def find(shadow):
        asked.append(bool(shadow.values[0].tensor.shape[0] == 3))
        yield from ()

    monkeypatch.setattr(backend, "CATALOGUE", (Pattern("asks", find),))
    compiled = graphfuse.optimize(lambda x: x.sin(), inner="eager", dynamic=True, strict=True)
    for length in (3, 5, 8):
        compiled(torch.randn(length, D))
    assert asked == [True]


def test_proves_equal_layers_once(monkeypatch):
    runs = []
    original = certify._Trial.run
    monkeypatch.setattr(certify._Trial, "run", lambda self: runs.append(self) or original(self))
    model = graphfuse.optimize(Stack(6), inner="eager", strict=True)
    model(torch.randn(3, D))
    assert graphfuse.report(model).counts == {"rms_norm": 6, "glu": 6}
    assert len(runs) <= 4  # the first layer's input takes no gradient
