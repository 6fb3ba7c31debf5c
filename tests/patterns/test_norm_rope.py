"""Normalised and rotated heads become one op, in whatever order they are cut out, and nothing else does."""

import pytest
import torch
import torch.nn.functional as F

import graphfuse

B, H, S, D, E = 2, 3, 6, 16, 20


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def norm(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def gemma_norm(x, weight):
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight.float())).type_as(x)


def heads(x, projection):
    return F.linear(x, projection).view(B, -1, H, D)


def before_the_transpose(x, projection, weight, cos, sin):
    """Qwen3."""
    return rotate(norm(heads(x, projection), weight).transpose(1, 2), cos[:, None], sin[:, None])


def after_the_transpose(x, projection, weight, cos, sin):
    """Gemma 3."""
    return rotate(gemma_norm(heads(x, projection).transpose(1, 2), weight), cos[:, None], sin[:, None])


def without_a_transpose(x, projection, weight, cos, sin):
    return rotate(norm(heads(x, projection), weight), cos[:, :, None], sin[:, :, None])


def permuted(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight).permute(0, 2, 1, 3).contiguous()
    return rotate(q, cos[:, None], sin[:, None])


def transposed_twice(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight).transpose(1, 2).permute(1, 0, 2, 3)
    return rotate(q, cos, sin)


def in_float(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight).transpose(1, 2).float()
    return rotate(q, cos[:, None].float(), sin[:, None].float()).to(x.dtype)


def last_features(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight).transpose(1, 2)
    rest, turned = q.split([8, 8], dim=-1)
    return torch.cat((rest, rotate(turned, cos[:, None, :, :8], sin[:, None, :, :8])), -1)


def complex_table(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight)
    table = torch.complex(cos[..., :8].float(), sin[..., :8].float())[:, :, None]
    turned = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2)) * table
    return torch.view_as_real(turned).flatten(3).type_as(q)


def without_a_weight(x, projection, weight, cos, sin):
    q = F.rms_norm(heads(x, projection), (D,), None, 1e-6).transpose(1, 2)
    return rotate(q, cos[:, None], sin[:, None]) * weight


SPELLINGS = [
    before_the_transpose,
    after_the_transpose,
    without_a_transpose,
    permuted,
    transposed_twice,
    in_float,
    complex_table,
    without_a_weight,
]


def problem(dtype=torch.float32, across=False):
    x = torch.randn(B, S, E).to(dtype).requires_grad_()
    projection = (torch.randn(H * D, E) / 4).to(dtype).requires_grad_()
    weight = (1 + torch.randn(H * D if across else D) / 4).to(dtype).requires_grad_()
    angles = torch.randn(1, S, D)
    return x, projection, weight, angles.cos().to(dtype), angles.sin().to(dtype)


def names(report):
    return [site.pattern for site in report.sites if site.status == "rewritten"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_is_one_op(spelling, dtype, verify):
    report = verify(spelling, problem(dtype))
    assert names(report) == ["norm_rope"]
    assert report.counts.items() >= {"rms_norm": 1, "rope": 1}.items()


def across_heads(x, projection, weight, cos, sin):
    """OLMo 2."""
    q = norm(F.linear(x, projection), weight).view(B, -1, H, D).transpose(1, 2)
    return rotate(q, cos[:, None], sin[:, None])


def across_heads_as_they_lie(x, projection, weight, cos, sin):
    q = norm(F.linear(x, projection), weight).unflatten(-1, (H, D))
    return rotate(q, cos[:, :, None], sin[:, :, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", [across_heads, across_heads_as_they_lie], ids=lambda f: f.__name__)
def test_normalises_across_heads(spelling, dtype, verify):
    report = verify(spelling, problem(dtype, across=True))
    assert names(report) == ["norm_rope"]
    assert "across heads" in report.sites[0].variant


@pytest.mark.parametrize("spelling", [before_the_transpose, after_the_transpose], ids=lambda f: f.__name__)
def test_queries_and_keys_of_one_layer(spelling, verify):
    """Two sites, and one proof."""

    def attention(x, projection, weight, cos, sin):
        return spelling(x, projection, weight, cos, sin), spelling(x, projection * 0.5, weight, cos, sin)

    assert names(verify(attention, problem())) == ["norm_rope", "norm_rope"]


def test_under_autocast(verify):
    """The norm multiplies bf16 by an fp32 weight: fp32 comes out."""
    assert names(verify(before_the_transpose, problem(), autocast=True)) == ["norm_rope"]


def test_with_dynamic_shapes(verify):
    def model(x, projection, weight, cos, sin):
        q = norm(F.linear(x, projection).view(x.shape[0], -1, H, D), weight).transpose(1, 2)
        return rotate(q, cos[:, None], sin[:, None])

    assert names(verify(model, problem(), dynamic=True)) == ["norm_rope"]


def test_says_what_it_was():
    compiled = graphfuse.optimize(before_the_transpose, inner="eager", strict=True)
    compiled(*problem(torch.bfloat16))
    (site,) = graphfuse.report(compiled).sites
    assert site.variant == "weight, weight after cast, half, bfloat16"


def also_read(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight)
    return rotate(q.transpose(1, 2), cos[:, None], sin[:, None]), q


def the_view_is_also_read(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight).transpose(1, 2)
    return rotate(q, cos[:, None], sin[:, None]) + q


def features_in_the_middle(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight).transpose(1, 2)
    turned = rotate(q[..., 4:12], cos[:, None, :, :8], sin[:, None, :, :8])
    return torch.cat((q[..., :4], turned, q[..., 12:]), -1)


def scaled_between(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight).transpose(1, 2)
    return rotate(torch.tanh(q), cos[:, None], sin[:, None])


def part_of_the_norm(x, projection, weight, cos, sin):
    q = norm(heads(x, projection), weight).transpose(1, 2)[..., :8]
    return rotate(q, cos[:, None, :, :8], sin[:, None, :, :8])


def rotated_first(x, projection, weight, cos, sin):
    q = rotate(heads(x, projection).transpose(1, 2), cos[:, None], sin[:, None])
    return norm(q, weight)


@pytest.mark.parametrize(
    "spelling",
    [
        also_read,
        the_view_is_also_read,
        features_in_the_middle,
        scaled_between,
        part_of_the_norm,
        rotated_first,
        last_features,
    ],
    ids=lambda f: f.__name__,
)
def test_leaves_the_rest_as_two_ops(spelling, verify):
    found = names(verify(spelling, problem()))
    assert "norm_rope" not in found
    assert "rms_norm" in found


def test_leaves_more_heads_than_a_program_holds(verify, monkeypatch):
    monkeypatch.setattr("graphfuse.kernels._norm_rope_launch.MAX_ACROSS", 32)
    assert sorted(names(verify(across_heads, problem(across=True)))) == ["rms_norm", "rope"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_follows_torchs_own_norm(dtype):
    """Its last cast lies inside one graph node."""

    def step(q, weight, cos, sin):
        return rotate(F.rms_norm(q, (q.shape[-1],), weight, 1e-6), cos, sin)

    q, weight = torch.randn(2, 4, 8, 16, dtype=dtype, requires_grad=True), torch.ones(16, dtype=dtype)
    angle = torch.randn(8, 16)
    compiled = graphfuse.optimize(step, inner="eager", strict=True)
    compiled(q, weight.requires_grad_(), angle.cos().to(dtype), angle.sin().to(dtype)).sum().backward()
    assert graphfuse.report(compiled).counts == {"rms_norm": 1, "rope": 1}
