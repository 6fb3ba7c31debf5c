"""Run the zoo, each type in a process of its own, and write docs/coverage.md.

    python -m tests.zoo                 all types, but not again those that are done since the last change
    python -m tests.zoo qwen3 llama     these; no file is written

The exit status is nonzero if anything is wrong or unexplained.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graphfuse.inner import source_digest
from tests.zoo import coverage
from tests.zoo.processes import measure_apart
from tests.zoo.recipes import RECIPES

ROOT = Path(__file__).parents[2]

Result = dict[str, Any]


def main() -> int:
    """Run what the command line says and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="types to run; all by default")
    parser.add_argument("--inner", default="eager", choices=["eager", "aot_eager"], help="what compiles the graphs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one type")
    parser.add_argument("--fresh", action="store_true", help="run again what is done")
    options = parser.parse_args()
    if unknown := set(options.names) - RECIPES.keys():
        parser.error(f"names: expected types with a recipe, got {sorted(unknown)}")

    state = ROOT / "build" / "zoo" / f"{options.inner}.jsonl"
    state.parent.mkdir(parents=True, exist_ok=True)
    names = options.names or sorted(RECIPES)
    done = {} if options.fresh or not state.exists() else _read(state)
    done |= _run_all([name for name in names if name not in done], options, state)
    results = {name: done[name] for name in names}

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    versions["Python"] = platform.python_version()
    zoo = coverage.Zoo(results, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), versions, options.inner)
    if not options.names and options.inner == "eager":
        (ROOT / "docs" / "coverage.md").write_text(coverage.document(zoo), encoding="utf-8")
    print(coverage.totals(zoo))
    problems = coverage.problems(zoo)
    print(*problems, sep="\n", file=sys.stderr)
    return int(bool(problems))


def _key(name: str) -> str:
    """What a result depends on: the sources of graphfuse and of the zoo, the versions under them, and the recipe."""
    return f"{_sources()} torch {torch.__version__} transformers {transformers.__version__} {_digest(RECIPES[name])}"


@functools.cache
def _sources() -> str:
    files = [
        Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in ("census", "measure", "recipes")
    ]
    return _digest([source_digest(), *files])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _read(state: Path) -> dict[str, Result]:
    lines = (json.loads(line) for line in state.read_text(encoding="utf-8").splitlines())
    return {
        line["type"]: line["result"] for line in lines if line["type"] in RECIPES and line["key"] == _key(line["type"])
    }


def _run_all(names: list[str], options: argparse.Namespace, state: Path) -> dict[str, Result]:
    logs = state.with_suffix("")
    logs.mkdir(exist_ok=True)
    results = {}
    columns = [*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn()]
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ThreadPoolExecutor(options.jobs) as pool,
        state.open("a", encoding="utf-8") as file,
    ):
        bar = progress.add_task("zoo", total=len(names))

        def run(name: str) -> tuple[str, Result]:
            return name, measure_apart(name, options.inner, options.timeout, logs / f"{name}.log")

        try:
            for future in as_completed([pool.submit(run, name) for name in names]):
                name, results[name] = future.result()
                file.write(json.dumps({"type": name, "key": _key(name), "result": results[name]}) + "\n")
                file.flush()
                progress.console.print(coverage.line(name, results[name]), highlight=False, soft_wrap=True)
                progress.advance(bar)
        finally:
            pool.shutdown(cancel_futures=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
