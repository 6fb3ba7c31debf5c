"""Attention under a mask: what is the plain causal one is told so, what is not keeps its mask."""

import pytest
import torch
import torch.nn.functional as F

B, HEADS, GROUPS, S, D = 2, 4, 2, 9, 16


def inputs():
    shapes = ((B, HEADS, S, D), (B, GROUPS, S, D), (B, GROUPS, S, D))
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def repeated(x):
    return x[:, :, None].expand(B, GROUPS, HEADS // GROUPS, S, D).reshape(B, HEADS, S, D)


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)


def triangle(q, k, v):
    return attend(q, k, v, torch.ones(S, S, dtype=torch.bool).tril()[None, None])


def of_positions(q, k, v):
    rows = torch.arange(S)
    return attend(q, k, v, (rows[None, :] <= rows[:, None]).expand(B, 1, S, S))


def additive(q, k, v):
    mask = torch.full((S, S), torch.finfo(torch.float32).min).triu(1)
    return attend(q, k, v, mask.expand(B, 1, S, S))


def wide_window(q, k, v):
    rows = torch.arange(S)
    return attend(q, k, v, (rows[None, :] <= rows[:, None]) & (rows[:, None] - rows[None, :] < 4096))


def one_document(q, k, v):
    rows = torch.arange(S)
    document = (torch.diff(rows, prepend=rows[:1] - 1) != 1).cumsum(0)
    return attend(q, k, v, (rows[None, :] <= rows[:, None]) & (document[None, :] == document[:, None]))


@pytest.mark.parametrize("spelling", [triangle, of_positions, additive, wide_window, one_document])
def test_rewrites(spelling, verify):
    report = verify(spelling, inputs())
    assert report.counts == {"causal_attention": 1}, report
    assert "grouped" in report.rewritten[0].variant


def window(q, k, v):
    rows = torch.arange(S)
    return attend(q, k, v, (rows[None, :] <= rows[:, None]) & (rows[:, None] - rows[None, :] < 4))


def strictly_below(q, k, v):
    rows = torch.arange(S)
    return attend(q, k, v, (rows[None, :] < rows[:, None]) | (rows[:, None] == 0))


def upper(q, k, v):
    return attend(q, k, v, torch.ones(S, S, dtype=torch.bool).triu())


@pytest.mark.parametrize("lookalike", [window, strictly_below, upper])
def test_refuses_other_constants(lookalike, verify):
    report = verify(lookalike, inputs())
    assert [site.reason for site in report.refused] == ["mask: expected the lower triangle, got another constant"]


def test_refuses_masks_that_depend_on_an_input(verify):
    def padded(q, k, v, padding):
        return attend(q, k, v, torch.ones(S, S, dtype=torch.bool).tril() & padding[:, None, None, :])

    report = verify(padded, (*inputs(), torch.ones(B, S, dtype=torch.bool)))
    (site,) = report.refused
    assert site.reason.startswith("mask: expected to depend on sizes only")
