"""What `graphfuse bench model` found, for people: tables, and a chart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from graphfuse.bench.rows import Row

COLOURS = ("tab:gray", "tab:orange", "tab:blue", "tab:green", "tab:purple", "tab:brown", "tab:cyan")  # red is a warning
DISAGREES, FAILED = "DISAGREES", "failed"


def group_of(row: Row) -> tuple[Any, ...]:
    """Rows that are compared have this in common."""
    return row.workload, row.phase, row.mask, row.dtype, row.batch, row.seq, row.checkpointing


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by what they have in common, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(group_of(row), []).append(row)
    return list(found.values())


def progress(row: Row) -> str:
    """One line, while others are still to be measured."""
    figures = row.error or f"{_ms(row.step_ms)} ms, {row.peak_gib:.3f} GiB, {row.compile_s:.1f} s to compile"
    return f"{row.workload}, {row.phase}, mask: {row.mask}, {row.variant}: {figures}"


def table(rows: Sequence[Row], title: str = "") -> Table:
    """What each variant costs and computes, with the ratio of its time to Inductor's."""
    found = Table(title=title or None, title_justify="left")
    found.add_column("variant", no_wrap=True)
    for name in (
        "step",
        "from - to",
        "x Inductor",
        "tokens/s",
        "peak",
        "compile",
        "result",
        "result apart",
        "gradients apart",
    ):
        found.add_column(name, justify="right")
    base = next((row.step_ms for row in rows if row.variant == "inductor"), 0.0)
    for row in rows:
        if row.error:
            found.add_row(row.variant, Text(FAILED, style="yellow"))
            continue
        found.add_row(
            row.variant,
            f"{_ms(row.step_ms)} ms",
            f"{_ms(row.fastest_ms)} - {_ms(row.slowest_ms)}",
            f"{row.step_ms / base:.3f}" if base else "",
            f"{row.tokens_per_s:.0f}",
            f"{row.peak_gib:.2f} GiB" if row.peak_gib >= 0.1 else f"{1024 * row.peak_gib:.2f} MiB",
            f"{row.compile_s:.0f} s" if row.compile_s >= 10 else f"{row.compile_s:.1f} s",
            f"{row.value:.5f}",
            "" if row.value_difference is None else f"{row.value_difference:.1e}",
            "" if row.gradient_difference is None else f"{row.gradient_difference:.1e}",
            style="red" if row.disagrees else "",
        )
    return found


def where(rows: Sequence[Row], on: str) -> Table | None:
    """Milliseconds of one step by category, a column for each variant; `None` where nobody was profiled."""
    profiled = [row for row in rows if row.where_ms]
    if not profiled:
        return None
    found = Table()
    found.add_column(f"where the time goes, ms by {on}", no_wrap=True)
    for row in profiled:
        found.add_column(row.variant, justify="right")
    totals = {name: max(row.where_ms.get(name, 0.0) for row in profiled) for row in profiled for name in row.where_ms}
    for name in sorted(totals, key=lambda name: -totals[name]):
        found.add_row(name, *(_ms(row.where_ms[name]) if name in row.where_ms else "" for row in profiled))
    found.add_section()
    found.add_row("all", *(_ms(sum(row.where_ms.values())) for row in profiled))
    if any(row.clock_mhz for row in profiled):
        found.add_row("clock in MHz", *(f"{row.clock_mhz:.0f}" if row.clock_mhz else "" for row in profiled))
        found.add_row("power in W", *(f"{row.watts:.0f}" if row.watts else "" for row in profiled))
    return found


def remarks(rows: Sequence[Row]) -> list[Text]:
    """A line for what failed and what disagrees, and what graphfuse did."""
    found = []
    for row in rows:
        if row.error:
            found.append(Text(f"{row.variant}: {row.error}", style="yellow"))
        if row.disagrees:
            found.append(Text(f"{row.variant} {DISAGREES} with {row.against}: {row.disagrees}", style="bold red"))
        if row.rewritten:
            counts = ", ".join(f"{count} {name}" for name, count in row.rewritten.items())
            found.append(Text(f"{row.variant} rewrote {counts}"))
        found += [Text(f"{row.variant}: {line}") for line in _ways(row)]
        found += [Text(f"{row.variant} left {line}") for line in row.refused]
        found += [Text(f"{row.variant}: note: {note}", style="yellow") for note in row.notes]
    return found


def _ways(row: Row) -> list[str]:
    """How masks were dealt with: at compile time, and on every call."""
    lines = []
    for name in ("attention", "causal_attention"):
        for variant, count in row.sites.get(name, {}).items():
            lines.append(f"{name}, {count} site{'s' if count > 1 else ''}: {variant}")
    calls = {tuple(ways.items()): name for name, ways in row.calls.items()}  # some patterns share a kernel
    lines += [f"calls of {name}: {', '.join(f'{way} {n}' for way, n in ways)}" for ways, name in calls.items()]
    return lines


def chart(rows: Sequence[Row], title: str) -> Any:
    """Bars of time and, where it is known, of memory; what disagrees is hatched in red and says so.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figures = {"step_ms": "ms of a step", "peak_gib": "GiB at the peak"}
    cases = groups(rows)
    colours = dict(zip(dict.fromkeys(row.variant for row in rows), itertools.cycle(COLOURS)))
    figure = Figure(figsize=(6.5 * len(figures), 2 + 0.35 * (len(rows) + len(cases))), layout="constrained")
    ticks: dict[float, str] = {}
    bars: list[tuple[int, Row]] = []
    for case in cases:
        first = len(bars) + len(ticks)
        bars += [(first + k, row) for k, row in enumerate(case)]
        words = [case[0].phase, f"mask: {case[0].mask}", *(["checkpointed"] if case[0].checkpointing else [])]
        ticks[first + (len(case) - 1) / 2] = f"{case[0].workload}\n{', '.join(words)}"
    for axes, (name, label) in zip(figure.subplots(1, len(figures)), figures.items(), strict=True):
        largest = max(getattr(row, name) for row in rows) or 1.0
        for place, row in bars:
            value = getattr(row, name)
            axes.barh(place, value, 0.85, color=colours[row.variant])
            if row.disagrees:
                axes.barh(place, value, 0.85, fill=False, hatch="//", edgecolor="red", linewidth=2)
            told = FAILED if row.error else f"{value:.4g}" + (f"  {DISAGREES}" if row.disagrees else "")
            colour = "red" if row.disagrees else "black"
            axes.text(value + largest / 100, place, told, va="center", color=colour, fontsize=8)
        axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
        axes.set_xlim(0, 1.25 * largest)
        axes.invert_yaxis()
        axes.set_xlabel(label)
    for variant, colour in colours.items():
        figure.axes[0].barh(0, 0, color=colour, label=variant)
    figure.legend(loc="outside lower center", ncols=len(colours), fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"
