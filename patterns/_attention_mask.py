"""What a mask is: the lower triangle always, the lower triangle unless its inputs hide more, or something else.

- Where nothing but sizes goes in, the mask is a constant, and computed here.
- Where it depends on inputs, it is computed here as if nothing were padded and there were one document.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from graphfuse.evaluate import CannotEvaluate, evaluate
from graphfuse.kernels.causal_attention import is_lower_triangle
from graphfuse.shadow import LEAF, Shadow, Value

LARGEST = 1 << 31  # elements of a mask that are computed to look at it
MOST_GUESSES = 64  # combinations of what the inputs of a mask may be


@dataclass(frozen=True)
class Known:
    """A mask that is the lower triangle, or hides nothing: always, or where what it depends on hides nothing.

    Attributes:
        depends_on: names of inputs, or of what else makes it another mask in another call; empty for a constant.
        contents: the masks that were looked at, as they were when they were found to be that.
        is_causal: whether it is the lower triangle.
        window: how many positions each sees of that, itself and those before it; 0: all of them.
    """

    depends_on: tuple[str, ...]
    contents: tuple[Tensor, ...]
    is_causal: bool = True
    window: int = 0


@dataclass(frozen=True)
class Unfit:
    """Why a mask is not the lower triangle, and what would help."""

    reason: str
    hint: str = ""


def look(
    masks: Sequence[Value],
    combine: Callable[[Sequence[Tensor]], Tensor],
    shadow: Shadow,
    *,
    may_hide_nothing: bool = False,
    may_slide: bool = False,
) -> Known | Unfit:
    """What is known of the mask that `combine` makes of all of `masks`, or why it is not the lower triangle."""
    sliding: Known | None = None
    for mask in masks:
        if mask.tensor.requires_grad:
            return Unfit("mask: expected one that needs no gradient, got one that requires it", "detach() the mask")
        if math.prod(mask.shape) > LARGEST:
            reason = f"mask: expected at most {LARGEST} elements, got {math.prod(mask.shape)}"
            return Unfit(reason, "make the mask once for all sequences and heads, or give is_causal=True instead")
    region = shadow.history(masks)
    leaves = [value for value in region if value.op is LEAF and value.handed is None]
    is_static = not any(_reads_symbols(value) for value in region)
    device = device_of(masks[0].tensor)
    names = tuple(leaf.node.name for leaf in leaves)
    guesses = [list(_harmless(leaf, device)) for leaf in leaves]
    if math.prod(len(guess) for guess in guesses) > MOST_GUESSES or not all(guesses):
        first = next((name for name, guess in zip(names, guesses, strict=True) if not guess), ", ".join(names))
        reason = f"mask: expected to depend on sizes, padding and positions only, got one that depends on {first}"
        return Unfit(reason, "make the mask from arange, positions and attention_mask, or give is_causal=True instead")
    depends_on = names or (() if is_static else ("sizes",))
    try:
        with _disable_current_modes(), torch.no_grad():
            for guess in itertools.product(*guesses):
                known = dict(zip(leaves, guess, strict=True))
                results = evaluate(region, known, exact=False, device=device, sizes={})
                contents = tuple(results[mask] for mask in masks)
                whole = combine(contents)
                if is_lower_triangle(whole):
                    return Known(depends_on, contents)
                if may_hide_nothing and not depends_on and _hides_nothing(whole):
                    return Known((), contents, is_causal=False)
                # Documents of one token each look like windows of one.
                if may_slide and sliding is None and (window := _window(whole)) > bool(depends_on):
                    sliding = Known(depends_on, contents, window=window)
    except CannotEvaluate as error:
        return Unfit(f"mask: {error}")
    if sliding is not None:
        return sliding
    other = "one even where nothing is padded" if leaves else "constant"
    reason = f"mask: expected the lower triangle, got another {other}"
    return Unfit(reason, "a sliding window as long as the sequence is causal; what else differs from that is not")


def _hides_nothing(mask: Tensor) -> bool:
    return bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())


def _reads_symbols(value: Value) -> bool:
    """Whether a number goes in that may be another in another call: a size, or one that was given."""
    numbers = [*value.tensor.shape, *tree_leaves((value.args, value.kwargs))]
    return any(isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool) for number in numbers)


def _window(mask: Tensor) -> int:
    """How many positions the last one sees, if all see as many, or what there is; else 0."""
    last = mask.reshape(-1, mask.shape[-1])[-1:]
    window = int((last if mask.dtype == torch.bool else last == 0).sum())
    return window if window and is_lower_triangle(mask, window) else 0


def device_of(mask: Tensor) -> torch.device:
    """Where a mask of this kind is computed to look at it."""
    return mask.device if mask.device.type == "cuda" else torch.device("cpu")


def _harmless(leaf: Value, device: torch.device) -> Iterator[Tensor]:
    """Values of an input under which a causal mask is nothing but causal: no padding, one document, the mask itself."""
    if leaf.tensor.requires_grad:
        return
    shape, dtype = leaf.shape, leaf.dtype
    is_square = len(shape) >= 2 and shape[-1] == shape[-2]
    if is_square:
        yield triangle(shape, dtype, device)
    if not dtype.is_floating_point or len(shape) == 2:
        yield torch.ones(shape, dtype=dtype, device=device)
    if not dtype.is_floating_point and dtype != torch.bool and shape:
        yield torch.arange(shape[-1], device=device).to(dtype).expand(shape)
    if is_square:  # which positions are hidden; or, as numbers, which are not
        yield torch.ones(shape, dtype=torch.bool, device=device).triu(1).to(dtype)
        if dtype.is_floating_point:
            yield torch.ones(shape, dtype=dtype, device=device).tril()


def triangle(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, window: int = 0) -> Tensor:
    """The causal mask: True, 1 or 0 is seen; False, 0 or a large negative number is not."""
    seen = torch.ones(shape, dtype=torch.bool, device=device).tril()
    return as_mask(seen.triu(1 - window) if window else seen, dtype)


def as_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask under which is seen what is `allowed`; added, if the dtype is floating."""
    if not dtype.is_floating_point:
        return allowed.to(dtype)
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -1e9).to(dtype)
