"""lm_head + cross-entropy: however the loss is reached, rewritten; logits that others need are left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphfuse

B, S, H, V = 2, 7, 16, 37


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


def problem(dtype=torch.float32):
    x, w, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in [(B, S, H), (V, H), (V,)])
    y = torch.randint(V, (B, S))
    y[0, :2] = -100
    return x, w, bias, y


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
    assert (site.params["need_hidden_grad"], site.params["need_weight_grad"]) == (True, False)


def returned_logits(x, w, bias, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits


def z_loss(x, w, bias, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)) + 1e-3 * logits.logsumexp(-1).square().mean()


def counts_hits(x, w, bias, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), (logits.argmax(-1) == y).sum()


def bans_a_token(x, w, bias, y):
    logits = F.linear(x, w)
    logits[..., 0] = -5.0
    return F.cross_entropy(logits.view(-1, V), y.view(-1).clamp(min=1))


def of_each_feature(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), y)


def no_head(x, w, bias, y):
    return F.cross_entropy(x.view(-1, H), y.view(-1).clamp(max=H - 1))


def vocabulary_slice(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w)[..., : V - 5].reshape(-1, V - 5), y.view(-1).clamp(max=V - 6))


REFUSALS = [
    (returned_logits, "logits: expected no use besides the loss, got an output of the graph"),
    (z_loss, "logits: expected no use besides the loss, got aten.logsumexp.default in logsumexp"),
    (no_head, "logits: expected a matrix product in the same graph, got an input of the graph"),
    (vocabulary_slice, "logits: expected the whole vocabulary, got a slice of it"),
]


@pytest.mark.parametrize("lookalike", [counts_hits, bans_a_token, of_each_feature], ids=lambda f: f.__name__)
def test_leaves_lookalikes_alone(lookalike, verify):
    """Refused, whatever the reason is; and right."""
    report = verify(lookalike, problem())
    assert report.rewritten == []
    assert len(report.refused) <= 1


@pytest.mark.parametrize(("lookalike", "reason"), REFUSALS, ids=[f.__name__ for f, _ in REFUSALS])
def test_refuses(lookalike, reason, verify):
    report = verify(lookalike, problem())
    assert report.counts == {}
    assert [site.reason for site in report.refused] == [reason]


def test_leaves_probability_targets_alone(verify):
    def loss(x, w, bias, y):
        return F.cross_entropy(F.linear(x, w).view(-1, V), y)

    x, w, bias, _ = problem()
    assert verify(loss, (x, w, bias, torch.randn(B * S, V).softmax(-1))).counts == {}


def test_leaves_smoothed_labels_alone(verify):
    def loss(x, w, bias, y):
        return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), label_smoothing=0.1)

    assert verify(loss, problem()).rewritten == []
