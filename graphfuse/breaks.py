"""Graph breaks that cost a rewrite and mean nothing.

A log line between `lm_head` and its loss splits the graph there, and with it the one pattern that spans both.
"""

from __future__ import annotations

import functools
import logging

import torch._dynamo
from torch.torch_version import TorchVersion


def ignore_messages_said_once() -> None:
    """Let Dynamo trace over those methods of `logging.Logger` that say the same message only once.

    Libraries hang them on the class as functions with a cache (`functools.lru_cache`): from the second call on they
    do nothing, so leaving them out of compiled code changes no step but the first. Plain logging methods still break
    the graph, and still log. Cheap, and safe to call again: a library may come later. Before torch 2.13, Dynamo fails
    to log a configuration that names two functions there, with an error for every compilation: nothing is done.
    """
    if TorchVersion(torch.__version__) < "2.13":
        return
    once = {method for method in vars(logging.Logger).values() if isinstance(method, functools._lru_cache_wrapper)}
    if not once <= torch._dynamo.config.ignore_logging_functions:
        torch._dynamo.config.ignore_logging_functions |= once
