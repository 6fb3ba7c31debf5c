"""The report as data: sites, and what they add up to."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from graphfuse.reporting.diff import Difference

Scalar: TypeAlias = str | int | float | bool | None

SCHEMA_VERSION = 1  # of to_dict(), described in docs/report.md; goes up when a key changes its name or meaning

MAX_RANGES = 4  # of layer numbers, before the middle ones are left out of a line


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
    module_class: str = ""
    """Class of that module."""
    hint: str = ""
    """What to change in the model's code so that a refused site matches, where there is such a thing.

    Of a site that was rewritten although others refused it: what the first of those would need.
    """
    others: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Other patterns that refused the same site, each with its reason."""
    formula: str = ""
    """What is computed, as algebra: "x · (mean(x²) + 1e-06)^(-1/2) · w"."""
    rounding: str = ""
    """In which dtype, and where that is rounded, in words."""
    kernel: str = ""
    """What runs instead: "graphfuse::rms_norm"."""
    kernel_reason: str = ""
    """What it does better, and in which implementation it runs on these tensors."""
    frees: Literal["activations", "logits", ""] = ""
    """Of which kind the saved bytes are."""
    saved_bytes: int | None = None
    """Bytes that eager torch keeps for backward inside the region and the kernel does not, for this input."""
    saved: str = ""
    """The same as a formula: B is a dynamic first dimension of an input (batch), T a dynamic second (tokens)."""
    exact_error: float | None = None
    """Certification: difference between region and kernel in float64, relative to the largest number."""
    region_error: float | None = None
    """Certification: relative error of the region in its own dtypes against float64."""
    replacement_error: float | None = None
    """The same of the kernel."""
    before: str = ""
    """The nodes of the region in Dynamo's graph, one a line."""
    after: str = ""
    """What stands there now."""

    @property
    def wanted(self) -> str:
        """The pattern that the hint is for."""
        return next(iter(self.others), self.pattern) if self.status == "rewritten" else self.pattern


@dataclass
class Report:
    """All sites of one model over all its graphs.

    A frame that was compiled again for the same module, for other shapes or for eval, appears again in `sites`;
    `counts` and the table take its newest compilation only, so that nothing counts twice.
    """

    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What concerns a whole graph, such as the error that sent it on as it was."""
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    """Where a kernel decides on every call, such as by looking at a mask: pattern -> way -> calls of this process."""

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

    @property
    def saved_bytes(self) -> dict[str, int]:
        """Bytes of activations and of logits that the rewritten sites do not keep and eager torch does."""
        saved = {"activations": 0, "logits": 0}
        for site in self.rewritten:
            if site.frees:
                saved[site.frees] += site.saved_bytes or 0
        return saved

    @property
    def graphs(self) -> int:
        """How many graphs the current sites are in."""
        return len({site.graph for site in self.current})

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts and scalars, with the version of their schema."""
        return {
            "schema_version": SCHEMA_VERSION,
            "counts": self.counts,
            "totals": {
                "rewritten": len(self.rewritten),
                "refused": len(self.refused),
                "graphs": self.graphs,
                "saved_bytes": self.saved_bytes,
            },
            "sites": [asdict(site) for site in self.sites],
            "notes": list(self.notes),
            "calls": self.calls,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` was called on; keys that this version does not know are left out.

        Raises:
            ValueError: another version of the schema.
        """
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version: expected {SCHEMA_VERSION}, got {version!r}")
        known = {f.name for f in fields(Site)}
        sites = [Site(**{name: value for name, value in site.items() if name in known}) for site in data["sites"]]
        return cls(sites, list(data["notes"]), dict(data.get("calls", {})))

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_text(self, *, details: bool = False) -> str:
        """The table, as wide as the terminal; with `details`, all that is known of every kind of site."""
        from graphfuse.reporting.text import to_text

        return to_text(self, details=details)

    def to_markdown(self) -> str:
        """A table of all kinds of sites, and a paragraph about each."""
        from graphfuse.reporting.markdown import to_markdown

        return to_markdown(self)

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that needs no network, also written to `path` if there is one."""
        from graphfuse.reporting.html import to_page

        page = to_page(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def diff(self, other: Report) -> Difference:
        """What `other` rewrites that this one does not, and the other way round; this one is the older."""
        from graphfuse.reporting.diff import difference

        return difference(self, other)

    def __str__(self) -> str:
        return self.to_text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from graphfuse.reporting.text import lines

        yield from lines(self, options.max_width)

    def _repr_html_(self) -> str:
        from graphfuse.reporting.html import to_fragment

        return to_fragment(self)

    def totals(self) -> str:
        """One line: how many sites, what they cover, and what they save."""
        if not self.sites:
            return "graphfuse: no site found"
        counts = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        saved = " and ".join(f"{human(size)} of {kind}" for kind, size in self.saved_bytes.items() if size > 0)
        return (
            f"graphfuse: {len(self.rewritten)} site{'s' if len(self.rewritten) != 1 else ''} rewritten,"
            f" {len(self.refused)} refused"
            f" in {self.graphs} graph{'s' if self.graphs != 1 else ''}"
            + (f"; covered: {counts}" if counts else "")
            + (f"; kept less than in eager torch: {saved}" if saved else "")
        )

    def ways(self) -> list[str]:
        """One line for each pattern whose kernel decides on every call."""
        told = {name: ", ".join(f"{way} {count}" for way, count in ways.items()) for name, ways in self.calls.items()}
        return [f"calls of {name} in this process: {ways}" for name, ways in told.items()]


def human(size: int) -> str:
    """A number of bytes as people write it: `1.5 GiB`."""
    number = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("human: expected the loop to end at GiB")


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


@dataclass(frozen=True)
class Kind:
    """Sites that differ only in their layer's number."""

    sites: tuple[Site, ...]

    @property
    def site(self) -> Site:
        """The first of them, which speaks for all."""
        return self.sites[0]

    @property
    def modules(self) -> str:
        return collapse(site.module for site in self.sites)

    @property
    def saved_bytes(self) -> int | None:
        known = [site.saved_bytes for site in self.sites if site.saved_bytes is not None]
        return sum(known) if known else None


def kinds(sites: Iterable[Site]) -> list[Kind]:
    """The kinds of sites, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        layer = re.sub(r"\d+", "#", site.module)
        groups.setdefault((site.pattern, site.variant, layer, site.status, site.reason, site.source), []).append(site)
    return [Kind(tuple(group)) for group in groups.values()]


def short(source: str) -> str:
    """The file's own name of file:line; `to_dict` has the whole path."""
    return source.replace("\\", "/").rpartition("/")[2]


def facts(kind: Kind) -> list[tuple[str, str]]:
    """What is known of a kind of site, as (name, text), for every way to show it."""
    site, count = kind.site, len(kind.sites)
    found = [
        ("formula", site.formula),
        ("variant", site.variant),
        ("rounding", site.rounding),
        ("reason", site.reason),
        *((f"not {pattern}", reason) for pattern, reason in site.others.items()),
        ("to match", site.hint if site.wanted == site.pattern or not site.hint else f"{site.wanted}: {site.hint}"),
        ("source", site.source),
        ("kernel", f"{site.kernel}: {site.kernel_reason}" if site.kernel_reason else site.kernel),
        ("saved", _saved(site, kind.saved_bytes or 0, count)),
        ("certified", _certified(site)),
    ]
    return [(name, text) for name, text in found if text]


def _saved(site: Site, total: int, count: int) -> str:
    if site.saved_bytes is None or not site.frees:
        return ""
    if site.saved_bytes == 0:
        return "no memory"
    each = f"{human(site.saved_bytes)} of {site.frees} each, {human(total)} in all" if count > 1 else human(total)
    each = each if count > 1 else f"{each} of {site.frees}"
    return f"{each}; {site.saved} bytes each" if any(c.isalpha() for c in site.saved) else each


def _certified(site: Site) -> str:
    if site.exact_error is None or site.status != "rewritten":
        return ""
    text = f"the same function: {site.exact_error:.1e} apart in float64"
    if site.region_error is None or site.replacement_error is None:
        return text
    return f"{text}; error {site.replacement_error:.1e}, of the code before {site.region_error:.1e}"
