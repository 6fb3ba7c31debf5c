"""The zoo's text: totals, and nothing wrong or unexplained that goes unsaid."""

import pytest

pytest.importorskip("transformers")

from tests.zoo import coverage
from tests.zoo.recipes import RECIPES

SITES = RECIPES["llama"]["sites"]
FINE = {
    "expected": SITES,
    "covered": SITES,
    "missing": {pattern: {} for pattern in SITES},
    "beyond": {"glu": {"model.layers.0.self_attn": 2}},
    "rewritten": sum(SITES.values()),
    "refused": [],
    "graphs": 1,
    "loss": 0.0,
    "gradient": 1e-7,
    "float64": False,
    "seconds": 2.0,
}


def zoo(result, **others):
    return coverage.Zoo({"llama": result, **others}, ["llama", *others], {"transformers": "5"}, "eager")


def test_finds_no_problem_where_all_is_rewritten():
    assert coverage.problems(zoo(FINE)) == []
    assert coverage.totals(zoo(FINE)).splitlines()[-1] == "1 of 1 types compile and agree with eager"
    assert "| RMSNorm | 5 | 5 | 100.0% | 0 |\n" in coverage.document(zoo(FINE))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"loss": float("nan")}, "llama: expected differences of at most 1e-05, got loss nan, gradient 1.0e-07"),
        ({"gradient": 1e-3}, "llama: expected differences of at most 1e-05, got loss 0.0e+00, gradient 1.0e-03"),
        ({"expected": {**SITES, "glu": 1}}, f"llama: sites: expected {SITES}, got { ({**SITES, 'glu': 1}) }"),
        ({"refused": ["rope: dim: expected 64, got 63"]}, "unexplained: refused: rope: dim: expected #, got # (llama)"),
        (
            {"missing": {"glu": {"layers.0.mlp": 1, "layers.1.mlp": 1}}},
            "unexplained: not recognised: glu: layers.#.mlp (llama 2)",
        ),
    ],
    ids=["nan", "gradient", "census", "refused", "missing"],
)
def test_says_what_is_wrong(changed, problem):
    assert coverage.problems(zoo({**FINE, **changed})) == [problem]
    assert coverage.document(zoo({**FINE, **changed}))


def test_keeps_types_that_fail_apart():
    broken = zoo(FINE, mistral={"error": "no result within 240 s"})
    assert coverage.problems(broken) == ["mistral: no result within 240 s"]
    assert "**1 of 2 types compile and agree with eager.**" in coverage.document(broken)


def test_explains_what_it_can(monkeypatch):
    entry = {"site": "rope: dim: *", "why": "Odd."}
    monkeypatch.setitem(coverage.REASONS, "refused", [entry])
    explained = zoo({**FINE, "refused": ["rope: dim: expected 64, got 63"]})
    assert coverage.problems(explained) == []
    assert "### `rope: dim: *`\n\n1 site refused: llama.\n\nOdd.\n" in coverage.document(explained)
