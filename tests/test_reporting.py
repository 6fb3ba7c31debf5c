"""The report: counts, grouping, and what a reader sees."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from rich.console import Console

from graphfuse.reporting import Report, Site, collapse

NORM = Site(
    pattern="rms_norm",
    status="rewritten",
    variant="round before weight, bfloat16",
    params={"eps": 1e-6},
    module="model.norm",
    source="/site-packages/transformers/models/llama/modeling_llama.py:62",
    covers={"rms_norm": 1},
    graph="0/0",
)
HEAD = Site(
    pattern="linear_cross_entropy",
    status="refused",
    source="/site-packages/transformers/loss/loss_utils.py:38",
    reason="logits: expected no use outside the loss, got a graph output",
    covers={"linear_cross_entropy": 1},
    graph="0/0",
)


def layers(count, graph="0/0"):
    return [replace(NORM, module=f"model.layers.{i}.input_layernorm", graph=graph) for i in range(count)]


def test_counts_what_rewritten_sites_cover():
    fused = replace(NORM, pattern="qk_norm_rope", covers={"rms_norm": 2, "rope": 2})
    report = Report([*layers(3), fused, HEAD])
    assert report.counts == {"rms_norm": 5, "rope": 2}
    assert report.refused == [HEAD]
    assert len(report.rewritten) == 4


def test_counts_a_recompiled_frame_once():
    report = Report([*layers(2, "0/0"), *layers(2, "1/0"), *layers(3, "0/1")])
    assert report.counts == {"rms_norm": 5}
    assert {site.graph for site in report.current} == {"0/1", "1/0"}
    assert len(report.sites) == 7


def test_leaves_the_source_out_of_a_narrow_table(monkeypatch):
    report = Report([*layers(2), HEAD])
    monkeypatch.setenv("COLUMNS", "80")
    assert "modeling_llama.py" not in str(report)
    monkeypatch.setenv("COLUMNS", "120")
    assert "modeling_llama.py:62" in str(report)


def test_shows_equal_layers_on_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = str(Report([*layers(32), NORM, HEAD]))
    lines = [line for line in text.splitlines() if line.startswith(" rms_norm")]
    assert len(lines) == 2
    assert "model.layers.{0-31}.input_layernorm" in lines[0]
    assert " 32 " in lines[0]
    assert "modeling_llama.py:62" in lines[0]
    assert "site-packages" not in text


@pytest.mark.parametrize("change", [{"reason": "other"}, {"variant": "fp32"}, {"source": "b.py:1"}], ids=str)
def test_keeps_different_sites_apart(change):
    text = str(Report([HEAD, replace(HEAD, **change)]))
    assert sum("linear_cross_entropy" in line for line in text.splitlines()) == 2


def test_states_reason_and_totals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = str(Report([*layers(2), HEAD]))
    assert "logits: expected no use outside the loss, got a graph output  loss_utils.py:38" in text
    assert text.splitlines()[-1] == "graphfuse: 2 sites rewritten, 1 refused in 1 graph; covered: rms_norm 2"


def test_shows_what_other_patterns_refused(monkeypatch):
    """One site, whose hint is for the pattern that was refused and not for the one that took it."""
    monkeypatch.setenv("COLUMNS", "200")
    others = {HEAD.pattern: HEAD.reason}
    taken = replace(HEAD, pattern="cross_entropy", status="rewritten", variant="mean", reason="", others=others)
    report = Report([replace(taken, hint="do not return them")])
    assert (len(report.rewritten), len(report.refused)) == (1, 0)
    text = str(report)
    assert f"not linear_cross_entropy: {HEAD.reason}" in text
    assert "to match, linear_cross_entropy at loss_utils.py:38: do not return them" in text
    assert f"- not linear_cross_entropy: {HEAD.reason}" in report.to_markdown().replace("\\", "")
    refused = Report([replace(HEAD, others={"cross_entropy": "logits: expected more"}, hint="return others")])
    assert "not cross_entropy: logits: expected more" in str(refused)
    assert "to match, linear_cross_entropy at loss_utils.py:38: return others" in str(refused)


def test_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(len(line) for line in str(Report([*layers(2), HEAD])).splitlines()) <= 60


def test_prints_brackets_as_they_are():
    assert "[4, 8]" in str(Report([replace(HEAD, variant="[4, 8]", reason="x: expected [4, 8]")]))


def test_says_when_nothing_was_found():
    assert str(Report(notes=["graph 0/0: passed on as it was"])) == (
        "graphfuse: no site found\nnote: graph 0/0: passed on as it was"
    )


def test_shows_the_same_in_rich_and_as_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    report = Report([*layers(2), HEAD])
    console = Console(width=120, color_system=None)
    with console.capture() as text:
        console.print(report)
    assert [line.rstrip() for line in text.get().splitlines()] == str(report).splitlines()


def test_round_trips_through_json(tmp_path):
    report = Report([*layers(2), HEAD], ["a note"])
    report.to_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == report.to_dict()
    assert data["schema_version"] == 1
    assert data["counts"] == {"rms_norm": 2}
    assert [Site(**site) for site in data["sites"]] == report.sites


def test_freezes_and_hashes_sites():
    assert len({NORM, replace(NORM), HEAD}) == 2
    with pytest.raises(FrozenInstanceError):
        NORM.module = "other"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["model.norm"], "model.norm"),
        (["l.0.q", "l.1.q", "l.2.q"], "l.{0-2}.q"),
        (["l.5.q"], "l.5.q"),
        (["l.10.q", "l.9.q"], "l.{9-10}.q"),
        (["l.0.q", "l.2.q", "l.3.q"], "l.{0,2-3}.q"),
        ([f"l.{i}" for i in range(0, 40, 6)], "l.{0,6,12,…,36}"),
        (["l.0.experts.3.up", "l.1.experts.4.up"], "l.{0-1}.experts.{3-4}.up"),
        ([""], ""),
    ],
    ids=str,
)
def test_collapses_layer_numbers(paths, expected):
    assert collapse(paths) == expected
