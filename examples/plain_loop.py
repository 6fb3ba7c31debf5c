"""A training loop by hand."""

from __future__ import annotations

from typing import Any

import torch
from _small import DEVICE, Size, compare, language_model, rows
from torch import nn
from torch.utils.data import DataLoader

import graphfuse


def train(size: Size, **options: Any) -> tuple[nn.Module, list[float]]:
    """Train and return the model and its losses."""
    model = language_model(size)
    losses = []

    model = graphfuse.optimize(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in DataLoader(rows(size), size.batch):
        loss = model(**{name: tensor.to(DEVICE) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    """Compare with eager."""
    compare(train)


if __name__ == "__main__":
    main()
