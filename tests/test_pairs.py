"""Rotations of queries and keys that become one op: which do, and that they come out as before."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache, run_fw_bw_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import graphfuse.backend  # noqa: F401 - registers the ops
from graphfuse.pairs import pair

FP32 = torch.float32
HALF = ("half", "half", "half", False, 0)
ops = torch.ops.graphfuse


class Tables:
    """The ops, with the tables and the weight of one graph."""

    def __init__(self, cos, sin, weight):
        self.cos, self.sin, self.weight = cos, sin, weight
        self.norm = (cos, sin, 1e-6, 1.0, 0.0, "inside")

    def rope(self, x, cos=None, sin=None, convention=HALF):
        return ops.rope(x, self.cos if cos is None else cos, self.sin if sin is None else sin, *convention, FP32)

    def rope_backward(self, x):
        return ops.rope_backward(x, self.cos, self.sin, x.stride(), *HALF, FP32)

    def norm_rope(self, x, weight=None):
        return ops.norm_rope(x, weight, *self.norm, FP32, FP32, *HALF, -1, FP32)

    def norm_rope_backward(self, grad, x):
        return ops.norm_rope_backward(grad, x, self.weight, *self.norm, *HALF, -1, True)


def layers(t, q, k):
    for _ in range(3):
        q, k = t.rope(q) * 2, t.rope(k) * 3
    return q, k


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (lambda t, q, k: (t.rope(q), t.rope(k)), ["rope_pair"]),
        (lambda t, q, k: (t.rope(q), t.rope(k * 2)), ["rope_pair"]),
        (lambda t, q, k: (t.norm_rope(q, t.weight), t.norm_rope(k, t.weight * 2)), ["norm_rope_pair"]),
        (lambda t, q, k: (t.norm_rope(q, t.weight), t.norm_rope(k)), ["norm_rope_pair"]),
        (lambda t, q, k: t.norm_rope_backward(q, q) + t.norm_rope_backward(k, k), ["norm_rope_backward_pair"]),
        (lambda t, q, k: (t.norm_rope_backward(q, q)[0], t.norm_rope_backward(k, k)[1]), ["norm_rope_backward_pair"]),
        (lambda t, q, k: (t.rope_backward(q), t.rope_backward(k.contiguous())), ["rope_backward_pair"]),
        (lambda t, q, k: (t.rope(q), t.rope(k), t.rope(k + 1)), ["rope_pair"]),
        (layers, ["rope_pair"] * 3),
        # Somebody reads the first before the other can be made.
        (lambda t, q, k: (t.rope(q).sin(), t.rope(k * 2)), []),
        (lambda t, q, k: t.rope(k.repeat(1, 2, 1, 1) + t.rope(q)), []),
        # They are not rotated alike.
        (lambda t, q, k: (t.rope(q), t.rope(k, t.sin, t.cos)), []),
        (lambda t, q, k: (t.rope(q), t.rope(k, convention=(*HALF[:3], True, 0))), []),
        (lambda t, q, k: (t.rope(q), t.norm_rope(k)), []),
        (lambda t, q, k: (t.rope(q), t.rope(torch.cat((k, k), -1))), []),
    ],
    ids=range(15),
)
def test_finds_what_meets(fn, names):
    inputs = (
        *torch.randn(2, 1, 1, 5, 8),
        torch.rand(8),
        torch.randn(2, 4, 5, 8),
        torch.randn(2, 5, 2, 8).transpose(1, 2),
    )
    traced = make_fx(lambda cos, sin, weight, q, k: fn(Tables(cos, sin, weight), q, k))(*inputs)
    expected = traced(*inputs)
    pair(traced.graph)
    traced.graph.lint()
    traced.recompile()
    torch.testing.assert_close(traced(*inputs), expected, rtol=0, atol=0)
    called = [node.target._schema.name.removeprefix("graphfuse::") for node in traced.graph.nodes if is_op(node)]
    assert [name for name in called if name.endswith("_pair")] == names


def test_stays_where_the_first_was():
    """What backward computes again of its inputs is not there from its start."""

    def backward(cos, sin, q, k):
        late = q.sin()
        t = Tables(cos, sin, None)
        return t.rope(q), t.rope(k), late

    traced = make_fx(backward)(*torch.randn(2, 1, 1, 5, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8))
    pair(traced.graph)
    called = [node.target._schema.name for node in traced.graph.nodes if is_op(node)]
    assert called == ["aten::sin", "graphfuse::rope_pair"]


def is_op(node):
    return isinstance(node.target, torch._ops.OpOverload)


class Attention(nn.Module):
    def __init__(self, has_norms):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norms = nn.ParameterList([torch.rand(8), torch.rand(8)]) if has_norms else None

    def rotated(self, x, k, cos, sin):
        x = x.unflatten(-1, (-1, 8))
        if self.norms is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norms[k]
        x = x.transpose(1, 2)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def forward(self, x, cos, sin):
        q, k = self.rotated(self.q(x), 0, cos, sin), self.rotated(self.k(x), 1, cos, sin)
        v = self.v(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("has_norms", [False, True], ids=["rope", "norm_rope"])
def test_queries_and_keys_of_a_model(has_norms):
    model, x = Attention(has_norms), torch.randn(2, 5, 16, requires_grad=True)
    angles = torch.rand(1, 5, 4).repeat(1, 1, 2)
    given = (angles.cos(), angles.sin())
    expected = torch.autograd.grad(model(x, *given).square().sum(), [x, *model.parameters()])
    compiled = torch.compile(model, backend="graphfuse")
    with fresh_cache():
        _, code = run_fw_bw_and_get_code(lambda: compiled(x, *given).square().sum())
    name = "norm_rope" if has_norms else "rope"
    for source, op in zip(code, (name, f"{name}_backward"), strict=True):
        assert source.count(f"graphfuse.direct.{op}_pair(") == 1
        assert f"graphfuse.direct.{op}(" not in source
    found = [x.grad, *(weight.grad for weight in model.parameters())]
    torch.testing.assert_close(found, list(expected))
