"""Every kernel, at the sizes of models and in bfloat16, compiles for an H200: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphfuse.kernels._triton import HAS_TRITON

FEW_BYTES = 8  # of a thread: two registers, which cost nothing that could be measured


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_compiles_for_hopper(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    worker = Path(__file__).with_name("hopper.py")
    command = [sys.executable, worker]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    *rows, tokens = [json.loads(line) for line in run.stdout.splitlines()]
    assert tokens["new for each number of tokens"] == [3, 0, 0]
    assert len(rows) >= 15
    for row in rows:
        assert len(row["launched"]) >= 2, row["case"]  # forward and backward
    compiled = [kernel for row in rows for kernel in row["compiled"]]
    assert {kernel["kernel"] for kernel in compiled} >= {
        "_glu_kernel",
        "_glu_backward_kernel",
        "rms_norm_kernel",
        "_softmax_grad_parts_kernel",
    }
    assert [kernel for kernel in compiled if kernel["spilled"] > FEW_BYTES] == []
    assert max(kernel["shared"] for kernel in compiled) <= 232448
