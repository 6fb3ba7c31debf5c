"""Fixtures of every test: the device, the seed, a clean Dynamo, and memory that starts as NaN."""

import os
import random
from collections.abc import Iterator

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Before the first import of triton: without a GPU its kernels run in the interpreter.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Torch says so only in a warning, unless it runs in its own CI, when an op returns a tensor twice or an input.
os.environ.setdefault("TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING", "1")
# What a deterministic cuBLAS asks for; see `poisoned_memory`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# One process per core under pytest -n: more threads would only fight each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The same examples every time, and no limit on the first one, which compiles.
hypothesis.settings.register_profile("graphfuse", deadline=None, derandomize=True)
hypothesis.settings.load_profile("graphfuse")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    """The device tests run on: CUDA where there is one."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The same random numbers for every test, and nothing compiled by the one before."""
    random.seed(0)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In kernel tests torch.empty returns NaN (largest integer), so that an element no kernel wrote shows.

    torch does that itself in deterministic mode, in the allocation, whoever calls it.
    """
    if request.path.parent.name != "kernels":
        yield
        return
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
