"""`graphfuse bench model`: whole steps, with and without graphfuse, in one process.

A training step is forward and backward of a transformers model with random weights, labels given, its output kept
whole as a training loop would. Kernels that win alone may lose in a step, and memory is only saved if nothing else
keeps it: this is the measurement that counts. Reading a prompt and generating one token behind it are steps too: there
a kernel has little to do, and what it costs to call shows.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import json
import platform
import statistics
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import graphfuse
from graphfuse.config import MEMORY

WORKLOADS = Path(__file__).with_name("workloads.toml")
VARIANTS = ("eager", "inductor", "graphfuse", *(f"graphfuse-{memory}" for memory in MEMORY), "liger")
MASKS = ("none", "ones", "padded")
PHASES = ("train", "prefill", "decode")
WARM_UP = 3
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Workload:
    """A training step.

    Attributes:
        name: for people.
        model_type: of transformers.
        batch: sequences.
        seq: tokens of each.
        config: what differs from the model type's default configuration.
        mask: "none" passes no attention mask, "ones" one that hides nothing, "padded" one that hides the last quarter
            of every second sequence.
        dtype: of weights and activations.
        checkpointing: recompute layers in backward (transformers' gradient checkpointing).
        phase: "train", forward and backward; "prefill", forward of a prompt without gradients; "decode", forward of one
            more token of each sequence, the others in a static cache.
    """

    name: str
    model_type: str
    batch: int
    seq: int
    config: dict[str, Any] = field(default_factory=dict)
    mask: str = "none"
    dtype: str = "bfloat16"
    checkpointing: bool = False
    phase: str = "train"


@dataclass(frozen=True)
class Row:
    """What one variant costs: median milliseconds of a step, GiB at the peak, seconds until the first step was done.

    `value` is the loss, or where there is none the mean of the logits: the same for all variants.
    """

    workload: str
    variant: str
    phase: str
    mask: str
    step_ms: float
    peak_gib: float
    first_step_s: float
    value: float
    rewritten: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def workloads() -> dict[str, Workload]:
    """Those of `workloads.toml`, by name."""
    tables = tomllib.loads(WORKLOADS.read_text(encoding="utf-8"))
    return {name: Workload(name, **table) for name, table in tables.items()}


def build(workload: Workload, device: torch.device) -> nn.Module:
    """A model with random weights, the same every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(workload.model_type)
    for name, value in workload.config.items():
        setattr(config, name, None if value == "none" else value)
    # Some configurations work out their layers from other fields when they are made.
    config = type(config)(**{k: v for k, v in config.to_dict().items() if k not in ("layer_types", "model_type")})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # those of a vocabulary of another size
        setattr(config, name, None)
    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=DTYPES[workload.dtype])
    if workload.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return model.train(workload.phase == "train")


def inputs(workload: Workload, vocab: int, device: torch.device) -> dict[str, Any]:
    """The keyword arguments of a step."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (workload.batch, workload.seq), generator=generator).to(device)
    labels = tokens.clone()
    given: dict[str, Any] = {"input_ids": tokens, "labels": labels, "use_cache": False}
    if workload.mask != "none":
        mask = torch.ones_like(tokens)
        if workload.mask == "padded":
            mask[1::2, -(workload.seq // 4) :] = 0
            labels[mask == 0] = -100
        given["attention_mask"] = mask
    return given


def compiled(model: nn.Module, variant: str) -> None:
    """Prepare the model in place."""
    if variant == "inductor":
        model.compile()
    elif variant.startswith("graphfuse"):
        _, _, memory = variant.partition("-")
        graphfuse.optimize(model, memory=memory or "balanced")
    elif variant == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # type: ignore[import-not-found]

        _apply_liger_kernel_to_instance(model=model)


def measure(workload: Workload, variant: str, device: torch.device, repeats: int) -> Row:
    """Build, compile and time one variant.

    Args:
        workload: what to run.
        variant: one of `VARIANTS`.
        device: where.
        repeats: timed steps, after some that are not.

    Raises:
        Whatever the variant raises.
    """
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = build(workload, device)
    given = inputs(workload, model.config.get_text_config().vocab_size, device)  # type: ignore[union-attr, operator]
    steps = 1 + WARM_UP + repeats
    step = {"train": training, "prefill": reading, "decode": generating}[workload.phase](model, given, steps)
    compiled(model, variant)

    with _fresh_caches():
        start = time.perf_counter()
        value = step().item()
        first = time.perf_counter() - start
        for _ in range(WARM_UP):
            step()
        times, peak = _timed(step, device, repeats)
    report = graphfuse.report(model) if variant.startswith("graphfuse") else None
    return Row(
        workload.name,
        variant,
        workload.phase,
        workload.mask,
        statistics.median(times),
        peak,
        first,
        value,
        dict(report.counts) if report else {},
        sorted({f"{site.pattern}: {site.reason}" for site in report.refused}) if report else [],
    )


def training(model: nn.Module, given: dict[str, Any], _: int) -> Callable[[], Tensor]:
    """A step of training; returns the loss."""

    def step() -> Tensor:
        output = model(**given)
        output.loss.backward()
        model.zero_grad(set_to_none=True)
        loss: Tensor = output.loss.detach()
        return loss

    return step


def reading(model: nn.Module, given: dict[str, Any], _: int) -> Callable[[], Tensor]:
    """Reading a prompt; returns the mean logit of what would come next."""
    prompt = {name: value for name, value in given.items() if name != "labels"}

    @torch.no_grad()
    def step() -> Tensor:
        logits: Tensor = model(**prompt, logits_to_keep=1).logits
        return logits.float().mean()

    return step


@torch.no_grad()
def generating(model: nn.Module, given: dict[str, Any], steps: int) -> Callable[[], Tensor]:
    """Generating one token behind a prompt, then the next; returns its mean logit."""
    from transformers import StaticCache

    tokens, mask = given["input_ids"], given.get("attention_mask")
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + steps)
    # `forward` is not the compiled call: of this, only the step is compiled.
    model.forward(input_ids=tokens, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    masks = [None] * steps if mask is None else [functional.pad(mask, (0, n + 1), value=1) for n in range(steps)]
    upcoming = iter(masks)

    @torch.no_grad()
    def step() -> Tensor:
        output = model(input_ids=tokens[:, -1:], attention_mask=next(upcoming), past_key_values=cache)
        logits: Tensor = output.logits
        return logits.float().mean()

    return step


@contextlib.contextmanager
def _fresh_caches() -> Iterator[None]:
    """Compile as for the first time."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def _timed(step: Callable[[], Any], device: torch.device, repeats: int) -> tuple[list[float], float]:
    """Milliseconds of every step, and GiB at the peak (0 where the device does not tell)."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return times, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = []
    for _ in range(repeats):
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        step()
        pair[1].record()
        torch.cuda.synchronize()
        events.append(pair)
    return [a.elapsed_time(b) for a, b in events], torch.cuda.max_memory_allocated() / 2**30


def table(rows: Sequence[Row]) -> Table:
    """Rows of one or several workloads, with their ratios to Inductor's."""
    figures = ("step", "x Inductor", "peak", "first step", "value", "rewritten")
    result = Table("workload", "phase", "mask", "variant", *figures)
    base = {(row.workload, row.phase, row.mask): row.step_ms for row in rows if row.variant == "inductor"}
    for row in rows:
        inductor = base.get((row.workload, row.phase, row.mask))
        result.add_row(
            row.workload,
            row.phase,
            row.mask,
            row.variant,
            f"{row.step_ms:.1f} ms" if row.step_ms >= 100 else f"{row.step_ms:.2f} ms",
            f"{row.step_ms / inductor:.3f}" if inductor else "",
            f"{row.peak_gib:.2f} GiB" if row.peak_gib else "",
            f"{row.first_step_s:.0f} s",
            f"{row.value:.5f}",
            ", ".join(f"{count} {name}" for name, count in row.rewritten.items()),
        )
    return result


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Workloads; see --list. All by default.")] = None,
    variants: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(VARIANTS)}.")] = "",
    masks: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(MASKS)}.")] = "none",
    phases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(PHASES)}.")] = "train",
    batch: Annotated[int | None, typer.Option(help="Sequences of a step.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="With gradient checkpointing.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed steps.", min=1)] = 10,
    device: Annotated[str, typer.Option(help="Where to run; the GPU if there is one.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List the workloads and stop.")] = False,
) -> None:
    """Time whole steps of training, or of inference: eager, Inductor, graphfuse, and Liger where it is installed."""
    console, errors = Console(), Console(stderr=True)
    known = workloads()
    if list_names:
        for workload in known.values():
            console.print(f"{workload.name}: {workload.model_type}, {workload.batch} x {workload.seq} tokens")
        return
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    chosen = variants.split(",") if variants else ["eager", "inductor", "graphfuse", *(["liger"] if has_liger else [])]
    for argument, got, expected in (
        ("names", names or [], list(known)),
        ("variants", chosen, list(VARIANTS)),
        ("masks", masks.split(","), list(MASKS)),
        ("phases", phases.split(","), list(PHASES)),
        ("dtype", [dtype] if dtype else [], list(DTYPES)),
    ):
        if wrong := [item for item in got if item not in expected]:
            errors.print(f"{argument}: expected names among {', '.join(expected)}, got {wrong[0]}", soft_wrap=True)
            raise typer.Exit(2)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[Row] = []
    for name in names or known:
        for phase, mask in itertools.product(phases.split(","), masks.split(",")):
            own = known[name]
            depth = {} if layers is None else {"num_hidden_layers": layers}
            workload = replace(
                own,
                batch=batch or own.batch,
                seq=seq or own.seq,
                config={**own.config, **depth},
                mask=mask,
                dtype=dtype or own.dtype,
                checkpointing=checkpointing,
                phase=phase,
            )
            for variant in chosen:
                try:
                    rows.append(measure(workload, variant, where, repeats))
                except Exception as error:  # one that cannot run says so, and the others run
                    errors.print(f"{name}, {variant}: {type(error).__name__}: {str(error).splitlines()[0]}")
                    continue
                console.print(table(rows[-1:]))
    console.print(table(rows))
    if json_path is not None:
        machine = torch.cuda.get_device_name() if where.type == "cuda" else platform.processor() or platform.machine()
        found = {"machine": machine, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if len(rows) == 0:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
