"""Compile training steps for an H200 from empty caches, on a machine that has none, and say where kernels were compiled.

    python tests/kernels/cold.py lost processes

Prints a line of JSON for each of two steps, every one with caches of its own. Names that are given take something away:
"processes" (none are started), "jobs" (they are refused), "results" (jobs fail).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import Any

import hopper
import torch
from torch._inductor import async_compile
from torch._inductor.utils import fresh_cache
from triton import JITFunction, knobs

import graphfuse
from graphfuse import certify
from graphfuse.bench.matching import Decoder
from graphfuse.kernels import _ahead, _triton

LAYERS = 2


def _take_away(lost: set[str]) -> None:
    pool = async_compile.AsyncCompile.process_pool

    class Refusing:
        def submit(self, *_: Any) -> None:
            raise RuntimeError("Attempting to use a closed pool")

    if "processes" in lost:
        torch._inductor.config.compile_threads = 1
    if "jobs" in lost:
        async_compile.AsyncCompile.process_pool = lambda: Refusing()
    if "results" in lost:
        _ahead.compile_here = divmod  # which takes no such arguments, where the job runs
    assert pool is not None


def _forget() -> None:
    torch._dynamo.reset()
    certify.forget()
    _triton._compiled.clear()
    for module in [module for name, module in sys.modules.items() if name.startswith("graphfuse.kernels.")]:
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()


def main() -> None:
    """Two steps of a small decoder in bf16."""
    hopper.pretend()
    _take_away(set(sys.argv[2:]))
    # Nothing is computed, so nothing can be compared.
    certify._Trial._compare_real = lambda trial, drawn, device: trial._both(drawn, exact=False, device=device) and None
    compiled: list[str] = []
    found: list[str] = []
    knobs.compilation.listener = lambda *, src, cache_hit, **_: (found if cache_hit else compiled).append(src.name)
    torch.set_default_dtype(torch.bfloat16)
    tokens = torch.randint(512, (2, 64))
    for _ in range(2):
        _forget()
        compiled.clear()
        found.clear()
        with fresh_cache():
            step = graphfuse.optimize(Decoder(LAYERS).forward, strict=True)
            start = time.perf_counter()
            step(tokens).backward()
            seconds = time.perf_counter() - start
        rewritten = Counter(site.pattern for site in graphfuse.report(step).rewritten)
        print(json.dumps({"compiled": compiled, "found": found, "rewritten": rewritten, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
