"""The ops that rewrites put into graphs, for code that calls them by name.

    from graphfuse import ops

    loss = ops.linear_cross_entropy(hidden, lm_head.weight, labels)
    logps = ops.linear_log_probs(hidden, lm_head.weight, tokens)

Each has a reference in torch operations, a Triton kernel where there is a GPU, a fake implementation for compilers, and
a backward.
"""

from __future__ import annotations

from graphfuse.kernels._packed_glu import packed_glu
from graphfuse.kernels._vocab_parallel import vocab_parallel_cross_entropy
from graphfuse.kernels.add_rms_norm import add_rms_norm, rms_norm_add
from graphfuse.kernels.cross_entropy import cross_entropy
from graphfuse.kernels.glu import glu
from graphfuse.kernels.layer_norm import layer_norm
from graphfuse.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from graphfuse.kernels.norm_rope import norm_rope
from graphfuse.kernels.rms_norm import rms_norm
from graphfuse.kernels.rope import rope

__all__ = [
    "add_rms_norm",
    "cross_entropy",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_log_probs",
    "norm_rope",
    "packed_glu",
    "rms_norm",
    "rms_norm_add",
    "rope",
    "vocab_parallel_cross_entropy",
]
