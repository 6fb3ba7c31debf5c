"""graphfuse inspect: ten types of models without weights, and one clear line where it cannot."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from graphfuse.cli import app

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 4}
TYPES = {  # type -> its own settings, and what it has for certain
    "llama": ({}, {"rms_norm": 5, "rope": 4, "glu": 2, "linear_cross_entropy": 1}),
    "qwen3": ({"head_dim": 16}, {"rms_norm": 9, "rope": 4, "glu": 2, "linear_cross_entropy": 1}),
    "gemma3_text": ({"head_dim": 16}, {"rms_norm": 13, "rope": 4, "glu": 2}),
    "mistral": ({}, {"rms_norm": 5, "rope": 4, "glu": 2, "linear_cross_entropy": 1}),
    "olmo2": ({}, {"rms_norm": 9, "rope": 4, "glu": 2, "linear_cross_entropy": 1}),
    "phi3": ({"pad_token_id": 0}, {"rms_norm": 5, "rope": 4, "glu": 2, "linear_cross_entropy": 1}),
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4}, {"layer_norm": 5}),
    "bert": ({}, {"layer_norm": 6}),
    "t5": ({"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16}, {"rms_norm": 12}),
    "mixtral": (EXPERTS, {"rms_norm": 5, "rope": 4, "linear_cross_entropy": 1}),
}


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.mark.parametrize("model_type", TYPES)
def test_inspects_a_type(model_type, tmp_path):
    settings, expected = TYPES[model_type]
    config, data, page = tmp_path / "config.json", tmp_path / "out.json", tmp_path / "out.html"
    config.write_text(json.dumps({"model_type": model_type, **TINY, **settings}))
    done = run("--config", config, "--seq", 32, "--json", data, "--html", page)
    assert done.exit_code == 0, done.output
    report = json.loads(data.read_text())
    assert report["counts"].items() >= expected.items()
    assert report["notes"] == []
    assert all(s["formula"] and s["exact_error"] is not None for s in report["sites"] if s["status"] == "rewritten")
    assert "graphfuse report" in page.read_text()
    assert "sites rewritten" in done.output


def test_inspects_a_real_size_within_memory():
    """An 8B model; a process of its own, whose peak is its own."""
    script = (
        "import resource\nfrom graphfuse import inspect\n"
        "report = inspect.of_type('llama', 1, 2048, 'bfloat16')\n"
        "print(report.counts['rms_norm'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    norms, peak = map(int, done.stdout.split())
    assert norms == 65
    assert peak < 4096


FACTORIES = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, 32), nn.RMSNorm(32)

    def forward(self, tokens):
        return self.norm(self.embed(tokens))

def with_inputs():
    import torch
    return Block(), {"tokens": torch.zeros(2, 8, dtype=torch.long)}

def number():
    return 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_models"
    sys.modules.pop("my_models", None)


@pytest.mark.parametrize("factory", ["Block", "with_inputs"])
def test_inspects_what_a_factory_makes(package, factory):
    done = run(f"{package}:{factory}", "--dtype", "float32", "--details")
    assert done.exit_code == 0, done.output
    assert "rms_norm" in done.output
    assert "x · (mean(x²)" in done.output


@pytest.mark.parametrize(
    ("arguments", "content", "line"),
    [
        (
            ["--model-type", "quen3"],
            None,
            "--model-type: expected a model type that transformers knows, got 'quen3' (near",
        ),
        (["--config", "CONFIG"], "{", "--config: expected JSON in "),
        (["--config", "CONFIG"], "[]", "--config: expected an object with a model_type in "),
        (["--config", "CONFIG"], '{"model_type": "lama"}', "--config: expected a model type that transformers knows"),
        (
            ["--config", "CONFIG"],
            '{"model_type": "llama", "architectures": ["LamaModel"]}',
            "--config: expected a class of transformers among architectures, got 'LamaModel'",
        ),
        (["--config", "missing.json"], None, "--config: expected a file, got missing.json: No such file"),
        (["my_models:Missing"], None, "factory: expected a name in my_models, got 'Missing'"),
        (["no_such_module:f"], None, "factory: expected a module that can be imported, got 'no_such_module'"),
        (["my_models"], None, "factory: expected package.module:function, got 'my_models'"),
        (["my_models:number"], None, "factory: expected my_models:number to return an nn.Module, got int"),
        (["--model-type", "vit"], None, "expected a model of tokens (input_ids), got one of pixel_values"),
        (["--model-type", "bert", "--seq", 600], None, "--seq: expected at most 512 tokens for this model, got 600"),
        ([], None, "expected one of FACTORY, --model-type and --config, got 0"),
    ],
    ids=str,
)
def test_says_in_one_line_what_is_wrong(package, tmp_path, arguments, content, line):
    config = tmp_path / "config.json"
    if content is not None:
        config.write_text(content)
    done = run(*(str(config) if a == "CONFIG" else a for a in arguments))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr
