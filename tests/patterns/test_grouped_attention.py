"""Attention of one query for each head: keys and values of a group are not repeated for each of its queries."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn.attention import SDPBackend, sdpa_kernel

import graphfuse
from graphfuse.kernels import _op, _sdpa_times
from graphfuse.kernels._sdpa_times import Times
from graphfuse.kernels._triton import HAS_TRITON
from graphfuse.patterns import _attention_kernels

needs_interpreter = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter, which runs where there is no GPU"
)

B, HEADS, GROUPS, T, D = 2, 6, 2, 11, 8


def inputs(dtype=torch.float32, queries=1, requires_grad=True):
    shapes = ((B, HEADS, queries, D), (B, GROUPS, T, D), (B, GROUPS, T, D))
    return tuple(torch.randn(shape).to(dtype).requires_grad_(requires_grad) for shape in shapes)


def repeated(x):
    return x[:, :, None].expand(B, GROUPS, HEADS // GROUPS, T, D).reshape(B, HEADS, T, D)


def seen():
    """Positions of a cache that are filled, in each sequence."""
    return (torch.arange(T) < torch.tensor([[4], [9]]))[:, None, None]


def under_a_mask(q, k, v):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen())


def under_numbers(q, k, v):
    mask = torch.zeros(B, 1, 1, T).masked_fill(~seen(), torch.finfo(torch.float32).min).to(q.dtype)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask, scale=0.5)


def under_one_mask(q, k, v):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen()[0, 0])


def without_a_mask(q, k, v):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v))


def told_of_groups(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen(), enable_gqa=True)


def interleaved(q, k, v):
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen())


SPELLINGS = [under_a_mask, under_numbers, under_one_mask, without_a_mask, told_of_groups, interleaved]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rewrites(verify, spelling, dtype):
    report = verify(spelling, inputs(dtype))
    assert report.counts == {"grouped_attention": 1}, report


def several_queries(q, k, v):
    q = q.expand(B, HEADS, 3, D)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen())


def a_mask_for_each_head(q, k, v):
    mask = torch.arange(HEADS)[:, None, None] >= torch.arange(T) - 5
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)


def told_to_be_causal(q, k, v):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)


def another_order(q, k, v):
    """Heads of a group are not side by side."""
    k, v = (x.repeat(1, HEADS // GROUPS, 1, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen())


def heads_of_their_own(q, k, v):
    return F.scaled_dot_product_attention(q, q.expand(B, HEADS, T, D), q.expand(B, HEADS, T, D))


@pytest.mark.parametrize(
    "spelling", [several_queries, a_mask_for_each_head, told_to_be_causal, another_order, heads_of_their_own]
)
def test_leaves_alone(verify, spelling):
    assert verify(spelling, inputs()).counts == {}


def test_copies_no_keys():
    """As a cache is read, without gradients: nothing of the size of all heads is made."""
    given = inputs(requires_grad=False)
    compiled = graphfuse.optimize(under_a_mask, fullgraph=True)
    with torch.no_grad(), fresh_cache():
        found, code = run_and_get_code(compiled, *given)
        torch.testing.assert_close(found, under_a_mask(*given))
    assert f"({B}, {HEADS}, {T}, {D})" not in "".join(code)
    assert f"{B * HEADS * T * D}L" not in "".join(code)


# Keys shared out to programs: what is taken is measured, on a GPU. Here the kernel runs in Triton's interpreter, and
# takes as long as it is told to.
MANY = 600


@pytest.fixture
def gpu(monkeypatch):
    """Kernels run, and what was asked of the measurements, which answer with `gpu.answer`."""
    gpu = SimpleNamespace(answer=None, asked=[])

    def fastest(query, key, value, mask=None, **options):
        shapes = [tuple(x.shape) for x in (query, key, value)]
        gpu.asked.append((*shapes, None if mask is None else tuple(mask.shape), list(options.pop("ways")), options))
        return gpu.answer

    monkeypatch.setattr(_op, "launches", lambda *operands: _op.compute_dtype(*operands) == torch.float32)
    monkeypatch.setattr(_attention_kernels, "fastest", fastest)
    return gpu


def times(**milliseconds):
    return Times(min(milliseconds, key=milliseconds.get), milliseconds)


def cached(keys=MANY, groups=GROUPS, heads=HEADS, dtype=torch.float32):
    """One query and a cache of keys, most of it still empty, without gradients."""
    shapes = ((B, heads, 1, D), (B, groups, keys, D), (B, groups, keys, D))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def over_a_cache(q, k, v):
    seen = (torch.arange(k.shape[2]) < torch.tensor([[70], [9]]))[:, None, None]
    times = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) if times > 1 else x for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@needs_interpreter
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_splits_keys_where_that_is_the_fastest(gpu, verify, counts_calls, inner):
    gpu.answer = times(written=0.047, rows=0.088, split=0.0072)
    with counts_calls() as calls:
        report = verify(over_a_cache, cached(), inner=inner)
    (site,) = report.rewritten
    assert site.variant == "6 queries of 2 heads, float32, by split keys"
    assert site.params["kernel"] == "split"
    assert site.kernel == "graphfuse::grouped_attention"
    told = "in Triton, measured forward: split keys 0.0072 ms, the code as it is 0.047 ms, queries as rows 0.088 ms"
    assert site.kernel_reason.endswith(told)
    assert calls["grouped_attention"]
    shapes = ((B, HEADS, 1, D), (B, GROUPS, MANY, D), (B, GROUPS, MANY, D), (B, 1, 1, MANY))
    assert gpu.asked == [(*shapes, ["written", "rows", "split"], {"is_causal": False, "trains": False})]


@needs_interpreter
def test_keeps_queries_as_rows_where_that_is_the_fastest(gpu, verify):
    gpu.answer = times(written=0.047, rows=0.01, split=0.02)
    (site,) = verify(over_a_cache, cached()).rewritten
    assert site.variant.endswith(", by queries as rows")
    assert site.params["kernel"] == ""


@needs_interpreter
@pytest.mark.parametrize("groups", [GROUPS, HEADS])
def test_leaves_the_code_as_it_is_where_that_is_the_fastest(gpu, verify, groups):
    gpu.answer = times(written=0.0103, rows=0.03, split=0.02)
    report = verify(over_a_cache, cached(groups=groups))
    (site,) = report.refused
    reason = "cost: expected less than 0.01 ms, as the code as it is takes 0.0103, got 0.02"
    assert site.others == {"grouped_attention": reason}  # and it is no attention in training


@needs_interpreter
def test_splits_keys_of_heads_that_share_none(gpu, verify):
    gpu.answer = times(written=0.047, split=0.02)
    (site,) = verify(over_a_cache, cached(groups=HEADS)).rewritten
    assert site.variant == "6 queries of 6 heads, float32, by split keys"
    assert [ways for *_, ways, _ in gpu.asked] == [["written", "split"]]


@needs_interpreter
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("groups", [GROUPS, HEADS])
def test_splits_many_keys_where_nothing_can_be_measured(gpu, verify, groups, dynamic):
    (site,) = verify(over_a_cache, cached(groups=groups), dynamic=dynamic).rewritten
    assert site.params["kernel"] == "split"
    assert "in Triton, for few queries of many keys, not measured" in site.kernel_reason


@needs_interpreter
def test_splits_no_few_keys_without_a_measurement(gpu, verify):
    (site,) = verify(over_a_cache, cached(keys=100)).rewritten
    assert site.params["kernel"] == ""
    assert verify(over_a_cache, cached(keys=100, groups=HEADS)).counts == {}


@needs_interpreter
def test_splits_nothing_that_has_a_gradient(gpu, verify):
    given = tuple(x.requires_grad_() for x in cached())
    (site,) = verify(over_a_cache, given).rewritten
    assert site.params["kernel"] == ""
    assert verify(over_a_cache, tuple(x.requires_grad_() for x in cached(groups=HEADS))).counts == {}
    assert gpu.asked == []


@needs_interpreter
def test_splits_nothing_where_pytorch_is_to_choose(gpu, verify):
    gpu.answer = times(written=0.047, split=0.02)
    (site,) = verify(over_a_cache, cached(), policy="always").rewritten
    assert site.params["kernel"] == ""
    assert verify(over_a_cache, cached(groups=HEADS), policy="always").counts == {}

    def chosen(q, k, v):
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            return over_a_cache(q, k, v)

    (site,) = verify(chosen, cached()).rewritten
    assert site.params["kernel"] == ""
    assert gpu.asked == []


@needs_interpreter
def test_asks_code_that_knows_of_groups_itself(gpu, verify):
    gpu.answer = times(written=0.047, split=0.02)

    def told(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    (site,) = verify(told, cached()).rewritten
    assert site.params["kernel"] == "split"


def test_every_way_computes_the_same():
    q, k, v = cached(keys=40)
    mask = torch.rand(B, 1, 1, 40) < 0.5
    ways = ("_repeated", "_told_of_groups", "_as_rows", "_split")
    found = [getattr(_attention_kernels, way)(q, k, v, mask, 0.3) for way in ways]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("groups", [8, 32])
def test_measures(groups, mode, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_sdpa_times, "_known", {})
    sizes = ((1, 32, 1, 128), (1, groups, 4112, 128), (1, groups, 4112, 128))
    given = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    mask = (torch.arange(4112, device="cuda") < 400)[None, None, None]

    def fn(q, k, v):
        k, v = (x.repeat_interleave(32 // groups, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    compiled = graphfuse.optimize(fn, strict=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(*given), fn(*given), rtol=2e-2, atol=2e-2)
    (site,) = graphfuse.report(compiled).sites
    assert "measured forward: " in site.kernel_reason or "cost: " in f"{site.reason} {site.others}"
