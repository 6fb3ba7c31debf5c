"""What graphfuse looks for: one file per fusion, in the order in which they are tried."""

from __future__ import annotations

from graphfuse.match import Pattern
from graphfuse.patterns import (
    add_rms_norm,
    attention,
    causal_attention,
    cross_entropy,
    glu,
    grouped_attention,
    layer_norm,
    linear_cross_entropy,
    norm_rope,
    rms_norm,
    rope,
)

CATALOGUE: tuple[Pattern, ...] = (
    linear_cross_entropy.PATTERN,
    cross_entropy.PATTERN,
    causal_attention.PATTERN,
    grouped_attention.PATTERN,
    attention.PATTERN,
    norm_rope.PATTERN,
    rope.PATTERN,
    layer_norm.PATTERN,
    add_rms_norm.PATTERN,
    rms_norm.PATTERN,
    glu.PATTERN,
)
