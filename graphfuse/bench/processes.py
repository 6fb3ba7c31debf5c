"""One variant in a process of its own: no memory, cache or failure of another can be in its figures.

The process gets a folder with what to measure, and leaves what it found there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from graphfuse.bench.rows import Measured, Row, Settings, row_of
from graphfuse.bench.step import attempt
from graphfuse.bench.workloads import Workload

TASK, ROW, SKETCHES = "task.json", "row.json", "sketches.pt"


def apart(workload: Workload, variant: str, settings: Settings) -> Measured:
    """Measure in a new process; if that dies, the row says how."""
    with tempfile.TemporaryDirectory(prefix="graphfuse-") as name:
        folder = Path(name)
        task = {"workload": asdict(workload), "variant": variant, "settings": asdict(settings)}
        (folder / TASK).write_text(json.dumps(task), encoding="utf-8")
        command = [sys.executable, "-m", "graphfuse.bench.processes", name]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # what was found here is found there
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if not (folder / ROW).exists():
            return Measured(row_of(workload, variant, error=_death(done.returncode, done.stdout)))
        row = Row(**json.loads((folder / ROW).read_text(encoding="utf-8")))
        return Measured(row, **torch.load(folder / SKETCHES))


def _death(status: int, output: str) -> str:
    """How a process ended that had no time to say."""
    if status == -signal.SIGKILL:
        return "killed, as the system does where memory is out"
    lines = output.strip().splitlines()
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"{how}: {lines[-1].strip()}" if lines else how


def main(folder: Path) -> None:
    """Measure what the folder asks for."""
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    measured = attempt(Workload(**task["workload"]), task["variant"], Settings(**task["settings"]))
    torch.save({"sketches": measured.sketches, "truth": measured.truth}, folder / SKETCHES)
    (folder / ROW).write_text(json.dumps(asdict(measured.row)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
