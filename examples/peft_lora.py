"""LoRA with PEFT, in transformers' Trainer. The adapter comes first."""

from __future__ import annotations

from typing import Any

from _small import Size, compare, language_model, logged, rows, settings
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import graphfuse


def train(size: Size, **options: Any) -> tuple[nn.Module, list[float]]:
    """Train and return the model and its losses."""
    model, data = language_model(size), rows(size)
    arguments = TrainingArguments(**settings(size))

    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model = graphfuse.optimize(model, **options)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return model, logged(trainer)


def main() -> None:
    """Compare with eager."""
    compare(train)


if __name__ == "__main__":
    main()
