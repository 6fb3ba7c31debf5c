"""Losses of logits that are there: rewritten however they are spelled and wherever the logits come from, or left."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse.patterns import cross_entropy
from tests.patterns import test_linear_cross_entropy as heads
from tests.patterns import test_linear_cross_entropy_spellings as scalars
from tests.patterns import test_linear_cross_entropy_tokens as tokens
from tests.patterns.heads import IGNORED, H, problem

B, S, V = 2, 7, 1031
ONE = {"cross_entropy": 1}


@pytest.fixture
def few_classes(monkeypatch):
    """Takes the vocabulary that the spellings of heads have for a large one."""
    monkeypatch.setattr(cross_entropy, "MIN_CLASSES", 2)


def given(dtype=torch.float32):
    """Logits that require grad, and labels, two of which do not count."""
    y = torch.randint(V, (B, S))
    y[0, :2] = IGNORED
    return torch.randn(B, S, V).to(dtype).requires_grad_(), y


HEADS = [*heads.SPELLINGS, *scalars.SCALARS, *tokens.PER_TOKEN]


@pytest.mark.usefixtures("few_classes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", HEADS, ids=lambda f: f.__name__)
def test_rewrites_what_a_head_would_be(spelling, dtype, verify):
    """The same spellings, with the head left alone: its product is what is given."""
    report = verify(spelling, problem(dtype), patterns=["cross_entropy"])
    assert set(report.counts) == {"cross_entropy"}, report


# A quarter of them: what symbols do to the losses themselves is seen where the head is rewritten with them.
@pytest.mark.usefixtures("few_classes")
@pytest.mark.parametrize("spelling", HEADS[::4], ids=lambda f: f.__name__)
def test_rewrites_with_dynamic_shapes(spelling, verify):
    report = verify(spelling, problem(), dynamic=True, inner="aot_eager", patterns=["cross_entropy"])
    assert set(report.counts) == {"cross_entropy"}, report


def flat(z, y):
    return F.cross_entropy(z.view(-1, V), y.view(-1))


def upcast(z, y):
    return F.cross_entropy(z.float().view(-1, V), y.view(-1))


def shifted(z, y):
    return F.cross_entropy(z[..., :-1, :].contiguous().float().view(-1, V), y[..., 1:].reshape(-1))


def classes_second(z, y):
    return F.cross_entropy(z.transpose(1, 2), y)


def per_token(z, y):
    losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    return losses * z.detach().mean(-1).exp()


def policy(z, y):
    return (z.float() / 0.7).log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def postprocessed(z, y):
    """Suppressed tokens, a temperature that is learned: what no op does to the logits."""
    z = z.masked_fill(torch.arange(V) % 3 == 0, -30.0) * z.square().mean(-1, keepdim=True)
    return F.cross_entropy(z.view(-1, V), (y.clamp(min=1) // 3 * 3 + 1).view(-1) % V)


def scaled_after_the_cap(z, y):
    """The op caps after it scales: the earliest logits that it can take are those after the cap."""
    return F.cross_entropy((2.0 * (5.0 * torch.tanh(z / 5.0))).view(-1, V), y.view(-1))


def padded_vocabulary(z, y):
    return F.cross_entropy(z[..., : V - 5].float().view(-1, V - 5), y.clamp(max=V - 6).view(-1))


def probabilities_first(z, y):
    return F.nll_loss(z.softmax(-1).log().view(-1, V), y.view(-1))


def a_bias_for_one_of_them(z, y):
    biased = z + torch.linspace(-1, 1, V)
    return F.cross_entropy(biased.view(-1, V), y.view(-1)) + 1e-3 * z.logsumexp(-1).square().mean()


def read_by_others(z, y):
    return F.cross_entropy(z.float().view(-1, V), y.view(-1)), z.argmax(-1), z.float().softmax(-1).amax(-1)


GIVEN = [
    flat,
    upcast,
    shifted,
    classes_second,
    per_token,
    policy,
    postprocessed,
    scaled_after_the_cap,
    padded_vocabulary,
    probabilities_first,
    a_bias_for_one_of_them,
    read_by_others,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", GIVEN, ids=lambda f: f.__name__)
def test_rewrites_logits_that_are_an_input(spelling, dtype, verify):
    report = verify(spelling, given(dtype))
    assert report.counts == ONE, report
    assert report.refused == []


@pytest.mark.parametrize("spelling", [shifted, policy, postprocessed], ids=lambda f: f.__name__)
def test_rewrites_under_autocast(spelling, verify):
    assert verify(spelling, given(), autocast=True, ulps=2**13).counts == ONE


def test_two_losses_with_labels_of_their_own(verify):
    """Which no head may have: here each is an op."""

    def losses(z, y):
        first, second = z[:, :5], z[:, 1:6]
        return F.cross_entropy(first.flatten(0, 1), y[:, 2:].flatten()) + F.cross_entropy(
            second.flatten(0, 1), y[:, :5].flatten()
        )

    assert verify(losses, given()).counts == {"cross_entropy": 2}


@pytest.mark.parametrize("spelling", [flat, shifted], ids=lambda f: f.__name__)
def test_stays_dynamic_in_the_sequence(spelling):
    compiled = graphfuse.optimize(spelling, inner="eager", dynamic=True, fullgraph=True, strict=True)
    torch._dynamo.utils.counters.clear()
    for length in (5, 9, 12):
        z, y = torch.randn(B, length, V), torch.randint(V, (B, length))
        torch.testing.assert_close(compiled(z, y), spelling(z, y))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert graphfuse.report(compiled).counts == ONE


def head():
    """Hidden states and the weight of a large vocabulary, labels."""
    _, y = given()
    return torch.randn(B, S, H, requires_grad=True), torch.randn(V, H, requires_grad=True), y


def hits(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), (logits.argmax(-1) == y).sum()


def times_another(x, w, y):
    return F.cross_entropy((F.linear(x, w) * F.linear(x.tanh(), w)).view(-1, V), y.view(-1))


def returned(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.float().view(-1, V), y.view(-1)), logits


@pytest.mark.parametrize(
    ("loss", "options", "reason"),
    [
        (hits, {}, "logits: expected no use besides the loss, got aten.argmax.default in argmax"),
        (returned, {"lazy_logits": False}, "logits: expected no use besides the loss, got an output of the graph"),
        (
            times_another,
            {},
            "logits: expected casts, scales, a soft-cap and row slices of a matrix product, got aten.mul.Tensor",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_head_that_is_refused_is_one_site(loss, options, reason, verify):
    """Of the loss that is rewritten; what the head would need stands beside it."""
    report = verify(loss, head(), **options)
    (site,) = report.sites
    assert (site.pattern, site.status, report.counts) == ("cross_entropy", "rewritten", ONE)
    assert site.others == {"linear_cross_entropy": reason}
    assert site.wanted == "linear_cross_entropy"
    text = " ".join(report.to_text().split())  # where a terminal breaks lines is its own business
    assert f"to match, linear_cross_entropy at {site.source.rpartition('/')[2]}: {site.hint}" in text
    assert "not linear_cross_entropy: logits: expected" in text


def test_a_head_that_is_rewritten_is_not_looked_at_again(verify):
    assert verify(heads.with_bias, problem()).counts == {"linear_cross_entropy": 1}
    assert verify(lambda x, w, y: upcast(F.linear(x, w), y), head()).counts == {"linear_cross_entropy": 1}


def test_logits_that_are_lazy_stay_so():
    compiled = graphfuse.optimize(returned, inner="eager", fullgraph=True, strict=True)
    compiled(*head())
    assert graphfuse.report(compiled).counts == {"linear_cross_entropy": 1, "lazy_logits": 1}


class Classifier(nn.Module):
    """A transform before the decoder, as BERT has it, and a norm of the scores after it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.transform = nn.Sequential(nn.Linear(H, H), nn.GELU(), nn.LayerNorm(H))
        self.decoder = nn.Linear(H, V)
        self.norm = nn.LayerNorm(V)

    def forward(self, tokens, labels):
        scores = self.norm(self.decoder(self.transform(self.embed(tokens))))
        return F.cross_entropy(scores.view(-1, V), labels.view(-1)), scores


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_classifier_with_a_norm_behind_it(inner):
    model, (_, labels) = Classifier(), given()
    ids = torch.randint(V, (B, S))
    expected = torch.autograd.grad(model(ids, labels)[0], [*model.parameters()])
    compiled = graphfuse.optimize(model, inner=inner, fullgraph=True, strict=True, patterns=["cross_entropy"])
    loss, _ = compiled(ids, labels)
    for ours, theirs in zip(torch.autograd.grad(loss, [*model.parameters()]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().amax()))
    assert graphfuse.report(compiled).counts == ONE


def test_inductor_keeps_what_it_need_not_store():
    """A product that is no op's result is read where it is computed: the op would need it in memory."""

    def scaled_by_a_vector(z, y):
        return F.cross_entropy((z * z.detach().square().mean(-1, keepdim=True)).view(-1, V), y.view(-1))

    z, y = given()
    for policy_, count in (("measured", 0), ("always", 1)):
        torch._dynamo.reset()
        compiled = graphfuse.optimize(scaled_by_a_vector, fullgraph=True, strict=True, policy=policy_)
        torch.testing.assert_close(compiled(z, y), scaled_by_a_vector(z, y))
        report = graphfuse.report(compiled)
        assert len(report.rewritten) == count
        assert len(report.sites) == 1
    torch._dynamo.reset()
    compiled = graphfuse.optimize(upcast, fullgraph=True, strict=True)
    torch.testing.assert_close(*(torch.autograd.grad(f(z, y), z)[0] for f in (compiled, upcast)))
    assert graphfuse.report(compiled).counts == ONE


@pytest.mark.parametrize("spelling", [upcast, shifted, policy], ids=lambda f: f.__name__)
def test_saves_the_logits_as_they_are(spelling):
    """And no copy in float32, nor a shifted one."""
    z, y = given(torch.bfloat16)
    compiled = graphfuse.optimize(spelling, inner="eager", fullgraph=True, strict=True)
    compiled(z, y)
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compiled(z, y).sum()
    loss.backward()
    assert z.untyped_storage()._cdata in sizes
    assert sum(sizes.values()) < 1.2 * z.untyped_storage().nbytes()


def test_inside_a_checkpoint(verify):
    def loss(z, y):
        return checkpoint(lambda z: upcast(z.tanh(), y), z, use_reentrant=False)

    assert verify(loss, given(), inner="aot_eager").counts == ONE


def few(z, y):
    return F.cross_entropy(z[..., :1024].reshape(-1, 1024), y.clamp(max=1023).view(-1))


def entropy(z, y):
    log_probs = z.log_softmax(-1)
    return F.nll_loss(log_probs.view(-1, V), y.view(-1)), -(log_probs.exp() * log_probs).sum(-1)


def returned_log_probs(z, y):
    log_probs = z.view(-1, V).log_softmax(-1)
    return F.nll_loss(log_probs, y.view(-1)), log_probs


def classes_before_tokens(z, y):
    return F.cross_entropy(z.view(B, V, S), y)


NEAR_MISSES = [
    (few, "logits: expected at least 1025 classes, got 1024"),
    (entropy, "log-probabilities: expected no use besides the loss, got aten.exp.default in exp"),
    (returned_log_probs, "log-probabilities: expected no use besides the loss, got an output of the graph"),
    (
        classes_before_tokens,
        f"logits: expected the classes in the last dimension, got them in one of {(B, V, S)}",
    ),
]


@pytest.mark.parametrize(("miss", "reason"), NEAR_MISSES, ids=[f.__name__ for f, _ in NEAR_MISSES])
def test_refuses(miss, reason, verify):
    """One site, with the reasons of both patterns."""
    (site,) = verify(miss, given()).sites
    assert (site.pattern, site.status) == ("linear_cross_entropy", "refused")
    assert site.reason == "logits: expected a matrix product in the same graph, got an input of the graph"
    assert site.others == {"cross_entropy": reason}


def router(z, y):
    probabilities = z.softmax(-1)
    return probabilities.square().sum() + z.logsumexp(-1).square().mean()


def probability_targets(z, y):
    return F.cross_entropy(z.view(-1, V), z.detach().view(-1, V).softmax(-1))


def divergence(z, y):
    return F.kl_div(z.log_softmax(-1), z.detach().softmax(-1), reduction="batchmean")


def softmax_over_tokens(z, y):
    return z.softmax(1).gather(-1, y.clamp(min=0).unsqueeze(-1)).log().sum()


@pytest.mark.parametrize("other", [router, probability_targets, divergence, softmax_over_tokens])
def test_leaves_alone(other, verify):
    assert verify(other, given()).sites == []


def test_leaves_what_is_written_to_alone(verify):
    """Refused, whatever the reason is; and right."""

    def bans_a_token(z, y):
        z = z * 1.0
        loss = F.cross_entropy(z.view(-1, V), y.view(-1), reduction="none")
        z[..., 0] = -5.0
        return loss.sum() + z.square().mean()

    report = verify(bans_a_token, given())
    assert len(report.sites) <= 1
