"""One line by default, more through TORCH_LOGS, GRAPHFUSE_LOG and logging, and a tlparse artifact."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch, graphfuse
from torch import nn

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        torch._dynamo.graph_break()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

SETUP
graphfuse.optimize(Norm(), inner="eager")(torch.randn(3, 8))
"""
ONE_GRAPH = "1 site rewritten, 0 refused in 1 graph; covered: rms_norm 1"


def stderr(setup="", **environment):
    known = {k: v for k, v in os.environ.items() if k not in ("TORCH_LOGS", "TORCH_TRACE", "GRAPHFUSE_LOG")}
    command = [sys.executable, "-c", SCRIPT.replace("SETUP", setup)]
    done = subprocess.run(command, env=known | environment, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    return done.stderr


def test_says_one_line_for_a_model():
    said = stderr().splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"graphfuse: {ONE_GRAPH}")
    assert "Norm" in said[0]


def test_says_a_line_for_each_graph_through_torch_logs():
    said = stderr(TORCH_LOGS="graphfuse").splitlines()
    assert len(said) == 2
    assert all(ONE_GRAPH in line for line in said)
    assert any("rms_norm rewritten at" in line for line in stderr(TORCH_LOGS="+graphfuse").splitlines())


@pytest.mark.parametrize(("level", "lines"), [("debug", 4), ("info", 2), ("warning", 0), ("off", 0)])
def test_follows_its_own_variable(level, lines):
    assert len(stderr(GRAPHFUSE_LOG=level).splitlines()) == lines


def test_says_which_levels_there_are():
    assert "GRAPHFUSE_LOG: expected one of debug, info, warning, error, off, got 'loud'" in stderr(GRAPHFUSE_LOG="loud")


def test_goes_where_logging_is_set_up_to_go():
    said = stderr("import logging; logging.basicConfig(level=logging.INFO, format='%(name)s|%(message)s')")
    ours = [line for line in said.splitlines() if line.startswith("graphfuse")]
    assert len(ours) == 2
    assert all(line.startswith("graphfuse|[") for line in ours)
    assert stderr("import logging; logging.basicConfig()") == ""


def test_leaves_an_artifact_for_tlparse(tmp_path):
    stderr(TORCH_TRACE=str(tmp_path))
    (trace,) = tmp_path.iterdir()
    lines = trace.read_text().splitlines()
    (first, _) = [k for k, line in enumerate(lines) if '"graphfuse_report"' in line]
    payload = []
    for line in lines[first + 1 :]:
        if not line.startswith("\t"):
            break
        payload.append(line)
    assert json.loads("\n".join(payload))["counts"] == {"rms_norm": 1}
