"""The steps that bench model runs."""

import pytest
import torch

from graphfuse.bench.workloads import Workload, build, build_model, inputs, of_type, parse_settings, workloads

CPU = torch.device("cpu")
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
}


def test_starts_every_variant_from_the_same_weights():
    workload = Workload("x", "llama", 2, 16, TINY)
    (first, given), (second, _) = build(workload, CPU), build(workload, CPU)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert given["input_ids"].shape == (2, 16)
    assert given["input_ids"].max() < 96


def test_hides_a_quarter_of_every_second_sequence():
    given = inputs(Workload("x", "llama", 4, 8, mask="padded"), 96, CPU)
    assert given["attention_mask"].sum(1).tolist() == [8, 6, 8, 6]
    assert (given["labels"] == -100).sum() == 4


def test_leaves_dropout_out():
    model = build_model(Workload("x", "gpt2", config={"n_layer": 1, "n_embd": 16, "n_head": 2}), torch.device("meta"))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_sets_parts_of_a_configuration():
    config = {"text_config.hidden_size": 64, "num_hidden_layers": 3, "text_config.vocab_size": 99}
    model = build_model(Workload("x", "gemma3", config=config), torch.device("meta"))
    text = model.config.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (64, 3, 99)
    assert len(text.layer_types) == 3


def test_a_model_type_has_as_many_tokens_as_positions():
    assert of_type("gpt2", {}).seq == 1024
    assert of_type("qwen3", {}).seq == 2048
    assert of_type("qwen3", {"max_position_embeddings": 64}).seq == 64


def test_reads_settings():
    pairs = ["a=1", "b=1e-5", "c=true", "d=none", "e=silu", 'f={"rope_type": "default"}']
    assert parse_settings(pairs) == {
        "a": 1,
        "b": 1e-5,
        "c": True,
        "d": "none",
        "e": "silu",
        "f": {"rope_type": "default"},
    }


@pytest.mark.parametrize("name", workloads())
def test_workloads_can_be_built(name):
    workload = workloads()[name]
    model = build_model(workload, torch.device("meta"))
    assert model.config.num_hidden_layers == workload.config["num_hidden_layers"]
    assert model.config.vocab_size == workload.config["vocab_size"]
    assert len({tuple(p.shape) for p in model.parameters()}) > 3
