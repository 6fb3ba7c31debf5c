"""One variant of a step: built, compiled, timed, and what it computed.

A training step is forward and backward, labels given, its output kept whole as a training loop would. Kernels that win
alone may lose in a step, and memory is only saved if nothing else keeps it: this is the measurement that counts.
Reading a prompt and generating one token behind it are steps too: there a kernel has little to do, and what it costs to
call shows.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphfuse
from graphfuse.backend import calls, pattern_names
from graphfuse.bench import profiles
from graphfuse.bench.agreement import WIDER, sketch
from graphfuse.bench.power import Meter
from graphfuse.bench.rows import Measured, Settings, Sketches, row_of
from graphfuse.bench.workloads import DTYPES, Workload, build, moved, recompute_layers
from graphfuse.config import MEMORY
from graphfuse.errors import GraphfuseError
from graphfuse.reporting import Report

VARIANTS = ("eager", "inductor", "graphfuse", *(f"graphfuse-{memory}" for memory in MEMORY), "liger")
WITHOUT = "graphfuse-without-"  # and names of patterns, joined by "+"
WARM_UP = 3
CHECKED = 2  # which step is looked at: the first is timed

Look = Callable[[str, Tensor], None]


class Step(Protocol):
    """Runs once, and returns the loss, or the mean of the logits."""

    def __call__(self, look: Look | None = None) -> Tensor:
        """Tell `look`, if there is one, of the result, by the name of what it is, while the gradients are there."""
        ...


class VariantError(GraphfuseError):
    """This variant cannot run this workload; the message is one line."""


def attempt(workload: Workload, variant: str, settings: Settings) -> Measured:
    """Measure, or say why that did not work."""
    try:
        return measure(workload, variant, settings)
    except Exception as error:  # one that cannot run says so, and the others run
        return Measured(row_of(workload, variant, error=f"{type(error).__name__}: {_first_line(error)}"))


def measure(workload: Workload, variant: str, settings: Settings) -> Measured:
    """Build, compile and time one variant, and look at what its second step computes.

    Raises:
        Whatever the variant raises.
    """
    device = torch.device(settings.device)
    _forget(device)
    model, given = build(workload, device)
    step = _step(workload, model, given, 2 + WARM_UP + settings.repeats + 1)
    before = calls(pattern_names())
    with _names_kept(model), _fresh_caches():
        compiled(model, variant, settings)
        start = time.perf_counter()
        value = step().item()
        first = time.perf_counter() - start
        sketches = _sketches(step, model)
        for _ in range(WARM_UP):
            step()
        with Meter(device) as meter:
            times, peak = _timed(step, device, settings.repeats)
        profiled, note = _profiled(step, device)
    median = statistics.median(times)
    tokens = workload.batch * (1 if workload.phase == "decode" else workload.seq)
    if device.type != "cuda":
        own = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
        peak = (profiled.peak_bytes + sum(own.values())) / 2**30
    known = _told(graphfuse.report(model), before) if variant.startswith("graphfuse") else {"notes": []}
    known["notes"] += [note] if note else []
    row = row_of(
        workload,
        variant,
        step_ms=median,
        fastest_ms=min(times),
        slowest_ms=max(times),
        tokens_per_s=1e3 * tokens / median,
        peak_gib=peak,
        first_step_s=first,
        compile_s=max(first - median / 1e3, 0.0),
        value=value,
        where_ms=profiled.by_category,
        clock_mhz=meter.clock_mhz,
        watts=meter.watts,
        **known,
    )
    if variant != "eager" or not settings.truth:
        return Measured(row, sketches)
    truth, note = _truth(workload, model, given)
    return Measured(replace(row, notes=row.notes + ([note] if note else [])), sketches, truth)


def _step(workload: Workload, model: nn.Module, given: dict[str, Any], steps: int) -> Step:
    if workload.phase == "train":
        return training(model, given)
    if workload.factory:
        return forwarding(model, given)
    return reading(model, given) if workload.phase == "prefill" else generating(model, given, steps)


def is_variant(name: str) -> bool:
    """Whether it is one of `VARIANTS`, or graphfuse without patterns that there are."""
    return name in VARIANTS or (name.startswith(WITHOUT) and _left_out(name) <= {*pattern_names()})


def _left_out(variant: str) -> set[str]:
    return {*variant.removeprefix(WITHOUT).split("+")} if variant.startswith(WITHOUT) else set()


def compiled(model: nn.Module, variant: str, settings: Settings) -> None:
    """Prepare the model in place.

    Raises:
        VariantError: Liger-Kernel does not know the model.
    """
    if variant == "inductor":
        model.compile(mode=settings.mode)
    elif variant.startswith("graphfuse"):
        memory = variant.removeprefix("graphfuse-")
        left_out = _left_out(variant)
        graphfuse.optimize(
            model,
            memory=memory if memory in MEMORY else "balanced",
            patterns=[name for name in pattern_names() if name not in left_out] if left_out else None,
            inner=settings.inner,
            mode=settings.mode,
        )
    elif variant == "liger":
        from liger_kernel.transformers import monkey_patch  # type: ignore[import-not-found]

        model_type = getattr(getattr(model, "config", None), "model_type", "none")
        if model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:  # it would leave the model as it is
            raise VariantError(f"liger: expected a model type that Liger-Kernel knows, got {model_type}")
        monkey_patch._apply_liger_kernel_to_instance(model=model)


def training(model: nn.Module, given: dict[str, Any]) -> Step:
    """A step of training."""

    def step(look: Look | None = None) -> Tensor:
        output = model(**given)
        loss = loss_of(output)
        loss.backward()
        if look is not None:
            look("loss", loss)
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def loss_of(output: Any) -> Tensor:
    """What is trained: the loss of an output, its only number, or the mean of its squares."""
    if isinstance(output, dict) and "loss" in output:  # transformers' outputs are dicts, too
        output = output["loss"]
    elif getattr(output, "loss", None) is not None:
        output = output.loss
    elif isinstance(output, tuple | list):
        output = output[0]
    elif isinstance(output, dict):
        output = next(iter(output.values()))
    if not isinstance(output, Tensor):
        raise VariantError(f"model: expected a tensor or an output with a loss, got {type(output).__name__}")
    return output if output.dim() == 0 else output.float().square().mean()


def forwarding(model: nn.Module, given: dict[str, Any]) -> Step:
    """The same without gradients."""

    @torch.no_grad()
    def step(look: Look | None = None) -> Tensor:
        loss = loss_of(model(**given))
        if look is not None:
            look("loss", loss)
        return loss

    return step


def reading(model: nn.Module, given: dict[str, Any]) -> Step:
    """Reading a prompt, for the logits of what would come next."""
    prompt = {name: value for name, value in given.items() if name != "labels"}

    @torch.no_grad()
    def step(look: Look | None = None) -> Tensor:
        logits: Tensor = model(**prompt, logits_to_keep=1).logits
        if look is not None:
            look("logits", logits)
        return logits.float().mean()

    return step


@torch.no_grad()
def generating(model: nn.Module, given: dict[str, Any], steps: int) -> Step:
    """Generating one token behind a prompt, then the next."""
    from transformers import StaticCache

    tokens, mask = given["input_ids"], given.get("attention_mask")
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + steps)
    # `forward` is not the compiled call: of this, only the step is compiled.
    model.forward(input_ids=tokens, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    masks = [None] * steps if mask is None else [functional.pad(mask, (0, n + 1), value=1) for n in range(steps)]
    upcoming = iter(masks)

    @torch.no_grad()
    def step(look: Look | None = None) -> Tensor:
        output = model(input_ids=tokens[:, -1:], attention_mask=next(upcoming), past_key_values=cache)
        logits: Tensor = output.logits
        if look is not None:
            look("logits", logits)
        return logits.float().mean()

    return step


def _sketches(step: Step, model: nn.Module) -> Sketches:
    """Run a step, and sketch its result and every gradient."""
    found: Sketches = {}

    def look(name: str, result: Tensor) -> None:
        found[name] = sketch(result)
        grads = ((name, p.grad) for name, p in model.named_parameters())
        found.update((name, sketch(grad)) for name, grad in grads if grad is not None)

    step(look)
    return found


def _truth(workload: Workload, model: nn.Module, given: dict[str, Any]) -> tuple[Sketches | None, str]:
    """The same step of eager in a wider dtype, every layer computed again in backward; or why there is none."""
    wider = WIDER[DTYPES[workload.dtype]]
    try:
        model.to(wider)
        given = moved(given, next(model.parameters()).device, wider)
        if workload.phase == "train" and getattr(model, "supports_gradient_checkpointing", False):
            recompute_layers(model)
        step = _step(workload, model, given, CHECKED)
        for _ in range(CHECKED - 1 if workload.phase == "decode" else 0):
            step()
        return _sketches(step, model), ""
    except Exception as error:  # most often, too little memory
        name = str(wider).removeprefix("torch.")
        return None, f"eager's own error is not known, {name}: {type(error).__name__}: {_first_line(error)}"


def _profiled(step: Step, device: torch.device) -> tuple[profiles.Profile, str]:
    """What the profiler sees of a step; or nothing, and why."""
    try:
        return profiles.of(step, device), ""
    except Exception as error:  # it needs rights and libraries of its own
        return profiles.Profile(
            {}, 0
        ), f"where the time goes is not known: {type(error).__name__}: {_first_line(error)}"


def _told(report: Report, before: dict[str, dict[str, int]]) -> dict[str, Any]:
    """What a report says, as fields of a row."""
    sites: dict[str, Counter[str]] = {}
    for site in report.rewritten:
        sites.setdefault(site.pattern, Counter())[site.variant] += 1
    since = {name: Counter(ways) - Counter(before.get(name, {})) for name, ways in report.calls.items()}
    return {
        "rewritten": dict(report.counts),
        "refused": sorted({f"{site.pattern}: {site.reason}" for site in report.refused}),
        "sites": {name: dict(variants) for name, variants in sites.items()},
        "calls": {name: dict(ways) for name, ways in since.items() if ways},
        "notes": list(report.notes),
    }


def _forget(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _names_kept(model: nn.Module) -> Iterator[None]:
    """Put back what Liger-Kernel writes into the file of a model, such as its rotation: other variants use it."""
    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    try:
        yield
    finally:
        names.update(before)


@contextlib.contextmanager
def _fresh_caches() -> Iterator[None]:
    """Compile as for the first time."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def _timed(step: Step, device: torch.device, repeats: int) -> tuple[list[float], float]:
    """Milliseconds of every step, and on a GPU GiB at the peak."""
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
