"""What the zoo has found, as text: lines for the terminal, and docs/coverage.md.

Whatever is not rewritten is explained in reasons.toml, or it is a problem.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.zoo.measure import FLOOR, TOLERANCE, agree
from tests.zoo.recipes import RECIPES

Result = dict[str, Any]

REASONS = tomllib.loads(Path(__file__).with_name("reasons.toml").read_text(encoding="utf-8"))
PATTERNS = {
    "rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
    "rope": "RoPE",
    "glu": "gated MLP",
    "causal_attention": "causal attention",
    "linear_cross_entropy": "head + loss",
}

HEAD = """\
# Coverage

Every causal language model type of transformers, built tiny and with random weights from its own config class, does
one training step in eager and one through graphfuse.

Written by `make zoo` on {date}: {versions}, CPU, graphs compiled by "{inner}". Do not edit: the reasons come from
[tests/zoo/reasons.toml](../tests/zoo/reasons.toml).

How many sites there are to find is counted without graphfuse, while the model runs in eager: calls of the classes that
are norms or gated MLPs ([tests/zoo/recipes.json](../tests/zoo/recipes.json) names them), tensors that rotary functions
return, cross-entropies, and attention that is causal in eager but has a mask once it is compiled. A site
counts as rewritten if an op of graphfuse ran in its module instead. Behind a graph break one compiled graph may serve
many layers, and counts once for each.
"""

TYPES = """\
## Types

Rewritten / there; sites refused; graphs that ran; relative difference of the loss and of the gradient that differs
most, eager against graphfuse in float32 (in float64 where marked ²: there the model amplifies float32's rounding). A
gradient is compared with its own norm, or with {floor:g} of the largest one if that is more: some are zero but for
rounding.
"""


@dataclass(frozen=True)
class Gap:
    """Sites of one kind that were not rewritten, over all types."""

    site: str
    types: tuple[str, ...]  # once for every site
    why: str | None


@dataclass(frozen=True)
class Zoo:
    """The results of one run.

    Attributes:
        results: type -> what `measure` said, or its error.
        types: every type of this transformers, with a recipe or without.
        versions: package -> version.
        inner: what compiled the graphs.
    """

    results: dict[str, Result]
    types: list[str]
    versions: dict[str, str]
    inner: str

    @property
    def measured(self) -> dict[str, Result]:
        return {name: result for name, result in self.results.items() if "error" not in result}

    @property
    def agreeing(self) -> dict[str, Result]:
        return {name: result for name, result in self.measured.items() if agree(result["loss"], result["gradient"])}

    @property
    def refused(self) -> list[Gap]:
        """Refused sites; those that one explanation is for together, else those of one reason."""
        found = defaultdict(list)
        for name, result in self.measured.items():
            for site in result["refused"]:
                entries = (entry for entry in REASONS["refused"] if fnmatchcase(site, entry["site"]))
                entry = next(entries, {"site": re.sub(r"\d+", "#", site), "why": None})
                found[entry["site"], entry["why"]].append(name)
        return _gaps(found)

    @property
    def unrecognised(self) -> list[Gap]:
        """Sites that are there and are neither rewritten nor refused."""
        found = defaultdict(list)
        for name, result in self.measured.items():
            for pattern, places in result["missing"].items():
                for module, count in places.items():
                    site = re.sub(r"\d+", "#", f"{pattern}: {module or 'the root'}")
                    entries = (
                        e for e in REASONS["unrecognised"] if name in e["types"] and fnmatchcase(site, e["site"])
                    )
                    entry = next(entries, {"site": site, "why": None})
                    found[entry["site"], entry["why"]] += [name] * count
        return _gaps(found)

    @property
    def unbuilt(self) -> dict[str, str | None]:
        """Types without a recipe, and why."""
        whys = {name: entry["why"] for entry in REASONS["unbuilt"] for name in entry["types"]}
        return {name: whys.get(name) for name in self.types if name not in RECIPES}


def line(name: str, result: Result) -> str:
    """One type for the terminal."""
    if "error" in result:
        return f"{name}: {result['error']}"
    counts = ", ".join(f"{p} {result['covered'][p]}/{n}" for p, n in result["expected"].items() if n)
    left = f", {len(result['refused'])} refused" if result["refused"] else ""
    numbers = f"loss {result['loss']:.0e}, gradient {result['gradient']:.0e}{' in float64' * result['float64']}"
    return f"{name}: {counts}{left}; {numbers}; {result['seconds']:.0f} s"


def totals(zoo: Zoo) -> str:
    """The last lines for the terminal."""
    lines = [
        f"{pattern}: {_total(zoo, pattern, 'covered')} / {_total(zoo, pattern, 'expected')}" for pattern in PATTERNS
    ]
    return "\n".join([*lines, f"{len(zoo.agreeing)} of {len(zoo.results)} types compile and agree with eager"])


def problems(zoo: Zoo) -> list[str]:
    """What is wrong, or has no explanation; one line each."""
    found = [f"{name}: {result['error']}" for name, result in zoo.results.items() if "error" in result]
    for name, result in zoo.measured.items():
        if name not in zoo.agreeing:
            differences = f"loss {result['loss']:.1e}, gradient {result['gradient']:.1e}"
            found.append(f"{name}: expected differences of at most {TOLERANCE}, got {differences}")
        if result["expected"] != RECIPES[name]["sites"]:
            found.append(f"{name}: sites: expected {RECIPES[name]['sites']}, got {result['expected']}")
    for what, gaps in (("refused", zoo.refused), ("not recognised", zoo.unrecognised)):
        found += [f"unexplained: {what}: {gap.site} ({_names(gap.types)})" for gap in gaps if gap.why is None]
    return found + [f"unexplained: no recipe: {name}" for name, why in zoo.unbuilt.items() if why is None]


def document(zoo: Zoo) -> str:
    """The text of docs/coverage.md."""
    versions = ", ".join(f"{package} {version}" for package, version in zoo.versions.items())
    parts = [
        HEAD.format(date=datetime.date.today().isoformat(), versions=versions, inner=zoo.inner),
        f"**{len(zoo.agreeing)} of {len(zoo.types)} types compile and agree with eager.**\n",
        _table(
            ["pattern", "rewritten", "there", "", "besides"],
            [_total_row(zoo, pattern) for pattern in PATTERNS],
        ),
        "*Besides* are rewritten sites that no name announces: norms written out in an attention, gates elsewhere.\n",
        f"Attention written by hand, which no call announces: {_total(zoo, 'attention', 'beyond')} rewritten.\n",
        "## Not rewritten\n",
        *(_section("refused", gap) for gap in zoo.refused),
        *(_section("not recognised", gap) for gap in zoo.unrecognised),
    ]
    if failed := [name for name in zoo.results if name not in zoo.agreeing]:
        parts += ["## Not in agreement\n", *(f"- `{line(name, zoo.results[name])}`" for name in failed), ""]
    parts += ["## Not built\n", *(f"- {name}: {why or 'unexplained'}" for name, why in zoo.unbuilt.items()), ""]
    headings = ["type", *PATTERNS.values(), "refused", "graphs", "loss", "gradient", "seconds"]
    rows = [_row(name, result) for name, result in zoo.measured.items()]
    return "\n".join([*parts, TYPES.format(floor=FLOOR), _table(headings, rows)])


def _total(zoo: Zoo, pattern: str, what: str) -> int:
    counts = (result[what].get(pattern, 0) for result in zoo.measured.values())
    return sum(sum(count.values()) if isinstance(count, dict) else count for count in counts)


def _total_row(zoo: Zoo, pattern: str) -> list[str]:
    covered, expected = _total(zoo, pattern, "covered"), _total(zoo, pattern, "expected")
    besides = _total(zoo, pattern, "beyond")
    return [PATTERNS[pattern], str(covered), str(expected), f"{covered / max(expected, 1):.1%}", str(besides)]


def _row(name: str, result: Result) -> list[str]:
    counts = [f"{result['covered'][p]} / {result['expected'][p]}" if result["expected"][p] else "" for p in PATTERNS]
    mark = "²" if result["float64"] else ""
    differences = [f"{result[what]:.0e}{mark}" for what in ("loss", "gradient")]
    refused = str(len(result["refused"]) or "")
    return [name, *counts, refused, str(result["graphs"]), *differences, f"{result['seconds']:.0f}"]


def _section(what: str, gap: Gap) -> str:
    count = f"{len(gap.types)} site{'s' if len(gap.types) != 1 else ''}"
    return f"### `{gap.site}`\n\n{count} {what}: {_names(gap.types)}.\n\n{(gap.why or 'Unexplained.').strip()}\n"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is of numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _gaps(found: dict[tuple[str, str | None], list[str]]) -> list[Gap]:
    gaps = [Gap(site, tuple(types), why) for (site, why), types in found.items()]
    return sorted(gaps, key=lambda gap: -len(gap.types))


def _names(types: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {types.count(name)}" if types.count(name) > 1 else name for name in sorted(set(types)))
