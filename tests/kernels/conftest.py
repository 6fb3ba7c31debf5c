"""Fixtures of every op: both ways to run it, and rows that count as wide."""

import pytest
import torch

from graphfuse.kernels import _op, _repeat, _rms_norm_kernel, rms_norm
from graphfuse.kernels._triton import HAS_TRITON


@pytest.fixture(autouse=True)
def nothing_recorded():
    """Tests change what ops do."""
    _repeat.forget()
    yield
    _repeat.forget()


@pytest.fixture
def counts_as_gpu(monkeypatch):
    """Tensors on the CPU count as on a GPU for calls that are made again, and the second call of a kind is recorded."""
    monkeypatch.setattr(_repeat, "_index", lambda tensor: 0)
    monkeypatch.setattr(_repeat, "_may_repeat", lambda index: True)
    monkeypatch.setattr(_repeat, "RECORDED", 2)
    monkeypatch.setattr(_repeat, "empty_strided", lambda *like: torch.empty_strided(like[0], like[1], dtype=like[2]))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)


@pytest.fixture
def recordings(poisoned_memory):
    """How many calls of ops are recorded; where memory is to be filled, none is."""
    torch.use_deterministic_algorithms(False)
    return lambda: sum(1 for known in _repeat._known for again in known.values() if callable(again))


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no triton"))])
def path(request, monkeypatch, device):
    """Ops in torch operations, and as kernels."""
    if request.param == "triton" and device == "cpu" and torch.bfloat16 in request.node.callspec.params.values():
        pytest.skip("needs a CUDA GPU")  # the interpreter multiplies bf16 as bit patterns
    monkeypatch.setattr(_op, "launches", lambda *_: request.param == "triton")
    return request.param


@pytest.fixture(params=[False, True], ids=["", "in blocks"])
def in_blocks(request, monkeypatch):
    """Whether rows of more than 64 features count as wide, and are read in blocks of 32."""
    if request.param:
        monkeypatch.setattr(_rms_norm_kernel, "MAX_BLOCK", 64)
        monkeypatch.setattr(_rms_norm_kernel, "WIDE_BLOCK", 32)
        # Neither out of their caches nor into them.
        monkeypatch.setattr(rms_norm, "plan_forward", _rms_norm_kernel.plan_forward.__wrapped__)
        monkeypatch.setattr(rms_norm, "plan_backward", _rms_norm_kernel.plan_backward.__wrapped__)
