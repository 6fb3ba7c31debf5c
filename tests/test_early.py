"""Numbers that the host waits for are asked for before the trunk, and only where they can be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import graphfuse

B, S, H, V = 4, 16, 32, 977
COUNT, HEAD = "graphfuse.direct.count_kept(", "graphfuse.linear_cross_entropy.default("


class Decoder(nn.Module):
    """A trunk, and a loss of some kind."""

    def __init__(self, loss):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(3))
        self.head = nn.Linear(H, V, bias=False)
        self.loss = loss

    def forward(self, tokens, labels):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.loss(self.head(hidden).float().view(-1, V), labels, hidden)


def shifted(logits, labels, hidden):
    return F.cross_entropy(logits, F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1))


def weighted(logits, labels, hidden):
    """Weights of the trunk: which tokens count is known when it has run."""
    losses = F.cross_entropy(logits, labels.view(-1), reduction="none")
    return (losses * hidden.detach().sum(-1).relu().view(-1)).sum()


def both(logits, labels, hidden):
    """A z-loss, and tokens that count by their number."""
    counted = (labels != -100).view(-1)
    losses = F.cross_entropy(logits, labels.view(-1), reduction="none", label_smoothing=0.1)
    return (losses * counted).sum() / counted.sum() + 1e-3 * logits.logsumexp(-1).square().mean()


@pytest.fixture
def batch():
    tokens = torch.randint(V, (B, S))
    return tokens, tokens.masked_fill(tokens % 3 != 0, -100)


def code_of(loss, batch, **options):
    """The generated code of forward; losses and gradients are eager's."""
    model = Decoder(loss)
    compiled = graphfuse.optimize(copy.deepcopy(model), strict=True, **options)
    found, (code, *_) = run_and_get_code(compiled, *batch)
    expected = model(*batch)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    grads = [[parameter.grad for parameter in m.parameters()] for m in (compiled, model)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    return code[code.index("def call(") :]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("loss", [shifted, both])
def test_kept_tokens_are_counted_before_the_trunk(loss, dynamic, batch):
    code = code_of(loss, batch, dynamic=dynamic)
    first_product = min(code.index(name) for name in ("extern_kernels", "embedding") if name in code)
    assert code.index(COUNT) < first_product < code.index(HEAD)
    assert "kept=" in code[code.index(HEAD) :].splitlines()[0]


def test_tokens_that_the_trunk_chooses_are_counted_by_the_head(batch):
    code = code_of(weighted, batch)
    assert HEAD in code
    assert COUNT not in code


def test_a_captured_graph_has_nothing_to_wait_for(batch):
    code = code_of(shifted, batch, mode="reduce-overhead")
    assert HEAD in code
    assert COUNT not in code


def test_no_token_counts(batch):
    tokens, labels = batch
    compiled = graphfuse.optimize(Decoder(shifted), strict=True)
    loss = compiled(tokens, torch.full_like(labels, -100))
    loss.backward()
    assert loss.isnan()
    assert not compiled.head.weight.grad.any()
