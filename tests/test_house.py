"""The laws of the house: names, layers, packaging, and a README that tells the truth."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools

from graphfuse.patterns import CATALOGUE

ROOT = Path(__file__).parents[1]
FOLDERS = ["graphfuse", "patterns", "kernels", "tests", "examples"]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not path.parent.is_symlink())
MAX_LINES = 400

# The glossary has one word for each of these: pattern, match, bind, rewrite, report.
OTHER_WORDS = {"rule", "template", "hit", "capture", "patch", "summary"}


def stems(folder, prefix=""):
    """Names of the public modules of a folder."""
    names = (path.stem.removeprefix(prefix) for path in (ROOT / folder).glob(f"{prefix}*.py"))
    return {name for name in names if not name.startswith("_")}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Modules of graphfuse that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return {name for name in found if name.startswith("graphfuse.")}


def defined_names(path):
    """Names that a file gives to its functions, classes, arguments and variables."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_gives_each_fusion_its_four_places():
    """A pattern has a kernel, both have a test, and the catalogue has the pattern."""
    patterns = stems("patterns")
    assert sorted(pattern.name for pattern in CATALOGUE) == sorted(patterns)
    assert stems("kernels") == patterns
    assert patterns <= stems("tests/patterns", "test_")
    assert patterns <= stems("tests/kernels", "test_")


def test_imports_point_one_way():
    """kernels <- patterns <- graphfuse.backend; the rest of the engine imports neither."""
    forbidden = {
        "kernels": r"graphfuse\.(?!kernels)",
        "patterns": r"graphfuse\.backend",
        "graphfuse": r"graphfuse\.(kernels|patterns)",
    }
    wrong = [
        f"{relative(path)} imports {name}"
        for folder, pattern in forbidden.items()
        for path in (ROOT / folder).glob("*.py")
        if relative(path) not in {"graphfuse/__init__.py", "graphfuse/backend.py", "graphfuse/ops.py"}
        for name in sorted(imports(path))
        if re.match(pattern, name)
    ]
    assert wrong == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_keeps_files_short(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert path.stem not in {"utils", "helpers", "misc"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_uses_the_glossary(path):
    """One word for one thing, in the names of everything we define."""
    for name in [path.stem, *defined_names(path)]:
        words = re.findall(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]+", name)
        assert not OTHER_WORDS & {word.lower() for word in words}, name


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("[!_]*.py")), ids=relative)
def test_gives_examples_a_main(path):
    text = path.read_text()
    assert "\ndef main() -> None:" in text
    assert text.endswith('\nif __name__ == "__main__":\n    main()\n')


def test_readme_shows_the_tree_as_it_is():
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"## Files\n\n```\n(.*?)```", readme, re.DOTALL)[1]
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text().splitlines()} | {".git"}
    there = {path.name for path in ROOT.iterdir() if not any(path.match(pattern) for pattern in ignored)}
    assert shown == there


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_leaves_the_name_kernels_to_hugging_face():
    """With an __init__ here, the repository root on sys.path would hide their package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in ("kernels", "patterns"):
        assert (ROOT / "graphfuse" / name).resolve() == ROOT / name


@pytest.mark.skipif(int(setuptools.__version__.split(".")[0]) < 77, reason="needs setuptools >= 77 to build a wheel")
def test_wheel_holds_graphfuse_alone(tmp_path):
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "examples")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {name.split("/")[0] for name in names} == {"graphfuse", f"graphfuse-{version}.dist-info"}
    top = [*(ROOT / "graphfuse").glob("*.py"), *(ROOT / "graphfuse").glob("*.t*")]
    expected = {f"graphfuse/{path.name}" for path in top}
    for folder in ("kernels", "patterns"):
        expected |= {f"graphfuse/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    for folder in ("bench", "integrations", "lazy", "reporting"):
        expected |= {f"graphfuse/{folder}/{path.name}" for path in (ROOT / "graphfuse" / folder).glob("*.*")}
    assert {name for name in names if name.startswith("graphfuse/")} == expected
    entry_points = zipfile.ZipFile(wheel).read(f"graphfuse-{version}.dist-info/entry_points.txt").decode()
    assert "[torch_dynamo_backends]\ngraphfuse = graphfuse.backend:graphfuse\n" in entry_points
