"""lm_head + loss: numbers per token that are put to other uses than a weighted sum, as for a policy gradient."""

import pytest
import torch
import torch.nn.functional as F

from tests.patterns.heads import IGNORED, B, S, V, log_probs_of, problem, rewrites


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", PER_TOKEN, ids=lambda f: f.__name__)
def test_rewrites(spelling, dtype, verify):
    rewrites(verify, spelling, dtype, is_total=False)


@pytest.mark.parametrize("spelling", PER_TOKEN, ids=lambda f: f.__name__)
def test_rewrites_with_dynamic_shapes(spelling, verify):
    assert verify(spelling, problem(), dynamic=True, inner="aot_eager").counts == {"linear_cross_entropy": 1}


def test_rewrites_under_autocast(verify):
    # Few tokens: the mean of their errors in bf16 may be small by luck.
    assert verify(selected_in_half, problem(), autocast=True, ulps=2**13).counts == {"linear_cross_entropy": 1}
