"""The sum of the weight's gradient over chunks: its error against that of one product, and its range."""

import pytest
import torch
from torch.nn import functional

from graphfuse.kernels import _weight_grad
from graphfuse.kernels._weight_grad import HalfSum, WideSum, convert_
from graphfuse.kernels.linear_cross_entropy import linear_cross_entropy

TOKENS, FEATURES, VOCAB, CHUNK = 2048, 64, 500, 256


@pytest.fixture
def sums_in_half(monkeypatch):
    """As on a GPU, where the memory of the weight's gradient matters."""
    monkeypatch.setattr(_weight_grad, "sums_in_half", lambda weight, grad_dtype: grad_dtype == torch.bfloat16)


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def head(device, scale, dtype=torch.bfloat16):
    hidden = torch.randn(TOKENS, FEATURES, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, FEATURES, device=device) * scale).to(dtype).requires_grad_()
    target = torch.randint(0, VOCAB, (TOKENS,), device=device)
    target[::3] = -100
    return hidden, weight, target


def exact(hidden, weight, target):
    weight = weight.detach().double().requires_grad_()
    return torch.autograd.grad(functional.cross_entropy(hidden.detach().double() @ weight.t(), target), weight)[0]


@pytest.mark.usefixtures("sums_in_half")
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("scale", [0.02, 0.3, 1.5], ids=["init", "trained", "peaked"])
def test_half_sum_is_as_good_as_one_product(scale, compact, device):
    hidden, weight, target = head(device, scale)
    truth = exact(hidden, weight, target)
    eager = functional.cross_entropy(functional.linear(hidden, weight).float(), target)
    ours = linear_cross_entropy(hidden, weight, target, chunk_size=CHUNK, compact=compact)
    found, expected = (torch.autograd.grad(loss, weight)[0] for loss in (ours, eager))
    assert found.dtype == torch.bfloat16
    assert found.stride() == weight.stride()
    assert error(found, truth) <= 1.05 * error(expected, truth)


def test_sum_in_bf16_would_not_be(device):
    """What the effort is for."""
    torch.manual_seed(1)
    chunks = [(torch.randn(CHUNK, VOCAB, device=device), torch.randn(CHUNK, FEATURES, device=device)) for _ in range(8)]
    chunks = [(grad.bfloat16(), x.bfloat16()) for grad, x in chunks]
    truth = sum(grad.double().t() @ x.double() for grad, x in chunks)
    weight, hidden = torch.empty(VOCAB, FEATURES, device=device), torch.cat([x for _, x in chunks])
    top = torch.cat([grad for grad, _ in chunks]).abs().max().float()
    errors = {}
    for name, total in {
        "half": HalfSum(weight, hidden, top),
        "wide": WideSum(weight, torch.float32),
        "bf16": WideSum(weight, torch.bfloat16),
    }.items():
        for grad, x in chunks:
            if name == "half":
                total.add(total.scaled(grad.float()).half(), x, None)
            else:
                total.add(grad, x)
        errors[name] = error(total.total().bfloat16(), truth)
    assert errors["half"] <= 1.1 * errors["wide"]
    assert errors["bf16"] >= 1.5 * errors["wide"]


@pytest.mark.usefixtures("sums_in_half")
@pytest.mark.parametrize("options", [{"label_smoothing": 0.3, "z_loss": 0.1}, {"logit_scale": 8.0}, {"softcap": 2.0}])
def test_half_sum_does_not_overflow(options, device):
    """Every token has the same large features and gradients of one sign: the sum is as large as it can be."""
    hidden, weight, target = head(device, 0.3)
    with torch.no_grad():
        hidden.fill_(300.0)
        weight.fill_(0.0)[:, 0] = 0.25
    target.fill_(7)
    run = {"chunk_size": CHUNK, **options}
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, **run), weight)[0]
    wide = weight.detach().float().requires_grad_()
    expected = torch.autograd.grad(linear_cross_entropy(hidden.detach().float(), wide, target, **run), wide)[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))


@pytest.mark.usefixtures("sums_in_half")
def test_half_sum_keeps_features_of_any_size(device):
    """Massive activations in one feature take no digits from the others."""
    hidden, weight, target = head(device, 0.02)
    sizes = torch.ones(FEATURES, device=device)
    sizes[3], sizes[5] = 2.0**12, 2.0**-20
    with torch.no_grad():
        hidden.mul_(sizes)
        weight.div_(sizes)
    truth = exact(hidden, weight, target)
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, chunk_size=CHUNK), weight)[0]
    for feature in (0, 3, 5):
        assert error(found[:, feature], truth[:, feature]) <= 2**-7


@pytest.mark.usefixtures("sums_in_half")
def test_half_sum_of_nothing_is_zero(device):
    hidden, weight, target = head(device, 0.3)
    loss = linear_cross_entropy(hidden, weight, target.fill_(-100), chunk_size=CHUNK, compact=False)
    assert not torch.autograd.grad(loss, weight)[0].any()


@pytest.mark.usefixtures("sums_in_half")
def test_half_sum_keeps_the_layout_of_the_weight(device):
    hidden, weight, target = head(device, 0.3)
    turned = weight.detach().t().contiguous().t().requires_grad_()
    found = torch.autograd.grad(linear_cross_entropy(hidden, turned, target, chunk_size=CHUNK), turned)[0]
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, chunk_size=CHUNK), weight)[0]
    assert found.stride() == turned.stride()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_converts_in_place(rows, turned, device):
    x = torch.randn(rows, 24, device=device).bfloat16()
    x = x.t().contiguous().t() if turned else x
    scale = 2.0 ** torch.arange(-12, 12, device=device)
    expected = (x.float() * scale).half()
    found = convert_(x, torch.float16, scale)
    assert found.data_ptr() == x.data_ptr()
    assert torch.equal(found, expected)
    again = convert_(found, torch.bfloat16, torch.tensor(0.25, device=device))
    assert torch.equal(again, (expected.float() * 0.25).bfloat16())


def test_conversion_saturates_but_keeps_nan(device):
    x = torch.tensor([[3e38, -3e38, float("nan"), 1.0]], device=device).bfloat16()
    found = convert_(x, torch.float16, torch.tensor(1.0, device=device))
    assert found[0, :2].tolist() == [65504.0, -65504.0]
    assert found[0, 2].isnan()
