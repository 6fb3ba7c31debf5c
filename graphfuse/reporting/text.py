"""The report in a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graphfuse.reporting.data import Kind, Report, facts, kinds, short

OTHER_COLUMNS = 90  # characters that a table needs beside the module paths
SOURCE_WIDTH = 120  # characters below which a table leaves the source out
COLOURS = {"rewritten": "green", "refused": "yellow"}


def to_text(report: Report, *, details: bool = False) -> str:
    """The report without colours, as wide as the terminal."""
    width = shutil.get_terminal_size(fallback=(140, 0)).columns
    console = Console(file=StringIO(), width=width, color_system=None)
    with console.capture() as text:
        for line in lines(report, width, details=details):
            console.print(line)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def lines(report: Report, width: int, *, details: bool = False) -> Iterator[RenderableType]:
    """What rich prints, from top to bottom."""
    found = kinds(report.current)
    if found and details:
        for kind in found:
            yield from _details(kind)
    elif found:
        yield _table(found, width)
    yield Text(report.totals(), style="bold")
    yield from map(Text, report.ways())
    sites = [kind.site for kind in found if kind.site.hint and not details]
    told = (f"to match, {site.wanted} at {short(site.source)}: {site.hint}" for site in sites)
    yield from map(Text, dict.fromkeys(told))
    for note in report.notes:
        yield Text(f"note: {note}", style="yellow")


def _table(found: list[Kind], width: int) -> Table:
    modules = [kind.modules or "(root)" for kind in found]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("pattern", no_wrap=True)
    # A path is kept on one line where that leaves the other columns room.
    table.add_column("modules", overflow="fold", no_wrap=max(map(len, modules)) <= width - OTHER_COLUMNS)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("variant, or reason", overflow="fold")
    if width >= SOURCE_WIDTH:
        table.add_column("source", no_wrap=True)
    for kind, module in zip(found, modules, strict=True):
        site = kind.site
        cells: list[str | Text] = [
            site.pattern,
            Text(module),
            str(len(kind.sites)),
            Text(site.status, style=COLOURS[site.status]),
            Text("\n".join([site.reason or site.variant, *(f"not {p}: {r}" for p, r in site.others.items())])),
        ]
        table.add_row(*cells, *([Text(short(site.source))] if width >= SOURCE_WIDTH else []))
    return table


def _details(kind: Kind) -> Iterator[RenderableType]:
    site, count = kind.site, len(kind.sites)
    head = Text(f"{site.pattern}{f' × {count}' if count > 1 else ''}  ", style="bold")
    head.append(site.status, style=COLOURS[site.status])
    yield head.append(f"  {kind.modules or '(root)'}", style="not bold")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text in facts(kind):
        table.add_row(name, Text(text))
    yield Padding(table, (0, 0, 1, 2))
