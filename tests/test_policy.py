"""What was measured to be slower is left to Inductor, and only that, and only there."""

from types import SimpleNamespace

import pytest
import torch

from graphfuse.backend import pattern_names
from graphfuse.config import Config
from graphfuse.errors import ConfigError
from graphfuse.policy import costs, left_to_inductor

WIDE = 12288


def match(features=WIDE, device="cuda", pattern="layer_norm", stored=None):
    anchor = SimpleNamespace(shape=(4, features), tensor=SimpleNamespace(device=torch.device(device)))
    return SimpleNamespace(pattern=pattern, anchor=anchor, covers={pattern: 1}, stored=stored)


def test_leaves_what_inductor_computes_faster():
    refusal = left_to_inductor(match(), Config())
    assert refusal.reason.startswith("cost: expected less than Inductor's 1.83 times the time of its bytes, got 3.59")
    assert 'policy="always"' in refusal.hint
    assert refusal.covers == {"layer_norm": 1}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_leaves_what_would_have_to_be_stored_first(device):
    found = match(device=device, pattern="cross_entropy", stored=SimpleNamespace(op="aten.mul.Tensor"))
    refusal = left_to_inductor(found, Config())
    assert refusal.reason == (
        "cost: expected an input that is stored anyway, got aten.mul.Tensor, which Inductor need not store"
    )
    assert 'policy="always"' in refusal.hint
    assert left_to_inductor(found, Config(policy="always")) is None
    assert left_to_inductor(found, Config(inner="aot_eager")) is None


@pytest.mark.parametrize(
    ("found", "config"),
    [
        (match(), Config(policy="always")),
        (match(), Config(inner="eager")),
        (match(device="cpu"), Config()),
        (match(features=8192), Config()),
        (match(pattern="rms_norm"), Config()),
    ],
    ids=["always", "not Inductor", "CPU", "narrow", "another pattern"],
)
def test_rewrites_all_else(found, config):
    assert left_to_inductor(found, config) is None


def test_every_row_was_measured_to_be_slower():
    for row in costs():
        assert row.pattern in pattern_names()
        assert row.graphfuse > row.inductor
        assert row.measured


def test_unknown_policy():
    with pytest.raises(ConfigError, match=r"policy: expected one of \['measured', 'always'\], got 'never'"):
        Config.parse({"policy": "never"}, ())
