"""Two processes agree with one: DDP, FSDP2, tensor parallel, a head sharded over the vocabulary.

All cases run in the same two processes, which torchrun starts once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

pytest.importorskip("transformers")

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

from tests.distributed.worker import CASES

WORKER = Path(__file__).with_name("worker.py")
MINUTES = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Results of both processes, and what they said."""
    folder = tmp_path_factory.mktemp("distributed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert len(results) == 2, done.stderr
    return results, done.stderr


@pytest.mark.timeout(60 * MINUTES)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_one_process(name, run):
    results, said = run
    for rank, result in enumerate(results):
        assert name in result, f"process {rank} did not get that far:\n{said[-2000:]}"
        assert result[name]["failure"] is None, f"process {rank}: {result[name]['failure']}"
