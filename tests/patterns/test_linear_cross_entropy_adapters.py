"""lm_head + loss where the logits are a sum of products: adapters (LoRA) on the head, in every spelling."""

import pytest
import torch
import torch.nn.functional as F

import graphfuse

B, S, H, V, R = 2, 7, 16, 37, 3
SCALE = 0.7


def loss_of(logits, y):
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), y.view(-1))


def lora(x, w, bias, a, b, y):
    """peft's: the delta is scaled after its second product."""
    return loss_of(F.linear(x, w) + F.linear(F.linear(x, a), b) * SCALE, y)


def delta_first(x, w, bias, a, b, y):
    return loss_of(SCALE * F.linear(F.linear(x, a), b) + F.linear(x, w), y)


def scaled_between(x, w, bias, a, b, y):
    return loss_of(F.linear(x, w) + F.linear(F.linear(x, a) * SCALE, b), y)


def scaled_before(x, w, bias, a, b, y):
    return loss_of(F.linear(x, w) + F.linear(F.linear(x * SCALE, a), b), y)


def alpha(x, w, bias, a, b, y):
    return loss_of(torch.add(F.linear(x, w), F.linear(F.linear(x, a), b), alpha=2), y)


def subtracted(x, w, bias, a, b, y):
    return loss_of(F.linear(x, w) - F.linear(F.linear(x, a), b), y)


def in_place(x, w, bias, a, b, y):
    logits = F.linear(x, w)
    logits += F.linear(F.linear(x, a), b) * SCALE
    return loss_of(logits, y)


def addmm(x, w, bias, a, b, y):
    return loss_of(torch.addmm(x.view(-1, H) @ w.t(), x.view(-1, H) @ a.t(), b.t()), y)


def matmul(x, w, bias, a, b, y):
    return loss_of(x @ w.T + (x @ a.T) @ b.T * SCALE, y)


def einsum(x, w, bias, a, b, y):
    return loss_of(torch.einsum("bsh,vh->bsv", x, w) + torch.einsum("bsr,vr->bsv", F.linear(x, a), b), y)


def flattened_late(x, w, bias, a, b, y):
    return loss_of(F.linear(x, w).view(-1, V) + F.linear(F.linear(x, a), b).view(-1, V), y)


def with_bias(x, w, bias, a, b, y):
    return loss_of(F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * SCALE, y)


def with_both_biases(x, w, bias, a, b, y):
    return loss_of(F.linear(x, w, bias) + F.linear(F.linear(x, a), b, bias * 2) * SCALE, y)


def bias_added_after(x, w, bias, a, b, y):
    return loss_of((F.linear(x, w) + F.linear(F.linear(x, a), b)) * SCALE + bias, y)


def soft_capped(x, w, bias, a, b, y):
    return loss_of(torch.tanh((F.linear(x, w) + F.linear(F.linear(x, a), b) * SCALE) / 5.0) * 5.0, y)


def both_scaled(x, w, bias, a, b, y):
    return loss_of((F.linear(x, w) * 0.5 + F.linear(F.linear(x, a), b) * SCALE) / 3.0, y)


def two_adapters(x, w, bias, a, b, y):
    logits = F.linear(x, w)
    for k in (1.0, -0.5):
        logits = logits + F.linear(F.linear(x, a * k), b + k) * SCALE
    return loss_of(logits, y)


def shifted(x, w, bias, a, b, y):
    logits = F.linear(x, w) + F.linear(F.linear(x, a), b) * SCALE
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))


def each_shifted(x, w, bias, a, b, y):
    logits = F.linear(x, w)[:, :-1] + F.linear(F.linear(x, a), b)[:, :-1]
    return F.cross_entropy(logits.reshape(-1, V), y[:, 1:].reshape(-1))


def vocabulary_slice(x, w, bias, a, b, y):
    logits = (F.linear(x, w) + F.linear(F.linear(x, a), b))[..., : V - 5]
    return F.cross_entropy(logits.reshape(-1, V - 5), y.view(-1).clamp(max=V - 6))


def per_token(x, w, bias, a, b, y):
    logits = F.linear(x, w) + F.linear(F.linear(x, a), b) * SCALE
    return logits.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def of_other_hidden_states(x, w, bias, a, b, y):
    """Nor need the second product be thin."""
    return loss_of(F.linear(x, w) + F.linear(x.sin(), w * 2), y)


def wide_delta(x, w, bias, a, b, y):
    """As peft keeps adapters in fp32 beside a bf16 model."""
    base = F.linear(x, w)
    delta = F.linear(F.linear(x.float(), a.float()), b.float())
    return loss_of((base + delta * SCALE).to(base.dtype), y)


def some_columns(x, w, bias, a, b, y):
    """A second weight that is a part of another one."""
    return loss_of(F.linear(x, w) + F.linear(x[..., :5], w[:, :5]), y)


def no_norm_before(x, w, bias, a, b, y):
    """Hidden states that come straight out of a projection."""
    x = F.linear(x, w[:H])
    return loss_of(F.linear(x, w) + F.linear(F.linear(x, a), b), y)


SPELLINGS = [
    lora,
    delta_first,
    scaled_between,
    scaled_before,
    alpha,
    subtracted,
    in_place,
    addmm,
    matmul,
    einsum,
    flattened_late,
    with_bias,
    with_both_biases,
    bias_added_after,
    soft_capped,
    both_scaled,
    two_adapters,
    shifted,
    each_shifted,
    vocabulary_slice,
    per_token,
    of_other_hidden_states,
    wide_delta,
    some_columns,
    no_norm_before,
]


def problem(dtype=torch.float32):
    shapes = [(B, S, H), (V, H), (V,), (R, H), (V, R)]
    x, w, bias, a, b = ((0.5 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes)
    y = torch.randint(V, (B, S))
    y[0, :2] = -100
    return x, w, bias, a, b, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_rewrites(spelling, dtype, verify):
    # Eager rounds each product by itself: the error of a mean of few tokens is luck, eager's too.
    report = verify(spelling, problem(dtype), ulps=4.0 if dtype == torch.float32 else 2**15)
    assert report.counts == {"linear_cross_entropy": 1}, report


@pytest.mark.parametrize("spelling", [lora, addmm, einsum, two_adapters, each_shifted], ids=lambda f: f.__name__)
def test_rewrites_with_dynamic_shapes(spelling, verify):
    assert verify(spelling, problem(), dynamic=True, inner="aot_eager").counts == {"linear_cross_entropy": 1}


@pytest.mark.parametrize("spelling", [lora, with_both_biases, two_adapters], ids=lambda f: f.__name__)
def test_rewrites_under_autocast(spelling, verify):
    assert verify(spelling, problem(), autocast=True, ulps=2**15).counts == {"linear_cross_entropy": 1}


def test_a_frozen_weight_gets_no_gradient(verify):
    x, w, bias, a, b, y = problem()
    (site,) = verify(lora, (x, w.detach(), bias, a, b, y)).rewritten
    assert site.params["needs"] == "('hidden', 'low_hidden', 'low_weight')"
    assert site.variant == "mean, sum of 2 products, float32"


def test_dropout_before_the_adapter_is_its_input():
    """It is random outside of what is rewritten, and the same in forward and backward."""
    x, w, _, a, b, y = problem()

    def loss(x, w, a, b, y):
        return loss_of(F.linear(x, w) + F.linear(F.linear(F.dropout(x, 0.5), a), b) * SCALE, y)

    compiled = graphfuse.optimize(loss, inner="eager", fullgraph=True, strict=True)
    results = []
    for call in (compiled, loss):
        torch.manual_seed(0)
        found = call(x, w, a, b, y)
        results.append((found, *torch.autograd.grad(found, (x, w, a, b))))
    torch.testing.assert_close(*results)
    assert graphfuse.report(compiled).counts == {"linear_cross_entropy": 1}


def dropped_out(x, w, bias, a, b, y):
    return loss_of(F.linear(x, w) + F.dropout(F.linear(F.linear(x, a), b), 0.5), y)


def of_the_logits(x, w, bias, a, b, y):
    """The second product is of what the first one gave."""
    logits = F.linear(x, w)
    return loss_of(logits + F.linear(F.linear(logits, a[:, :1].expand(R, V)), b), y)


def normalised_weight(x, w, bias, a, b, y):
    """DoRA: the size of each row of the weight is learned, and multiplies the logits class by class."""
    size = (w + b @ a).norm(dim=1).detach()
    logits = F.linear(x, w) + (bias / size - 1) * F.linear(x, w) + bias / size * F.linear(F.linear(x, a), b)
    return loss_of(logits, y)


def capped_before_the_sum(x, w, bias, a, b, y):
    return loss_of(torch.tanh(F.linear(x, w)) + F.linear(F.linear(x, a), b), y)


def learned_scale(x, w, bias, a, b, y):
    return loss_of(F.linear(x, w) + F.linear(F.linear(x, a), b) * bias[0], y)


def of_other_tokens(x, w, bias, a, b, y):
    return loss_of(F.linear(x, w)[:, :-1] + F.linear(F.linear(x, a), b)[:, 1:], y[:, 1:].contiguous())


def read_between(x, w, bias, a, b, y):
    base = F.linear(x, w)
    return loss_of(base + F.linear(F.linear(x, a), b), y) + base.square().mean()


@pytest.mark.parametrize(
    "other",
    [of_the_logits, normalised_weight, capped_before_the_sum, learned_scale, of_other_tokens, read_between],
    ids=lambda f: f.__name__,
)
def test_refuses(other, verify):
    report = verify(other, problem())
    assert report.counts == {}
    assert all(site.reason.startswith(("logits: expected", "hidden: expected")) for site in report.refused)


def test_refuses_dropout_of_logits():
    compiled = graphfuse.optimize(dropped_out, inner="eager", fullgraph=True, strict=True)
    compiled(*problem())
    assert graphfuse.report(compiled).counts == {}
