"""`graphfuse bench kernels`: every op against eager, torch's own, Inductor and Liger, and against the memory.

An op that is bound by memory has a floor: every input read once, every result written once, at the bandwidth of a copy
that is measured in the same run. The table says how far above it everybody is.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from graphfuse.bench.timing import copy_bandwidth, measure

NO_GPU = "graphfuse bench kernels: expected a CUDA GPU to measure, got none that torch can use"
WHO = ("graphfuse", "eager", "torch", "inductor", "liger")


@dataclass(frozen=True)
class Row:
    """What one function costs in one case; ratios are to the floor."""

    op: str
    size: str
    who: str
    forward_us: float
    forward_ratio: float
    forward_gbps: float
    both_us: float
    both_ratio: float
    both_gbps: float
    forward_host_us: float
    both_host_us: float
    peak_mib: float


def measure_all(cases: Sequence[Any], bandwidth: float, on_step: Callable[[str], None]) -> tuple[list[Row], list[str]]:
    """Measure every function of every case.

    Args:
        cases: from `graphfuse.bench.cases`.
        bandwidth: bytes a second of a copy.
        on_step: told the name of what is measured next.

    Returns:
        A row for each, and a line for each that failed.
    """
    rows, failed = [], []
    for case in cases:
        problem = case.build()
        eager = problem.functions["eager"]
        functions = problem.functions | {"inductor": torch.compile(eager)}
        for who in WHO:
            if who not in functions:
                continue
            on_step(f"{case.op} {case.size}: {who}")
            try:
                rows.append(measure_one(case, who, functions[who], problem, bandwidth))
            except Exception as error:  # somebody's kernel may not take this size
                failed.append(f"{case.op} {case.size}: {who}: {type(error).__name__}: {str(error).splitlines()[0]}")
        torch._dynamo.reset()
        del problem, functions, eager
        torch.cuda.empty_cache()
    return rows, failed


def measure_one(case: Any, who: str, function: Callable[..., Any], problem: Any, bandwidth: float) -> Row:
    """Measure one function, without gradients and with them."""
    inputs = problem.inputs
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def forward() -> Any:
        with torch.no_grad():
            return function(*inputs)

    results = function(*inputs)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    upstream = [torch.randn_like(result) for result in results]
    del results

    def both() -> Any:
        results = function(*inputs)
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        return torch.autograd.grad(results, wanted, upstream)

    alone, together = measure(forward), measure(both)
    total = problem.forward_bytes + problem.backward_bytes
    return Row(
        op=case.op,
        size=case.size,
        who=who,
        forward_us=alone.gpu_us,
        forward_ratio=alone.gpu_us * 1e-6 * bandwidth / problem.forward_bytes,
        forward_gbps=problem.forward_bytes / alone.gpu_us * 1e-3,
        both_us=together.gpu_us,
        both_ratio=together.gpu_us * 1e-6 * bandwidth / total,
        both_gbps=total / together.gpu_us * 1e-3,
        forward_host_us=alone.host_us,
        both_host_us=together.host_us,
        peak_mib=together.peak_mib,
    )


def machine() -> dict[str, str]:
    """Hardware and versions, without which a figure means nothing."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def table_of(rows: Iterable[Row], title: str) -> Table:
    """The figures for people."""
    table = Table(title=title, title_justify="left")
    for name in ("op", "size", "by"):
        table.add_column(name, no_wrap=True)
    for name in ("fwd µs", "x floor", "GB/s", "fwd+bwd µs", "x floor", "GB/s", "host µs", "peak MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    previous: tuple[str, str] | None = None
    for row in rows:
        case = (row.op, row.size)
        if previous not in (None, case):
            table.add_section()
        names = case if previous != case else ("", "")
        previous = case
        times = [f"{row.forward_us:.1f}", f"{row.forward_ratio:.2f}", f"{row.forward_gbps:.0f}"]
        times += [f"{row.both_us:.1f}", f"{row.both_ratio:.2f}", f"{row.both_gbps:.0f}"]
        table.add_row(*names, row.who, *times, f"{row.both_host_us:.0f}", f"{row.peak_mib:.0f}")
    return table


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """A bar chart of forward + backward, as multiples of the floor."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row.op, row.size) for row in rows))
    present = [who for who in WHO if any(row.who == who for row in rows)]
    figure = Figure(figsize=(11, 1.5 + 0.75 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for k, who in enumerate(present):
        ratios = {(row.op, row.size): row.both_ratio for row in rows if row.who == who}
        places = [
            i + (k - (len(present) - 1) / 2) * 0.8 / len(present) for i, case in enumerate(cases) if case in ratios
        ]
        axes.barh(places, [ratios[case] for case in cases if case in ratios], 0.8 / len(present), label=who)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [" ".join(case) for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("forward + backward, multiples of the time a copy of as many bytes takes")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(
    quick: Annotated[bool, typer.Option(help="Fewer sizes.")] = False,
    only: Annotated[str, typer.Option(help="Only ops whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for kernels.json and kernels.png.")] = Path("build/bench"),
) -> None:
    """Measure every kernel on this GPU, against eager, torch's own, Inductor and Liger where it is installed."""
    if not torch.cuda.is_available():
        typer.echo(NO_GPU, err=True)
        raise typer.Exit(2)
    from graphfuse.bench.cases import CASES

    cases = [case for case in CASES if only in case.op and (case.quick or not quick)]
    console = Console(width=None if Console().is_terminal else 160)
    bandwidth = copy_bandwidth()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        rows, failed = measure_all(cases, bandwidth, lambda what: progress.update(task, description=what))
    known = machine()
    title = f"{known['gpu']}, bf16, copy {bandwidth * 1e-12:.2f} TB/s, torch {known['torch']}, triton {known['triton']}"
    console.print(table_of(rows, title))
    for line in failed:
        console.print(line, markup=False)
    out.mkdir(parents=True, exist_ok=True)
    figures = {"machine": known, "copy_gbps": bandwidth * 1e-9, "rows": [asdict(row) for row in rows], "failed": failed}
    (out / "kernels.json").write_text(json.dumps(figures, indent=1) + "\n")
    try:
        draw(rows, title, out / "kernels.png")
    except ImportError:
        console.print('kernels.png: expected matplotlib to draw it, got no module (pip install "graphfuse[demo]")')
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
