"""How many sites a model has, counted without graphfuse: by what it calls while it runs in eager."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PATTERNS = ("rms_norm", "layer_norm", "rope", "glu", "causal_attention", "linear_cross_entropy")
# All that transformers 5.23 calls a rotation of queries and keys. It returns what it rotated.
ROTATION = re.compile(r"_?apply_(rotary|multidimensional_rope)\w*")
LOSSES = {functional.cross_entropy, functional.nll_loss}

Places = dict[str, Counter[str]]
"""Pattern -> module path -> how often it is computed there in one forward pass."""


@contextmanager
def census(model: nn.Module, classes: Mapping[str, Sequence[str]]) -> Iterator[Places]:
    """Count every forward pass of the block.

    Args:
        model: whose paths are meant.
        classes: pattern -> names of the classes whose forward computes it.
    """
    paths = path_of(model)
    pattern_of = {name: pattern for pattern, names in classes.items() for name in names}
    places: Places = {pattern: Counter() for pattern in PATTERNS}

    def called(module: nn.Module, *_: Any) -> None:
        pattern = pattern_of.get(type(module).__name__)
        if pattern is not None and module in paths:
            places[pattern][paths[module]] += 1

    def returned(frame: FrameType, event: str, result: Any) -> None:
        if event == "return" and ROTATION.fullmatch(frame.f_code.co_name) and frame.f_back is not None:
            if ROTATION.fullmatch(frame.f_back.f_code.co_name):
                return  # one rotation calls another
            rotated = [result] if isinstance(result, Tensor) else result
            places["rope"][running(paths, frame)] += sum(isinstance(tensor, Tensor) for tensor in rotated)

    class Calls(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            kwargs = kwargs or {}
            if func in LOSSES:
                places["linear_cross_entropy"][""] += 1
            # With is_causal, where the compiler sees a mask.
            if func is functional.scaled_dot_product_attention and kwargs.get("is_causal"):
                places["causal_attention"][running(paths, sys._getframe(1))] += 1
            return func(*args, **kwargs)

    hook = nn.modules.module.register_module_forward_hook(called)
    sys.setprofile(returned)
    try:
        with Calls():
            yield places
    finally:
        sys.setprofile(None)
        hook.remove()


def path_of(model: nn.Module) -> dict[nn.Module, str]:
    """Every module's path, one each, though it may have several."""
    return {module: path for path, module in model.named_modules()}


def running(paths: Mapping[nn.Module, str], frame: FrameType | None) -> str:
    """The path of the module whose method is nearest on the stack; empty for the root and for none."""
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in paths:
            return paths[module]
        frame = frame.f_back
    return ""
