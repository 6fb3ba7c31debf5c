"""What graphfuse did to a model: every site, rewritten or refused, as data and as a table.

    report = graphfuse.report(model)
    report.counts          {"rms_norm": 65, "rope": 64, ...}
    report.refused         the sites left as they were, each with its reason
    print(report)          one line per kind of site: 32 equal layers are one line
    report.to_json("report.json")

Of the engine this file knows nothing: it is filled with sites.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

Scalar: TypeAlias = str | int | float | bool | None

SCHEMA_VERSION = 1  # of to_dict(); goes up when a key changes its name or meaning

MAX_RANGES = 4  # of layer numbers, before the middle ones are left out of a line
OTHER_COLUMNS = 90  # characters that a table needs beside the module paths
SOURCE_WIDTH = 120  # characters below which a table leaves the source out


@dataclass(frozen=True)
class Site:
    """One place in a model's graph where a pattern's anchor was found."""

    pattern: str
    status: Literal["rewritten", "refused"]
    variant: str = ""
    """Which form of the computation, in words: "half, bfloat16"."""
    params: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    """Arguments of the op that were read off the graph, such as eps."""
    module: str = ""
    """Dotted path of the module whose code it is; empty for the root."""
    source: str = ""
    """Where that code stands, file:line."""
    reason: str = ""
    """Why it was refused; empty when rewritten."""
    covers: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Computations it stands for: a fused q/k-norm + RoPE site covers two rms_norm and two rope."""
    graph: str = ""
    """Compile id of its graph, frame/recompilation: "0/0"."""
    instance: str = ""
    """Which of the modules that share the graph: equal layers compiled one by one."""


@dataclass
class Report:
    """All sites of one model over all its graphs.

    A frame that was compiled again for the same module, for other shapes or for eval, appears again in `sites`;
    `counts` and the table take its newest compilation only, so that nothing counts twice.
    """

    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What concerns a whole graph, such as the error that sent it on as it was."""

    @property
    def current(self) -> list[Site]:
        """The sites of each frame's newest compilation."""
        newest = {(_frame(site.graph), site.instance): site.graph for site in self.sites}
        return [site for site in self.sites if newest[_frame(site.graph), site.instance] == site.graph]

    @property
    def rewritten(self) -> list[Site]:
        """The current sites that one of our ops replaced."""
        return [site for site in self.current if site.status == "rewritten"]

    @property
    def refused(self) -> list[Site]:
        """The current sites that were left as they were, each with its reason."""
        return [site for site in self.current if site.status == "refused"]

    @property
    def counts(self) -> dict[str, int]:
        """How many computations of each kind the rewritten sites cover."""
        counts: Counter[str] = Counter()
        for site in self.rewritten:
            counts.update(site.covers)
        return dict(counts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts and scalars, with the version of their schema."""
        return {
            "schema_version": SCHEMA_VERSION,
            "counts": self.counts,
            "sites": [asdict(site) for site in self.sites],
            "notes": list(self.notes),
        }

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        width = shutil.get_terminal_size(fallback=(140, 0)).columns
        console = Console(file=StringIO(), width=width, color_system=None)
        with console.capture() as text:
            console.print(self)
        return "\n".join(line.rstrip() for line in text.get().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        groups = _grouped(self.current)
        if groups:
            yield _table(groups, options.max_width)
        yield Text(self._totals(), style="bold")
        for note in self.notes:
            yield Text(f"note: {note}", style="yellow")

    def _totals(self) -> str:
        if not self.sites:
            return "graphfuse: no site found"
        counts = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        graphs = len({site.graph for site in self.current})
        return (
            f"graphfuse: {len(self.rewritten)} sites rewritten, {len(self.refused)} refused"
            f" in {graphs} graph{'s' if graphs != 1 else ''}" + (f"; covered: {counts}" if counts else "")
        )


def collapse(paths: Iterable[str]) -> str:
    """Write module paths that differ only in their numbers as one.

    `layers.0.mlp`, `layers.1.mlp`, `layers.2.mlp` become `layers.{0-2}.mlp`. With numbers in several places each
    place shows its own range, whether or not every combination occurs.
    """
    split = [re.split(r"(\d+)", path) for path in paths]
    pieces = list(split[0])
    for place in range(1, len(pieces), 2):
        numbers = sorted({int(parts[place]) for parts in split})
        if len(numbers) > 1:
            pieces[place] = "{" + _ranges(numbers) + "}"
    return "".join(pieces)


def _ranges(numbers: list[int]) -> str:
    """Write sorted numbers as "0-3,7,9-11"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if len(words) > MAX_RANGES:
        words = [*words[: MAX_RANGES - 1], "…", words[-1]]
    return ",".join(words)


def _frame(graph: str) -> str:
    """Return the compile id without its recompilation."""
    return graph.rpartition("/")[0]


def _grouped(sites: list[Site]) -> list[list[Site]]:
    """Gather sites that differ only in their layer's number, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        layer = re.sub(r"\d+", "#", site.module)
        groups.setdefault((site.pattern, site.variant, layer, site.status, site.reason, site.source), []).append(site)
    return list(groups.values())


def _table(groups: list[list[Site]], width: int) -> Table:
    modules = [collapse(site.module for site in group) or "(root)" for group in groups]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("pattern", no_wrap=True)
    # A path is kept on one line where that leaves the other columns room.
    table.add_column("modules", overflow="fold", no_wrap=max(map(len, modules)) <= width - OTHER_COLUMNS)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("variant, or reason", overflow="fold")
    if width >= SOURCE_WIDTH:
        table.add_column("source", no_wrap=True)
    for group, module in zip(groups, modules, strict=True):
        site = group[0]
        status = Text(site.status, style="green" if site.status == "rewritten" else "yellow")
        cells: list[str | Text] = [
            site.pattern,
            Text(module),
            str(len(group)),
            status,
            Text(site.reason or site.variant),
        ]
        table.add_row(*cells, *([Text(_short(site.source))] if width >= SOURCE_WIDTH else []))
    return table


def _short(source: str) -> str:
    """Keep the file's own name of file:line; `to_dict` has the whole path."""
    return source.replace("\\", "/").rpartition("/")[2]
