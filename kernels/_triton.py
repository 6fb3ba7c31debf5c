"""Triton where it is installed, and the device helpers that several kernels share.

Triton exists on Linux only. Without it every op still runs, through its reference path, so this is the one file that
may see the import fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows: kernels are defined but never launched
    HAS_TRITON = False

    class _Missing:
        """Stands in for `triton` and `triton.language` so that kernel definitions still parse."""

        constexpr = Any

        def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
            return fn

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"triton: expected it to be installed to run a kernel, got no module ({name})")

    triton = tl = _Missing()

__all__ = ["HAS_TRITON", "tl", "triton"]
