"""What `graphfuse bench kernels` measures: every op at the sizes of models, and who else computes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphfuse import ops

Function = Callable[..., Any]

EPS = 1e-6
DEVICE = "cuda"


@dataclass(frozen=True)
class Problem:
    """Random inputs, and the functions that compute the same of them.

    Attributes:
        inputs: arguments of each function; those that require it get a gradient.
        functions: who -> function of the inputs; "eager" is always there.
        forward_bytes: what has to be read and written at least.
        backward_bytes: the same of backward.
    """

    inputs: tuple[Tensor, ...]
    functions: dict[str, Function]
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    size: str
    build: Callable[[], Problem]
    quick: bool = False  # whether a quick run has it


def _random(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_(grad)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def liger(name: str) -> Function | None:
    """A function of Liger, where it is installed and has it."""
    try:
        return getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}", None)
    except ImportError:
        return None


def _with_liger(functions: dict[str, Function], name: str, call: Callable[[Function], Function]) -> dict[str, Function]:
    function = liger(name)
    return functions if function is None else functions | {"liger": call(function)}


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Llama's."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(x.dtype)


def _rms_norm(*shape: int, transposed: bool = False) -> Problem:
    x = _random(*shape)
    if transposed:
        x = x.detach().transpose(1, 2).requires_grad_()
    functions: dict[str, Function] = {
        "graphfuse": lambda x, w: ops.rms_norm(x, w, eps=EPS, normalized_dtype=x.dtype),
        "eager": eager_rms_norm,
        "torch": lambda x, w: functional.rms_norm(x, x.shape[-1:], w, EPS),
    }
    functions = _with_liger(functions, "rms_norm", lambda f: lambda x, w: f(x, w, EPS))
    return Problem((x, _random(shape[-1])), functions, 2 * _bytes(x), 3 * _bytes(x))


def _add_rms_norm(*shape: int) -> Problem:
    x, residual = _random(*shape), _random(*shape)

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, eager_rms_norm(total, weight)

    functions: dict[str, Function] = {
        "graphfuse": lambda x, r, w: ops.add_rms_norm(x, r, w, eps=EPS, normalized_dtype=x.dtype),
        "eager": eager,
    }
    functions = _with_liger(functions, "fused_add_rms_norm", lambda f: lambda x, r, w: f(x, r, w, EPS))
    return Problem((x, residual, _random(shape[-1])), functions, 4 * _bytes(x), 4 * _bytes(x))


def _layer_norm(*shape: int) -> Problem:
    x = _random(*shape)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = x.float()
        h = h - h.mean(-1, keepdim=True)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return (h * weight + bias).to(x.dtype)

    functions: dict[str, Function] = {
        "graphfuse": lambda x, w, b: ops.layer_norm(x, w, b, eps=EPS),
        "eager": eager,
        "torch": lambda x, w, b: functional.layer_norm(x, x.shape[-1:], w, b, EPS),
    }
    functions = _with_liger(functions, "layer_norm", lambda f: lambda x, w, b: f(x, w, b, EPS))
    return Problem((x, _random(shape[-1]), _random(shape[-1])), functions, 2 * _bytes(x), 3 * _bytes(x))


def _heads(batch: int, tokens: int, heads: int, features: int, transposed: bool) -> Tensor:
    x = _random(batch, tokens, heads, features, grad=False)
    return (x.transpose(1, 2) if transposed else x).requires_grad_()


def _tables(batch: int, tokens: int, features: int, transposed: bool) -> tuple[Tensor, Tensor]:
    frequencies = 10_000.0 ** -(torch.arange(0, features, 2, device=DEVICE) / features)
    angles = torch.outer(torch.arange(tokens, device=DEVICE), frequencies).repeat(1, 2)
    angles = angles.expand(batch, -1, -1).unsqueeze(1 if transposed else 2)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _rope(batch: int, tokens: int, features: int, *, transposed: bool) -> Problem:
    q, k = (_heads(batch, tokens, heads, features, transposed) for heads in (32, 8))
    tables = _tables(batch, tokens, features, transposed)
    functions: dict[str, Function] = {
        "graphfuse": lambda q, k, c, s: (ops.rope(q, c, s), ops.rope(k, c, s)),
        "eager": lambda q, k, c, s: (_rotate(q, c, s), _rotate(k, c, s)),
    }
    if transposed:  # the only layout that Liger takes
        functions = _with_liger(functions, "rope", lambda f: lambda q, k, c, s: f(q, k, c.squeeze(1), s.squeeze(1)))
    both = 2 * _bytes(q, k)
    return Problem((q, k, *tables), functions, both, both)


def _norm_rope(batch: int, tokens: int, features: int, *, transposed: bool) -> Problem:
    q, k = (_heads(batch, tokens, heads, features, transposed) for heads in (32, 8))
    tables = _tables(batch, tokens, features, transposed)

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return _rotate(eager_rms_norm(q, v), cos, sin), _rotate(eager_rms_norm(k, w), cos, sin)

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"eps": EPS, "normalized_dtype": q.dtype}
        return ops.norm_rope(q, v, cos, sin, **options), ops.norm_rope(k, w, cos, sin, **options)

    inputs = (q, k, *tables, _random(features), _random(features))
    return Problem(inputs, {"graphfuse": ours, "eager": eager}, 2 * _bytes(q, k), 3 * _bytes(q, k))


def _glu(rows: int, width: int, activation: str) -> Problem:
    gate, up = _random(rows, width), _random(rows, width)
    act = _activation(activation)
    functions: dict[str, Function] = {
        "graphfuse": lambda g, u: ops.glu(g, u, activation=activation),
        "eager": lambda g, u: act(g) * u,
    }
    name = "swiglu" if activation == "silu" else "geglu"
    functions = _with_liger(functions, name, lambda f: f)
    return Problem((gate, up), functions, 3 * _bytes(gate), 5 * _bytes(gate))


def _packed_glu(rows: int, width: int, activation: str) -> Problem:
    packed = _random(rows, 2 * width)
    act = _activation(activation)

    def eager(packed: Tensor) -> Tensor:
        gate, up = packed.chunk(2, -1)
        return act(gate) * up

    functions: dict[str, Function] = {
        "graphfuse": lambda packed: ops.packed_glu(packed, activation=activation),
        "eager": eager,
    }
    return Problem((packed,), functions, 3 * _bytes(packed) // 2, 5 * _bytes(packed) // 2)


def _cross_entropy(tokens: int, vocab: int) -> Problem:
    logits = _random(tokens, vocab)
    target = torch.randint(vocab, (tokens,), device=DEVICE)
    functions: dict[str, Function] = {
        "graphfuse": ops.cross_entropy,
        "eager": lambda z, y: functional.cross_entropy(z.float(), y),
        "torch": functional.cross_entropy,
    }
    functions = _with_liger(functions, "cross_entropy", lambda f: f)
    return Problem((logits, target), functions, _bytes(logits), 2 * _bytes(logits))


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    return functional.silu if name == "silu" else lambda x: functional.gelu(x, approximate="tanh")


CASES = (
    Case("rms_norm", "16384x4096", lambda: _rms_norm(16384, 4096), quick=True),
    Case("rms_norm", "16384x8192", lambda: _rms_norm(16384, 8192)),
    Case("rms_norm", "4096x2048", lambda: _rms_norm(4096, 2048), quick=True),
    Case("rms_norm", "4x4096x32x128", lambda: _rms_norm(4, 4096, 32, 128), quick=True),
    Case("rms_norm", "4x32x4096x128 transposed", lambda: _rms_norm(4, 4096, 32, 128, transposed=True)),
    Case("add_rms_norm", "16384x4096", lambda: _add_rms_norm(16384, 4096), quick=True),
    Case("layer_norm", "16384x4096", lambda: _layer_norm(16384, 4096)),
    Case("rope", "4x4096x(32+8)x128", lambda: _rope(4, 4096, 128, transposed=False)),
    Case("rope", "4x(32+8)x4096x128 transposed", lambda: _rope(4, 4096, 128, transposed=True), quick=True),
    Case("norm_rope", "4x4096x(32+8)x128", lambda: _norm_rope(4, 4096, 128, transposed=False)),
    Case("norm_rope", "4x(32+8)x4096x128 transposed", lambda: _norm_rope(4, 4096, 128, transposed=True), quick=True),
    Case("glu silu", "16384x14336", lambda: _glu(16384, 14336, "silu"), quick=True),
    Case("glu silu packed", "16384x14336", lambda: _packed_glu(16384, 14336, "silu"), quick=True),
    Case("glu gelu_tanh", "16384x14336", lambda: _glu(16384, 14336, "gelu_tanh")),
    Case("glu gelu_tanh packed", "16384x14336", lambda: _packed_glu(16384, 14336, "gelu_tanh")),
    Case("cross_entropy", "8192x128256", lambda: _cross_entropy(8192, 128256), quick=True),
    Case("cross_entropy", "8192x50257", lambda: _cross_entropy(8192, 50257)),
    Case("cross_entropy", "16384x32000", lambda: _cross_entropy(16384, 32000)),
)
