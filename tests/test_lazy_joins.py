"""Lazy logits with a second tensor, and losses written out over them: the same as in eager, and never as a whole."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode

import graphfuse
from graphfuse.lazy import LazyLogits, losses, materialised
from tests.test_lazy import Decoder, V, assert_same, pair

IGNORED = -100
B, S = 2, 7


@pytest.fixture
def tokens(monkeypatch):
    """The rows go through in several chunks."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * V * 4)
    materialised.clear()
    return torch.randint(V, (B, S))


def label_smoother(logits, labels, epsilon=0.1):
    """As Hugging Face's Trainer computes it, from logits that the model returned."""
    log_probs = -F.log_softmax(logits, dim=-1)
    labels = labels.masked_fill(labels % 3 == 0, IGNORED).unsqueeze(-1)
    padding_mask = labels.eq(IGNORED)
    nll_loss = log_probs.gather(dim=-1, index=torch.clamp(labels, min=0))
    smoothed_loss = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll_loss.masked_fill_(padding_mask, 0.0)
    smoothed_loss.masked_fill_(padding_mask, 0.0)
    active = padding_mask.numel() - padding_mask.long().sum()
    nll_loss = nll_loss.sum() / active
    smoothed_loss = smoothed_loss.sum() / (active * log_probs.shape[-1])
    return (1 - epsilon) * nll_loss + epsilon * smoothed_loss


def jensen_shannon(student, teacher, labels, beta):
    """As TRL's distillation computes it."""
    student, teacher = F.log_softmax(student / 0.9, -1), F.log_softmax(teacher / 0.9, -1)
    if beta == 0:
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True)
    elif beta == 1:
        divergence = F.kl_div(teacher, student, reduction="none", log_target=True)
    else:
        beta = torch.tensor(beta)
        mixture = torch.logsumexp(torch.stack([student + torch.log1p(-beta), teacher + torch.log(beta)]), dim=0)
        divergence = beta * F.kl_div(mixture, teacher, reduction="none", log_target=True) + (1 - beta) * F.kl_div(
            mixture, student, reduction="none", log_target=True
        )
    mask = labels % 3 != 0
    return divergence[mask].sum() / mask.sum()


def policy_gradient(policy, actions):
    return -policy.log_prob(actions).mean() - 0.01 * policy.entropy().mean()


def per_row(y):
    return 0.5 + (y % 5).float().unsqueeze(-1)


USES = {
    "temperature": lambda z, y: F.cross_entropy((z / torch.tensor(0.7)).view(-1, V), y.view(-1)),
    "temperature times": lambda z, y: F.cross_entropy((torch.tensor(1.5) * z).view(-1, V), y.view(-1)),
    "temperatures of rows": lambda z, y: F.cross_entropy((z / per_row(y))[:, :-1].transpose(1, 2), y[:, 1:]),
    "smoothed with temperatures": lambda z, y: F.cross_entropy(
        (z / per_row(y)).view(-1, V), y.view(-1).masked_fill(y.view(-1) % 2 == 0, IGNORED), label_smoothing=0.1
    ),
    "weighted with temperatures": lambda z, y: F.cross_entropy(
        (z * per_row(y)).view(-1, V), y.view(-1), weight=torch.arange(1.0, V + 1), reduction="mean"
    ),
    "summed with temperatures": lambda z, y: F.cross_entropy((z * per_row(y))[0], y[0], reduction="sum"),
    "taken along": lambda z, y: -torch.take_along_dim(z.log_softmax(-1), y.unsqueeze(-1), -1).mean(),
    "indexed": lambda z, y: -z.view(-1, V).log_softmax(-1)[torch.arange(B * S), y.view(-1)].mean(),
    "indexed from the end": lambda z, y: -z.log_softmax(-1)[0][torch.arange(S), y[0] - V].mean(),
    "indexed by two": lambda z, y: z[torch.arange(B)[:, None], torch.arange(S), y].mean(),
    "many entries": lambda z, y: z.log_softmax(-1).gather(-1, y.unsqueeze(1).expand(-1, S, -1)).square().mean(),
    "negative log": lambda z, y: (-z.log_softmax(-1)).gather(-1, y.unsqueeze(-1)).mean(),
    "log of softmax": lambda z, y: F.nll_loss(z.softmax(-1).log().view(-1, V), y.view(-1)),
    "label smoother": label_smoother,
    "label smoother after a shift": lambda z, y: label_smoother(z[..., :-1, :], y[..., 1:]),
    "normalised by hand": lambda z, y: F.nll_loss((z - z.logsumexp(-1, keepdim=True)).view(-1, V), y.view(-1)),
    "log prob": lambda z, y: -Categorical(logits=z).log_prob(y).mean(),
    "entropy": lambda z, y: Categorical(logits=z).entropy().mean(),
    "policy gradient": lambda z, y: policy_gradient(Categorical(logits=z), y),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_computes_no_logits_for(use, tokens):
    model, compiled = pair(scale=0.5, bias=True)
    assert_same(model, compiled, lambda m: use(m(tokens), tokens))
    assert not materialised, materialised


DISTILLATIONS = {
    "batchmean": lambda s, t, y: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
    "mean of logs": lambda s, t, y: F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="mean", log_target=True),
    "sum of rows": lambda s, t, y: F.kl_div(
        F.log_softmax(s / 2, -1)[:, 1:], F.softmax(t / 2, -1)[:, 1:], reduction="sum"
    ),
    "module": lambda s, t, y: torch.nn.KLDivLoss(reduction="batchmean")(s.log_softmax(-1), t.softmax(-1)),
    "forward": lambda s, t, y: jensen_shannon(s, t, y, 0),
    "reverse": lambda s, t, y: jensen_shannon(s, t, y, 1),
    "both ways": lambda s, t, y: jensen_shannon(s, t, y, 0.3),
    "added in logs": lambda s, t, y: torch.logaddexp(s.log_softmax(-1), t.log_softmax(-1))[:, 1:].square().mean(),
    "mean of three": lambda s, t, y: F.cross_entropy(torch.stack([t, s / 2, s]).mean(0).flatten(0, 1), y.flatten()),
    "chosen of a mean": lambda s, t, y: torch.stack([s, t], dim=2).sum(2)[y % 3 != 0].logsumexp(-1).mean(),
    "by hand": lambda s, t, y: (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1).mean(),
    "soft targets": lambda s, t, y: -(t.softmax(-1) * s.log_softmax(-1)).sum(-1).mean(),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("teacher", ["lazy", "detached", "dense"])
@pytest.mark.parametrize("use", DISTILLATIONS.values(), ids=DISTILLATIONS)
def test_distils_without_logits(use, teacher, tokens):
    model, compiled = pair()
    other = Decoder(bias=True)
    compiled_other = graphfuse.optimize(copy.deepcopy(other), inner="eager", strict=True, fullgraph=True)

    def loss(m):
        eager = m is model or teacher == "dense"
        targets = (other if eager else compiled_other)(tokens)
        return use(m(tokens), targets if teacher == "lazy" else targets.detach(), tokens)

    assert_same(model, compiled, loss)
    assert not materialised, materialised
    if teacher == "lazy":
        ours, theirs = ([p.grad for p in m.parameters()] for m in (compiled_other, other))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("others", [1, 9], ids=["few", "many"])
def test_a_stack_may_be_read(others, tokens):
    """What does not reduce the dimension of a stack alone gets all of it."""
    model, compiled = pair()

    def loss(m):
        z = m(tokens)
        stacked = torch.stack([torch.ones(B, S, V), *[z] * others], 1)
        assert stacked.shape == (B, 1 + others, S, V)
        return stacked.cos().mean() + stacked[:, -1].logsumexp(-1, True).mean() + stacked.amax(1).square().mean()

    assert_same(model, compiled, loss)


class Largest(TorchDispatchMode):
    """The size of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and not isinstance(tensor, LazyLogits):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return made


def test_a_divergence_is_never_whole(monkeypatch):
    """Nor are its gradients: of 64 rows there are 4 at a time."""
    tokens = torch.randint(V, (B, 32))
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * V * 4)
    (_, student), (_, teacher) = pair(), pair()
    student.head.weight.requires_grad_(False)
    logits, targets = student(tokens), teacher(tokens).detach()
    with Largest() as largest:
        F.kl_div(logits.log_softmax(-1), targets.softmax(-1), reduction="batchmean").backward()
    assert 4 * V <= largest.elements < B * 32 * V // 2
    assert largest.elements <= student.embed.weight.numel()


@pytest.mark.parametrize("shape", [(), (1,), (B, 1, 1), (B, S, 1), (B, S, V)], ids=str)
def test_what_meets_the_logits_gets_its_gradient(shape, tokens):
    model, compiled = pair()
    grads = []
    for m in (model, compiled):
        other = torch.full(shape, 0.7).requires_grad_()
        logits = m(tokens)
        joined = (logits / other + other * 2) - other.detach()
        F.cross_entropy(joined.view(-1, V), tokens.view(-1)).backward()
        grads.append(other.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)
    assert not materialised, materialised


@pytest.mark.parametrize("other", [torch.tensor(0.7), torch.rand(B, S, 1) + 0.5, torch.rand(B, 1, 1).bfloat16() + 0.5])
def test_has_the_dtype_and_values_of_eager(other, tokens):
    model, compiled = pair()
    expected, got = model(tokens).bfloat16() / other, compiled(tokens).bfloat16() / other
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.clone() + 0, expected)


def test_what_is_no_row_of_numbers_reads_the_logits(tokens):
    model, compiled = pair()
    bans = torch.zeros(V).index_fill_(0, torch.tensor([3, 4]), -5.0).requires_grad_()
    assert_same(model, compiled, lambda m: F.cross_entropy((m(tokens) + bans).view(-1, V), tokens.view(-1)))
    assert sum(materialised.values()) == 1


def test_a_hook_on_logits_is_called(tokens):
    model, compiled = pair()
    seen = []
    for m in (compiled, model):
        logits = m(tokens)
        logits.register_hook(lambda grad: seen.append(grad.clone()))
        logits.retain_grad()
        F.cross_entropy(logits.view(-1, V), tokens.view(-1)).backward()
        seen.append(logits.grad)
    torch.testing.assert_close(seen[:2], seen[2:])
