"""Queries and keys in one launch, against the ops for one of them: numbers, strides, sizes, what cannot be together.

Without a GPU the kernels run in Triton's interpreter on CPU tensors: `path` says what computes.
"""

from unittest import mock

import pytest
import torch

import graphfuse.backend  # noqa: F401 - registers the ops
from graphfuse.kernels import _norm_rope_launch, _op, _pairs, _rope_launch
from graphfuse.kernels._triton import HAS_TRITON

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
BATCH, TOKENS = 2, 5
HALF = ("half", "half", "half", False, 0)
NORM = (1e-6, 1.0, 0.0, "inside")
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
HEADS = pytest.mark.parametrize("heads", [(8, 2), (3, 3), (1, 7), (40, 5)], ids=str)


@pytest.fixture
def few(monkeypatch):
    """Several programs for each tensor, and several tiles for each program."""
    plans = (_rope_launch.plan_launch, _norm_rope_launch.plan_launch)
    monkeypatch.setattr(_rope_launch, "TILE", 256)
    monkeypatch.setattr(_norm_rope_launch, "TILE", 256)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


def of_heads(heads, device, features=16, dtype=FP32, tokens=TOKENS):
    """(B, H, S, D) with the heads inside the tokens."""
    x = torch.randn(BATCH, tokens, heads * features, device=device).to(dtype)
    return x.view(BATCH, tokens, heads, features).transpose(1, 2)


def tables(device, features=16, dtype=FP32, tokens=TOKENS):
    return (*torch.randn(2, BATCH, 1, tokens, features, device=device).to(dtype),)


def check(name, *args):
    """What comes out is what the op for one tensor gives for each; the last bits of sums over tokens may differ."""
    found = getattr(torch.ops.graphfuse, f"{name}_pair")(*args)
    expected = []
    for each in _pairs.apart(name, args):
        result = getattr(torch.ops.graphfuse, name)(*each)
        expected += result if isinstance(result, tuple) else [result]
    assert [each.stride() for each in found] == [each.stride() for each in expected]
    torch.testing.assert_close(list(found), expected)


@HEADS
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("convention", [HALF, ("interleaved", "half", "shared", True, 3)], ids=["plain", "partial"])
def test_rope(path, device, few, convention, dtype, heads):
    width = 16 if convention is HALF else 5
    given = [of_heads(n, device, dtype=dtype) for n in heads]
    check("rope", *given, *tables(device, width), *convention, dtype)
    strides = [each.contiguous().stride() for each in given]
    check("rope_backward", given[0], strides[0], given[1], strides[1], *tables(device, width), *convention, FP32)


@HEADS
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("across", [-1, 1], ids=["each head", "across heads"])
@pytest.mark.parametrize("convention", [HALF, ("half", "interleaved", "half", False, 6)], ids=["plain", "partial"])
def test_norm_rope(path, device, few, convention, across, dtype, heads):
    width = 16 if convention is HALF else 10
    own = []
    for n in heads:
        weight = 1 + torch.randn(16 if across < 0 else 16 * n, device=device) / 4
        own.append((of_heads(n, device, dtype=dtype), weight.to(dtype)))
    rotation = (*tables(device, width), *NORM)
    check("norm_rope", *own[0], *own[1], *rotation, FP32, dtype, *convention, across, dtype)
    grads = [of_heads(n, device, dtype=dtype).contiguous() for n in heads]
    check("norm_rope_backward", grads[0], *own[0], grads[1], *own[1], *rotation, *convention, across, True)


@pytest.mark.parametrize("weights", [(False, False), (True, False)], ids=["none", "one"])
def test_needs_no_weight(path, device, weights):
    given = [torch.rand(16, device=device) if has else None for has in weights]
    own = [(of_heads(4, device), given[0]), (of_heads(2, device), given[1])]
    rotation = (*tables(device), *NORM)
    check("norm_rope", *own[0], *own[1], *rotation, FP32, FP32, *HALF, -1, FP32)
    for need_weight in (True, False):
        grads = [torch.randn_like(x) for x, _ in own]
        check("norm_rope_backward", grads[0], *own[0], grads[1], *own[1], *rotation, *HALF, -1, need_weight)


def test_walks_over_each_in_its_own_way(path, device):
    """Queries are a slice of a projection, keys have their heads outside."""
    q = torch.randn(BATCH, TOKENS, 4, 32, device=device)[..., 16:].transpose(1, 2)
    k = of_heads(2, device).contiguous()
    check("rope", q, k, *tables(device), *HALF, FP32)
    weight = torch.rand(16, device=device)
    check("norm_rope", q, weight, k, weight, *tables(device), *NORM, FP32, FP32, *HALF, -1, FP32)


@pytest.mark.parametrize("other", [(2, 24), (0, 16)], ids=["wider", "none"])
def test_goes_one_by_one_where_sizes_differ(path, device, other):
    heads, features = other
    given = (of_heads(4, device), torch.randn(BATCH, heads, TOKENS, features, device=device))
    check("rope", *given, *tables(device), *HALF, FP32)
    strides = [each.stride() for each in given]
    check("rope_backward", given[0], strides[0], given[1], strides[1], *tables(device), *HALF, FP32)


@NEEDS_TRITON
def test_is_one_launch(path, device, monkeypatch):
    if path != "triton":
        pytest.skip("counts launches")
    launched = [mock.Mock(wraps=module.launch) for module in (_rope_launch, _norm_rope_launch)]
    monkeypatch.setattr(_rope_launch, "launch", launched[0])
    monkeypatch.setattr(_norm_rope_launch, "launch", launched[1])
    q, k, weight = of_heads(4, device), of_heads(2, device), torch.rand(16, device=device)
    torch.ops.graphfuse.rope_pair(q, k, *tables(device), *HALF, FP32)
    torch.ops.graphfuse.norm_rope_pair(q, weight, k, weight, *tables(device), *NORM, FP32, FP32, *HALF, -1, FP32)
    assert [launch.call_count for launch in launched] == [1, 1]


def test_opcheck(device):
    q, k, weight = of_heads(4, device), of_heads(2, device), torch.rand(16, device=device)
    rotation = (*tables(device), *NORM)
    arguments = {
        "rope": (q, k, *tables(device), *HALF, FP32),
        "rope_backward": (q, q.stride(), k, k.stride(), *tables(device), *HALF, FP32),
        "norm_rope": (q, weight, k, weight, *rotation, FP32, FP32, *HALF, -1, FP32),
        "norm_rope_backward": (q, q, weight, k, k, weight, *rotation, *HALF, -1, True),
    }
    for name in _pairs.OWN:
        torch.library.opcheck(getattr(torch.ops.graphfuse, f"{name}_pair").default, arguments[name])
        assert hasattr(_op.direct, f"{name}_pair")
