"""Rotary position embedding, by evaluation.

    x * cos + rotate(x) * sin   ->   graphfuse::rope(x, cos, sin, layout, ...)

Anchor: a sum of two products (or a product of complex numbers) whose data operands are rearrangements of one tensor
`x` and whose other operands are two tables. From there the region grows outward, over the joins that put halves back
together or attach what is not rotated. What the region computes is found by running it on random numbers and comparing
with the op under each of its conventions: pairs that are halves or neighbours, in and out, tables of full or half
width, either direction, all features or some. No spelling is known here, only the rotation.

Paper: Su et al. 2021, https://arxiv.org/abs/2104.09864
Left alone: tables that take a gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from graphfuse.evaluate import CannotEvaluate, evaluate, fingerprint, small_sizes
from graphfuse.kernels.rope import rope_reference
from graphfuse.match import CASTS, INDEXING, Match, Pattern, Refusal, short, strip, unrounded
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor, aten.sub_.Tensor}
PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor}
JOINS = {aten.cat.default, aten.stack.default}
NEGATIONS = {aten.neg.default, aten.neg_.default}
COMPLEX_VIEWS = {aten.view_as_complex.default, aten.view_as_real.default}
MOVES = INDEXING | CASTS | JOINS | NEGATIONS | COMPLEX_VIEWS
FLATTENS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
GROWTH = 6  # steps outward from the sum: a join, a flatten, a cast, a join with what is not rotated, a cast

Convention = tuple[str, str, str, bool, int, bool]  # layout, out_layout, table, reverse, start, tables swapped

_identified: dict[Any, Convention | None] = {}


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every rotated tensor of the shadow."""
    done: set[Value] = set()
    for anchor in shadow.values:
        if anchor in done or not _is_anchor(anchor):
            continue
        chain = _outward(anchor, shadow)
        for output in reversed([value for value in chain if value in shadow.node_of] or chain[:1]):
            found = _match(output, shadow)
            if found is not None:
                done.update(shadow.cone([output], found.inputs if isinstance(found, Match) else [anchor]))
                yield found
                break


def _is_anchor(value: Value) -> bool:
    if value.op is aten.view_as_real.default:
        return strip(value.args[0]).op in PRODUCTS
    if value.op not in SUMS or value.kwargs.get("alpha", 1) != 1:
        return False
    return all(isinstance(a, Value) and _is_product(strip(a)) for a in value.args[:2])


def _is_product(value: Value) -> bool:
    return value.op in PRODUCTS and all(isinstance(a, Value) and a.tensor.dim() > 0 for a in value.args)


def _outward(anchor: Value, shadow: Shadow) -> list[Value]:
    """The anchor, and what it successively becomes by joins along the last dimension, flattening and casts."""
    chain = [anchor]
    while len(chain) <= GROWTH:
        user = shadow.sole_user(chain[-1])
        if user is None or user.op not in JOINS | FLATTENS | CASTS:
            break
        if user.op in JOINS:
            rank = user.tensor.dim()
            dim = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
            if dim % rank < rank - (2 if user.op is aten.stack.default else 1):
                break
        chain.append(user)
    return chain


def _match(output: Value, shadow: Shadow) -> Match | Refusal | None:
    products = _products_under(output)
    if not products or len(products) > 4:
        return None
    for data_root in _common_roots(products):
        split = _split(products, data_root)
        if split is None:
            continue
        tables = split
        x = _source(output, tables, len(products))
        if x is None or x in tables:
            continue
        x = _shaped_like(x, output)
        if x is None:
            continue
        if any(table.tensor.requires_grad for table in tables):
            return Refusal(
                "rope", output, "cos, sin: expected tables without a gradient, got trainable ones", {"rope": 1}
            )
        for source in _reordered(x):
            convention = _identify(output, source, tables, shadow)
            if convention is not None:
                return _build(output, source, tables, convention)
    return None


def _reordered(x: Value) -> list[Value]:
    """`x` and what it is a reordering of, farthest first: one of features is in the convention, and saves a copy."""
    found = [x]
    value = x
    while value.op in INDEXING:
        value = value.args[0]
        if value.shape == x.shape:
            found.append(value)
    return found[::-1]


def _products_under(output: Value) -> list[Value]:
    """The products that the output is made of, by sums and rearrangements only."""
    products: list[Value] = []
    seen: set[Value] = set()
    stack = [output]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.op in PRODUCTS:
            products.append(value)
        elif value.op in SUMS | MOVES:
            stack.extend(value.operands())
        if len(seen) > 64:
            return []
    return sorted(products, key=lambda value: value.index)


def _root(value: Value) -> Value:
    """The value of which this one is a rearrangement."""
    while value.op in MOVES:
        operands = list(value.operands())
        if len(operands) > 1:
            below = {_root(operand) for operand in operands}
            if len(below) > 1:
                return value
            return below.pop()
        value = operands[0]
    return value


def _common_roots(products: Iterable[Value]) -> list[Value]:
    """Values of which every product has one operand a rearrangement; those of more dimensions first."""
    shared: set[Value] | None = None
    for product in products:
        here = {_root(operand) for operand in product.operands()}
        shared = here if shared is None else shared & here
    return sorted(shared or (), key=lambda value: -value.index)


def _split(products: Iterable[Value], data_root: Value) -> tuple[Value, ...] | None:
    """The tables of the products: one complex, or two real ones."""
    operands: list[Value] = []
    for product in products:
        left, right = product.args
        ours = [_root(left) is data_root, _root(right) is data_root]
        if ours == [True, True]:  # data and tables out of one tensor: the table is what was sliced off earlier
            left, right = sorted((left, right), key=lambda v: v.tensor.dim())
            table = left
        elif any(ours):
            table = right if ours[0] else left
        else:
            return None
        if table not in operands:
            operands.append(table)
    by_root: dict[Value, list[Value]] = {}
    for operand in operands:
        by_root.setdefault(_root(operand), []).append(operand)
    if len(by_root) == 1 and len(operands) == 2:
        return tuple(unrounded(operand) for operand in operands)
    if len(by_root) > 2:
        return None
    groups = list(by_root.values())
    if len(groups) == 1 and not operands[0].dtype.is_complex:
        return None
    return tuple(_nearest_common(group) for group in groups)


def _nearest_common(values: list[Value]) -> Value:
    """The value nearest to all of `values` of which each is a rearrangement."""
    if len(values) == 1:
        return unrounded(values[0])
    frontier = set(values)
    while len(frontier) > 1:
        value = max(frontier, key=lambda v: v.index)
        frontier.remove(value)
        frontier.update(value.operands())
    return unrounded(frontier.pop())


def _source(output: Value, tables: tuple[Value, ...], products: int) -> Value | None:
    """The value nearest to the output that all of it comes from, tables aside."""
    frontier, opened = {output}, 0
    while True:
        value = max(frontier, key=lambda v: v.index)
        if len(frontier) == 1 and opened == products:
            return value
        frontier.remove(value)
        if value.op in PRODUCTS:
            opened += 1
            data = [operand for operand in value.operands() if not _derives(operand, tables)]
            if len(data) != 1:
                return None
            frontier.update(data)
        elif value.op in SUMS | MOVES:
            frontier.update(value.operands())
        else:
            return None


def _derives(value: Value, tables: tuple[Value, ...]) -> bool:
    """Whether the value is one of the tables, rearranged."""
    while True:
        if value in tables:
            return True
        if value.op not in INDEXING | CASTS | NEGATIONS:
            return False
        value = value.args[0]


def _shaped_like(x: Value, output: Value) -> Value | None:
    """`x` before views and casts, at the nearest point where its shape is that of the output."""
    while x.shape != output.shape:
        if x.op not in INDEXING | CASTS | COMPLEX_VIEWS:
            return None
        x = x.args[0]
    return unrounded(x)


def _identify(output: Value, x: Value, tables: tuple[Value, ...], shadow: Shadow) -> Convention | None:
    """The convention under which the op is the region, or `None`."""
    leaves = [x, *tables]
    region = shadow.cone([output], leaves)
    if any(value.op is LEAF for value in region):
        return None
    key = fingerprint(region, leaves)
    if key not in _identified:
        with torch.no_grad():
            _identified[key] = _try_conventions(output, leaves, region)
    return _identified[key]


def _try_conventions(output: Value, leaves: list[Value], region: list[Value]) -> Convention | None:
    from torch.utils._python_dispatch import _disable_current_modes

    generator = torch.Generator().manual_seed(0)
    sizes = small_sizes(size for leaf in leaves for size in leaf.shape[:-1])
    with _disable_current_modes():
        known = {}
        for leaf in leaves:
            shape = [*(sizes[s] for s in leaf.shape[:-1]), leaf.shape[-1]] if leaf.shape else []
            dtype = torch.complex128 if leaf.dtype.is_complex else torch.float64
            known[leaf] = torch.randn(shape, generator=generator, dtype=dtype)
        try:
            expected = evaluate(region, known, exact=True, device=torch.device("cpu"), sizes=sizes)[output]
        except CannotEvaluate:
            return None
        x, *tables = (known[leaf] for leaf in leaves)
        if tables[0].is_complex():
            tables = [tables[0].real, tables[0].imag]
        for convention in _conventions(x.shape[-1], tables[0].shape[-1]):
            layout, out_layout, table, reverse, start, swapped = convention
            cos, sin = reversed(tables) if swapped else tables
            try:
                ours = rope_reference(x, cos, sin, layout, out_layout, table, reverse, start, torch.float64)
            except (RuntimeError, ValueError, IndexError):
                continue
            if ours.shape == expected.shape and torch.allclose(ours, expected, rtol=1e-9, atol=1e-9):
                return convention
    return None


def _conventions(features: int, table_width: int) -> Iterator[Convention]:
    """Every convention that fits the sizes, common ones first."""
    pairings = ("half", "interleaved")
    widths = [(table_width * 2, ("shared",)), (table_width, pairings)]
    for rotated, tables in widths:
        if rotated > features or rotated % 2:
            continue
        starts = sorted({0, features - rotated})
        for start, layout, out_layout, table in itertools.product(starts, pairings, pairings, tables):
            for reverse, swapped in itertools.product((False, True), repeat=2):
                yield layout, out_layout, table, reverse, start, swapped


def _build(output: Value, x: Value, tables: tuple[Value, ...], convention: Convention) -> Match:
    layout, out_layout, table, reverse, start, swapped = convention
    is_complex = len(tables) == 1
    rotated = tables[0].shape[-1] * (2 if table == "shared" else 1)
    words = [layout]
    if out_layout != layout:
        words.append(f"to {out_layout}")
    if is_complex:
        words.append("complex table")
    if reverse:
        words.append("reversed")
    if rotated < x.shape[-1]:
        words.append(f"{rotated} of {x.shape[-1]} features")
    return Match(
        pattern="rope",
        outputs=(output,),
        inputs=(x, *(reversed(tables) if swapped else tables)),
        replacement=complex_replacement if is_complex else replacement,
        params={
            "layout": layout,
            "out_layout": out_layout,
            "table": table,
            "reverse": reverse,
            "start": start,
            "out_dtype": output.dtype,
        },
        variant=", ".join([*words, short(x.dtype)]),
        covers={"rope": 1},
    )


def replacement(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    out_layout: str,
    table: str,
    reverse: bool,
    start: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """What stands in the place of the region."""
    result: Tensor = torch.ops.graphfuse.rope.default(x, cos, sin, layout, out_layout, table, reverse, start, out_dtype)
    return result


def complex_replacement(x: Tensor, rotation: Tensor, **params: Any) -> Tensor:
    """The same, from one complex table (..., pairs) of `cos + i sin`."""
    parts = torch.view_as_real(rotation)
    return replacement(x, parts.select(-1, 0), parts.select(-1, 1), **params)


PATTERN = Pattern("rope", find)
