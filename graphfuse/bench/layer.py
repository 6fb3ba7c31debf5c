"""One layer of a model, for `graphfuse bench model graphfuse.bench.layer:llama_3_8b`: what each rewrite is worth in it.

The head, which outweighs a layer, is not there; what goes in wants a gradient, as behind another layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphfuse.bench.workloads import Workload, workloads

WORKLOAD = "llama-3-8b"


class Layer(nn.Module):
    """The layers of a transformers model, over states that are trained with it.

    Args:
        model: takes `inputs_embeds`.
        states: (B, S, H).
    """

    def __init__(self, model: nn.Module, states: Tensor) -> None:
        super().__init__()
        self.model = model
        self.states = nn.Parameter(states)

    def forward(self) -> Tensor:
        """Return the last states, (B, S, H)."""
        found: Tensor = self.model(inputs_embeds=self.states, use_cache=False).last_hidden_state
        return found


def llama_3_8b() -> tuple[nn.Module, dict[str, Any]]:
    """A layer of the width of Llama-3-8B, and as many tokens as in the workload of that name."""
    return of(workloads()[WORKLOAD])


def of(workload: Workload) -> tuple[nn.Module, dict[str, Any]]:
    """One layer of the workload's model, and no further arguments."""
    from transformers import AutoConfig, AutoModel

    settings = {**workload.config, "num_hidden_layers": 1, "vocab_size": 8}
    config = AutoConfig.for_model(workload.model_type, **settings)
    states = torch.randn(workload.batch, workload.seq, workload.config["hidden_size"])
    model = AutoModel.from_config(config)
    # The squares of what a norm returns have the same mean whatever goes in, unless features weigh differently.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
    return Layer(model, states), {}
