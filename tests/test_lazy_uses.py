"""Lazy logits in the hands of code that knows nothing of them: changes in place, NumPy, copies, iteration."""

import copy

import numpy
import pytest
import torch
from torch.utils.data import default_collate

from tests.test_lazy import V
from tests.test_lazy_autograd import B, S, assert_as_eager, fused, read


@pytest.fixture
def tokens():
    return torch.randint(V, (B, S))


def divided(m, z, y):
    z /= 0.7
    return fused(z, y).backward(), z


def forbidden_classes(m, z, y):
    z[..., 3] = -torch.inf
    z.masked_fill_((y % 2 == 0).unsqueeze(-1), 0.5)
    z.logsumexp(-1).mean().backward()
    return (z,)


def a_view_written(m, z, y):
    last, rows = z[:, -1], z.view(-1, V)
    last.div_(2.0)
    rows[0].zero_()
    (fused(z, y) + last.cos().mean()).backward()
    return z, last, rows


def a_view_of_a_view_written(m, z, y):
    first = z[0]
    rows = first[1:]
    rows.mul_(2.0)
    first.add_(1.0)
    fused(z, y).backward()
    return z, first, rows


def summed_in_place(m, z, y):
    other = m(y)
    z += other
    fused(z, y).backward()
    return z, other


def retained_after_a_change(m, z, y):
    z.mul_(0.5)
    value = fused(z, y)
    z.retain_grad()
    value.backward()
    return (z.grad,)


def grad_after_a_change(m, z, y):
    z.mul_(0.5)
    return torch.autograd.grad(fused(z, y), z)


def written_after_the_loss(m, z, y):
    value = fused(z, y)
    z.mul_(0.0)
    value.backward()
    return value, z


def detached_in_place(m, z, y):
    view = z[0]
    z.detach_()
    (view.square().mean() + z.mean()).backward()
    return z.requires_grad, z


def written_through_data(m, z, y):
    z.data.div_(2.0)
    read(z, y).backward()
    return (z,)


WRITTEN = [divided, forbidden_classes, a_view_written, a_view_of_a_view_written, summed_in_place, detached_in_place]
WRITTEN += [retained_after_a_change, grad_after_a_change, written_after_the_loss, written_through_data]


@pytest.mark.parametrize("use", WRITTEN, ids=lambda f: f.__name__)
def test_changes_in_place(use, tokens):
    assert_as_eager(use, tokens)


def about(m, z, y):
    return (z.requires_grad, z.grad_fn is not None, z.is_leaf, z.retains_grad, z.grad is None, torch.is_tensor(z)), len(
        z
    )


def as_numbers(m, z, y):
    z = z.detach()
    arrays = [numpy.asarray(z), z.numpy(), numpy.stack([row.numpy() for row in z])]
    return *map(torch.from_numpy, arrays), torch.tensor(z.tolist()), z[0, 0, 0].item()


def numbers_need_detach(m, z, y):
    with pytest.raises(RuntimeError) as caught:
        z.numpy()
    with pytest.raises(RuntimeError) as again:
        numpy.asarray(z)
    return str(caught.value), str(again.value)


def joined(m, z, y):
    a, b = z, m(y)
    found = torch.stack([a, b]), torch.cat([a, b]), torch.cat([a[:, :2], b[:, 2:]], 1), torch.stack(list(a))
    sum(each.sin().mean() for each in found).backward()
    return *found, *z


def copied(m, z, y):
    z = z.detach()
    return copy.deepcopy({"logits": z})["logits"], copy.copy(z), z.data, default_collate([z[0], z[1]])


def transformed(m, z, y):
    z = z.detach()
    value, pull = torch.func.vjp(torch.sin, z)
    by_row = torch.func.vmap(lambda row: row.sigmoid().sum())(z)
    return value, *pull(torch.ones_like(z)), by_row, torch.func.grad(lambda z: fused(z, y))(z)


def read_without_gradients(m, z, y):
    with torch.no_grad():
        copied, row = z + 0, z[0].softmax(-1) + 0
    with torch.inference_mode():
        again = (z * 2 + 0).clone()
    read(z, y).backward()
    return copied, row, again.numpy().sum(), copied.requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    "use",
    [about, as_numbers, numbers_need_detach, joined, copied, transformed, read_without_gradients],
    ids=lambda f: f.__name__,
)
def test_is_used_as_a_tensor(use, tokens):
    assert_as_eager(use, tokens, inner="aot_eager")
