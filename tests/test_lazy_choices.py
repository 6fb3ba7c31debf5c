"""Some rows or classes of logits, chosen by the model or by whoever reads them; and copies that outlive the weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphfuse
from graphfuse.lazy import materialised

B, S, H, V = 2, 7, 16, 300
TOLERANCE = 2e-5
CHOICES = {
    "padded head": lambda z: z[..., :-4],
    "padded head by number": lambda z: z[..., : V - 4],
    "padded head, copied": lambda z: z[..., : V - 4].contiguous(),
    "padded head, then wider": lambda z: z[..., : V - 4].double(),
    "padded head, then a soft-cap": lambda z: 15.0 * torch.tanh(z[:, :, : V - 4] / 15.0),
    "few classes": lambda z: z[..., :20],
    "more classes than there are": lambda z: z[..., : V + 5],
    "rows and classes": lambda z: z[:, :-1, : V - 4],
    "rows, copied": lambda z: z[:, :-1].contiguous(),
    "rows and classes, copied": lambda z: z[:, :-1, : V - 4].contiguous(),
}


class Head(nn.Module):
    """A head of which some outputs count."""

    def __init__(self, choose, bias):
        super().__init__()
        self.embed, self.head, self.choose = nn.Embedding(V, H), nn.Linear(H, V, bias=bias), choose

    def forward(self, tokens):
        logits = self.choose(self.head(self.embed(tokens).tanh()))
        labels = tokens[:, : logits.shape[1]] % logits.shape[-1]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)), logits


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_are_lazy_and_laid_out_as_in_eager(choose, bias, dynamic):
    model = Head(choose, bias)
    compiled = graphfuse.optimize(copy.deepcopy(model), inner="eager", strict=True, fullgraph=True, dynamic=dynamic)
    for length in (S, S + 2):
        tokens = torch.randint(V, (B, length))
        found = []
        materialised.clear()
        for each in (model, compiled):
            each.zero_grad()
            loss, logits = each(tokens)
            rows = logits.view(-1, logits.shape[-1]) if logits.is_contiguous() else logits.flatten(0, 1)
            (loss + rows.logsumexp(-1).mean()).backward()
            found.append([loss, logits.shape, logits.stride(), logits.argmax(-1), *(p.grad for p in each.parameters())])
        torch.testing.assert_close(found[1], found[0], rtol=TOLERANCE, atol=1e-7)
        assert not materialised, materialised
    assert graphfuse.report(compiled).counts == {"linear_cross_entropy": 1, "lazy_logits": 1}
    torch.testing.assert_close(compiled(tokens)[1] + 0, model(tokens)[1])


class AddedBias(nn.Module):
    """A head by hand, on the embeddings' weight."""

    def __init__(self, spelled):
        super().__init__()
        self.embed, self.bias, self.spelled = nn.Embedding(V, H), nn.Parameter(torch.randn(V)), spelled

    def forward(self, tokens):
        logits = self.spelled(self.embed(tokens).tanh(), self.embed.weight, self.bias)
        return F.cross_entropy(logits.transpose(1, 2), tokens), logits


BIASES = {
    "added": lambda x, w, b: x @ w.T + b,
    "from the left": lambda x, w, b: b + x @ w.T,
    "then a soft-cap": lambda x, w, b: 15.0 * torch.tanh((x @ w.T + b) / 15.0),
    "then some classes": lambda x, w, b: (x @ w.T + b)[..., :-1],
    "of some classes": lambda x, w, b: (x @ w.T)[..., :-1] + b[:-1],
    "behind a factor": lambda x, w, b: (x @ w.T) * 0.5 + b,
    "two": lambda x, w, b: x @ w.T + b + b,
}
EAGER = {"behind a factor", "of some classes", "two"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_that_is_added_is_one_of_the_head(name, dtype):
    model = AddedBias(BIASES[name]).to(dtype)
    compiled = graphfuse.optimize(copy.deepcopy(model), inner="eager", strict=True, fullgraph=True)
    tokens, found = torch.randint(V - 1, (B, S)), []
    for each in (model, compiled):
        loss, logits = each(tokens)
        (loss.float() + logits.float().logsumexp(-1).mean()).backward()
        found.append([loss, logits, *(p.grad for p in each.parameters())])
    tolerance = TOLERANCE if dtype == torch.float32 else 4e-2
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(
            ours + 0, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().amax())
        )
    expected = {} if name in EAGER else {"linear_cross_entropy": 1, "lazy_logits": 1}
    assert graphfuse.report(compiled).counts == expected


COPIES = {
    "clone": lambda z: z.detach().clone(),
    "copy": lambda z: z.detach().to(z.dtype, copy=True),
    "without history": torch.no_grad()(lambda z: z[:, 1:].clone(memory_format=torch.contiguous_format)),
    "of a choice": lambda z: z[0].detach().clone(),
}


def pair():
    model = Head(lambda z: z, bias=True)
    return model, graphfuse.optimize(copy.deepcopy(model), inner="eager", strict=True, fullgraph=True)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_without_history_outlives_the_weights(copied):
    (model, compiled), tokens = pair(), torch.randint(V, (B, S))
    expected, got = copied(model(tokens)[1]), copied(compiled(tokens)[1])
    with torch.no_grad():
        compiled.head.weight.zero_()
    torch.testing.assert_close(got, expected)


def test_some_classes_of_some_rows_read_no_others(monkeypatch):
    (_, compiled), tokens = pair(), torch.randint(V, (B, S))
    logits, rows = compiled(tokens)[1], []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *args: rows.append(x.shape) or linear(x, *args))
    assert logits[:, -1, [5, 9]].shape == (B, 2)
    assert rows == [(B, H)]
