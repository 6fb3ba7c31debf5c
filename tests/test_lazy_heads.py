"""Lazy logits of several heads in one tensor, and of rows that the model chose itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphfuse
from graphfuse.lazy import LazyLogits, materialised

B, S, H, V, K = 2, 7, 16, 97, 3


class Base(nn.Module):
    """The end of a language model of some kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.heads = nn.ModuleList(nn.Linear(H, V, bias=k == 1) for k in range(K))


class Stacked(Base):
    """A head for each codebook, as models of audio have them."""

    def forward(self, tokens, labels):
        hidden = self.embed(tokens).tanh()
        logits = torch.stack([head(hidden) for head in self.heads], dim=1)
        recent, loss = logits[:, :, -labels.shape[1] :], torch.zeros([])
        for k in range(K):
            loss += F.cross_entropy(recent[:, k].contiguous().view(-1, V), labels.view(-1))
        return loss / K, logits.reshape(-1, *logits.shape[2:])


class StackedLast(Base):
    """The same, not flattened, in float."""

    def forward(self, tokens, labels):
        hidden = self.embed(tokens).tanh()
        logits = torch.stack([head(hidden) * 0.5 for head in self.heads], dim=2).float()
        return sum(F.cross_entropy(logits[:, :, k].flatten(0, 1), labels.view(-1)) for k in range(K)), logits


class Streams(Base):
    """One head on several streams, which are returned apart."""

    def forward(self, tokens, labels):
        hidden = self.embed(tokens).tanh()
        logits = self.heads[0](torch.stack([hidden, hidden * 2, hidden * 3], 1))
        log_probs = F.log_softmax(logits.transpose(0, 1).contiguous().view(-1, V), dim=-1)
        return F.nll_loss(log_probs, labels.expand(3, -1, -1).reshape(-1)), logits[:, 0], logits[:, 1:]


MODELS = [(Stacked, 3, 1), (StackedLast, 3, 1), (Streams, 1, 2)]


@pytest.fixture
def tokens():
    materialised.clear()
    return torch.randint(V, (B, S))


def pair(cls, **options):
    model = cls()
    return model, graphfuse.optimize(copy.deepcopy(model), strict=True, fullgraph=True, **{"inner": "eager", **options})


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("cls", "losses", "outputs"), MODELS, ids=[m[0].__name__ for m in MODELS])
def test_fuses_the_losses_and_returns_the_logits_unread(cls, losses, outputs, dynamic, tokens):
    model, compiled = pair(cls, dynamic=dynamic, inner="aot_eager")
    (expected, *_), (got, *logits) = model(tokens, tokens), compiled(tokens, tokens)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grads(compiled, got), grads(model, expected), rtol=1e-4, atol=1e-6)
    assert graphfuse.report(compiled).counts == {"linear_cross_entropy": losses, "lazy_logits": outputs}
    assert all(isinstance(each, LazyLogits) for each in logits)
    assert not materialised


@pytest.mark.parametrize(("cls", "losses", "outputs"), MODELS, ids=[m[0].__name__ for m in MODELS])
def test_they_are_read_as_in_eager(cls, losses, outputs, tokens):
    model, compiled = pair(cls)
    found = []
    for m in (model, compiled):
        loss, *logits = m(tokens, tokens)
        used = [each.detach().float() for each in logits]
        total = loss + sum(each[..., -1, :].square().mean() + each.exp().mean() for each in logits)
        found.append((total.detach(), *logits, *used, *grads(m, total)))
    for expected, got in zip(*found, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got + 0, expected, rtol=1e-4, atol=1e-6)


def test_rows_of_a_stack_are_read_as_a_whole(tokens):
    model, compiled = pair(Stacked)
    _, logits = compiled(tokens, tokens)
    _, expected = model(tokens, tokens)
    assert not materialised
    ours, theirs = (F.cross_entropy(z.view(-1, V), tokens.repeat_interleave(K, 0).view(-1)) for z in (logits, expected))
    torch.testing.assert_close(ours, theirs)
    assert sum(materialised.values()) == 1


def test_chosen_rows_stay_lazy(tokens):
    model, compiled = pair(Streams)
    results = []
    for m in (model, compiled):
        _, first, others = m(tokens, tokens)
        loss = F.cross_entropy(first.transpose(1, 2), tokens) + others.logsumexp(-1).mean()
        results.append((loss.detach(), *grads(m, loss)[:2]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert not materialised


class Mixed(Base):
    """What is stacked with the logits is something else."""

    def forward(self, tokens, labels):
        hidden = self.embed(tokens).tanh()
        first, second = self.heads[0](hidden), self.heads[2](hidden)
        loss = F.cross_entropy(first.flatten(0, 1), labels.view(-1))
        return loss, torch.stack([first, second.relu()])


def test_leaves_other_stacks_alone(tokens):
    model, compiled = pair(Mixed)
    (expected, stacked), (got, logits) = model(tokens, tokens), compiled(tokens, tokens)
    torch.testing.assert_close((got, logits), (expected, stacked))
    assert graphfuse.report(compiled).counts == {}
