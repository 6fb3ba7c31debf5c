"""More spellings of RoPE: how the other half is made, how tables come in, and how queries and keys lie in memory."""

import pytest
import torch
import torch.nn.functional as F

einops = pytest.importorskip("einops")

B, H, S, D = 2, 3, 6, 16
FULL, HALF, PART, SMALL = D, D // 2, 8, 4


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def llama(x, cos, sin):
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def turned_halves(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# How the other half is made.


def rolled_with_signs(x, cos, sin):
    sign = torch.cat((-torch.ones(D // 2), torch.ones(D // 2))).to(x.dtype)
    return x * cos[:, None] + x.roll(D // 2, -1) * sign * sin[:, None]


def rolled_with_signed_table(x, cos, sin):
    sign = torch.where(torch.arange(D) < D // 2, -1.0, 1.0).to(x.dtype)
    return x * cos[:, None] + torch.roll(x, D // 2, dims=-1) * (sin * sign)[:, None]


def rolled_with_doubled_table(x, cos, sin):
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
    return x * cos + x.roll(D // 2, -1) * sin


def swapped_halves(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
    return x * cos + torch.cat((b, a), -1) * sin


def flipped_pairs(x, cos, sin):
    cos = torch.stack((cos, cos), -1).flatten(-2)[:, None]
    sin = torch.stack((-sin, sin), -1).flatten(-2)[:, None]
    return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin


def where(x, cos, sin):
    rotated = torch.where(torch.arange(D) < D // 2, -x.roll(-D // 2, -1), x.roll(D // 2, -1))
    return x * cos[:, None] + rotated * sin[:, None]


def gathered(x, cos, sin):
    index = (torch.arange(D) + D // 2) % D
    sign = torch.where(torch.arange(D) < D // 2, -1.0, 1.0).to(x.dtype)
    return x * cos[:, None] + x[..., index] * sign * sin[:, None]


def times_minus_one(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-1 * b, a), -1) * sin[:, None]


def subtracted(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos[:, None] - torch.cat((b, -a), -1) * sin[:, None]


def subtracted_by_alpha(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.add(x * cos[:, None], torch.cat((b, -a), -1) * sin[:, None], alpha=-1)


def rotated_products(x, cos, sin):
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
    return x * cos + rotate_half(x * sin)


def einops_pairs(x, cos, sin):
    a, b = einops.rearrange(x, "... (d r) -> ... d r", r=2).unbind(-1)
    rotated = einops.rearrange(torch.stack((-b, a), -1), "... d r -> ... (d r)")
    return x * cos[:, None] + rotated * sin[:, None]


def einops_halves(x, cos, sin):
    a, b = einops.rearrange(x, "... (j d) -> ... j d", j=2).unbind(-2)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


# Other operators.


def addcmul(x, cos, sin):
    return torch.addcmul(x * cos[:, None], rotate_half(x), sin[:, None])


def addcmul_of_halves(x, cos, sin):
    a, b, cos, sin = *x.chunk(2, -1), cos[:, None], sin[:, None]
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)


def einsum(x, cos, sin):
    a, b = x.chunk(2, -1)

    def turn(t, table):
        return torch.einsum("bhsd,sd->bhsd", t, table[0])

    return torch.cat((turn(a, cos) - turn(b, sin), turn(b, cos) + turn(a, sin)), -1)


def mapped_over_heads(x, cos, sin):
    return torch.vmap(lambda t: t * cos + rotate_half(t) * sin, in_dims=1, out_dims=1)(x)


def complex_of_halves(x, cos, sin):
    turned = torch.complex(*x.float().chunk(2, -1)) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag), -1).type_as(x)


def complex_of_pairs(x, cos, sin):
    turned = torch.complex(x[..., ::2].float(), x[..., 1::2].float()) * torch.complex(cos, sin)[:, None]
    return torch.stack((turned.real, turned.imag), -1).flatten(-2).type_as(x)


def complex_view_of_halves(x, cos, sin):
    pairs = torch.view_as_complex(torch.stack(x.float().chunk(2, -1), -1).contiguous())
    turned = pairs * torch.view_as_complex(torch.stack((cos, sin), -1))[:, None]
    return torch.cat(torch.view_as_real(turned).unbind(-1), -1).type_as(x)


def polar(x, cos, sin):
    table = torch.polar(torch.ones_like(cos), cos)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * table).reshape_as(x).type_as(x)


def conjugated(x, cos, sin):
    table = torch.polar(torch.ones_like(cos), cos)[:, None].conj()
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * table).flatten(-2).type_as(x)


def exponential(x, cos, sin):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(torch.exp(1j * cos)[:, None] * pairs).flatten(-2).type_as(x)


def matrices_of_pairs(x, cos, sin):
    """As FLUX has it: rows of rotation matrices times pairs."""
    table = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))[:, None]
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).reshape(x.shape).type_as(x)


# How tables come in.


def repeated_by_einops(x, cos, sin):
    cos, sin = (einops.repeat(t, "b n d -> b 1 n (d r)", r=2) for t in (cos, sin))
    return x * cos + rotate_pairs(x) * sin


def scaled_tables(x, cos, sin):
    return llama(x, cos * 1.2079, sin * 1.2079)


def ntk_tables(x, cos, sin):
    base = 10000.0 * 4.0 ** (D / (D - 2))
    angles = torch.outer(torch.arange(x.shape[2]).float(), base ** -(torch.arange(0, D, 2).float() / D))
    angles = torch.cat((angles, angles), -1)[None, None]
    return x * angles.cos().to(x.dtype) + rotate_half(x) * angles.sin().to(x.dtype)


def indexed_tables(x, cos, sin):
    positions = torch.arange(x.shape[2])[None]
    cos, sin = (torch.cat((t[0], t[0]), -1)[positions].unsqueeze(1) for t in (cos, sin))
    return x * cos + rotate_half(x) * sin


def embedded_tables(x, cos, sin):
    positions = torch.arange(x.shape[2])[None]
    cos, sin = (F.embedding(positions, t[0]).unsqueeze(1) for t in (cos, sin))
    return x * cos + rotate_half(x) * sin


def packed_tables(x, cos, sin):
    cos, sin = torch.cat((cos, sin), -1)[:, None].chunk(2, -1)
    return x * cos + rotate_half(x) * sin


def sections(x, cos, sin):
    """Positions in time, height and width take turns by blocks of features."""
    sizes = [2, 3, 3] * 2
    cos, sin = (torch.stack((t, t * 0.5, t * 0.25)) for t in (cos, sin))
    cos, sin = (torch.cat([m[i % 3] for i, m in enumerate(t.split(sizes, -1))], -1)[:, None] for t in (cos, sin))
    return x * cos + rotate_half(x) * sin


def interleaved_sections(x, cos, sin):
    """The same three positions, feature by feature."""
    three = torch.stack((cos, cos * 0.5, cos * 0.25))
    angles = three[0].clone()
    for axis in (1, 2):
        angles[..., axis:6:3] = three[axis][..., axis:6:3]
    angles = torch.cat((angles, angles), -1)[:, None]
    return x * angles.cos() + rotate_half(x) * angles.sin()


def height_and_width(x, cos, sin):
    angles = torch.cat((cos[..., :4], sin[..., :4]), -1)
    angles = torch.cat((angles, angles), -1).unsqueeze(-3)
    return (x.float() * angles.cos() + rotate_half(x.float()) * angles.sin()).to(x.dtype)


# Part of the features.


def partial_repeated(x, cos, sin):
    cos, sin = (t[:, None].repeat_interleave(2, 3) for t in (cos, sin))
    turned, rest = x[..., :8], x[..., 8:]
    return torch.cat((turned * cos + rotate_pairs(turned) * sin, rest), -1)


def partial_of_doubled_tables(x, cos, sin):
    cos, sin = (torch.cat((t, t), -1)[:, None, :, :SMALL].repeat_interleave(2, -1) for t in (cos, sin))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + rotate_pairs(turned) * sin, rest], -1)


def partial_middle(x, cos, sin):
    head, turned, tail = x.split([4, 8, 4], -1)
    return torch.cat((head, turned * cos[:, None] + rotate_half(turned) * sin[:, None], tail), -1)


def partial_by_padding(x, cos, sin):
    cos, sin = F.pad(cos, (0, 8), value=1.0)[:, None], F.pad(sin, (0, 8))[:, None]
    a, b, rest = x.split([4, 4, 8], -1)
    return x * cos + torch.cat((-b, a, rest), -1) * sin


# How queries and keys lie in memory.


def stacked_before_features(x, cos, sin):
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -2).reshape(x.shape)


def pairs_sorted_into_halves(x, cos, sin):
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
    q = x.unflatten(-1, (-1, 2)).transpose(-1, -2).reshape(x.shape)
    return q * cos + rotate_half(q) * sin


def slices_of_tables(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat(
        (x[..., :8] * cos[..., :8] - x[..., 8:] * sin[..., :8], x[..., 8:] * cos[..., 8:] + x[..., :8] * sin[..., 8:]),
        -1,
    )


def queries_and_keys_joined(x, cos, sin):
    return llama(torch.cat((x, x.flip(0)), 1), cos, sin).split([H, H], 1)


def queries_and_keys_stacked(x, cos, sin):
    both = torch.stack((x, x.flip(0)), 2)
    q, k = (both * cos[:, None, None] + rotate_half(both) * sin[:, None, None]).unbind(2)
    return q @ k.mT


def part_of_packed(x, cos, sin):
    packed = x.transpose(1, 2).reshape(B, x.shape[2], 3, 1, D)
    return turned_halves(packed[:, :, :2], cos[:, :, None, None], sin[:, :, None, None]), packed[:, :, 2]


def features_before_the_sequence(x, cos, sin):
    x, cos, sin = x.mT, cos.mT[:, None], sin.mT[:, None]
    a, b = x.chunk(2, -2)
    return (x * cos + torch.cat((-b, a), -2) * sin).mT


def sequence_first(x, cos, sin):
    x = x.permute(2, 0, 1, 3)
    return x * cos[0][:, None, None] + rotate_half(x) * sin[0][:, None, None]


def tokens_in_a_row(x, cos, sin):
    x = x.transpose(1, 2).reshape(-1, H, D)
    cos, sin = (t.expand(B, -1, -1).reshape(-1, 1, D) for t in (cos, sin))
    return x * cos + rotate_half(x) * sin


def heads_in_the_batch(x, cos, sin):
    x = x.flatten(0, 1)
    return x * cos + rotate_half(x) * sin


def scaled(x, cos, sin):
    return llama(x * D**-0.5, cos, sin) * 0.5


def in_place_of_a_copy(x, cos, sin):
    q = x.clone()
    rotated = rotate_half(q)
    return q.mul_(cos[:, None]).add_(rotated.mul_(sin[:, None]))


@torch.compile
def compiled(x, cos, sin):
    return llama(x, cos, sin)


def calls_compiled(x, cos, sin):
    return compiled(x, cos, sin)


SPELLINGS = [
    *((f, FULL) for f in (rolled_with_signs, rolled_with_signed_table, where, gathered, times_minus_one, subtracted)),
    *((f, HALF) for f in (rolled_with_doubled_table, swapped_halves, flipped_pairs, rotated_products)),
    *((f, FULL) for f in (subtracted_by_alpha, einops_pairs, einops_halves, addcmul, mapped_over_heads)),
    *((f, HALF) for f in (addcmul_of_halves, einsum, complex_of_halves, complex_of_pairs, polar)),
    *((f, HALF) for f in (complex_view_of_halves, conjugated, exponential, matrices_of_pairs, repeated_by_einops)),
    *((f, FULL) for f in (scaled_tables, ntk_tables, embedded_tables, packed_tables, sections)),
    *((f, HALF) for f in (interleaved_sections, height_and_width, indexed_tables)),
    *((f, SMALL) for f in (partial_repeated, partial_of_doubled_tables)),
    *((f, PART) for f in (partial_middle, partial_by_padding)),
    *((f, HALF) for f in (stacked_before_features, pairs_sorted_into_halves, part_of_packed)),
    *((f, FULL) for f in (slices_of_tables, queries_and_keys_joined, queries_and_keys_stacked, sequence_first)),
    *((f, FULL) for f in (features_before_the_sequence, tokens_in_a_row, heads_in_the_batch, scaled)),
    *((f, FULL) for f in (in_place_of_a_copy, calls_compiled)),
]
LOW_AND_DYNAMIC = [pair for pair in SPELLINGS if pair[0] not in (addcmul, addcmul_of_halves, einsum)][::3]


def named(value):
    return getattr(value, "__name__", "")


def problem(width, dtype=torch.float32):
    angles = torch.randn(1, S, width)
    return torch.randn(B, H, S, D).to(dtype).requires_grad_(), angles.cos(), angles.sin()


@pytest.mark.parametrize(("spelling", "width"), SPELLINGS, ids=named)
def test_rewrites(spelling, width, verify):
    report = verify(spelling, problem(width))
    assert report.counts == {"rope": 1}, report
    assert report.refused == []


@pytest.mark.parametrize(("spelling", "width"), LOW_AND_DYNAMIC, ids=named)
def test_rewrites_bfloat16_at_dynamic_shapes(spelling, width, verify):
    report = verify(spelling, problem(width, torch.bfloat16), dynamic=True)
    assert report.counts == {"rope": 1}, report


def test_counts_queries_and_keys_of_a_packed_projection(verify):
    def attention(x, cos, sin):
        q, k, v = x.transpose(1, 2).reshape(B, S, 1, 3, D).unbind(3)
        q, k = (t * cos.unsqueeze(2) + rotate_half(t) * sin.unsqueeze(2) for t in (q, k))
        return q, k, v

    assert verify(attention, problem(FULL)).counts == {"rope": 2}


def test_counts_both_axes_of_an_image(verify):
    """Half of the features turn with the height, half with the width."""

    def axial(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat((llama(a, cos, sin), llama(b, cos.roll(1, 1), sin.roll(1, 1))), -1)

    assert verify(axial, problem(PART)).counts == {"rope": 2}
