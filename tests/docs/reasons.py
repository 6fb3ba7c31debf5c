"""Every reason for which a site may be refused, read off the source."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Where reasons are made: by the patterns, and for all of them when a region is replaced, proved or evaluated.
SOURCES = [
    *sorted((ROOT / "patterns").glob("*.py")),
    *(ROOT / "graphfuse" / name for name in ("backend.py", "policy.py", "rewrite.py", "certify.py", "evaluate.py")),
]


def reasons_in(path: Path) -> list[str]:
    """The reasons that a file can give, in its order, with … for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Assert) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):  # its parts are strings, too
            left_out.update(id(part) for value in node.values for part in ast.walk(value))
    found = [(node.lineno, _text(node)) for node in ast.walk(tree) if id(node) not in left_out and _is_text(node)]
    texts = [text for _, text in sorted(found) if re.search("(^|: )expected ", text)]
    return list(dict.fromkeys(texts))


def reasons() -> list[str]:
    """Those of all files."""
    return list(dict.fromkeys(reason for path in SOURCES for reason in reasons_in(path)))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _text(node: ast.AST) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
    return text if "\n" not in text else ""  # a docstring
