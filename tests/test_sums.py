"""Sums of matrix products: which are made in one go, and that they come out as before."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache, run_fw_bw_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import graphfuse.backend  # noqa: F401 - registers the ops
from graphfuse.sums import add_up_products

ONE, TWO, OTHER = torch.randn(3, 6, 6)


def products_of_sums(fn, *inputs):
    """How many products each sum has that is made in one go; what comes out is what came out before."""
    traced = make_fx(fn)(*inputs)
    expected = traced(*inputs)
    add_up_products(traced.graph)
    traced.recompile()
    torch.testing.assert_close(traced(*inputs), expected)
    target = torch.ops.graphfuse.sum_of_products.default
    return [len(node.args[0]) for node in traced.graph.find_nodes(op="call_function", target=target)]


@pytest.mark.parametrize(
    ("fn", "products"),
    [
        (lambda x, y: x @ ONE + y @ TWO, [2]),
        (lambda x, y: (x @ ONE).view(2, 2, 6) + (y @ TWO).view(2, 2, 6), [2]),
        (lambda x, y: x @ ONE + y @ TWO + (x @ OTHER), [3]),
        (lambda x, y: x @ ONE + (y @ TWO + (x @ OTHER + y @ ONE)), [4]),
        (lambda x, y: (x @ ONE + y @ TWO) @ ONE + x @ TWO, [2, 2]),
        (lambda x, y: x @ ONE + y, []),
        (lambda x, y: (x @ ONE + y @ TWO + y).relu(), [2]),
        (lambda x, y: x @ ONE, []),
        (lambda x, y: x @ ONE + (y @ TWO).sum(0), []),
        (lambda x, y: torch.add(x @ ONE, y @ TWO, alpha=2), []),
        (lambda x, y: x @ ONE + (y @ TWO).double(), []),
        (lambda x, y: x @ ONE + (y @ TWO)[:1], []),
    ],
    ids=range(12),
)
def test_finds_sums_of_nothing_but_products(fn, products):
    assert products_of_sums(fn, torch.randn(4, 6), torch.randn(4, 6)) == products


def test_leaves_alone_what_somebody_else_reads():
    def fn(x, y):
        first = x @ ONE
        return first + y @ TWO, first.relu()

    assert products_of_sums(fn, torch.randn(4, 6), torch.randn(4, 6)) == []


class Heads(nn.Module):
    """What reads one tensor, as queries, keys and values do."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        x = x.sin()
        return self.q(x).sin().sum() + (self.k(x) * self.v(x)).sum()


@pytest.mark.parametrize("max_autotune", [False, True])
def test_gradients_that_meet(max_autotune):
    """Except where Inductor may have a faster kernel for each product."""
    model, x = Heads(), torch.randn(2, 5, 8, requires_grad=True)
    gradients = torch.autograd.grad(model(x), [x, *model.parameters()])
    compiled = torch.compile(model, backend="graphfuse", options={"inner_options": {"max_autotune": max_autotune}})
    with fresh_cache():
        _, code = run_fw_bw_and_get_code(lambda: compiled(x))
    assert ("graphfuse.sum_of_products" in code[-1]) == (not max_autotune)
    found = [x.grad, *(weight.grad for weight in model.parameters())]
    torch.testing.assert_close(found, list(gradients))


def test_passes_opcheck():
    matrices = ([torch.randn(3, 4), torch.randn(3, 2)], [torch.randn(4, 5), torch.randn(5, 2).t()])
    torch.library.opcheck(torch.ops.graphfuse.sum_of_products.default, matrices)
