"""Which attention kernel is fastest: measured once, kept for later processes, and never against the user's settings."""

import contextlib
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphfuse.kernels import _sdpa_kernel, _sdpa_launch, _sdpa_times
from graphfuse.kernels._sdpa_kernel import KERNELS, may_choose
from graphfuse.kernels._sdpa_times import Times, fastest, load, wait_until_loaded

B, H, G, S, D = 2, 4, 2, 24, 16


each_mask = pytest.mark.parametrize(
    "mask", [None, torch.ones(S, S).tril().bool(), torch.zeros(B, 1, S, S)], ids=["", "bool", "added"]
)


def states(device="cpu", dtype=torch.float32, sizes=(B, S, D), heads=H, groups=G):
    """Queries, keys and values with the heads inside the tokens."""
    batch, length, width = sizes
    return [
        torch.randn(batch, length, n, width, device=device).to(dtype).transpose(1, 2) for n in (heads, groups, groups)
    ]


@pytest.fixture
def free():
    """Kernel tests run in deterministic mode, in which PyTorch alone chooses."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu(monkeypatch, tmp_path, free):
    """A GPU whose kernels take as long as they are told to, and all compute what the CPU does."""
    machine = SimpleNamespace(name="GPU 1", takes={"flash": 2.0, "cudnn": 1.0, "efficient": 3.0}, own="flash")
    machine.runs, machine.memory, machine.wrong, machine.late = Counter(), 1 << 40, set(), {}

    def fitted(query, key, value, mask, is_causal, scale, wanted):
        return KERNELS[wanted if wanted in machine.takes else machine.own], query, key, value

    def forward(*args):
        out, lse = _sdpa_launch.forward(*args)
        return (out * 1.1 if args[-1] in machine.wrong else out), lse

    def milliseconds(run):
        name = run.args[0]
        run()
        machine.runs[name] += 1
        late = machine.late.get(name, [])
        return machine.takes[name] + (late.pop(0) if late else 0.0)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(_sdpa_times, "_known", {})
    monkeypatch.setattr(_sdpa_times, "_is_measurable", lambda tensors: True)
    monkeypatch.setattr(_sdpa_times, "_machine", lambda _: {"gpu": machine.name})
    monkeypatch.setattr(_sdpa_times, "_free_memory", lambda _: machine.memory)
    monkeypatch.setattr(_sdpa_times, "_milliseconds", milliseconds)
    monkeypatch.setattr(_sdpa_times, "fitted", fitted)
    monkeypatch.setattr(_sdpa_times, "forward", forward)
    machine.files = lambda: sorted((tmp_path / "graphfuse" / "attention").glob("*"))
    machine.restart = _sdpa_times._known.clear
    return machine


def choose(**options):
    return fastest(*states(), **{"is_causal": True, "trains": True, **options})


@pytest.mark.parametrize("trains", [True, False])
@each_mask
def test_takes_the_fastest(gpu, mask, trains):
    found = choose(mask=mask, is_causal=mask is None, trains=trains)
    assert found == Times("cudnn", gpu.takes)
    assert gpu.runs["cudnn"] == _sdpa_times.REPEATS
    assert gpu.runs["flash"] == gpu.runs["efficient"] == _sdpa_times.LOOKS  # twice as slow as another, and more


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("late", [[9.0], [9.0, 9.0], [0.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]], ids=str)
def test_other_work_on_the_gpu_decides_nothing(gpu, name, late):
    gpu.late = {name: [*late]}
    assert choose() == Times("cudnn", gpu.takes)


@pytest.mark.parametrize(("own", "chosen"), [("flash", "flash"), ("cudnn", "cudnn"), ("efficient", "cudnn")])
def test_leaves_pytorchs_choice_where_another_is_hardly_faster(gpu, own, chosen):
    gpu.takes = {"flash": 1.02, "cudnn": 1.0, "efficient": 1.2}
    gpu.own = own
    assert choose().fastest == chosen


def test_measures_a_size_once_a_process(gpu):
    first = choose()
    runs = gpu.runs.copy()
    assert choose() is first
    assert gpu.runs == runs
    choose(trains=False)
    assert gpu.runs != runs


def test_a_later_process_measures_nothing(gpu):
    first = choose()
    runs = gpu.runs.copy()
    gpu.restart()
    gpu.takes = {"flash": 1.0, "cudnn": 2.0}
    assert choose() == first
    assert gpu.runs == runs
    gpu.name = "GPU 2"
    assert choose().fastest == "flash"
    assert len(gpu.files()) == 2


def test_processes_that_measure_at_once_take_the_answer_of_the_first(gpu, monkeypatch):
    theirs = Times("efficient", {"efficient": 1.0, "flash": 2.0})
    measure = _sdpa_times._measure

    def late(*args, **options):
        (name,) = names
        _sdpa_times._keep(_sdpa_times._file(name), theirs, {})
        return measure(*args, **options)

    choose()
    names = [file.stem for file in gpu.files()]
    gpu.files()[0].unlink()
    gpu.restart()
    monkeypatch.setattr(_sdpa_times, "_measure", late)
    assert choose() == theirs
    assert len(gpu.files()) == 1  # nothing is left lying about


@pytest.mark.parametrize("text", ["", "{", "[]", '{"times": {"fastest": "math", "milliseconds": {}}}'])
def test_replaces_what_it_cannot_read(gpu, text):
    first = choose()
    gpu.files()[0].write_text(text)
    gpu.restart()
    assert choose() == first
    gpu.restart()
    gpu.takes = {"flash": 1.0, "cudnn": 2.0}
    assert choose() == first


def test_keeps_nothing_where_caches_are_off(gpu):
    with torch._inductor.config.patch(force_disable_caches=True):
        assert choose().fastest == "cudnn"
    assert gpu.files() == []


def test_does_without_a_disk(gpu, monkeypatch):
    def full(*_):
        raise OSError

    monkeypatch.setattr(_sdpa_times.os, "link", full)
    assert choose().fastest == "cudnn"


def test_leaves_out_a_kernel_that_computes_something_else(gpu):
    gpu.wrong = {"cudnn"}
    assert choose() == Times("flash", {"flash": 2.0, "efficient": 3.0})


def test_measures_nothing_where_memory_is_short(gpu):
    gpu.memory = 1 << 10
    assert choose() is None
    assert not gpu.runs
    assert gpu.files() == []


def test_leaves_it_to_pytorch_where_one_kernel_fits(gpu):
    gpu.takes = {"flash": 1.0}
    assert choose() is None


def test_leaves_it_to_pytorch_where_a_kernel_fails(gpu, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(_sdpa_times, "forward", fails)
    assert choose() is None


@pytest.mark.parametrize("ask", [fastest, load])
def test_does_not_touch_random_numbers(gpu, ask):
    inputs = states()
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    ask(*inputs, is_causal=True, trains=True)
    wait_until_loaded()
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_measures_on_gpus_alone(device, free):
    inputs = [x.to(device) for x in states()]
    assert fastest(*inputs, is_causal=True, trains=True) is None
    load(*inputs, is_causal=True, trains=True)
    assert not _sdpa_times._loading


@pytest.fixture
def loaded(gpu, monkeypatch):
    """The kernels that ran forward, and whether in another thread."""
    ran, forward = [], _sdpa_times.forward

    def listening(*args):
        ran.append((args[-1], threading.current_thread() is not threading.main_thread()))
        return forward(*args)

    monkeypatch.setattr(_sdpa_times, "forward", listening)
    return ran


def load_and_wait(**options):
    load(*states(), **{"is_causal": True, "trains": True, **options})
    wait_until_loaded()


@pytest.mark.parametrize("trains", [True, False])
def test_loads_each_kernel_once_in_a_thread(loaded, gpu, trains):
    load_and_wait(trains=trains)
    assert sorted(loaded) == [(name, True) for name in ("cudnn", "efficient", "flash") for _ in ("all tokens", "few")]
    assert gpu.files() == []
    assert not gpu.runs


def test_loads_nothing_twice(loaded):
    for _ in range(4):
        load(*states(), is_causal=True, trains=True)
    wait_until_loaded()
    assert len(loaded) == 6
    choose()
    loaded.clear()
    load_and_wait()
    assert loaded == []


def test_loads_what_an_earlier_process_chose(loaded, gpu):
    choose()
    gpu.restart()
    loaded.clear()
    load_and_wait()
    assert loaded == [("cudnn", True)] * 2
    assert choose() == Times("cudnn", gpu.takes)


def test_measures_when_all_is_loaded(loaded, gpu, monkeypatch):
    free = threading.Event()
    kernels, milliseconds = _sdpa_times._with_kernels, _sdpa_times._milliseconds

    def held(*args):
        if threading.current_thread() is not threading.main_thread():
            assert free.wait(60)
        return kernels(*args)

    def checked(*args):
        assert not _sdpa_times._loading
        assert len([name for name, in_thread in loaded if in_thread]) == 6
        return milliseconds(*args)

    monkeypatch.setattr(_sdpa_times, "_with_kernels", held)
    monkeypatch.setattr(_sdpa_times, "_milliseconds", checked)
    load(*states(), is_causal=True, trains=True)
    threading.Timer(0.2, free.set).start()
    assert choose() == Times("cudnn", gpu.takes)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), TypeError("no such kernel")])
def test_what_cannot_be_loaded_is_of_no_importance(gpu, monkeypatch, error):
    def fails(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(_sdpa_times, "forward", fails)
        load_and_wait()
    assert choose() == Times("cudnn", gpu.takes)


def test_loads_nothing_where_memory_is_short(loaded, gpu):
    gpu.memory = 1 << 10
    load_and_wait()
    assert loaded == []


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def without_cudnn():
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


SETTINGS = [
    lambda: sdpa_kernel(SDPBackend.MATH),
    lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True),
    lambda: sdpa_kernel([*map(SDPBackend, (2, 1, 3, 0))], set_priority=True),
    without_cudnn,
    deterministic,
]


@pytest.mark.parametrize("setting", SETTINGS, ids=["one", "order", "order of all", "without cuDNN", "deterministic"])
def test_settings_of_the_user_count(gpu, setting, monkeypatch):
    """While compiling, and in every call of what was compiled without them."""
    monkeypatch.setattr(_sdpa_kernel, "_takes", lambda *_: True)
    monkeypatch.setattr(_sdpa_kernel, "_backends", {})
    inputs = states(groups=H)
    assert choose().fastest == "cudnn"
    for _ in range(2):
        assert may_choose()
        assert _sdpa_kernel.sdpa_kernel(*inputs, None, True, 0.25, "cudnn") == SDPBackend.CUDNN_ATTENTION
        with setting():
            assert not may_choose()
            assert choose() is None
            own = _sdpa_kernel.sdpa_kernel(*inputs, None, True, 0.25)
            assert _sdpa_kernel.sdpa_kernel(*inputs, None, True, 0.25, "cudnn") == own != SDPBackend.CUDNN_ATTENTION


def test_both_orders_are_pytorchs_own(free):
    """The second one is set where it prefers cuDNN."""
    before = torch._C._get_sdp_priority_order()
    try:
        torch._C._set_sdp_priority_order([3, 1, 2, 0, 4])
        assert may_choose()
    finally:
        torch._C._set_sdp_priority_order(before)
    assert may_choose()


def test_a_kernel_that_does_not_take_the_call_is_not_forced_on_it(device, free):
    inputs = states(device, torch.float64)  # which no fused kernel of a GPU takes
    for name in KERNELS:
        own = _sdpa_launch.fitted(*inputs, None, True, 0.25)[0]
        assert _sdpa_launch.fitted(*inputs, None, True, 0.25, name)[0] == own


SIZES = [
    ((2, 512, 128), 8, 2),
    ((2, 512, 64), 8, 8),
    ((1, 384, 96), 4, 4),
    ((2, 256, 256), 4, 2),
    ((1, 300, 128), 6, 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["causal", "all", "masked"])
@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sizes", "heads", "groups"), SIZES)
def test_every_kernel_is_right(sizes, heads, groups, dtype, layout, way, free):
    """Forward and backward, in both layouts and whatever the gradient's, against float32."""
    q, k, v = (x.contiguous() if layout == "heads" else x for x in states("cuda", dtype, sizes, heads, groups))
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device="cuda").tril(3) if way == "masked" else None
    args, scale = (mask, way == "causal"), q.shape[-1] ** -0.5
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    truth = _sdpa_launch.attend(*exact, *args, scale)[0]
    names = [name for name in KERNELS if _sdpa_launch.fitted(q, k, v, *args, scale, name)[0] == KERNELS[name]]
    assert len(names) >= 1 + (way != "masked")
    for grad in (torch.randn_like(q), torch.randn_like(q).contiguous()):
        wanted = [truth, *torch.autograd.grad(truth, exact, grad.float(), retain_graph=True)]
        for name in names:
            out, lse = _sdpa_launch.forward(q, k, v, *args, scale, name)
            found = [out, *_sdpa_launch.backward(grad, q, k, v, *args, out, lse, scale, name)]
            for ours, exactly in zip(found, wanted, strict=True):
                error = (ours.float() - exactly).norm() / exactly.norm()
                assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3), (name, float(error))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["causal", "masked"])
def test_measures(way, free, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_sdpa_times, "_known", {})
    inputs = states("cuda", torch.bfloat16, (2, 1024, 128), 8, 2)
    mask = torch.ones(1024, 1024, dtype=torch.bool, device="cuda").tril() if way == "masked" else None
    options = {"mask": mask, "is_causal": mask is None}
    found = {trains: fastest(*inputs, trains=trains, **options) for trains in (False, True)}
    if found[True] is None:
        pytest.skip("needs a GPU on which two kernels take this")
    for times in found.values():
        assert all(0 < ms < 100 for ms in times.milliseconds.values())
        assert times.milliseconds[times.fastest] <= _sdpa_times.MARGIN * min(times.milliseconds.values())
    name = found[True].fastest
    assert found[False].milliseconds[name] < found[True].milliseconds[name]
    monkeypatch.setattr(_sdpa_times, "_known", {})
    monkeypatch.setattr(_sdpa_times, "_milliseconds", None)
    assert fastest(*inputs, trains=True, **options) == found[True]
