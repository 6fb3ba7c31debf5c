"""Every op whose calls are made again: the calls before, the recorded one and those after compute the same.

Here kernels run in Triton's interpreter, on tensors at the addresses that a launch is handed.
"""

import ctypes
import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from graphfuse import ops
from graphfuse.kernels import _op, _pairs, _triton
from graphfuse.kernels._repeat import current
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.kernels.grouped_attention import grouped_attention

pytestmark = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter, which runs where there is no GPU"
)

CALLS = 5
CTYPES = {torch.float32: ctypes.c_float, torch.int64: ctypes.c_int64, torch.bool: ctypes.c_bool}


def at(address, like):
    """The tensor of this kind at an address."""
    extent = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
    memory = (CTYPES[like.dtype] * extent).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


def launch(kernel, grid, *args, **options):
    """What `_triton.launch` does on a GPU."""
    places = [place for place, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    with _disable_current_modes():
        kernel[grid](*args, **options)
        likes = {
            place: torch.empty_strided(args[place].shape, args[place].stride(), dtype=args[place].dtype, device="meta")
            for place in places
        }
    if current.recorder is None:
        return

    def run(x, y, z, stream, *values):
        given = list(args)
        for place, address in zip(places, values, strict=True):
            given[place] = at(address, likes[place])
        kernel[x, y, z](*given, **options)

    tensors = [args[place] for place in places]
    current.recorder.launched(run, (*grid, 1, 1)[:3], [tensor.data_ptr() for tensor in tensors], tensors)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch, counts_as_gpu):
    theirs = _triton.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("graphfuse.kernels.") and getattr(module, "launch", None) is theirs:
            monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(_op, "launches", lambda *operands: _op.compute_dtype(*operands) == torch.float32)


def heads(count=2):
    return torch.randn(2, 3, count, 8).transpose(1, 2)


def table():
    return torch.randn(1, 1, 3, 8)


def rows(width=16):
    return torch.randn(2, 3, width)


def weight(width=16):
    return torch.randn(width)


def halves():
    return rows(32).chunk(2, -1)


def interleaved():
    packed = rows(32)
    return packed[..., 0::2], packed[..., 1::2]


# What is called, what it is given, which of that has a gradient, and how many calls are recorded, forward and backward.
CASES = {
    "rms_norm": (ops.rms_norm, lambda: (rows(), weight()), 2, 2),
    "rms_norm, heads": (ops.rms_norm, lambda: (heads(), weight(8)), 2, 2),
    "rms_norm, no weight": (ops.rms_norm, lambda: (rows(),), 1, 2),
    "add_rms_norm": (ops.add_rms_norm, lambda: (rows(), rows(), weight()), 3, 2),
    "rms_norm_add": (ops.rms_norm_add, lambda: (rows(), rows(), weight()), 3, 2),
    "layer_norm": (ops.layer_norm, lambda: (rows(), weight(), weight()), 3, 2),
    "rope": (ops.rope, lambda: (heads(), table(), table()), 1, 2),
    "norm_rope": (ops.norm_rope, lambda: (heads(), weight(8), table(), table()), 2, 2),
    "glu": (ops.glu, lambda: (rows(), rows()), 2, 2),
    "glu, halves": (ops.glu, halves, 2, 2),
    "glu, interleaved": (ops.glu, interleaved, 2, 2),
    "cross_entropy": (ops.cross_entropy, lambda: (torch.randn(6, 40), torch.randint(40, (6,))), 1, 2),
}


def wide(x):
    return x.detach().double() if x.is_floating_point() else x


def check(op, given, count):
    """Result and gradients of the first tensors, against float64, in which no kernel runs."""
    given = [x.detach().requires_grad_(k < count) for k, x in enumerate(given)]
    twins = [wide(x).requires_grad_(k < count) for k, x in enumerate(given)]
    results, exact = (r if isinstance(r, tuple) else (r,) for r in (op(*given), op(*twins)))
    upstream = [torch.randn_like(result) for result in results]
    grads = torch.autograd.grad(results, given[:count], upstream, retain_graph=True)
    right = torch.autograd.grad(exact, twins[:count], [one.double() for one in upstream])
    for found, wanted in zip((*results, *grads), (*exact, *right), strict=True):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-4, atol=1e-4)
    for result in results:
        assert not result._is_view()
        if result.dim():
            result.mul_(2)  # as the code behind it may


@pytest.mark.parametrize("case", CASES)
def test_repeats(case, recordings):
    op, inputs, count, recorded = CASES[case]
    for _ in range(CALLS):
        check(op, inputs(), count)
    assert recordings() == recorded


def test_halves_that_lie_apart_are_no_pair(recordings):
    """Of the same shapes, strides and alignment as the interleaved halves of one tensor."""
    for _ in range(CALLS):
        check(ops.glu, interleaved(), 2)
    for _ in range(CALLS):
        (gate, _), (_, up) = interleaved(), interleaved()
        check(ops.glu, (gate, up), 2)
    assert recordings() == 4


@pytest.mark.parametrize("others", [4, 2])
def test_pairs(others, recordings):
    """Queries and keys in one launch."""
    rotation = ("half", "half", "half", False, 0)
    norm = (1e-6, 1.0, 0.0, "inside")
    dtypes = (torch.float32, torch.float32)
    pairs = torch.ops.graphfuse
    for _ in range(CALLS):
        q, k, scale, other_scale, cos, sin = heads(4), heads(others), weight(8), weight(8), table(), table()
        rotated = pairs.rope_pair(q, k, cos, sin, *rotation, torch.float32)
        both = (q, scale, k, other_scale, cos, sin, *norm, *dtypes, *rotation, -1, torch.float32)
        normed = pairs.norm_rope_pair(*both)
        back = pairs.rope_backward_pair(q, q.stride(), k, k.stride(), cos, sin, *rotation, torch.float32)
        grads = pairs.norm_rope_backward_pair(
            q, heads(4), scale, k, heads(others), other_scale, cos, sin, *norm, *rotation, -1, True
        )
        exact = [ops.rope(*(x.double() for x in (one, cos, sin))) for one in (q, k)]
        exact_normed = [
            ops.norm_rope(*(x.double() for x in (one, w, cos, sin))) for one, w in ((q, scale), (k, other_scale))
        ]
        for found, wanted in zip((*rotated, *normed), (*exact, *exact_normed), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
        assert [tuple(x.shape) for x in back] == [tuple(q.shape), tuple(k.shape)]
        assert len(grads) == 4
    assert recordings() >= 4
    assert _pairs.SCHEMAS.keys() == {"rope", "rope_backward", "norm_rope", "norm_rope_backward"}


def test_writes_over_gate_and_up(recordings):
    options = ("silu", 1.0, math.inf, math.inf, 0.0)
    for _ in range(CALLS):
        grad, gate, up = rows(), rows(), rows()
        gate_grad, up_grad = torch.ops.graphfuse.glu_backward(*map(wide, (grad, gate, up)), *options)
        product = ops.glu(wide(gate), wide(up))
        found = torch.ops.graphfuse.glu_backward_(grad, None, gate, up, *options, True)
        for ours, wanted in zip((found, gate, up), (product, gate_grad, up_grad), strict=True):
            torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4)
    assert recordings() == 1


def test_scales_in_place(recordings):
    for _ in range(CALLS):
        x, scale = rows(), torch.tensor(3.0)
        wanted = x * scale
        torch.ops.graphfuse.scale_(x, scale)
        torch.testing.assert_close(x, wanted)
    assert recordings() == 1


@pytest.mark.parametrize("keys", [40, 600])
def test_splits_keys(keys, recordings):
    for _ in range(CALLS):
        q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16)
        seen = torch.rand(1, 1, 1, keys) < 0.5
        found = grouped_attention(q, k, v, seen, scale=0.3, kernel="split")
        exact = grouped_attention(q.double(), k.double(), v.double(), seen, scale=0.3, kernel="split")
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    assert recordings() == 1


@pytest.mark.parametrize("wants_losses", [True, False])
def test_a_loss_of_logsumexps_alone(recordings, wants_losses):
    """Backward is then given no gradient of the losses, which are its first argument."""
    for _ in range(CALLS):
        logits = torch.randn(6, 40, requires_grad=True)
        twin = logits.detach().clone().requires_grad_()
        target = torch.randint(40, (6,))
        options = (1.0, 0.0, wants_losses, False, True)  # scale, no soft cap, and which numbers
        nll, _, lse, *_ = torch.ops.graphfuse.token_losses(logits, target, None, None, *options)
        if wants_losses:
            torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(twin, target, reduction="none"))
        torch.testing.assert_close(lse, twin.logsumexp(-1))
        lse.square().sum().backward()
        twin.logsumexp(-1).square().sum().backward()
        torch.testing.assert_close(logits.grad, twin.grad)
    assert recordings() == 2


def test_a_loss_of_everything(recordings):
    for _ in range(CALLS):
        logits = torch.randn(6, 40, requires_grad=True)
        twin = logits.detach().clone().requires_grad_()
        target = torch.randint(40, (6,))
        loss = ops.cross_entropy(logits, target, reduction="none", z_loss=1e-2)
        exact = torch.nn.functional.cross_entropy(twin, target, reduction="none") + 1e-2 * twin.logsumexp(-1).square()
        torch.testing.assert_close(loss, exact)
        loss.sum().backward()
        exact.sum().backward()
        torch.testing.assert_close(logits.grad, twin.grad)
