"""Attention written by hand under masks that depend on inputs, and everything else that stays as it was written."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse.kernels.causal_attention import paths

B, HEADS, GROUPS, S, D = 2, 4, 2, 9, 16
LOWEST = torch.finfo(torch.float32).min
RIGHT = torch.ones(B, S, dtype=torch.int64)
RIGHT[1, S - 3 :] = 0
LEFT = RIGHT.flip(1)
PACKED = torch.cat((torch.arange(4), torch.arange(S - 4))).expand(B, S)


def inputs(dtype=torch.float32, groups=HEADS):
    shapes = ((B, HEADS, S, D), (B, groups, S, D), (B, groups, S, D))
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def triangle(length=S):
    return torch.ones(length, length, dtype=torch.bool).tril()


def buffered(q, k, v, bias):
    length = q.shape[2]
    scores = q @ k.transpose(-2, -1) * 0.25
    return scores.masked_fill(bias[:, :, :length, :length] == 0, float("-inf")).softmax(-1) @ v


def buffered_upper(q, k, v, hidden):
    return (q @ k.mT * 0.25).masked_fill(hidden[:S, :S], -1e9).softmax(-1) @ v


def added_buffer(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias[None, :S, :S]).softmax(-1) @ v


def padded(q, k, v, padding):
    scores = q @ k.mT * 0.25
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~triangle(q.shape[2]), lowest)
    return scores.masked_fill(padding[:, None, None, :] == 0, lowest).softmax(-1) @ v


def padded_additive(q, k, v, padding):
    hidden = (1.0 - padding[:, None, None, :].to(q.dtype)) * LOWEST
    mask = (torch.full((q.shape[2], q.shape[2]), LOWEST, dtype=q.dtype).triu(1) + hidden).clamp_min(LOWEST)
    k, v = (x[:, :, None].expand(B, GROUPS, 2, -1, D).reshape(B, HEADS, -1, D) for x in (k[:, :GROUPS], v[:, :GROUPS]))
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


def both(q, k, v, padding):
    scores = torch.where(triangle(q.shape[2]), q @ k.mT * 0.25, -1e9)
    return (scores + (1 - padding[:, None, None, :].to(q.dtype)) * -1e9).softmax(-1) @ v


def flattened(q, k, v, padding):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    seen = (triangle() & (padding[:, None, None, :] != 0)).expand(B, HEADS, S, S).reshape(B * HEADS, S, S)
    return torch.bmm(torch.where(seen, torch.bmm(q, k.mT) / 4, -1e9).softmax(-1), v).view(B, HEADS, S, D)


def documents(q, k, v, positions):
    number = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = number[:, None, None, :] == number[:, None, :, None]
    return torch.where(triangle(q.shape[2]) & same, q @ k.mT / 4, LOWEST).softmax(-1) @ v


ONES = torch.ones(2 * S, 2 * S)
DEPENDING = [
    (buffered, ONES.tril()[None, None], [(ONES.tril() * (torch.arange(2 * S) != 2))[None, None] + torch.eye(2 * S)]),
    (buffered_upper, ONES.triu(1).bool(), [ONES.triu(2).bool()]),
    (added_buffer, torch.full((2 * S, 2 * S), -torch.inf).triu(1), [torch.randn(2 * S, 2 * S)]),
    (padded, torch.ones(B, S, dtype=torch.int64), [RIGHT]),
    (padded_additive, torch.ones(B, S, dtype=torch.int64), [RIGHT]),
    (both, torch.ones(B, S, dtype=torch.int64), [RIGHT]),
    (flattened, torch.ones(B, S, dtype=torch.int64), [RIGHT]),
    (documents, torch.arange(S).expand(B, S), [PACKED]),
]


@pytest.mark.parametrize(("spelling", "harmless", "others"), DEPENDING, ids=lambda x: getattr(x, "__name__", None))
def test_looks_at_masks_that_depend_on_an_input(spelling, harmless, others, verify, agrees):
    """What is compiled once serves masks that are causal and masks that are not."""
    report = verify(spelling, (*inputs(), harmless))
    assert report.counts == {"attention": 1}, report
    assert report.rewritten[0].variant.startswith("mask looked at on every call")
    compiled = graphfuse.optimize(spelling, inner="eager", fullgraph=True, strict=True)
    for mask, path in [(harmless, "causal"), *((other, "masked") for other in others), (harmless, "causal")]:
        before = paths.copy()
        agrees(compiled, spelling, (*inputs(), mask))
        assert set(paths - before) == {path}


@pytest.mark.parametrize("hide", [LOWEST, -1e9, -1e4])
def test_rows_that_see_nothing_come_out_as_written(hide, agrees):
    """Where all is hidden behind one number, all weights are equal."""

    def padded(q, k, v, padding):
        seen = triangle() & (padding[:, None, None, :] != 0)
        return (q @ k.mT / 4).masked_fill(~seen, hide).softmax(-1) @ v

    compiled = graphfuse.optimize(padded, inner="eager", fullgraph=True, strict=True)
    for padding in (torch.ones_like(LEFT), LEFT):
        agrees(compiled, padded, (*inputs(), padding))
    assert graphfuse.report(compiled).counts == {"attention": 1}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_looks_once_for_all_layers(inner, agrees, counts_calls):
    def layers(q, k, v, padding):
        seen = triangle() & (padding[:, None, None, :] != 0)
        for _ in range(3):
            q = q + (q @ k.mT / 4).masked_fill(~seen, -1e9).softmax(-1) @ v
        return q

    compiled = graphfuse.optimize(layers, inner=inner, fullgraph=True, strict=True)
    for padding in (torch.ones_like(RIGHT), RIGHT):
        agrees(compiled, layers, (*inputs(), padding))
        with counts_calls() as calls:
            compiled(*inputs(), padding)
        assert (calls["is_lower_triangle"], calls["causal_attention"]) == (1, 3)


def of_width(q, k, v, width):
    rows = torch.arange(S)
    seen = (rows[None, :] <= rows[:, None]) & (rows[:, None] - rows[None, :] < width)
    return (q @ k.mT * 0.25).masked_fill(~seen, -1e9).softmax(-1) @ v


def test_a_width_that_is_given_may_be_another_one_next_time(agrees):
    compiled = graphfuse.optimize(of_width, inner="eager", dynamic=True, strict=True)
    for width in (20, 6, 3):
        agrees(compiled, of_width, (*inputs(), width))
    assert graphfuse.report(compiled).counts == {"attention": 1}


def causal(q, k, v):
    length = q.shape[2]
    scores = (q @ k.transpose(2, 3) * 0.25).masked_fill(~triangle(length), -1e9)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewrites_in(dtype, autocast, inner, verify):
    report = verify(causal, inputs(dtype), autocast=autocast, inner=inner)
    assert report.counts == {"attention": 1}, report


def test_rewrites_under_autocast_with_a_mask_to_look_at(verify):
    report = verify(padded, (*inputs(), RIGHT), autocast=True)
    assert report.counts == {"attention": 1}, report


@pytest.mark.parametrize(("spelling", "more"), [(causal, ()), (padded, (RIGHT,)), (documents, (PACKED,))])
def test_keeps_the_sequence_dynamic(spelling, more, verify, agrees):
    """The mask depends on a size that is not known, and so it is looked at."""
    report = verify(spelling, (*inputs(), *more), dynamic=True)
    assert report.counts == {"attention": 1}, report
    assert "looked at on every call" in report.rewritten[0].variant
    compiled = graphfuse.optimize(spelling, inner="eager", fullgraph=True, strict=True, dynamic=True)
    for length in (S, S - 2):
        shorter = [x[:, :, :length].detach().requires_grad_() for x in inputs()]
        agrees(compiled, spelling, (*shorter, *(x[:, :length].contiguous() for x in more)))


def test_rewrites_in_checkpoints(agrees):
    def kept(q, k, v):
        return checkpoint(causal, q, k, v, use_reentrant=False)

    compiled = graphfuse.optimize(kept, inner="aot_eager", fullgraph=True, strict=True)
    agrees(compiled, kept, inputs())
    assert graphfuse.report(compiled).counts == {"attention": 1}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rewrites_without_gradients(mode):
    compiled = graphfuse.optimize(causal, inner="aot_eager", fullgraph=True, strict=True)
    with mode():
        states = [x.detach() for x in inputs()]
        torch.testing.assert_close(compiled(*states), causal(*states))
    assert graphfuse.report(compiled).counts == {"attention": 1}


def returned(q, k, v):
    weights = (q @ k.mT / 4).masked_fill(~triangle(), -1e9).softmax(-1)
    return weights @ v, weights


def read(q, k, v):
    scores = (q @ k.mT / 4).masked_fill(~triangle(), -1e9)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def capped(q, k, v):
    scores = torch.tanh(q @ k.mT / 4 / 50.0) * 50.0
    return scores.masked_fill(~triangle(), -1e9).softmax(-1) @ v


def with_sinks(q, k, v):
    scores = (q @ k.mT / 4).masked_fill(~triangle(), -1e9)
    scores = torch.cat((scores, torch.zeros(B, HEADS, S, 1)), -1)
    return (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def dropped(q, k, v):
    return F.dropout((q @ k.mT / 4).masked_fill(~triangle(), -1e9).softmax(-1), 0.1) @ v


def weighted(q, k, v):
    return ((q @ k.mT / 4).softmax(-1) * torch.rand(HEADS, 1, 1)) @ v


def windowed(q, k, v):
    return (q @ k.mT / 4).masked_fill(~triangle().triu(-3), -1e9).softmax(-1) @ v


def with_slopes(q, k, v):
    distance = torch.arange(S)[None, :] - torch.arange(S)[:, None]
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    return (q @ k.mT / 4 + distance * slopes[:, None, None]).masked_fill(~triangle(), -1e9).softmax(-1) @ v


def decoded(q, k, v):
    return (q[:, :, -1:] @ k.mT / 4).softmax(-1) @ v


def continued(q, k, v):
    return (q[:, :, -4:] @ k.mT / 4).masked_fill(~triangle()[-4:], -1e9).softmax(-1) @ v


def strictly(q, k, v):
    return (q @ k.mT / 4).masked_fill(~triangle().tril(-1), -1e9).softmax(-1) @ v


def faintly(q, k, v):
    return (q @ k.mT / 4).masked_fill(~triangle(), -100.0).softmax(-1) @ v


def hardly_multiplied(q, k, v):
    seen = torch.ones(S, S).tril() * 0.5
    return (q @ k.mT / 4 * seen + torch.full((S, S), -1e9).triu(1)).softmax(-1) @ v


def with_tensor_as_scale(q, k, v):
    return (q @ k.mT * torch.rand(HEADS, 1, 1)).softmax(-1) @ v


def wider_values(q, k, v):
    return (q @ k.mT / 4).masked_fill(~triangle(), -1e9).softmax(-1) @ torch.cat((v, v), -1)


REFUSED = [
    (returned, "weights: expected no use besides the product with the values, got an output of the graph"),
    (read, "weights: expected no use besides the product with the values, got aten.logsumexp.default in logsumexp"),
    (capped, "scores: expected scales and masks of a product, got aten.tanh.default"),
    (with_sinks, "scores: expected scales and masks of a product, got aten.cat.default"),
    (dropped, "dropout_p: expected 0, got 0.1"),
    (weighted, "weights: expected a softmax as it is, got aten.mul.Tensor of it"),
    (windowed, "mask: expected the lower triangle, got another constant"),
    (with_slopes, "mask: expected the lower triangle, got another constant"),
    (strictly, "mask: expected the lower triangle, got another constant"),
    (decoded, "scores: expected as many queries as keys, got 1 and 9"),
    (continued, "scores: expected as many queries as keys, got 4 and 9"),
    (faintly, "mask: expected to hide with a number of at most -9000, got -100"),
    (hardly_multiplied, "mask: expected the lower triangle, got another constant"),
    (with_tensor_as_scale, "scores: expected to be multiplied by a number, got a tensor of shape (4, 1, 1)"),
    (wider_values, "value: expected 16 features a head, as queries have, got 32"),
]


@pytest.mark.parametrize(("lookalike", "reason"), REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_refuses(lookalike, reason):
    compiled = graphfuse.optimize(lookalike, inner="eager", fullgraph=True, strict=True)
    compiled(*inputs())
    assert [site.reason for site in graphfuse.report(compiled).refused] == [reason]
    assert not graphfuse.report(compiled).rewritten


def test_refuses_biases_that_are_learned(verify):
    report = verify(added_buffer, (*inputs(), torch.randn(S, S).requires_grad_()))
    assert [site.reason for site in report.refused] == [
        "mask: expected one that needs no gradient, got one that requires it"
    ]


def padding_alone(q, k, v, padding):
    return (q @ k.mT / 4).masked_fill(padding[:, None, None, :] == 0, LOWEST).softmax(-1) @ v


def multiplied_by_padding(q, k, v, padding):
    seen = triangle().float() * padding[:, None, None, :]
    return (q @ k.mT / 4 * seen - 1e4 * (1 - seen)).softmax(-1) @ v


@pytest.mark.parametrize(
    ("lookalike", "reason"),
    [
        (padding_alone, "mask: expected the lower triangle, got another one even where nothing is padded"),
        (multiplied_by_padding, f"scores: expected to be multiplied by a number, got a tensor of shape {(B, 1, S, S)}"),
    ],
)
def test_refuses_padding_that_is_not_what_it_seems(lookalike, reason, verify):
    assert [site.reason for site in verify(lookalike, (*inputs(), RIGHT)).refused] == [reason]


def test_refuses_factors_of_sizes_that_are_not_known(verify):
    def multiplied(q, k, v):
        seen = torch.ones(q.shape[2], q.shape[2]).tril()
        return (q @ k.mT / 4 * seen - 1e4 * (1 - seen)).softmax(-1) @ v

    (site,) = verify(multiplied, inputs(), dynamic=True).refused
    assert site.reason == f"scores: expected to be multiplied by a number, got a tensor of shape {(S, S)}"


@pytest.mark.parametrize(
    ("dtype", "features", "reason"),
    [
        (torch.float64, D, "query: expected float16, bfloat16 or float32, got float64"),
        (torch.float32, 264, "query: expected at most 256 features a head, got 264"),
    ],
)
def test_refuses_what_the_kernels_do_not_take(dtype, features, reason):
    states = [torch.randn(1, 2, S, features, dtype=dtype).requires_grad_() for _ in range(3)]
    compiled = graphfuse.optimize(causal, inner="eager", fullgraph=True, strict=True)
    compiled(*states)
    assert [site.reason for site in graphfuse.report(compiled).refused] == [reason]


def test_refuses_queries_of_another_dtype():
    def mixed(q, k, v):
        return (q.double() @ k.double().mT / 4).softmax(-1).to(v.dtype) @ v

    q, k, v = inputs()
    compiled = graphfuse.optimize(mixed, inner="eager", fullgraph=True, strict=True)
    compiled(q.detach().double().requires_grad_(), k, v)
    reason = "query, key, value: expected one dtype, that of the result, got float64, float64, float32"
    assert [site.reason for site in graphfuse.report(compiled).refused] == [reason]


def test_refuses_what_one_function_of_torch_does():
    attend = torch.nn.MultiheadAttention(HEADS * D, HEADS, batch_first=True)

    def with_weights(x):
        return attend(x, x, x, attn_mask=torch.full((S, S), -torch.inf).triu(1))[0]

    compiled = graphfuse.optimize(with_weights, inner="eager", fullgraph=True, strict=True)
    compiled(torch.randn(B, S, HEADS * D))
    (site,) = graphfuse.report(compiled).refused
    assert site.reason.startswith("input: expected the result of a graph node, got a value inside ")
    assert "need_weights=False" in site.hint


def test_leaves_a_softmax_over_experts_alone(verify):
    def routed(x, router, experts):
        return torch.einsum("bse,bsed->bsd", (x @ router).softmax(-1), torch.einsum("bsd,edf->bsef", x, experts))

    x, router, experts = torch.randn(B, S, D), torch.randn(D, 3), torch.randn(3, D, D)
    report = verify(routed, tuple(tensor.requires_grad_() for tensor in (x, router, experts)))
    assert report.sites == []
