"""grouped_attention against its reference, and no worse than attention over repeated keys."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from graphfuse.kernels import _op, _sdpa_times, _split_attention_kernel
from graphfuse.kernels._split_attention_kernel import plan_splits
from graphfuse.kernels.grouped_attention import grouped_attention, grouped_attention_reference
from graphfuse.testing import assert_no_worse

B, HEADS, T, D = 2, 4, 23, 16
SEEN = (torch.arange(T) < torch.tensor([[T], [9]]))[:, None, None]


def masks(kind, device, dtype):
    if kind == "none":
        return None
    seen = SEEN.to(device)
    return seen if kind == "bool" else torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -1e4)


def heads(device, groups, dtype):
    sizes = (HEADS, 1), (groups, T), (groups, T)
    return [torch.randn(B, n, length, D, device=device).to(dtype).requires_grad_() for n, length in sizes]


@pytest.mark.parametrize("kind", ["none", "bool", "numbers"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_agrees_with_its_reference(device, groups, kind):
    given = heads(device, groups, torch.float64)
    mask = masks(kind, device, torch.float64)
    out = grouped_attention(*given, mask, scale=0.3)
    wanted = grouped_attention_reference(*given, mask, scale=0.3)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(end, given, grad) for end in (out, wanted)))


@pytest.mark.parametrize("kind", ["none", "bool"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_worse_than_repeated(device, dtype, groups, kind):
    mask = masks(kind, device, dtype)

    def repeated(q, k, v):
        k, v = (x.repeat_interleave(HEADS // groups, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def fused(q, k, v):
        return grouped_attention(q, k, v, mask)

    # In float32 both do the same sums, in another order: the largest of few errors says little.
    slack = 1.1 if dtype == torch.bfloat16 else 4.0
    assert_no_worse(fused, repeated, heads(device, groups, dtype), slack=slack)


# Keys shared out: sequences, heads of queries and of keys, queries, keys, features of keys and of values.
SIZES = {
    "a cache": (1, 8, 2, 1, 301, 32, 32),
    "sequences": (3, 4, 2, 1, 70, 16, 16),
    "heads of their own": (2, 3, 3, 1, 130, 32, 32),
    "odd features": (1, 6, 2, 1, 150, 80, 48),
    "wide": (1, 2, 1, 1, 90, 192, 128),
    "few features": (1, 4, 2, 1, 260, 8, 8),
    "several queries": (1, 8, 2, 3, 200, 16, 16),
    "more rows than a program has": (1, 40, 1, 2, 100, 16, 16),
    "one key": (2, 4, 2, 1, 1, 16, 16),
}
FEW_KINDS = ["bool", "of heads", "added"]
KINDS = [*FEW_KINDS, "none", "holes", "of queries", "lowest", "one for all", "expanded", "nothing seen"]


def states(device, dtype, sizes, layout="heads"):
    batch, queries, groups, length, keys, features, width = sizes
    shapes = (queries, length, features), (groups, keys, features), (groups, keys, width)
    if layout == "tokens":
        return [torch.randn(batch, n, h, d, device=device).to(dtype).transpose(1, 2) for h, n, d in shapes]
    if layout == "features first":
        return [torch.randn(batch, h, d, n, device=device).to(dtype).mT for h, n, d in shapes]
    return [torch.randn(batch, h, n, d, device=device).to(dtype) for h, n, d in shapes]


def mask_of(kind, device, dtype, sizes):
    """Masks of every kind: numbers, or what is seen."""
    batch, queries, _, length, keys, _, _ = sizes
    filled = torch.arange(keys) < torch.tensor([[keys // 3 + 1], [keys], [1]])[:batch]
    lowest = torch.zeros(batch, 1, 1, keys).masked_fill(~filled[:, None, None], torch.finfo(torch.float16).min)
    found = {
        "none": None,
        "bool": filled[:, None, None],
        "holes": torch.rand(batch, 1, 1, keys) < 0.3,
        "of queries": torch.rand(batch, 1, length, keys) < 0.5,
        "of heads": torch.rand(batch, queries, 1, keys) < 0.5,
        "added": torch.randn(batch, 1, length, keys).masked_fill(torch.rand(keys) < 0.2, -torch.inf).to(dtype),
        "lowest": lowest.to(dtype),
        "one for all": filled[:1],
        "expanded": filled[:1, None, None].expand(batch, queries, length, keys),
        "nothing seen": torch.zeros(batch, 1, 1, keys, dtype=torch.bool),
    }[kind]
    return None if found is None else found.to(device)


def eager(query, key, value, mask):
    """What the code does, in float64 too."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    mask = mask.to(query.dtype) if mask is not None and mask.is_floating_point() else mask
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def split(query, key, value, mask):
    return grouped_attention(query, key, value, mask, scale=query.shape[-1] ** -0.5, kernel="split")


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in SIZES for kind in KINDS if kind in FEW_KINDS or name in {"a cache", "several queries"}],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_is_no_worse_than_eager(path, device, dtype, name, kind):
    sizes = SIZES[name]
    given = states(device, dtype, sizes)
    mask = mask_of(kind, device, dtype, sizes)
    slack = 4.0 if dtype == torch.float32 else 1.25
    assert_no_worse(split, eager, (*given, mask), slack=slack)


@pytest.mark.parametrize("layout", ["tokens", "features first"])
@pytest.mark.parametrize("kind", ["none", "bool", "of queries"])
@pytest.mark.parametrize("dtype", [torch.float32])
def test_split_takes_any_strides(path, device, dtype, kind, layout):
    sizes = SIZES["several queries"]
    given = states(device, dtype, sizes, layout)
    mask = mask_of(kind, device, dtype, sizes)
    mask = mask if mask is None else mask.mT.contiguous().mT
    torch.testing.assert_close(split(*given, mask), eager(*given, mask))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_split_reads_no_keys_of_hidden_blocks(path, device, dtype):
    """Where all of a block is hidden, its keys and values may be anything; and so beyond the last key seen."""
    sizes = SIZES["a cache"]
    query, key, value = states(device, dtype, sizes)
    mask = mask_of("bool", device, dtype, sizes)
    wanted = eager(query, key, value, mask)
    if path == "triton":
        key[:, :, 128:] = value[:, :, 128:] = torch.nan
    torch.testing.assert_close(split(query, key, value, mask), wanted)


@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, -1e9, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32])
def test_split_gives_what_eager_does_where_nothing_is_seen(path, device, dtype, number):
    """Behind -inf 0, behind numbers the mean of all values."""
    sizes = SIZES["sequences"]
    query, key, value = states(device, dtype, sizes)
    mask = torch.zeros(3, 1, 1, sizes[4], device=device)
    mask[1] = number
    found = split(query, key, value, mask)
    if device == "cpu":  # eager's kernels on a GPU lose the mean behind the smallest number
        torch.testing.assert_close(found, eager(query, key, value, mask))
    mean = 0 * value[1] if number == -torch.inf else value[1]
    torch.testing.assert_close(found[1, :, 0], mean.mean(1).repeat_interleave(2, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["query", "key", "value", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32])
def test_split_hides_no_nan(path, device, dtype, place):
    sizes = SIZES["a cache"]
    given = [*states(device, dtype, sizes), torch.zeros(1, 1, 1, sizes[4], device=device)]
    given[["query", "key", "value", "mask"].index(place)][0, 0, -1, -1] = torch.nan
    torch.testing.assert_close(split(*given), eager(*given), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_split_has_the_same_bits_in_every_run(path, device, dtype):
    sizes = SIZES["a cache"]
    given = (*states(device, dtype, sizes), mask_of("holes", device, dtype, sizes))
    assert torch.equal(split(*given), split(*given))


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("sizes", [(1, 8, 2, 1, 301, 32, 32), (0, 4, 2, 1, 8, 16, 16), (1, 4, 2, 1, 0, 16, 16)])
def test_split_is_an_op(path, device, dtype, sizes):
    given = states(device, dtype, sizes)
    torch.library.opcheck(torch.ops.graphfuse.grouped_attention, (*given, None, 0.25))
    torch.testing.assert_close(split(*given, None), eager(*given, None))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_split_has_no_gradient(path, device, dtype):
    given = [x.requires_grad_() for x in states(device, dtype, SIZES["sequences"])]
    out = split(*given, None)
    with pytest.raises(RuntimeError, match='kernel: expected "" where a gradient is wanted, got "split"'):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32])
def test_split_and_inductor(path, device, dtype):
    sizes = SIZES["a cache"]
    given = (*states(device, dtype, sizes), mask_of("bool", device, dtype, sizes))
    torch.testing.assert_close(torch.compile(split, fullgraph=True)(*given), eager(*given))


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 9).bool(), torch.full((1, 9), -torch.inf)])
def test_ways_are_timed_with_nothing_hidden(mask, monkeypatch, tmp_path):
    """And the answer is kept, as that of PyTorch's kernels is: tests/kernels/test_sdpa_times.py."""
    takes = {"written": 2.0, "split": 1.0}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(_sdpa_times, "may_choose", lambda: True)
    for name, answer in {"_is_measurable": True, "_machine": {}, "_free_memory": 1 << 40}.items():
        monkeypatch.setattr(_sdpa_times, name, lambda _, answer=answer: answer)
    monkeypatch.setattr(_sdpa_times, "_milliseconds", lambda run: takes[run.args[0]])

    def way(query, key, value, seen, scale):
        assert mask is seen is None or (seen.float().exp() >= 1).all()
        return eager(query, key, value, seen)

    given = states("cpu", torch.float32, (1, 4, 2, 1, 9, 16, 16))
    for _ in range(2):
        monkeypatch.setattr(_sdpa_times, "_known", {})
        options = {"is_causal": False, "trains": False, "ways": {"written": way, "split": way}}
        found = _sdpa_times.fastest(*given, mask, **options)
        assert found == _sdpa_times.Times("split", {"written": 2.0, "split": 1.0})
        takes = {"written": 1.0, "split": 0.99}  # of which nothing is asked


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("features", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("keys", [1, 63, 512, 4112, 32768])
@pytest.mark.parametrize("groups", [1, 8, 256])
def test_plans_programs_for_every_multiprocessor(groups, keys, features, itemsize):
    plan = plan_splits(groups, 4, keys, features, features, itemsize, False, 132)
    blocks = -(-keys // plan.block_n)
    assert 1 <= plan.splits <= blocks
    assert plan.splits * groups <= max(groups, 132 * _split_attention_kernel.PER_SM)
    longest = -(-blocks // plan.splits)
    assert (plan.splits - 1) * longest < blocks  # every program has a block, and none many more than others
    if groups == 8 and keys > 4096:
        assert plan.splits * groups >= 132
    assert plan.block_n * (plan.block_d + plan.block_e) * itemsize <= max(
        _split_attention_kernel.BLOCK_BYTES, 16 * 512 * itemsize
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(1, 32, 8, 1, 4112, 128, 128), (8, 32, 8, 1, 999, 128, 64), (1, 4, 4, 1, 999, 80, 80)]
)
def test_split_fits_cuda_graphs(sizes, dtype):
    given = (*states("cuda", dtype, sizes), torch.rand(sizes[0], 1, 1, sizes[4], device="cuda") < 0.3)
    wanted = split(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = split(*given)
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, wanted)
    assert _op.launches(given[0])
    assert_no_worse(split, eager, given)
