"""A `torch.compile` backend that rewrites model graphs to hand-written Triton kernels, and reports what it did."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graphfuse.errors import ConfigError, GraphfuseError, GraphfuseWarning, VerificationError
from graphfuse.reporting import Report, Site

if TYPE_CHECKING:
    from graphfuse.api import last_report, optimize, report

__all__ = [
    "ConfigError",
    "GraphfuseError",
    "GraphfuseWarning",
    "Report",
    "Site",
    "VerificationError",
    "last_report",
    "optimize",
    "report",
]

_LAZY = ("last_report", "optimize", "report")
_MODULES = ("lazy", "ops")


def __getattr__(name: str) -> Any:
    # Importing torch's compiler takes seconds, and TORCH_LOGS=graphfuse imports this package while torch itself is
    # still being imported.
    if name in _LAZY:
        from graphfuse import api

        return getattr(api, name)
    if name in _MODULES:
        return importlib.import_module(f"graphfuse.{name}")
    raise AttributeError(f"module 'graphfuse' has no attribute {name!r}")
