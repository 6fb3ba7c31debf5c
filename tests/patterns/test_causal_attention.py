"""Attention under a mask: what is the plain causal one is told so, what is not keeps its mask."""

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse.kernels.causal_attention import paths

B, HEADS, GROUPS, S, D = 2, 4, 2, 9, 16


def inputs():
    shapes = ((B, HEADS, S, D), (B, GROUPS, S, D), (B, GROUPS, S, D))
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def repeated(x):
    return x[:, :, None].expand(B, GROUPS, HEADS // GROUPS, S, D).reshape(B, HEADS, S, D)


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)


def triangle(q, k, v):
    return attend(q, k, v, torch.ones(S, S, dtype=torch.bool).tril()[None, None])


def of_positions(q, k, v):
    rows = torch.arange(S)
    return attend(q, k, v, (rows[None, :] <= rows[:, None]).expand(B, 1, S, S))


def additive(q, k, v):
    mask = torch.full((S, S), torch.finfo(torch.float32).min).triu(1)
    return attend(q, k, v, mask.expand(B, 1, S, S))


def of_width(q, k, v, width):
    rows = torch.arange(S)
    return attend(q, k, v, (rows[None, :] <= rows[:, None]) & (rows[:, None] - rows[None, :] < width))


def wide_window(q, k, v):
    return of_width(q, k, v, 4096)


def one_document(q, k, v):
    rows = torch.arange(S)
    document = (torch.diff(rows, prepend=rows[:1] - 1) != 1).cumsum(0)
    return attend(q, k, v, (rows[None, :] <= rows[:, None]) & (document[None, :] == document[:, None]))


@torch._dynamo.allow_in_graph
def unsqueezed(x):
    """One node of the graph, that slices first: so does `x[:, :, None]` under some of torch's tracing modes."""
    return torch.ops.aten.slice.Tensor(x, 2, 0, 2**63 - 1).unsqueeze(2)


def sliced_inside_a_node(q, k, v):
    k, v = (unsqueezed(x).expand(B, GROUPS, HEADS // GROUPS, S, D).reshape(B, HEADS, S, D) for x in (k * 1, v * 1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(S, S, dtype=torch.bool).tril())


SPELLINGS = [triangle, of_positions, additive, wide_window, one_document, sliced_inside_a_node]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rewrites(spelling, verify):
    report = verify(spelling, inputs())
    assert report.counts == {"causal_attention": 1}, report
    assert "grouped" in report.rewritten[0].variant


def window(q, k, v):
    return of_width(q, k, v, 4)


def strictly_below(q, k, v):
    rows = torch.arange(S)
    return attend(q, k, v, (rows[None, :] < rows[:, None]) | (rows[:, None] == 0))


def upper(q, k, v):
    return attend(q, k, v, torch.ones(S, S, dtype=torch.bool).triu())


@pytest.mark.parametrize("lookalike", [window, strictly_below, upper])
def test_refuses_other_constants(lookalike, verify):
    report = verify(lookalike, inputs())
    assert [site.reason for site in report.refused] == ["mask: expected the lower triangle, got another constant"]


def padded(q, k, v, padding):
    return attend(q, k, v, torch.ones(S, S, dtype=torch.bool).tril() & (padding[:, None, None, :] != 0))


def padded_additive(q, k, v, padding):
    lowest = torch.finfo(q.dtype).min
    hidden = (1.0 - padding[:, None, None, :].to(q.dtype)) * lowest
    mask = torch.full((S, S), lowest, dtype=q.dtype).triu(1)
    return attend(q, k, v, (mask + hidden).clamp_min(lowest))


def documents(q, k, v, positions):
    rows = torch.arange(S)
    number = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = number[:, None, None, :] == number[:, None, :, None]
    return attend(q, k, v, (rows[None, :] <= rows[:, None]) & same)


def given(q, k, v, mask):
    return attend(q, k, v, mask)


FULL = torch.ones(S, S, dtype=torch.bool).tril().expand(B, 1, S, S)
LEFT, RIGHT = torch.ones(B, S, dtype=torch.int64), torch.ones(B, S, dtype=torch.int64)
RIGHT[1, S - 3 :] = 0
LEFT[1, :3] = 0
PACKED = torch.cat((torch.arange(4), torch.arange(S - 4))).expand(B, S)
DEPENDING = [
    (padded, torch.ones(B, S, dtype=torch.int64), [RIGHT]),
    (padded, torch.ones(B, S, dtype=torch.bool), [RIGHT.bool()]),
    (padded_additive, torch.ones(B, S, dtype=torch.int64), [RIGHT]),
    (documents, torch.arange(S).expand(B, S), [PACKED]),
    (given, FULL, [FULL & RIGHT[:, None, None].bool()]),
    (given, torch.zeros(B, 1, S, S).masked_fill(~FULL, -torch.inf), [torch.randn(B, 1, S, S)]),
]


@pytest.mark.parametrize("is_given", [False, True])
def test_proves_long_sequences_on_short_ones(is_given):
    """A mask of 4096 x 4096 numbers is more than a proof may take."""
    length = 4096

    def long(q, k, v, *given):
        mask = given[0] if given else torch.full((length, length), -1e9).triu(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    states = [torch.randn(1, 1, length, D) for _ in range(3)]
    given = [torch.full((length, length), -1e9).triu(1)] if is_given else []
    compiled = graphfuse.optimize(long, inner="eager", strict=True)
    torch.testing.assert_close(compiled(*states, *given), long(*states, *given), rtol=1e-4, atol=1e-5)
    assert graphfuse.report(compiled).counts == {"causal_attention": 1}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("spelling", "harmless", "others"), DEPENDING, ids=lambda x: getattr(x, "__name__", None))
def test_looks_at_masks_that_depend_on_an_input(spelling, harmless, others, dynamic, verify, agrees):
    """What is compiled once serves masks that are causal and masks that are not."""
    before = paths.copy()
    report = verify(spelling, (*inputs(), harmless), dynamic=dynamic)
    assert report.counts == {"causal_attention": 1}, report
    assert "looked at on every call, grouped" in report.rewritten[0].variant
    assert report.rewritten[0].kernel == "graphfuse::is_lower_triangle, graphfuse::causal_attention"
    assert (paths - before)["causal"]
    compiled = graphfuse.optimize(spelling, inner="eager", dynamic=dynamic, fullgraph=True, strict=True)
    for mask, path in [(harmless, "causal"), *((other, "masked") for other in others), (harmless, "causal")]:
        before = paths.copy()
        agrees(compiled, spelling, (*inputs(), mask))
        assert set(paths - before) == {path}


def test_reports_which_way_calls_went():
    """What a proof has run is not among them."""
    paths.clear()
    compiled = graphfuse.optimize(padded, inner="eager", strict=True)
    compiled(*inputs(), LEFT)
    assert graphfuse.report(compiled).calls == {"causal_attention": {"masked": 1}}
    compiled(*inputs(), torch.ones_like(LEFT))
    report = graphfuse.report(compiled)
    assert report.calls == {"causal_attention": {"masked": 1, "causal": 1}}
    assert graphfuse.Report.from_dict(report.to_dict()).calls == report.calls
    for shown in (report.to_text(), report.to_html(), report.to_markdown().replace("\\", "")):
        assert "calls of causal_attention in this process: masked 1, causal 1" in shown


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_looks_once_for_all_layers(checkpointed, inner, agrees, counts_calls):
    def layers(q, k, v, padding):
        mask = torch.ones(S, S, dtype=torch.bool).tril() & (padding[:, None, None, :] != 0)
        for _ in range(3):
            q = q + (checkpoint(attend, q, k, v, mask, use_reentrant=False) if checkpointed else attend(q, k, v, mask))
        return q

    compiled = graphfuse.optimize(layers, inner=inner, fullgraph=True, strict=True)
    for padding in (torch.ones_like(RIGHT), RIGHT):
        agrees(compiled, layers, (*inputs(), padding))
        with counts_calls() as calls:
            compiled(*inputs(), padding).sum().backward()
        assert calls["is_lower_triangle"] == 1
        assert calls["causal_attention"] >= 3  # and as many in backward, where it is checkpointed


@pytest.mark.parametrize("spelling", [triangle, lambda q, k, v: padded(q, k, v, torch.ones_like(RIGHT))])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewrites_in(dtype, autocast, spelling, verify):
    report = verify(spelling, tuple(x.detach().to(dtype).requires_grad_() for x in inputs()), autocast=autocast)
    assert report.counts == {"causal_attention": 1}, report
    # Grouped heads would sum gradients in bf16 that eager sums in fp32.
    narrows = autocast and dtype == torch.float32
    assert ("grouped" in report.rewritten[0].variant) != narrows


def test_rewrites_under_autocast_with_a_mask_to_look_at(verify):
    report = verify(padded, (*inputs(), RIGHT), autocast=True)
    assert report.counts == {"causal_attention": 1}, report
    assert "looked at on every call, bfloat16" in report.rewritten[0].variant


def test_calls_past_the_dispatcher():
    with fresh_cache():
        compiled = graphfuse.optimize(padded, strict=True)
        result, code = run_and_get_code(compiled, *inputs(), RIGHT)
        _, backward = run_and_get_code(result.sum().backward)
    for op in ("is_lower_triangle", "causal_attention", "causal_attention_backward"):
        assert f"graphfuse.direct.{op}(" in "".join([*code, *backward])


@pytest.mark.parametrize("shape", [(HEADS, S, D), (1, B, HEADS, S, D)])
def test_refuses_other_than_four_dimensions_where_it_looks(shape, verify):
    def fn(q, k, v, padding):
        return F.scaled_dot_product_attention(q, k, v, torch.ones(S, S, dtype=torch.bool).tril() & padding[None, :])

    states = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    report = verify(fn, (*states, torch.ones(S, dtype=torch.bool)))
    assert [site.reason for site in report.refused] == [f"query: expected (B, heads, S, features), got shape {shape}"]


def padded_window(q, k, v, padding):
    rows = torch.arange(S)
    near = (rows[None, :] <= rows[:, None]) & (rows[:, None] - rows[None, :] < 4)
    return attend(q, k, v, near & (padding[:, None, None, :] != 0))


def all_see_all(q, k, v, padding):
    return attend(q, k, v, (padding[:, None, None, :] != 0).expand(B, 1, S, S))


@pytest.mark.parametrize("lookalike", [padded_window, all_see_all])
def test_refuses_what_is_not_causal_even_without_padding(lookalike, verify):
    report = verify(lookalike, (*inputs(), RIGHT))
    (site,) = report.refused
    assert site.reason == "mask: expected the lower triangle, got another one even where nothing is padded"


def test_rewrites_in_a_checkpoint_under_autocast(verify):
    """The region says nothing of it: autocast is around the node that runs it."""

    def fn(q, k, v, padding):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(padded, q.relu(), k.relu(), v.relu(), padding, use_reentrant=False) * 2

    report = verify(fn, (*inputs(), RIGHT), autocast=True)
    (site,) = report.rewritten
    assert site.variant.endswith("bfloat16"), site


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_drops_a_constant_that_a_checkpoint_is_handed(inner, verify):
    def fn(q, k, v):
        mask = torch.ones(S, S, dtype=torch.bool).tril()[None, None]
        for _ in range(2):
            q = checkpoint(attend, q.sin(), k.sin(), v.sin(), mask, use_reentrant=False)
        return q

    report = verify(fn, inputs(), inner=inner)
    assert {site.variant for site in report.rewritten} == {f"mask of {S} positions dropped, grouped, float32"}


def test_refuses_biases_that_are_learned(verify):
    report = verify(given, (*inputs(), torch.randn(B, HEADS, S, S, requires_grad=True)))
    assert [site.reason for site in report.refused] == [
        "mask: expected one that needs no gradient, got one that requires it"
    ]


@pytest.mark.parametrize(("mode", "count"), [(None, 1), ("reduce-overhead", 0)])
@pytest.mark.gpu
def test_leaves_masks_alone_where_cuda_graphs_are_wanted(mode, count):
    q, k, v = (x.detach().cuda().half() for x in inputs())
    mask = FULL.cuda()
    compiled = graphfuse.optimize(given, mode=mode, strict=True)
    torch.testing.assert_close(compiled(q, k, v, mask), given(q, k, v, mask))
    assert len(graphfuse.report(compiled).rewritten) == count
