"""Where a graph node comes from: module, class, parameter, line of code."""

from __future__ import annotations

import re

from torch import fx


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose forward made the node; empty for the root.

    Dynamo names modules by how the compiled frame reached them (`L['self'].model.layers.0.mlp`).
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return _path(str(next(reversed(stack.values()))[0]))


def module_class(node: fx.Node) -> str:
    """The class of that module, without where it was imported from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    name = next(reversed(stack.values()))[1]
    return str(getattr(name, "__qualname__", name)).rpartition(".")[2]


def source_path(placeholder: fx.Node) -> str:
    """The dotted path of the parameter or argument that a placeholder stands for; empty if Dynamo does not say."""
    name = getattr(getattr(placeholder, "_dynamo_source", None), "name", "")
    return _path(name() if callable(name) else name)  # a method before torch 2.13


def _path(path: str) -> str:
    path = re.sub(r"\._(?:modules|parameters)\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    path = re.sub(r"\[['\"]?([\w.]+)['\"]?\]", r".\1", path)
    parts = [part for part in path.split(".") if part not in ("_orig_mod", "_modules", "_parameters", "")]
    return ".".join(parts[2:] if parts[:1] in (["L"], ["G"]) else parts)


def source_line(node: fx.Node) -> str:
    """`file:line` of the innermost user code that made the node."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{lines[-1][0]}:{lines[-1][1]}" if lines else ""
