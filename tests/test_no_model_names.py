"""No model decides anything: what is matched and rewritten is found by what it computes.

The code of the engine and of the patterns is parsed, docstrings and comments left out, and its names and strings are
compared with what transformers calls its models.
"""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
# Run models that the user names, or stand between graphfuse and a library that has their names.
COMMANDS = ("graphfuse/cli.py", "graphfuse/inspect.py", "graphfuse/bench/", "graphfuse/integrations/")
FILES = sorted(
    path
    for folder in ("graphfuse", "patterns")
    for path in (ROOT / folder).glob("**/*.py")
    if not path.relative_to(ROOT).as_posix().startswith(COMMANDS)
)

# Model types that are words of their own: nobody would think of the model first.
ORDINARY = {
    *("align", "bark", "beam", "bit", "bloom", "clip", "codegen"),
    *("dots", "falcon", "funnel", "git", "led", "opt", "radio"),
}


def code_words(text):
    """Names and strings of a program, with the line of each."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    said = {
        id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and isinstance(n.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and id(node) not in said:
            yield line, node.value if isinstance(node.value, str) else node.value.decode(errors="replace")
        for field in ("id", "attr", "name", "asname", "arg", "module", "rest", "kwd_attrs"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                yield line, word


def snake(name):
    """`LlamaRMSNorm-x` -> `_llama_rms_norm_x_`: whole words between underscores."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return "_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + "_"


@functools.cache
def model_types():
    """A pattern for all model types as whole words."""
    types = {snake(name) for name in transformers.CONFIG_MAPPING} - {snake(word) for word in ORDINARY}
    return re.compile("|".join(sorted(types, key=len, reverse=True)))


@functools.cache
def class_names():
    """Every class that a model of transformers defines, or that transformers exports and torch does not."""
    models = Path(transformers.__file__).parent / "models"
    found = {name for name in dir(transformers) if name[0].isupper()}
    for path in models.glob("*/*.py"):
        found.update(re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    return {name for name in found if not hasattr(torch, name)}


def named_models(text):
    """What a program says about models: `(line, word)` of every model type, class and module path."""
    found = []
    for line, word in code_words(text):
        if match := model_types().search(snake(word)):
            found.append((line, match[0].strip("_")))
        found.extend((line, name) for name in re.findall(r"\w+", word) if name in class_names())
        if "_transformers_" in snake(word) or re.search(r"\b(modeling|modular|configuration)_\w", word):
            found.append((line, word))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_no_model(path):
    assert named_models(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("if config.model_type == 'qwen3_moe': pass", "qwen3_moe"),
        ("def fuse_llama(node): pass", "llama"),
        ("PATCHES = {LlamaRMSNorm: fast}", "LlamaRMSNorm"),
        ("is_it = type(m).__name__ == 'Gemma3ForCausalLM'", "Gemma3ForCausalLM"),
        ("from transformers import AutoModel", "transformers"),
        ("def f(x, gpt_oss=False): pass", "gpt_oss"),
        ("found = 'modeling_' in path or 'modeling_x.py' in path", "modeling_x.py"),
        ("f'{name}.deepseek_v3'", "deepseek_v3"),
        ("match x:\n    case mixtral: pass", "mixtral"),
    ],
    ids=lambda value: value if " " not in value else "",
)
def test_would_see_a_model(text, named):
    assert any(named in word for _, word in named_models(text))


@pytest.mark.parametrize(
    "text",
    ['"""As llama does."""', "x = 1  # LlamaRMSNorm", "def f():\n    '''gemma3'''", "class A:\n    'qwen3'\n    x = 1"],
)
def test_lets_people_be_told(text):
    assert named_models(text) == []
