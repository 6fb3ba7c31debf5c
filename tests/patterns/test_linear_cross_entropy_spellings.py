"""lm_head + loss: what the libraries of the field write, beyond a plain cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse.kernels import _head_ops
from graphfuse.kernels._token_chunks import run_chunks

B, S, H, V = 2, 7, 16, 37
IGNORED = -100


def shift(y):
    """Labels moved by one, as transformers does it."""
    return F.pad(y, (0, 1), value=IGNORED)[..., 1:].contiguous()


def log_probs_of(x, w, y):
    return F.linear(x, w).log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)


# ------------------------------------------------------------------------------------------------- one scalar, linear


def smoothed(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), label_smoothing=0.1)


def smoothed_sum(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), label_smoothing=0.1, reduction="sum") / 11


def smoothed_per_token(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), label_smoothing=0.1, reduction="none").mean()


def smoothed_with_class_weights(x, w, bias, y):
    weights = bias.detach().abs() + 0.1
    return F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), weight=weights, label_smoothing=0.1)


def smoothed_by_hand(x, w, bias, y):
    """transformers' LabelSmoother."""
    log_probs = -F.log_softmax(F.linear(x, w), dim=-1)
    labels = y.unsqueeze(-1)
    padding_mask = labels.eq(IGNORED)
    labels = torch.clamp(labels, min=0)
    nll_loss = log_probs.gather(dim=-1, index=labels)
    smoothed_loss = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll_loss.masked_fill_(padding_mask, 0.0)
    smoothed_loss.masked_fill_(padding_mask, 0.0)
    active = padding_mask.numel() - padding_mask.long().sum()
    nll_loss = nll_loss.sum() / active
    smoothed_loss = smoothed_loss.sum() / (active * log_probs.shape[-1])
    return 0.9 * nll_loss + 0.1 * smoothed_loss


def z_loss_of_all(x, w, bias, y):
    """transformers' Bamba."""
    logits = F.linear(x, w)
    loss = F.cross_entropy(logits.float().view(-1, V), shift(y).view(-1), ignore_index=IGNORED)
    return loss + 1e-2 * logits.logsumexp(dim=-1).to(dtype=loss.dtype).pow(2).mean()


def z_loss_masked(x, w, bias, y):
    """OLMo."""
    logits = F.linear(x, w)[..., :-1, :].contiguous().view(-1, V)
    labels = y[..., 1:].contiguous().view(-1)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="mean")
    z_squared = (logits.logsumexp(-1).pow(2) * (labels != IGNORED)).mean()
    return loss + 1e-2 * z_squared


def z_loss_summed(x, w, bias, y):
    """OLMo-core."""
    logits, labels = F.linear(x, w).float().view(-1, V), y.view(-1)
    mask = labels != IGNORED
    z_squared = torch.where(mask, logits.logsumexp(-1) ** 2, 0.0).sum()
    return (F.cross_entropy(logits, labels, reduction="sum") + 1e-2 * z_squared) / mask.sum()


def z_loss_beside_a_shifted_loss(x, w, bias, y):
    logits = F.linear(x, w).float()
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))
    return loss + 1e-2 * torch.logsumexp(logits, -1).square().mean()


def masked_mean(x, w, bias, y):
    losses = F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), reduction="none").view(B, S)
    mask = (y != IGNORED).float()
    return (losses * mask).sum() / mask.sum()


def weighted(x, w, bias, y):
    losses = F.cross_entropy(F.linear(x, w).transpose(1, 2), y, reduction="none")
    return (losses * x.detach().mean(-1)).sum()


def mean_of_gathered(x, w, bias, y):
    mask = y != IGNORED
    return -(log_probs_of(x, w, y) * mask).sum() / mask.sum()


def by_hand(x, w, bias, y):
    logits = F.linear(x, w).float()
    return (logits.logsumexp(-1) - logits.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)).mean()


def by_hand_apart(x, w, bias, y):
    logits = F.linear(x, w).float()
    return logits.logsumexp(-1).mean() - logits.gather(-1, y.clamp(min=0).unsqueeze(-1)).mean()


def normalised_by_hand(x, w, bias, y):
    logits = F.linear(x, w).float()
    return F.nll_loss((logits - logits.logsumexp(-1, keepdim=True)).view(-1, V), y.view(-1))


def log_of_softmax(x, w, bias, y):
    return F.nll_loss(torch.log(F.linear(x, w).softmax(-1)).view(-1, V), y.view(-1))


def classes_second(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), y)


def classes_second_smoothed(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).permute(0, 2, 1), y, label_smoothing=0.2)


def classes_second_late(x, w, bias, y):
    return F.nll_loss(F.log_softmax(F.linear(x, w), -1).transpose(1, 2), y)


def classes_second_of_four(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).transpose(1, 2).unsqueeze(2), y.unsqueeze(1))


def heads_first(x, w, bias, y):
    """transformers' ProphetNet: n-gram heads, moved before the batch."""
    logits = F.linear(torch.stack([x, x * 0.5], 1), w).transpose(0, 1).contiguous()
    targets = torch.stack([y, y])
    log_probs = F.log_softmax(logits.view(-1, V), dim=-1, dtype=torch.float32)
    return F.nll_loss(log_probs, targets.view(-1), reduction="mean")


def one_hot(x, w, bias, y):
    return -(F.one_hot(y.clamp(min=0), V) * F.linear(x, w).log_softmax(-1)).sum(-1).mean()


def indexed(x, w, bias, y):
    log_probs = F.linear(x, w).view(-1, V).log_softmax(-1)
    return -log_probs[torch.arange(B * S), y.view(-1).clamp(min=0)].mean()


def taken_along(x, w, bias, y):
    return -torch.take_along_dim(F.linear(x, w).log_softmax(-1), y.clamp(min=0).unsqueeze(-1), -1).mean()


def einsum(x, w, bias, y):
    return F.cross_entropy(torch.einsum("bsh,vh->bsv", x, w).view(-1, V), y.view(-1))


def bias_added(x, w, bias, y):
    """transformers' BART."""
    return F.cross_entropy((F.linear(x, w) + bias.view(1, V)).view(-1, V), y.view(-1))


def last_token(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w)[:, -1], y[:, -1])


def first_sequence(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w)[0], y[0])


def vocabulary_slice(x, w, bias, y):
    """nanochat: the weight has more rows than there are tokens, for alignment."""
    logits = F.linear(x, w)[..., : V - 5].float()
    logits = 15 * torch.tanh(logits / 15)
    return F.cross_entropy(logits.view(-1, V - 5), y.view(-1).clamp(min=-1, max=V - 6), ignore_index=-1)


def logits_to_keep(x, w, bias, y):
    return F.cross_entropy(F.linear(x[:, -3:, :], w).float().view(-1, V), y[:, -3:].reshape(-1))


def int32_labels(x, w, bias, y):
    return F.cross_entropy(F.linear(x, w).view(-1, V), y.int().view(-1).long())


def half_of_it(x, w, bias, y):
    return 0.5 * F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1)) + x.square().mean()


def logged_too(x, w, bias, y):
    loss = F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1))
    return loss / 4, loss.detach(), loss.exp()


def two_losses(x, w, bias, y):
    logits = F.linear(x, w).view(-1, V)
    smoothed = F.cross_entropy(logits, y.view(-1), label_smoothing=0.1, reduction="sum")
    return F.cross_entropy(logits, y.view(-1)) + smoothed


SCALARS = [
    smoothed,
    smoothed_sum,
    smoothed_per_token,
    smoothed_with_class_weights,
    smoothed_by_hand,
    z_loss_of_all,
    z_loss_masked,
    z_loss_summed,
    z_loss_beside_a_shifted_loss,
    masked_mean,
    weighted,
    mean_of_gathered,
    by_hand,
    by_hand_apart,
    normalised_by_hand,
    log_of_softmax,
    classes_second,
    classes_second_smoothed,
    classes_second_late,
    classes_second_of_four,
    heads_first,
    one_hot,
    indexed,
    taken_along,
    einsum,
    bias_added,
    last_token,
    first_sequence,
    vocabulary_slice,
    logits_to_keep,
    int32_labels,
    half_of_it,
    logged_too,
    two_losses,
]

# ----------------------------------------------------------------------------------------- numbers that go other ways


def gathered(x, w, bias, y):
    return log_probs_of(x, w, y)


def selected_in_float(x, w, bias, y):
    """TRL's selective_log_softmax for fp32."""
    logits, index = F.linear(x, w).float() / 0.7, y.clamp(min=0).unsqueeze(-1)
    selected_logits = torch.gather(logits, dim=-1, index=index)
    logsumexp_values = torch.stack([torch.logsumexp(lg, dim=-1) for lg in logits])
    return (selected_logits - logsumexp_values.unsqueeze(-1)).squeeze(-1)


def selected_in_half(x, w, bias, y):
    """TRL's selective_log_softmax for bf16."""
    per_token_logps = []
    for row_logits, row_labels in zip(F.linear(x, w), y.clamp(min=0).unsqueeze(-1), strict=True):
        row_logps = F.log_softmax(row_logits, dim=-1)
        per_token_logps.append(row_logps.gather(dim=-1, index=row_labels))
    return torch.stack(per_token_logps).squeeze(-1)


def selected_after_a_shift(x, w, bias, y):
    per_token_logps = []
    for logits_row, input_ids_row in zip(F.linear(x, w)[:, :-1], y[:, 1:].clamp(min=0), strict=True):
        log_probs = logits_row.log_softmax(dim=-1)
        per_token_logps.append(torch.gather(log_probs, dim=1, index=input_ids_row.unsqueeze(1)).squeeze(1))
    return torch.stack(per_token_logps)


def z_loss_returned_too(x, w, bias, y):
    logits, labels = F.linear(x, w).float().view(-1, V), y.view(-1)
    return F.cross_entropy(logits, labels), 1e-2 * logits.logsumexp(-1).pow(2).mean()


def mean_of_each_sequence(x, w, bias, y):
    losses = F.cross_entropy(F.linear(x, w).transpose(1, 2), y, reduction="none")
    mask = (y != IGNORED).float()
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def policy_gradient(x, w, bias, y):
    logps, mask = log_probs_of(x, w, y), (y != IGNORED).float()
    ratio = torch.exp(logps - logps.detach())
    loss = -torch.min(ratio * 0.3, ratio.clamp(0.8, 1.2) * 0.3)
    return ((loss * mask).sum(-1) / mask.sum(-1)).mean()


def preference(x, w, bias, y):
    logps = torch.where(y != IGNORED, log_probs_of(x, w, y), 0.0).sum(-1)
    return -F.logsigmoid(0.1 * (logps[0] - logps[1]))


def focal(x, w, bias, y):
    losses = F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def learned_weights(x, w, bias, y):
    losses = F.cross_entropy(F.linear(x, w).view(-1, V), y.view(-1), reduction="none")
    return (losses * bias[: B * S]).sum()


PER_TOKEN = [
    gathered,
    selected_in_float,
    selected_in_half,
    selected_after_a_shift,
    z_loss_returned_too,
    mean_of_each_sequence,
    policy_gradient,
    preference,
    focal,
    learned_weights,
]


def problem(dtype=torch.float32):
    x, w, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in [(B, S, H), (V, H), (V,)])
    y = torch.randint(V, (B, S))
    y[0, :2] = IGNORED
    return x, w, bias, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", [*SCALARS, *PER_TOKEN], ids=lambda f: f.__name__)
def test_rewrites(spelling, dtype, verify):
    report = verify(spelling, problem(dtype))
    assert report.counts == {"linear_cross_entropy": 1}, report
    (site,) = report.rewritten
    assert site.params["is_total"] is (spelling in SCALARS)  # gradients in forward, or logits computed twice


# A vocabulary of which a slice is taken must be of known size, as a parameter's is.
@pytest.mark.parametrize(
    "spelling", [f for f in [*SCALARS, *PER_TOKEN] if f is not vocabulary_slice], ids=lambda f: f.__name__
)
def test_rewrites_with_dynamic_shapes(spelling, verify):
    assert verify(spelling, problem(), dynamic=True, inner="aot_eager").counts == {"linear_cross_entropy": 1}


@pytest.mark.parametrize("spelling", [smoothed, z_loss_masked, selected_in_half], ids=lambda f: f.__name__)
def test_rewrites_under_autocast(spelling, verify):
    # Few tokens: the mean of their errors in bf16 may be small by luck.
    assert verify(spelling, problem(), autocast=True, ulps=2**13).counts == {"linear_cross_entropy": 1}


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


def test_rewrites_each_of_several_heads(verify):
    """Multi-token prediction: as many products as tokens ahead, on one weight."""

    def losses(x, w, bias, y):
        heads = [F.linear(x * (k + 1), w)[:, : S - 1 - k].reshape(-1, V) for k in range(3)]
        return sum(F.cross_entropy(logits, y[:, 1 + k :].reshape(-1)) / 3 for k, logits in enumerate(heads))

    assert verify(losses, problem()).counts == {"linear_cross_entropy": 3}


def test_checkpoint_around_the_head_runs_it_once(monkeypatch):
    """A compiled checkpoint computes everything again in backward, but for what is made of gradients already."""
    runs = []
    monkeypatch.setattr(_head_ops, "run_chunks", lambda *a, **k: runs.append(a) or run_chunks(*a, **k))
    x, w, bias, y = problem()

    def loss(x):
        return checkpoint(lambda x: smoothed(F.rms_norm(x.tanh(), (H,)), w, bias, y), x, use_reentrant=False)

    compiled = graphfuse.optimize(loss, fullgraph=True, strict=True)
    compiled(x)  # proves
    runs.clear()
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))
    assert len(runs) == 1


def test_rewrites_without_gradients(verify):
    x, w, bias, y = problem()
    report = verify(z_loss_of_all, (x.detach(), w.detach(), bias, y))
    (site,) = report.rewritten
    assert not any(value for name, value in site.params.items() if name.startswith("need_"))


def test_mean_over_nothing_is_nan_and_z_loss_is_not(verify):
    x, w, bias, y = problem()
    verify(smoothed, (x, w, bias, torch.full_like(y, IGNORED)))
    verify(z_loss_summed, (x, w, bias, torch.full_like(y, IGNORED)))


@pytest.mark.parametrize("spelling", [z_loss_of_all, masked_mean, selected_in_half], ids=lambda f: f.__name__)
def test_rewrites_many_tokens(spelling):
    """Literal sizes, and masks of the size of the features, do not keep a proof from going through."""
    tokens, features, vocabulary = 64, 64, 1024

    def loss(x, w, y):
        return spelling(x, w, None, y)

    globals_before = {name: globals()[name] for name in "BSHV"}
    globals().update(B=4, S=tokens, H=features, V=vocabulary)
    try:
        compiled = graphfuse.optimize(loss, inner="eager", fullgraph=True, strict=True)
        compiled(torch.randn(4, tokens, features), torch.randn(vocabulary, features), torch.randint(9, (4, tokens)))
    finally:
        globals().update(globals_before)
    assert graphfuse.report(compiled).counts == {"linear_cross_entropy": 1}, graphfuse.report(compiled)
