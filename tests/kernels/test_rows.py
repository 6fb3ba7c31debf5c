"""Rows that go where an index says: sums over tokens, and rows put back."""

import pytest
import torch

from graphfuse.kernels import _rows
from graphfuse.kernels._rows import put_rows_
from graphfuse.testing import assert_no_worse

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
V = 40

pytestmark = pytest.mark.usefixtures("path")


def table_gradient(grad, tokens, rows=V, padding=-1, scale=False):
    return torch.ops.graphfuse.embedding_backward(grad, tokens, rows, padding, scale)


def eager(grad, tokens, rows=V, padding=-1, scale=False):
    return torch.ops.aten.embedding_dense_backward(grad, tokens, rows, padding, scale)


@HALF
@pytest.mark.parametrize("features", [1, 8, 24])
def test_sums_the_tokens_of_a_row(dtype, features, device):
    """Rows of no token, of one, and of more than a program has at a time."""
    tokens = torch.randint(1, V, (5, 9), device=device)
    tokens[0] = 7
    tokens[1:4, 2:7] = 39
    grad = torch.randn(5, 9, features, device=device, dtype=dtype)
    assert_no_worse(table_gradient, eager, (grad, tokens))
    assert not table_gradient(grad, tokens)[0].any()


def test_leaves_the_row_of_the_padding_at_zero(device):
    tokens = torch.tensor([3, 4, 3, 5], device=device)
    grad = torch.randn(4, 6, device=device)
    assert_no_worse(table_gradient, eager, (grad, tokens), {"padding": 3})


@pytest.mark.parametrize("scale", [False, True])
def test_takes_any_layout(scale, device):
    tokens = torch.randint(V, (6, 4), device=device).t().int()
    grad = torch.randn(6, 6, 4, device=device).permute(2, 0, 1)
    assert_no_worse(table_gradient, eager, (grad, tokens), {"scale": scale})


@HALF
def test_adds_to_what_is_there(dtype, device):
    """The sum is rounded once; other rows, and that of the padding, stay as they are."""
    tokens = torch.randint(4, 9, (30,), device=device)
    table, grad = torch.randn(V, 24, device=device).to(dtype), torch.randn(30, 24, device=device).to(dtype)

    def added(table, grad):
        found = table.clone()
        torch.ops.graphfuse.embedding_backward_(found, grad, tokens, 5)
        return found

    assert_no_worse(added, lambda table, grad: table + eager(grad, tokens, padding=5), (table, grad))
    others = [*range(4), 5, *range(9, V)]
    assert torch.equal(added(table, grad)[others], table[others])


def test_adds_to_any_layout(device):
    tokens, table = torch.randint(V, (6,), device=device), torch.zeros(4, V, device=device).t()
    grad = torch.randn(6, 4, device=device)
    torch.ops.graphfuse.embedding_backward_(table, grad, tokens, -1)
    torch.testing.assert_close(table, eager(grad, tokens))


def test_of_no_token(device):
    found = table_gradient(torch.ones(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device))
    assert found.shape == (V, 4)
    assert not found.any()


def test_is_the_same_in_every_run(device):
    tokens, grad = torch.randint(3, (200,), device=device), torch.randn(200, 8, device=device)
    assert torch.equal(table_gradient(grad, tokens), table_gradient(grad, tokens))


def test_passes_opcheck(device):
    grad, tokens = torch.randn(3, 4, 8, device=device), torch.randint(9, (3, 4), device=device)
    torch.library.opcheck(torch.ops.graphfuse.embedding_backward.default, (grad, tokens, 9, -1, False))


@pytest.mark.parametrize("features", [1, 6, 32])
def test_puts_rows_where_they_belong(features, device, monkeypatch):
    monkeypatch.setattr(_rows, "BLOCK_H", 16)
    out, rows = torch.zeros(9, features, device=device), torch.randn(4, features, device=device)
    places = torch.tensor([8, 0, 5, 2], device=device)
    expected = out.index_copy(0, places, rows)
    put_rows_(out, places, rows)
    assert torch.equal(out, expected)


def test_puts_rows_into_any_layout(device):
    out, rows = torch.zeros(6, 9, device=device).t(), torch.randn(6, 4, device=device).t()
    places = torch.tensor([8, 0, 5, 2], device=device)
    expected = out.index_copy(0, places, rows)
    put_rows_(out, places, rows)
    assert torch.equal(out, expected)
