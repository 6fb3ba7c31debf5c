"""Backward passes of gates that write over gate and up, and those that must not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import graphfuse
from graphfuse import inner, overwrite
from graphfuse.kernels import _packed_glu, _scale, glu
from graphfuse.kernels._op import direct

SUFFIX = "_backward_of_products"


@pytest.fixture
def written(monkeypatch):
    """One entry for each gate differentiated in place: did its product come out, was its gradient made there."""
    calls = []

    def differentiate_(grad, weight, gate, up, options, with_result):
        calls.append((with_result, weight is not None))
        return original(grad, weight, gate, up, options, with_result)

    original = glu.differentiate_
    for module in (glu, _packed_glu):
        monkeypatch.setattr(module, "differentiate_", differentiate_)
    return calls


@pytest.fixture
def made(monkeypatch):
    """The ops of graphs in which a gate's backward makes gate and up itself."""
    found = []

    def looked_at(graph, *args):
        done = original(graph, *args)
        targets = [overwrite.name_of(node).removeprefix("graphfuse::") for node in graph.nodes]
        found.extend(name.removesuffix(SUFFIX) for name in targets if name.endswith(SUFFIX))
        return done

    original = inner.overwrite
    monkeypatch.setattr(inner, "overwrite", looked_at)
    with fresh_cache():  # a graph that is found in a cache is not changed again
        yield found


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
    assert written == [(with_result, True)] * 2


class GradientReadTwice(Mlp):
    """What is subtracted from the product has a gradient of its own: the same one, negative."""

    def __init__(self, packed):
        super().__init__(packed)
        self.offset = nn.Parameter(torch.zeros(96))

    def forward(self, x):
        gate, up = self.both(x)
        return x + self.down(F.silu(gate) * up - self.offset)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_takes_a_gradient_that_somebody_else_reads_as_it_is(written, packed):
    check(GradientReadTwice(packed))
    assert written == [(True, False)] * 2


@pytest.mark.parametrize("model", [ReadTwice, Returned, Shared])
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_leaves_alone_what_somebody_else_reads(written, model, packed):
    check(model(packed))
    assert written == []


class WithBias(Checkpointed):
    """Gate and up are more than products."""

    def both(self, x):
        return [part + 0.1 for part in super().both(x)]


class CheckpointedGate(Mlp):
    """The projections are kept, and the gate alone is computed again."""

    def forward(self, x):
        return x + self.down(checkpoint(lambda gate, up: F.silu(gate) * up, *self.both(x), use_reentrant=False))


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_makes_what_a_checkpointed_layer_computes_again(written, made, packed):
    check(Checkpointed(packed))
    assert written == [(True, True)] * 2
    assert made == ["packed_glu" if packed else "glu"]


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_makes_products_only(written, made, packed):
    check(WithBias(packed))
    assert written == made == []


def test_a_gate_checkpointed_by_itself_is_written_over(written, made):
    check(CheckpointedGate())
    assert written == [(True, True)] * 2
    assert made == []


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


class Head(nn.Module):
    """The loss over a vocabulary: forward leaves the gradients behind."""

    def __init__(self):
        super().__init__()
        self.table, self.weight = nn.Parameter(torch.randn(50, 16)), nn.Parameter(torch.randn(50, 16))

    def forward(self, tokens):
        hidden = F.embedding(tokens, self.table)
        logits = hidden @ self.weight.t()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(("scale", "keeps"), [(1.0, False), (0.25, False), (0.25, True)])
def test_a_gradient_that_was_left_behind_is_multiplied_in_place(scale, keeps, monkeypatch):
    """Unless it is to be there for another backward."""
    scaled = []
    scale_ = _scale.scale_
    monkeypatch.setattr(_scale, "scale_", lambda x, number: scaled.append(tuple(x.shape)) or scale_(x, number))
    tokens, model = torch.randint(50, (2, 9)), Head()
    expected = torch.autograd.grad(model(tokens) * scale, [*model.parameters()])
    with fresh_cache(), torch._functorch.config.patch(donated_buffer=not keeps):
        loss = graphfuse.optimize(model, strict=True)(tokens) * scale
        for _ in range(1 + keeps):
            found = torch.autograd.grad(loss, [*model.parameters()], retain_graph=keeps)
            torch.testing.assert_close(found, expected)
    assert graphfuse.report(model).counts["linear_cross_entropy"] == 1
    assert scaled == ([] if keeps else [(50, 16)])


class Tied(nn.Module):
    """Embeddings and head share a table."""

    def __init__(self, padding=None, by_frequency=False, twice=False):
        super().__init__()
        self.table, self.twice = nn.Parameter(torch.randn(50, 16)), twice
        self.options = {"padding_idx": padding, "scale_grad_by_freq": by_frequency}

    def forward(self, tokens):
        hidden = F.embedding(tokens, self.table, **self.options)
        loss = F.cross_entropy((hidden @ self.table.t())[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return loss + self.table.square().mean() if self.twice else loss


@pytest.mark.parametrize(
    ("options", "is_added"),
    [({}, True), ({"padding": 3}, True), ({"by_frequency": True}, False), ({"twice": True}, False)],
    ids=["", "padding", "by_frequency", "twice"],
)
def test_the_rows_of_tokens_are_added_to_the_gradient_of_a_tied_head(options, is_added, monkeypatch):
    def spy(table, *args):
        added.append(tuple(table.shape))
        add(table, *args)

    added, add = [], direct.embedding_backward_
    monkeypatch.setattr(direct, "embedding_backward_", spy)
    monkeypatch.setattr(inner, "_is_summed_in_order", lambda grad: True)
    tokens, model = torch.randint(50, (2, 9)), Tied(**options)
    tokens[0, :3] = 3
    expected = torch.autograd.grad(model(tokens) / 4, model.table)
    with fresh_cache():
        compiled = graphfuse.optimize(model, strict=True)
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(compiled(tokens) / 4, model.table), expected)
    assert graphfuse.report(model).counts["linear_cross_entropy"] == 1
    assert added == [(50, 16)] * 2 * is_added
