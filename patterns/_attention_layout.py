"""What lies where in an attention written by hand: every dimension followed from the sources to the result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graphfuse.match import IDENTITIES, is_cast, narrows, unreachable
from graphfuse.patterns._attention_heads import Heads, Plan, heads_of, plan_in, plan_mask, plan_out, settled, size_of
from graphfuse.patterns._attention_scores import Scores, Step
from graphfuse.patterns._attention_sources import Source, follow, outputs, sources
from graphfuse.patterns._axes import MOVES, Axes, Dims, Group
from graphfuse.shadow import Shadow, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """The sources of an attention, how they are brought into SDPA's order, and how the output comes of its result."""

    sources: tuple[Source, Source, Source]  # query, key, value
    plans: tuple[Plan, Plan, Plan]
    masks: tuple[Value, ...]
    mask_plans: tuple[Plan, ...]
    output: Value
    output_plan: Plan
    heads: Heads

    @property
    def features(self) -> tuple[int, int]:
        """Of a head: of queries and keys, and of values."""
        query, _, value = (
            source.value.shape[plan[1][3][0]] for source, plan in zip(self.sources, self.plans, strict=True)
        )
        return query, value

    @property
    def lengths(self) -> tuple[int, int]:
        """Positions of queries, and of keys."""
        return size_of(self.heads.positions), size_of(self.heads.keys)


@dataclass(frozen=True)
class Operations:
    """The two products of an attention and what lies between."""

    scores: Scores
    masks: tuple[Step, ...]
    softmax: Value
    product: Value  # of weights and values
    side: int  # of the weights in it


def layouts(found: Operations, shadow: Shadow) -> Iterator[Layout | tuple[Source, ...]]:
    """What lies where; before it, the sources for which that could not be told.

    Everything is read from tensors of the dtype of the result, and that may be rounded first.
    """
    chain = outputs(found.product, shadow)
    operands = [*found.scores.product.args[-2:], found.product.args[1 - found.side]]
    for dtype in dict.fromkeys(value.dtype for value in reversed(chain)):
        left, right = (sources(operand, dtype, shadow) for operand in operands[:2])
        values = sources(operands[2], dtype, shadow, through_scales=False)
        for trial in ((a, b, c) for c in values for b in right for a in left):
            read = tuple(source.below(trial) for source in trial)
            placed = _Placed(found, read, shadow).layout([(end, end.dtype == dtype) for end in chain])
            yield trial if placed is None else placed


def plain(mask: Value, shadow: Shadow) -> Value:
    """The mask before copies, repetition and casts that lose nothing: the same for all layers."""
    best = value = mask
    while True:
        is_whole = value.op is aten.slice.Tensor and value.shape == value.args[0].shape
        widens = is_cast(value) and not narrows(value) and value.args[0].dtype.is_floating_point
        if not (is_whole or widens or value.op is aten.expand.default or value.op in IDENTITIES):
            return best
        value = value.args[0]
        best = value if unreachable(value, shadow) is None else best


class _Placed:
    """The dimensions of everything, if the operands come from these sources."""

    def __init__(self, found: Operations, trial: Sequence[Source], shadow: Shadow) -> None:
        self.found, self.trial, self.shadow = found, trial, shadow
        self.axes = Axes()
        self.first = [self.axes.new(source.value) for source in trial]

    def layout(self, chain: Sequence[tuple[Value, bool]]) -> Layout | None:
        """SDPA's order for all of them, or `None` if it cannot be told; `chain` says what may be the output."""
        axes, found = self.axes, self.found
        left, right, values = (one.follow(axes, dims) for one, dims in zip(self.trial, self.first, strict=True))
        if left is None or right is None or values is None:
            return None
        product = axes.product(left, right)
        along = None if product is None else self._along(product)
        if along is None:
            return None
        keys = along[-1][found.softmax.args[1] % len(along[-1])]
        weights = follow(axes, along[-1], _between(found.product.args[found.side], found.softmax))
        if weights is None:
            return None
        result = axes.product(weights, values) if found.side == 0 else axes.product(values, weights)
        if result is None or axes.now(weights[2 - found.side]) != axes.now(keys):
            return None
        ends = self._ends(result, [value for value, _ in chain])
        features = axes.now(left[2]), axes.now(values[2 - found.side])
        masks = tuple(plain(step.mask, self.shadow) for step in found.masks if step.mask is not None)
        mask_dims = [self._mask_dims(step, mask, along) for step, mask in zip(found.masks, masks, strict=True)]
        if axes.now(right[2]) == axes.now(keys):
            order = (0, 1, 2)
        elif axes.now(left[1]) == axes.now(keys):
            order = (1, 0, 2)
        else:
            return None
        dims = [settled(axes, self.first[k]) for k in order]

        def varies(group: Group) -> bool:
            return any(group in one for one in mask_dims if one is not None)

        heads = heads_of(dims[0], dims[1], dims[2], features, axes.now(keys), varies)
        if heads is None or None in mask_dims:
            return None
        grouped = (heads.batch, heads.groups, (heads.keys,))
        plans = [plan_in(dims[0], [*heads.leading, features[:1]])]
        plans += [plan_in(one, [*grouped, (width,)]) for one, width in zip(dims[1:], features, strict=True)]
        mask_plans = [plan_mask(one or (), heads) for one in mask_dims]
        allowed = [end for end, is_allowed in chain if is_allowed and end in ends and end in self.shadow.node_of]
        planned = [(end, plan_out(ends[end], heads, features[1])) for end in allowed]
        last = next(((end, plan) for end, plan in reversed(planned) if plan is not None), None)
        known = [plan for plan in plans if plan is not None]
        known_masks = [plan for plan in mask_plans if plan is not None]
        if last is None or len(known) < 3 or len(known_masks) < len(masks):
            return None
        ordered = [self.trial[k] for k in order]
        return Layout(
            sources=(ordered[0], ordered[1], ordered[2]),
            plans=(known[0], known[1], known[2]),
            masks=masks,
            mask_plans=tuple(known_masks),
            output=last[0],
            output_plan=last[1],
            heads=heads,
        )

    def _along(self, product: Dims) -> list[Dims] | None:
        """The dimensions of the scores after every step of their path."""
        found = [product]
        first = self.found.scores.product
        for step in self.found.scores.path[1:]:
            dims: Dims | None = found[-1]
            if step.value is not first and (step.value.op in MOVES or is_cast(step.value)):
                dims = self.axes.through(step.value, found[-1])
            if dims is None or len(dims) != step.value.tensor.dim():
                return None
            found.append(dims)
        return found

    def _mask_dims(self, step: Step, mask: Value, along: Sequence[Dims]) -> Dims | None:
        """The dimensions of a mask: those of the scores that it meets, where it is not broadcast."""
        path = self.found.scores.path
        dims = along[next(k for k, other in enumerate(path) if other.value is step.value)]
        if mask.tensor.dim() > len(dims):
            return None
        kept = dims[len(dims) - mask.tensor.dim() :]
        return settled(self.axes, tuple(g if size > 1 else () for g, size in zip(kept, mask.shape, strict=True)))

    def _ends(self, result: Dims, chain: Sequence[Value]) -> dict[Value, Dims]:
        """The dimensions of the result, and of what becomes of it."""
        found = {chain[0]: result}
        for before, after in itertools.pairwise(chain):
            dims = self.axes.through(after, found[before])
            if dims is None:
                break
            found[after] = dims
        return {value: settled(self.axes, dims) for value, dims in found.items()}


def _between(operand: Value, softmax: Value) -> list[Value]:
    """What happens to the weights on their way to the product, in order."""
    way = []
    while operand is not softmax:
        way.append(operand)
        operand = operand.args[0]
    return way[::-1]
