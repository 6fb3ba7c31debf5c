"""graphfuse bench model: small steps on the CPU, and what it says when it cannot."""

import json

import pytest
from typer.testing import CliRunner

from graphfuse.bench import model as module
from graphfuse.bench import workloads as known
from graphfuse.bench.workloads import Workload, workloads
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
SIZES = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
QUICK = ("--device", "cpu", "--inner", "eager", "--repeats", "1", "--one-process")

# Compiled, these compute something else.
LIARS = """
import os
import torch
from torch import nn

class Liar(nn.Module):
    def __init__(self, about):
        super().__init__()
        self.proj, self.about = nn.Linear(8, 8), about
    def forward(self, x):
        y = self.proj(x)
        if torch.compiler.is_compiling() and self.about == "loss":
            y = y * 1.1
        if torch.compiler.is_compiling() and self.about == "gradient":
            y = y.detach() * 0.5 + y * 0.5
        return y

def given(about):
    return Liar(about), {"x": torch.linspace(-1, 1, 32).view(4, 8)}

def honest(): return given("")
def loss(): return given("loss")
def gradient(): return given("gradient")
def dies(): os._exit(3)
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where results and factories are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "liars.py").write_text(LIARS)
    return tmp_path


@pytest.fixture
def tiny(monkeypatch):
    """A single workload, too small to measure anything."""
    workload = Workload("tiny", "llama", 2, 16, TINY, dtype="float32")
    for place in (module, known):
        monkeypatch.setattr(place, "workloads", lambda: {"tiny": workload})


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "model", *arguments])


def rows(path="build/bench/model.json"):
    with open(path) as file:
        return json.load(file)["rows"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("mask", "way", "told"),
    [
        ("none", "", "causal_attention, 2 sites: mask of 16 positions dropped"),
        ("ones", "causal", "calls of causal_attention: causal"),
        ("padded", "masked", "calls of causal_attention: masked"),
    ],
)
def test_measures_side_by_side(mask, way, told, tmp_path):
    path = tmp_path / "deep" / "rows.json"
    result = run("tiny", *QUICK, "--variants", "eager,graphfuse", "--masks", mask, "--json", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == (tmp_path / "build" / "bench" / "model.json").read_bytes()
    for row in rows():
        assert row["mask"] == mask
        assert row["fastest_ms"] <= row["step_ms"] <= row["slowest_ms"]
        assert row["tokens_per_s"] == pytest.approx(32e3 / row["step_ms"])
        assert row["compile_s"] < row["first_step_s"]
        assert row["where_ms"]["GEMM"] > 0
        assert not row["disagrees"]
        assert not row["error"]
    eager, ours = rows()
    assert (eager["against"], ours["against"]) == ("", "eager")
    assert eager["notes"] == []  # eager ran in float64, too
    assert ours["value"] == pytest.approx(eager["value"], rel=1e-5)
    assert 0 <= ours["gradient_difference"] < 1e-4
    assert ours["rewritten"]["rms_norm"] == 5
    assert ours["rewritten"]["causal_attention"] == 2
    assert set(ours["calls"].get("causal_attention", {})) == ({way} if way else set())
    assert told in result.output


@pytest.mark.usefixtures("tiny")
def test_measures_checkpointing():
    result = run("tiny", *QUICK, "--variants", "eager,graphfuse", "--checkpointing")
    assert result.exit_code == 0, result.output
    assert "checkpointed" in result.output
    assert all(row["checkpointing"] for row in rows())
    assert rows()[1]["rewritten"]["causal_attention"] == 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("phase", "mask"), [("prefill", "none"), ("decode", "ones")])
def test_measures_inference(phase, mask):
    result = run("tiny", *QUICK, "--variants", "eager,graphfuse", "--phases", phase, "--masks", mask)
    assert result.exit_code == 0, result.output
    eager, ours = rows()
    assert (ours["phase"], ours["mask"]) == (phase, mask)
    assert ours["rewritten"]["rms_norm"] == 5
    assert "linear_cross_entropy" not in ours["rewritten"]
    assert ours["value"] == pytest.approx(eager["value"], rel=1e-4)
    assert ours["value_difference"] < 1e-4
    assert ours["gradient_difference"] is None


def test_measures_any_model_type(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    options = ("--layers", "1", "--batch", "3", "--seq", "8", "--dtype", "float32", "--variants", "eager")
    result = run("--model-type", "qwen3", *SIZES, *QUICK, *options, "--out", str(tmp_path / "there"))
    assert result.exit_code == 0, result.output
    (row,) = rows("there/model.json")
    assert (row["workload"], row["batch"], row["seq"]) == ("qwen3", 3, 8)
    assert row["value"] == pytest.approx(4.56, abs=0.1)  # log 96
    assert matplotlib.image.imread(tmp_path / "there" / "model.png").std() > 0


def test_runs_each_variant_in_its_own_process():
    options = ("--dtype", "float32", "--batch", "4", "--seq", "8", "--variants", "eager,graphfuse")
    result = run("liars:loss", *QUICK[:-1], *options)
    assert result.exit_code == 1
    eager, ours = rows()
    assert eager["step_ms"] > 0
    assert not eager["disagrees"]
    assert ours["disagrees"].startswith("loss: expected a relative difference of at most")
    assert ours["value"] == pytest.approx(1.21 * eager["value"], rel=1e-4)
    assert "graphfuse DISAGREES with eager: loss" in result.output


def test_goes_on_after_a_process_died():
    result = run("liars:dies,liars:honest", "--variants", "eager", *QUICK[:-1])
    assert result.exit_code == 0
    dead, alive = rows()
    assert dead["error"] == "ended with status 3"
    assert alive["step_ms"] > 0


def test_flags_gradients():
    result = run("liars:gradient", *QUICK, "--dtype", "float32", "--variants", "eager,graphfuse")
    assert result.exit_code == 1
    ours = rows()[1]
    assert ours["value_difference"] < 1e-6
    assert ours["gradient_difference"] == pytest.approx(0.5, rel=1e-3)
    assert ours["disagrees"].startswith("gradient of proj.")


def test_measures_what_a_factory_returns():
    result = run("liars:honest", *QUICK, "--variants", "eager,graphfuse", "--phases", "train,prefill")
    assert result.exit_code == 0, result.output
    assert [(row["phase"], row["disagrees"]) for row in rows()] == [(p, "") for p in ("train",) * 2 + ("prefill",) * 2]


@pytest.mark.usefixtures("tiny")
def test_goes_on_where_one_variant_cannot_run():
    result = run("tiny", *QUICK, "--variants", "liger,eager")
    assert result.exit_code == 0
    assert "tiny, train, mask: none, liger: ModuleNotFoundError" in result.output


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "names: expected package.module:factory or names among tiny, got nothing"),
        (["--variants", "nothing"], "variants: expected names among"),
        (["--masks", "nothing"], "masks: expected names among none, ones, padded, got nothing"),
        (["--phases", "nothing"], "phases: expected names among train, prefill, decode, got nothing"),
        (["--dtype", "nothing"], "dtype: expected names among"),
        (["--model-type", "qwen33"], "expected a model type that transformers knows, got 'qwen33' (near: qwen3"),
        (["--model-type", "qwen3", "--set", "layers"], "--set: expected key=value, got 'layers'"),
        (["--model-type", "qwen3", "--set", "hiden_size=3"], "got 'hiden_size' (near: hidden_size"),
        (["liars:honest", "--layers", "3"], "--set, --layers: expected nothing for a factory"),
        (["liars:honest", "--masks", "ones"], "--masks: expected none for a factory, got ones"),
        (["liars:honest", "--phases", "decode"], "--phases: expected train for a factory, got decode"),
    ],
)
def test_says_what_it_expected(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_lists_workloads():
    result = run("--list")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == len(workloads())
