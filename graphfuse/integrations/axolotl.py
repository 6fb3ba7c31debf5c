"""A plugin for axolotl.

    plugins:
      - graphfuse.integrations.axolotl.GraphfusePlugin
    graphfuse:              # options of graphfuse.optimize; may be left out
      memory: min

Leave `torch_compile` off beside it: with that on, axolotl has Dynamo swallow every error of a backend.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from transformers import TrainerCallback

from graphfuse.integrations.transformers import GraphfuseCallback

try:
    from axolotl.integrations.base import BasePlugin
except ImportError as error:
    raise ImportError(f"graphfuse.integrations.axolotl: expected axolotl to be installed, got: {error}") from error


class GraphfuseArguments(BaseModel):
    """What the plugin adds to axolotl's configuration.

    Attributes:
        graphfuse: options of `GraphfuseCallback`.
    """

    graphfuse: dict[str, Any] | None = None


class GraphfusePlugin(BasePlugin):
    """Gives axolotl's trainer a `GraphfuseCallback`."""

    def get_input_args(self) -> str:
        """Where axolotl finds the fields of the configuration."""
        return f"{__name__}.{GraphfuseArguments.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        """What axolotl hands the trainer that it is going to make."""
        return [GraphfuseCallback(**(cfg.graphfuse or {}))]
