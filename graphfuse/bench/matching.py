"""`graphfuse bench matching`: what finding, proving and rewriting costs beside compiling, and how it grows.

One training step of a decoder is compiled at several depths, every time from nothing: no cache of Inductor or
AOTAutograd, no proof kept. Equal layers share their proofs, so the number of proofs must not grow with the layers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import compilation_time_metrics
from torch._inductor.utils import fresh_cache

import graphfuse
from graphfuse import certify

STAGES = ("replay", "match", "certify", "commit")  # as `graphfuse.backend` names them for torch's compile-time metrics
BATCH, SEQUENCE, VOCABULARY = 2, 64, 512
WIDTH, INNER, HEADS = 128, 256, 4
EPS = 1e-6


@dataclass(frozen=True)
class Cost:
    """Seconds of one compilation.

    Attributes:
        layers: of the model.
        total: from the call to the last gradient, less a step that was compiled before: Dynamo and graphfuse included.
        inner: in the inner backend, forward and backward.
        stages: of graphfuse, by name.
        proofs: distinct sites that were certified.
        sites: sites that were rewritten.
    """

    layers: int
    total: float
    inner: float
    stages: dict[str, float]
    proofs: int
    sites: int

    @property
    def ours(self) -> float:
        """Everything that would not be there without graphfuse."""
        return sum(self.stages.values())

    @property
    def share(self) -> float:
        """Ours over the inner backend's."""
        return self.ours / self.inner


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ParameterList(torch.ones(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        heads = self.qkv(_norm(x, self.norms[0])).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        q, k, v = heads.unbind(2)
        attended = nn.functional.scaled_dot_product_attention(
            _rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True
        )
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        h = _norm(x, self.norms[1])
        gated: Tensor = self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return x + gated


class Decoder(nn.Module):
    """Layers between an embedding and a head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(WIDTH))
        angles = torch.arange(SEQUENCE)[:, None] / 1e4 ** torch.linspace(0, 1, WIDTH // HEADS // 2)
        self.register_buffer("angles", torch.cat((angles, angles), -1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S), int64 -> the loss of each token's successor."""
        angles: Any = self.angles
        x, cos, sin = self.embed(tokens), angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(_norm(x, self.norm))[:, :-1]
        return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def loss_of(layers: int, model_type: str | None = None) -> Callable[[Tensor], Tensor]:
    """The loss of a decoder of so many layers: one written here, or a small one of transformers."""
    if model_type is None:
        return Decoder(layers).forward
    import transformers

    config_class: Any = transformers.CONFIG_MAPPING[model_type]
    config = config_class(
        num_hidden_layers=layers,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
    )
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config)

    def loss(tokens: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return found

    return loss


@contextlib.contextmanager
def _from_nothing() -> Iterator[None]:
    torch._dynamo.reset()
    certify.forget()
    with (
        fresh_cache(),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def measure(layers: int, inner: str = "inductor", model_type: str | None = None) -> Cost:
    """Compile one training step, and say what took how long."""
    torch.manual_seed(0)
    loss = loss_of(layers, model_type)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))

    def step() -> float:
        start = time.perf_counter()
        compiled(tokens).backward()
        return time.perf_counter() - start

    with _from_nothing():
        compiled = graphfuse.optimize(loss, inner=inner, strict=True)
        first, second = step(), step()
        seconds = {name: sum(times) for name, times in compilation_time_metrics.items()}  # since the last reset
    stages = {stage: seconds.get(f"graphfuse.{stage}", 0.0) for stage in STAGES}
    # Backward is compiled when it is first called.
    compiling = seconds["graphfuse.inner"] + seconds.get("backward._backward_impl", 0.0)
    sites = len(graphfuse.report(compiled).rewritten)
    return Cost(layers, first - second, compiling, stages, certify.proofs(), sites)


def table(costs: list[Cost]) -> Table:
    """One line for each depth."""
    found = Table(title="seconds to compile one training step")
    for name in ("layers", "sites", "proofs", "total", "inner", *STAGES, "graphfuse", "of inner"):
        found.add_column(name, justify="right")
    for cost in costs:
        times = (cost.total, cost.inner, *(cost.stages[stage] for stage in STAGES), cost.ours)
        found.add_row(
            *map(str, (cost.layers, cost.sites, cost.proofs)), *(f"{t:.2f}" for t in times), f"{cost.share:.1%}"
        )
    return found


def main(
    layers: Annotated[list[int] | None, typer.Argument(help="Depths to compile.", show_default="8 16 32")] = None,
    inner: Annotated[str, typer.Option(help="What compiles the rewritten graph.")] = "inductor",
    model_type: Annotated[str | None, typer.Option(help="A decoder of transformers instead of the own one.")] = None,
) -> None:
    """Time finding, proving and rewriting beside compiling, at several depths."""
    measure(1, inner, model_type)  # imports, and the compiler's own first time
    costs = [measure(depth, inner, model_type) for depth in layers or (8, 16, 32)]
    console = Console()
    console.print(table(costs))
    first, last = costs[0], costs[-1]
    console.print(
        f"{last.layers / first.layers:g} times the layers: {last.ours / first.ours:.1f} times the seconds in "
        f"graphfuse, {last.total / first.total:.1f} times in all; {first.proofs} proofs, then {last.proofs}"
    )


if __name__ == "__main__":
    typer.run(main)
