"""Attention under a mask that is the plain causal one, or may be.

    scaled_dot_product_attention(q, repeat(k), repeat(v), mask)   ->   scaled_dot_product_attention(q, k, v, is_causal)

Anchor: `scaled_dot_product_attention` with a mask. Libraries build the mask in the graph, out of sizes, positions,
padding and document numbers. Told that it is causal, attention kernels skip the upper half and read no mask; and they
take grouped keys and values as they are.

- Where nothing but sizes goes in, the mask is a constant, and computed here to see whether it is the lower triangle.
- Where it depends on inputs, it is computed here as if nothing were padded and there were one document. If it is the
  lower triangle then, the graph looks at the mask that it has, once for all layers, and every layer goes one way or
  the other: `graphfuse::causal_attention`.

A sliding window is such a mask, too, where flash attention takes the states: in fp16 and bf16, on NVIDIA's GPUs. It
skips what is out of the window as well.

Left alone: masks that are something else even so (biases that are learned), and dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from graphfuse.kernels._sdpa_kernel import MOST_FEATURES, can_slide
from graphfuse.kernels.attention import attention
from graphfuse.kernels.causal_attention import absorbing, paths
from graphfuse.match import Match, Pattern, Refusal, argument, number, short
from graphfuse.patterns._attention_kernels import choose_kernel, choose_kernels, trains
from graphfuse.patterns._attention_mask import Known, Unfit, as_mask, look, triangle
from graphfuse.patterns._attention_states import before_repeat, samplers
from graphfuse.shadow import Shadow, Value

aten = torch.ops.aten

NAME = "causal_attention"
COVERS = {NAME: 1}
FORMULA = "softmax(scale · q · kᵀ + mask) · v, where mask is 0 up to the diagonal and -∞ above"
HALF = (torch.float16, torch.bfloat16)


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every attention of the shadow that has a mask."""
    seen: dict[tuple[Value, bool], Known | Unfit] = {}
    for value in shadow.values:
        if value.op is not aten.scaled_dot_product_attention.default or len(value.args) < 3:
            continue
        mask = argument(value, 3, "attn_mask")
        if not isinstance(mask, Value):
            continue
        may_slide = can_slide(*(states.tensor for states in value.args[:3]))
        if (mask, may_slide) not in seen:
            seen[mask, may_slide] = _look(mask, shadow, may_slide=may_slide)
        found = seen[mask, may_slide]
        unfit = found if isinstance(found, Unfit) else _unfit(value, mask)
        if unfit is not None:
            yield Refusal(NAME, value, unfit.reason, COVERS, unfit.hint)
        elif isinstance(found, Known) and found.depends_on and value.args[0].tensor.dim() != 4:
            reason = f"query: expected (B, heads, S, features), got shape {value.args[0].shape}"
            yield Refusal(NAME, value, reason, COVERS, "unsqueeze() queries, keys and values to four dimensions")
        elif isinstance(found, Known):
            yield _match(value, mask, found)


def _unfit(value: Value, mask: Value) -> Unfit | None:
    """Why this attention cannot use a causal mask, or `None`."""
    dropout = number(argument(value, 4, "dropout_p", 0.0))
    if dropout != 0.0:
        return Unfit(f"dropout_p: expected 0, got {dropout}", "train without dropout in attention")
    if argument(value, 5, "is_causal", False):
        return Unfit("is_causal: expected False beside a mask, got True", "give a mask or is_causal=True, not both")
    queries, keys = value.args[0].shape[-2], value.args[1].shape[-2]
    if mask.shape[-2:] != (queries, keys):
        return Unfit(f"mask: expected a row for each of {queries} queries, got shape {mask.shape}")
    return None


def _look(mask: Value, shadow: Shadow, *, may_slide: bool) -> Known | Unfit:
    """What is known of the mask, or why it is not the lower triangle."""
    if mask.tensor.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        reason = f"mask: expected as many queries as keys, got shape {mask.shape}"
        return Unfit(reason, "if keys of earlier calls are among them: use_cache=False, in training")
    return look([mask], lambda contents: contents[0], shadow, may_slide=may_slide)


def _match(value: Value, mask: Value, known: Known) -> Match:
    query, key, value_states = value.args[:3]
    grouped = before_repeat(key), before_repeat(value_states)
    takes_groups = bool(known.depends_on) or _takes_groups(query)
    is_grouped = False
    if takes_groups and grouped[0] is not None and grouped[1] is not None:
        is_grouped = grouped[0].shape[1] == grouped[1].shape[1]
        key, value_states = grouped if is_grouped else (key, value_states)
    scale = number(argument(value, 6, "scale", value.kwargs.get("scale")))
    heads = "grouped, " if is_grouped else ""
    size = query.shape[-1] ** -0.5 if scale is None else scale
    states = samplers(query.shape[-1], size)
    has_backward = trains(value, query, key, value_states)

    def tensors() -> tuple[Tensor, Tensor, Tensor]:
        return query.tensor, key.tensor, value_states.tensor

    window = f", {known.window} seen" if known.window else ""
    lengths = frozenset(mask.shape[-1:])  # a mask of numbers may be as large as all else together
    if known.depends_on:
        return Match(
            pattern=NAME,
            outputs=(value,),
            inputs=(query, key, value_states, mask),
            replacement=looked_at,
            params={
                "scale": size,
                "causal_kernel": "",
                "masked_kernel": "",
                # Whatever the dtype of the queries, PyTorch's kernels add masks in no less than float32.
                "absorbing_from": absorbing(torch.promote_types(query.dtype, torch.float32)),
                "window": known.window,
            },
            variant=f"mask looked at on every call{window}, {heads}{short(query.dtype)}",
            covers=COVERS,
            samplers={**states, 3: (partial(_triangle, window=known.window), _holes)},
            scalable=lengths,
            above_views=False,
            waits=True,
            choose=None if known.window else partial(choose_kernels, tensors, lambda: mask.tensor, trains=has_backward),
            formula=FORMULA,
            frees="",
        )
    enable_gqa = is_grouped or bool(value.kwargs.get("enable_gqa", False))
    return Match(
        pattern=NAME,
        outputs=(value,),
        inputs=(query, key, value_states, mask),
        replacement=dropped,
        params={
            "scale": size if known.window else scale,
            "enable_gqa": enable_gqa,
            "kernel": "",
            "window": known.window,
        },
        variant=f"mask of {mask.shape[-1]} positions dropped{window}, {heads}{short(query.dtype)}",
        covers=COVERS,
        samplers={**states, 3: partial(_triangle, window=known.window)},
        scalable=lengths,
        above_views=False,
        choose=None
        if known.window  # which only one kernel knows
        else partial(choose_kernel, tensors, is_causal=True, trains=has_backward, scale=size),
        formula=FORMULA,
        frees="",
    )


def _takes_groups(query: Value) -> bool:
    """Whether the fast kernels for this dtype take fewer heads of keys than of queries."""
    return query.tensor.device.type != "cuda" or (query.dtype in HALF and query.shape[-1] <= MOST_FEATURES)


def _triangle(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: torch.Generator, *, window: int
) -> Tensor:
    return triangle(shape, dtype, device, window)


def _holes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """A mask like no other, under which every position sees itself."""
    allowed = torch.randint(2, shape, generator=generator).to(device=device, dtype=torch.bool)
    return as_mask(allowed | torch.eye(*shape[-2:], dtype=torch.bool, device=device), dtype)


def dropped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None,
    enable_gqa: bool,
    kernel: str,
    window: int,
) -> Tensor:
    """Stands in the place of attention under a mask that is always causal."""
    return attention(
        query, key, value, scale=scale, is_causal=True, is_grouped=enable_gqa, kernel=kernel, window=window
    )


def looked_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    causal_kernel: str,
    masked_kernel: str,
    absorbing_from: float,
    window: int,
) -> Tensor:
    """Stands in the place of attention under a mask that is causal where nothing is padded."""
    is_causal = torch.ops.graphfuse.is_lower_triangle(mask, window)
    out: Tensor = torch.ops.graphfuse.causal_attention(
        query, key, value, mask, is_causal, scale, causal_kernel, masked_kernel, True, absorbing_from, window
    )[0]
    return out


PATTERN = Pattern(NAME, find, "told that it is causal, attention skips the upper half and reads no mask", paths)
