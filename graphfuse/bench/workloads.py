"""What `graphfuse bench model` runs: named workloads, any model type of transformers, or somebody's own module."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from graphfuse.inspect import SEQUENCE, InspectError, forward_names, made_by, nearest

WORKLOADS = Path(__file__).with_name("workloads.toml")
MASKS = ("none", "ones", "padded")
PHASES = ("train", "prefill", "decode")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCABULARY = 1000  # of the tokens that a factory's model gets, if it has no configuration that says


@dataclass(frozen=True)
class Workload:
    """A step.

    Attributes:
        name: for people.
        model_type: of transformers; empty where there is a factory.
        batch: sequences.
        seq: tokens of each.
        config: what differs from the model type's default configuration; a dot leads into a part of it.
        mask: "none" passes no attention mask, "ones" one that hides nothing, "padded" one that hides the last quarter
            of every second sequence.
        dtype: of weights and activations.
        checkpointing: recompute layers in backward (transformers' gradient checkpointing).
        phase: "train", forward and backward; "prefill", forward of a prompt without gradients; "decode", forward of one
            more token of each sequence, the others in a static cache.
        factory: package.module:function that returns a module, or a module and its keyword arguments.
    """

    name: str
    model_type: str = ""
    batch: int = 1
    seq: int = SEQUENCE
    config: dict[str, Any] = field(default_factory=dict)
    mask: str = "none"
    dtype: str = "bfloat16"
    checkpointing: bool = False
    phase: str = "train"
    factory: str = ""

    @property
    def title(self) -> str:
        """What is run, in words."""
        words = [self.dtype, self.phase, f"mask: {self.mask}", *(["checkpointed"] if self.checkpointing else [])]
        return f"{self.name}, {self.batch} x {self.seq} tokens, {', '.join(words)}"


def workloads() -> dict[str, Workload]:
    """Those of `workloads.toml`, by name."""
    tables = tomllib.loads(WORKLOADS.read_text(encoding="utf-8"))
    return {name: Workload(name, **table) for name, table in tables.items()}


def of_type(model_type: str, config: dict[str, Any]) -> Workload:
    """One sequence of a model type of transformers: 2048 tokens, or as many as it has positions for.

    Raises:
        InspectError: no such model type or field of its configuration.
    """
    known = _config(Workload(model_type, model_type, config=config)).get_text_config()
    positions = getattr(known, "max_position_embeddings", None) or SEQUENCE
    return Workload(model_type, model_type, seq=min(SEQUENCE, positions))


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` as in JSON where it is JSON, else as text; "none" is None.

    Raises:
        InspectError: no `=`.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise InspectError(f"--set: expected key=value, got {pair!r}")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def check(workload: Workload) -> None:
    """Refuse what cannot be built, before anything is.

    Raises:
        InspectError: no such model type or field of its configuration; options that a factory has no use for.
    """
    if not workload.factory:
        if workload != workloads().get(workload.name):
            _config(workload)
        return
    for option, value, usual in (
        ("--set, --layers", workload.config, {}),
        ("--masks", workload.mask, "none"),
        ("--phases", workload.phase, "train" if workload.phase != "prefill" else "prefill"),
    ):
        if value != usual:
            raise InspectError(f"{option}: expected {usual or 'nothing'} for a factory, got {value}")


def build(workload: Workload, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random weights and the keyword arguments of a step, the same every time.

    Raises:
        InspectError: no such factory, model type or field of its configuration.
    """
    if workload.factory:
        return _made(workload, device)
    model = build_model(workload, device)
    return model, inputs(workload, model.config.get_text_config().vocab_size, device)  # type: ignore[union-attr, operator]


def build_model(workload: Workload, device: torch.device) -> nn.Module:
    """A transformers model with random weights, without dropout: else it would not agree with itself."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(_config(workload), dtype=DTYPES[workload.dtype])
    return _ready(model, workload)


def _config(workload: Workload) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if workload.model_type not in CONFIG_MAPPING:
        near = nearest(workload.model_type, list(CONFIG_MAPPING.keys()))
        got = f"{workload.model_type!r}{near}"
        raise InspectError(f"--model-type: expected a model type that transformers knows, got {got}")
    config = AutoConfig.for_model(workload.model_type)
    for name, value in workload.config.items():
        _set(config, name, None if value == "none" else value)
    # Some configurations work out their layers from other fields when they are made.
    config = type(config)(**_given(config.to_dict(), "model_type"))
    for part in (config, config.get_text_config()):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # those of a vocabulary of another size
            setattr(part, name, None)
        for name, value in part.to_dict().items():
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _set(config: Any, path: str, value: Any) -> None:
    """Set a field of a configuration, or of the part of it that is about text."""
    *parts, name = path.split(".")
    for part in parts:
        config = getattr(config, part, None)
    if config is not None and not hasattr(config, name):
        text = config.get_text_config()
        config = text if hasattr(text, name) else config
    if config is None or not hasattr(config, name):
        near = nearest(name, list(config.to_dict()) if config is not None else [])
        raise InspectError(f"--set: expected a field of {type(config).__name__}, got {path!r}{near}")
    setattr(config, name, value)


def _given(fields: dict[str, Any], *left_out: str) -> dict[str, Any]:
    """The fields that are not worked out from others, in a configuration and in its parts."""
    kept = {name: value for name, value in fields.items() if name not in ("layer_types", *left_out)}
    parts = {
        name: _given(value) for name, value in kept.items() if name.endswith("_config") and isinstance(value, dict)
    }
    return kept | parts


def _ready(model: nn.Module, workload: Workload) -> nn.Module:
    if workload.checkpointing:
        recompute_layers(model)
    return model.train(workload.phase == "train")


def recompute_layers(model: nn.Module) -> None:
    """Turn on transformers' gradient checkpointing, under its newer or its older name.

    Raises:
        InspectError: the model has none.
    """
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        enable: Any = getattr(model, f"{name}_enable", None)
        if enable is not None:
            enable(**{f"{name}_kwargs": {"use_reentrant": False}})
            return
    got = type(model).__name__
    raise InspectError(f"--checkpointing: expected a model with gradient_checkpointing_enable, got {got}")


def _made(workload: Workload, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """What a factory returns, on the device; floating inputs get the dtype of the workload, as the weights do."""
    torch.manual_seed(0)
    with device:
        model, given = made_by(workload.factory)
    dtype = DTYPES[workload.dtype]
    model = _ready(model.to(device=device, dtype=dtype), workload)
    if given is None:
        config: Any = getattr(model, "config", None)
        vocab = config.get_text_config().vocab_size if hasattr(config, "get_text_config") else VOCABULARY
        known = inputs(workload, vocab, device)
        tokens = known["input_ids"]
        return model, {name: known.get(name, tokens) for name in forward_names(model.forward)}
    return model, moved(given, device, dtype)


def moved(given: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments on the device, what is floating in the dtype."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)

    found: dict[str, Any] = tree_map(move, given)
    return found


def inputs(workload: Workload, vocab: int, device: torch.device) -> dict[str, Any]:
    """The keyword arguments of a step of a transformers model."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (workload.batch, workload.seq), generator=generator).to(device)
    labels = tokens.clone()
    given: dict[str, Any] = {"input_ids": tokens, "labels": labels, "use_cache": False}
    if workload.mask != "none":
        mask = torch.ones_like(tokens)
        if workload.mask == "padded":
            mask[1::2, -(workload.seq // 4) :] = 0
            labels[mask == 0] = -100
        given["attention_mask"] = mask
    return given
