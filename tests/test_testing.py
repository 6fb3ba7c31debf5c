"""assert_no_worse: accepts what rounds less than eager, and nothing that rounds more."""

import pytest
import torch

from graphfuse.testing import assert_no_worse

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def silu_product(gate, up):
    """Eager: rounds after silu and after the product."""
    return torch.nn.functional.silu(gate) * up


def fused(gate, up):
    """Rounds once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@pytest.fixture
def inputs():
    def make(dtype, requires_grad=False):
        return tuple(torch.randn(64, 32).to(dtype).requires_grad_(requires_grad) for _ in range(2))

    return make


@pytest.mark.parametrize("requires_grad", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_fewer_roundings(inputs, dtype, requires_grad):
    assert_no_worse(fused, silu_product, inputs(dtype, requires_grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_another_order_of_the_same_sum(dtype):
    x = torch.randn(16, 1000).to(dtype)
    assert_no_worse(lambda x: x.flip(-1).sum(-1), lambda x: x.sum(-1), (x,), ulps=16)


def test_accepts_one_lucky_element():
    """Eager's error is zero by chance: one rounding of ours is no worse."""
    x = torch.tensor([1.0], dtype=torch.bfloat16)
    assert_no_worse(lambda x: x * 1.0078125, lambda x: x.clone(), (x,))


def rounds_again(gate, up):
    return silu_product(gate * 3 / 3, up * 3 / 3)


def one_wrong(gate, up):
    out = fused(gate, up)
    return torch.where(torch.arange(out.numel(), device=out.device).view_as(out) == 77, out * 1.5, out)


def one_nan(gate, up):
    out = fused(gate, up).clone()
    out[3, 4] = torch.nan
    return out


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (rounds_again, "output 0: expected a mean error of at most"),
        (one_wrong, r"output 0: expected an error of at most .* at \(2, 13\)"),
        (one_nan, r"output 0: expected .* at \(3, 4\), got nan"),
        (lambda g, u: fused(g, u).float(), "output 0: expected dtype torch.bfloat16, got torch.float32"),
        (lambda g, u: fused(g, u)[:1], r"output 0: expected shape torch.Size\(\[64, 32\]\)"),
        (lambda g, u: (fused(g, u), g), r"outputs: expected \['output 0'\], got \['output 0', 'output 1'\]"),
    ],
    ids=["rounds_again", "one_wrong", "one_nan", "dtype", "shape", "count"],
)
def test_rejects(inputs, fn, message):
    with pytest.raises(AssertionError, match=message):
        assert_no_worse(fn, silu_product, inputs(torch.bfloat16))


def test_rejects_a_wrong_gradient(inputs):
    def half_gradient(gate, up):
        return fused(gate, up * 0.5 + up.detach() * 0.5)

    with pytest.raises(AssertionError, match="gradient of input 1: expected an error of at most"):
        assert_no_worse(half_gradient, silu_product, inputs(torch.float32, requires_grad=True))


def test_rejects_a_missing_gradient(inputs):
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_no_worse(lambda g, u: fused(g.detach(), u), silu_product, inputs(torch.float32, requires_grad=True))


def test_compares_infinities():
    x = torch.tensor([1.0, 0.0])
    assert_no_worse(lambda x: 1 / x, lambda x: 1 / x, (x,))
    with pytest.raises(AssertionError, match=r"output 0: expected inf at \(1,\), got -inf"):
        assert_no_worse(lambda x: torch.where(x == 0, -torch.inf, 1 / x), lambda x: 1 / x, (x,))


def test_compares_integers():
    x = torch.tensor([1.0, 0.0])
    assert_no_worse(torch.argmax, torch.argmax, (x,))
    with pytest.raises(AssertionError, match="output 0: expected the integers of eager"):
        assert_no_worse(torch.argmin, torch.argmax, (x,))


def test_allows_what_only_eager_overflows():
    x = torch.full((4,), 300.0, dtype=torch.float16)
    assert_no_worse(lambda x: x.clone(), lambda x: (x * x) / x, (x,))


def test_runs_the_truth_in_float64():
    """Dtype arguments follow, or the truth would be rounded on the way."""
    seen = []

    def reference(x, out_dtype, scale):
        seen.append((x.dtype, out_dtype, scale.dtype))
        return (x * scale).to(out_dtype)

    x, scale = torch.randn(8, dtype=torch.bfloat16), torch.ones(())
    assert_no_worse(reference, reference, (x, torch.bfloat16), {"scale": scale})
    assert seen[0] == (torch.float64,) * 3
    assert seen[1] == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_keeps_strides_and_the_inputs():
    base = torch.randn(4, 10)
    views = [base[:, 1::2], base.t(), base[0].expand(3, 10), base[:, :0]]
    seen = []

    def reference(*tensors):
        seen.append([tensor.stride() for tensor in tensors])
        return [tensor.sin_() for tensor in tensors if 0 not in tensor.stride()]

    before = base.clone()
    assert_no_worse(reference, reference, views)
    assert seen == [[view.stride() for view in views]] * 3
    assert torch.equal(base, before)
