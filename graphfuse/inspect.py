"""`graphfuse inspect`: the report of a model without its weights, a GPU or a training step.

The model is built on torch's meta device, where tensors have shapes and no content, and compiled for one training
batch. Certification is as real as ever: it runs on small random numbers of its own, on the CPU.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphfuse.api import optimize, report
from graphfuse.errors import GraphfuseError
from graphfuse.reporting import Report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADS = (  # in this order: the first that knows a type builds it
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_MAPPING",
)

SEQUENCE = 2048  # tokens, if nobody says how many

Batch = dict[str, Any]


class InspectError(GraphfuseError):
    """What was asked for does not exist, or cannot be built; the message is one line for the terminal."""


def of_type(model_type: str, batch: int, sequence: int | None, dtype: str) -> Report:
    """The report of a transformers model type, as large as its configuration is by default.

    Raises:
        InspectError: transformers is not installed, or does not know the type.
    """
    return _of_config(_config(model_type, {}, "--model-type"), batch, sequence, dtype)


def of_config(path: Path, batch: int, sequence: int | None, dtype: str) -> Report:
    """The report of the model that a Hugging Face config.json, or the folder that it lies in, describes.

    Raises:
        InspectError: no such file, no JSON object, an unknown model type or class.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InspectError(f"--config: expected a file, got {path}: {error.strerror}") from error
    except ValueError as error:
        raise InspectError(f"--config: expected JSON in {path}, got: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise InspectError(f"--config: expected an object with a model_type in {path}, got none")
    config = _config(content.pop("model_type"), content, "--config")
    return _of_config(config, batch, sequence, dtype)


def of_factory(name: str, batch: int, sequence: int | None, dtype: str) -> Report:
    """The report of what a function without arguments returns: a module, or a module and its keyword arguments.

    Without arguments the model gets token ids, as `input_ids` (and `labels`) or in the first place.

    Raises:
        InspectError: no such module or function, or it does not return a module.
    """
    with torch.device("meta"):
        model, inputs = made_by(name)
    model = model.to(device="meta", dtype=DTYPES[dtype])
    if inputs is None:
        inputs = _tokens(model.forward, batch, sequence or SEQUENCE)
    return _inspect(model, inputs)


def made_by(name: str) -> tuple[nn.Module, Batch | None]:
    """What package.module:function returns, called without arguments: a module, and its keyword arguments if any.

    Raises:
        InspectError: no such module or function, or it does not return a module.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InspectError(f"factory: expected package.module:function, got {name!r}")
    sys.path.insert(0, "")  # as `python -m` does
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise InspectError(f"factory: expected a module that can be imported, got {module_name!r}: {error}") from error
    except AttributeError as error:
        raise InspectError(f"factory: expected a name in {module_name}, got {attribute!r}") from error
    finally:
        sys.path.remove("")
    made = factory()
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise InspectError(f"factory: expected {name} to return an nn.Module, got {type(model).__name__}")
    return model, inputs


def _config(model_type: str, content: dict[str, Any], option: str) -> Any:
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise InspectError(f"{option}: expected transformers to be installed, got: {error}") from error
    if model_type not in CONFIG_MAPPING:
        near = nearest(model_type, list(CONFIG_MAPPING.keys()))
        raise InspectError(f"{option}: expected a model type that transformers knows, got {model_type!r}{near}")
    try:
        return CONFIG_MAPPING[model_type].from_dict(content)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InspectError(f"{option}: expected a configuration of {model_type}, got: {_first_line(error)}") from error


def nearest(name: str, known: list[str]) -> str:
    """The known names that look like this one, as the end of a message."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    return f" (near: {', '.join(near)})" if near else ""


def _class_for(config: Any) -> type[nn.Module]:
    """The class that the configuration names, or the one with the most to find that takes it."""
    import transformers
    from transformers.models.auto import modeling_auto

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is None:
            raise InspectError(f"--config: expected a class of transformers among architectures, got {name!r}")
        return found  # type: ignore[no-any-return]
    for mapping in HEADS:
        known = getattr(modeling_auto, mapping)
        if type(config) in known:
            found = known[type(config)]
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]
    raise InspectError(f"--model-type: expected one with a model in transformers, got {config.model_type!r}")


def _of_config(config: Any, batch: int, sequence: int | None, dtype: str) -> Report:
    for part in (config, config.get_text_config()):
        part.use_cache = False  # a training step keeps no keys and values
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # real checkpoints bring one; the sites do not depend on it
    model_class: Any = _class_for(config)
    try:
        with torch.device("meta"):
            model = model_class._from_config(config, dtype=DTYPES[dtype])
    except (ValueError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        raise InspectError(f"{model_class.__name__}: expected to be built, got: {_first_line(error)}") from error
    if model.main_input_name != "input_ids":
        raise InspectError(
            f"{model_class.__name__}: expected a model of tokens (input_ids), got one of {model.main_input_name};"
            " give a package.module:factory that returns the model and its keyword arguments"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or SEQUENCE
    if sequence is None:  # some count positions from behind the padding's number on: not quite as many as there are
        sequence = min(SEQUENCE, positions - positions % 64 or positions)
    try:
        return _inspect(model, _tokens(model.forward, batch, sequence))
    except InspectError as error:
        if sequence > positions:  # which rotations can bear, and tables of positions cannot
            raise InspectError(f"--seq: expected at most {positions} tokens for this model, got {sequence}") from error
        raise


def _tokens(forward: Callable[..., Any], batch: int, sequence: int) -> Batch:
    tokens = torch.zeros(batch, sequence, dtype=torch.long, device="meta")
    return dict.fromkeys(forward_names(forward), tokens)


def forward_names(forward: Callable[..., Any]) -> list[str]:
    """The arguments of a model that get tokens.

    Raises:
        InspectError: it takes none.
    """
    names = list(inspect.signature(forward).parameters)
    if not names:
        raise InspectError("factory: expected a model whose forward takes tokens, got one without arguments")
    given: list[str] = [name for name in ("input_ids", "labels") if name in names] or names[:1]
    if "decoder_input_ids" in names and "labels" not in names:
        given.append("decoder_input_ids")
    return given


def _inspect(model: nn.Module, inputs: Batch) -> Report:
    optimize(model.train(), inner="eager")
    try:
        model(**inputs)
    except Exception as error:  # whatever a model's code raises on tensors without content
        found = report(model)
        if not found.sites:
            name = type(model).__name__
            raise InspectError(
                f"{name}: expected to run on tensors without content, got: {_first_line(error)}"
            ) from error
        found.notes.append(f"the model stopped on tensors without content: {_first_line(error)}")
        return found
    return report(model)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
