"""docs/patterns.md, from the catalogue: what each pattern's file says, and what it makes of some code."""

import ast
import html
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import torch

import graphfuse
from graphfuse.match import Pattern
from graphfuse.patterns import CATALOGUE
from tests.docs.reasons import ROOT, reasons_in

PAGE = ROOT / "docs" / "patterns.md"
SPELLINGS = tomllib.loads(Path(__file__).with_name("spellings.toml").read_text(encoding="utf-8"))

# Other files that give reasons for a pattern.
BESIDES = {
    "causal_attention": ("_attention_mask.py",),
    "attention": ("_attention_mask.py",),
    "linear_cross_entropy": ("_losses.py", "_head_operands.py", "_token_program.py"),
    "cross_entropy": ("_losses.py", "_token_program.py"),
}

HEAD = """\
# Patterns

Written by `make docs` from the [catalogue](../patterns/__init__.py), in the order in which patterns are tried. Do not
edit. The code in the tables ([spellings.toml](../tests/docs/spellings.toml)) was run through graphfuse in bfloat16, and
formula, variant and rounding are what the report said of it. They are samples: a pattern recognises what is computed,
however it is spelled. What is recognised is still [proved](how_it_works.md#certify) before it is rewritten.

A site belongs to the first pattern that takes it: a norm after a sum to `add_rms_norm`, any other to `rms_norm`. Where
several refuse it, or one refuses and another takes it, it is one site, and the report has the other reasons there.
`graphfuse.optimize(model, patterns=["rope", "glu"])` looks for these alone. Every reason for a refusal is explained in
[troubleshooting.md](troubleshooting.md#refusals).
"""


def tensors() -> dict[str, torch.Tensor]:
    """What the names in the code stand for."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16)

    angles = torch.arange(8.0)[:, None] * torch.rand(8)
    both = torch.cat((angles, angles), -1)
    weights = {"w": draw(64), "b": draw(64), "m": draw(64, 32), "packed": draw(64, 64), "head": draw(16)}
    weights |= {"large": draw(2048, 64), "gain": draw(1)}
    weights |= {"vocabulary": draw(96, 64), "vocabulary2": draw(96, 64), "trained": draw(8, 16)}
    inputs = {"x": draw(2, 8, 64), "y": draw(2, 8, 64), "gate": draw(2, 8, 64), "up": draw(2, 8, 64)}
    inputs |= {"q": draw(2, 4, 8, 16), "hidden": draw(16, 64), "scores": draw(16, 2048)}
    known = {name: tensor.requires_grad_() for name, tensor in {**weights, **inputs}.items()}
    return known | {
        "cos": both.cos().bfloat16(),
        "sin": both.sin().bfloat16(),
        "turns": torch.polar(torch.ones_like(angles), angles),
        "bias": draw(2, 4, 8, 8),
        "padding": torch.ones(2, 8, dtype=torch.long),
        "labels": torch.randint(96, (16,)),
        "classes": torch.randint(2048, (16,)),
        "tokens": torch.randint(96, (2, 8)),
    }


def seen(code: str, pattern: str) -> graphfuse.Site:
    """What the report says of the code."""
    torch.manual_seed(0)
    known = tensors()
    tree = ast.parse(code.strip())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = [name for name in known if name in used - made]
    *lines, last = code.strip().splitlines()
    body = "\n".join(f"    {line}" for line in [*lines, f"return {last}"])
    space: dict[str, object] = {"torch": torch, "F": torch.nn.functional}
    exec(f"def f({', '.join(names)}):\n{body}\n", space)
    torch._dynamo.reset()
    compiled = graphfuse.optimize(space["f"], inner="eager", strict=True, fullgraph=True)
    compiled(*(known[name] for name in names))
    sites = [site for site in graphfuse.report(compiled).sites if site.pattern == pattern or pattern in site.others]
    assert len(sites) == 1, f"{pattern}: expected one site, got {sites} in {code}"
    (site,) = sites
    is_other = site.pattern != pattern
    return replace(site, pattern=pattern, status="refused", reason=site.others[pattern], hint="") if is_other else site


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(pattern) for pattern in CATALOGUE)])


def _section(pattern: Pattern) -> str:
    found = [(item, seen(item["code"], pattern.name)) for item in SPELLINGS[pattern.name]]
    rewritten = [(item, site) for item, site in found if site.status == "rewritten"]
    refused = [(item, site) for item, site in found if site.status == "refused"]
    module = sys.modules[pattern.find.__module__]
    told = re.sub(r"\n(?=Left alone:|Seen in:)", "\n\n", module.__doc__ or "")
    parts = [f"## {pattern.name}\n", f"[patterns/{pattern.name}.py](../patterns/{pattern.name}.py): {told}"]
    if pattern.why:
        parts.append(f"Why a kernel: {pattern.why}.\n")
    parts.append("| code | formula | variant | rounding |\n|---|---|---|---|")
    for item, site in rewritten:
        name = f"{item['seen']}<br>" if "seen" in item else ""
        rounding = site.rounding or "as the attention that it calls"
        parts.append(f"| {name}{_code(item['code'])} | {_code(site.formula)} | {site.variant} | {rounding} |")
    if refused:
        parts.append("\nRefused, for example:\n\n| code | reason | what helps |\n|---|---|---|")
        parts += [f"| {_code(item['code'])} | {_code(site.reason)} | {site.hint or '–'} |" for item, site in refused]
    files = [f"{pattern.name}.py", *BESIDES.get(pattern.name, ())]
    reasons = [reason for name in files for reason in reasons_in(ROOT / "patterns" / name)]
    if reasons:
        parts.append("\nAll reasons of its own:\n")
        parts += [f"- {_code(reason)}" for reason in reasons]
    else:
        parts.append("\nIt refuses nothing by itself: what it does not take is left to the patterns after it.")
    return "\n".join(parts) + "\n"


def _code(text: str) -> str:
    """Code in a cell of a table, where only <code> may have line breaks."""
    if "\n" not in text.strip():
        return f"`{text.strip()}`".replace("|", r"\|")
    escaped = html.escape(text.strip(), quote=False).replace("|", "&#124;")
    escaped = re.sub(r"([*_\[\]])", lambda found: f"&#{ord(found[1])};", escaped)
    return f"<code>{escaped.replace(chr(10), '<br>')}</code>"
