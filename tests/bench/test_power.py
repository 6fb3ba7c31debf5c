"""Clock and power while steps are timed: means of what the driver says, or nothing where it cannot be asked."""

import itertools
import time

import pytest
import torch

from graphfuse.bench import power
from graphfuse.bench.power import Meter

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(power, "PERIOD", 0.001)


def test_takes_means(monkeypatch):
    clocks, milliwatts = itertools.cycle([1000, 2000]), itertools.repeat(500_000)
    seen = []

    def clock_rate(device):
        seen.append(device)
        return next(clocks)

    monkeypatch.setattr(torch.cuda, "clock_rate", clock_rate)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: next(milliwatts))
    with Meter(GPU) as meter:
        while len(seen) < 40:
            time.sleep(0.001)
    assert meter.clock_mhz == pytest.approx(1500, rel=0.05)
    assert meter.watts == 500
    assert set(seen) == {GPU}
    count = len(seen)
    time.sleep(0.01)
    assert len(seen) == count  # nobody looks any more


def test_knows_nothing_where_nobody_can_be_asked(monkeypatch):
    def missing(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "clock_rate", missing)
    with Meter(GPU) as meter:
        time.sleep(0.01)
    assert meter.clock_mhz is None
    assert meter.watts is None


def test_does_not_look_on_a_cpu():
    with Meter(torch.device("cpu")) as meter:
        pass
    assert meter.watts is None


def test_errors_pass_through():
    with pytest.raises(ValueError, match="in the block"), Meter(torch.device("cpu")):
        raise ValueError("in the block")
