"""lm_head + cross-entropy: however the loss is reached, rewritten; logits that others need are left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphfuse
from tests.patterns.heads import B, H, S, V, problem


def hf(x, w, bias, y):
    logits = F.linear(x, w).float()
    y = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), y.view(-1), ignore_index=-100)


def shift_by_slice(x, w, bias, y):
    logits = F.linear(x, w).float()
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))


def shift_by_slice_contiguous(x, w, bias, y):
    logits = x @ w.t()
    logits = logits[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, V).float(), y[..., 1:].contiguous().view(-1))


def with_bias(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w, bias).view(-1, V), y.view(-1))


def soft_capped(x, w, bias, y):
    logits = 30.0 * torch.tanh(F.linear(x, w) / 30.0)
    return F.cross_entropy(logits.float().view(-1, V), y.view(-1))


def scaled(x, w, bias, y):
    return F.cross_entropy((F.linear(x, w) * 0.25).float().view(-1, V), y.view(-1))


def divided(x, w, bias, y):
    return F.cross_entropy((F.linear(x, w) / 8.0).view(-1, V).float(), y.view(-1))


def summed(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).float().view(-1, V), y.view(-1), reduction="sum") / 11


def per_token(x, w, bias, y):
    losses = F.cross_entropy(F.linear(x, w).float().view(-1, V), y.view(-1), reduction="none")
    mask = (y.view(-1) != -100).float()
    return (losses * mask).sum() / mask.sum()


def nll(x, w, bias, y):
    return F.nll_loss(F.log_softmax(F.linear(x, w).view(-1, V), dim=-1), y.view(-1))


def module(x, w, bias, y):
    return nn.CrossEntropyLoss(ignore_index=3)(F.linear(x, w).flatten(0, 1), y.clamp(min=0).flatten())


def flat(x, w, bias, y):
    return F.cross_entropy(x.reshape(-1, H) @ w.T, y.reshape(-1))


def transposed_weight(x, w, bias, y):
    return F.cross_entropy((x @ w.reshape(H, V)).view(-1, V), y.view(-1))


def twice_in_float(x, w, bias, y):
    logits = F.linear(x[:, 0:, :], w).float()
    return F.cross_entropy(logits.float().view(-1, V), y.view(-1), reduction="mean")


def soft_capped_in_float(x, w, bias, y):
    logits = torch.tanh(F.linear(x, w).float() / 5.0) * 5.0
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def weighted_classes(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), weight=bias.detach().abs())


def counted_outside(x, w, bias, y):
    loss = F.cross_entropy(F.linear(x, w).float().view(-1, V), y.view(-1), reduction="sum")
    return loss / (y != -100).sum()


def scaled_with_bias(x, w, bias, y):
    return F.cross_entropy((F.linear(x, w, bias) * 0.5).view(-1, V), y.view(-1))


def tied(x, w, bias, y):
    hidden = x + F.embedding(y.clamp(min=0), w)
    return F.cross_entropy(F.linear(hidden, w).view(-1, V), y.view(-1))


def drops_nothing(x, w, bias, y):
    return F.cross_entropy(F.dropout(F.linear(x, w), 0.0, training=True).view(-1, V), y.view(-1))


SPELLINGS = [
    hf,
    shift_by_slice,
    shift_by_slice_contiguous,
    with_bias,
    soft_capped,
    scaled,
    divided,
    summed,
    per_token,
    nll,
    module,
    flat,
    transposed_weight,
    twice_in_float,
    soft_capped_in_float,
    weighted_classes,
    counted_outside,
    scaled_with_bias,
    tied,
    drops_nothing,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_rewrites(spelling, dtype, verify):
    report = verify(spelling, problem(dtype))
    assert report.counts == {"linear_cross_entropy": 1}, report


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_rewrites_with_dynamic_shapes(spelling, verify):
    assert verify(spelling, problem(), dynamic=True, inner="aot_eager").counts == {"linear_cross_entropy": 1}


@pytest.mark.parametrize("spelling", [hf, shift_by_slice], ids=lambda f: f.__name__)
def test_stays_dynamic_in_the_sequence(spelling):
    compiled = graphfuse.optimize(spelling, inner="eager", dynamic=True, fullgraph=True, strict=True)
    _, w, bias, _ = problem()
    torch._dynamo.utils.counters.clear()
    for length in (5, 9, 12):
        x, y = torch.randn(B, length, H), torch.randint(V, (B, length))
        torch.testing.assert_close(compiled(x, w, bias, y), spelling(x, w, bias, y))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert graphfuse.report(compiled).counts == {"linear_cross_entropy": 1}


@pytest.mark.parametrize("spelling", [hf, shift_by_slice, with_bias, soft_capped], ids=lambda f: f.__name__)
def test_rewrites_under_autocast(spelling, verify):
    # Few tokens: the mean of their errors in bf16 may be small by luck.
    assert verify(spelling, problem(), autocast=True, ulps=2**13).counts == {"linear_cross_entropy": 1}


def test_is_nan_where_nothing_counts(verify):
    x, w, bias, y = problem()
    report = verify(hf, (x, w, bias, torch.full_like(y, -100)))
    assert report.counts == {"linear_cross_entropy": 1}


def test_takes_only_the_gradients_that_are_needed(verify):
    x, w, bias, y = problem()
    report = verify(hf, (x, w.detach(), bias, y))
    (site,) = report.rewritten
    assert site.params["needs"] == "('hidden',)"


def returned_logits(x, w, bias, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits


def counts_hits(x, w, bias, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), (logits.argmax(-1) == y).sum()


def bans_a_token(x, w, bias, y):
    logits = F.linear(x, w)
    logits[..., 0] = -5.0
    return F.cross_entropy(logits.view(-1, V), y.view(-1).clamp(min=1))


def no_head(x, w, bias, y):
    return F.cross_entropy(x.view(-1, H), y.view(-1).clamp(max=H - 1))


def entropy(x, w, bias, y):
    log_probs = F.linear(x, w).log_softmax(-1)
    return log_probs.gather(-1, y.clamp(min=0).unsqueeze(-1)), -(log_probs.exp() * log_probs).sum(-1)


def scaled_after_the_cap(x, w, bias, y):
    return F.cross_entropy((2.0 * (5.0 * torch.tanh(F.linear(x, w) / 5.0))).view(-1, V), y.view(-1))


def learned_temperature(x, w, bias, y):
    return F.cross_entropy((F.linear(x, w) * bias[0].exp()).view(-1, V), y.view(-1))


def softmax_over_tokens(x, w, bias, y):
    return F.nll_loss(F.linear(x, w).log_softmax(1).view(-1, V), y.view(-1))


def two_targets(x, w, bias, y):
    logits = F.linear(x, w)
    losses = [F.cross_entropy(logits[:, k : k + 5].flatten(0, 1), y[:, 2 - k : 7 - k].flatten()) for k in (1, 2)]
    return losses[0] + losses[1]


def rows_by_number(x, w, bias, y):
    kept = torch.tensor([1, 5, 8])
    return F.cross_entropy(F.linear(x, w).view(-1, V)[kept], y.view(-1)[kept])


REFUSALS = [
    (no_head, "logits: expected a matrix product in the same graph, got an input of the graph"),
    (counts_hits, "logits: expected no use besides the loss, got aten.argmax.default in argmax"),
    (entropy, "logits: expected no use besides the loss, got aten.exp.default in exp"),
    (two_targets, "target: expected one for all losses of the logits, got several"),
]
REFUSALS += [
    (lookalike, f"logits: expected casts, scales, a soft-cap and row slices of a matrix product, got {op}")
    for lookalike, op in [
        (scaled_after_the_cap, "aten.mul.Tensor"),
        (learned_temperature, "aten.mul.Tensor"),
        (softmax_over_tokens, "aten._log_softmax.default"),
        (rows_by_number, "aten.index.Tensor"),
    ]
]


def test_refuses_logits_that_are_returned():
    compiled = graphfuse.optimize(returned_logits, inner="eager", fullgraph=True, strict=True, lazy_logits=False)
    compiled(*problem())
    report = graphfuse.report(compiled)
    assert report.counts == {}
    assert [site.reason for site in report.refused] == [
        "logits: expected no use besides the loss, got an output of the graph"
    ]


def test_leaves_what_was_written_to_alone(verify):
    """Refused, whatever the reason is; and right."""
    report = verify(bans_a_token, problem())
    assert report.rewritten == []
    assert len(report.refused) <= 1


@pytest.mark.parametrize(("lookalike", "reason"), REFUSALS, ids=[f.__name__ for f, _ in REFUSALS])
def test_refuses(lookalike, reason, verify):
    report = verify(lookalike, problem())
    assert report.counts == {}
    assert [site.reason for site in report.refused] == [reason]


def router(x, w, bias, y):
    logits = F.linear(x, w)
    return logits.softmax(-1).square().sum(), logits.logsumexp(-1).square().mean()


def divergence(x, w, bias, y):
    return F.kl_div(F.linear(x, w).log_softmax(-1), bias.detach().softmax(-1).expand(B, S, V), reduction="batchmean")


def best_two(x, w, bias, y):
    return F.linear(x, w).log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1).expand(-1, -1, 2))


@pytest.mark.parametrize("other", [router, divergence, best_two], ids=lambda f: f.__name__)
def test_says_nothing_of_what_is_no_head(other, verify):
    report = verify(other, problem())
    assert report.sites == []


def test_leaves_probability_targets_alone(verify):
    def loss(x, w, bias, y):
        return F.cross_entropy(F.linear(x, w).view(-1, V), y)

    x, w, bias, _ = problem()
    assert verify(loss, (x, w, bias, torch.randn(B * S, V).softmax(-1))).counts == {}
