"""`graphfuse bench kernels` without a GPU: it says so; its table, chart and arithmetic are those of made-up figures."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from graphfuse.bench import cases
from graphfuse.bench import kernels as module
from graphfuse.bench.cases import Case, Problem
from graphfuse.bench.timing import Timing
from graphfuse.cli import app


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "kernels", "--quick"])
    assert result.exit_code == 2
    assert result.output.splitlines() == [module.NO_GPU]


@pytest.fixture
def one_case(monkeypatch):
    """Two functions, one of which fails, of a case that moves 1000 bytes forward and 3000 backward."""
    monkeypatch.setattr(module, "measure", lambda fn: (fn(), Timing(gpu_us=2.0, host_us=5.0, peak_mib=1.0))[1])
    monkeypatch.setattr(torch, "compile", lambda fn: fn)

    def fails(x):
        raise ValueError("expected another size\nand more")

    x = torch.randn(5, requires_grad=True)
    problem = Problem((x,), {"eager": lambda x: x * 2, "graphfuse": lambda x: x + x, "liger": fails}, 1000, 3000)
    return Case("double", "5", lambda: problem)


@pytest.fixture
def rows(one_case):
    steps = []
    found, failed = module.measure_all([one_case], 1e9, steps.append)
    assert failed == ["double 5: liger: ValueError: expected another size"]
    assert steps == [f"double 5: {who}" for who in ("graphfuse", "eager", "inductor", "liger")]
    return found


def test_compares_with_the_floor(rows):
    assert [row.who for row in rows] == ["graphfuse", "eager", "inductor"]
    # 1000 bytes take a microsecond at 1 GB/s.
    assert (rows[0].forward_ratio, rows[0].both_ratio) == pytest.approx((2.0, 0.5))
    assert (rows[0].forward_gbps, rows[0].both_gbps) == pytest.approx((0.5, 2.0))


def test_shows_and_draws(rows, tmp_path):
    pytest.importorskip("matplotlib")
    table = module.table_of(rows, "made up")
    assert (table.row_count, [*table.columns[2].cells]) == (3, ["graphfuse", "eager", "inductor"])
    module.draw(rows, "made up", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 0


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_writes_figures_and_chart(one_case, has_matplotlib, monkeypatch, tmp_path):
    if has_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made_up = {"gpu": "made up", "torch": torch.__version__, "triton": "3.6"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(module, "machine", lambda: made_up)
    monkeypatch.setattr(cases, "CASES", (one_case, Case("other", "5", lambda: pytest.fail("not asked for"))))
    result = CliRunner().invoke(app, ["bench", "kernels", "--only", "double", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert (found["machine"], found["copy_gbps"]) == (made_up, 1.0)
    assert [row["who"] for row in found["rows"]] == ["graphfuse", "eager", "inductor"]
    assert found["failed"] == ["double 5: liger: ValueError: expected another size"]
    assert found["failed"][0] in result.output
    assert (tmp_path / "kernels.png").exists() == has_matplotlib
    assert ("got no module" in result.output) != has_matplotlib
