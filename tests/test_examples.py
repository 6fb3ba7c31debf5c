"""The examples run, alone and from anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]


def run(name, *options, cwd):
    command = [sys.executable, ROOT / "examples" / name, *options]
    environment = os.environ | {"COLUMNS": "140"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_rewrites_and_reports(tmp_path):
    out = run("quickstart.py", cwd=tmp_path)
    assert out.startswith("loss ")
    assert "model.layers.{0-1}.post_attention_layernorm" in out


def test_demo_compares_two_models(tmp_path):
    pytest.importorskip("matplotlib")
    out = run("demo.py", "--steps=2", "--inner=aot_eager", f"--out={tmp_path}", cwd=tmp_path)
    assert out.count("loss, step by step") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"demo.png", "llama.json", "gemma3.json"}
    # Each report is about its own model, though both were compiled in one process.
    for name, norms in (("llama", 9), ("gemma3", 25)):
        counts = json.loads((tmp_path / f"{name}.json").read_text())["counts"]
        assert counts.items() >= {"rms_norm": norms, "rope": 8, "glu": 4}.items(), name
