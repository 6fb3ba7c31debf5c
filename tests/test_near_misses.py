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


def attention_cases():
    states = torch.randn(1, 2, 8, D)

    def windowed(window):
        def attend(x):
            distance = torch.arange(8)[:, None] - torch.arange(8)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=(distance >= 0) & (distance < window))

        return attend

    return (windowed(4), states), (windowed(8), states)


def attention_by_hand_cases():
    states = torch.randn(1, 2, 8, D)

    def attend(x):
        return (x @ x.mT / 4).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -1e9).softmax(-1)

    def both(x):
        weights = attend(x)
        return weights @ x, weights

    return (both, states), (lambda x: attend(x) @ x, states)


def in_place_cases():
    def overwritten(gate, up, weights):
        gate, up = gate @ weights, up @ weights
        activated = F.silu(gate)
        gate += 1.0
        return activated * up, gate

    def kept(gate, up, weights):
        gate, up = gate @ weights, up @ weights
        activated = F.silu(gate)
        gate = gate + 1.0
        return activated * up, gate

    tensors = torch.randn(4, D), torch.randn(4, D), torch.randn(D, D)
    return (overwritten, *tensors), (kept, *tensors)


def grad_mode_cases():
    def frozen(x):
        with torch.no_grad():
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * scale

    def whole(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    x = torch.randn(4, D).requires_grad_()
    return (frozen, x), (whole, x)


def two_graphs_cases():
    hidden, weight, labels = torch.randn(6, D), torch.randn(32, D), torch.randint(32, (6,))

    def apart(hidden, weight, labels):
        logits = hidden @ weight.T
        torch._dynamo.graph_break()
        return F.cross_entropy(logits, labels)

    def together(hidden, weight, labels):
        return F.cross_entropy(hidden @ weight.T, labels)

    return (apart, hidden, weight, labels), (together, hidden, weight, labels)


@pytest.mark.parametrize(
    ("cases", "pattern", "reason", "hint"),
    [
        (layer_norm_cases, "layer_norm", "variance: expected a division by 16, got one by 15", "correction=0"),
        (glu_cases, "glu", "activation: expected one of silu,", "use one of these activations"),
        (rope_cases, "rope", "cos, sin: expected tables without a gradient, got trainable ones", "detach()"),
        (rms_norm_cases, "rms_norm", "dim: expected the last one, got [1, 2]", ".mean(-1, keepdim=True)"),
        (head_cases, "linear_cross_entropy", "logits: expected no use besides the loss, got aten.argmax", "outside"),
        (two_graphs_cases, "linear_cross_entropy", "logits: expected a matrix product in the same graph", "one graph"),
        (attention_cases, "causal_attention", "mask: expected the lower triangle, got another constant", "window"),
        (attention_by_hand_cases, "attention", "weights: expected no use besides the product", "output_attentions"),
        (in_place_cases, "glu", "expected no in-place change", "x = x + y, not x += y"),
        (grad_mode_cases, "rms_norm", "grad mode: expected one for the whole region", "no_grad"),
    ],
    ids=lambda value: value.__name__.removesuffix("_cases") if callable(value) else "",
)
def test_hint_makes_the_site_match(cases, pattern, reason, hint):
    before, after = cases()
    refused = site(*before)
    assert (refused.pattern, refused.status) == (pattern, "refused")
    assert reason in refused.reason
    assert hint in refused.hint
    assert "test_near_misses.py:" in refused.source
    rewritten = site(*after)
    assert (rewritten.pattern, rewritten.status) == (pattern, "rewritten")
    assert rewritten.hint == ""
