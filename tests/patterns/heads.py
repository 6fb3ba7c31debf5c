"""The head that the tests of lm_head + loss spell in many ways."""

import torch
import torch.nn.functional as F

B, S, H, V = 2, 7, 16, 37
IGNORED = -100


def problem(dtype=torch.float32):
    """Hidden states, weight and bias that require grad; labels, two of which do not count."""
    x, w, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in [(B, S, H), (V, H), (V,)])
    y = torch.randint(V, (B, S))
    y[0, :2] = IGNORED
    return x, w, bias, y


def log_probs_of(x, w, y):
    """The log-probability of each label."""
    return F.linear(x, w).log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def rewrites(verify, spelling, dtype, *, is_total):
    """The head is rewritten, and its gradients are computed in forward, if it ends in one scalar, or in backward."""
    report = verify(spelling, problem(dtype))
    assert report.counts == {"linear_cross_entropy": 1}, report
    (site,) = report.rewritten
    assert site.params["is_total"] is is_total
