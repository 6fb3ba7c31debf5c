"""How the tensors of an attention are laid out: which dimension is which, and how to bring them into SDPA's order.

SDPA takes (batch, heads, positions, features). What models hand to their products may have batch and heads in one
dimension, heads last, two dimensions of heads (groups, and the heads of one), or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from graphfuse.patterns._axes import Axes, Dims, Group

# How to rearrange a tensor: dimensions to split, each into sizes of these dimensions of the query; then, for every
# dimension of the result, those that it is made of.
Plan = tuple[tuple[tuple[int, tuple[int, ...]], ...], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Heads:
    """What SDPA's dimensions are made of, as groups that are dimensions of the sources."""

    query: Dims  # all dimensions of its source
    batch: tuple[Group, ...]
    heads: tuple[Group, ...]
    groups: tuple[Group, ...]  # heads of keys and values
    positions: Group
    keys: Group

    @property
    def leading(self) -> tuple[tuple[Group, ...], ...]:
        return self.batch, self.heads, (self.positions,)


def heads_of(
    query: Dims,
    key: Dims,
    value: Dims,
    features: tuple[Group, Group],  # of queries and keys, and of values
    keys: Group,
    prefers: Callable[[Group], bool],
) -> Heads | None:
    """Tell dimensions apart; `prefers` says whether a mask varies along one that could be the positions."""
    ends = ((query, features[:1]), (key, (features[0], keys)), (value, (features[1], keys)))
    if any(dims.count(group) != 1 for dims, groups in ends for group in groups):
        return None
    units, shared, of_values = ([group for group in dims if group and group not in groups] for dims, groups in ends)
    if set(shared) != set(of_values):
        return None
    both = [group for group in units if group in shared]
    own = [group for group in units if group not in shared]
    positions = _positions(own, size_of(keys), prefers)
    if positions is None:
        return None
    own.remove(positions)
    parts = [group for group in shared if group not in both]
    if parts:  # one dimension of the query holds the groups, and the heads of each
        if len(parts) > 1 or len(own) != 1 or own[0][: len(parts[0])] != parts[0]:
            return None
        return Heads(query, tuple(both), tuple(own), tuple(parts), positions, keys)
    at = len(both) - 1 if len(both) > 1 or not own else len(both)  # one shared dimension beside heads is a batch
    groups = tuple(both[max(at, 0) :])
    return Heads(query, tuple(both[: max(at, 0)]), (*groups, *own), groups, positions, keys)


def _positions(candidates: Sequence[Group], length: int, prefers: Callable[[Group], bool]) -> Group | None:
    fitting = [group for group in candidates if size_of(group) == length] if len(candidates) > 1 else list(candidates)
    return next((group for group in fitting if prefers(group)), fitting[-1] if fitting else None)


def size_of(group: Group) -> int:
    """The size of a dimension that runs along these axes."""
    return math.prod(axis.size for axis in group)


def plan_in(dims: Dims, wanted: Sequence[tuple[Group, ...]]) -> Plan | None:
    """How a source becomes SDPA's four dimensions, each made of `wanted` groups."""
    return _plan(dims, wanted, ())


def plan_mask(dims: Dims, heads: Heads) -> Plan | None:
    """How a mask becomes broadcastable to (batch, heads, positions, keys); `dims` are () where it is of size 1."""
    wanted = [*heads.leading, (heads.keys,)]
    there: list[Group] = []
    splits: list[tuple[int, tuple[int, ...]]] = []
    for d, group in enumerate(dims):
        units = _units(group, [unit for one in wanted for unit in one])
        if units is None:
            return None
        there.extend(units or [()])
        if len(units) > 1:
            if any(unit not in heads.query for unit in units):
                return None
            splits.append((d, tuple(heads.query.index(unit) for unit in units)))
    kept = [one if any(unit in there for unit in one) else () for one in wanted]
    return _plan(tuple(there), kept, tuple(splits))


def plan_out(dims: Dims, heads: Heads, features: Group) -> Plan | None:
    """How SDPA's four dimensions become those of the output."""
    parts = [*heads.leading, (features,)]
    splits = tuple(
        (d, tuple(heads.query.index(unit) for unit in units)) for d, units in enumerate(parts) if len(units) > 1
    )
    there = [unit for units in parts for unit in (units or ((),))]
    wanted = [_units(group, there) for group in dims]
    if any(units is None for units in wanted):
        return None
    return _plan(tuple(there), [tuple(units or ()) for units in wanted], splits)


def _units(group: Group, known: Iterable[Group]) -> list[Group] | None:
    """The known groups that the group consists of, in its order."""
    found: list[Group] = []
    starts = {unit[0]: unit for unit in known if unit}
    while group:
        unit = starts.get(group[0])
        if unit is None or group[: len(unit)] != unit:
            return None
        found.append(unit)
        group = group[len(unit) :]
    return found


def _plan(
    there: Dims, wanted: Sequence[Iterable[Group]], splits: tuple[tuple[int, tuple[int, ...]], ...]
) -> Plan | None:
    used = [[there.index(unit) for unit in units] for units in wanted if all(unit in there for unit in units)]
    taken = [d for dims in used for d in dims]
    if len(used) != len(wanted) or sorted(taken) != [d for d, group in enumerate(there) if group]:
        return None
    single = [d for d, group in enumerate(there) if not group]
    for dims in used:  # those of size 1 go where nothing else is, and what is left of them anywhere
        if not dims and single:
            dims.append(single.pop(0))
    for d in single:
        used[0].append(d)
    return splits, tuple(tuple(dims) for dims in used)


def arranged(tensor: Any, plan: Plan, query: Any) -> Any:
    """The tensor as the plan says; sizes are read off the query's source, for a proof has others than the graph."""
    splits, groups = plan
    for dim, parts in reversed(splits):
        tensor = tensor.unflatten(dim, tuple(query.size(part) for part in parts))
    order = tuple(d for group in groups for d in group)
    if order != tuple(range(len(order))):
        tensor = tensor.permute(order)
    for position, group in enumerate(groups):
        if not group:
            tensor = tensor.unsqueeze(position)
        elif len(group) > 1:
            tensor = tensor.flatten(position, position + len(group) - 1)
    return tensor


def settled(axes: Axes, dims: Dims) -> Dims:
    """The dimensions as they are after all that was found equal."""
    return tuple(axes.now(group) for group in dims)
