"""Attention written by hand: recognised by what it computes, in any spelling; what is something else stays."""

import math

import pytest
import torch
import torch.nn.functional as F

B, HEADS, GROUPS, S, D = 2, 4, 2, 9, 16
LOWEST = torch.finfo(torch.float32).min


def inputs(dtype=torch.float32, groups=HEADS):
    shapes = ((B, HEADS, S, D), (B, groups, S, D), (B, groups, S, D))
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def triangle():
    return torch.ones(S, S, dtype=torch.bool).tril()


def filled(q, k, v):
    weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    return F.softmax(weights.masked_fill(triangle().logical_not(), float("-inf")), dim=-1) @ v


def added(q, k, v):
    mask = torch.full((S, S), LOWEST).triu(1)[None, None]
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    return torch.matmul(F.dropout(weights.softmax(-1, dtype=torch.float32).to(q.dtype), 0.0, training=True), v)


def endless(q, k, v):
    return (q @ k.mT / 4 + torch.full((S, S), -torch.inf).triu(1)).softmax(-1) @ v


def chosen(q, k, v):
    scores = q @ k.mT / torch.full([], D**0.5, dtype=q.dtype)
    return torch.where(triangle(), scores, torch.full([], LOWEST, dtype=q.dtype)).softmax(-1) @ v


def chosen_otherwise(q, k, v):
    return torch.where(~triangle(), -1e4, q @ k.mT * 0.25).softmax(-1) @ v


def scaled_after_the_mask(q, k, v):
    return (torch.where(triangle(), q @ k.mT, -1e9) / 4).softmax(-1) @ v


def on_queries(q, k, v):
    return ((q * D**-0.5) @ k.mT).masked_fill(~triangle(), -1e9).softmax(-1) @ v


def on_keys(q, k, v):
    return (q @ (k / 4).mT).masked_fill(~triangle(), -1e9).softmax(-1) @ v


def on_both(q, k, v):
    scale = D**-0.25
    return ((q * scale) @ (k * scale).mT).masked_fill(~triangle(), -1e9).softmax(-1) @ v


def multiplied(q, k, v):
    seen = torch.ones(S, S).tril().view(1, 1, S, S)
    return (q @ k.mT / 4 * seen - 1e4 * (1 - seen)).softmax(-1) @ v


def in_place(q, k, v):
    scores = q @ k.mT
    scores /= 4
    scores.masked_fill_(~triangle(), -torch.inf)
    return scores.softmax(-1) @ v


def by_its_largest(q, k, v):
    scores = (q @ k.mT / 4).masked_fill(~triangle(), -1e9)
    return (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1) @ v


def floored(q, k, v):
    scores = q @ k.mT / 4 + torch.full((S, S), LOWEST).triu(1)
    return torch.max(scores, torch.tensor(LOWEST)).softmax(-1) @ v


def einsum(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.25
    return torch.einsum("bhqk,bhkd->bhqd", scores.masked_fill(~triangle(), -1e9).softmax(-1), v)


def einsum_of_keys_first(q, k, v):
    scores = torch.einsum("bhkd,bhqd->bhqk", k, q) * 0.25
    return torch.einsum("bhkd,bhqk->bhqd", v, scores.masked_fill(~triangle(), -1e9).softmax(-1))


def over_columns(q, k, v):
    scores = (k @ q.mT * 0.25).masked_fill(~triangle().mT, -1e9)
    return v.mT @ scores.softmax(-2)


def heads_last(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~triangle(), -1e9).softmax(-1), v).reshape(B, S, -1)


def flattened(q, k, v):
    q, k, v = (x.reshape(B * HEADS, S, D) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) / 4
    return torch.bmm(scores.masked_fill(~triangle(), -1e9).softmax(-1), v).view(B, HEADS, S, D)


def baddbmm(q, k, v):
    """The scores are four-dimensional for the mask alone."""
    q, k = q.view(B * HEADS, S, D), k.view(B * HEADS, S, D)
    scores = torch.zeros(B * HEADS, S, S, dtype=q.dtype)
    scores = torch.baddbmm(scores, q, k.transpose(1, 2), beta=1.0, alpha=0.25).view(B, HEADS, S, S)
    scores = torch.where(triangle()[None, None], scores, torch.tensor(LOWEST))
    return scores.softmax(-1).to(v.dtype) @ v


def without_beta(q, k, v):
    q, k, v = (x.view(B * HEADS, S, D) for x in (q, k, v))
    scores = torch.baddbmm(torch.empty(B * HEADS, S, S), q, k.mT, beta=0.0, alpha=0.25)
    scores = scores.view(B, HEADS, S, S).masked_fill(~triangle(), LOWEST)
    return torch.bmm(scores.softmax(-1).view(B * HEADS, S, S), v).view(B, HEADS, S, D)


def packed(q, k, v):
    both = torch.cat([x.transpose(1, 2).reshape(B, S, -1) for x in (q, k, v)], -1)
    q, k, v = (x.view(B, S, HEADS, D).transpose(1, 2) for x in both.split(HEADS * D, dim=2))
    out = (q @ k.transpose(-2, -1) / 4).masked_fill(~triangle(), -torch.inf).softmax(-1) @ v
    return out.transpose(1, 2).contiguous().view(B, S, HEADS * D)


def upcast(q, k, v):
    scores = q.float() @ k.float().mT / 4
    return scores.masked_fill(~triangle(), -1e9).softmax(-1).to(v.dtype) @ v


def one_head(q, k, v):
    q, k, v = (x[:, 0] for x in (q, k, v))
    return (q @ k.mT / 4).masked_fill(~triangle(), -torch.inf).softmax(-1) @ v


CAUSAL = [filled, added, endless, chosen, chosen_otherwise, scaled_after_the_mask, on_queries, on_keys, on_both]
CAUSAL += [multiplied, in_place, by_its_largest, floored, einsum, einsum_of_keys_first, over_columns, heads_last]
CAUSAL += [flattened, baddbmm, without_beta, packed, upcast, one_head]


@pytest.mark.parametrize("spelling", CAUSAL)
def test_drops_causal_masks(spelling, verify):
    report = verify(spelling, inputs())
    assert report.counts == {"attention": 1}, report
    assert report.rewritten[0].variant == f"mask of {S} positions dropped, float32"
    assert report.rewritten[0].kernel.endswith("scaled_dot_product_attention")


def test_says_what_is_not_kept(verify):
    """The weights of 4 heads, 64 x 64 numbers each; but for the result, and a number for each of its rows."""

    def causal(q, k, v):
        return (q @ k.mT).masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v

    (site,) = verify(causal, [torch.randn(1, 4, 64, 8).requires_grad_() for _ in range(3)]).rewritten
    weights, result, rows = 4 * 64 * 64 * 4, 4 * 64 * 8 * 4, 4 * 64 * 4
    assert site.saved_bytes == weights - result - rows


def expanded(q, k, v):
    k, v = (x[:, :, None].expand(B, GROUPS, 2, S, D).reshape(B, HEADS, S, D) for x in (k, v))
    return filled(q, k, v)


def interleaved(q, k, v):
    return filled(q, *(x.repeat_interleave(2, dim=1) for x in (k, v)))


def five_dimensions(q, k, v):
    q, k, v = q.view(B, GROUPS, 2, S, D), k[:, :, None], v[:, :, None]
    return filled(q, k, v).reshape(B, HEADS, S, D)


def grouped_einsum(q, k, v):
    q = q.view(B, GROUPS, 2, S, D)
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q, k) / 4
    return torch.einsum("bgrqk,bgkd->bgrqd", scores.masked_fill(~triangle(), -1e9).softmax(-1), v)


def tiled(q, k, v):
    """Head h sees group h % GROUPS: not how SDPA groups them, so it gets every head."""
    return filled(q, *(x.repeat(1, 2, 1, 1) for x in (k, v)))


GROUPED = [expanded, interleaved, five_dimensions, grouped_einsum]


@pytest.mark.parametrize("spelling", [*GROUPED, tiled])
def test_takes_grouped_heads(spelling, verify):
    report = verify(spelling, inputs(groups=GROUPS))
    assert report.counts == {"attention": 1}, report
    assert ("grouped" in report.rewritten[0].variant) == (spelling is not tiled)


def one_group(q, k, v):
    return filled(q, k, v)


def rows_of_heads(q, k, v):
    """All heads' queries are rows of one product with the one head of keys."""
    q = q.transpose(1, 2).reshape(B, S * HEADS, D)
    scores = (q @ k[:, 0].mT / 4).view(B, S, HEADS, S).masked_fill(~triangle()[:, None], -torch.inf)
    return (scores.softmax(-1).view(B, S * HEADS, S) @ v[:, 0]).view(B, S, HEADS * D)


@pytest.mark.parametrize("spelling", [one_group, rows_of_heads])
def test_takes_one_head_of_keys(spelling, verify):
    report = verify(spelling, inputs(groups=1))
    assert report.counts == {"attention": 1}, report
    assert "grouped" in report.rewritten[0].variant


def bidirectional(q, k, v):
    return F.dropout((q @ k.transpose(2, 3) * 0.25).softmax(-1), 0.1, training=False) @ v


def transposed(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return bidirectional(q, k, v).transpose(1, 2).reshape(B, S, -1)


def crossed(q, k, v):
    return bidirectional(q[:, :, :5], k, v)


def unscaled(q, k, v):
    return torch.bmm(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1))


def nothing_hidden(q, k, v):
    return (q @ k.mT * 0.25 + torch.zeros(1, 1, S, S)).softmax(-1) @ v


def of_itself(q, k, v):
    """Queries, keys and values are read from one rearrangement, and the keys from the input as well."""
    x = q.transpose(1, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", x * 0.25, x)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), x) + (v * k).sum()


@pytest.mark.parametrize("spelling", [of_itself, bidirectional, transposed, crossed, unscaled, nothing_hidden])
def test_rewrites_without_a_mask(spelling, verify):
    report = verify(spelling, inputs())
    assert report.counts == {"attention": 1}, report
    assert report.rewritten[0].variant == "no mask, float32"
