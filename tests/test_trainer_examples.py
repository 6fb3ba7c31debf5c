"""Every trainer example learns the same with graphfuse as in eager, and docs/trainers.md shows the lines they run."""

import functools
import importlib
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import graphfuse
from graphfuse.lazy import materialised

for package in ("transformers", "accelerate", "peft", "trl", "lightning", "datasets"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
LAYER = {"rms_norm": 3, "rope": 2, "glu": 1}  # of one layer, and the last norm
WITH_HEAD = {**LAYER, "linear_cross_entropy": 1, "lazy_logits": 1}
EXAMPLES = {
    "plain_loop": WITH_HEAD,
    "accelerate_loop": WITH_HEAD,
    "hf_trainer": WITH_HEAD,
    "peft_lora": WITH_HEAD,
    "lightning_module": WITH_HEAD,
}
METHODS = ["sft", "dpo", "kto", "grpo", "gkd"]  # with a head, or a loss on logits, of TRL's own


@pytest.fixture
def example(monkeypatch):
    """Imports an example, which finds its neighbours as when it is run."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield importlib.import_module
    for name in {path.stem for path in (ROOT / "examples").glob("*.py")} & sys.modules.keys():
        del sys.modules[name]


def compared(train, size):
    """The model trained with graphfuse, after its losses were found to be those of eager."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tools' own
        with torch.compiler.set_stance("force_eager"):
            _, expected = train(size)
        materialised.clear()
        model, losses = train(size, inner="eager", strict=True)
    assert len(losses) == size.steps
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert not materialised, materialised
    return model


def counts(model):
    report = graphfuse.report(model)
    assert not report.refused, report
    return {pattern: count for pattern, count in report.counts.items() if pattern != "causal_attention"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_learns_as_in_eager(name, example):
    size = example("_small").Size(steps=3, layers=1, length=32)
    model = compared(example(name).train, size)
    assert counts(model) == EXAMPLES[name]


@pytest.mark.parametrize("method", METHODS)
def test_trl_example_learns_as_in_eager(method, example):
    size = example("_small").Size(steps=2, layers=1, length=32)
    model = compared(functools.partial(example("trl_trainers").train, method=method), size)
    assert counts(model) == LAYER


def test_prints_losses_and_what_was_rewritten(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", "--steps=3", "--layers=1", "--inner=eager", "--memory"])
    example("plain_loop").main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["eager", "graphfuse", "graphfuse:", "Inductor"]
    assert "linear_cross_entropy 1" in lines[2]
    assert lines[2].endswith("logits computed 0 times")
    assert all(float(line.split()[-2]) > 0 for line in (lines[0], lines[1], lines[3]))  # MiB


def blocks():
    """The Python of docs/trainers.md, each with the file that runs it, which a comment before it names."""
    text = (ROOT / "docs" / "trainers.md").read_text()
    found = re.findall(r"<!-- (\S+) -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == text.count("```python")
    return found


def lines_of(source):
    source = re.sub(r"(, )?\*\*options(: Any)?", "", source)  # what is compiled with; the defaults, in the document
    return [line.strip() for line in source.splitlines() if line.strip()]


def test_docs_show_the_lines_that_run():
    shown = {path for path, _ in blocks()}
    assert {f"examples/{name}.py" for name in [*EXAMPLES, "trl_trainers"]} <= shown
    for path, block in blocks():
        rest = iter(lines_of((ROOT / path).read_text()))
        for line in lines_of(block):
            assert line in rest, (path, line)  # in this order


def test_llama_factory_launcher_passes_the_callback(monkeypatch):
    """What the document has users start in the place of `llamafactory-cli train`."""
    from graphfuse.integrations.transformers import GraphfuseCallback

    calls = []
    tuner = types.SimpleNamespace(run_exp=lambda **arguments: calls.append(arguments))
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
    (block,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "trainers.md").read_text(), re.DOTALL)
    exec(block, {})
    assert [type(callback) for callback in calls[0]["callbacks"]] == [GraphfuseCallback]
