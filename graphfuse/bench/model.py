"""`graphfuse bench model`: whole steps, with and without graphfuse, side by side.

Every variant runs in a process of its own, one after the other, and what they compute is compared: one that is fast and
computes something else is flagged, and the command fails.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from graphfuse.backend import pattern_names
from graphfuse.bench.agreement import judged
from graphfuse.bench.processes import apart
from graphfuse.bench.rows import Measured, Row, Settings
from graphfuse.bench.show import chart, progress, remarks, table, where
from graphfuse.bench.step import VARIANTS, WITHOUT, attempt, is_variant
from graphfuse.bench.workloads import DTYPES, MASKS, PHASES, Workload, check, of_type, parse_settings, workloads
from graphfuse.inspect import InspectError

DEFAULT_VARIANTS = ("eager", "inductor", "liger", "graphfuse")


def chosen(
    names: Sequence[str], model_type: str | None, config: dict[str, Any], known: dict[str, Workload]
) -> list[Workload]:
    """The workloads of these names and factories and of this model type; all that are known if there is none.

    Raises:
        InspectError: a name, a model type or a field of its configuration that is not known.
    """
    found = []
    for name in ",".join(names).split(",") if names else ():
        if ":" in name:
            found.append(Workload(name, factory=name))
        elif name in known:
            found.append(known[name])
        else:
            raise InspectError(f"names: expected package.module:factory or names among {', '.join(known)}, got {name}")
    if model_type is not None:
        found.append(of_type(model_type, config))
    return found or list(known.values())


def machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions, without which a figure means nothing."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    found = {"machine": name, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("transformers", "liger_kernel"):
        if importlib.util.find_spec(package) is not None:
            found[package] = importlib.metadata.version(package)
    return found


def write(rows: Sequence[Row], about: dict[str, str], *paths: Path | None) -> None:
    """Write the figures as JSON: after every variant, so that what was measured is not lost."""
    text = json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    for path in paths:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Workloads (see --list; all by default), or package.module:factory.")
    ] = None,
    model_type: Annotated[str | None, typer.Option(help="A model type of transformers, such as qwen3.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of its configuration; may be repeated.")
    ] = None,
    variants: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(VARIANTS)}, {WITHOUT}PATTERN[+PATTERN].")
    ] = "",
    masks: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(MASKS)}.")] = "none",
    phases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(PHASES)}.")] = "train",
    batch: Annotated[int | None, typer.Option(help="Sequences of a step.", min=1)] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence.", min=1)] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="With gradient checkpointing.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed steps.", min=1)] = 10,
    device: Annotated[str, typer.Option(help="Where to run; the GPU if there is one.")] = "",
    mode: Annotated[str | None, typer.Option(help="Inductor's mode, such as reduce-overhead.")] = None,
    inner: Annotated[str, typer.Option(help="What compiles the graph that graphfuse rewrote.")] = "inductor",
    one_process: Annotated[
        bool,
        typer.Option(
            help="Run all variants in this process. The profiler stays: launches of all but the first take longer."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for model.json and model.png.")] = Path("build/bench"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.")] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List the workloads and stop.")] = False,
) -> None:
    """Time whole steps of training, or of inference: eager, Inductor, graphfuse, and Liger where it is installed.

    Ends with 1 if a variant computes something else than eager, or if none could run.
    """
    console, errors = Console(width=None if Console().is_terminal else 160), Console(stderr=True)
    known = workloads()
    if list_names:
        for workload in known.values():
            console.print(f"{workload.name}: {workload.model_type}, {workload.batch} x {workload.seq} tokens")
        return
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    asked = variants.split(",") if variants else [v for v in DEFAULT_VARIANTS if v != "liger" or has_liger]
    try:
        if wrong := [name for name in asked if not is_variant(name)]:
            expected = ", ".join((*VARIANTS, WITHOUT + "+".join(pattern_names())))
            raise InspectError(f"variants: expected names among {expected}, got {wrong[0]}")
        for argument, got, known_names in (
            ("masks", masks.split(","), list(MASKS)),
            ("phases", phases.split(","), list(PHASES)),
            ("dtype", [dtype] if dtype else [], list(DTYPES)),
        ):
            if wrong := [item for item in got if item not in known_names]:
                raise InspectError(f"{argument}: expected names among {', '.join(known_names)}, got {wrong[0]}")
        config = parse_settings(settings or []) | ({} if layers is None else {"num_hidden_layers": layers})
        steps = [
            replace(
                own,
                batch=batch or own.batch,
                seq=seq or own.seq,
                config={**own.config, **config},
                mask=mask,
                dtype=dtype or own.dtype,
                checkpointing=checkpointing,
                phase=phase,
            )
            for own in chosen(names or [], model_type, config, known)
            for phase, mask in itertools.product(phases.split(","), masks.split(","))
        ]
        for step in steps:
            check(step)
    except InspectError as error:
        errors.print(str(error), soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    how = Settings(str(place), repeats, inner, mode, truth=len(asked) > 1)
    about = machine(place)
    rows: list[Row] = []
    for workload in steps:
        measured: list[Measured] = []
        found: list[Row] = []
        for variant in asked:
            measured.append((attempt if one_process else apart)(workload, variant, how))
            found = judged(measured)
            errors.print(progress(measured[-1].row), soft_wrap=True, markup=False, highlight=False)
            write([*rows, *found], about, out / "model.json", json_path)
        rows += found
        console.print(table(found, workload.title))
        categories = where(found, "kernel" if place.type == "cuda" else "operation")
        if categories is not None:
            console.print(categories)
        for line in remarks(found):
            console.print(line, soft_wrap=True)
    ran = [row for row in rows if not row.error]
    if ran:
        title = ", ".join(f"{name} {value}" if name != "machine" else value for name, value in about.items())
        try:
            chart(rows, title).savefig(out / "model.png", dpi=150)
        except ImportError:
            console.print('model.png: expected matplotlib to draw it, got no module (pip install "graphfuse[demo]")')
    console.print(f"written to {out}")
    if not ran or any(row.disagrees for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
