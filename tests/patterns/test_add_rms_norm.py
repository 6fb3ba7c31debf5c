"""A residual add and the norm next to it become one op, and sums that the compiler fuses better do not."""

import pytest
import torch
import torch.nn.functional as F

import graphfuse

B, S, E = 2, 6, 20


def norm(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def before(x, residual, projection, weight):
    """Llama."""
    total = residual + F.linear(x, projection)
    return total, norm(total, weight)


def before_swapped(x, residual, projection, weight):
    total = F.linear(x, projection) + residual
    return norm(total, weight), total


def in_torch(x, residual, projection, weight):
    total = torch.add(residual, F.linear(x, projection))
    return total, F.rms_norm(total, (E,), weight, 1e-6)


def only_the_norm_reads_it(x, residual, projection, weight):
    return norm(residual + F.linear(x, projection), weight)


def after(x, residual, projection, weight):
    """OLMo 2."""
    return residual + norm(F.linear(x, projection), weight)


def after_swapped(x, residual, projection, weight):
    return norm(F.linear(x, projection), weight) + residual


def problem(dtype=torch.float32, residual_dtype=None):
    x, residual = torch.randn(2, B, S, E)
    projection = torch.randn(E, E) / 4
    weight = 1 + torch.randn(E) / 4
    tensors = (x.to(dtype), residual.to(residual_dtype or dtype), projection.to(dtype), weight.to(dtype))
    return tuple(tensor.requires_grad_() for tensor in tensors)


def rewritten(report):
    return [site for site in report.sites if site.status == "rewritten"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("spelling", "where"),
    [
        (before, "before"),
        (before_swapped, "before"),
        (in_torch, "before"),
        (only_the_norm_reads_it, "before"),
        (after, "after"),
        (after_swapped, "after"),
    ],
    ids=lambda p: getattr(p, "__name__", p),
)
def test_is_one_op(spelling, where, dtype, verify):
    report = verify(spelling, problem(dtype))
    (site,) = rewritten(report)
    assert site.pattern == "add_rms_norm"
    assert site.variant.startswith(f"add {where}, weight")
    assert report.counts["rms_norm"] == 1


@pytest.mark.parametrize("spelling", [before, after], ids=lambda f: f.__name__)
def test_keeps_a_residual_in_fp32(spelling, verify):
    (site,) = rewritten(verify(spelling, problem(torch.bfloat16, torch.float32)))
    assert site.pattern == "add_rms_norm"


def test_layers_follow_each_other(verify):
    """Each sum belongs to the norm after it; the first norm has none."""

    def model(x, residual, projection, weight):
        for _ in range(3):
            residual = residual + F.linear(norm(residual, weight), projection)
        return norm(residual, weight)

    report = verify(model, problem())
    assert sorted(site.pattern for site in rewritten(report)) == ["add_rms_norm"] * 3 + ["rms_norm"]
    assert report.counts["rms_norm"] == 4


def test_a_sum_between_two_norms_belongs_to_the_second(verify):
    """Gemma."""

    def model(x, residual, projection, weight):
        total = residual + norm(F.linear(x, projection), weight)
        return total, norm(total, weight)

    sites = {site.pattern: site.variant for site in rewritten(verify(model, problem()))}
    assert sites.keys() == {"add_rms_norm", "rms_norm"}
    assert sites["add_rms_norm"].startswith("add before")


def test_under_autocast(verify):
    (site,) = rewritten(verify(before, problem(), autocast=True))
    assert site.pattern == "add_rms_norm"


def test_with_dynamic_shapes(verify):
    (site,) = rewritten(verify(before, problem(), dynamic=True))
    assert site.pattern == "add_rms_norm"


def scaled(x, residual, projection, weight):
    total = residual + F.linear(x, projection) * 0.22
    return total, norm(total, weight)


def with_dropout_written_out(x, residual, projection, weight):
    y = F.linear(x, projection)
    total = residual + torch.where(y > 0, y, 0.0)
    return total, norm(total, weight)


def subtracted(x, residual, projection, weight):
    total = residual - F.linear(x, projection)
    return total, norm(total, weight)


def weighted_sum(x, residual, projection, weight):
    total = torch.add(residual, F.linear(x, projection), alpha=2)
    return total, norm(total, weight)


def of_a_vector(x, residual, projection, weight):
    total = F.linear(x, projection) + weight
    return total, norm(total, weight)


def of_itself(x, residual, projection, weight):
    y = F.linear(x, projection)
    total = y + y
    return total, norm(total, weight)


def read_twice(x, residual, projection, weight):
    y = norm(F.linear(x, projection), weight)
    return residual + y, y


def in_place(x, residual, projection, weight):
    total = F.linear(x, projection)
    total += residual
    return total, norm(total, weight)


@pytest.mark.parametrize(
    "spelling",
    [scaled, with_dropout_written_out, subtracted, weighted_sum, of_a_vector, of_itself, read_twice, in_place],
    ids=lambda f: f.__name__,
)
def test_leaves_the_sum_to_the_compiler(spelling, verify):
    assert [site.pattern for site in rewritten(verify(spelling, problem()))] == ["rms_norm"]


def test_names_the_module_of_the_norm():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(E, E), torch.nn.RMSNorm(E)

        def forward(self, x):
            total = x + self.linear(x)
            return total * 2, self.norm(total)

    model = graphfuse.optimize(Block(), inner="eager", strict=True)
    model(torch.randn(B, S, E))
    (site,) = rewritten(graphfuse.report(model))
    assert (site.pattern, site.module) == ("add_rms_norm", "norm")
