"""The options of the backend, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from graphfuse.errors import ConfigError

MEMORY = ("speed", "balanced", "min")
POLICY = ("measured", "always")


@dataclass(frozen=True)
class Config:
    """What `torch.compile(..., backend="graphfuse", options={...})` and `graphfuse.optimize` accept.

    Attributes:
        inner: the backend that compiles the rewritten graph: "inductor", "aot_eager", "eager" or any that torch knows.
        patterns: names of the patterns to use; all of them if `None`.
        lazy_logits: return logits that only a reader outside the graph could want as a tensor that is computed when
            it is read (`graphfuse.lazy`).
        memory: what backward computes again instead of keeping it: "speed" (what Inductor would), "balanced" (also what
            graphfuse's norms, rotations and gates return), "min" (everything but matrix products and attention).
            Inductor only.
        policy: "measured" leaves sites to Inductor that it was measured to compute faster (`costs.toml`), and measures
            which of PyTorch's attention kernels is the fastest on this GPU; "always" rewrites all sites, and leaves
            those kernels to PyTorch.
        strict: raise what goes wrong inside graphfuse; otherwise it warns, and compiles the graph as it was.
        mode: Inductor's mode ("default", "reduce-overhead", "max-autotune", ...).
        inner_options: options for Inductor itself, by the names of `torch._inductor.config`.
    """

    inner: str = "inductor"
    patterns: tuple[str, ...] | None = None
    lazy_logits: bool = True
    memory: str = "balanced"
    policy: str = "measured"
    strict: bool = False
    mode: str | None = None
    inner_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def captures(self) -> bool:
        """Whether Inductor is to capture CUDA graphs."""
        default = self.mode in ("reduce-overhead", "max-autotune")
        return bool(self.inner == "inductor" and self.inner_options.get("triton.cudagraphs", default))

    @classmethod
    def parse(cls, options: Mapping[str, Any], known_patterns: Collection[str]) -> Config:
        """Check `options`; names that are Inductor's go to Inductor.

        Raises:
            ConfigError: an option, an inner backend or a pattern that does not exist; lists those that do.
        """
        own = {f.name for f in fields(cls)}
        kept = {name: value for name, value in options.items() if name in own}
        passed = {name: value for name, value in options.items() if name not in own}
        inner = kept.get("inner", "inductor")
        backends = sorted({"inductor", *torch._dynamo.list_backends(exclude_tags=())})
        if inner not in backends:
            raise ConfigError(f"inner: expected one of {backends}, got {inner!r}")
        inductors = torch._inductor.config.get_config_copy() if inner == "inductor" else {}
        unknown = [name for name in passed if name not in inductors]
        if unknown:
            raise ConfigError(f"options: expected names among {sorted(own)} (or Inductor's), got {unknown[0]!r}")
        patterns = kept.get("patterns")
        if patterns is not None:
            patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
            for name in patterns:
                if name not in known_patterns:
                    raise ConfigError(f"patterns: expected names among {sorted(known_patterns)}, got {name!r}")
        for name in ("strict", "lazy_logits"):
            if not isinstance(kept.get(name, False), bool):
                raise ConfigError(f"{name}: expected a bool, got {kept[name]!r}")
        for name, choices in (("memory", MEMORY), ("policy", POLICY)):
            if kept.get(name, choices[0]) not in choices:
                raise ConfigError(f"{name}: expected one of {list(choices)}, got {kept[name]!r}")
        inner_options = {**kept.get("inner_options", {}), **passed}
        return cls(
            inner=inner,
            patterns=patterns,
            lazy_logits=kept.get("lazy_logits", True),
            memory=kept.get("memory", "balanced"),
            policy=kept.get("policy", "measured"),
            strict=kept.get("strict", False),
            mode=kept.get("mode"),
            inner_options=inner_options,
        )
