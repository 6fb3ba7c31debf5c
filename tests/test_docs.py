"""The pages of docs/ and the README: links lead somewhere, code runs, and what is made from the code is up to date."""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import graphfuse
import graphfuse.backend
from graphfuse.cli import app
from tests.docs import patterns_page
from tests.docs.blocks import anchors, blocks, links
from tests.docs.reasons import ROOT, reasons

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their code is run by tests of their own, or is for other machines: here it has to parse.
RUN_ELSEWHERE = {"trainers.md", "distributed.md", "adding_a_pattern.md"}
EXAMPLE = ROOT / "docs" / "adding_a_pattern.md"


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents, link
        if anchor:
            assert anchor in anchors(target), link


def test_readme_links_to_every_page():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert [name(page) for page in PAGES[1:] if page not in linked] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_runs(page, monkeypatch, tmp_path):
    """From top to bottom, with a tiny model and without a C++ compiler."""
    found = [block for block in blocks(page) if block.language == "python"]
    if page.name in RUN_ELSEWHERE:
        for block in found:
            ast.parse(block.code)
        return
    if not found:
        return
    pytest.importorskip("transformers")
    compile_inner = graphfuse.backend.compile_inner

    def quickly(graph_module, inputs, config):
        return compile_inner(graph_module, inputs, replace(config, inner="eager"))

    monkeypatch.setattr(graphfuse.backend, "compile_inner", quickly)
    monkeypatch.chdir(tmp_path)
    from tests.tiny import build

    space = {"tokens": torch.randint(100, (2, 16)), "model": build("llama")}
    for block in found:
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    """Commands and options of graphfuse, and targets of the Makefile."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ((?:\w+ ?)+?)(?=`|  |$)", text, re.MULTILINE):
        assert set(target.split()) <= targets, target
    for words in re.findall(r"(?:^|`)graphfuse ((?:inspect|bench)\b[^`#\n]*)", text, re.MULTILINE):
        command = words.split()[: 2 if words.startswith("bench") else 1]
        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0, words
        assert [option for option in re.findall(r"--[\w-]+", words) if option not in shown.output] == [], words


def test_patterns_are_up_to_date(monkeypatch):
    """Else: make docs."""
    monkeypatch.setenv("GRAPHFUSE_LOG", "off")
    assert patterns_page.PAGE.read_text(encoding="utf-8") == patterns_page.page()


def test_every_refusal_is_explained():
    """docs/troubleshooting.md has a line for each reason that the code can give, and for no other."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Refusals")[2]
    explained = [row[1] for row in re.finditer(r"^\| `(.*?)` \| \S", text, re.MULTILINE)]
    assert len(explained) == len(set(explained))
    assert sorted(set(reasons()) - set(explained)) == [], "not explained in docs/troubleshooting.md"
    assert sorted(set(explained) - set(reasons())) == [], "explained, but no reason that the code gives"


def test_example_of_a_pattern_works(tmp_path):
    """docs/adding_a_pattern.md, done in a copy of the repository."""
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "examples", "zoo")
    shutil.copytree(ROOT, tmp_path / "copy", symlinks=True, ignore=left_out)
    copy = tmp_path / "copy"
    files = {block.path: block.code for block in blocks(EXAMPLE) if block.path}
    assert len(files) == 4
    for path, code in files.items():
        (copy / path).write_text(code, encoding="utf-8")
    catalogue = copy / "patterns" / "__init__.py"
    text = catalogue.read_text(encoding="utf-8")
    text = text.replace("    rope,\n)", "    rope,\n    squared_relu,\n)")
    catalogue.write_text(text.replace("    glu.PATTERN,\n", "    glu.PATTERN,\n    squared_relu.PATTERN,\n"))

    def python(*arguments):
        environment = os.environ | {"PYTHONPATH": str(copy), "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    tests = [path for path in files if path.startswith("tests/")]
    laws = [
        f"tests/test_house.py::{law}"
        for law in ("test_gives_each_fusion_its_four_places", "test_imports_point_one_way")
    ]
    out = python("pytest", "-q", "-p", "no:cacheprovider", *tests, *laws)
    assert re.search(r"\d+ passed in", out), out
    if shutil.which("ruff", path=os.path.dirname(sys.executable)):
        python("ruff", "check", *files)
        python("ruff", "format", "--check", *files)
