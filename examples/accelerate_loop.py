"""A training loop with accelerate, which moves, wraps and casts the compiled model."""

from __future__ import annotations

from typing import Any

import torch
from _small import Size, compare, language_model, rows
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import graphfuse


def train(size: Size, **options: Any) -> tuple[nn.Module, list[float]]:
    """Train and return the model and its losses."""
    model, loader = language_model(size), DataLoader(rows(size), size.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []

    accelerator = Accelerator()
    model = graphfuse.optimize(model, **options)  # before prepare
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    """Compare with eager."""
    compare(train)


if __name__ == "__main__":
    main()
