"""Measures in a process of its own: one type's crash, hang or global state is nobody else's."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.zoo.measure import measure

Result = dict[str, Any]

# The imports take longer than many a type: a server does them once, and its forks inherit them.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def measure_apart(name: str, inner: str, timeout: float, log: Path) -> Result:
    """`measure`, whose every failure is a result, too: `{"error": ...}`; what it prints goes to `log`."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_measure, args=(name, inner, log, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            process.kill()
            return {"error": f"no result within {timeout:.0f} s"}
        result: Result = ours.recv()
        return result
    except EOFError:
        process.join()
        return {"error": f"the process ended with status {process.exitcode}"}
    finally:
        process.join()


def _measure(name: str, inner: str, log: Path, connection: Connection) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    try:
        result = measure(name, inner)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    connection.send(result)
