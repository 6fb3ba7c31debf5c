"""The hint of a refused site: the model's author does what it says, and the site matches."""

import pytest
import torch
import torch.nn.functional as F

import graphfuse

D = 16


def site(fn, *inputs):
    torch._dynamo.reset()
    compiled = graphfuse.optimize(fn, inner="eager", strict=True)
    compiled(*inputs)
    return graphfuse.report(compiled).current[-1]


def normalised(x, correction):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(x.var(-1, keepdim=True, correction=correction) + 1e-5)


def gated(gate, up, weights, activation):
    return activation(gate @ weights) * (up @ weights)


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def layer_norm_cases():
    x = torch.randn(4, D)
    return (lambda x: normalised(x, 1), x), (lambda x: normalised(x, 0), x)


def glu_cases():
    tensors = torch.randn(4, D), torch.randn(4, D), torch.randn(D, D)
    return (lambda *t: gated(*t, F.softplus), *tensors), (lambda *t: gated(*t, F.silu), *tensors)


def rope_cases():
    x, cos, sin = torch.randn(2, 4, D), torch.randn(4, D).requires_grad_(), torch.randn(4, D).requires_grad_()
    return (rotated, x, cos, sin), (lambda x, cos, sin: rotated(x, cos.detach(), sin.detach()), x, cos, sin)


def rms_norm_cases():
    x = torch.randn(3, 4, D)
    return (
        (lambda x: x * torch.rsqrt(x.square().mean((1, 2), keepdim=True) + 1e-6), x),
        (lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), x),
    )


def head_cases():
    hidden, weight, labels = torch.randn(6, D), torch.randn(32, D).requires_grad_(), torch.randint(32, (6,))

    def with_accuracy(hidden, weight, labels):
        logits = hidden @ weight.T
        return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).sum()

    def alone(hidden, weight, labels):
        return F.cross_entropy(hidden @ weight.T, labels)

    return (with_accuracy, hidden, weight, labels), (alone, hidden, weight, labels)


@pytest.mark.parametrize(
    ("cases", "pattern", "reason", "hint"),
    [
        (layer_norm_cases, "layer_norm", "variance: expected a division by 16, got one by 15", "correction=0"),
        (glu_cases, "glu", "activation: expected one of silu,", "use one of these activations"),
        (rope_cases, "rope", "cos, sin: expected tables without a gradient, got trainable ones", "detach()"),
        (rms_norm_cases, "rms_norm", "dim: expected the last one, got [1, 2]", ".mean(-1, keepdim=True)"),
        (head_cases, "linear_cross_entropy", "logits: expected no use besides the loss, got aten.argmax", "outside"),
    ],
    ids=["layer_norm", "glu", "rope", "rms_norm", "linear_cross_entropy"],
)
def test_hint_makes_the_site_match(cases, pattern, reason, hint):
    before, after = cases()
    refused = site(*before)
    assert (refused.pattern, refused.status) == (pattern, "refused")
    assert refused.reason.startswith(reason)
    assert hint in refused.hint
    assert "test_near_misses.py:" in refused.source
    rewritten = site(*after)
    assert (rewritten.pattern, rewritten.status) == (pattern, "rewritten")
    assert rewritten.hint == ""
