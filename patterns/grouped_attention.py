"""Attention of one query over keys and values whose heads are shared.

    scaled_dot_product_attention(q, repeat(k), repeat(v), mask)   ->   scaled_dot_product_attention(rows(q), k, v, mask)

Anchor: `scaled_dot_product_attention` with one query for each head, as when text is generated token by token. Kernels
that read a mask take as many heads of keys as of queries, so that libraries repeat the keys and values of a group for
each of its queries: all that a cache holds, in every layer, for every token. The queries of a group may as well be rows
of one head, to which the mask applies alike.

On a GPU and without a gradient, there is a kernel that shares out the keys of a head to as many programs as the GPU
runs at once, and reads none before the first that the mask shows or behind the last; for heads that share nothing, too.
It, queries as rows and the code as it is are timed, and the fastest is taken.

Left alone: several queries for each head, masks that differ between heads, dropout.

Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245 (grouped heads); Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html (keys shared out)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from graphfuse.kernels.grouped_attention import grouped_attention
from graphfuse.match import Match, Pattern, argument, number, short
from graphfuse.patterns._attention_kernels import choose_way, may_split, should_split, trains
from graphfuse.patterns._attention_states import before_repeat, samplers
from graphfuse.shadow import Shadow, Value

aten = torch.ops.aten

NAME = "grouped_attention"
COVERS = {NAME: 1}
FORMULA = "softmax(scale · q · kᵀ + mask) · v"


def find(shadow: Shadow) -> Iterator[Match]:
    """Every attention of the shadow whose queries can be rows."""
    for value in shadow.values:
        if value.op is aten.scaled_dot_product_attention.default:
            found = _match(value)
            if found is not None:
                yield found


def _match(value: Value) -> Match | None:
    query = value.args[0]
    mask = argument(value, 3, "attn_mask")
    is_plain = number(argument(value, 4, "dropout_p", 0.0)) == 0.0 and not argument(value, 5, "is_causal", False)
    if query.tensor.dim() != 4 or query.shape[2] != 1 or not is_plain:
        return None
    masks = [mask] if isinstance(mask, Value) else []
    key, states = (_grouped(each, query.shape[1]) for each in value.args[1:3])
    if key is None or states is None or key.shape[1] != states.shape[1] or not _is_for_all_heads(mask):
        return None
    is_shared = key.shape[1] < query.shape[1]
    splits = may_split(query, key, states, *masks) and not trains(value, query, key, states, *masks)
    if not is_shared and not (splits and should_split(query, key)):
        return None
    features = query.shape[-1]
    scale = number(argument(value, 6, "scale", value.kwargs.get("scale")))
    size = features**-0.5 if scale is None else scale
    drawn = samplers(features, size)
    knows_groups = is_shared and key is value.args[1]
    return Match(
        pattern=NAME,
        outputs=(value,),
        inputs=(query, key, states, *masks),
        replacement=grouped_attention,
        params={"scale": scale, "kernel": ""},
        variant=f"{query.shape[1]} queries of {key.shape[1]} heads, {short(query.dtype)}",
        covers=COVERS,
        samplers=drawn if mask is None else {**drawn, 3: _mask},
        scalable=frozenset({key.shape[2]}),
        above_views=False,
        choose=partial(choose_way, NAME, value, (query, key, states), mask, knows_groups=knows_groups, scale=size)
        if splits
        else None,
        needs_choice=not is_shared,
        formula=FORMULA,
        frees="",
    )


def _grouped(states: Value, heads: int) -> Value | None:
    """Keys or values with one head for each group."""
    if states.tensor.dim() != 4:
        return None
    before = before_repeat(states) if states.shape[1] == heads else None
    return states if before is None else before


def _is_for_all_heads(mask: Value | None) -> bool:
    return mask is None or mask.tensor.dim() < 3 or mask.shape[-3] == 1


def _mask(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """A mask with holes, but for the first key, which is seen."""
    seen = torch.randint(2, shape, generator=generator).to(device=device, dtype=torch.bool)
    seen[..., 0] = True
    if dtype == torch.bool:
        return seen
    return torch.zeros(shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)


PATTERN = Pattern(
    NAME, find, "keys and values of a group are read where they are, not repeated for each of its queries"
)
