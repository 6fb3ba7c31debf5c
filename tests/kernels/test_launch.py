"""Launches of compiled kernels: what the launcher of Inductor's kernels is handed."""

from types import SimpleNamespace

import pytest
import torch

from graphfuse.kernels import _triton
from graphfuse.kernels._descriptor import Described
from graphfuse.kernels._triton import HAS_TRITON, Launcher, launcher_by_torch

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


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    def get_device(self):
        return 0


class Kernel:
    """Compiles once for even numbers and once for odd ones, as Triton does for those that it specialises on."""

    arg_names = ("x", "n", "BLOCK")
    fn = SimpleNamespace(__name__="kernel")

    def __init__(self):
        self.compiled = {}

    def warmup(self, x, n, *, grid, BLOCK):  # noqa: N803 - as kernels name their constants
        return self.compiled.setdefault(n % 2, object())


@pytest.fixture
def gpu(monkeypatch):
    """Launchers that were made, and what they were called with."""
    gpu = SimpleNamespace(made=[], ran=[])

    def by_torch(compiled, args, index):
        gpu.made.append(compiled)
        return Launcher(lambda *args: gpu.ran.append((compiled, *args)), tuple)

    monkeypatch.setattr(_triton, "launcher_by_torch", by_torch)
    monkeypatch.setattr(_triton, "_launchers", {})
    monkeypatch.setattr(_triton, "_loaded", {})
    monkeypatch.setattr(_triton, "MAX_LAUNCHERS", 5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    return gpu


def test_a_compiled_kernel_is_loaded_once_for_all_sizes(gpu):
    """A length that grows with each token must not load another module for each."""
    kernel, x = Kernel(), torch.ones(4).as_subclass(OnGpu)
    for n in (*range(12), *range(12)):
        _triton.launch(kernel, (n,), x, n, BLOCK=8)
    assert gpu.made == [kernel.compiled[0], kernel.compiled[1]]
    assert [(compiled, x) for compiled, x, *_ in gpu.ran] == [(kernel.compiled[n % 2], n) for n in (*range(12),) * 2]
    assert gpu.ran[3][2:] == (1, 1, 7, x.data_ptr(), 3)
    assert len(_triton._launchers) <= 5


def test_tensors_on_several_devices_are_an_error(gpu):
    x = torch.ones(4).as_subclass(OnGpu)
    with pytest.raises(ValueError, match="kernel: expected tensors on cuda:0, got one on cpu"):
        _triton.launch(Kernel(), (1,), x, torch.ones(2), BLOCK=8)


def test_few_values_are_picked_too(launched):
    for signature, flat, wanted in (({"x": "*fp32"}, [8], (8,)), ({"x": "constexpr"}, [None], ())):
        assert launcher_by_torch(compiled(signature), ("x",), 0).pick(flat) == wanted


@pytest.mark.parametrize(("hook", "is_watched"), [(None, False), (print, True), (SimpleNamespace(calls=[]), False)])
def test_any_kind_of_hook(hook, is_watched, monkeypatch):
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=hook)
    monkeypatch.setattr(_triton.triton, "knobs", SimpleNamespace(runtime=runtime))
    assert _triton._is_watched() is is_watched
