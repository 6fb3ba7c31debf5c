"""A dozen of the zoo, each with a spelling of its own: every site is rewritten, and nothing else changes."""

import pytest

pytest.importorskip("transformers")

from graphfuse.patterns import CATALOGUE, cross_entropy, linear_cross_entropy
from graphfuse.patterns._head import Obstacle
from tests.zoo.measure import agree, measure
from tests.zoo.recipes import RECIPES

# What Dynamo says about the code of these models; graphfuse itself is strict here and raises.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TYPES = [
    "cohere2",  # interleaved rope in some layers, logits scaled
    "deepseek_v2",  # rope on complex numbers, latent attention
    "falcon_h1",  # attention and a state space model side by side
    "glm4",  # rope on half of each head, interleaved; gate and up packed; norms around each branch
    "gpt_neox",  # rope on a quarter of each head
    "jamba",  # norms inside a state space model, experts
    "mamba2",  # gated norms
    "mixtral",  # experts in grouped products
    "nanochat",  # norms without weights, rope of the other sign, soft-capped logits
    "openai-gpt",  # a message said once would split head from loss
    "qwen3_next",  # linear attention, norms with 1 + weight
    "whisper",  # a decoder with an encoder's output
]


@pytest.mark.parametrize("name", TYPES)
def test_rewrites_every_site_and_changes_nothing(name):
    result = measure(name)
    assert result["expected"] == RECIPES[name]["sites"]
    assert result["covered"] == RECIPES[name]["sites"]
    assert agree(result["loss"], result["gradient"])


def test_counts_behind_graph_breaks():
    """One graph serves several layers there, and its sites count once for each."""
    result = measure("dbrx")
    assert result["graphs"] > 1
    for pattern in ("rope", "glu"):
        assert result["covered"][pattern] == RECIPES["dbrx"]["sites"][pattern]


def test_names_what_is_not_recognised(monkeypatch):
    monkeypatch.setattr("graphfuse.backend.CATALOGUE", [p for p in CATALOGUE if p.name != "glu"])
    result = measure("llama")
    assert result["covered"] == {**RECIPES["llama"]["sites"], "glu": 0}
    assert result["missing"]["glu"] == {"model.layers.0.mlp": 1, "model.layers.1.mlp": 1}


def test_a_head_whose_loss_alone_is_rewritten_was_refused(monkeypatch):
    def refuse(*_):
        raise Obstacle("logits: expected another day, got this one")

    monkeypatch.setattr(linear_cross_entropy, "_check_private", refuse)
    monkeypatch.setattr(cross_entropy, "MIN_CLASSES", 2)
    result = measure("llama")
    assert result["beyond"]["cross_entropy"] == {"": 1}
    assert result["covered"]["linear_cross_entropy"] == 0
    assert result["missing"]["linear_cross_entropy"] == {}
    assert result["refused"] == ["linear_cross_entropy: logits: expected another day, got this one"]
