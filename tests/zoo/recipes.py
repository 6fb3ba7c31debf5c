"""Builds any type from its recipe: the class that transformers gives it, tiny and random, and inputs for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

RECIPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("recipes.json").read_text(encoding="utf-8"))

INPUTS = {"input_ids": [2, 24], "labels": [2, 24], "use_cache": False}
FIRST_TOKEN, LAST_TOKEN = 10, 200  # ids that are special to no recipe


class NoTower(transformers.PreTrainedModel):
    """Stands in for a vision tower that needs the timm library: the inputs are text."""

    config_class = transformers.Gemma3nVisionConfig


transformers.AutoModel.register(transformers.Gemma3nVisionConfig, NoTower, exist_ok=True)


def build(name: str) -> nn.Module:
    """The model in train mode, with weights that depend on nothing but the recipe."""
    config: Any = transformers.CONFIG_MAPPING[name](**RECIPES[name]["config"])
    model_class: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    # Of a model of several parts it may be the decoder's.
    parts = [config, *(getattr(config, part) for part in config.sub_configs)]
    config = next((part for part in parts if isinstance(part, model_class.config_class)), config)
    torch.manual_seed(0)
    model: nn.Module = model_class._from_config(config)
    return model.train()


def inputs(name: str) -> dict[str, Tensor | bool]:
    """Keyword arguments of the model; a list in a recipe is the shape of a tensor."""
    torch.manual_seed(1)
    shapes = INPUTS | RECIPES[name].get("inputs", {})
    return {
        key: _drawn(key, shape) if isinstance(shape, list) else shape
        for key, shape in shapes.items()
        if shape is not None
    }


def _drawn(key: str, shape: list[int]) -> Tensor:
    if key.endswith("mask"):
        return torch.ones(shape, dtype=torch.long)
    if key.endswith("values"):
        return torch.randn(shape)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, shape)
