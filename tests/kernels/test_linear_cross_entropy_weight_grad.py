"""The sum of the weight's gradient over chunks: its error against that of one product, and its range."""

import pytest
import torch
from torch.nn import functional

from graphfuse.kernels import _half_product, _weight_grad
from graphfuse.kernels._descriptor import Described
from graphfuse.kernels._half_product import add_product
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.kernels._weight_grad import HalfSum, WideSum
from graphfuse.kernels.linear_cross_entropy import linear_cross_entropy

TOKENS, FEATURES, VOCAB, CHUNK = 2048, 64, 500, 256


@pytest.fixture
def sums_in_half(monkeypatch, device):
    """As on a GPU, where the memory of the weight's gradient matters."""
    if device == "cpu":
        monkeypatch.setattr(_weight_grad, "sums_in_half", lambda _, grad_dtype: grad_dtype == torch.bfloat16)


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
    chunks = [(padded(grad.bfloat16()), x.bfloat16()) for grad, x in chunks]
    truth = sum(grad.double().t() @ x.double() for grad, x in chunks)
    weight, hidden = torch.empty(VOCAB, FEATURES, device=device), torch.cat([x for _, x in chunks])
    top = torch.cat([grad for grad, _ in chunks]).abs().max().float()
    errors = {}
    for name, total in {
        "half": HalfSum(weight, hidden, top),
        "wide": WideSum(weight, torch.float32),
        "bf16": WideSum(weight, torch.bfloat16),
    }.items():
        for index, (grad, x) in enumerate(chunks):
            total.add(grad, x, is_last=index == len(chunks) - 1)
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
@pytest.mark.parametrize("size", [2.0**-126, 2.0**-132], ids=["smallest", "subnormal"])
def test_half_sum_takes_features_of_no_size(size, device):
    """What would be the scale of a feature that is nearly dead is no fp32 number."""
    hidden, weight, target = head(device, 0.02)
    with torch.no_grad():
        hidden[:, 3] = size
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, chunk_size=CHUNK), weight)[0]
    assert found.isfinite().all()
    assert found[:, 3].abs().max() <= size
    assert found[:, :3].any(0).all()


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


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(("tokens", "vocab", "features"), [(1, 8, 8), (70, 500, 64), (33, 130, 264), (64, 64, 512)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_kernel_adds_products(tokens, vocab, features, chunks, device):
    dtype = torch.float16 if device == "cpu" else torch.bfloat16  # the interpreter multiplies bf16 as bit patterns
    factors = [
        (torch.randn(tokens, -(-vocab // 64) * 64, device=device)[:, :vocab].to(dtype), torch.randn(tokens, features))
        for _ in range(chunks)
    ]
    factors = [(padded(grad), x.to(device, dtype)) for grad, x in factors]
    scale = 2.0 ** torch.arange(features, device=device).remainder(5).sub(3)
    total = torch.full((vocab, features), float("nan"), dtype=torch.float16, device=device)
    for index, (grad, x) in enumerate(factors):
        add_product(total, grad, x, scale, is_first=index == 0, is_last=index == chunks - 1)
    truth = sum(grad.double().t() @ x.double() for grad, x in factors)
    torch.testing.assert_close(total.view(dtype).double(), truth, rtol=2**-8, atol=2**-8 * float(truth.abs().max()))


def padded(x):
    """The same numbers in rows that start at multiples of 16 bytes, as chunks of logits do."""
    rows, width = x.shape
    return x.new_full((rows, -(-width // 64) * 64), float("nan"))[:, :width].copy_(x)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernel_takes_rows_of_any_distance(device):
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    grad, wide = padded(torch.randn(20, 40, device=device).to(dtype)), torch.randn(20, 25, device=device).to(dtype)
    scale, truth = torch.ones(24, device=device), grad.float().t() @ wide[:, 1:].float()
    total = torch.empty(40, 24, dtype=torch.float16, device=device)
    add_product(total, grad, wide[:, 1:], scale, is_first=True, is_last=True)
    torch.testing.assert_close(total.view(dtype).float(), truth, rtol=2**-7, atol=2**-7)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernel_is_given_rows_that_do_not_overlap(device, monkeypatch):
    """The GPU's copy engine takes no rows that stand in the same memory."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    described = []

    def describe(base, shape, strides, block):
        described.append((shape, strides))
        return Described(base, shape, strides, block)

    monkeypatch.setattr(_half_product, "Described", describe)
    grad, x = padded(torch.randn(20, 40, device=device).to(dtype)), torch.randn(24, device=device).to(dtype)
    total = torch.empty(40, 24, dtype=torch.float16, device=device)
    add_product(total, grad, x.expand(20, 24), torch.ones(24, device=device), is_first=True, is_last=True)
    truth = grad.float().t() @ x.expand(20, 24).float()
    torch.testing.assert_close(total.view(dtype).float(), truth, rtol=2**-7, atol=2**-7)
    assert all(strides[0] >= shape[1] for shape, strides in described)


@pytest.mark.parametrize(("capability", "largest"), [((8, 6), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)])
def test_tiles_fit_in_shared_memory(capability, largest, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for features in (8, 128, 4096):
        tile = _half_product._tile.__wrapped__(features, 0)
        factors = tile["num_stages"] * tile["BLOCK_C"] * (tile["BLOCK_V"] + tile["BLOCK_H"])
        halves = tile["BLOCK_V"] * tile["BLOCK_H"] // 2  # on their way out
        assert 2 * (factors + halves) <= largest * 1024


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "vocab", "features"),
    [(8, 8, 256), (64, 128, 256), (200, 1000, 320), (40, 8192, 1024), (2048, 4104, 4096), (1664, 40000, 1024)],
)
def test_hopper_kernel_adds_as_the_other(tokens, vocab, features, monkeypatch):
    """In rows that belong to something larger, which stays as it is; and first over what nobody wrote."""
    if _half_product._hopper(0) is None:
        pytest.skip("needs a Hopper GPU")
    assert _half_product._is_right(0)
    results = []
    for is_hopper in (True, False):
        if not is_hopper:
            monkeypatch.setattr(_half_product, "_hopper", lambda _: None)
        torch.manual_seed(0)
        whole = torch.full((vocab + 64, features), 7.0, dtype=torch.float16, device="cuda")
        total, scale = whole[32:-32], torch.exp2(torch.randint(-2, 4, (features,), device="cuda").float())
        total.fill_(float("nan"))
        truth = torch.zeros(vocab, features, dtype=torch.float64, device="cuda")
        for index in range(3):
            grad = padded((torch.randn(tokens, vocab, device="cuda") * 1e-2).bfloat16())
            x = torch.randn(tokens, features, device="cuda").bfloat16()
            add_product(total, grad, x, scale, is_first=index == 0, is_last=index == 2)
            truth += grad.double().t() @ x.double()
        found = total.view(torch.bfloat16).double()
        assert (whole[:32] == 7).all()
        assert (whole[-32:] == 7).all()
        results.append(float((found - truth).norm() / truth.norm()))
    assert results[0] < 2e-3
    assert results[0] == pytest.approx(results[1], rel=0.05)


def test_hopper_kernel_is_not_used_where_it_is_wrong(monkeypatch, caplog):
    tries = [False, RuntimeError("no such instruction"), torch.OutOfMemoryError(), True]

    def answer(_):
        result = tries.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(_half_product, "_tries", answer)
    monkeypatch.setattr(_half_product, "_tried", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [_half_product._is_right(device) for device in (0, 0, 1, 1, 2, 2, 2)] == [False] * 5 + [True] * 2
    assert "no such instruction" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _half_product._is_right(3)
    assert 3 not in _half_product._tried
