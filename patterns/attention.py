"""Attention written by hand: two matrix products with a softmax between them.

    softmax(scale · q @ kᵀ, masked) @ v   ->   scaled_dot_product_attention(q, k, v, is_causal)

Anchor: a batch of matrix products, one operand of which is a softmax, whose operand is another such product, scaled and
masked. Scales may lie on queries, keys or scores; masks are added, or fill, or choose; heads may be anywhere, grouped
(repeated, expanded, or broadcast by an einsum) and flattened with the batch. What lies where is followed axis by axis.

- Where nothing is masked, nothing is.
- Where the mask is a constant, it is computed here. If it is the lower triangle, the kernel is told so.
- Where it depends on inputs, it is computed here as if nothing were padded. If it is the lower triangle then, the graph
  looks at the mask that it has on every call: `graphfuse::causal_attention`.

Left alone: weights that something else reads, soft-capped scores, sinks, biases, sliding windows, dropout, keys of
earlier calls, and products in float64 or of more than 256 features, for which there is no fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from graphfuse.kernels.attention import attention, mask_of
from graphfuse.kernels.causal_attention import MASKED, absorbing, paths
from graphfuse.match import Choice, Match, Pattern, Refusal, short
from graphfuse.patterns._attention_heads import Plan, arranged
from graphfuse.patterns._attention_kernels import choose_kernel, choose_kernels, trains
from graphfuse.patterns._attention_layout import Layout, Operations, layouts
from graphfuse.patterns._attention_mask import Known, Unfit, look
from graphfuse.patterns._attention_scores import Step, Weights, foreign, is_written, scores_of, weights_of
from graphfuse.patterns._attention_sources import Source
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

NAME = "attention"
COVERS = {NAME: 1}
FORMULA = "softmax(scale · q · kᵀ) · v"
MASKED_FORMULA = "softmax(scale · q · kᵀ + mask) · v, where mask is 0 up to the diagonal and -∞ above"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF = (torch.float16, torch.bfloat16)
WIDEST = 256  # features of a head
SPREAD = 0.25  # of the scores of a proof
HIDDEN = -3e4  # what hides a score in a mask that is looked at while compiling, in any dtype

Steps = tuple[tuple[str, float], ...]


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every softmax between two products."""
    done: set[Value] = set()
    looked: dict[Any, Known | Unfit] = {}
    for value in shadow.values:
        if value.op is not aten.bmm.default:
            continue
        for side in (0, 1):
            weights = weights_of(value.args[side])
            if weights is None or weights.softmax in done:
                continue
            scores = scores_of(weights.softmax.args[0])
            if scores is not None:
                found: Match | Unfit | None
                masks = tuple(scores.masks())
                found = _Site(Operations(scores, masks, weights.softmax, value, side), weights, shadow).match(looked)
            else:
                found = _unfit_scores(weights.softmax, shadow)
            if found is not None:
                done.add(weights.softmax)
                yield Refusal(NAME, value, found.reason, COVERS, found.hint) if isinstance(found, Unfit) else found


def _unfit_scores(softmax: Value, shadow: Shadow) -> Unfit | None:
    """What keeps these from being scores, if they are made of a product at all."""
    name = foreign(softmax.args[0], shadow)
    if name is None:
        return None
    return Unfit(f"scores: expected scales and masks of a product, got {name}")


@dataclass(frozen=True)
class _Site:
    """One softmax, and the products around it."""

    found: Operations
    weights: Weights
    shadow: Shadow

    def match(self, looked: dict[Any, Known | Unfit]) -> Match | Unfit:
        unfit = self._unfit() or self._used_elsewhere()
        layout = unfit or self._layout()
        if isinstance(layout, Unfit):
            return layout
        unfit = self._unfit_layout(layout)
        known = unfit or self._look(layout, looked)
        return known if isinstance(known, Unfit) else self._build(layout, known)

    def _unfit(self) -> Unfit | None:
        """Why this is no attention that the kernels compute, or `None`."""
        masks = self.found.masks
        if self.weights.dropout:
            reason = f"dropout_p: expected 0, got {self.weights.dropout:.6g}"
            return Unfit(reason, "train without dropout in attention")
        if self.weights.odd:
            return Unfit(f"weights: expected a softmax as it is, got {self.weights.odd} of it")
        for step in masks:
            if step.kind in ("hide", "keep") and not step.number <= MASKED:
                return Unfit(f"mask: expected to hide with a number of at most {MASKED:g}, got {step.number:g}")
        times = [step for step in masks if step.kind == "times"]
        if times and (len(times) == len(masks) or not all(self._is_constant(step) for step in masks)):
            shape = times[0].mask.shape if times[0].mask is not None else ()
            return Unfit(f"scores: expected to be multiplied by a number, got a tensor of shape {shape}")
        rows = self.found.scores.product.shape[1:]
        if min(rows) == 1 and self.found.softmax.shape[-1] > 1:
            return self._lengths(1, max(rows))
        return None

    def _is_constant(self, step: Step) -> bool:
        region = [] if step.mask is None else self.shadow.cone([step.mask], [])
        sizes = (size for value in region for size in value.tensor.shape)
        return all(value.op is not LEAF for value in region) and all(isinstance(size, int) for size in sizes)

    def _lengths(self, queries: int, keys: int) -> Unfit:
        reason = f"scores: expected as many queries as keys, got {queries} and {keys}"
        return Unfit(reason, "if keys of earlier calls are among them: use_cache=False, in training")

    def _used_elsewhere(self) -> Unfit | None:
        """Why scores or weights have to exist, or `None`: what is fused never does."""
        found = self.found
        ends = [*found.scores.product.args, *(step.mask for step in found.masks), found.product.args[1 - found.side]]
        inside = self.shadow.cone([found.product], [end for end in ends if isinstance(end, Value)])
        below = {found.scores.product}
        for value in inside:
            if not below.isdisjoint(value.operands()):
                below.add(value)
        for value in sorted(below - {found.product}, key=lambda value: value.index):
            elsewhere = next((user for user in value.users if user not in below), None)
            if elsewhere is not None or value in self.shadow.escaping:
                got = "an output of the graph" if elsewhere is None else f"{elsewhere.op} in {elsewhere.node.name}"
                reason = f"weights: expected no use besides the product with the values, got {got}"
                return Unfit(reason, "output_attentions=False; or compute the weights in a call of their own")
        return None

    def _layout(self) -> Layout | Unfit:
        trial: tuple[Source, ...] | None = None
        for found in layouts(self.found, self.shadow):
            if isinstance(found, Layout):
                return found
            trial = found
        if trial is None and self.found.product.node is self.found.scores.product.node:
            reason = f"input: expected the result of a graph node, got a value inside {self.found.product.node.name}"
            return Unfit(reason, "where there is a choice: need_weights=False")
        if trial is None:
            operands = *self.found.scores.product.args[-2:], self.found.product.args[1 - self.found.side]
            dtypes = ", ".join(short(operand.dtype) for operand in operands)
            return Unfit(f"query, key, value: expected one dtype, that of the result, got {dtypes}")
        shapes = ", ".join(str(source.value.shape) for source in trial)
        reason = f"query: expected batch, heads, positions and features in dimensions of their own, got {shapes}"
        return Unfit(reason, "keep them apart: (batch, heads, positions, features)")

    def _unfit_layout(self, layout: Layout) -> Unfit | None:
        query = layout.sources[0].value
        features, of_values = layout.features
        queries, keys = layout.lengths
        if query.dtype not in DTYPES:
            return Unfit(f"query: expected float16, bfloat16 or float32, got {short(query.dtype)}")
        if max(features, of_values) > WIDEST:
            return Unfit(f"query: expected at most {WIDEST} features a head, got {max(features, of_values)}")
        if features != of_values and query.tensor.device.type != "cuda":
            return Unfit(f"value: expected {features} features a head, as queries have, got {of_values}")
        return self._lengths(queries, keys) if self.found.masks and queries != keys else None

    def _look(self, layout: Layout, looked: dict[Any, Known | Unfit]) -> Known | Unfit:
        """What is known of the mask; layers that share theirs share the answer."""
        if not layout.masks:
            return Known((), (), is_causal=False)
        sizes = _Sizes(layout.sources[0].value.shape)
        kinds = tuple((step.kind, step.number) for step in self.found.masks)
        plans = layout.mask_plans

        def combine(contents: Sequence[Tensor]) -> Tensor:
            parts = [arranged(content, plan, sizes) for content, plan in zip(contents, plans, strict=True)]
            return _whole(parts, kinds)

        key = (layout.masks, kinds, plans, sizes.shape)
        if key not in looked:
            looked[key] = look(layout.masks, combine, self.shadow, may_hide_nothing=True)
        return looked[key]

    def _build(self, layout: Layout, known: Known) -> Match:
        query, key, value = layout.sources
        heads = layout.heads
        scale = self.found.scores.scale * query.scale * key.scale
        is_grouped = heads.groups != heads.heads
        features = layout.features
        kind = ("grouped, " if is_grouped else "") + short(query.value.dtype)
        params: dict[str, Any] = {"plans": layout.plans, "output_plan": layout.output_plan, "scale": scale}
        # Scores that differ little: of a saturated softmax most gradients are next to 0, and their errors say nothing.
        size = SPREAD * features[0] ** -0.5 / scale if scale else 1.0
        states: dict[int, Any] = {0: partial(_states, scale=size), 1: _states, 2: _states}
        steps = tuple((step.kind, step.number) for step in self.found.masks)
        for position, (content, step) in enumerate(zip(known.contents, steps, strict=False), 3):
            corner = partial(_corner, content)
            states[position] = (corner, partial(_holes, content, step)) if known.depends_on else corner
        if known.depends_on:
            dtypes = {query.value.dtype, *(mask.dtype for mask in layout.masks if mask.dtype.is_floating_point)}
            lowest = max(torch.finfo(dtype).min for dtype in dtypes)
            params |= {"mask_plans": layout.mask_plans, "steps": steps, "lowest": lowest}
            added = [step.value.dtype for step in self.found.masks if step.kind == "add"]
            # What takes the place of a score leaves nothing of it, however near to 0 it has to be in a narrow dtype.
            is_all_added = len(added) == len(self.found.masks)
            widest = reduce(torch.promote_types, added) if is_all_added else query.value.dtype
            params |= {"absorbing_from": absorbing(widest), "causal_kernel": "", "masked_kernel": ""}
            variant = f"mask looked at on every call, {kind}"
        else:
            on_gpu = query.value.tensor.device.type == "cuda"
            takes_groups = not on_gpu or (query.value.dtype in HALF and features[0] == features[1])
            params |= {"is_causal": known.is_causal, "is_grouped": is_grouped, "takes_groups": takes_groups}
            params |= {"kernel": ""}
            variant = (
                f"mask of {layout.lengths[1]} positions dropped, {kind}" if known.is_causal else f"no mask, {kind}"
            )
        inputs = [query.value, key.value, value.value, *layout.masks]
        for written in self._written(layout.output, inputs):
            states[len(inputs)] = partial(_corner, written.args[0].tensor)
            inputs.append(written)
        ends = {source.value.shape[-1] for source in layout.sources}
        return Match(
            pattern=NAME,
            outputs=(layout.output,),
            inputs=tuple(inputs),
            replacement=looked_at if known.depends_on else fused,
            params=params,
            variant=variant,
            covers=COVERS,
            samplers=states,
            scalable=frozenset({layout.lengths[1], *(features if not ends <= set(features) else ())}),
            above_views=False,
            by_row=False,
            waits=bool(known.depends_on),
            choose=self._choose(layout, known),
            formula=MASKED_FORMULA if known.is_causal else FORMULA,
        )

    def _choose(self, layout: Layout, known: Known) -> Callable[[], Choice | None]:
        query = layout.sources[0].value.tensor
        has_backward = trains(layout.output, *(source.value for source in layout.sources))

        def states() -> tuple[Tensor, Tensor, Tensor]:
            read = zip(layout.sources, layout.plans, strict=True)
            found = [arranged(source.value.tensor, plan, query) for source, plan in read]
            return found[0], found[1], found[2]

        def mask() -> Tensor:
            masks = zip(layout.masks, layout.mask_plans, strict=True)
            parts = [arranged(one.tensor, plan, query) for one, plan in masks]
            steps = [(step.kind, step.number) for step in self.found.masks]
            with query.fake_mode if isinstance(query, FakeTensor) else nullcontext():
                return mask_of(parts, steps, HIDDEN)

        if known.depends_on:
            return partial(choose_kernels, states, mask, trains=has_backward)
        return partial(choose_kernel, states, is_causal=known.is_causal, trains=has_backward)

    def _written(self, output: Value, inputs: list[Value]) -> list[Value]:
        """Numbers that the region reads from tensors of the code."""
        region = self.shadow.cone([output], inputs)
        return [value for value in region if value.op is not LEAF and any(is_written(v) for v in value.operands())]


@dataclass(frozen=True)
class _Sizes:
    """What a plan asks of the query."""

    shape: tuple[int, ...]

    def size(self, dim: int) -> int:
        return self.shape[dim]


def _whole(parts: Sequence[Tensor], steps: Steps) -> Tensor:
    """The mask of all parts; where a factor leaves a score that is seen no number to go by, that is NaN."""
    kept = [(part, step) for part, step in zip(parts, steps, strict=True) if step[0] != "times"]
    mask = mask_of([part for part, _ in kept], [step for _, step in kept], HIDDEN)
    for part, (kind, _) in zip(parts, steps, strict=True):
        if kind == "times":
            seen = mask if mask.dtype == torch.bool else mask == 0
            bias = torch.where(seen, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
            mask = torch.where(seen & (part != 1), torch.nan, bias)
    return mask


def _states(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator, *, scale: float = 1.0
) -> Tensor:
    return (scale * torch.randn(shape, generator=generator)).to(device=device, dtype=dtype)


def _corner(
    content: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: torch.Generator
) -> Tensor:
    """As much of a mask as a proof needs: of the lower triangle, a lower triangle."""
    return content[tuple(slice(size) for size in shape)].to(device=device, dtype=dtype, copy=True)


def _holes(
    content: Tensor,
    step: tuple[str, float],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    """The same with holes, but for the first key, which every position sees."""
    mask = _corner(content, shape, dtype, device, generator)
    seen = torch.randint(2, shape, generator=generator).to(device=device, dtype=torch.bool)
    seen[..., 0] = True
    kind, number = step
    if kind == "add":
        return mask + torch.where(seen, 0.0, HIDDEN / number).to(dtype)
    return mask.logical_and(seen) if kind == "keep" else mask.logical_or(~seen)


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Tensor,
    plans: Sequence[Plan],
    output_plan: Plan,
    scale: float,
    is_causal: bool,
    is_grouped: bool,
    takes_groups: bool,
    kernel: str,
) -> Tensor:
    """Stands in the place of attention without a mask, or under one that is always causal."""
    states = [arranged(one, plan, query) for one, plan in zip((query, key, value), plans, strict=True)]
    out = attention(
        *states, scale=scale, is_causal=is_causal, is_grouped=is_grouped, takes_groups=takes_groups, kernel=kernel
    )
    found: Tensor = arranged(out, output_plan, query)
    return found


def looked_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *masks: Tensor,
    plans: Sequence[Plan],
    mask_plans: Sequence[Plan],
    output_plan: Plan,
    steps: Steps,
    lowest: float,
    absorbing_from: float,
    scale: float,
    causal_kernel: str,
    masked_kernel: str,
) -> Tensor:
    """Stands in the place of attention under a mask that is causal where nothing is padded."""
    states = [arranged(one, plan, query) for one, plan in zip((query, key, value), plans, strict=True)]
    parts = [arranged(one, plan, query) for one, plan in zip(masks, mask_plans, strict=False)]
    mask = mask_of(parts, steps, lowest)
    is_causal = torch.ops.graphfuse.is_lower_triangle(mask, 0)
    is_added = all(kind == "add" or number == -torch.inf for kind, number in steps)
    out, _ = torch.ops.graphfuse.causal_attention(
        *states, mask, is_causal, scale, causal_kernel, masked_kernel, is_added, absorbing_from, 0
    )
    found: Tensor = arranged(out, output_plan, query)
    return found


PATTERN = Pattern(NAME, find, "neither scores nor weights are kept for backward, nor computed where masked", paths)
