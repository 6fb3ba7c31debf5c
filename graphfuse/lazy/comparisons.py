"""Lazy logits compared with numbers of each row, as `z > z.gather(-1, label)` finds a label's rank, or other logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphfuse.lazy.formula import version
from graphfuse.lazy.joins import joins
from graphfuse.lazy.losses import gathered
from graphfuse.lazy.table import Function, handles
from graphfuse.lazy.tensor import Source, live_formula


def _compares(func: Function) -> Function:
    both = joins(func)

    def run(left: Any, right: Any, **kwargs: Any) -> Any:
        return both(_as_in_rows(left, right), _as_in_rows(right, left), **kwargs)

    return run


def _as_in_rows(operand: Any, other: Any) -> Any:
    """Entries of the other operand as its rows have them: dot products round in another order."""
    formula = live_formula(other)
    if formula is None or type(operand) is not Tensor:
        return operand
    source: Source | None = other.source
    while source is not None:
        for reference, age, index in source.picked:
            picked = reference()
            is_it = picked is not None and (operand is picked or operand._base is picked)
            if is_it and operand.numel() == index.numel() and version(operand) == age:
                return gathered(formula.detach(), index, remembers=False).reshape(operand.shape)
        source = source.parent if source.make is Tensor.detach else None
    return operand


handles("eq", "__eq__")(_compares(torch.eq))
handles("ne", "not_equal", "__ne__")(_compares(torch.ne))
handles("gt", "greater", "__gt__")(_compares(torch.gt))
handles("ge", "greater_equal", "__ge__")(_compares(torch.ge))
handles("lt", "less", "__lt__")(_compares(torch.lt))
handles("le", "less_equal", "__le__")(_compares(torch.le))
