"""transformers' Trainer: one callback."""

from __future__ import annotations

from typing import Any

from _small import Size, compare, language_model, logged, rows, settings
from torch import nn
from transformers import Trainer, TrainingArguments

from graphfuse.integrations.transformers import GraphfuseCallback


def train(size: Size, **options: Any) -> tuple[nn.Module, list[float]]:
    """Train and return the model and its losses."""
    model, data = language_model(size), rows(size)
    arguments = TrainingArguments(**settings(size))

    callback = GraphfuseCallback(**options)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    return model, logged(trainer)


def main() -> None:
    """Compare with eager."""
    compare(train)


if __name__ == "__main__":
    main()
