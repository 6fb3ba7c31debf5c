"""Rows of attention that see nothing: their weights go by what hides them, or by what it leaves of their scores."""

import pytest
import torch
import torch.nn.functional as F

import graphfuse
from tests.patterns.test_attention_masks import LEFT, LOWEST, B, S, inputs, triangle


def hidden_by(padding, number):
    return (1.0 - padding[:, None, None, :].float()) * number


def above(number):
    return torch.zeros(S, S).masked_fill(~triangle(), number)


def seen_by(padding):
    return padding[:, None, None, :] != 0


SEEING_NOTHING = {
    "one number added": lambda z, p: z + torch.where(triangle() & seen_by(p), 0.0, LOWEST),
    "two numbers added": lambda z, p: z + above(LOWEST) + hidden_by(p, LOWEST),
    "a number and infinity added": lambda z, p: z + above(-torch.inf) + hidden_by(p, -1e9),
    "a number added to infinity": lambda z, p: z.masked_fill(~triangle(), -torch.inf) + hidden_by(p, LOWEST),
    "infinity in the place of a number": lambda z, p: (z + hidden_by(p, -1e9)).masked_fill(~triangle(), -torch.inf),
    "the larger number last": lambda z, p: z.masked_fill(~triangle(), LOWEST).masked_fill(~seen_by(p), -1e9),
    "the smaller number last": lambda z, p: z.masked_fill(~triangle(), -1e4).masked_fill(~seen_by(p), -1e9),
}


@pytest.mark.parametrize("mask", SEEING_NOTHING.values(), ids=SEEING_NOTHING)
def test_rows_that_see_nothing_go_by_the_numbers_that_hide(mask, agrees):
    """A position behind an infinity, or behind a smaller number than others, is not one of those with equal weights."""

    def masked(q, k, v, padding):
        return mask(q @ k.mT / 4, padding).softmax(-1) @ v

    compiled = graphfuse.optimize(masked, inner="eager", fullgraph=True, strict=True)
    for padding in (torch.ones_like(LEFT), LEFT):
        agrees(compiled, masked, (*inputs(), padding))
    assert graphfuse.report(compiled).counts == {"attention": 1}


@pytest.mark.parametrize("is_fused", [False, True], ids=["by hand", "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        (torch.float16, -65504.0),
        (torch.bfloat16, -1e4),
        (torch.bfloat16, -1e6),
        (torch.float32, -1e6),
        (torch.float32, -1e9),
        (torch.float32, LOWEST),
    ],
    ids=str,
)
def test_scores_that_numbers_leave_something_of(dtype, number, is_fused):
    """Rows that see nothing go by their scores as far as the dtype of the sum keeps them: SDPA's is float32."""

    def masked(q, k, v, padding):
        mask = torch.zeros((), dtype=q.dtype).expand(B, 1, S, S).masked_fill(~(triangle() & seen_by(padding)), number)
        if is_fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (q @ k.mT / 4 + mask).softmax(-1) @ v

    given = tuple((2 * x).detach().to(dtype) for x in inputs())
    compiled = graphfuse.optimize(masked, inner="eager", fullgraph=True, strict=True)
    found, expected = compiled(*given, LEFT), masked(*given, LEFT)
    assert sum(graphfuse.report(compiled).counts.values()) == 1
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float32: 1e-3 if number > -1e8 else 1e-5}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
