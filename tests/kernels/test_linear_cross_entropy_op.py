"""linear_cross_entropy as an op of torch: opcheck, compilers, autocast, errors, and a GPU that is never waited for."""

import itertools

import pytest
import torch
from torch.nn import functional

from graphfuse import ops
from graphfuse.kernels import _token_chunks
from graphfuse.kernels._softmax_grad import NO_TARGET
from graphfuse.kernels.linear_cross_entropy import LossOptions
from graphfuse.ops import linear_cross_entropy, linear_log_probs

EVERYTHING = LossOptions(label_smoothing=0.2, logit_scale=1.7, softcap=4.0, z_loss=1e-2)


def problem(device="cpu", dtype=torch.float32, tokens=19, features=24, vocab=77):
    """Hidden, weight, bias that require grad; target and class weights."""
    hidden, weight, bias = (
        torch.randn(shape, device=device) for shape in ((tokens, features), (vocab, features), vocab)
    )
    leaves = [leaf.to(dtype).requires_grad_() for leaf in (hidden, weight * 0.3, bias)]
    target = torch.randint(0, vocab, (tokens,), device=device)
    target[1::5] = -100
    return *leaves, target, torch.rand(vocab, device=device) + 0.1


def factors(tokens=19, names=4):
    """Factors of each token, some of them 0; none negative, for opcheck compares what backward may overwrite."""
    found = torch.rand(4, tokens)
    found[:, ::4] = 0
    return *found[:names], *[None] * (4 - names)


@pytest.mark.parametrize("optional", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("compact", [None, False])
def test_opcheck(compact, optional):
    hidden, weight, bias, target, class_weight = problem()
    target[target == -100] = NO_TARGET
    low_rank = (torch.randn(19, 3, requires_grad=True), torch.randn(77, 3, requires_grad=True))
    tensors = (hidden, weight, bias, *low_rank, target, class_weight)
    tensors = tensors if optional else (hidden, weight, None, None, None, target, None)
    options = (1.7, 4.0, 8, compact) if optional else (1.0, 0.0, 8, compact)
    needs = (True, True, *[optional] * 3)
    ops = torch.ops.graphfuse
    given = factors(names=4 if optional else 1)
    torch.library.opcheck(ops.linear_cross_entropy.default, (*tensors, *given, *options, needs))
    wants = (True, optional, optional)
    torch.library.opcheck(ops.linear_token_losses.default, (*tensors, *options, *wants, not optional))
    detached = [None if tensor is None else tensor.detach() for tensor in tensors]
    grads = factors(names=3 if optional else 1)[:3]
    torch.library.opcheck(ops.linear_token_losses_backward.default, (*grads, *detached, *options, needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(dynamic, reduction, dtype, device):
    def step(hidden, weight, bias, target, class_weight):
        options = {**EVERYTHING._asdict(), "class_weight": class_weight, "chunk_size": 8}
        return linear_cross_entropy(hidden * 2, weight, target, bias, reduction=reduction, **options).sum() * 3

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    inputs = problem(device, dtype)
    found, expected = (call(*inputs) for call in (compiled, step))
    assert torch.equal(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs[:3]), torch.autograd.grad(expected, inputs[:3]))


def test_follows_autocast(device):
    hidden, weight, bias, target, _ = problem(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, bias)
        expected = functional.cross_entropy(functional.linear(hidden, weight, bias), target)
    assert loss.dtype == expected.dtype == torch.float32
    # eager rounds the logits to bf16, the kernel need not: they agree within that rounding
    torch.testing.assert_close(loss, expected, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=0)
    leaves = (hidden, weight, bias)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= torch.finfo(torch.bfloat16).eps * theirs.norm()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_log_probs_compile(dynamic, device):
    def step(hidden, weight, bias, target):
        logps = linear_log_probs(hidden * 2, weight, target, bias, softcap=4.0, chunk_size=8)
        return (logps.exp() * logps).sum() * 3

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    *tensors, target, _ = problem(device)
    found, expected = (call(*tensors, target) for call in (compiled, step))
    assert torch.equal(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors))


@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=5)], ids=str)
def test_no_output_is_another_or_an_input(needs, device):
    """Nor are those that nobody needs: torch refuses an op that returns the same tensor twice."""
    hidden, weight, bias, target, _ = (tensor.detach() for tensor in problem(device))
    target[target < 0] = NO_TARGET
    low_rank = (torch.randn(19, 3, device=device), torch.randn(77, 3, device=device))
    losses = (hidden, weight, bias, *low_rank, target, None)
    inputs = (*losses, torch.ones(19, device=device), None, None, None)
    ops = torch.ops.graphfuse
    grads = (torch.ones(19, device=device), None, None)
    for given, outputs in [
        (inputs, ops.linear_cross_entropy(*inputs, 1.0, 0.0, 0, None, needs)),
        (losses, ops.linear_token_losses(*losses, 1.0, 0.0, 0, None, True, *needs[:2], False)),
        (losses, ops.linear_token_losses_backward(*grads, *losses, 1.0, 0.0, 0, None, needs)),
    ]:
        storages = [tensor.untyped_storage()._cdata for tensor in (*given, *outputs) if tensor is not None]
        assert len(set(storages)) == len(storages)


def test_missing_flag_raises(device):
    """A caller of the op that forgot a gradient hears of it."""
    hidden, weight, _, target, _ = problem(device)
    head = (hidden, weight, None, None, None, target.clamp(min=0), None)
    arguments = (*head, torch.ones(19, device=device), None, None, None)
    outputs = torch.ops.graphfuse.linear_cross_entropy(*arguments, 1.0, 0.0, 0, None, [True, *[False] * 4])
    assert [output.shape for output in outputs] == [(), hidden.shape, (0,), (0,), (0,), (0,)]
    assert not any(output.requires_grad for output in outputs[1:])
    with pytest.raises(RuntimeError, match=r"needs: expected True for weight, .*, got False"):
        outputs[0].backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_raises(reduction, device):
    hidden, weight, _, target, _ = problem(device)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("derive", [torch.func.grad, torch.func.jacfwd, lambda f: torch.vmap(torch.func.grad(f))])
def test_derivatives_without_autograd_raise(derive, reduction, device):
    hidden, weight, _, target, _ = problem(device)

    def loss(weight):
        return linear_cross_entropy(hidden.detach(), weight, target, reduction=reduction).sum()

    with pytest.raises(RuntimeError, match=r"torch\.func: expected no .* of this op, got one"):
        derive(loss)(weight.detach().expand(2, -1, -1) if derive.__name__ == "<lambda>" else weight.detach())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_is_right(reduction, device):
    hidden, weight, _, target, _ = problem(device)
    hidden, target = hidden.detach().expand(3, -1, -1) * torch.rand(3, 1, 1, device=device), target.expand(3, -1)
    ours = torch.vmap(lambda x, y: linear_cross_entropy(x, weight, y, reduction=reduction))(hidden, target)
    theirs = [
        functional.cross_entropy(x @ weight.t(), y, reduction=reduction) for x, y in zip(hidden, target, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs))
    found = [torch.autograd.grad(losses.sum(), weight)[0] for losses in (ours, torch.stack(theirs))]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(5, 4).int()}, TypeError, r"hidden: expected fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"hidden": torch.tensor(0.0)}, ValueError, r"hidden: expected at least 1 dimension, got 0"),
        ({"weight": torch.zeros(7, 3)}, ValueError, r"weight: expected shape \(V, 4\), got \(7, 3\)"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight: expected shape \(V, 4\), got \(7,\)"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight: expected at least 1 class, got shape \(0, 4\)"),
        ({"target": torch.zeros(5, device="meta").long()}, ValueError, r"target: .* cpu, as hidden, got one on meta"),
        ({"weight": torch.zeros(7, 4).half()}, TypeError, r"weight: expected torch.float32, .* got torch.float16"),
        ({"target": torch.zeros(5)}, TypeError, r"target: expected int64 or int32, got torch.float32"),
        ({"target": torch.zeros(6).long()}, ValueError, r"target: expected shape \(5,\), got \(6,\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \(7,\), got \(6,\)"),
        ({"bias": torch.zeros(7).half()}, TypeError, r"bias: expected torch.float32, .* got torch.float16"),
        ({"class_weight": torch.zeros(7, 1)}, ValueError, r"class_weight: expected shape \(7,\), got \(7, 1\)"),
        ({"class_weight": torch.zeros(7).long()}, TypeError, r"class_weight: expected fp16, .* got torch.int64"),
        (
            {"low_rank": (torch.zeros(5, 2), torch.zeros(7, 3))},
            ValueError,
            r"low_rank: .* \(5, R\) and \(7, R\), got \(",
        ),
        ({"low_rank": (torch.zeros(5, 2), torch.zeros(7, 2).half())}, TypeError, r"low_rank: .*float32 and .*float16"),
        ({"low_rank": (torch.zeros(5, 2).half(), torch.zeros(7, 2).half())}, TypeError, r"low_rank: .* or both fp32"),
        ({"reduction": "max"}, ValueError, r"reduction: expected one of mean, sum, none, got max"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        ({"softcap": -1.0}, ValueError, r"softcap: expected None or a positive number, got -1.0"),
        ({"chunk_size": -1}, ValueError, r"chunk_size: expected None or a number of tokens, got -1"),
        ({"logits_dtype": torch.int8}, TypeError, r"logits_dtype: expected fp16, .* got torch.int8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rejects(change, error, message):
    arguments = {"hidden": torch.zeros(5, 4), "weight": torch.zeros(7, 4), "target": torch.zeros(5).long()}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(7, 3)}, ValueError, r"weight: expected shape \(V, 4\), got \(7, 3\)"),
        ({"target": torch.zeros(5)}, TypeError, r"target: expected int64 or int32, got torch.float32"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \(7,\), got \(6,\)"),
        ({"softcap": float("inf")}, ValueError, r"softcap: expected None or a positive number, got inf"),
        ({"chunk_size": -1}, ValueError, r"chunk_size: expected None or a number of tokens, got -1"),
        ({"target": torch.full((5,), 7)}, IndexError, r"target: expected classes in \[0, 7\), got 7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_log_probs_reject(change, error, message):
    arguments = {"hidden": torch.zeros(5, 4), "weight": torch.zeros(7, 4), "target": torch.zeros(5).long()}
    with pytest.raises(error, match=message):
        linear_log_probs(**(arguments | change))


def test_every_op_has_a_docstring_with_its_source():
    for name in ops.__all__:
        text = getattr(ops, name).__doc__
        for section in ("Args:", "Returns:", "Raises:", "Numerics:", "Source:"):
            assert section in text, (name, section)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_waits_for_the_gpu(reduction):
    """Uncompacted forward and backward run with host syncs forbidden, and replay from a CUDA graph on new inputs."""
    hidden, weight, bias, target, class_weight = problem("cuda", torch.bfloat16, tokens=64, features=64, vocab=1001)
    options = {**EVERYTHING._asdict(), "class_weight": class_weight, "chunk_size": 24, "reduction": reduction}
    options["compact"] = False

    def step():
        loss = linear_cross_entropy(hidden, weight, target, bias, **options)
        return loss.detach(), *torch.autograd.grad(loss.sum() * 3, (hidden, weight, bias))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
        target.copy_(torch.randint(0, 1001, (64,)))
    graph.replay()
    assert all(map(torch.equal, replayed, step()))


@pytest.mark.gpu
def test_captures_without_being_told(monkeypatch):
    """Compaction, however much it would pay, is left while a CUDA graph is captured."""
    monkeypatch.setattr(_token_chunks, "GPU_WORTH_A_WAIT", 0)
    hidden, weight, _, target, _ = problem("cuda", torch.bfloat16, tokens=64, features=64, vocab=1001)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))
    graph.replay()
    torch.testing.assert_close(replayed, expected)


@pytest.mark.gpu
def test_memory_is_one_chunk_and_the_gradients():
    """The weight's once: its sum over the chunks takes no more than itself."""
    tokens, features, vocab, chunk = 8192, 256, 65536, 512
    hidden, weight, _, target, _ = problem("cuda", torch.bfloat16, tokens, features, vocab)

    def step():
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, target, chunk_size=chunk).backward()

    step()
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    expected = 2 * hidden.numel() + 2 * weight.numel() + 2 * chunk * vocab
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * expected
