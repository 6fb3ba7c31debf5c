"""Launches of compiled kernels: what the launcher of Inductor's kernels is handed."""

from types import SimpleNamespace

import pytest

from graphfuse.kernels import _triton
from graphfuse.kernels._descriptor import Described
from graphfuse.kernels._triton import HAS_TRITON, launcher_by_torch

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


@pytest.fixture
def launched(monkeypatch):
    """What the driver was asked to launch, by a stand-in for torch's own binding to it."""
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

    calls = []

    def load(kernel, index):
        calls.append(("load", kernel.name, index))
        kernel.function = 7

    def launch_kernel(*args):
        calls.append(args)

    monkeypatch.setattr(StaticallyLaunchedCudaKernel, "load_kernel", load)
    monkeypatch.setattr(StaticallyLaunchedCudaKernel, "C_impl", SimpleNamespace(_launch_kernel=launch_kernel))
    return calls


def compiled(signature, **metadata):
    fn = SimpleNamespace(__name__="kernel", arg_names=list(signature), params=[])
    known = {"num_warps": 4, "shared": 16, "num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0}
    known |= {"launch_pdl": False, "launch_cooperative_grid": False, **metadata}
    source = SimpleNamespace(fn=fn, signature=signature, constants={})
    return SimpleNamespace(src=source, metadata=SimpleNamespace(**known), asm={"cubin": b""}, hash="", name="kernel")


SIGNATURE = {
    "x_ptr": "*bf16",
    "other_ptr": "constexpr",
    "strides": ("i32", "constexpr", "i64"),
    "places": "constexpr",
    "eps": "fp32",
    "N": "i32",
    "BLOCK": "constexpr",
}
ARGS = ("x", None, (40, 1, 2**40), (3, 4), 0.5, 6)  # the last one is an option


def test_hands_over_all_but_constants(launched):
    launcher = launcher_by_torch(compiled(SIGNATURE), ARGS, 1)
    values = launcher.pick([4096, None, 40, 1, 2**40, 3, 4, 0.5, 6])
    launcher.run(8, 2, 1, 91, *values)
    values = (4096, 40, 2**40, 0.5, 6, None, None)  # and no memory of its own, which the kernel takes all the same
    assert launched == [("load", "kernel", 1), (7, 8, 2, 1, 4, 16, "OilfiOO", values, 91)]


@pytest.mark.parametrize(
    "attribute",
    [
        {"launch_pdl": True},
        {"launch_cooperative_grid": True},
        {"num_ctas": 2},
        {"global_scratch_size": 64},
    ],
    ids=str,
)
def test_leaves_what_it_does_not_know_to_triton(launched, attribute):
    assert launcher_by_torch(compiled(SIGNATURE, **attribute), ARGS, 0) is None
    assert launched == []


def test_leaves_descriptors_to_triton(launched):
    signature = {"x": "tensordesc<bf16[64, 64]>", "N": "i32"}
    args = (Described("x", [128, 64], [64, 1], [64, 64]), 5)
    assert launcher_by_torch(compiled(signature), args, 0) is None


def test_leaves_kernels_to_triton_where_a_profiler_listens(launched, monkeypatch):
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(
        _triton.triton,
        "knobs",
        SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=hook, launch_exit_hook=SimpleNamespace(calls=[]))),
    )
    assert launcher_by_torch(compiled(SIGNATURE), ARGS, 0) is None
    assert launched == []


def test_leaves_kernels_to_triton_where_they_cannot_be_loaded(launched, monkeypatch):
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

    def load(kernel, index):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(StaticallyLaunchedCudaKernel, "load_kernel", load)
    assert launcher_by_torch(compiled(SIGNATURE), ARGS, 0) is None
