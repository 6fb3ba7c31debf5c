"""The ops that rewrites put into graphs, for code that calls them by name.

    from graphfuse import ops

    loss = ops.linear_cross_entropy(hidden, lm_head.weight, labels)
    logps = ops.linear_log_probs(hidden, lm_head.weight, tokens)

Each has a reference in torch operations, a Triton kernel where there is a GPU, a fake implementation for compilers, and
a backward.
"""

from __future__ import annotations

from graphfuse.kernels.glu import glu
from graphfuse.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from graphfuse.kernels.rms_norm import rms_norm
from graphfuse.kernels.rope import rope

__all__ = ["glu", "linear_cross_entropy", "linear_log_probs", "rms_norm", "rope"]
