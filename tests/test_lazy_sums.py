"""Lazy logits that are a sum of products: an adapter on the head."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphfuse
from graphfuse.lazy import LazyLogits, materialised

B, S, H, V, R = 2, 7, 16, 8200, 3
TOLERANCE = 2e-5


class Adapted(nn.Module):
    """The end of a language model with an adapter on its head."""

    def __init__(self, cap=None, bias=False, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.head = nn.Linear(H, V, bias=bias)
        self.down, self.up = nn.Linear(H, R, bias=False), nn.Linear(R, V, bias=bias)
        self.head.weight.requires_grad_(False)
        self.cap = cap

    def forward(self, tokens, labels=None):
        hidden = self.embed(tokens).tanh()
        logits = self.head(hidden) + self.up(self.down(hidden)) * 0.3
        logits = logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        return logits if labels is None else (F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits)


UNREAD = {
    "cross_entropy": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "shifted": lambda z, y: F.cross_entropy(z[:, :-1].transpose(1, 2), y[:, 1:]),
    "gathered": lambda z, y: -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).mean(),
    "entries": lambda z, y: (z.gather(-1, y.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)).mean(),
    "rows": lambda z, y: torch.cat([row.logsumexp(-1) for row in z]).mean(),
    "entropy": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "mask": lambda z, y: F.cross_entropy(z[y > V // 4].float(), y[y > V // 4]),
}


def assert_same(model, compiled, use):
    expected, got = use(model), use(compiled)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=1e-6)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (compiled, model)]
    grads = (torch.autograd.grad(loss, of) for loss, of in zip((got, expected), trained, strict=True))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(theirs.abs().amax()))


@pytest.fixture
def tokens():
    materialised.clear()
    return torch.randint(V, (B, S))


def pair(**settings):
    model = Adapted(**settings)
    return model, graphfuse.optimize(copy.deepcopy(model), inner="eager", strict=True, fullgraph=True)


@pytest.mark.parametrize("settings", [{}, {"cap": 5.0, "bias": True}], ids=str)
@pytest.mark.parametrize("use", UNREAD.values(), ids=UNREAD)
def test_computes_no_logits_for(use, settings, tokens):
    model, compiled = pair(**settings)
    assert isinstance(compiled(tokens), LazyLogits)
    assert_same(model, compiled, lambda m: use(m(tokens), tokens))
    assert not materialised, materialised


def test_computes_logits_once(tokens):
    model, compiled = pair(bias=True)

    def two_readers(m):
        logits = m(tokens)
        return logits.cos().mean() + logits[:, -1].sin().mean()

    assert_same(model, compiled, two_readers)
    assert sum(materialised.values()) == 1


def test_returns_them_beside_a_fused_loss(tokens):
    model, compiled = pair(cap=5.0)
    assert_same(model, compiled, lambda m: m(tokens, tokens)[0])
    assert not materialised
    assert graphfuse.report(compiled).counts == {"linear_cross_entropy": 1, "lazy_logits": 1}
    assert_same(model, compiled, lambda m: sum(m(tokens, tokens)[k].square().mean() for k in (0, 1)))


def test_refuses_to_be_read_after_the_adapter_changed(tokens):
    _, compiled = pair()
    logits = compiled(tokens)
    with torch.no_grad():
        compiled.up.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="logits: expected to be read before the weights of the head change"):
        logits.sum()
