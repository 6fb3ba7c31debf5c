"""Kernels are compiled elsewhere before they are launched, and by the launch where that cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphfuse.kernels._ahead import address
from graphfuse.kernels._triton import HAS_TRITON


def cold_step(*arguments):
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    environment.pop("TRITON_INTERPRET", None)
    worker = Path(__file__).with_name("cold.py")
    command = [sys.executable, worker, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    step = json.loads(run.stdout)
    assert sum(step["rewritten"].values()) >= 6
    return step


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("processes", [[], ["processes"]], ids=["threads", "processes"])
def test_launches_find_what_was_compiled_elsewhere(processes):
    step = cold_step("inductor", *processes)
    assert {*step["compiled"]} <= {
        "_scale_kernel"
    }  # the upstream gradient's: with Triton 3.6 it is compiled by its launch
    assert len(step["found"]) > 15


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("lost", ["jobs", "results"])
def test_launches_compile_what_nobody_else_did(lost):
    step = cold_step("aot_eager", "without", lost)
    assert step["found"] == []
    assert len(step["compiled"]) > 12


def test_fake_tensors_lie_where_real_ones_might():
    with FakeTensorMode():
        x, other = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(4, 8, dtype=torch.bfloat16)
        assert address(x) % 16 == 0
        assert address(x[:, 1:]) == address(x) + 2
        assert address(x[1]) == address(x) + 16
        assert address(other) not in range(address(x), address(x) + 64)
    real = torch.empty(4)
    assert address(real) == real.data_ptr()
