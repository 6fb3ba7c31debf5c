"""More spellings of RMSNorm: other operators, other orders, and norms as they stand inside of layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

einops = pytest.importorskip("einops")

D = 32
EPS = 1e-5


def rstd(x, eps):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# Other operators.


def einsum_square(x, weight, eps):
    return x * torch.rsqrt(torch.einsum("...d,...d->...", x, x)[..., None] / D + eps) * weight


def vecdot(x, weight, eps):
    return x * torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / D + eps) * weight


def matmul_square(x, weight, eps):
    square = (x.unsqueeze(-2) @ x.unsqueeze(-1)).squeeze(-1)
    return x * torch.rsqrt(square / D + eps) * weight


def einsum_weight(x, weight, eps):
    return torch.einsum("bsd,d->bsd", x * rstd(x, eps), weight)


def einsum_statistic(x, weight, eps):
    return torch.einsum("bsd,bs->bsd", x, rstd(x, eps).squeeze(-1)) * weight


def normalize_eps(x, weight, eps):
    return F.normalize(x, p=2.0, dim=-1, eps=eps) * math.sqrt(x.shape[-1]) * weight


def normalize_gamma(x, weight, eps):
    return F.normalize(x, dim=-1) * (x.shape[-1] ** 0.5) * (weight + 1)


def linalg_norm(x, weight, eps):
    return weight * (x / (torch.linalg.norm(x, dim=-1, keepdim=True) * D**-0.5 + eps))


def vector_norm_squared(x, weight, eps):
    return x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / D + eps) * weight


def scale_norm(x, weight, eps):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=eps) * weight[0]


def addcmul_gamma(x, weight, eps):
    normalized = x * rstd(x, eps)
    return torch.addcmul(normalized, normalized, weight)


def einops_heads(x, weight, eps):
    heads = einops.rearrange(x, "b s (h d) -> b h s d", h=2)
    return einops.rearrange(heads * rstd(heads, eps) * weight[: D // 2], "b h s d -> b s (h d)")


def einops_reduce(x, weight, eps):
    return x * torch.rsqrt(einops.reduce(x**2, "b s d -> b s 1", "mean") + eps) * weight


def true_divide(x, weight, eps):
    rms = torch.sqrt(torch.mean(torch.mul(x, x), dim=2, keepdim=True).add(eps))
    return torch.true_divide(x, rms).mul(weight)


def clamped_square(x, weight, eps):
    return x * torch.clamp_min(x.pow(2).mean(-1, keepdim=True), eps).rsqrt() * weight


def powers(x, weight, eps):
    return x * torch.pow(torch.mean(torch.pow(x, 2.0), -1, True) + eps, -1 / 2) * weight


def sum_times_reciprocal(x, weight, eps):
    return x * x.pow(2).sum(-1, keepdim=True).mul(1 / D).add(eps).pow(-0.5) * weight


def root_of_width_in_weight(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps) * (D**0.5 * weight)


def mean_in_float(x, weight, eps):
    square = torch.mean(x.float() ** 2, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * torch.rsqrt(square + eps)).type_as(x) * weight


def mapped_over_rows(x, weight, eps):
    def one(row):
        return row * torch.rsqrt(row.pow(2).mean() + eps) * weight

    return torch.vmap(torch.vmap(one))(x)


# Other orders.


def weight_first(x, weight, eps):
    return weight * x * rstd(x, eps)


def weight_first_divided(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def weight_on_statistic(x, weight, eps):
    return x * (weight * rstd(x, eps))


def weight_over_root(x, weight, eps):
    return x * (weight / torch.sqrt(x.square().mean(-1, keepdim=True) + eps))


def statistic_first(x, weight, eps):
    return torch.mul(weight[None], torch.mul(rstd(x, eps), x))


def expanded(x, weight, eps):
    return x * rstd(x, eps).expand_as(x) * weight.expand_as(x)


def one_minus(x, weight, eps):
    return x * rstd(x, eps) * (1 - weight)


def scaled_weight(x, weight, eps):
    return x * rstd(x, eps) * (weight * 0.5)


def scaled_before(x, weight, eps):
    h = x * 0.125
    return h * rstd(h, eps) * weight


# In place.


def copied_into(x, weight, eps):
    out = torch.empty_like(x)
    out.copy_(x * rstd(x, eps))
    return out * weight


def assigned_into(x, weight, eps):
    out = torch.empty_like(x)
    out[:] = x * rstd(x, eps)
    return out * weight


def of_a_clone(x, weight, eps):
    h = x.clone()
    return h.mul_(rstd(x, eps)).mul_(weight)


# Inside of layers.


def gated_after(x, weight, eps):
    return x * rstd(x, eps) * weight * F.silu(x.flip(-1))


def gated_before(x, weight, eps):
    h = x * F.silu(x.flip(-1))
    return weight * (h * rstd(h, eps))


def gated_in_float(x, weight, eps):
    h = x.float()
    h = weight * (h * rstd(h, eps)).to(x.dtype)
    return (h * F.silu(x.flip(-1).float())).to(x.dtype)


def grouped(x, weight, eps):
    groups = einops.rearrange(x, "... (g d) -> ... g d", g=4)
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return einops.rearrange(groups, "... g d -> ... (g d)") * weight


def weight_of_each_group(x, weight, eps):
    groups = x.unflatten(-1, (4, -1))
    return (groups * rstd(groups, eps) * weight.view(4, -1)).flatten(-2)


def residual(x, weight, eps):
    h = x + x.flip(-1)
    return h * rstd(h, eps) * weight + h


def modulated(x, weight, eps):
    return x * rstd(x, eps) * (1 + x[:, :1].tanh()) + x[:, :1]


def queries_transposed(x, weight, eps):
    q = x.view(*x.shape[:2], 2, D // 2).transpose(1, 2)
    return (q * rstd(q, eps)).type_as(x) * weight[: D // 2]


def queries_and_keys_at_once(x, weight, eps):
    q = x.view(*x.shape[:2], 2, D // 2)
    both = torch.stack((q, q.flip(0)))
    return both * rstd(both, eps) * weight[: D // 2]


def part_of_features(x, weight, eps):
    h = x.narrow(-1, 0, 16)
    return h * rstd(h, eps) * weight[:16]


def in_double(x, weight, eps):
    return (x.double() * rstd(x.double(), eps)).to(x.dtype) * weight


def autocast_off(x, weight, eps):
    with torch.autocast("cpu", enabled=False):
        h = x.float()
        return (h * rstd(h, eps)).type_as(x) * weight


def checkpointed(x, weight, eps):
    def norm(x):
        return x * rstd(x, eps) * weight

    return torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)


@torch.compile
def compiled(x, weight, eps):
    return x * rstd(x, eps) * weight


def calls_compiled(x, weight, eps):
    return compiled(x, weight, eps)


class Norm(nn.Module):
    """As layers hold it: a method of its own for the statistic."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(D))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.scale


SPELLINGS = [
    *(einsum_square, vecdot, matmul_square, einsum_weight, einsum_statistic, normalize_eps, normalize_gamma),
    *(linalg_norm, vector_norm_squared, scale_norm, addcmul_gamma, einops_heads, einops_reduce, true_divide),
    *(clamped_square, powers, sum_times_reciprocal, root_of_width_in_weight, mean_in_float, mapped_over_rows),
    *(weight_first, weight_first_divided, weight_on_statistic, weight_over_root, statistic_first, expanded),
    *(one_minus, scaled_weight, scaled_before, copied_into, assigned_into, of_a_clone, gated_after, gated_before),
    *(gated_in_float, grouped, weight_of_each_group, residual, modulated, queries_transposed),
    *(queries_and_keys_at_once, part_of_features, in_double, autocast_off, checkpointed, calls_compiled),
]


def named(value):
    return getattr(value, "__name__", "")


def problem(dtype=torch.float32):
    x = (torch.randn(2, 5, D) * torch.logspace(-2, 1, 5)[:, None]).to(dtype).requires_grad_()
    return x, torch.randn(D).to(dtype).requires_grad_(), EPS


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_rewrites(spelling, verify):
    report = verify(spelling, problem())
    assert report.counts == {"rms_norm": 1}, report
    assert report.refused == []


@pytest.mark.parametrize("spelling", SPELLINGS[::3], ids=named)
def test_rewrites_bfloat16_at_dynamic_shapes(spelling, verify):
    report = verify(spelling, problem(torch.bfloat16), dynamic=True)
    assert report.counts == {"rms_norm": 1}, report


@pytest.mark.parametrize(
    "spelling",
    [einsum_square, normalize_eps, weight_first, statistic_first, gated_in_float, queries_transposed, residual],
    ids=named,
)
def test_rewrites_under_autocast(spelling, verify):
    matrix = torch.randn(D, D, requires_grad=True)

    def layer(x, weight, eps, matrix):
        return spelling(F.linear(x, matrix), weight, eps)

    report = verify(layer, (*problem(), matrix), autocast=True)
    assert report.counts == {"rms_norm": 1}, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rewrites_a_module(dtype, verify):
    norm = Norm().to(dtype)
    report = verify(norm.forward, problem(dtype)[:1])
    assert report.counts == {"rms_norm": 1}, report
    (site,) = report.sites
    assert site.params["eps"] == pytest.approx(EPS)


def test_rewrites_queries_and_keys_of_a_packed_projection(verify):
    """Both norms, on views of one tensor, next to values that are not normalized."""

    def attention(x, weight, eps):
        q, k, v = x.repeat(1, 1, 3).view(*x.shape[:2], 3, 2, D // 2).unbind(2)
        q, k = (t * rstd(t, eps) * weight[: D // 2] for t in (q, k))
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))

    assert verify(attention, problem()).counts["rms_norm"] == 2


def logarithm(x, weight, eps):
    return x * torch.exp(-0.5 * torch.log(x.pow(2).mean(-1, keepdim=True) + eps)) * weight


def variance_and_mean(x, weight, eps):
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return x * torch.rsqrt(variance + mean * mean + eps) * weight


def of_a_list(x, weight, eps):
    (square,) = torch._foreach_mul([x], [x])
    return x * torch.rsqrt(square.mean(-1, keepdim=True) + eps) * weight


def of_columns(x, weight, eps):
    columns = x.mT
    return (columns / torch.sqrt((columns**2).mean(1, keepdim=True) + eps)).mT * weight


def floor_by_where(x, weight, eps):
    rms = x.norm(dim=-1, keepdim=True) / D**0.5
    return x / torch.where(rms > eps, rms, eps) * weight


@pytest.mark.parametrize("spelling", [logarithm, variance_and_mean, of_a_list, of_columns, floor_by_where], ids=named)
def test_stays_right_whether_it_knows_the_spelling_or_not(spelling, verify):
    verify(spelling, problem())
