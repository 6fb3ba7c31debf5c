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


def doubled_tables(x, cos, sin):
    cos, sin = torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((sin, sin), -1).unsqueeze(1)
    return (x * cos) + (rotate_half(x) * sin)


def negated_table(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    d = x.shape[3] // 2
    a, b = x[..., :d], x[..., d:]
    return torch.cat([a * cos + b * sin, a * (-sin) + b * cos], 3).to(x.dtype)


def pairs_in_float(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).type_as(x)


def pairs_reordered_first(x, cos, sin):
    b, h, s, d = x.shape
    x = x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def of_a_slice(x, cos, sin):
    turned = x[..., : cos.shape[-1]]
    return turned * cos[:, None] + rotate_half(turned) * sin[:, None]


def polar_table(x, cos, sin):
    table = torch.polar(torch.ones_like(cos, dtype=torch.float32), cos.float())[:, None]
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * table
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def in_place(x, cos, sin):
    y = x * cos[:, None]
    y += rotate_half(x).mul_(sin[:, None])
    return y


def heads_after_the_sequence(x, cos, sin):
    x = x.transpose(1, 2)
    return x * cos.unsqueeze(2) + rotate_half(x) * sin.unsqueeze(2)


def tables_made_inside(x, cos, sin):
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, D, 2, dtype=torch.float32) / D))
    angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return x * angles.cos().to(x.dtype) + rotate_half(x) * angles.sin().to(x.dtype)


def stacked_halves(x, cos, sin):
    a, b = x.view(*x.shape[:-1], 2, -1).unbind(-2)
    rotated = torch.stack((-b, a), dim=-2).flatten(-2)
    return torch.add(torch.mul(x, cos[:, None]), torch.mul(rotated, sin[:, None]))


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
    (doubled_tables, HALF),
    (negated_table, HALF),
    (pairs_in_float, HALF),
    (pairs_reordered_first, FULL),
    (of_a_slice, PART),
    (polar_table, HALF),
    (in_place, FULL),
    (heads_after_the_sequence, FULL),
    (tables_made_inside, FULL),
    (stacked_halves, FULL),
]
VARIANTS = [
    (llama, FULL, "half"),
    (negated_table, HALF, "half, reversed"),
    (pairs_in_float, HALF, "interleaved"),
    (pairs_reordered_first, FULL, "interleaved, to half"),
    (pairs_to_halves, HALF, "interleaved, to half"),
    (partial_tail, PART, "half, 8 of 16 features"),
    (polar_table, HALF, "interleaved, complex table"),
]


def named(value):
    return getattr(value, "__name__", "")


def problem(width, dtype=torch.float32):
    return torch.randn(B, H, S, D).to(dtype).requires_grad_(), *tables(width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spelling", "width"), SPELLINGS, ids=lambda p: getattr(p, "__name__", ""))
def test_rewrites(spelling, width, dtype, verify):
    x = torch.randn(B, S, H, D).to(dtype).requires_grad_()
    cos, sin = tables(width)
    if dtype == torch.bfloat16 and spelling is not complex_table:
        cos, sin = cos.to(dtype), sin.to(dtype)
    report = verify(lambda x, cos, sin: spelling(x.transpose(1, 2), cos, sin), (x, cos, sin))
    assert report.counts == {"rope": 1}, report


@pytest.mark.parametrize(("spelling", "width"), SPELLINGS, ids=named)
def test_rewrites_at_dynamic_shapes(spelling, width, verify):
    report = verify(spelling, problem(width), dynamic=True)
    assert report.counts == {"rope": 1}, report


@pytest.mark.parametrize(("spelling", "width", "variant"), VARIANTS, ids=named)
def test_names_the_convention(spelling, width, variant, verify):
    (site,) = verify(spelling, problem(width)).sites
    assert site.variant == f"{variant}, float32"


@pytest.mark.parametrize(("spelling", "width"), [(llama, FULL), (halves, HALF), (partial_head, PART)], ids=named)
def test_rewrites_low_precision_with_wide_tables(spelling, width, verify):
    report = verify(spelling, problem(width, torch.bfloat16))
    assert report.counts == {"rope": 1}, report


@pytest.mark.parametrize(("spelling", "width"), [(llama, FULL), (halves, HALF), (pairs_in_float, HALF)], ids=named)
def test_rewrites_under_autocast(spelling, width, verify):
    matrix = torch.randn(D, D, requires_grad=True)

    def projected(x, cos, sin, matrix):
        return spelling(x @ matrix, cos, sin)

    report = verify(projected, (*problem(width), matrix), autocast=True)
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


def swapped_outputs(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    cos, sin = (t[:, None, :, : D // 2] for t in (cos, sin))
    return torch.cat((b * cos + a * sin, a * cos - b * sin), dim=-1)


def two_tensors(x, cos, sin):
    return x * cos[:, None] + rotate_half(x.tanh()) * sin[:, None]


def third_table(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    cos, sin = (t[:, None, :, : D // 2] for t in (cos, sin))
    return torch.cat((a * cos - b * sin, b * cos + a * sin.exp()), dim=-1)


@pytest.mark.parametrize(
    "lookalike",
    [one_sign_wrong, no_rotation, three_parts, rolled, wrong_halves, swapped_outputs, two_tensors, third_table],
    ids=lambda f: f.__name__,
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


def from_positions(x, frequencies, scale):
    """Tables made on the way, as models do."""
    angles = (frequencies[:, None] * torch.arange(x.shape[-2], dtype=torch.float32)[None]).T
    angles = torch.cat((angles, angles), -1)[None]
    return llama(x, angles.cos() * scale, angles.sin() * scale)


@pytest.mark.parametrize("spelling", [llama, from_positions], ids=named)
def test_stays_dynamic_in_the_sequence(spelling):
    """One graph for all lengths."""
    compiled = graphfuse.optimize(spelling, inner="eager", dynamic=True, fullgraph=True, strict=True)
    for length in (6, 9, 12):
        x, tables = torch.randn(B, H, length, D), [torch.randn(1, length, D) for _ in range(2)]
        inputs = (x, *tables) if spelling is llama else (x, torch.rand(D // 2), 1.0)
        torch.testing.assert_close(compiled(*inputs), spelling(*inputs))
    report = graphfuse.report(compiled)
    assert [(site.pattern, site.status) for site in report.sites] == [("rope", "rewritten")]


def uses_rotated(x, cos, sin):
    rotated = rotate_half(x)
    return x * cos[:, None] + rotated * sin[:, None], rotated.tanh()


def uses_product(x, cos, sin):
    product = x * cos[:, None]
    return product + rotate_half(x) * sin[:, None], product


def adds_after(x, cos, sin):
    return llama(x, cos, sin).add_(1.0)


@pytest.mark.parametrize("spelling", [uses_rotated, uses_product, adds_after], ids=named)
def test_stays_right_where_others_reach_in(spelling, verify):
    report = verify(spelling, problem(FULL))
    assert report.counts == {"rope": 1}, report


def changes_x_between(x, cos, sin):
    x = x + 1
    rotated = rotate_half(x)
    x.mul_(2)
    return x * cos[:, None] + rotated * sin[:, None]


def changes_table_after_its_use(x, cos, sin):
    cos = cos.clone()
    product = x * cos[:, None]
    cos[:, 0] = 0
    return product + rotate_half(x) * sin[:, None], cos


def changes_product_between(x, cos, sin):
    product = x * cos[:, None]
    product[..., 0] = 0
    return product + rotate_half(x) * sin[:, None]


@pytest.mark.parametrize(
    "spelling", [changes_x_between, changes_table_after_its_use, changes_product_between], ids=named
)
def test_leaves_values_that_change_alone(spelling, verify):
    x, cos, sin = problem(FULL)
    assert verify(spelling, (x.detach(), cos, sin)).rewritten == []


def test_leaves_random_numbers_alone():
    def fn(x, cos, sin):
        return torch.dropout(x * cos[:, None], 0.5, True) + rotate_half(x) * sin[:, None]

    compiled = graphfuse.optimize(fn, inner="eager", fullgraph=True, strict=True)
    assert compiled(*problem(FULL)).isfinite().all()
    assert graphfuse.report(compiled).rewritten == []


def turns_the_tail(x, cos, sin):
    kept, turned = x[..., :-8], x[..., -8:]
    return torch.cat((kept, turned * cos[:, None] + rotate_half(turned) * sin[:, None]), dim=-1)


def test_guards_widths():
    """A convention is found at one width and may not hold at another."""
    compiled = graphfuse.optimize(turns_the_tail, inner="eager", dynamic=True, fullgraph=True, strict=True)
    for width in (16, 24, 16):
        x, cos, sin = torch.randn(B, H, S, width), *tables(8)
        torch.testing.assert_close(compiled(x, cos, sin), turns_the_tail(x, cos, sin))
    assert graphfuse.report(compiled).counts == {"rope": 1}
