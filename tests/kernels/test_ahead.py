"""Kernels are compiled in other processes before they are launched, and by the launch where that cannot be."""

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


def cold_steps(*arguments, processes=2):
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(processes)}
    environment.pop("TRITON_INTERPRET", None)
    worker = Path(__file__).with_name("cold.py")
    command = [sys.executable, worker, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    steps = [json.loads(line) for line in run.stdout.splitlines()]
    assert all(sum(step["rewritten"].values()) >= 6 for step in steps)
    return steps


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_launches_find_what_other_processes_compiled():
    first, second = cold_steps("inductor", "aot_eager")
    assert first["compiled"] == []
    assert len(first["found"]) > 15
    # In a cache that the processes did not start with. Only the proofs' kernels are compiled ahead.
    assert len(second["found"]) > 8
    assert len(second["compiled"]) < len(second["found"])


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    ("processes", "arguments"),
    [(1, ["aot_eager"]), (2, ["aot_eager", "without", "jobs"]), (2, ["aot_eager", "without", "results"])],
)
def test_launches_compile_what_nobody_else_did(processes, arguments):
    (step,) = cold_steps(*arguments, processes=processes)
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
