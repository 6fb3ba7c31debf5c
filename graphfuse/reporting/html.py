"""The report as a page that needs nothing else, and as what a notebook shows."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources

import jinja2

from graphfuse.reporting.data import Kind, Report, facts, human, kinds


@dataclass
class Branch:
    """A module of the tree: its sites, and the modules inside it."""

    name: str
    class_name: str = ""
    kinds: list[Kind] = field(default_factory=list)
    branches: dict[str, Branch] = field(default_factory=dict)


def tree(found: Iterable[Kind]) -> Branch:
    """The modules that have sites, by their paths; `layers.{0-31}` is one module, and so is a chain without sites."""
    root = Branch("")
    for kind in found:
        branch = root
        for name in kind.modules.split(".") if kind.modules else []:
            branch = branch.branches.setdefault(name, Branch(name))
        branch.class_name = kind.site.module_class
        branch.kinds.append(kind)
    return _joined(root)


def _joined(branch: Branch) -> Branch:
    """The same, with chains of modules that hold nothing but the next one written as one path."""
    inner = [_joined(below) for below in branch.branches.values()]
    branch.branches = {below.name: below for below in inner}
    if branch.name and not branch.kinds and len(inner) == 1:
        (below,) = inner
        return Branch(f"{branch.name}.{below.name}", below.class_name, below.kinds, below.branches)
    return branch


def to_page(report: Report) -> str:
    """A whole page."""
    return _render(report, is_page=True)


def to_fragment(report: Report) -> str:
    """The same without head and body: its style applies to itself alone."""
    return _render(report, is_page=False)


def _render(report: Report, *, is_page: bool) -> str:
    found = kinds(report.current)
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            root=tree(found),
            counts=report.counts,
            saved={name: size for name, size in report.saved_bytes.items() if size > 0},
            style=resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8"),
            is_page=is_page,
            facts=facts,
            human=human,
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("graphfuse.reporting", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
