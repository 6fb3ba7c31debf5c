"""graphfuse bench model: small steps on the CPU, and what it says when it cannot."""

import json

import pytest
import torch
from typer.testing import CliRunner

from graphfuse.bench import model as module
from graphfuse.bench.model import Workload, build, inputs, workloads
from graphfuse.cli import app

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
}
CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """A single workload, too small to measure anything."""
    workload = Workload("tiny", "llama", 2, 16, TINY, dtype="float32")
    monkeypatch.setattr(module, "workloads", lambda: {"tiny": workload})
    return workload


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "model", *arguments])


def test_measures_side_by_side(tiny, tmp_path):
    path = tmp_path / "rows.json"
    result = run(
        "tiny", "--variants", "eager,graphfuse", "--masks", "none,padded", "--repeats", "1", "--json", str(path)
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [(row["variant"], row["mask"]) for row in rows] == [
        (variant, mask) for mask in ("none", "padded") for variant in ("eager", "graphfuse")
    ]
    assert rows[1]["rewritten"]["rms_norm"] == 5
    assert rows[1]["value"] == pytest.approx(rows[0]["value"], rel=1e-5)
    assert rows[3]["value"] == pytest.approx(rows[2]["value"], rel=1e-5)
    assert rows[3]["rewritten"]["causal_attention"] == 2
    assert all(row["step_ms"] > 0 for row in rows)


@pytest.mark.parametrize(("phase", "mask"), [("prefill", "none"), ("decode", "ones")])
def test_measures_inference(tiny, phase, mask, tmp_path):
    path = tmp_path / "rows.json"
    result = run(
        *("tiny", "--variants", "eager,graphfuse", "--phases", phase, "--masks", mask),
        *("--repeats", "2", "--json", str(path)),
    )
    assert result.exit_code == 0, result.output
    eager, ours = json.loads(path.read_text())["rows"]
    assert (ours["phase"], ours["mask"]) == (phase, mask)
    assert ours["rewritten"]["rms_norm"] == 5
    assert "linear_cross_entropy" not in ours["rewritten"]
    assert ours["value"] == pytest.approx(eager["value"], rel=1e-4)


def test_starts_every_variant_from_the_same_weights(tiny):
    first, second = build(tiny, CPU), build(tiny, CPU)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hides_a_quarter_of_every_second_sequence(tiny):
    given = inputs(Workload("x", "llama", 4, 8, mask="padded"), 96, CPU)
    assert given["attention_mask"].sum(1).tolist() == [8, 6, 8, 6]
    assert (given["labels"] == -100).sum() == 4


def test_goes_on_where_one_variant_cannot_run(tiny):
    result = run("tiny", "--variants", "liger,eager", "--repeats", "1")
    assert result.exit_code == 0
    assert "tiny, liger: ModuleNotFoundError" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "names: expected names among tiny, got nothing"),
        (["--variants", "nothing"], "variants: expected names among"),
        (["--masks", "nothing"], "masks: expected names among none, ones, padded, got nothing"),
        (["--phases", "nothing"], "phases: expected names among train, prefill, decode, got nothing"),
        (["--dtype", "nothing"], "dtype: expected names among"),
    ],
)
def test_says_what_it_expected(tiny, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("name", workloads())
def test_workloads_can_be_built(name):
    workload = workloads()[name]
    model = build(workload, torch.device("meta"))
    assert model.config.num_hidden_layers == workload.config["num_hidden_layers"]
    assert model.config.vocab_size == workload.config["vocab_size"]
    assert len({tuple(p.shape) for p in model.parameters()}) > 3


def test_lists_workloads():
    result = run("--list")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == len(workloads())
