"""lm_head + loss: scalars that are linear in the tokens' losses, as the libraries of the field write them."""

import pytest
import torch
import torch.nn.functional as F

from tests.patterns.heads import IGNORED, B, S, V, log_probs_of, problem, rewrites


def shift(y):
    """Labels moved by one, as transformers does it."""
    return F.pad(y, (0, 1), value=IGNORED)[..., 1:].contiguous()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", SCALARS, ids=lambda f: f.__name__)
def test_rewrites(spelling, dtype, verify):
    rewrites(verify, spelling, dtype, is_total=True)


# A vocabulary of which a slice is taken must be of known size, as a parameter's is.
@pytest.mark.parametrize("spelling", [f for f in SCALARS if f is not vocabulary_slice], ids=lambda f: f.__name__)
def test_rewrites_with_dynamic_shapes(spelling, verify):
    assert verify(spelling, problem(), dynamic=True, inner="aot_eager").counts == {"linear_cross_entropy": 1}


@pytest.mark.parametrize("spelling", [smoothed, z_loss_masked, mean_of_gathered], ids=lambda f: f.__name__)
def test_rewrites_under_autocast(spelling, verify):
    # Few tokens: the mean of their errors in bf16 may be small by luck.
    assert verify(spelling, problem(), autocast=True, ulps=2**13).counts == {"linear_cross_entropy": 1}


def test_rewrites_without_gradients(verify):
    x, w, bias, y = problem()
    report = verify(z_loss_of_all, (x.detach(), w.detach(), bias, y))
    (site,) = report.rewritten
    assert site.params["needs"] == "()"


def test_mean_over_nothing_is_nan_and_z_loss_is_not(verify):
    x, w, bias, y = problem()
    verify(smoothed, (x, w, bias, torch.full_like(y, IGNORED)))
    verify(z_loss_summed, (x, w, bias, torch.full_like(y, IGNORED)))
