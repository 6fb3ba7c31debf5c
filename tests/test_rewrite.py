"""Putting a replacement into a graph: what it may cross, what stays, and in which layout."""

import pytest
import torch
import torch.nn.functional as F

import graphfuse

D = 16


def norm(x, weight=None, eps=1e-5):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


@pytest.fixture
def compiled_graph():
    """Compile a function; return its result, its report and the graph that the inner backend was given."""
    from torch._dynamo.backends.registry import register_backend

    graphs = []

    def keep(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    register_backend(compiler_fn=keep, name="keep_graph")

    def run(fn, *inputs):
        compiled = graphfuse.optimize(fn, inner="keep_graph", fullgraph=True, strict=True)
        result = compiled(*inputs)
        (graph_module,) = graphs
        return result, graphfuse.report(compiled), graph_module.graph

    yield run
    torch._dynamo.backends.registry._BACKENDS.pop("keep_graph")
    torch._dynamo.backends.registry._COMPILER_FNS.pop("keep_graph")


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op.startswith("call")]


def test_leaves_nothing_of_the_region(compiled_graph):
    x, weight = torch.randn(3, D), torch.randn(D)
    result, report, graph = compiled_graph(norm, x, weight)
    assert targets(graph) == ["graphfuse.rms_norm.default"]
    torch.testing.assert_close(result, norm(x, weight))
    (op,) = (node for node in graph.nodes if node.op == "call_function")
    assert "norm" in op.meta["stack_trace"]
    assert report.sites[0].source.endswith(f"test_rewrite.py:{norm.__code__.co_firstlineno + 2}")


def test_leaves_no_cast_that_does_nothing(compiled_graph):
    """Such a node returns the tensor that it is given, and all that was computed for it would stay, too."""

    def fn(x):
        return x * torch.rsqrt(x.pow(2).to(x.dtype).mean(-1, keepdim=True).float() + 1e-5)

    _, _, graph = compiled_graph(fn, torch.randn(3, D))
    assert targets(graph) == ["graphfuse.rms_norm.default"]


def test_leaves_what_others_read(compiled_graph):
    def fn(x):
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + 1e-5), mean

    x = torch.randn(3, D)
    result, _, graph = compiled_graph(fn, x)
    assert "graphfuse.rms_norm.default" in targets(graph)
    assert "mean" in targets(graph)
    assert not any("rsqrt" in target for target in targets(graph))
    torch.testing.assert_close(result, fn(x))


def test_leaves_in_place_operations_whose_result_nobody_names(compiled_graph):
    def fn(x, total):
        y = norm(x)
        total.add_(y.sum())
        y.mul_(2)
        return y

    x, ours, theirs = torch.randn(3, D), torch.zeros(()), torch.zeros(())
    result, report, graph = compiled_graph(fn, x, ours)
    assert {"add_", "mul_"} <= set(targets(graph))
    torch.testing.assert_close(result, fn(x, theirs))
    torch.testing.assert_close(ours, theirs)
    assert report.counts == {"rms_norm": 1}


def test_changes_what_a_caller_sees_through_a_view(compiled_graph):
    def fn(x):
        x[1:].mul_(2)
        y = norm(x)
        x[:1].add_(1)
        return y

    ours = torch.randn(3, D)
    theirs = ours.clone()
    result, report, _ = compiled_graph(fn, ours)
    torch.testing.assert_close(result, fn(theirs))
    torch.testing.assert_close(ours, theirs)
    assert report.counts == {"rms_norm": 1}


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "permuted": lambda x: x.permute(2, 0, 1),
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "sliced": lambda x: x[..., 2:],
    "strided rows": lambda x: x[:, ::2],
    "one row": lambda x: x[:1, :1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_keeps_the_layout_of_results(layout, inner):
    """Somebody may view them."""

    def fn(x):
        return norm(LAYOUTS[layout](x))

    x = torch.randn(4, 6, D, requires_grad=True)
    compiled = graphfuse.optimize(fn, inner=inner, fullgraph=True, strict=True)
    ours, theirs = compiled(x), fn(x)
    torch.testing.assert_close(ours, theirs)
    sizes = [d for d in range(ours.dim()) if ours.shape[d] > 1]
    assert [ours.stride(d) for d in sizes] == [theirs.stride(d) for d in sizes]
    gradients = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(*gradients)
    assert graphfuse.report(compiled).counts == {"rms_norm": 1}


def test_lets_later_views_work(compiled_graph):
    def fn(x):
        return norm(x.transpose(1, 2)).transpose(1, 2).view(-1, 4 * D)

    x = torch.randn(2, 3, 4, D)
    result, report, _ = compiled_graph(fn, x)
    torch.testing.assert_close(result, fn(x))
    assert report.counts == {"rms_norm": 1}


def test_makes_casts_inside_a_node_again(compiled_graph):
    """Under autocast an input of a region may be a cast that only the dispatcher has seen."""
    x, gate, up = torch.randn(3, D), torch.randn(D, D), torch.randn(D, D)

    def fn(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    with torch.autocast("cpu", torch.bfloat16):
        result, report, graph = compiled_graph(fn, x, gate, up)
        torch.testing.assert_close(result, fn(x, gate, up))
    assert report.counts == {"glu": 1}
    assert "graphfuse.glu.default" in targets(graph)


@pytest.mark.parametrize("region", ["all", "half"])
def test_respects_grad_mode(region, compiled_graph):
    def fn(x):
        with torch.no_grad():
            rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            y = x * rstd if region == "all" else x
        return (y if region == "all" else x * rstd) + x

    x = torch.randn(3, D, requires_grad=True)
    result, report, _ = compiled_graph(fn, x)
    torch.testing.assert_close(result, fn(x))
    gradients = (torch.autograd.grad(y.sum(), x)[0] for y in (result, fn(x)))
    torch.testing.assert_close(*gradients)
    assert report.counts == ({"rms_norm": 1} if region == "all" else {})


def test_rewrites_one_of_two_overlapping_regions_at_most(compiled_graph):
    """A statistic that serves two tensors of equal value is one norm for each of them."""

    def fn(x, first, second):
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x * rstd * first, x * rstd * second

    inputs = torch.randn(3, D), torch.randn(D), torch.randn(D)
    result, report, _ = compiled_graph(fn, *inputs)
    torch.testing.assert_close(result, fn(*inputs))
    assert report.notes == []
    assert sum(site.status == "rewritten" for site in report.sites) >= 1
