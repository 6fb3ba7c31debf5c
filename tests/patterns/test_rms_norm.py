"""RMSNorm: however it is spelled it is rewritten, and nothing else is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphfuse

D = 32
EPS = 1e-5


def llama(x, weight, eps):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def gemma(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + weight.float())).type_as(x)


def olmo2(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * h).to(x.dtype)


def gemma3n_power(x, weight, eps):
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + eps, -0.5) * weight.float()).type_as(x)


def t5_float_variance(x, weight, eps):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + eps)
    return weight * h.to(weight.dtype)


def functional(x, weight, eps):
    return F.rms_norm(x, (D,), weight, eps)


def plain(x, weight, eps):
    return x * torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + eps) * weight


def square(x, weight, eps):
    return weight * (x * torch.rsqrt(torch.square(x).mean(dim=(-1,), keepdim=True) + eps))


def own_product(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, True) + eps) * weight


def sum_over_width(x, weight, eps):
    return x * ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).rsqrt() * weight


def no_keepdim(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1) + eps)[..., None] * weight


def unsqueezed(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1) + eps).unsqueeze(-1) * weight[None, None, :]


def power(x, weight, eps):
    return x * ((x**2).mean(-1, keepdim=True) + eps) ** -0.5 * weight


def one_over_root(x, weight, eps):
    return x * (1 / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)) * weight


def in_place(x, weight, eps):
    return x * x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_() * weight


def in_place_result(x, weight, eps):
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).mul_(weight)


def eps_outside(x, weight, eps):
    return x / (x.norm(2, dim=-1, keepdim=True) * D**-0.5 + eps) * weight


def clamped(x, weight, eps):
    return x / (x.norm(dim=-1, keepdim=True) * D**-0.5).clamp(min=eps) * weight


def normalize(x, weight, eps):
    return F.normalize(x, dim=-1) * D**0.5 * weight


def vector_norm(x, weight, eps):
    return x * torch.reciprocal(torch.linalg.vector_norm(x, dim=-1, keepdim=True) / D**0.5 + eps) * weight


def weightless(x, weight, eps):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def l2(x, weight, eps):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def groups(x, weight, eps):
    g = x.view(*x.shape[:-1], 4, D // 4)
    g = g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + eps)
    return g.flatten(-2) * weight


def heads(x, weight, eps):
    h = x.view(*x.shape[:-1], 2, D // 2).transpose(1, 2)
    return weight[: D // 2] * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))


SPELLINGS = [
    llama,
    gemma,
    olmo2,
    gemma3n_power,
    t5_float_variance,
    functional,
    plain,
    square,
    own_product,
    sum_over_width,
    no_keepdim,
    unsqueezed,
    power,
    one_over_root,
    in_place,
    in_place_result,
    eps_outside,
    clamped,
    normalize,
    vector_norm,
    weightless,
    l2,
    groups,
    heads,
]


def inputs(dtype=torch.float32, weight_dtype=None):
    x = (torch.randn(2, 5, D) * torch.logspace(-2, 1, 5)[:, None]).to(dtype).requires_grad_()
    weight = torch.randn(D).to(weight_dtype or dtype).requires_grad_()
    return x, weight, EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_rewrites(spelling, dtype, verify):
    report = verify(spelling, inputs(dtype))
    assert report.counts == {"rms_norm": 1}, report
    assert report.refused == []


class Spelled(nn.Module):
    """A spelling as models hold it: the weight is a parameter, eps an attribute."""

    def __init__(self, spelling, weight, eps):
        super().__init__()
        self.spelling, self.eps = spelling, eps
        self.weight = nn.Parameter(weight.detach().clone())
        self.matrix = nn.Parameter(torch.eye(len(weight)))

    def forward(self, x):
        return self.spelling(F.linear(x, self.matrix), self.weight, self.eps)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_rewrites_where_eps_is_a_symbol(spelling):
    """With dynamic shapes Dynamo hands over a Python float as an input of the graph."""
    x, weight, eps = inputs()
    eager, model = Spelled(spelling, weight, eps), Spelled(spelling, weight, eps)
    graphfuse.optimize(model, inner="eager", dynamic=True, fullgraph=True, strict=True)
    for rows in (x, x[:, :3].repeat(3, 1, 1)):
        ours, theirs = model(rows.detach()), eager(rows.detach())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        grads = (torch.autograd.grad(y.sum(), m.matrix)[0] for y, m in ((ours, model), (theirs, eager)))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    report = graphfuse.report(model)
    assert report.counts == {"rms_norm": 1}, report


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("spelling", [llama, gemma, olmo2, functional, plain], ids=lambda f: f.__name__)
def test_rewrites_under_autocast(spelling, verify):
    matrix = torch.randn(D, D, requires_grad=True)

    def layer(x, weight, eps, matrix):
        return F.linear(spelling(F.linear(x, matrix), weight, eps), matrix)

    report = verify(layer, (*inputs(), matrix), autocast=True)
    assert report.counts == {"rms_norm": 1}, report


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("spelling", [llama, gemma, olmo2, functional], ids=lambda f: f.__name__)
def test_rewrites_a_wide_weight(spelling, verify):
    report = verify(spelling, inputs(torch.bfloat16, torch.float32))
    assert report.counts == {"rms_norm": 1}, report


@pytest.mark.parametrize("affine", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rewrites_modules_of_torch(eps, affine, verify):
    norm = nn.RMSNorm(D, eps=eps, elementwise_affine=affine)
    report = verify(norm.forward, inputs()[:1], inner="aot_eager")
    assert report.counts == {"rms_norm": 1}, report


def test_reads_off_eps_gain_and_rounding(verify):
    """What the report says is what the kernel is told."""
    (site,) = verify(llama, inputs(torch.bfloat16)).sites
    assert site.params["eps"] == pytest.approx(EPS)
    assert (site.params["mode"], site.params["offset"]) == ("inside", 0.0)
    assert (site.params["normalized_dtype"], site.params["out_dtype"]) == ("bfloat16", "bfloat16")
    (site,) = verify(gemma, inputs(torch.bfloat16)).sites
    assert (site.params["offset"], site.params["normalized_dtype"]) == (1.0, "float32")
    (site,) = verify(l2, inputs()).sites
    assert site.params["gain"] == pytest.approx(D**-0.5)
    assert site.params["eps"] == pytest.approx(EPS / D)


def test_takes_a_new_eps_for_a_new_one(verify):
    """The value of a symbolic eps is guarded."""
    compiled = graphfuse.optimize(plain, inner="eager", dynamic=True, fullgraph=True, strict=True)
    x, weight, _ = inputs()
    for eps in (1e-6, 0.5, 1e-6):
        assert torch.allclose(compiled(x, weight, eps), plain(x, weight, eps), rtol=1e-5, atol=1e-6)
    assert graphfuse.report(compiled).counts == {"rms_norm": 1}


def test_guards_a_width_that_is_a_symbol():
    """The factor between a sum and a mean is a number in the graph."""
    compiled = graphfuse.optimize(l2, inner="eager", dynamic=True, fullgraph=True, strict=True)
    for width in (D, 2 * D, D):
        x = torch.randn(3, width)
        assert torch.allclose(compiled(x, None, EPS), l2(x, None, EPS), rtol=1e-5, atol=1e-6)
    assert graphfuse.report(compiled).counts == {"rms_norm": 1}


def other_dimension(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + eps) * weight


def two_dimensions(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + eps) * weight


def variance(x, weight, eps):
    return x * torch.rsqrt(x.var(-1, keepdim=True) + eps) * weight


def other_tensor(x, weight, eps):
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def fourth_power(x, weight, eps):
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + eps) * weight


def cube_root(x, weight, eps):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps) ** (-1 / 3) * weight


def multiplied_by_root(x, weight, eps):
    return x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def eps_of_each_row(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps * x[..., :1].abs()) * weight


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (other_dimension, "dim: expected the last one, got [-2]"),
        (two_dimensions, "dim: expected the last one, got [-2, -1]"),
        (variance, None),
        (other_tensor, "x: expected to meet its own inverse root mean square, got aten.add.Tensor in add"),
        (fourth_power, None),
        (cube_root, None),
        (multiplied_by_root, None),
        (eps_of_each_row, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_leaves_near_misses_alone(spelling, reason, dynamic, verify):
    report = verify(spelling, inputs(), dynamic=dynamic)
    assert report.rewritten == []
    assert [site.reason for site in report.refused] == ([] if reason is None else [reason])


def uses_statistic(x, weight, eps):
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * rstd * weight, rstd


def uses_normalized(x, weight, eps):
    normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normalized * weight, normalized + 1


def changes_x_between(x, weight, eps):
    x = x * 2
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    x.add_(1)
    return x * rstd * weight


def changes_x_after(x, weight, eps):
    x = x * 2
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    x.add_(y)
    return x


def changes_statistic_between(x, weight, eps):
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    rstd[0].mul_(2)
    return x * rstd * weight


def detaches_statistic(x, weight, eps):
    with torch.no_grad():
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * rstd * weight


def drops_out(x, weight, eps):
    return F.dropout(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps), 0.5, training=False) * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("spelling", "rewritten"),
    [
        (uses_statistic, 1),
        (uses_normalized, 1),
        (detaches_statistic, 0),
        (drops_out, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_stays_right_where_others_reach_in(spelling, rewritten, dtype, verify):
    """Uses and changes of what lies inside a norm."""
    report = verify(spelling, inputs(dtype))
    assert report.counts == ({"rms_norm": 1} if rewritten else {}), report


@pytest.mark.parametrize(
    ("spelling", "rewritten"),
    [(changes_x_between, 0), (changes_x_after, 1), (changes_statistic_between, 0)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_stays_right_where_values_change(spelling, rewritten, verify):
    """Without gradients: autograd itself forbids these."""
    x, weight, eps = inputs()
    report = verify(spelling, (x.detach(), weight.detach(), eps))
    assert report.counts == ({"rms_norm": 1} if rewritten else {}), report


def test_leaves_random_numbers_alone():
    def fn(x, weight, eps):
        x = F.dropout(x, 0.5)
        return x * torch.rsqrt(F.dropout(x, 0.5).pow(2).mean(-1, keepdim=True) + eps) * weight

    compiled = graphfuse.optimize(fn, inner="eager", fullgraph=True, strict=True)
    torch.manual_seed(0)
    ours = compiled(*inputs())
    assert graphfuse.report(compiled).rewritten == []
    assert ours.isfinite().all()


def test_handles_no_rows(verify):
    x = torch.randn(0, D, requires_grad=True)
    report = verify(llama, (x, torch.randn(D, requires_grad=True), EPS))
    assert report.notes == []
