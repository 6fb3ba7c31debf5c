"""Sketches of gradients, and what they say about two variants."""

import math

import pytest
import torch

from graphfuse.bench.agreement import BUCKETS, compare, judged, sketch
from graphfuse.bench.rows import Measured, row_of
from graphfuse.bench.workloads import Workload


@pytest.mark.parametrize("shape", [(7,), (300, 70), (2, 3, 5, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sketch_has_the_length_of_its_tensor(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert sketch(tensor).shape == (BUCKETS,)
    assert sketch(tensor).norm() == pytest.approx(float(tensor.double().norm()), rel=0.15)
    assert torch.equal(sketch(tensor), sketch(tensor.clone()))


def test_the_difference_of_sketches_is_that_of_tensors():
    """However few elements it is in: a row of an embedding, a column of a matrix."""
    a = torch.randn(400, 512, generator=torch.Generator().manual_seed(3))
    for place in (slice(7, 8), (slice(None), 9), (3, 5)):
        b = a.clone()
        b[place] += 0.1
        assert (sketch(a) - sketch(b)).norm() == pytest.approx(float((a - b).norm()), rel=0.15)


def test_sketches_more_than_one_part(monkeypatch):
    whole = torch.randn(5 * BUCKETS, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr("graphfuse.bench.agreement.PART", 2 * BUCKETS)
    assert sketch(whole).norm() == pytest.approx(float(whole.norm()), rel=0.15)


def sketches(**tensors):
    return {name: sketch(torch.as_tensor(tensor)) for name, tensor in tensors.items()}


WANTED = sketches(loss=10.0, w=torch.ones(50), tiny=torch.full((50,), 1e-9))


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({}, ""),
        ({"loss": 10.01}, ""),
        ({"loss": 11.0}, "loss: expected a relative difference of at most 8.0e-03, got 1.0e-01"),
        ({"loss": math.nan}, "loss: expected a relative difference of at most 8.0e-03, got nan"),
        ({"w": torch.full((50,), 1.05)}, ""),
        (
            {"w": torch.full((50,), 1.5)},
            "gradient of w: expected a relative difference of at most 8.0e-02, got 5.0e-01",
        ),
        (
            {"w": torch.full((50,), math.nan)},
            "gradient of w: expected a relative difference of at most 8.0e-02, got nan",
        ),
        ({"tiny": torch.zeros(50)}, ""),  # beside the others it is rounding
    ],
)
def test_says_what_is_too_far_apart(found, verdict):
    difference = compare(WANTED | sketches(**found), WANTED, None, "bfloat16")
    assert difference.verdict == verdict


def test_logits_may_be_as_far_apart_as_gradients():
    """They are many numbers at the end of many layers; a loss is a mean."""
    wanted, near, far = (sketches(logits=torch.full((50,), size)) for size in (1.0, 1.05, 1.1))
    assert compare(near, wanted, None, "bfloat16").verdict == ""
    verdict = compare(far, wanted, None, "bfloat16").verdict
    assert verdict == "logits: expected a relative difference of at most 8.0e-02, got 1.0e-01"


def test_a_gradient_that_is_missing_is_wrong():
    assert compare(sketches(loss=10.0), sketches(loss=10.0, w=[1.0, 2]), None, "float32").verdict == (
        "w: expected a gradient, got none"
    )
    assert compare(sketches(loss=10.0, w=[1.0, 2]), sketches(loss=10.0), None, "float32").verdict == (
        "w: expected no gradient, got one"
    )


def test_allows_a_multiple_of_eagers_own_error():
    found = WANTED | sketches(w=torch.full((50,), 1.5))
    truth = WANTED | sketches(w=torch.full((50,), 1.3))
    assert compare(found, WANTED, truth, "float32").verdict == ""
    truth = WANTED | sketches(w=torch.full((50,), 1.01))
    assert compare(found, WANTED, truth, "float32").verdict.startswith("gradient of w")


def measured(variant, loss, error=""):
    row = row_of(Workload("x", dtype="float32"), variant, error=error)
    return Measured(row, {} if error else sketches(loss=loss))


def test_compares_with_eager_or_the_first_that_ran():
    rows = judged([measured("inductor", 1.0), measured("eager", 2.0), measured("liger", 0.0, "out of memory")])
    assert [(row.against, bool(row.disagrees)) for row in rows] == [("eager", True), ("", False), ("", False)]
    rows = judged([measured("eager", 0.0, "out of memory"), measured("inductor", 1.0), measured("graphfuse", 1.0)])
    assert [row.against for row in rows] == ["", "", "inductor"]
    assert not any(row.disagrees for row in rows)
    assert judged([measured("eager", 0.0, "out of memory")])[0].error == "out of memory"
