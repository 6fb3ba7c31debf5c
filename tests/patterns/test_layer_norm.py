"""LayerNorm: however it is spelled it is rewritten, and nothing else is."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import graphfuse

D = 32
EPS = 1e-5


def functional(x, weight, bias, eps):
    return F.layer_norm(x, (D,), weight, bias, eps)


def no_bias(x, weight, bias, eps):
    return F.layer_norm(x, (D,), weight, None, eps)


def bias_alone(x, weight, bias, eps):
    return F.layer_norm(x, (D,), None, bias, eps)


def olmo(x, weight, bias, eps):
    return F.layer_norm(x.float(), (D,), None, None, eps).to(x.dtype)


def nemotron(x, weight, bias, eps):
    return F.layer_norm(x, (D,), weight + 1.0, bias, eps)


def chameleon(x, weight, bias, eps):
    return F.layer_norm(x, (D,), None, None, eps) * weight + bias


def cohere(x, weight, bias, eps):
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + eps)
    return (weight.to(torch.float32) * h).to(x.dtype)


def deberta(x, weight, bias, eps):
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) / torch.sqrt(variance + eps)
    return weight * h.to(x.dtype) + bias


def pocket_tts(x, weight, bias, eps):
    variance = x.var(-1, unbiased=False, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + eps) * weight + bias


def xlstm(x, weight, bias, eps):
    h = x.float()
    h = (h - h.mean(dim=-1, keepdim=True)) * torch.rsqrt(h.var(dim=-1, keepdim=True, unbiased=False) + eps)
    return h.to(x.dtype) * weight + bias


def annotated_transformer(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    return weight * (x - mean) / (x.std(-1, keepdim=True, unbiased=False) + eps) + bias


def var_mean(x, weight, bias, eps):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return bias + weight * ((x - mean) / (variance + eps).sqrt())


def std_mean(x, weight, bias, eps):
    deviation, mean = torch.std_mean(x, -1, correction=0)
    return (x - mean[..., None]) / deviation.clamp(min=eps).unsqueeze(-1) * weight + bias


def centred_once(x, weight, bias, eps):
    x = x - x.mean(-1, keepdim=True)
    return weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) + bias


def variance_of_centred(x, weight, bias, eps):
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.var(-1, keepdim=True, correction=0) + eps) * weight + bias


def sums(x, weight, bias, eps):
    c = x - x.sum(-1, keepdim=True) / D
    return c * (c.square().sum(-1, keepdim=True) * (1 / D) + eps) ** -0.5 * weight + bias


def difference_of_means(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    variance = (x.pow(2).mean(-1, keepdim=True) - mean.pow(2)).clamp(min=0)
    return (x - mean) * torch.rsqrt(variance + eps) * weight + bias


def scaled_inverse(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps) * weight
    return (x - mean) * scale + bias


def normalize(x, weight, bias, eps):
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1) * D**0.5 * weight + bias


def offset(x, weight, bias, eps):
    c = x - x.mean(-1, keepdim=True)
    return c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight) + bias


def in_place(x, weight, bias, eps):
    c = x - x.mean(-1, keepdim=True)
    return (c * c.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()).mul_(weight).add_(bias)


def weightless(x, weight, bias, eps):
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def viewed_bias(x, weight, bias, eps):
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + eps) * weight[None, None] + bias.view(1, 1, D)


def heads(x, weight, bias, eps):
    h = x.view(*x.shape[:-1], 2, D // 2).transpose(1, 2)
    return F.layer_norm(h, (D // 2,), weight[: D // 2], None, eps)


def channels_last(x, weight, bias, eps):
    return F.layer_norm(x.transpose(1, 2).contiguous().transpose(1, 2), (D,), weight, bias, eps)


SPELLINGS = [
    functional,
    no_bias,
    bias_alone,
    olmo,
    nemotron,
    chameleon,
    cohere,
    deberta,
    pocket_tts,
    xlstm,
    annotated_transformer,
    var_mean,
    std_mean,
    centred_once,
    variance_of_centred,
    sums,
    difference_of_means,
    scaled_inverse,
    normalize,
    offset,
    in_place,
    weightless,
    viewed_bias,
    heads,
    channels_last,
]


def inputs(dtype=torch.float32, other_dtype=None):
    x = (torch.randn(2, 5, D) * torch.logspace(-2, 1, 5)[:, None]).to(dtype).requires_grad_()
    weight, bias = (torch.randn(D).to(other_dtype or dtype).requires_grad_() for _ in range(2))
    return x, weight, bias, EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_rewrites(spelling, dtype, verify):
    report = verify(spelling, inputs(dtype))
    assert report.counts == {"layer_norm": 1}, report
    assert report.refused == []


class Spelled(nn.Module):
    """A spelling as models hold it: weight and bias are parameters, eps an attribute."""

    def __init__(self, spelling, weight, bias, eps):
        super().__init__()
        self.spelling, self.eps = spelling, eps
        self.weight, self.bias = (nn.Parameter(t.detach().clone()) for t in (weight, bias))
        self.matrix = nn.Parameter(torch.eye(len(weight)))

    def forward(self, x):
        return self.spelling(F.linear(x, self.matrix), self.weight, self.bias, self.eps)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_rewrites_where_sizes_and_eps_are_symbols(spelling):
    x, *others = inputs()
    eager, model = Spelled(spelling, *others), Spelled(spelling, *others)
    graphfuse.optimize(model, inner="eager", dynamic=True, fullgraph=True, strict=True)
    for rows in (x, x[:, :3].repeat(3, 1, 1)):
        ours, theirs = model(rows.detach()), eager(rows.detach())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        grads = (torch.autograd.grad(y.square().sum(), m.matrix)[0] for y, m in ((ours, model), (theirs, eager)))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)
    report = graphfuse.report(model)
    assert report.counts == {"layer_norm": 1}, report


@pytest.mark.parametrize("spelling", [functional, olmo, cohere, deberta, pocket_tts], ids=lambda f: f.__name__)
def test_rewrites_under_autocast(spelling, verify):
    matrix = torch.randn(D, D, requires_grad=True)

    def layer(x, weight, bias, eps, matrix):
        return F.linear(spelling(F.linear(x, matrix), weight, bias, eps), matrix)

    report = verify(layer, (*inputs(), matrix), autocast=True)
    assert report.counts == {"layer_norm": 1}, report


@pytest.mark.parametrize("spelling", [functional, chameleon, cohere, deberta], ids=lambda f: f.__name__)
def test_rewrites_a_wide_weight(spelling, verify):
    report = verify(spelling, inputs(torch.bfloat16, torch.float32))
    assert report.counts == {"layer_norm": 1}, report


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_rewrites_modules_of_torch(eps, options, verify):
    report = verify(nn.LayerNorm(D, eps=eps, **options).forward, inputs()[:1], inner="aot_eager")
    assert report.counts == {"layer_norm": 1}, report


@pytest.mark.parametrize(("name", "count"), [("Cohere", 3), ("Nemotron", 5), ("GPT2", 5), ("Olmo", 5)])
def test_rewrites_layers_of_transformers(name, count):
    """Every norm of a decoder, weights and gradients as in eager."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings |= {"vocab_size": 64, "intermediate_size": 48, "pad_token_id": 0, "max_position_embeddings": 64}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).eval()
    tokens = torch.randint(1, 64, (2, 7))

    def loss():
        return model(input_ids=tokens, use_cache=False).last_hidden_state.square().sum()

    compiled = graphfuse.optimize(loss, inner="aot_eager", strict=True)
    ours, theirs = (
        torch.autograd.grad(call(), list(model.parameters())[1:], allow_unused=True) for call in (compiled, loss)
    )
    assert graphfuse.report(compiled).counts["layer_norm"] == count
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_reads_off_eps_gain_and_rounding(verify):
    """What the report says is what the kernel is told."""
    (site,) = verify(deberta, inputs(torch.bfloat16)).sites
    assert site.params["eps"] == pytest.approx(EPS)
    assert (site.params["mode"], site.params["offset"]) == ("inside", 0.0)
    assert (site.params["normalized_dtype"], site.params["out_dtype"]) == ("bfloat16", "bfloat16")
    assert site.variant == "weight and bias, weight after cast, bfloat16"
    (site,) = verify(nemotron, inputs(torch.bfloat16)).sites
    assert (site.params["offset"], site.params["normalized_dtype"]) == (1.0, "float32")
    assert site.variant == "1 + weight and bias, weight before cast, bfloat16"
    (site,) = verify(annotated_transformer, inputs()).sites
    assert (site.params["mode"], site.params["eps"]) == ("outside", EPS)
    (site,) = verify(normalize, inputs()).sites
    assert site.params["gain"] == pytest.approx(1.0)
    assert (site.params["mode"], site.variant) == ("clamp", "weight and bias, weight before cast, clamp, float32")
    (site,) = verify(olmo, inputs(torch.bfloat16)).sites
    assert site.variant == "no weight, bfloat16"


def test_takes_a_new_eps_for_a_new_one():
    """The value of a symbolic eps is guarded."""
    compiled = graphfuse.optimize(pocket_tts, inner="eager", dynamic=True, fullgraph=True, strict=True)
    x, weight, bias, _ = inputs()
    for eps in (1e-6, 0.5, 1e-6):
        ours, theirs = (fn(x, weight, bias, eps) for fn in (compiled, pocket_tts))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert graphfuse.report(compiled).counts == {"layer_norm": 1}


def test_handles_no_rows(verify):
    *_, weight, bias, eps = inputs()
    report = verify(functional, (torch.randn(0, D, requires_grad=True), weight, bias, eps))
    assert report.notes == []
