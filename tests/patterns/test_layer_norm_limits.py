"""LayerNorm: what is not one, what is refused and why, and where a region ends."""

import pytest
import torch
import torch.nn.functional as F

D = 32
EPS = 1e-5


def inputs(dtype=torch.float32):
    x = (torch.randn(2, 5, D) * torch.logspace(-2, 1, 5)[:, None]).to(dtype).requires_grad_()
    weight, bias = (torch.randn(D).to(dtype).requires_grad_() for _ in range(2))
    return x, weight, bias, EPS


def other_dimension(x, weight, bias, eps):
    mean = x.mean(1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + eps) * weight + bias


def two_dimensions(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[1:], None, None, eps) * weight + bias


def two_dimensions_by_hand(x, weight, bias, eps):
    mean, variance = x.mean((1, 2), keepdim=True), x.var((1, 2), keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + eps) * weight + bias


def unbiased(x, weight, bias, eps):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + eps) * weight + bias


def unbiased_by_hand(x, weight, bias, eps):
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt((c * c).sum(-1, keepdim=True) / (D - 1) + eps) * weight + bias


def unbiased_annotated_transformer(x, weight, bias, eps):
    return weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps) + bias


def mean_of_another(x, weight, bias, eps):
    mean = (x + 1).mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps) * weight + bias


def mean_over_another_dimension(x, weight, bias, eps):
    return (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps)


def variance_of_another(x, weight, bias, eps):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt((2 * x).var(-1, keepdim=True, correction=0) + eps) * weight


def not_centred(x, weight, bias, eps):
    return x * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps) * weight + bias


def mean_added(x, weight, bias, eps):
    return (x + x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps) * weight


def part_of_the_mean(x, weight, bias, eps):
    return (x - 0.5 * x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps)


def fourth_moment(x, weight, bias, eps):
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(4).mean(-1, keepdim=True) + eps) * weight + bias


def cube_root(x, weight, bias, eps):
    return (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True, correction=0) + eps) ** (-1 / 3) * weight


def eps_of_each_row(x, weight, bias, eps):
    variance = x.var(-1, keepdim=True, correction=0) + eps * x[..., :1].abs()
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance) * weight


def detached_mean(x, weight, bias, eps):
    return (x - x.mean(-1, keepdim=True).detach()) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps)


def batch_norm(x, weight, bias, eps):
    return F.batch_norm(x.flatten(0, 1), None, None, weight, bias, training=True, eps=eps)


def group_norm(x, weight, bias, eps):
    return F.group_norm(x.transpose(1, 2), 4, weight, bias, eps)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (other_dimension, "dim: expected the last one, got [1]"),
        (two_dimensions, "normalized_shape: expected one dimension, got [5, 32]"),
        (two_dimensions_by_hand, "dim: expected the last one, got [1, 2]"),
        (unbiased, "variance: expected a division by 32, got one by 31"),
        (unbiased_by_hand, "variance: expected a division by 32, got one by 31"),
        (unbiased_annotated_transformer, "variance: expected a division by 32, got one by 31"),
        (mean_of_another, None),
        (mean_over_another_dimension, None),
        (variance_of_another, None),
        (not_centred, None),
        (mean_added, None),
        (part_of_the_mean, None),
        (fourth_moment, None),
        (cube_root, None),
        (eps_of_each_row, None),
        (detached_mean, None),
        (batch_norm, None),
        (group_norm, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_leaves_near_misses_alone(spelling, reason, dynamic, verify):
    report = verify(spelling, inputs(), dynamic=dynamic)
    assert report.rewritten == []
    assert [site.reason for site in report.refused] == ([] if reason is None else [reason])


def uses_mean(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + eps) * weight + bias, mean


def uses_deviation(x, weight, bias, eps):
    rstd = torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps)
    return (x - x.mean(-1, keepdim=True)) * rstd * weight + bias, rstd.square()


def uses_centred(x, weight, bias, eps):
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + eps) * weight + bias + c


def uses_rstd_of_torch(x, weight, bias, eps):
    y, _, rstd = torch.native_layer_norm(x, (D,), weight, bias, eps)
    return y, rstd


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (uses_mean, "mean: expected no use besides the norm, got an output of the graph"),
        (uses_deviation, "rstd: expected no use besides the norm, got aten.pow.Tensor_Scalar in square"),
        (uses_centred, "c: expected no use besides the norm, got aten.add.Tensor in add_2"),
        (uses_rstd_of_torch, "native_layer_norm: expected no use besides the norm, got an output of the graph"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refuses_where_others_use_what_is_inside(spelling, reason, verify):
    """All of it would still be computed, and the op come on top."""
    report = verify(spelling, inputs())
    assert report.rewritten == []
    assert [site.reason for site in report.refused] == [reason]


def uses_normalized(x, weight, bias, eps):
    normalized = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps)
    return normalized * weight + bias, normalized + 1


def uses_unbiased_sum(x, weight, bias, eps):
    scaled = F.layer_norm(x, (D,), weight, None, eps)
    return scaled + bias, scaled * 2


def uses_wide_input(x, weight, bias, eps):
    h = x.float()
    return F.layer_norm(h, (D,), None, None, eps).to(x.dtype) * weight + bias, h * 2


def changes_scale(x, weight, bias, eps):
    return F.layer_norm(x, (D,), weight, bias, eps) * 3 + 1


def adds_a_residual(x, weight, bias, eps):
    return F.layer_norm(x, (D,), weight, None, eps) + x


def modulates(x, weight, bias, eps):
    return F.layer_norm(x, (D,), None, None, eps) * (1 + x[:, :1]) + x[:, 1:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spelling",
    [uses_normalized, uses_unbiased_sum, uses_wide_input, changes_scale, adds_a_residual, modulates],
    ids=lambda value: value.__name__,
)
def test_ends_where_others_begin(spelling, dtype, verify):
    report = verify(spelling, inputs(dtype))
    assert report.counts == {"layer_norm": 1}, report
    assert report.refused == []


def changes_x_between(x, weight, bias, eps):
    x = x * 2
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    x.add_(1)
    return (x - mean) * torch.rsqrt(variance + eps) * weight + bias


def changes_x_after(x, weight, bias, eps):
    x = x * 2
    y = F.layer_norm(x, (D,), weight, bias, eps)
    x.add_(y)
    return x


def changes_bias_between(x, weight, bias, eps):
    bias = bias * 1
    y = F.layer_norm(x, (D,), weight, None, eps)
    bias.add_(1)
    return y + bias


def detaches_statistic(x, weight, bias, eps):
    with torch.no_grad():
        rstd = torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps)
    return (x - x.mean(-1, keepdim=True)) * rstd * weight + bias


@pytest.mark.parametrize(
    ("spelling", "rewritten"),
    [(changes_x_between, 0), (changes_x_after, 1), (changes_bias_between, 1), (detaches_statistic, 0)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_stays_right_where_values_change(spelling, rewritten, verify):
    """Without gradients: autograd itself forbids some of these."""
    *tensors, eps = inputs()
    report = verify(spelling, (*(tensor.detach() for tensor in tensors), eps))
    assert report.counts == ({"layer_norm": 1} if rewritten else {}), report


def test_leaves_rms_norm_to_its_pattern(verify):
    def both(x, weight, bias, eps):
        y = F.layer_norm(x, (D,), weight, bias, eps)
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight

    assert verify(both, inputs()).counts == {"layer_norm": 1, "rms_norm": 1}
