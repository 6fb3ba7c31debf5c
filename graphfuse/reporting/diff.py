"""What changed between two reports: after an edit of the model, or another version of a library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from graphfuse.reporting.data import Kind, Report, Site, human, kinds

Place = tuple[str, str, int]  # pattern, module, which of the sites that share both


@dataclass(frozen=True)
class Difference:
    """Sites by what became of them; `str` says it in lines. Empty, and so false, if nothing changed."""

    gained: tuple[Site, ...] = ()
    """Rewritten now, and refused or not there before."""
    lost: tuple[Site, ...] = ()
    """Rewritten before, and now refused, with the reason, or not there: then as it was."""
    changed: tuple[tuple[Site, Site], ...] = ()
    """Before and now, where variant, formula, kernel or reason is another."""
    saved_bytes: int = 0
    """Bytes saved now, less those before."""

    def __bool__(self) -> bool:
        return bool(self.gained or self.lost or self.changed)

    def __str__(self) -> str:
        if not self:
            return "graphfuse: no change"
        lines = [*_lines("+", self.gained), *_lines("-", self.lost)]
        after = {id(now): before for before, now in self.changed}
        for kind in kinds(now for _, now in self.changed):
            before = after[id(kind.site)]
            lines.append(f"~ {_name(kind)}: {_what(before)} -> {_what(kind.site)}")
        if self.saved_bytes:
            lines.append(f"memory saved: {human(abs(self.saved_bytes))} {'more' if self.saved_bytes > 0 else 'less'}")
        return "\n".join(lines)


def difference(before: Report, now: Report) -> Difference:
    """What `now` has that `before` has not, and the other way round."""
    old, new = _places(before), _places(now)
    gained, lost, changed = [], [], []
    for place in {**new, **old}:
        was, is_now = old.get(place), new.get(place)
        was_rewritten = was is not None and was.status == "rewritten"
        if is_now is not None and is_now.status == "rewritten" and not was_rewritten:
            gained.append(is_now)
        elif was is not None and was_rewritten and (is_now is None or is_now.status != "rewritten"):
            lost.append(was if is_now is None else is_now)
        elif was is not None and is_now is not None and _what(was) != _what(is_now):
            changed.append((was, is_now))
    saved = sum(now.saved_bytes.values()) - sum(before.saved_bytes.values())
    return Difference(tuple(gained), tuple(lost), tuple(changed), saved)


def _places(report: Report) -> dict[Place, Site]:
    seen: Counter[tuple[str, str]] = Counter()
    places: dict[Place, Site] = {}
    for site in report.current:
        key = (site.pattern, site.module)
        places[*key, seen[key]] = site
        seen[key] += 1
    return places


def _lines(sign: str, sites: tuple[Site, ...]) -> Iterator[str]:
    for kind in kinds(sites):
        yield f"{sign} {_name(kind)}: {_what(kind.site)}"


def _name(kind: Kind) -> str:
    count = f" × {len(kind.sites)}" if len(kind.sites) > 1 else ""
    return f"{kind.site.pattern}{count} {kind.modules or '(root)'}"


def _what(site: Site) -> str:
    return site.reason or "; ".join(filter(None, (site.variant, site.formula, site.kernel)))
