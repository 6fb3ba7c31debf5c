"""Train two real architectures twice: as they are, and with graphfuse. What `make demo` runs.

Llama and Gemma 3 (transformers, random weights, three million parameters, one token a byte) learn a book. Both runs of
a model start from the same seed and see the same text, so their losses should agree step by step. Printed at the end:
what graphfuse rewrote, how well the losses agree, time and memory. The curves go to build/demo.png.

Uses the GPU, in bfloat16, when there is one; without one, float32 on the CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import torch
from _memory import Peak, quiet_stderr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import graphfuse

mpl.use("agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "examples" / "data" / "alice.txt"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BATCH, LENGTH = (64, 512) if DEVICE == "cuda" else (8, 128)
LOG_WIDTH = 140  # characters, where the output is no terminal

SIZE = {
    "vocab_size": 320,  # 256 bytes, padded to a multiple of 64
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "use_cache": False,
}


def llama() -> nn.Module:
    """Norms that round before the weight, SwiGLU, rotary embeddings."""
    return LlamaForCausalLM(LlamaConfig(**SIZE))


def gemma3() -> nn.Module:
    """Norms with 1 + weight, also on queries and keys, GeGLU, two rotary tables, a tied head."""
    layers = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZE, sliding_window=64, layer_types=layers))


@dataclass
class Run:
    """One training run."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step; the first one compiles
    peak_bytes: int = 0  # of one step, on top of weights and optimizer


def batches(text: Tensor) -> Iterator[Tensor]:
    """Yield random pieces of the text, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(LENGTH)].to(DEVICE)


def train(name: str, model: nn.Module, text: Tensor, steps: int, progress: Progress) -> Run:
    """Train for some steps, then count the memory of one more."""
    run = Run(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(tokens: Tensor) -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    task = progress.add_task(name, total=steps, loss="")
    for tokens, _ in zip(batches(text), range(steps), strict=False):
        start = time.perf_counter()
        run.losses.append(step(tokens))
        run.seconds.append(time.perf_counter() - start)
        progress.update(task, advance=1, loss=f"loss {run.losses[-1]:.3f}")
    with quiet_stderr(), Peak() as peak:
        step(tokens)
    run.peak_bytes = peak.bytes
    return run


def compare(build: Callable[[], nn.Module], options: argparse.Namespace, console: Console) -> tuple[Run, Run]:
    """Train a model plain and with graphfuse, from the same seed, and print the report."""
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        torch.manual_seed(0)
        plain = train("plain", build().to(DEVICE, DTYPE), text, options.steps, progress)

        torch.manual_seed(0)
        model = graphfuse.optimize(build().to(DEVICE, DTYPE), inner=options.inner)
        fused = train("graphfuse", model, text, options.steps, progress)

    report = graphfuse.report(model)
    console.print(report)
    report.to_json(options.out / f"{build.__name__}.json")
    torch._dynamo.reset()
    return plain, fused


def loss_table(plain: Run, fused: Run) -> Table:
    """Some steps of both runs, and the largest difference over all of them."""
    differences = [abs(a - b) for a, b in zip(plain.losses, fused.losses, strict=True)]
    table = Table(title="loss, step by step", caption=f"largest difference {max(differences):.1e}")
    for column in ("step", "plain", "graphfuse", "difference"):
        table.add_column(column, justify="right")
    last = len(differences) - 1
    for i in sorted({0, 1, *range(last // 6, last, max(last // 6, 1)), last}):
        table.add_row(str(i + 1), f"{plain.losses[i]:.6f}", f"{fused.losses[i]:.6f}", f"{differences[i]:.1e}")
    return table


def cost_table(plain: Run, fused: Run) -> Table:
    """Time and memory of both runs."""
    table = Table(title="cost", caption="the first step compiles; memory beyond weights and optimizer")
    for column in ("", "time per step", "first step", "peak memory"):
        table.add_column(column, justify="right")
    for run in (plain, fused):
        table.add_row(
            run.name,
            f"{statistics.median(run.seconds[1:]) * 1e3:.1f} ms",
            f"{run.seconds[0]:.1f} s",
            f"{run.peak_bytes / 2**20:.1f} MiB",
        )
    return table


def plot(results: dict[str, tuple[Run, Run]], path: Path) -> None:
    """Draw both loss curves of every model."""
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), sharey=True, layout="constrained")
    for ax, (name, (plain, fused)) in zip(axes, results.items(), strict=True):
        steps = range(1, len(plain.losses) + 1)
        ax.plot(steps, plain.losses, label=plain.name, linewidth=4, alpha=0.4)
        ax.plot(steps, fused.losses, label=fused.name, linewidth=1.2, color="black")
        ax.set(title=name, xlabel="step")
        ax.legend()
    axes[0].set_ylabel("loss (nats per byte)")
    figure.savefig(path, dpi=150)


def default_inner() -> str:
    """Inductor writes C++ on a CPU; without a compiler, AOTAutograd alone will do."""
    has_compiler = DEVICE == "cuda" or shutil.which(os.environ.get("CXX", "g++"))
    return "inductor" if has_compiler else "aot_eager"


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=50, help="training steps of each run (at least 2)")
    parser.add_argument("--inner", default=default_inner(), help="backend that compiles the rewritten graph")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the plot and the reports as JSON")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"torch {torch.__version__}, {where}, {DTYPE}")
    console.print(f"{BATCH} x {LENGTH} tokens a step, rewritten graphs compiled by {options.inner}")
    if DEVICE == "cpu":
        console.print("no GPU: the ops run their torch references, so losses agree but no step gets faster")

    results = {}
    for build in (llama, gemma3):
        console.print(Rule(build.__name__))
        plain, fused = results[build.__name__] = compare(build, options, console)
        console.print(loss_table(plain, fused))
        console.print(cost_table(plain, fused))
    plot(results, options.out / "demo.png")
    console.print(f"loss curves: {options.out / 'demo.png'}")


if __name__ == "__main__":
    main()
