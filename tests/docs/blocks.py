"""Links, headings and fenced code of Markdown pages."""

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Code between fences: its language, text, first line, and the path in the line before it, if that names one."""

    language: str
    code: str
    line: int
    path: str = ""


def blocks(page: Path) -> list[Block]:
    """The fenced code of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        named = re.search(r"^`([\w/.]+)`:\n\n\Z", text[: match.start()], re.MULTILINE)
        line = text[: match.start()].count("\n") + 2
        found.append(Block(match[1], match[2], line, named[1] if named else ""))
    return found


def links(page: Path) -> list[str]:
    """Where its links lead, but for the web."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """The names under which its headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
