"""The report for an issue, a pull request or a wiki."""

from __future__ import annotations

import re
from collections.abc import Iterator

from graphfuse.reporting.data import Kind, Report, facts, kinds, short

CODE = ("formula", "source")


def to_markdown(report: Report) -> str:
    """A table of all kinds of sites, and what is known of each."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield "# graphfuse report"
    yield ""
    yield _plain(report.totals().removeprefix("graphfuse: ")) + "."
    yield from (f"\n{_plain(line)}." for line in report.ways())
    for note in report.notes:
        yield f"\n> {_plain(note)}"
    found = kinds(report.current)
    if not found:
        return
    yield ""
    yield "| pattern | modules | count | status | formula, or reason | source |"
    yield "|---|---|---:|---|---|---|"
    for kind in found:
        site = kind.site
        what = _plain(site.reason) if site.reason else _code(site.formula or site.variant)
        cells = [site.pattern, _code(kind.modules or "(root)"), str(len(kind.sites)), site.status, what]
        yield f"| {' | '.join([*cells, _code(short(site.source))])} |"
    for kind in found:
        yield from _section(kind)


def _section(kind: Kind) -> Iterator[str]:
    yield ""
    yield f"## {kind.site.pattern} × {len(kind.sites)}, {kind.site.status}: {_code(kind.modules or '(root)')}"
    yield ""
    for name, text in facts(kind):
        yield f"- {name}: {_code(text) if name in CODE else _plain(text)}"
    for name, code in (("before", kind.site.before), ("after", kind.site.after)):
        if code:
            yield f"\n{name}:\n\n{_block(code)}"


def _plain(text: str) -> str:
    """Text in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Text as code, in a cell of a table too."""
    if not text:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}".replace("|", r"\|")


def _block(code: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
    return f"{fence}\n{code}\n{fence}"
