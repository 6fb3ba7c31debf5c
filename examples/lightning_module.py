"""PyTorch Lightning: the module compiles what it holds."""

from __future__ import annotations

import tempfile
from typing import Any

import lightning
import torch
from _small import Size, compare, language_model, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

import graphfuse


class Language(lightning.LightningModule):
    """A language model and its optimizer."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = graphfuse.optimize(model, **options)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """The loss of one batch."""
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What Lightning steps."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(size: Size, **options: Any) -> tuple[nn.Module, list[float]]:
    """Train and return the model and its losses."""
    module = Language(language_model(size).train(), **options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=size.steps, default_root_dir=tempfile.mkdtemp(), **quiet)
    trainer.fit(module, DataLoader(rows(size), size.batch))
    return module, module.losses


def main() -> None:
    """Compare with eager."""
    compare(train)


if __name__ == "__main__":
    main()
