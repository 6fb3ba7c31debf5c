"""Folding: the fewest dims that still reach every element of every tensor."""

import itertools

import pytest
import torch

from graphfuse.kernels._strides import fold

BASE = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)


def reached(dims, which):
    """Offsets of the elements of a tensor, in the order in which the dims reach them."""
    steps = [[index * strides[which] for index in range(size)] for size, strides in dims]
    return [sum(offsets) for offsets in itertools.product(*steps)]


def test_takes_dense_tensors_of_one_layout_as_one_row():
    stride = BASE.transpose(1, 3).stride()
    assert fold((2, 5, 4, 3), stride, stride) == [(120, (1, 1))]


def test_keeps_the_rows_of_a_half_of_a_packed_tensor():
    half = torch.empty(6, 4, 10).chunk(2, -1)[0]
    assert fold(half.shape, (20, 5, 1), half.stride()) == [(24, (5, 10)), (5, (1, 1))]


def test_drops_dims_of_one():
    assert fold((1, 7, 1), (99, 3, 42), (0, 5, 1)) == [(7, (3, 5))]
    assert fold((1, 1), (4, 2)) == []


def test_keeps_a_broadcast_dim_apart():
    assert fold((4, 5), (5, 1), (0, 1)) == [(4, (5, 0)), (5, (1, 1))]
    assert fold((4, 5), (5, 1), (0, 0)) == [(20, (1, 0))]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_reaches_the_same_elements_of_both(order):
    one, other = BASE.permute(order), torch.empty(BASE.permute(order).shape)
    dims = fold(one.shape, one.stride(), other.stride())
    pairs = list(zip(reached(dims, 0), reached(dims, 1), strict=True))
    expected = list(zip(one.flatten().tolist(), range(120), strict=True))
    assert sorted(pairs) == sorted(expected)
