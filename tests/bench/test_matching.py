"""graphfuse bench matching: the same proofs at every depth, and a table that adds up."""

import re

import pytest
from typer.testing import CliRunner

from graphfuse.bench.matching import STAGES, measure
from graphfuse.cli import app


@pytest.mark.parametrize("model_type", [None, "llama"])
def test_proves_as_much_at_every_depth(model_type):
    shallow, deep = (measure(layers, "eager", model_type) for layers in (2, 4))
    assert shallow.proofs == deep.proofs > 0
    assert deep.sites > shallow.sites > 0
    for cost in (shallow, deep):
        assert set(cost.stages) == set(STAGES)
        assert all(seconds > 0 for seconds in cost.stages.values())
        assert cost.ours + cost.inner < cost.total


def test_prints_a_line_for_each_depth(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    result = CliRunner().invoke(app, ["bench", "matching", "1", "2", "--inner", "eager"])
    assert result.exit_code == 0, result.output
    assert re.findall(r"^│\s+(\d+)", result.output, re.MULTILINE) == ["1", "2"]
    assert re.search(r"^2 times the layers: .* proofs, then \d+$", result.output, re.MULTILINE)
