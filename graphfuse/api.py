"""What users call: `optimize`, `report`, `last_report`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import trace_rules

from graphfuse import record
from graphfuse.backend import Backend, begin, calls, pattern_names
from graphfuse.config import Config
from graphfuse.errors import GraphfuseWarning
from graphfuse.reporting import Report
from graphfuse.verify import Verified

Compilable = TypeVar("Compilable", bound=Callable[..., Any])


def optimize(
    model: Compilable,
    *,
    inner: str = "inductor",
    dynamic: bool | None = None,
    fullgraph: bool = False,
    mode: str | None = None,
    patterns: Iterable[str] | None = None,
    lazy_logits: bool = True,
    memory: str = "balanced",
    policy: str = "measured",
    strict: bool = False,
    verify: bool = False,
    **inner_options: Any,
) -> Compilable:
    """Compile `model` with graphfuse.

    Args:
        model: an `nn.Module`, compiled in place: class, `isinstance` and `state_dict` keys stay; or a function.
        inner: backend for the rewritten graph: "inductor", "aot_eager", "eager" or any that torch knows.
        dynamic: as in `torch.compile`.
        fullgraph: as in `torch.compile`.
        mode: Inductor's mode ("default", "reduce-overhead", "max-autotune", ...).
        patterns: names of the patterns to use; all of them if `None`.
        lazy_logits: return logits beside a fused loss as a tensor that is computed when it is read.
        memory: what backward computes again instead of keeping it: "speed" (what Inductor would), "balanced" (also what
            norms, rotations and gates return), "min" (everything but matrix products and attention).
        policy: "measured" leaves to Inductor what it was measured to compute faster, and measures which attention
            kernel is the fastest; "always" rewrites all sites, with the kernel that PyTorch chooses.
        strict: raise what goes wrong inside graphfuse instead of warning and compiling the graph as it was.
        verify: on the first batch, compare outputs and gradients with eager, print the figures, and raise if they
            differ by more than eager's own error in a wider dtype. Takes a copy of the model. Modules only.
        inner_options: options for Inductor, by the names of `torch._inductor.config`.

    Returns:
        The same module, or the compiled function.

    Raises:
        ConfigError: an unknown option, inner backend or pattern; the message lists the valid ones.
        TypeError: `model` is not callable, or not a module and to be verified.
        VerificationError: on the first call, with `verify`.
    """
    if verify and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module to verify, got {type(model).__name__}")
    if not callable(model):
        raise TypeError(f"model: expected an nn.Module or a function, got {type(model).__name__}")
    options: dict[str, Any] = {
        "inner": inner,
        "patterns": patterns,
        "lazy_logits": lazy_logits,
        "memory": memory,
        "policy": policy,
        "strict": strict,
        "mode": mode,
        **inner_options,
    }
    config = Config.parse(options, pattern_names())
    begin()
    if isinstance(model, nn.Module):
        options["patterns"] = config.patterns
        settings: dict[str, Any] = {"backend": "graphfuse", "dynamic": dynamic, "fullgraph": fullgraph}
        if trace_rules.check(model.forward):  # torch's own: Dynamo passes over the frames of its modules
            model._compiled_call_impl = torch.compile(_framed(model), options=options, **settings)
        else:
            model.compile(options=options, **settings)
        model.__dict__["_replicate_for_data_parallel"] = _Replicas(model)
        if verify:
            compiled_call: Any = model._compiled_call_impl
            model._compiled_call_impl = Verified(model, compiled_call)
        return model
    backend = Backend(config)
    compiled: Any = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    compiled.__graphfuse_backend__ = backend
    result: Compilable = compiled
    return result


def _framed(model: nn.Module) -> Callable[..., Any]:
    """The module's call, with a frame around it that Dynamo looks into."""

    def framed(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    return framed


class _Replicas:
    """Makes the replicas that `nn.DataParallel` runs on other devices: not compiled, as compiled code has the original.

    A copy of the model, or a pickle, is not compiled, and knows nothing of this.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> nn.Module:
        warnings.warn(
            "graphfuse: DataParallel: expected one process for each device, got replicas of a compiled model, which "
            "run uncompiled; use DistributedDataParallel (torchrun), or let the process see one device",
            GraphfuseWarning,
            stacklevel=2,
        )
        replica: nn.Module = type(self.model)._replicate_for_data_parallel(self.model)
        replica._compiled_call_impl = None
        return replica

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (type(self.model)._replicate_for_data_parallel, self.model)


def report(model: Callable[..., Any]) -> Report:
    """The report over every graph that `model` was compiled into so far.

    Args:
        model: a module, however it was compiled with graphfuse (itself, a part of it, a wrapper around it), or a
            function that `optimize` returned.

    Raises:
        TypeError: a function that did not come from `optimize`; use `last_report` after calling it.
    """
    if isinstance(model, nn.Module):
        return _counted(record.report_of(model))
    backend = getattr(model, "__graphfuse_backend__", None)
    if backend is None:
        raise TypeError(f"model: expected a module or what optimize() returned, got {type(model).__name__}")
    return _counted(record.report_of_owner(backend))


def last_report() -> Report:
    """The report of the model or function that was compiled last."""
    return _counted(record.last())


def _counted(found: Report) -> Report:
    found.calls = calls({site.pattern for site in found.rewritten})
    return found
