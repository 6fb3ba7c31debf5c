"""What graphfuse says, and where torch's users look for it.

default                 one line on stderr for each model that is compiled
TORCH_LOGS=graphfuse    also a line for each graph; "+graphfuse" for each site; "-graphfuse" for errors alone
GRAPHFUSE_LOG=debug     the same without TORCH_LOGS; debug, info, warning, error, or off
logging                 whoever configures the root logger, or the logger "graphfuse", gets all of it there
TORCH_TRACE=folder      tlparse shows each graph's report as `graphfuse_report`
"""

from __future__ import annotations

import json
import logging
import os
import sys
import weakref

from torch import nn
from torch._logging._internal import trace_structured_artifact

from graphfuse.reporting import Report, Site

log = logging.getLogger("graphfuse")

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "off": 100}

_announced: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def set_up() -> None:
    """Follow GRAPHFUSE_LOG, if it is set.

    Raises:
        ValueError: it names no level.
    """
    name = os.environ.get("GRAPHFUSE_LOG", "").lower()
    if not name:
        return
    if name not in LEVELS:
        raise ValueError(f"GRAPHFUSE_LOG: expected one of {', '.join(LEVELS)}, got {name!r}")
    log.setLevel(LEVELS[name])
    if name != "off" and not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
        log.propagate = False


def tell(graph: str, sites: list[Site], notes: list[str]) -> None:
    """Log one compiled graph."""
    report = Report(list(sites), list(notes))
    for site in sites:
        log.debug("[%s] %s %s at %s (%s): %s", graph, site.pattern, site.status, site.module, site.source, _what(site))
    line = f"[{graph}] {report.totals().removeprefix('graphfuse: ')}"
    log.info("%s", line)
    trace_structured_artifact(
        name="graphfuse_report", encoding="json", payload_fn=lambda: json.dumps(report.to_dict(), indent=2)
    )


def announce(model: nn.Module | None, sites: list[Site], notes: list[str]) -> None:
    """Say one line about a model, when its first graph is compiled and where nobody has asked for logs."""
    if model is None or model in _announced:
        return
    _announced.add(model)
    if _nobody_listens() and os.environ.get("RANK", "0") == "0":
        line = f"{Report(sites).totals()} ({type(model).__name__}; graphfuse.report(model) says more)"
        sys.stderr.write("\n".join([line, *(f"graphfuse: {note}" for note in notes if note.startswith("DDP"))]) + "\n")


def _nobody_listens() -> bool:
    """Whether logging is as Python starts it: no handler anywhere, and no level for ours."""
    return log.level == logging.NOTSET and not log.handlers and not logging.getLogger().handlers


def _what(site: Site) -> str:
    return site.reason or "; ".join(part for part in (site.formula, site.variant) if part)
