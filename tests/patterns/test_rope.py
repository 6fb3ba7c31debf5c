"""RoPE: whatever convention it follows it is rewritten, and nothing else is."""

import pytest
import torch

import graphfuse

B, H, S, D = 2, 3, 6, 16


def tables(width, *, trainable=False):
    angles = torch.randn(1, S, width)
    cos, sin = angles.cos(), angles.sin()
    return (cos.requires_grad_(), sin.requires_grad_()) if trainable else (cos, sin)


def rotate_half(x):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def llama(x, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return x * cos + rotate_half(x) * sin


def reversed_sign(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((b, -a), dim=-1) * sin.unsqueeze(1)


def swapped_operands(x, cos, sin):
    return sin[:, None] * rotate_half(x) + cos[:, None] * x


def interleaved(x, cos, sin):
    return x * cos[:, None] + rotate_pairs(x) * sin[:, None]


def in_float(x, cos, sin):
    x32 = x.float()
    return (x32 * cos[:, None] + rotate_half(x32) * sin[:, None]).type_as(x)


def halves(x, cos, sin):
    a, b = torch.chunk(x, 2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def pairs_to_halves(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def pairs(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def repeated(x, cos, sin):
    cos, sin = (t[:, None].repeat_interleave(2, dim=-1) for t in (cos, sin))
    return x * cos + rotate_pairs(x) * sin


def partial_head(x, cos, sin):
    turned, rest = x[..., :8], x[..., 8:]
    return torch.cat((turned * cos[:, None] + rotate_half(turned) * sin[:, None], rest), dim=-1)


def partial_tail(x, cos, sin):
    rest, turned = x.split([8, 8], dim=-1)
    return torch.cat((rest, turned * cos[:, None] + rotate_half(turned) * sin[:, None]), dim=-1)


def complex_table(x, cos, sin):
    table = torch.complex(cos, sin)[:, None]
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * table
    return torch.view_as_real(turned).flatten(3).type_as(x)


FULL, HALF, PART = D, D // 2, 8
SPELLINGS = [
    (llama, FULL),
    (reversed_sign, FULL),
    (swapped_operands, FULL),
    (interleaved, FULL),
    (in_float, FULL),
    (halves, HALF),
    (pairs_to_halves, HALF),
    (pairs, HALF),
    (repeated, HALF),
    (partial_head, PART),
    (partial_tail, PART),
    (complex_table, HALF),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spelling", "width"), SPELLINGS, ids=lambda p: getattr(p, "__name__", ""))
def test_rewrites(spelling, width, dtype, verify):
    x = torch.randn(B, S, H, D).to(dtype).requires_grad_()
    cos, sin = tables(width)
    if dtype == torch.bfloat16 and spelling is not complex_table:
        cos, sin = cos.to(dtype), sin.to(dtype)
    report = verify(lambda x, cos, sin: spelling(x.transpose(1, 2), cos, sin), (x, cos, sin))
    assert report.counts == {"rope": 1}, report


def test_counts_each_rotated_tensor(verify):
    def both(q, k, cos, sin):
        return llama(q, cos, sin), llama(k, cos, sin)

    q, k = torch.randn(B, H, S, D, requires_grad=True), torch.randn(B, 1, S, D, requires_grad=True)
    assert verify(both, (q, k, *tables(D))).counts == {"rope": 2}


def one_sign_wrong(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((b, a), dim=-1) * sin[:, None]


def no_rotation(x, cos, sin):
    return x * cos[:, None] + x * sin[:, None]


def three_parts(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None] * 2.0


def rolled(x, cos, sin):
    return x * cos[:, None] + x.roll(1, -1) * sin[:, None]


def wrong_halves(x, cos, sin):
    return x * cos[:, None] + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * sin[:, None]


@pytest.mark.parametrize(
    "lookalike", [one_sign_wrong, no_rotation, three_parts, rolled, wrong_halves], ids=lambda f: f.__name__
)
def test_leaves_alone(lookalike, verify):
    x = torch.randn(B, H, S, D, requires_grad=True)
    assert verify(lookalike, (x, *tables(D))).counts == {}


def test_refuses_trainable_tables(verify):
    x = torch.randn(B, H, S, D, requires_grad=True)
    report = verify(llama, (x, *tables(D, trainable=True)))
    assert [site.reason for site in report.refused] == [
        "cos, sin: expected tables without a gradient, got trainable ones"
    ]


def test_stays_dynamic_in_the_sequence():
    compiled = graphfuse.optimize(llama, inner="eager", dynamic=True, fullgraph=True, strict=True)
    for length in (6, 9, 12):
        x, (cos, sin) = torch.randn(B, H, length, D), (torch.randn(1, length, D) for _ in range(2))
        torch.testing.assert_close(compiled(x, cos, sin), llama(x, cos, sin))
    assert graphfuse.report(compiled).counts == {"rope": 1}
