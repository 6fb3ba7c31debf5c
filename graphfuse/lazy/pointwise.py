"""Lazy logits through functions of each element alone: they stay lazy.

    exp, log, sigmoid, abs, ...        z + 1e-8, 1 - z, 1 / z, z ** 2        isnan, z > 0, ...

Everything here answers `NotImplemented` where it would have to guess; the function then gets plain tensors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from graphfuse.lazy.functions import applied
from graphfuse.lazy.table import FUNCTIONS, Function, handles

_MAPS = "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square abs absolute sign sigmoid relu nan_to_num"
_TESTS = "isnan isinf isfinite"
_WITH_NUMBER: dict[Any, tuple[str, ...]] = {
    torch.add: ("add", "__add__", "__radd__"),
    torch.sub: ("sub", "subtract", "__sub__"),
    torch.rsub: ("rsub", "__rsub__"),
    torch.pow: ("pow", "__pow__"),
    torch.eq: ("eq", "__eq__"),
    torch.ne: ("ne", "not_equal", "__ne__"),
    torch.gt: ("gt", "greater", "__gt__"),
    torch.ge: ("ge", "greater_equal", "__ge__"),
    torch.lt: ("lt", "less", "__lt__"),
    torch.le: ("le", "less_equal", "__le__"),
}


def _alone(apply: Function) -> Function:
    def run(tensor: Any) -> Any:
        return applied(tensor, apply)

    return run


for _name in (*_MAPS.split(), *_TESTS.split()):
    handles(_name)(_alone(getattr(torch, _name)))
FUNCTIONS[torch.special.entr] = _alone(torch.special.entr)
FUNCTIONS[torch.nn.functional.logsigmoid] = _alone(torch.nn.functional.logsigmoid)


@handles("clamp", "clip")
def _clamp(tensor: Any, min: Any = None, max: Any = None) -> Any:
    if any(isinstance(bound, Tensor) for bound in (min, max)):
        return NotImplemented
    return applied(tensor, functools.partial(torch.clamp, min=min, max=max))


def _with_number(func: Function) -> Function:
    other = FUNCTIONS.get(func)  # what it does with a tensor

    def run(tensor: Any, number: Any, **kwargs: Any) -> Any:
        if isinstance(number, Tensor) or kwargs:
            return NotImplemented if other is None else other(tensor, number, **kwargs)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or (func is torch.add and not number):
            return NotImplemented  # `logits + 0` is how to read them
        return applied(tensor, functools.partial(_second, func, number))

    return run


def _second(func: Function, number: float, tensor: Tensor) -> Any:
    return func(tensor, number)


for _func, _names in _WITH_NUMBER.items():
    handles(*_names)(_with_number(_func))


@handles("__rtruediv__", "__rdiv__")
def _over(tensor: Any, number: Any) -> Any:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return NotImplemented
    return applied(tensor, functools.partial(_number_over, number))


def _number_over(number: float, tensor: Tensor) -> Tensor:
    return number / tensor
