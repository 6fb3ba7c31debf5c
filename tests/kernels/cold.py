"""Compile training steps for an H200 from empty caches, without one, and say where kernels were compiled.

    python tests/kernels/cold.py inductor inductor
    python tests/kernels/cold.py aot_eager without results

Prints a line of JSON for each step, by that inner backend and with caches of its own. To be without: "jobs"
(they are refused) and "results" (jobs fail).
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


class _Closed:
    """A pool that takes no jobs."""

    def submit(self, *_: Any) -> None:
        raise RuntimeError("Attempting to use a closed pool")


def _forget() -> None:
    torch._dynamo.reset()
    certify.forget()
    _triton._compiled.clear()
    for module in [module for name, module in sys.modules.items() if name.startswith("graphfuse.kernels.")]:
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()


def main() -> None:
    """One layer in bf16, a step for each inner backend."""
    hopper.pretend()
    *inners, lost = sys.argv[1:] if "without" in sys.argv else [*sys.argv[1:], ""]
    if lost == "jobs":
        async_compile.AsyncCompile.process_pool = _Closed
    if lost == "results":
        _ahead.compile_here = divmod  # which takes no such arguments, where the job runs
    # Nothing is computed, so nothing can be compared.
    certify._Trial._compare_real = lambda trial, drawn, device: trial._both(drawn, exact=False, device=device) and None
    compiled: list[str] = []
    found: list[str] = []
    knobs.compilation.listener = lambda **of: (found if of["cache_hit"] else compiled).append(of["src"].name)
    torch.set_default_dtype(torch.bfloat16)
    tokens = torch.randint(512, (2, 64))
    for inner in (name for name in inners if name != "without"):
        _forget()
        compiled.clear()
        found.clear()
        with fresh_cache():
            step = graphfuse.optimize(Decoder(1).forward, inner=inner, strict=True)
            start = time.perf_counter()
            step(tokens).backward()
            seconds = time.perf_counter() - start
        rewritten = Counter(site.pattern for site in graphfuse.report(step).rewritten)
        print(json.dumps({"compiled": compiled, "found": found, "rewritten": rewritten, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
