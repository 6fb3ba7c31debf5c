"""`graphfuse bench head`: lm_head + cross-entropy against the matrix products that it cannot do without.

The floor is one product forward, and one more for each gradient that is wanted. Errors are relative to the truth in
float64, next to those of eager in the same dtype; memory is what a call needs beyond its inputs, gradients included.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from graphfuse import ops
from graphfuse.bench.timing import Timing, measure

NO_GPU = "graphfuse bench head: expected a CUDA GPU to measure, got none that torch can use"
IGNORED = -100
LARGER = 8  # of chunks: with it, Liger-Kernel takes as many tokens at a time as the largest products are fast with
TRUTH_ROWS = 1024  # tokens whose logits are held in float64 at a time

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A head: tokens, features, classes; the share of labels that is ignored; which gradients are wanted."""

    tokens: int
    features: int
    classes: int
    ignored: float = 0.0
    grads: str = "hidden weight"

    @property
    def name(self) -> str:
        words = [f"{self.tokens} x {self.features} x {self.classes}"]
        words += [f"{self.ignored:.0%} ignored"] if self.ignored else []
        words += {"hidden weight": [], "hidden": ["frozen head"], "": ["eval"]}[self.grads]
        return ", ".join(words)


CASES = (
    Case(16384, 4096, 128256),
    Case(8192, 1024, 151936),
    Case(16384, 1024, 151936),
    Case(16384, 4096, 128256, ignored=0.5),
    Case(16384, 4096, 128256, grads="hidden"),
    Case(16384, 4096, 128256, grads=""),
)


@dataclass(frozen=True)
class Row:
    """Milliseconds, the ratio to the products alone, GiB beyond the inputs, and relative errors."""

    case: str
    who: str
    ms: float
    ratio: float
    gib: float
    loss_error: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None
    same_again: bool | None = None


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What transformers does: the product in the model's dtype, the loss in fp32."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels, ignore_index=IGNORED)


def losses() -> dict[str, Loss]:
    """Everybody who can be measured here."""
    found: dict[str, Loss] = {"graphfuse": ops.linear_cross_entropy, "eager": eager}
    found["inductor"] = torch.compile(eager)
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
        found["liger"] = lambda hidden, weight, labels: loss(weight, hidden, labels)
        found[f"liger-{LARGER}"] = _liger_in_larger_chunks
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

        found["cce"] = lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED)
    return found


def _liger_in_larger_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger-Kernel's with its constant for the size of chunks raised, which its module does not pass on."""
    from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyFunction,
    )

    names = inspect.signature(LigerFusedLinearCrossEntropyFunction.forward).parameters
    options = {name: name_of.default for name, name_of in list(names.items())[4:]}
    options |= {"ignore_index": IGNORED, "chunk_mem_const": LARGER}
    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *options.values())[0]
    return loss


def problem(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random bf16 hidden states and weight, (N, H) and (V, H), and labels (N,)."""
    torch.manual_seed(0)
    hidden = torch.randn(case.tokens, case.features, device=device, dtype=torch.bfloat16)
    weight = (torch.randn(case.classes, case.features, device=device) / case.features**0.5).to(torch.bfloat16)
    labels = torch.randint(case.classes, (case.tokens,), device=device)
    labels[torch.rand(case.tokens, device=device) < case.ignored] = IGNORED
    return hidden.requires_grad_("hidden" in case.grads), weight.requires_grad_("weight" in case.grads), labels


def products(case: Case, device: torch.device) -> Callable[[], None]:
    """The matrix products of the case alone, those of ignored tokens included."""
    hidden, weight, _ = problem(case, device)
    hidden, weight = hidden.detach(), weight.detach()
    logits = torch.empty(case.tokens, case.classes, device=device, dtype=torch.bfloat16)
    grads = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if "hidden" in case.grads:
            torch.mm(logits, weight, out=grads[0])
        if "weight" in case.grads:
            torch.mm(logits.t(), hidden, out=grads[1])

    return run


def step(loss: Loss, case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The loss, and the gradients that are wanted."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not wanted:
        with torch.no_grad():
            return [loss(*inputs)]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, wanted)]


def truth(case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The same in float64, a few tokens at a time."""
    hidden, weight, labels = (tensor.detach() for tensor in inputs)
    count = (labels != IGNORED).sum()
    wide = weight.double()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    hidden_grad, weight_grad = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(wide)
    for start in range(0, case.tokens, TRUTH_ROWS):
        rows = slice(start, start + TRUTH_ROWS)
        kept = (labels[rows] != IGNORED).double()[:, None] / count
        logits = hidden[rows].double() @ wide.t()
        log_probs = logits.log_softmax(-1)
        picked = labels[rows].clamp_min(0)[:, None]
        total -= (log_probs.gather(1, picked) * kept).sum()
        if not case.grads:
            continue
        grad = log_probs.exp_().scatter_add_(1, picked, -torch.ones_like(kept)).mul_(kept)
        hidden_grad[rows] = grad @ wide
        if "weight" in case.grads:
            weight_grad += grad.t() @ hidden[rows].double()
    named = {"hidden": hidden_grad, "weight": weight_grad}
    return [total, *(named[name] for name in case.grads.split())]


def _error(got: Tensor, wanted: Tensor) -> float:
    """Relative to the size of the truth; by parts, as a float64 copy of all might not fit."""
    parts = zip(got.flatten().split(2**26), wanted.flatten().split(2**26), strict=True)
    squares = torch.stack([(a.double() - b).square().sum() for a, b in parts]).sum()
    return float((squares / wanted.square().sum()).sqrt())


def _floor(case: Case, device: torch.device) -> Timing:
    """What the products alone cost now."""
    torch.cuda.empty_cache()
    return measure(products(case, device), 10)


def measure_case(case: Case, who: dict[str, Loss], device: torch.device, on_row: Callable[[Row], None]) -> list[str]:
    """Measure everybody, the products before and after each; returns a line for each that failed."""
    floors = [_floor(case, device)]
    on_row(Row(case.name, "products", floors[0].gpu_us / 1e3, 1.0, floors[0].peak_mib / 1024))
    inputs = problem(case, device)
    wanted = truth(case, inputs)
    failed = []
    for name, loss in who.items():
        torch.cuda.empty_cache()
        try:
            results = step(loss, case, inputs)
            errors = [_error(a, b) for a, b in zip(results, wanted, strict=True)]
            again = step(loss, case, inputs)
            same = all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
            del results, again
            timing = measure(lambda loss=loss: step(loss, case, inputs), 10)  # type: ignore[misc]
        except Exception as error:  # out of memory, or a size that is not theirs
            failed.append(f"{case.name}: {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        floors.append(_floor(case, device))
        beside = statistics.fmean(floor.gpu_us for floor in floors[-2:])  # the clock changes from second to second
        named = dict(zip(("loss", *case.grads.split()), errors, strict=True))
        ms = timing.gpu_us / 1e3
        on_row(
            Row(
                case.name,
                name,
                ms,
                timing.gpu_us / beside,
                timing.peak_mib / 1024,
                named["loss"],
                named.get("hidden"),
                named.get("weight"),
                same,
            )
        )
    return failed


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The figures for people."""
    table = Table(
        "case", "by", "ms", "x products", "GiB", "loss error", "dX error", "dW error", "same again", title=title
    )

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2e}"

    previous = ""
    for row in rows:
        if previous not in ("", row.case):
            table.add_section()
        errors = [number(value) for value in (row.loss_error, row.hidden_error, row.weight_error)]
        same = "" if row.same_again is None else "yes" if row.same_again else "no"
        name = "" if row.case == previous else row.case
        table.add_row(name, row.who, f"{row.ms:.2f}", f"{row.ratio:.3f}", f"{row.gib:.3f}", *errors, same)
        previous = row.case
    return table


def main(
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    by: Annotated[str, typer.Option(help="Only these, comma-separated.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Time lm_head + cross-entropy: eager, Inductor, graphfuse, and Liger and CCE where they are installed."""
    if not torch.cuda.is_available():
        typer.echo(NO_GPU, err=True)
        raise typer.Exit(2)
    device = torch.device("cuda")
    console = Console(width=None if Console().is_terminal else 160)
    rows: list[Row] = []
    failed: list[str] = []
    who: dict[str, Any] = {name: loss for name, loss in losses().items() if not by or name in by.split(",")}
    for case in CASES:
        if only in case.name:
            with console.status(case.name):
                failed += measure_case(case, who, device, rows.append)
    console.print(table_of(rows, f"{torch.cuda.get_device_name()}, bf16, torch {torch.__version__}"))
    for line in failed:
        console.print(line, markup=False)
    if json_path is not None:
        found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "failed": failed}
        json_path.write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
