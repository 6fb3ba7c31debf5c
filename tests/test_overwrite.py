"""Backward passes of gates that write over gate and up, and those that must not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse.kernels import _packed_glu, glu


@pytest.fixture
def written(monkeypatch):
    """One entry for each gate that was differentiated in place: whether its product came out of it."""
    calls = []

    def differentiate_(grad, gate, up, options, with_result):
        calls.append(with_result)
        return original(grad, gate, up, options, with_result)

    original = glu.differentiate_
    for module in (glu, _packed_glu):
        monkeypatch.setattr(module, "differentiate_", differentiate_)
    return calls


class Mlp(nn.Module):
    def __init__(self, packed=False, width=32, hidden=96):
        super().__init__()
        self.packed = packed
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def both(self, x):
        if self.packed:
            return self.gate_up(x).chunk(2, -1)
        return [F.linear(x, weight) for weight in self.gate_up.weight.chunk(2)]

    def forward(self, x):
        gate, up = self.both(x)
        return x + self.down(F.silu(gate) * up)


class ReadTwice(Mlp):
    """Backward reads gate once more, for what else was made of it."""

    def forward(self, x):
        gate, up = self.both(x)
        return x + self.down(F.silu(gate) * up) + gate.square().mean()


class Returned(Mlp):
    """The caller has gate and up in its hands when backward runs."""

    def forward(self, x):
        gate, up = self.both(x)
        return x + self.down(F.silu(gate) * up), gate, up


class Shared(Mlp):
    """Gate and up are parts of what backward reads as a whole."""

    def forward(self, x):
        whole = self.gate_up(x)
        gate, up, _ = whole.split([60, 60, 72], -1)
        return x + F.pad(F.silu(gate) * up, (0, 36)) @ self.down.weight.t() + whole.sin().mean()


class Checkpointed(Mlp):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def gradients(model, x):
    """Gradients of two steps, and what the model returned last."""
    model.zero_grad()
    for _ in range(2):
        result = model(x)
        y = result[0] if isinstance(result, tuple) else result
        y.square().sum().backward()
    return [weight.grad for weight in model.parameters()], result


def check(model, memory="balanced"):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 32)
    eager = copy.deepcopy(model)
    graphfuse.optimize(model, memory=memory, strict=True)
    expected, found = gradients(eager, x), gradients(model, x)
    assert graphfuse.report(model).counts == {"glu": 1}
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize(("memory", "with_result"), [("speed", False), ("balanced", True), ("min", True)])
def test_writes_over_what_nobody_else_reads(written, packed, memory, with_result):
    check(Mlp(packed), memory)
    assert written == [with_result] * 2


@pytest.mark.parametrize("model", [ReadTwice, Returned, Shared, Checkpointed])
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_leaves_alone_what_somebody_else_reads(written, model, packed):
    check(model(packed))
    assert written == []


def test_needs_memory_that_is_given_away(written):
    with fresh_cache(), torch._functorch.config.patch(donated_buffer=False):
        check(Mlp())
    assert written == []


def test_a_graph_that_is_kept_is_not_written_over(written):
    """Torch says so itself of memory that was given away; without that, backward runs twice."""
    with fresh_cache(), torch._functorch.config.patch(donated_buffer=False):
        model = graphfuse.optimize(Mlp(), strict=True)
        loss = model(torch.randn(4, 32)).square().sum()
        weights = list(model.parameters())
        first = torch.autograd.grad(loss, weights, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, weights), first, rtol=0, atol=0)


def test_leaves_the_order_of_other_graphs_to_inductor(written):
    before = torch._inductor.config.reorder_for_peak_memory
    check(Mlp())
    assert written
    assert torch._inductor.config.reorder_for_peak_memory == before
