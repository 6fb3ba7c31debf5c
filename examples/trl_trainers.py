"""TRL's trainers: `--method sft`, `dpo`, `kto`, `grpo` or `gkd`. All of them take the same callback."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from _small import Size, compare, language_model, logged, passages, settings, tokenizer
from datasets import Dataset
from torch import nn
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer

from graphfuse.integrations.transformers import GraphfuseCallback

METHODS = ("sft", "dpo", "kto", "grpo", "gkd")


def datasets(size: Size) -> dict[str, Dataset]:
    """For each method: the first half of a passage, and how it goes on."""
    halves = passages(size, size.length // 2)
    pairs = [{"prompt": a, "completion": b} for a, b in zip(halves, halves[1:] + halves[:1], strict=True)]
    sides = {"prompt": "user", "completion": "assistant"}.items()
    chats = [[{"role": role, "content": pair[side]} for side, role in sides] for pair in pairs]
    made = {
        "sft": pairs,
        "dpo": [{"prompt": p["prompt"], "chosen": p["completion"], "rejected": p["completion"][::-1]} for p in pairs],
        "kto": [{**p, "label": i % 2 == 0} for i, p in enumerate(pairs)],
        "grpo": [{"prompt": p["prompt"]} for p in pairs],
        "gkd": [{"messages": chat} for chat in chats],
    }
    return {method: Dataset.from_list(rows) for method, rows in made.items()}


def vowels(completions: list[str], **_: Any) -> list[float]:
    """GRPO's reward."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def train(size: Size, method: str, **options: Any) -> tuple[nn.Module, list[float]]:
    """Train and return the model and its losses."""
    model, other = language_model(size), language_model(size, seed=1 if method == "gkd" else 0)
    data = {"train_dataset": datasets(size)[method], "processing_class": tokenizer()}
    arguments = settings(size)
    if method == "grpo":
        arguments |= {"max_completion_length": size.length // 2, "num_generations": 2, "num_iterations": 2}
    elif method == "gkd":
        arguments |= {"max_length": size.length, "lmbda": 0.0}  # learns from the data; nothing is generated

    callbacks = [GraphfuseCallback(**options)]
    if method == "sft":
        trainer = SFTTrainer(model, SFTConfig(**arguments), callbacks=callbacks, **data)
    elif method == "dpo":
        trainer = DPOTrainer(model, other, DPOConfig(**arguments), callbacks=callbacks, **data)
    elif method == "kto":
        trainer = KTOTrainer(model, other, KTOConfig(**arguments), callbacks=callbacks, **data)
    elif method == "grpo":
        trainer = GRPOTrainer(model, vowels, GRPOConfig(**arguments), callbacks=callbacks, **data)
    else:
        trainer = GKDTrainer(model, other, GKDConfig(**arguments), callbacks=callbacks, **data)
    trainer.train()
    return trainer.model, logged(trainer)


def main() -> None:
    """Compare with eager."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=METHODS, default="sft")
    compare(functools.partial(train, method=parser.parse_known_args()[0].method))


if __name__ == "__main__":
    main()
