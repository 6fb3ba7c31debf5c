"""What a mean is, and what is left of a value when its mean is subtracted, however they are spelled."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from graphfuse.match import CASTS, DIV, INDEXING, MUL, SUB, argument, scalar, strip
from graphfuse.shadow import Value

aten = torch.ops.aten

WITH_MEAN = {aten.var_mean.correction, aten.std_mean.correction}


class Over(NamedTuple):
    """A value, and the dimensions that it is reduced over, as ATen takes them."""

    x: Value
    dims: Any


def mean_of(value: Value) -> Over | None:
    """What the value is the mean of: of any shape that views can give it."""
    while value.op in CASTS or value.op in INDEXING:
        value = value.args[0]
    if value.op is aten.mean.dim or (value.op in WITH_MEAN and value.output == 1):
        return Over(value.args[0], argument(value, 1, "dim"))
    if value.op in MUL | DIV and not value.kwargs and isinstance(value.args[0], Value):
        total, factor = strip(value.args[0]), scalar(value.args[1])
        if total.op is aten.sum.dim_IntList and total.args[0].shape and factor:
            width = factor if value.op in DIV else 1 / factor
            if math.isclose(width, total.args[0].shape[-1]):
                return Over(total.args[0], argument(total, 1, "dim"))
    return None


def centred(value: Value) -> Over | None:
    """`x`, if the value is `x - mean(x)`."""
    value = strip(value)
    if value.op not in SUB or not isinstance(value.args[1], Value) or value.kwargs:
        return None
    found = mean_of(value.args[1])
    if found is None or strip(found.x) is not strip(value.args[0]) or value.shape != value.args[0].shape:
        return None
    return Over(value.args[0], found.dims)
