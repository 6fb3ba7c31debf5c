"""Compile training steps for an H200 from empty caches, without one, and say where kernels were compiled.

    python tests/kernels/cold.py inductor
    python tests/kernels/cold.py aot_eager processes
    python tests/kernels/cold.py aot_eager without results

Prints a line of JSON for the step, by that inner backend and with caches of its own: what was compiled, and found
compiled, by launches. With "processes" those are there before. To be without: "jobs" (they are refused) and "results"
(jobs fail).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from typing import Any

import hopper
import torch
from torch._inductor import async_compile
from torch._inductor.utils import fresh_cache
from triton import knobs

import graphfuse
from graphfuse import certify
from graphfuse.bench.matching import Decoder
from graphfuse.kernels import _ahead


def _closed() -> Any:
    raise RuntimeError("Attempting to use a closed pool")


def run_both(trial: Any, drawn: Any, device: torch.device) -> None:
    for run in (trial._region, trial._replacement):
        trial._one(run, drawn, exact=False, device=device)


def main() -> None:
    """One layer in bf16, a step for each inner backend."""
    hopper.pretend()
    inner, lost = sys.argv[1], sys.argv[-1]
    if lost == "jobs":
        _ahead._executor = _closed
    if lost == "results":
        _ahead.compile_here = divmod  # which takes no such arguments, where the job runs
    # Nothing is computed, so nothing can be compared.
    certify._Trial._compare_real = lambda trial, truth, drawn, device: run_both(trial, drawn, device)
    compiled: list[str] = []
    found: list[str] = []

    def listen(**of: Any) -> None:
        if threading.current_thread() is launching:
            (found if of["cache_hit"] else compiled).append(of["src"].name)

    launching, knobs.compilation.listener = threading.current_thread(), listen
    if "processes" in sys.argv:  # as they are after some seconds
        while not async_compile.AsyncCompile.use_process_pool():
            time.sleep(0.1)
    torch.set_default_dtype(torch.bfloat16)
    tokens = torch.randint(512, (2, 64))
    with fresh_cache():
        step = graphfuse.optimize(Decoder(1).forward, inner=inner, strict=True)
        start = time.perf_counter()
        step(tokens).backward()
        seconds = time.perf_counter() - start
    rewritten = Counter(site.pattern for site in graphfuse.report(step).rewritten)
    print(json.dumps({"compiled": compiled, "found": found, "rewritten": rewritten, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
