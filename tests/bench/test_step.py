"""One variant of a step, in this process."""

from types import SimpleNamespace

import pytest
import torch

from graphfuse.bench import step as module
from graphfuse.bench.rows import Settings
from graphfuse.bench.step import VariantError, attempt, is_variant, loss_of, measure
from graphfuse.bench.workloads import Workload

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
WORKLOAD = Workload("x", "llama", 2, 8, TINY | {"num_key_value_heads": 2}, dtype="float32")
QUICK = Settings(repeats=1)


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
def test_looks_at_results_and_gradients(phase):
    workload = Workload("x", "llama", 2, 8, WORKLOAD.config, dtype="bfloat16", phase=phase)
    measured = measure(workload, "eager", QUICK)
    names = {"loss", "model.norm.weight", "lm_head.weight"} if phase == "train" else {"logits"}
    assert names <= measured.sketches.keys() == measured.truth.keys()
    for name in names:
        truth = measured.truth[name]
        assert 0 < (measured.sketches[name] - truth).norm() < 0.05 * truth.norm()
    assert measured.row.notes == []
    assert measured.row.peak_gib > 0


def test_says_why_there_is_no_truth(monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("out of memory\nmore")

    monkeypatch.setattr(module, "moved", refuse)
    measured = measure(WORKLOAD, "eager", QUICK)
    assert measured.truth is None
    assert measured.row.notes == ["eager's own error is not known, float64: OutOfMemoryError: out of memory"]


def test_goes_on_without_a_profiler(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no rights")

    monkeypatch.setattr(module.profiles, "of", refuse)
    row = measure(WORKLOAD, "eager", QUICK).row
    assert row.notes == ["where the time goes is not known: RuntimeError: no rights"]
    assert row.step_ms > 0


def test_puts_back_what_a_variant_writes_into_the_models_file(monkeypatch):
    def compiled(model, variant, settings):
        modeling_llama.apply_rotary_pos_emb = lambda q, k, *_, **__: (q, k)

    monkeypatch.setattr(module, "compiled", compiled)
    before = modeling_llama.apply_rotary_pos_emb
    measure(WORKLOAD, "liger", QUICK)
    assert modeling_llama.apply_rotary_pos_emb is before


def test_says_why_a_variant_did_not_run(monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(module, "build", refuse)
    row = attempt(WORKLOAD, "eager", QUICK).row
    assert (row.error, row.step_ms) == ("OutOfMemoryError: CUDA out of memory.", 0.0)


def test_finds_the_loss_of_an_output():
    loss, many = torch.tensor(3.0), torch.tensor([1.0, 3.0])
    assert loss_of(loss) is loss
    assert loss_of({"loss": loss, "logits": many}) is loss
    assert loss_of(SimpleNamespace(loss=loss)) is loss
    assert loss_of((many, None)) == 5.0
    assert loss_of({"states": many}) == 5.0
    with pytest.raises(VariantError, match="expected a tensor or an output with a loss, got str"):
        loss_of("loss")


def test_leaves_patterns_out():
    row = measure(WORKLOAD, "graphfuse-without-rope+glu", QUICK).row
    assert {"rms_norm", "linear_cross_entropy"} <= row.rewritten.keys()
    assert not {"rope", "glu"} & row.rewritten.keys()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("graphfuse", True),
        ("graphfuse-min", True),
        ("graphfuse-without-rope+glu", True),
        ("graphfuse-without-ropes", False),
        ("graphfuse-without-", False),
        ("graphfuse-rope", False),
    ],
)
def test_knows_the_names_of_variants(name, is_one):
    assert is_variant(name) == is_one
