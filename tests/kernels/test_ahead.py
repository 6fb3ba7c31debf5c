"""Kernels are compiled elsewhere before they are launched, and by the launch where that cannot be."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import graphfuse
from graphfuse import backend
from graphfuse.kernels import _ahead
from graphfuse.kernels._ahead import address
from graphfuse.kernels._triton import HAS_TRITON


def cold_step(*arguments):
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    environment.pop("TRITON_INTERPRET", None)
    worker = Path(__file__).with_name("cold.py")
    command = [sys.executable, worker, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    step = json.loads(run.stdout)
    assert sum(step["rewritten"].values()) >= 6
    return step


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("processes", [[], ["processes"]], ids=["threads", "processes"])
def test_launches_find_what_was_compiled_elsewhere(processes):
    step = cold_step("inductor", *processes)
    assert {*step["compiled"]} <= {
        "_scale_kernel"
    }  # the upstream gradient's: with Triton 3.6 it is compiled by its launch
    assert len(step["found"]) > 15


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("lost", ["jobs", "results"])
def test_launches_compile_what_nobody_else_did(lost):
    step = cold_step("aot_eager", "without", lost)
    assert step["found"] == []
    assert len(step["compiled"]) > 12


class Executor:
    """Takes jobs, and does them when it is told to."""

    def __init__(self):
        self.jobs = []

    def submit(self, function, *args):
        future = Future()
        self.jobs.append((future, function, args))
        return future

    def work(self):
        jobs, self.jobs = self.jobs, []
        for future, function, args in jobs:
            try:
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)


@pytest.fixture
def elsewhere(monkeypatch):
    """Threads, processes, and what was compiled; jobs go to the threads until there are processes."""
    site = SimpleNamespace(threads=Executor(), processes=Executor(), are_there=False, compiled=[])

    def compile_here(name):
        if name == "wrong":
            raise ValueError("no kernel")
        site.compiled.append(name)

    monkeypatch.setattr(_ahead, "_threads", lambda: site.threads)
    monkeypatch.setattr(_ahead, "_executor", lambda: site.processes if site.are_there else site.threads)
    monkeypatch.setattr(_ahead, "compile_here", compile_here)
    return site


def test_threads_compile_until_there_are_processes(elsewhere):
    first, wrong = _ahead._start("first"), _ahead._start("wrong")
    elsewhere.threads.work()
    assert first.result(0) is None
    assert isinstance(wrong.exception(0), ValueError)
    late = [_ahead._start("late"), _ahead._start("wrong")]
    elsewhere.are_there = True
    elsewhere.threads.work()  # hands them on
    assert elsewhere.compiled == ["first"]
    assert not any(future.done() for future in late)
    elsewhere.processes.work()
    assert elsewhere.compiled == ["first", "late"]
    assert late[0].result(0) is None
    assert isinstance(late[1].exception(0), ValueError)
    last = _ahead._start("last")
    assert not elsewhere.threads.jobs
    elsewhere.processes.work()
    assert last.result(0) is None


def test_processes_that_refuse_are_of_no_importance(elsewhere):
    def closed(*_):
        raise RuntimeError("Attempting to use a closed pool")

    future = _ahead._start("kernel")
    elsewhere.are_there, elsewhere.processes.submit = True, closed
    elsewhere.threads.work()
    assert isinstance(future.exception(0), RuntimeError)


@pytest.mark.parametrize("in_use", [True, False])
def test_processes_start_before_dynamo_traces_where_a_gpu_is_in_use(in_use, monkeypatch):
    woken = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(backend, "wake", lambda: woken.append(True))
    graphfuse.optimize(torch.nn.Linear(2, 2))
    assert woken == [True] * in_use


def test_triton_gets_ready_once_in_a_thread(monkeypatch):
    ran = []
    monkeypatch.setattr(_ahead, "_get_ready", lambda: ran.append(threading.current_thread().name))
    _ahead._getting_ready.cache_clear()
    try:
        _ahead.wake()
        _ahead.wake()
        _ahead._getting_ready().join()
    finally:
        _ahead._getting_ready.cache_clear()
    assert ran == ["graphfuse-triton"]


def test_fake_tensors_lie_where_real_ones_might():
    with FakeTensorMode():
        x, other = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(4, 8, dtype=torch.bfloat16)
        assert address(x) % 16 == 0
        assert address(x[:, 1:]) == address(x) + 2
        assert address(x[1]) == address(x) + 16
        assert address(other) not in range(address(x), address(x) + 64)
    real = torch.empty(4)
    assert address(real) == real.data_ptr()
