"""Handing a graph on: caches are keyed on graphfuse's own sources."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import register_lowering
from torch._inductor.utils import fresh_cache, run_and_get_code

import graphfuse
from graphfuse import inner
from graphfuse.inner import JointPass, source_digest
from graphfuse.testing import assert_no_worse


@pytest.fixture
def other_sources(monkeypatch):
    """The same, as if a file had been edited."""

    def edit(digest="edited"):
        monkeypatch.setattr(inner, "source_digest", lambda: digest)

    return edit


def test_salts_with_its_sources(other_sources):
    before = JointPass().uuid()
    assert source_digest() in before
    assert JointPass().uuid() == before
    other_sources()
    assert JointPass().uuid() != before


def test_serves_nothing_from_before_an_edit(other_sources):
    """The gradient of an op is not in torch's cache key: without the salt, the old one would be used."""
    x = torch.randn(8, requires_grad=True)

    def cached():
        torch._dynamo.reset()
        counters.clear()
        graphfuse.optimize(lambda x: (x * 2).sin(), strict=True)(x).sum().backward()
        return counters["aot_autograd"]["autograd_cache_hit"]

    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=True):
        assert (cached(), cached()) == (0, 1)
        other_sources()
        assert (cached(), cached()) == (0, 1)


class TheirPass(CustomGraphPass):
    def __init__(self, key):
        self.key = key
        self.graphs = []

    def __call__(self, graph):
        self.graphs.append(graph)

    def uuid(self):
        return self.key


def test_keeps_passes_of_the_user():
    theirs = TheirPass("theirs")
    joint_pass = JointPass("balanced", theirs)
    graph = torch.fx.Graph()
    joint_pass(graph)
    assert theirs.graphs == [graph]
    assert "theirs" in joint_pass.uuid()
    assert JointPass("balanced", [theirs, theirs]).uuid() != joint_pass.uuid()


def test_is_not_cached_where_a_pass_of_the_user_cannot_be():
    assert JointPass("balanced", TheirPass(None)).uuid() is None
    assert JointPass("balanced", lambda graph: None).uuid() is None


def test_takes_options_and_mode_of_inductor():
    def fn(x):
        return x.sin() + 1

    x = torch.randn(8)
    compiled = graphfuse.optimize(fn, mode="max-autotune-no-cudagraphs", strict=True, max_fusion_size=8)
    torch.testing.assert_close(compiled(x), fn(x))
    assert graphfuse.report(compiled).sites == []


class Block(torch.nn.Module):
    """A pre-norm attention and a gated MLP."""

    def __init__(self, width=32, hidden=96):
        super().__init__()
        self.norm = torch.nn.ParameterList([torch.ones(width), torch.ones(width)])
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.gate, self.up = torch.nn.Linear(width, hidden), torch.nn.Linear(width, hidden)
        self.down = torch.nn.Linear(hidden, width)

    def forward(self, x):
        y = F.rms_norm(x, x.shape[-1:], self.norm[0])
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = F.rms_norm(x, x.shape[-1:], self.norm[1])
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


WIDTH, HIDDEN, TOKENS = 32, 96, 2 * 16
# Of every token: x, q, k, v, the attention's result and the logsumexp of its 2 heads, x again, gate and up.
NEEDED = WIDTH + 3 * WIDTH + WIDTH + 2 + WIDTH + 2 * HIDDEN
NORMALISED = 2 * WIDTH


@pytest.mark.parametrize(
    ("memory", "kept"), [("speed", NEEDED + NORMALISED + HIDDEN), ("balanced", NEEDED), ("min", NEEDED)]
)
def test_keeps_for_backward(memory, kept):
    """What is kept is what matrix products and attention return, and no more unless asked for speed."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 16, WIDTH, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    graphfuse.optimize(block, memory=memory, strict=True)
    weights = {weight.data_ptr() for weight in block.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    assert graphfuse.report(block).counts["rms_norm"] == 2
    assert sum(saved.values()) / TOKENS == kept
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]), expected)


def test_messages_do_not_grow_with_every_layer():
    """Inductor writes the operands of an op that it fails on with all they are made of: 9 times as much a layer."""

    class Failing(Exception):
        pass

    @torch.library.custom_op("graphfuse_tests::last", mutates_args=())
    def last(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    last.register_fake(torch.empty_like)

    @register_lowering(torch.ops.graphfuse_tests.last.default, type_promotion_kind=None)
    def fail(x):
        raise Failing("here")

    weight = torch.randn(8, 8)

    def model(x, depth):
        for _ in range(depth):
            x = F.linear(F.rms_norm(x, (8,)), weight) @ F.linear(x, weight)
        return last(x)

    def message(depth):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="Failing: here") as caught:
            graphfuse.optimize(lambda x: model(x, depth), strict=True)(torch.randn(8, 8))
        return str(caught.value)

    assert "target: graphfuse_tests.last.default" in message(1)
    assert len(message(4)) < 2 * len(message(1))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_gradient_of_an_embedding(device, dtype):
    table = torch.randn(50, 8, device=device, dtype=dtype, requires_grad=True)
    tokens = torch.randint(50, (4, 300), device=device)

    def embed(tokens, table):
        return F.embedding(tokens, table, padding_idx=3)

    with fresh_cache():
        assert_no_worse(graphfuse.optimize(embed, strict=True), embed, (tokens, table))


@pytest.mark.parametrize("is_trained", [True, False])
def test_generated_code_calls_ops_past_the_dispatcher(is_trained):
    def norm(x, weight):
        return F.rms_norm(x.sin(), (8,), weight, 1e-6).cos()

    inputs = torch.randn(4, 8), torch.randn(8, requires_grad=is_trained)
    with fresh_cache():
        found, codes = run_and_get_code(graphfuse.optimize(norm, strict=True), *inputs)
    torch.testing.assert_close(found, norm(*inputs))
    assert codes
    assert all("torch.ops.graphfuse.direct.rms_norm" in code for code in codes)
    assert not any(".rms_norm.default(" in code for code in codes)
