"""Attention by the kernel that was measured to be the fastest: in the graph, and in what the report says."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse import backend, policy
from graphfuse.kernels import _sdpa_times
from graphfuse.kernels._sdpa_times import Times
from graphfuse.patterns import _attention_kernels

B, HEADS, GROUPS, S, D = 2, 4, 2, 9, 16
COS, SIN = torch.randn(2, S, D)
CAUSAL = Times("cudnn", {"flash": 2.944, "cudnn": 2.131, "efficient": 5.4})
MASKED = Times("efficient", {"cudnn": 9.21, "efficient": 7.0})
PADDING = torch.ones(B, S, dtype=torch.int64)
TOLD = "cuDNN 2.13 ms, flash attention 2.94 ms, memory-efficient attention 5.4 ms"


def inputs(*, trains=True):
    shapes = ((B, HEADS, S, D), (B, GROUPS, S, D), (B, GROUPS, S, D))
    return tuple(torch.randn(shape, requires_grad=trains) for shape in shapes)


def repeated(x):
    return x.repeat_interleave(HEADS // GROUPS, 1)


def triangle(like):
    return torch.ones(S, S, dtype=torch.bool, device=like.device).tril()


def dropped(q, k, v):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=triangle(q))


def by_hand(q, k, v):
    return (q @ repeated(k).mT / 4).masked_fill(~triangle(q), -torch.inf).softmax(-1) @ repeated(v)


def all_see_all(q, k, v):
    return (q @ repeated(k).mT / 4).softmax(-1) @ repeated(v)


def padded(q, k, v, padding):
    mask = triangle(q) & (padding[:, None, None, :] != 0)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)


def padded_by_hand(q, k, v, padding):
    mask = triangle(q) & (padding[:, None, None, :] != 0)
    return (q @ repeated(k).mT / 4).masked_fill(~mask, -1e9).softmax(-1) @ repeated(v)


@pytest.fixture
def measured(monkeypatch):
    """What was asked of the measurements, which say the same of all sizes."""
    asked = []

    def fastest(query, key, value, mask=None, **options):
        shapes = [tuple(x.shape) for x in (query, key, value)]
        asked.append((*shapes, None if mask is None else tuple(mask.shape), options))
        return CAUSAL if mask is None else MASKED

    monkeypatch.setattr(_attention_kernels, "fastest", fastest)
    return asked


@pytest.fixture
def order(monkeypatch, measured):
    """What happens around a choice, in its order."""
    happened = []

    def noted(module, name, note):
        function = getattr(module, name)

        def noting(*args, **options):
            happened.append(note(*args))
            return function(*args, **options)

        monkeypatch.setattr(module, name, noting)

    noted(_attention_kernels, "load", lambda *_: "load")
    noted(_attention_kernels, "fastest", lambda *_: "choose")
    noted(backend, "certify", lambda match, _: f"prove {match.pattern}")
    noted(backend, "wait_until_loaded", lambda: "wait")
    return happened


def normed(q, k, v):
    return F.rms_norm(dropped(q, k, v), (D,), eps=1e-6)


def turned(x):
    """Rotated, all features joined anew: heads outside the tokens in memory, wherever they were."""
    first, second = x.chunk(2, -1)
    return torch.cat([x * COS + torch.cat([-second, first], -1) * SIN, x[..., D:]], -1)


def of_packed(packed):
    """Queries, keys and values are parts of one tensor, (B, S, 3 * HEADS * D)."""
    q, k, v = (part.unflatten(-1, (HEADS, D)).transpose(1, 2) for part in packed.chunk(3, -1))
    return F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=triangle(q))


def of_packed_and_seen(packed):
    """The same, and the caller looks at the rotated queries through a view."""
    q, k, v = (part.unflatten(-1, (HEADS, D)).transpose(1, 2) for part in packed.chunk(3, -1))
    q = turned(q)
    return F.scaled_dot_product_attention(q, turned(k), v, attn_mask=triangle(q)), q.view(B, -1)


@pytest.mark.parametrize(("fn", "copies"), [(of_packed, 0), (of_packed_and_seen, 1)])
def test_states_are_copied_into_no_layout_that_nobody_counts_on(fn, copies, measured, verify, monkeypatch):
    graphs = []
    compile_inner = backend.compile_inner
    monkeypatch.setattr(backend, "compile_inner", lambda gm, *args: graphs.append(gm) or compile_inner(gm, *args))
    report = verify(fn, (torch.randn(B, S, 3 * HEADS * D, requires_grad=True),))
    assert report.counts == {"causal_attention": 1, "rope": 2}
    rotated = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.graphfuse.rope.default)
    assert len(rotated) == 2
    assert sum(user.target == "contiguous" for node in rotated for user in node.users) == copies


@pytest.mark.parametrize("fn", [normed, padded, padded_by_hand])
def test_loads_kernels_before_it_proves_and_chooses(fn, order, verify):
    more = (PADDING,) if fn is not normed else ()
    verify(fn, (*inputs(), *more))
    ways = 1 + len(more)  # the causal kernel, and the one that reads the mask
    assert order == ["load", *(["prove rms_norm"] if fn is normed else []), *["choose"] * ways, "wait"]


def test_loads_nothing_where_nothing_is_chosen(order, verify):
    verify(normed, inputs(), policy="always")
    assert order == ["wait"]


def test_waits_for_what_is_loaded_whatever_happens(order, verify, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no rewrite")

    monkeypatch.setattr(backend, "gather", fails)
    with pytest.raises(RuntimeError, match="no rewrite"):
        verify(dropped, inputs())
    assert order == ["load", "choose", "wait"]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("fn", [dropped, by_hand, all_see_all])
def test_calls_the_fastest(fn, inner, measured, verify, counts_calls):
    with counts_calls() as calls:
        report = verify(fn, inputs(), inner=inner)
    (site,) = report.rewritten
    assert site.variant.endswith(", grouped, float32, by cuDNN")
    assert site.params["kernel"] == "cudnn"
    assert site.kernel == "graphfuse::attention"
    assert site.kernel_reason.endswith(f"; in PyTorch's cuDNN, measured forward and backward: {TOLD}")
    assert calls["attention"]
    assert calls["attention_backward"]
    shapes = ((B, HEADS, S, D), (B, GROUPS, S, D), (B, GROUPS, S, D))
    assert measured == [(*shapes, None, {"is_causal": fn is not all_see_all, "trains": True})]


@pytest.mark.parametrize("fn", [padded, padded_by_hand])
def test_calls_the_fastest_of_each_way(fn, measured, verify, agrees):
    report = verify(fn, (*inputs(), PADDING))
    (site,) = report.rewritten
    assert site.variant.endswith(", grouped, float32, causal by cuDNN, masked by memory-efficient attention")
    assert (site.params["causal_kernel"], site.params["masked_kernel"]) == ("cudnn", "efficient")
    assert f"; causal, in PyTorch's cuDNN, measured forward and backward: {TOLD}; masked, in" in site.kernel_reason
    assert site.kernel_reason.endswith("memory-efficient attention 7 ms, cuDNN 9.21 ms")
    assert [mask and mask[-2:] for *_, mask, _ in measured] == [None, (S, S)]
    compiled = graphfuse.optimize(fn, inner="aot_eager", strict=True)
    for padding in (PADDING, PADDING.clone().index_fill_(1, torch.tensor([S - 1]), 0)):
        agrees(compiled, fn, (*inputs(), padding))


def test_counts_the_forward_alone_where_nothing_is_trained(measured, verify):
    report = verify(dropped, inputs(trains=False))
    assert "measured forward: cuDNN 2.13 ms" in report.rewritten[0].kernel_reason
    assert [options["trains"] for *_, options in measured] == [False]


def test_shows_what_was_measured_everywhere(measured, verify):
    report = verify(dropped, inputs())
    for shown in (report.to_text(details=True), report.to_markdown(), report.to_html()):
        assert TOLD in " ".join(shown.split())
    assert "by cuDNN" in report.to_text()
    assert graphfuse.Report.from_dict(report.to_dict()).sites == report.sites


def test_measures_in_checkpoints(measured, verify):
    report = verify(lambda q, k, v: checkpoint(dropped, q.sin(), k, v, use_reentrant=False), inputs())
    assert report.rewritten[0].variant.endswith("by cuDNN")


def test_leaves_it_to_pytorch_where_told(measured, verify):
    report = verify(dropped, inputs(), policy="always")
    assert report.rewritten[0].variant.endswith("grouped, float32")
    assert report.rewritten[0].params["kernel"] == ""
    assert measured == []


@pytest.mark.parametrize("inside", [False, True], ids=["", "checkpointed"])
def test_leaves_it_to_the_code_where_that_chooses(inside, measured, verify):
    def fn(q, k, v):
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            return checkpoint(dropped, q.sin(), k, v, use_reentrant=False) if inside else dropped(q, k, v)

    report = verify(fn, inputs())
    assert report.rewritten[0].variant.endswith("grouped, float32")
    assert measured == []


def test_leaves_it_to_pytorch_where_the_kernel_is_not_proved(measured, verify, monkeypatch):
    monkeypatch.setattr(policy, "certify", lambda *_: "certify: expected the same output, got another")
    report = verify(dropped, inputs())
    assert report.rewritten[0].params["kernel"] == ""


@pytest.mark.parametrize("fn", [dropped, by_hand, all_see_all, padded, padded_by_hand])
def test_measures_no_sizes_that_change(fn, verify, monkeypatch):
    """What is handed over has symbols for sizes then, or is not on a GPU."""
    asked = []

    def is_measurable(tensors):
        asked.extend(tensors)
        return False

    monkeypatch.setattr(_sdpa_times, "_is_measurable", is_measurable)
    more = (PADDING,) if fn in {padded, padded_by_hand} else ()
    report = verify(fn, (*inputs(), *more), dynamic=True)
    assert len(report.rewritten) == 1
    assert all(not isinstance(tensor.shape[0], int) for tensor in asked[:3])
    monkeypatch.undo()
    assert not _sdpa_times._is_measurable(asked)


@pytest.mark.gpu
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("fn", [dropped, by_hand, padded])
def test_measured_choices_agree_with_eager(fn, inner, verify, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_sdpa_times, "_known", {})
    states = tuple(x.detach().cuda().bfloat16().requires_grad_() for x in inputs())
    report = verify(fn, (*states, *((PADDING.cuda(),) if fn is padded else ())), inner=inner)
    (site,) = report.rewritten
    assert " by " in site.variant
    assert "measured forward and backward: " in site.kernel_reason


@pytest.mark.gpu
def test_measured_choices_fit_cuda_graphs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_sdpa_times, "_known", {})
    states = tuple(x.detach().cuda().bfloat16().requires_grad_() for x in inputs())
    compiled = graphfuse.optimize(dropped, mode="reduce-overhead", strict=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*states)
        torch.testing.assert_close(out, dropped(*states), rtol=2e-2, atol=2e-2)
        out.sum().backward()
        for x in states:
            x.grad = None  # in memory of the graph
    assert " by " in graphfuse.report(compiled).rewritten[0].variant
