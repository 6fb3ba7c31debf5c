"""Count one workload of `graphfuse bench model`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

FOLDER = Path("build") / "dry"

library = torch.library.Library("aten", "IMPL")  # for as long as it lives


def _no_numbers() -> None:
    """Believe without looking what can only be seen in the results of kernels."""
    from graphfuse import certify
    from graphfuse.kernels import _token_chunks
    from graphfuse.patterns import _attention_mask

    certify._Trial._compare_real = lambda *_: None
    _attention_mask.device_of = lambda _: torch.device("cpu")
    # It asks the GPU how many tokens differ.
    library.impl("embedding_dense_backward", lambda grad, _, rows, *__: grad.new_empty(rows, grad.shape[-1]), "CUDA")
    count = _token_chunks.Kept.count
    _token_chunks.Kept.count = lambda kept: kept.order.numel() if kept.order.is_cuda else count(kept)


def run(
    workload: str,
    variant: Annotated[str, typer.Option(help="inductor or graphfuse.")] = "graphfuse",
    mask: Annotated[str, typer.Option(help="none, ones or padded.")] = "none",
    memory: Annotated[str, typer.Option(help="The option of graphfuse.")] = "balanced",
    checkpointing: Annotated[bool, typer.Option(help="Recompute every layer in backward.")] = False,
    kernels: Annotated[int, typer.Option(help="How many kernels to name.")] = 0,
    alive: Annotated[int, typer.Option(help="How many lines to name that what is alive at the peak comes from.")] = 0,
) -> None:
    """Print peak memory and the bytes of Triton's kernels as a line of JSON."""
    if not torch.cuda.is_available():
        from tests.dry.build import build

        own = {"TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.dry", *sys.argv[1:]],
            {**os.environ, **own, **build(FOLDER.absolute())},
        )

    from triton.backends import backends
    from triton.runtime.driver import driver

    import graphfuse
    from graphfuse.bench import workloads as bench
    from tests.kernels.hopper import Hopper

    hopper = Hopper()
    backends["nvidia"] = replace(backends["nvidia"], driver=Hopper)  # which Inductor asks for, and finds active
    driver.set_active(hopper)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN itself wants a GPU; flash attention keeps as much
    _no_numbers()
    cuda = torch.device("cuda")
    step = replace(bench.workloads()[workload], mask=mask, checkpointing=checkpointing)
    model = bench.build_model(step, torch.device("meta")).to_empty(device=cuda)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    given = bench.inputs(step, model.config.vocab_size, cuda)
    model.compile(**({} if variant == "inductor" else {"backend": "graphfuse", "options": {"memory": memory}}))
    for _ in range(2):  # the first one compiles
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        hopper.launched.clear()
        torch.cuda.memory._record_memory_history(max_entries=10**6, stacks="python")
        output = model(**given)
        output.loss.backward()
        peak = torch.cuda.max_memory_allocated()
        del output
    moved: Counter[str] = Counter()
    for name, size in hopper.launched:
        moved[name] += size
    row = {"workload": workload, "variant": variant, "mask": mask, "memory": memory, "checkpointing": checkpointing}
    row |= {"peak_gib": round(peak / 2**30, 3), "kernels_gb": round(sum(moved.values()) / 1e9, 2)}
    if variant != "inductor":
        row["counts"] = graphfuse.last_report().counts
    print(json.dumps(row))
    for name, size in moved.most_common(kernels):
        print(f"{size / 1e9:9.2f} GB  {name}")
    for line, size in _at_peak().most_common(alive):
        print(f"{size / 2**30:9.3f} GiB {line}")


def _at_peak() -> Counter[str]:
    """Bytes of a step's own memory that were alive when it was most, by the line that asked for them."""
    [events] = torch.cuda.memory._snapshot()["device_traces"]
    current: dict[int, Any] = {}
    peak: list[Any] = []
    size = largest = 0
    for event in events:
        if event["action"] == "alloc":
            current[event["addr"]] = event
            size += event["size"]
            if size > largest:
                largest, peak = size, list(current.values())
        elif event["action"] == "free_completed" and event["addr"] in current:
            size -= current.pop(event["addr"])["size"]
    found: Counter[str] = Counter()
    for event in peak:
        frames = [f for f in event["frames"] if any(name in f["filename"] for name in ("graphfuse", "inductor", "/x_"))]
        at = frames[0] if frames else event["frames"][0] if event["frames"] else {"filename": "autograd", "line": 0}
        found[f"{Path(at['filename']).name}:{at['line']}"] += event["size"]
    return found


if __name__ == "__main__":
    typer.run(run)
