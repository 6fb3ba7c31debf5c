"""Attention under a mask that is the plain causal one.

    scaled_dot_product_attention(q, repeat(k), repeat(v), mask)   ->   scaled_dot_product_attention(q, k, v, is_causal)

Anchor: `scaled_dot_product_attention` with a mask. Libraries build the mask in the graph, out of sizes, positions and
document numbers; where nothing but sizes goes in, it is a constant, and computed here to see whether it is the lower
triangle. Told so, attention kernels skip the upper half and read no mask; and they take grouped keys and values as
they are.

Left alone: masks that depend on an input (padding, packed documents), on dynamic sizes; dropout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from graphfuse.evaluate import CannotEvaluate, evaluate
from graphfuse.match import INDEXING, Match, Pattern, Refusal, argument, number, short
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

NAME = "causal_attention"
COVERS = {NAME: 1}
HALF = (torch.float16, torch.bfloat16)
LARGEST = 1 << 31  # elements of a mask that are computed to look at it
MASKED = -1e4  # an additive mask excludes what it pushes below this, after which exp() is 0 in any dtype


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every attention of the shadow that has a mask."""
    obstacles: dict[Value, str | None] = {}
    for value in shadow.values:
        if value.op is not aten.scaled_dot_product_attention.default or len(value.args) < 3:
            continue
        mask = argument(value, 3, "attn_mask")
        if not isinstance(mask, Value):
            continue
        if mask not in obstacles:
            obstacles[mask] = _obstacle(mask, shadow)
        reason = obstacles[mask] or _unfit(value, mask)
        yield Refusal(NAME, value, reason, COVERS) if reason else _match(value, mask)


def _unfit(value: Value, mask: Value) -> str | None:
    """Why this attention cannot use a causal mask, or `None`."""
    dropout = number(argument(value, 4, "dropout_p", 0.0))
    if dropout != 0.0:
        return f"dropout_p: expected 0, got {dropout}"
    if argument(value, 5, "is_causal", False):
        return "is_causal: expected False beside a mask, got True"
    queries, keys = value.args[0].shape[-2], value.args[1].shape[-2]
    if mask.shape[-2:] != (queries, keys):
        return f"mask: expected a row for each of {queries} queries, got shape {mask.shape}"
    return None


def _obstacle(mask: Value, shadow: Shadow) -> str | None:
    """Why the mask is not the lower triangle, or `None` if it is."""
    if any(not isinstance(size, int) for size in mask.tensor.shape):
        return "mask: expected static sizes, got dynamic ones"
    if mask.tensor.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return f"mask: expected as many queries as keys, got shape {mask.shape}"
    region = shadow.cone([mask], [])
    leaf = next((value for value in region if value.op is LEAF), None)
    if leaf is not None:
        return f"mask: expected to depend on sizes only, got one that depends on {leaf.node.name}"
    if mask.tensor.numel() > LARGEST:
        return f"mask: expected at most {LARGEST} elements, got {mask.tensor.numel()}"
    device = mask.tensor.device if mask.tensor.device.type == "cuda" else torch.device("cpu")
    try:
        with _disable_current_modes(), torch.no_grad():
            content = evaluate(region, {}, exact=False, device=device, sizes={})[mask]
            size = mask.shape[-1]
            triangle = torch.ones(size, size, dtype=torch.bool, device=content.device).tril()
            if content.dtype == torch.bool:
                causal = bool((content == triangle).all())
            else:
                causal = bool(torch.where(triangle, content == 0, content < MASKED).all())
    except CannotEvaluate as error:
        return f"mask: {error}"
    return None if causal else "mask: expected the lower triangle, got another constant"


def _match(value: Value, mask: Value) -> Match:
    query, key, value_states = value.args[:3]
    grouped = _grouped(key), _grouped(value_states)
    is_grouped = grouped[0] is not None and grouped[1] is not None and _takes_groups(query)
    if grouped[0] is not None and grouped[1] is not None and is_grouped and grouped[0].shape[1] == grouped[1].shape[1]:
        key, value_states = grouped[0], grouped[1]
    else:
        is_grouped = False
    scale = number(argument(value, 6, "scale", value.kwargs.get("scale")))
    return Match(
        pattern=NAME,
        outputs=(value,),
        inputs=(query, key, value_states, mask),
        replacement=replacement,
        params={"scale": scale, "enable_gqa": is_grouped or bool(value.kwargs.get("enable_gqa", False))},
        variant=f"mask of {mask.shape[-1]} positions dropped, {'grouped, ' if is_grouped else ''}{short(query.dtype)}",
        covers=COVERS,
        samplers={3: _triangle},
        above_views=False,
    )


def _takes_groups(query: Value) -> bool:
    """Whether the fast kernels for this dtype take fewer heads of keys than of queries."""
    return query.tensor.device.type != "cuda" or (query.dtype in HALF and query.shape[-1] <= 256)


def _grouped(states: Value) -> Value | None:
    """The keys or values before every head was repeated for its group of queries, if that is what was done."""
    batch, heads, length, width = states.shape
    value = states
    while value.op in INDEXING and isinstance(value.args[0], Value):
        value = value.args[0]
        fewer = value.tensor.dim() == 4 and value.shape[1] < heads and heads % value.shape[1] == 0
        if fewer and (value.shape[0], *value.shape[2:]) == (batch, length, width):
            return value
    return None


def _triangle(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    allowed = torch.ones(shape, dtype=torch.bool, device=device).tril()
    return allowed if dtype == torch.bool else torch.zeros(shape, device=device).masked_fill(~allowed, -1e9).to(dtype)


def replacement(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float | None, enable_gqa: bool
) -> Tensor:
    """What stands in the place of the region."""
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa
    )


PATTERN = Pattern(NAME, find)
