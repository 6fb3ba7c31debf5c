"""Tables and charts of bench model: what disagrees cannot be overlooked."""

from io import StringIO

import pytest
from rich.console import Console

from graphfuse.bench.rows import row_of
from graphfuse.bench.show import chart, groups, remarks, table, where
from graphfuse.bench.workloads import Workload

STEP = Workload("llama", "llama", 2, 16)
ROWS = [
    row_of(STEP, "eager", error="OutOfMemoryError: CUDA out of memory"),
    row_of(STEP, "inductor", step_ms=200.0, peak_gib=2.0, where_ms={"GEMM": 150.0, "other": 4.0}),
    row_of(
        STEP,
        "graphfuse",
        step_ms=150.0,
        peak_gib=1.0,
        where_ms={"GEMM": 140.0, "norm": 5.0},
        against="inductor",
        value_difference=0.1,
        gradient_difference=0.2,
        disagrees="loss: expected less",
        rewritten={"rms_norm": 3, "causal_attention": 2},
        sites={"causal_attention": {"mask looked at on every call": 2}},
        calls={"causal_attention": {"causal": 8}, "attention": {"causal": 8}},
        refused=["rope: no"],
    ),
]


def text_of(*found):
    console = Console(file=StringIO(), width=160)
    for line in found:
        console.print(line)
    return console.file.getvalue()


def test_a_table_has_ratios_to_inductor():
    text = text_of(table(ROWS))
    assert "failed" in text
    assert "0.750" in text


def test_says_in_words_what_is_wrong_and_what_was_done():
    lines = text_of(*remarks(ROWS)).splitlines()
    assert lines == [
        "eager: OutOfMemoryError: CUDA out of memory",
        "graphfuse DISAGREES with inductor: loss: expected less",
        "graphfuse rewrote 3 rms_norm, 2 causal_attention",
        "graphfuse: causal_attention, 2 sites: mask looked at on every call",
        "graphfuse: calls of attention: causal 8",
        "graphfuse left rope: no",
    ]


def test_says_where_the_time_goes():
    text = text_of(where(ROWS, "kernel"))
    assert "where the time goes, ms by kernel" in text
    assert [line.split()[1] for line in text.splitlines() if "│" in line] == ["GEMM", "norm", "other", "all"]
    assert "154.0 │     145.0" in text
    assert where(ROWS[:1], "kernel") is None


def test_says_how_fast_the_clock_ran():
    known = row_of(STEP, "inductor", step_ms=2.0, where_ms={"GEMM": 1.0}, clock_mhz=1712.4, watts=698.6)
    rows = [line.split("│")[1:] for line in text_of(where([known, ROWS[2]], "kernel")).splitlines()]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:-1]] for row in rows if row}
    assert cells["clock in MHz"] == ["1712", ""]
    assert cells["power in W"] == ["699", ""]


def test_a_chart_flags_what_disagrees():
    pytest.importorskip("matplotlib")
    rows = [*ROWS, row_of(Workload("llama", "llama", 2, 16, mask="ones"), "eager", step_ms=3.0, peak_gib=1.0)]
    assert len(groups(rows)) == 2
    for axes in chart(rows, "here").axes:
        texts = [text.get_text() for text in axes.texts]
        assert texts[0] == "failed"
        assert [text for text in texts if "DISAGREES" in text] == [texts[2]]
        assert {bar.get_hatch() for bar in axes.patches} == {None, "//"}
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "llama\ntrain, mask: none",
            "llama\ntrain, mask: ones",
        ]
