"""What linear_cross_entropy and linear_log_probs compute, and keep: GEMMs, rows, gradients, memory."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from graphfuse.kernels import _head_ops, _weight_grad
from graphfuse.kernels._softmax_grad import Factors
from graphfuse.kernels._token_chunks import GPU_WORTH_A_WAIT, Kept, chunk_tokens, keeps
from graphfuse.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs

TOKENS, FEATURES, VOCAB, CHUNK = 19, 24, 77, 8
CHUNKS = 2  # that the tokens that count take

OPS = torch.ops.graphfuse
BODIES = {
    OPS.linear_cross_entropy.default: _head_ops._sum_forward,
    OPS.linear_token_losses.default: _head_ops._each_forward,
    OPS.linear_token_losses_backward.default: _head_ops._each_backward,
}
GEMMS = (torch.ops.aten.mm.out, torch.ops.aten.addmm.out)


class Watch(TorchDispatchMode):
    """Keeps what ran, inside our ops too, the sizes of GEMMs, and that of the largest floating-point storage made."""

    def __init__(self):
        super().__init__()
        self.ops, self.gemms, self.largest = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.overloadpacket.__name__)
        if func in BODIES:
            with self:
                return BODIES[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func in GEMMS:
            a, b = args[-2:]
            self.gemms.append((a.shape[0], a.shape[1], b.shape[1]))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out

    @property
    def rows(self):
        """How many tokens each product of logits was for."""
        return [m for m, k, n in self.gemms if (k, n) == (FEATURES, VOCAB)]


@pytest.fixture(autouse=True)
def in_one_piece(monkeypatch):
    """Products are counted here: none is cut in two."""
    monkeypatch.setattr(_weight_grad, "splits", lambda _: False)


def problem(device, dtype=torch.float32, tokens=TOKENS):
    """Hidden, weight and bias; a target of which 4 tokens in 19 do not count."""
    hidden, weight = torch.randn(tokens, FEATURES, device=device), torch.randn(VOCAB, FEATURES, device=device) * 0.3
    bias = torch.randn(VOCAB, device=device)
    target = torch.randint(0, VOCAB, (tokens,), device=device)
    target[1::5] = -100
    return *(leaf.to(dtype).requires_grad_() for leaf in (hidden, weight, bias)), target


def loss_of(hidden, weight, bias, target, **options):
    return linear_cross_entropy(hidden, weight, target, bias, **{"chunk_size": CHUNK, "compact": True, **options})


@pytest.mark.parametrize("trained", ["", "hidden", "weight", "bias", "hidden weight", "hidden weight bias"])
def test_computes_the_gradients_that_are_needed(trained, device):
    *tensors, target = problem(device)
    whole = torch.autograd.grad(loss_of(*tensors, target), tensors)
    for name, tensor in zip(("hidden", "weight", "bias"), tensors, strict=True):
        tensor.requires_grad_(name in trained)
    with Watch() as watch:
        loss = loss_of(*tensors, target)
        if trained:
            loss.backward()
    assert len(watch.gemms) == CHUNKS * (1 + ("hidden" in trained) + ("weight" in trained))
    for tensor, grad in zip(tensors, whole, strict=True):
        assert torch.equal(tensor.grad, grad) if tensor.requires_grad else tensor.grad is None


def test_computes_the_loss_alone_without_gradients(device):
    inputs = problem(device)
    expected = loss_of(*inputs)
    with torch.no_grad(), Watch() as watch:
        loss = loss_of(*inputs)
    assert torch.equal(loss, expected)
    assert len(watch.gemms) == CHUNKS


def test_per_token_losses_compute_logits_twice(device):
    *tensors, target = problem(device)
    with Watch() as watch:
        loss_of(*tensors, target, reduction="none").sum().backward()
    assert len(watch.gemms) == CHUNKS * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_fill_whole_loads(reduction, has_bias, dtype, device, monkeypatch):
    """An odd number of classes is cut where a load of 16 bytes ends: the rest is a product of its own.

    But for logits with a bias, which are rounded once only in one piece.
    """
    monkeypatch.setattr(_weight_grad, "splits", lambda _: True)
    hidden, weight, bias, target = problem(device, dtype)
    given = (hidden, weight, bias) if has_bias else (hidden, weight)
    with Watch() as watch:
        loss = linear_cross_entropy(
            hidden, weight, target, given[2] if has_bias else None, chunk_size=CHUNK, reduction=reduction
        )
        found = torch.autograd.grad(loss.sum(), given)
    multiple = 16 // dtype.itemsize
    gemms = [gemm for gemm in watch.gemms if not has_bias or gemm[1:] != (FEATURES, VOCAB)]
    assert bool(watch.rows) == has_bias
    whole = [{m, k, n} & {VOCAB // multiple * multiple} for m, k, n in gemms]
    rest = [{m, k, n} & {VOCAB % multiple} for m, k, n in gemms]
    assert all(bool(a) != bool(b) for a, b in zip(whole, rest, strict=True))
    assert_no_worse_gradients(found, given, target, reduction)


def assert_no_worse_gradients(found, given, target, reduction):
    """No farther from the gradients in float64 than 1.2 times eager's, and the last bit."""

    def eager(leaves):
        logits = functional.linear(*leaves)
        return torch.autograd.grad(
            functional.cross_entropy(
                logits.float() if logits.dtype != torch.float64 else logits, target, reduction=reduction
            ).sum(),
            leaves,
        )

    truth = eager([leaf.detach().double().requires_grad_() for leaf in given])
    for ours, theirs, exact in zip(found, eager(given), truth, strict=True):
        error, allowed = (float((x.double() - exact).norm()) for x in (ours, theirs))
        assert error <= 1.2 * allowed + torch.finfo(ours.dtype).eps * float(exact.norm())


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_tokens_cost_nothing(reduction, options, device):
    *tensors, target = problem(device)
    found = {}
    for compact in (True, False):
        with Watch() as watch:
            loss = loss_of(*tensors, target, reduction=reduction, compact=compact, **options)
            grads = torch.autograd.grad(loss.sum(), tensors)
        found[compact] = (loss, *grads)
        passes = 2 if reduction == "none" else 1
        assert sum(watch.rows) == passes * (int((target != -100).sum()) if compact else TOKENS)
    torch.testing.assert_close(found[True], found[False])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_counts_and_nothing_runs(reduction, device):
    *tensors, target = problem(device)
    with Watch() as watch:
        loss = loss_of(*tensors, target.fill_(-100), reduction=reduction, compact=True)
        grads = torch.autograd.grad(loss.sum(), tensors)
    assert watch.gemms == []
    assert not any(grad.any() for grad in grads)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()


def test_log_probs_without_upstream_gradient_cost_nothing_in_backward(device):
    *tensors, target = problem(device)
    logps = linear_log_probs(*tensors[:2], target.clamp(min=0), tensors[2], chunk_size=CHUNK)
    chosen = torch.arange(TOKENS, device=device) % 3 == 0
    with Watch() as watch:
        (logps * chosen).sum().backward()
    assert sum(watch.rows) == int(chosen.sum()) if device == "cpu" else TOKENS


def test_keeps_the_order_of_the_tokens(device):
    factors = Factors(
        torch.tensor([0.0, 2.0, 0.0, 0.0, 1.0], device=device), None, None, torch.eye(5, device=device)[2]
    )
    kept = Kept(factors)
    assert (kept.order.tolist(), kept.count()) == ([1, 2, 4, 0, 3], 3)


def test_compacts_where_it_pays(device):
    factors = Factors(torch.ones(5, device=device))
    assert not keeps(Factors(), GPU_WORTH_A_WAIT, compact=True)
    assert not keeps(factors, GPU_WORTH_A_WAIT, compact=False)
    assert keeps(factors, 0, compact=True)
    assert keeps(factors, GPU_WORTH_A_WAIT, compact=None)
    assert keeps(factors, GPU_WORTH_A_WAIT - 1, compact=None) is (device == "cpu")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_does_not_compute_gradients_twice(use_reentrant, device):
    """Without gradients a first pass only knows the loss. With them, nothing makes it run again."""
    hidden, weight, bias, target = problem(device)

    def head(hidden):
        return loss_of(functional.rms_norm(hidden.tanh(), (FEATURES,)), weight, bias, target)

    expected = torch.autograd.grad(head(hidden), (hidden, weight, bias))
    with Watch() as watch:
        checkpoint(head, hidden, use_reentrant=use_reentrant).backward()
    assert len(watch.gemms) == CHUNKS * (4 if use_reentrant else 3)
    for leaf, grad in zip((hidden, weight, bias), expected, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_adds_twice(reduction, device):
    """A retained graph keeps its gradients as they were, whatever upstream gradient came first."""
    *tensors, target = problem(device)
    loss = loss_of(*tensors, target, reduction=reduction).sum()
    once = torch.autograd.grad(loss, tensors, retain_graph=True)
    thrice = torch.autograd.grad(loss * 3, tensors, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(thrice, tuple(grad * 3 for grad in once))
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(tensors, once, strict=True))


def test_second_backward_needs_a_retained_graph(device):
    *tensors, target = problem(device)
    loss = loss_of(*tensors, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph: expected True for a second backward"):
        loss.backward()


def test_freed_graph_scales_in_place(device):
    """No second tensor of the weight's size is made where nobody can ask for the first again."""
    hidden, weight, _, target = problem(device)
    head = linear_cross_entropy(hidden, weight, target, reduction="sum")
    saved = [tensor.data_ptr() for tensor in head.grad_fn.gradients.tensors[:2]]
    with Watch() as watch:
        head.backward(torch.tensor(3.0, device=device))
    assert [leaf.grad.data_ptr() for leaf in (hidden, weight)] == saved
    assert not {"zeros", "zeros_like", "mul", "clone"} & set(watch.ops)


def test_loss_does_not_keep_the_gradients_alive(device):
    hidden, weight, bias, target = problem(device)
    loss = linear_cross_entropy(hidden, weight, target, bias, reduction="sum")
    loss.backward()
    assert loss.grad_fn.gradients.tensors is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_never_exist_as_a_whole(reduction, device):
    tokens, features, vocab, chunk = 64, 4, 256, 8
    hidden = torch.randn(tokens, features, device=device, requires_grad=True)
    weight = torch.randn(vocab, features, device=device, requires_grad=True)
    target = torch.arange(tokens, device=device)
    with Watch() as watch:
        linear_cross_entropy(
            hidden, weight, target, label_smoothing=0.1, softcap=4.0, reduction=reduction, chunk_size=chunk
        ).sum().backward()
    assert chunk * vocab <= watch.largest < tokens * vocab // 4


def test_chunk_size_follows_from_the_budget():
    def chosen(tokens, vocab, itemsize=2, on_cpu=False):
        return chunk_tokens(tokens, vocab, itemsize, on_cpu=on_cpu)

    assert chosen(16384, 128256) == 2048
    assert chosen(16384, 151936) == 1664  # ten equal chunks, not nine and a rest
    assert chosen(16384, 128256, itemsize=4) == 1664
    assert chosen(16384, 1_000_000) == 1664
    assert chosen(16384, 32000) == 8192
    assert chosen(65536, 128256) == 4096  # sixteen chunks at most
    assert chosen(2**20, 128256) == 8192  # and no chunk over this
    assert chosen(700, 128256) == 700
    assert chosen(0, 128256) == 1
    assert chosen(4096, 128256, itemsize=4, on_cpu=True) == 64


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [4096, 50304, 50257])
def test_logits_with_a_bias_are_rounded_once(vocab):
    """As eager's are: cuBLAS rounds a product before it adds to it, where rows of the result have gaps."""
    hidden = torch.randn(512, 64, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(vocab, 64, device="cuda").bfloat16() / 8, torch.randn(vocab, device="cuda").bfloat16()
    target = torch.randint(vocab, (512,), device="cuda")

    exact = functional.cross_entropy(
        functional.linear(hidden.double(), weight.double(), bias.double()), target, reduction="none"
    )
    ours = linear_cross_entropy(hidden, weight, target, bias, reduction="none", chunk_size=128)
    eager = functional.cross_entropy(functional.linear(hidden, weight, bias).float(), target, reduction="none")
    assert (ours - exact).norm() <= 1.02 * (eager - exact).norm()
