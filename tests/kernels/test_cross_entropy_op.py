"""cross_entropy as an op of torch: what it keeps, opcheck, compilers, autocast, errors."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn import functional

from graphfuse.kernels._loss import LossOptions
from graphfuse.kernels._softmax_grad import NO_TARGET
from graphfuse.kernels.cross_entropy import TokenLogits, cross_entropy

TOKENS, VOCAB = 19, 77
EVERY_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
PLAIN = LossOptions()
EVERYTHING = LossOptions(label_smoothing=0.2, logit_scale=1.7, softcap=4.0, z_loss=1e-2)
BOTH = pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])


def problem(device="cpu", dtype=torch.float32, tokens=TOKENS, vocab=VOCAB):
    """Logits that require grad, targets of which some do not count, class weights."""
    logits = (torch.randn(tokens, vocab, device=device) * 2).to(dtype).requires_grad_()
    target = torch.randint(0, vocab, (tokens,), device=device)
    target[1::5] = -100
    return logits, target, torch.rand(vocab, device=device) + 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_REDUCTION
@BOTH
def test_saves_the_logits_and_two_numbers_a_token(options, reduction, dtype, device):
    """Nothing else of their size, and so no copy in float32."""
    logits, target, class_weight = problem(device, dtype, tokens=64, vocab=2048)
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(logits, target, reduction=reduction, class_weight=class_weight, **options._asdict())
    assert logits.untyped_storage()._cdata in sizes
    del sizes[logits.untyped_storage()._cdata]
    # Numbers of tokens, and the class weights: below one row in float32 for every eight.
    assert sum(sizes.values()) < 4 * logits.numel() / 8
    del loss


PEAK = """
    from pathlib import Path

    import torch

    from graphfuse import ops

    def resident(what):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

    def step(tokens):
        logits = torch.zeros(tokens, 32000, dtype=torch.bfloat16).normal_().requires_grad_()
        target = torch.randint(32000, (tokens,))
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = resident("VmRSS")
        ops.cross_entropy(logits, target).backward()
        return (resident("VmHWM") - before) / (logits.numel() * 2)

    step(64)
    print(step(4096))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_on_the_cpu_is_the_gradient_and_a_chunk():
    """Beside bf16 logits: their gradient once, and less than a copy of them in float32, which is twice that."""
    run = [sys.executable, "-c", textwrap.dedent(PEAK)]
    assert float(subprocess.run(run, check=True, capture_output=True, text=True).stdout) < 2.0


@pytest.mark.parametrize("optional", [False, True], ids=["plain", "everything"])
def test_opcheck(optional, device):
    logits, target, class_weight = problem(device)
    target[target == -100] = NO_TARGET
    given = (target, target != NO_TARGET, class_weight, 1.7, 4.0) if optional else (target, None, None, 1.0, 0.0)
    wants = (True, optional, optional)
    torch.library.opcheck(torch.ops.graphfuse.token_losses.default, (logits, *given, *wants))
    logits = logits.detach()
    *_, top, total = torch.ops.graphfuse.token_losses(logits, *given, *wants)
    grads = [torch.randn(TOKENS, device=device) if want else None for want in wants]
    arguments = (*grads, logits, given[0], given[2], top, total, *given[3:])
    torch.library.opcheck(torch.ops.graphfuse.token_losses_backward.default, arguments)


@pytest.mark.parametrize("wants", [(False, False, False), (True, False, False), (False, True, True)], ids=str)
def test_no_output_is_another_or_an_input(wants, path, device):
    logits, target, _ = (None if each is None else each.detach() for each in problem(device))
    target[target < 0] = NO_TARGET
    outputs = torch.ops.graphfuse.token_losses(logits, target, None, None, 1.0, 0.0, *wants)
    assert [len(each) for each in outputs] == [TOKENS * want for want in (*wants, True, True)]
    storages = [tensor.untyped_storage()._cdata for tensor in (logits, target, *outputs)]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(dynamic, reduction, dtype, device):
    def step(logits, target, class_weight):
        options = {**EVERYTHING._asdict(), "class_weight": class_weight, "reduction": reduction}
        return cross_entropy(logits * 2, target, **options).sum() * 3

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    inputs = problem(device, dtype)
    found, expected = (call(*inputs) for call in (compiled, step))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs[0]), torch.autograd.grad(expected, inputs[0]))


def test_follows_autocast_without_a_copy(device):
    """torch's own casts the logits to float32 (on CUDA all of it); here they are read as they are."""
    logits, target, _ = problem(device, torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = cross_entropy(logits, target)
        assert found.dtype == functional.cross_entropy(logits, target).dtype == torch.float32
    expected = functional.cross_entropy(logits.float(), target)
    torch.testing.assert_close(found, expected)


@EVERY_REDUCTION
def test_second_derivative_raises(reduction, device):
    logits, target, _ = problem(device)
    loss = cross_entropy(logits, target, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph: expected False, cross_entropy has no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("derive", [torch.func.grad, torch.func.jacfwd])
def test_derivatives_without_autograd_raise(derive, device):
    logits, target, _ = problem(device)
    with pytest.raises(RuntimeError, match=r"torch\.func: expected no .* of this op, got one"):
        derive(lambda z: cross_entropy(z, target))(logits.detach())


def test_losses_without_gradients_are_left_out(device):
    """What has no factor is not asked for, and a sum of one loss is a sum of that alone."""
    logits, target, _ = problem(device)
    factor = torch.zeros(TOKENS, device=device)
    factor[2] = 3.0
    found = TokenLogits(logits).sum(target, None, factor, None, None, None)
    torch.testing.assert_close(found, 3 * functional.cross_entropy(logits[2], target[2]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(5, 7).int()}, TypeError, r"logits: expected fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"logits": torch.tensor(0.0)}, ValueError, r"logits: expected a last dimension .* got shape \(\)"),
        (
            {"logits": torch.zeros(5, 0)},
            ValueError,
            r"logits: expected a last dimension .* 1 class, got shape \(5, 0\)",
        ),
        ({"target": torch.zeros(5)}, TypeError, r"target: expected int64 or int32, got torch.float32"),
        ({"target": torch.zeros(6).long()}, ValueError, r"target: expected shape \(5,\), got \(6,\)"),
        ({"target": torch.zeros(5, device="meta").long()}, ValueError, r"target: .* cpu, as logits, got one on meta"),
        ({"class_weight": torch.zeros(7, 1)}, ValueError, r"class_weight: expected shape \(7,\), got \(7, 1\)"),
        ({"class_weight": torch.zeros(7).long()}, TypeError, r"class_weight: expected fp16, .* got torch.int64"),
        ({"reduction": "max"}, ValueError, r"reduction: expected one of mean, sum, none, got max"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        ({"softcap": -1.0}, ValueError, r"softcap: expected None or a positive number, got -1.0"),
        ({"logits_dtype": torch.int8}, TypeError, r"logits_dtype: expected fp16, .* got torch.int8"),
        ({"target": torch.full((5,), 7)}, IndexError, r"target: expected classes in \[0, 7\), got 7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rejects(change, error, message):
    arguments = {"logits": torch.zeros(5, 7), "target": torch.zeros(5).long()}
    with pytest.raises(error, match=message):
        cross_entropy(**(arguments | change))


@pytest.mark.gpu
def test_never_waits_for_the_gpu():
    logits, target, _ = problem("cuda", torch.bfloat16, tokens=64, vocab=1001)

    def step():
        return torch.autograd.grad(cross_entropy(logits, target, **EVERYTHING._asdict()), logits)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
