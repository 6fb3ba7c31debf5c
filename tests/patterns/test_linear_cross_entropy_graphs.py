"""lm_head + loss in whole graphs: other sizes than the first, many tokens, several heads, checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse.kernels import _head_ops
from graphfuse.kernels._token_chunks import run_chunks
from tests.patterns.heads import IGNORED, B, H, S, V, problem


def z_loss_masked(x, w, bias, y):
    logits = F.linear(x, w)[..., :-1, :].contiguous().view(-1, w.shape[0])
    labels = y[..., 1:].contiguous().view(-1)
    z_squared = (logits.logsumexp(-1).pow(2) * (labels != IGNORED)).mean()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED) + 1e-2 * z_squared


def masked_mean(x, w, bias, y):
    losses = F.cross_entropy(F.linear(x, w).flatten(0, 1), y.view(-1), reduction="none").view(y.shape)
    mask = (y != IGNORED).float()
    return (losses * mask).sum() / mask.sum()


def log_probs(x, w, bias, y):
    index = y.clamp(min=0).unsqueeze(-1)
    rows = [F.log_softmax(row, dim=-1).gather(-1, ids) for row, ids in zip(F.linear(x, w), index, strict=True)]
    return torch.stack(rows).squeeze(-1)


def divided_by_a_size(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), reduction="sum") / y.numel()


def all_but_the_last(x, w, bias, y):
    logits = F.linear(x, w)[:, : x.shape[1] - 1]
    return F.cross_entropy(logits.reshape(-1, V), y[:, 1:].reshape(-1))


def masked_by_an_input(x, w, bias, y):
    mask = (x.detach()[..., 0] > 0).to(x.dtype)
    losses = F.cross_entropy(F.linear(x, w).transpose(1, 2), y, reduction="none")
    return (losses * mask).sum() / mask.sum()


def first_four(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w)[:, :4].reshape(-1, V), y[:, :4].reshape(-1))


def second_half(x, w, bias, y):
    half = x.shape[1] // 2
    return F.cross_entropy(F.linear(x, w)[:, half:].reshape(-1, V), y[:, half:].reshape(-1))


def third(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w)[:, 2], y[:, 2])


def last_of_them(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w)[:, -1], y[:, -1])


STAYING = [divided_by_a_size, all_but_the_last, masked_by_an_input, z_loss_masked, third, last_of_them]


@pytest.mark.parametrize("spelling", [*STAYING, first_four, second_half], ids=lambda f: f.__name__)
def test_holds_at_other_sizes(spelling):
    """One graph for all lengths: what depends on them is not taken for a constant, or the head is left alone."""
    compiled = graphfuse.optimize(spelling, inner="eager", dynamic=True, fullgraph=True, strict=True)
    _, w, bias, _ = problem()
    torch._dynamo.utils.counters.clear()
    for length in (6, 9, 13):
        x, y = torch.randn(B, length, H), torch.randint(V, (B, length))
        torch.testing.assert_close(compiled(x, w, bias, y), spelling(x, w, bias, y))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(graphfuse.report(compiled).rewritten) == (spelling in STAYING)


@pytest.mark.parametrize("spelling", [z_loss_masked, masked_mean, log_probs], ids=lambda f: f.__name__)
def test_rewrites_many_tokens(spelling):
    """Literal sizes, and masks of the size of the features, do not keep a proof from going through."""
    tokens, features, vocabulary = 64, 64, 1024
    compiled = graphfuse.optimize(spelling, inner="eager", fullgraph=True, strict=True)
    y = torch.randint(9, (4, tokens))
    compiled(torch.randn(4, tokens, features), torch.randn(vocabulary, features), None, y)
    assert graphfuse.report(compiled).counts == {"linear_cross_entropy": 1}, graphfuse.report(compiled)


def test_rewrites_each_of_several_heads(verify):
    """Multi-token prediction: as many products as tokens ahead, on one weight."""

    def losses(x, w, bias, y):
        heads = [F.linear(x * (k + 1), w)[:, : S - 1 - k].reshape(-1, V) for k in range(3)]
        return sum(F.cross_entropy(logits, y[:, 1 + k :].reshape(-1)) / 3 for k, logits in enumerate(heads))

    assert verify(losses, problem()).counts == {"linear_cross_entropy": 3}


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("cut", [slice(None), slice(2, None), slice(-4, None)])
def test_rewrites_heads_that_are_stacked(dim, cut, verify):
    """One head for each codebook: their logits in one tensor, and a loss for each of them."""

    def losses(x, w, bias, y):
        logits = torch.stack([F.linear(x, w * k) for k in (1.0, 0.5, 2.0)], dim=dim)
        logits = logits[(*[slice(None)] * (1 + (dim <= 1)), cut)]
        rows = [logits.select(dim, k) for k in range(3)]
        return sum(F.cross_entropy(row.reshape(-1, V), y[:, cut].reshape(-1)) for row in rows)

    assert verify(losses, problem()).counts == {"linear_cross_entropy": 3}


def cut_labels(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), y[:, 1:])


def cut_and_selected(x, w, bias, y):
    logps = F.linear(x, w).log_softmax(-1)
    return logps.gather(-1, y[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1).mean()


def cut_twice(x, w, bias, y):
    first, second = F.linear(x, w), F.linear(x[:, 2:].sin(), w)
    first = F.cross_entropy(first.flatten(0, 1), y[:, 1:].flatten())
    return first + F.cross_entropy(second.flatten(0, 1), y[:, 3:].flatten())


@pytest.mark.parametrize("length", [5, 6, 9, 40])
@pytest.mark.parametrize("spelling", [cut_labels, cut_and_selected, cut_twice], ids=lambda f: f.__name__)
def test_rewrites_where_only_labels_are_cut(spelling, length, verify):
    """Hidden states of all tokens but the last, as where the model is given its inputs and labels as one tensor."""
    x, y = torch.randn(B, length, H), torch.randint(V, (B, length + 1))
    w = torch.randn(V, H)
    report = verify(spelling, (x.requires_grad_(), w.requires_grad_(), None, y))
    assert report.counts == {"linear_cross_entropy": 2 if spelling is cut_twice else 1}, report


def test_rewrites_what_is_left_of_a_prompt(verify):
    """The tokens of the prompt, more than a proof draws, have no labels."""
    prompt = 29

    def loss(x, w, bias, y):
        return F.cross_entropy(F.linear(x[:, prompt:], w).view(-1, V), y.view(-1))

    x = torch.randn(B, prompt + S, H, requires_grad=True)
    assert verify(loss, (x, *problem()[1:])).counts == {"linear_cross_entropy": 1}


def test_checkpoint_around_the_head_runs_it_once(monkeypatch):
    """A compiled checkpoint computes everything again in backward, but for what is made of gradients already."""
    runs = []
    monkeypatch.setattr(_head_ops, "run_chunks", lambda *a, **k: runs.append(a) or run_chunks(*a, **k))
    x, w, bias, y = problem()

    def loss(x):
        return checkpoint(lambda x: masked_mean(F.rms_norm(x.tanh(), (H,)), w, bias, y), x, use_reentrant=False)

    compiled = graphfuse.optimize(loss, fullgraph=True, strict=True)
    compiled(x)  # proves
    runs.clear()
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))
    assert len(runs) == 1
