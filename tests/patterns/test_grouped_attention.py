"""Attention of one query for each head: keys and values of a group are not repeated for each of its queries."""

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache, run_and_get_code

import graphfuse

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
