"""Attention under a mask that is the plain causal one, or may be.

    scaled_dot_product_attention(q, repeat(k), repeat(v), mask)   ->   scaled_dot_product_attention(q, k, v, is_causal)

Anchor: `scaled_dot_product_attention` with a mask. Libraries build the mask in the graph, out of sizes, positions,
padding and document numbers. Told that it is causal, attention kernels skip the upper half and read no mask; and they
take grouped keys and values as they are.

- Where nothing but sizes goes in, the mask is a constant, and computed here to see whether it is the lower triangle.
- Where it depends on inputs, it is computed here as if nothing were padded and there were one document. If it is the
  lower triangle then, the graph looks at the mask that it has, once for all layers, and every layer goes one way or
  the other: `graphfuse::causal_attention`.

Left alone: masks that are something else even so (sliding windows, biases that are learned), and dropout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from graphfuse.evaluate import CannotEvaluate, evaluate
from graphfuse.kernels.causal_attention import is_lower_triangle, paths
from graphfuse.match import INDEXING, Match, Pattern, Refusal, Sampler, argument, number, short
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

NAME = "causal_attention"
COVERS = {NAME: 1}
FORMULA = "softmax(scale · q · kᵀ + mask) · v, where mask is 0 up to the diagonal and -∞ above"
HALF = (torch.float16, torch.bfloat16)
LARGEST = 1 << 31  # elements of a mask that are computed to look at it
MOST_GUESSES = 16  # combinations of what the inputs of a mask may be


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every attention of the shadow that has a mask."""
    seen: dict[Value, _Mask | _Unfit] = {}
    for value in shadow.values:
        if value.op is not aten.scaled_dot_product_attention.default or len(value.args) < 3:
            continue
        mask = argument(value, 3, "attn_mask")
        if not isinstance(mask, Value):
            continue
        if mask not in seen:
            seen[mask] = _look(mask, shadow)
        found = seen[mask]
        unfit = found if isinstance(found, _Unfit) else _unfit(value, mask)
        if unfit is not None:
            yield Refusal(NAME, value, unfit.reason, COVERS, unfit.hint)
        elif isinstance(found, _Mask):
            yield _match(value, mask, found)


@dataclass(frozen=True)
class _Mask:
    """A mask that is the lower triangle: always, or where what it depends on hides nothing."""

    depends_on: tuple[str, ...]


@dataclass(frozen=True)
class _Unfit:
    """Why a mask is not the lower triangle, and what would help."""

    reason: str
    hint: str = ""


def _unfit(value: Value, mask: Value) -> _Unfit | None:
    """Why this attention cannot use a causal mask, or `None`."""
    dropout = number(argument(value, 4, "dropout_p", 0.0))
    if dropout != 0.0:
        return _Unfit(f"dropout_p: expected 0, got {dropout}", "train without dropout in attention")
    if argument(value, 5, "is_causal", False):
        return _Unfit("is_causal: expected False beside a mask, got True", "give a mask or is_causal=True, not both")
    queries, keys = value.args[0].shape[-2], value.args[1].shape[-2]
    if mask.shape[-2:] != (queries, keys):
        return _Unfit(f"mask: expected a row for each of {queries} queries, got shape {mask.shape}")
    return None


def _look(mask: Value, shadow: Shadow) -> _Mask | _Unfit:
    """What is known of the mask, or why it is not the lower triangle."""
    if mask.tensor.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        reason = f"mask: expected as many queries as keys, got shape {mask.shape}"
        return _Unfit(reason, "if keys of earlier calls are among them: use_cache=False, in training")
    if mask.tensor.requires_grad:
        return _Unfit("mask: expected one that needs no gradient, got one that requires it", "detach() the mask")
    region = shadow.cone([mask], [])
    leaves = [value for value in region if value.op is LEAF]
    is_static = all(isinstance(size, int) for value in region for size in value.tensor.shape)
    if math.prod(mask.shape) > LARGEST:
        reason = f"mask: expected at most {LARGEST} elements, got {math.prod(mask.shape)}"
        return _Unfit(reason, "make the mask once for all sequences and heads, or give is_causal=True instead")
    device = mask.tensor.device if mask.tensor.device.type == "cuda" else torch.device("cpu")
    names = tuple(leaf.node.name for leaf in leaves)
    guesses = [list(_harmless(leaf, device)) for leaf in leaves]
    if math.prod(len(guess) for guess in guesses) > MOST_GUESSES or not all(guesses):
        first = next((name for name, guess in zip(names, guesses, strict=True) if not guess), ", ".join(names))
        reason = f"mask: expected to depend on sizes, padding and positions only, got one that depends on {first}"
        return _Unfit(reason, "make the mask from arange, positions and attention_mask, or give is_causal=True instead")
    try:
        with _disable_current_modes(), torch.no_grad():
            for guess in itertools.product(*guesses):
                known = dict(zip(leaves, guess, strict=True))
                content = evaluate(region, known, exact=False, device=device, sizes={})[mask]
                if is_lower_triangle(content):
                    return _Mask(names or (() if is_static else ("sizes",)))
    except CannotEvaluate as error:
        return _Unfit(f"mask: {error}")
    other = "one even where nothing is padded" if leaves else "constant"
    reason = f"mask: expected the lower triangle, got another {other}"
    return _Unfit(reason, "a sliding window as long as the sequence is causal; what else differs from that is not")


def _harmless(leaf: Value, device: torch.device) -> Iterator[Tensor]:
    """Values of an input under which a causal mask is nothing but causal: no padding, one document, the mask itself."""
    if leaf.tensor.requires_grad:
        return
    shape, dtype = leaf.shape, leaf.dtype
    if len(shape) >= 2 and shape[-1] == shape[-2]:
        yield _triangle(shape, dtype, device, torch.Generator())
    if not dtype.is_floating_point or len(shape) == 2:
        yield torch.ones(shape, dtype=dtype, device=device)
    if not dtype.is_floating_point and dtype != torch.bool and shape:
        yield torch.arange(shape[-1], device=device).to(dtype).expand(shape)


def _match(value: Value, mask: Value, known: _Mask) -> Match:
    query, key, value_states = value.args[:3]
    grouped = _grouped(key), _grouped(value_states)
    takes_groups = bool(known.depends_on) or _takes_groups(query)
    is_grouped = False
    if takes_groups and grouped[0] is not None and grouped[1] is not None:
        is_grouped = grouped[0].shape[1] == grouped[1].shape[1]
        key, value_states = grouped if is_grouped else (key, value_states)
    scale = number(argument(value, 6, "scale", value.kwargs.get("scale")))
    heads = "grouped, " if is_grouped else ""
    size = query.shape[-1] ** -0.5 if scale is None else scale
    # Scores of everyday size: under a saturated softmax most gradients are next to 0, and errors of them say nothing.
    states: dict[int, Sampler] = {0: partial(_states, scale=query.shape[-1] ** -0.5 / size), 1: _states, 2: _states}
    if known.depends_on:
        return Match(
            pattern=NAME,
            outputs=(value,),
            inputs=(query, key, value_states, mask),
            replacement=looked_at,
            params={"scale": size},
            variant=f"mask looked at on every call, {heads}{short(query.dtype)}",
            covers=COVERS,
            samplers={**states, 3: (_triangle, _holes)},
            above_views=False,
            waits=True,
            formula=FORMULA,
            frees="",
        )
    return Match(
        pattern=NAME,
        outputs=(value,),
        inputs=(query, key, value_states, mask),
        replacement=dropped,
        params={"scale": scale, "enable_gqa": is_grouped or bool(value.kwargs.get("enable_gqa", False))},
        variant=f"mask of {mask.shape[-1]} positions dropped, {heads}{short(query.dtype)}",
        covers=COVERS,
        samplers={**states, 3: _triangle},
        above_views=False,
        formula=FORMULA,
        frees="",
    )


def _takes_groups(query: Value) -> bool:
    """Whether the fast kernels for this dtype take fewer heads of keys than of queries."""
    return query.tensor.device.type != "cuda" or (query.dtype in HALF and query.shape[-1] <= 256)


def _grouped(states: Value) -> Value | None:
    """The keys or values before every head was repeated for its group of queries, if that is what was done.

    Not before a cast: the gradients of a group are then summed in the dtype that it narrows from.
    """
    batch, heads, length, width = states.shape
    value = states
    while value.op in INDEXING and isinstance(value.args[0], Value):
        value = value.args[0]
        fewer = value.tensor.dim() == 4 and value.shape[1] < heads and heads % value.shape[1] == 0
        if fewer and (value.shape[0], *value.shape[2:]) == (batch, length, width):
            return value
    return None


def _states(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator, *, scale: float = 1.0
) -> Tensor:
    return (scale * torch.randn(shape, generator=generator)).to(device=device, dtype=dtype)


def _triangle(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    return _as_mask(torch.ones(shape, dtype=torch.bool, device=device).tril(), dtype)


def _holes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """A mask like no other, under which every position sees itself."""
    allowed = torch.randint(2, shape, generator=generator).to(device=device, dtype=torch.bool)
    return _as_mask(allowed | torch.eye(*shape[-2:], dtype=torch.bool, device=device), dtype)


def _as_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        return allowed.to(dtype)
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -1e9).to(dtype)


def dropped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Stands in the place of attention under a mask that is always causal."""
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa
    )


def looked_at(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """Stands in the place of attention under a mask that is causal where nothing is padded."""
    is_causal = torch.ops.graphfuse.is_lower_triangle(mask)
    out: Tensor = torch.ops.graphfuse.causal_attention(query, key, value, mask, is_causal, scale)[0]
    return out


PATTERN = Pattern(NAME, find, "told that it is causal, attention skips the upper half and reads no mask", paths)
