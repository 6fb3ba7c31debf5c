"""Let accelerate take "graphfuse" for the name of a backend.

    graphfuse.integrations.accelerate.enable()
    arguments = TrainingArguments(..., torch_compile=True, torch_compile_backend="graphfuse")

accelerate looks names up in a closed list of its own, `DynamoBackend`, and refuses those that torch knows beyond it.
Compiling in place, with `graphfuse.optimize` or the callback for transformers, needs none of this, and takes options.
"""

from __future__ import annotations

from typing import Any

try:
    from accelerate.utils import DynamoBackend
except ImportError as error:
    raise ImportError(
        f"graphfuse.integrations.accelerate: expected accelerate to be installed, got: {error}"
    ) from error

NAME = "GRAPHFUSE"  # accelerate asks for the upper case, and hands torch the lower


def enable() -> None:
    """Make `DynamoBackend("GRAPHFUSE")` a backend, in this process. Calling it again changes nothing.

    What reads the name runs after: `Accelerator(dynamo_backend="graphfuse")`, `TrainingArguments(torch_compile=True,
    torch_compile_backend="graphfuse")`. `accelerate launch --dynamo_backend` checks the name in a process before the
    script's, and goes on refusing it.
    """
    try:
        DynamoBackend(NAME)
    except ValueError:
        member: Any = str.__new__(DynamoBackend, NAME)
        member._name_ = member._value_ = NAME
        DynamoBackend._missing_ = classmethod(lambda cls, value: member if value == NAME else None)
