"""A tensor multiplied where it stands."""

import pytest
import torch

from graphfuse.kernels import _scale  # noqa: F401 - registers the op

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("shape", [(0,), (5,), (4096,), (9001,), (7, 9)])
def test_multiplies_in_place(shape, factor, device):
    x = torch.randn(shape, device=device)
    expected = x * factor
    torch.ops.graphfuse.scale_(x, torch.tensor(factor, device=device))
    torch.testing.assert_close(x, expected)


def test_takes_any_layout(device):
    whole = torch.randn(6, 8, device=device)
    expected = whole.clone()
    expected[:, ::2] *= 3
    torch.ops.graphfuse.scale_(whole[:, ::2], torch.tensor(3.0, device=device))
    torch.testing.assert_close(whole, expected)


def test_takes_a_number_of_the_host(device):
    x = torch.ones(3, device=device)
    torch.ops.graphfuse.scale_(x, torch.tensor(2.0))
    assert x.tolist() == [2.0, 2.0, 2.0]


def test_passes_opcheck(device):
    arguments = torch.randn(3, device=device), torch.tensor(2.0, device=device)
    torch.library.opcheck(torch.ops.graphfuse.scale_.default, arguments)
