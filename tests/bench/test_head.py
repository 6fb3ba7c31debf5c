"""graphfuse bench head: what it compares, small and on the CPU; the timing needs a GPU."""

import pytest
import torch
from typer.testing import CliRunner

from graphfuse.bench import head
from graphfuse.bench.head import CASES, IGNORED, Case, Row, _error, losses, problem, products, step, table_of, truth
from graphfuse.bench.timing import Timing
from graphfuse.cli import app

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "case", [Case(40, 16, 33), Case(40, 16, 33, 0.5), Case(40, 16, 33, 0.0, "hidden"), Case(40, 16, 33, 0.0, "")]
)
def test_everybody_computes_the_same(case):
    inputs = problem(case, CPU)
    assert bool((inputs[2] == IGNORED).any()) == (case.ignored > 0)
    wanted = truth(case, inputs)
    assert len(wanted) == 1 + len(case.grads.split())
    for loss in losses().values():
        results = step(loss, case, inputs)
        assert all(_error(a, b) < 1e-2 for a, b in zip(results, wanted, strict=True))


def test_the_floor_is_the_products():
    with torch.profiler.profile() as profile:
        products(Case(40, 16, 33), CPU)()
    assert {event.key: event.count for event in profile.key_averages()}["aten::mm"] == 3


def test_ratios_are_to_the_products_beside(monkeypatch):
    """Whose clock becomes slower and slower."""
    times = iter((1000.0, 3000.0, 2000.0, 9000.0, 4000.0))

    def measure(fn, _):
        fn()
        return Timing(next(times), 1.0, 512.0)

    monkeypatch.setattr(head, "measure", measure)
    rows = []
    eager = losses()["eager"]
    assert head.measure_case(Case(40, 16, 33), {"a": eager, "b": eager}, CPU, rows.append) == []
    assert [(row.who, row.ratio) for row in rows] == [("products", 1.0), ("a", 2.0), ("b", 3.0)]
    assert rows[1].gib == 0.5


def test_names_its_cases():
    assert len({case.name for case in CASES}) == len(CASES)
    rows = [
        Row(CASES[0].name, "eager", 1.0, 2.0, 3.0),
        Row(CASES[3].name, "eager", 1.0, 2.0, 3.0, 1e-3, None, None, True),
    ]
    assert table_of(rows, "").row_count == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is no GPU")
def test_needs_a_gpu():
    result = CliRunner().invoke(app, ["bench", "head"])
    assert result.exit_code == 2
    assert "expected a CUDA GPU to measure, got none" in result.output
