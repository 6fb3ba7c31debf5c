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
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from graphfuse.evaluate import CannotEvaluate, evaluate, fingerprint, small_sizes
from graphfuse.kernels.rope import rope_reference
from graphfuse.match import CASTS, INDEXING, Match, Pattern, Refusal, narrows, rounded, short, unreachable, unrounded
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor, aten.sub_.Tensor}
PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor}
ADDED_PRODUCTS = {aten.addcmul.default, aten.addcmul_.default}
JOINS = {aten.cat.default, aten.stack.default}
COMPLEX_VIEWS = {aten.view_as_complex.default, aten.view_as_real.default}
# Linear in their operands, constants aside: what may lie between data or table and the product.
MOVES = INDEXING | CASTS | JOINS | COMPLEX_VIEWS
MOVES |= {aten.neg.default, aten.neg_.default, aten.complex.default, aten.detach.default, aten.constant_pad_nd.default}
MOVES |= {aten.roll.default, aten.flip.default, aten.where.self, aten.index.Tensor}
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
RESHAPES |= {aten.permute.default, aten.transpose.int}
GROWTH = 6  # steps outward from the sum: a join, a flatten, a cast, a join with what is not rotated, a cast
FEW = 16  # operations that make a sign or an index

Convention = tuple[str, str, str, bool, int, bool]  # layout, out_layout, table, reverse, start, tables swapped
Products = Mapping[Value, tuple[Value, Value]]  # product -> its factors

_identified: dict[Any, Convention | None] = {}


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every rotated tensor of the shadow."""
    done: set[Value] = set()
    for anchor in shadow.values:
        if anchor in done or not _is_anchor(anchor):
            continue
        chain = [value for value in _outward(anchor, shadow) if not value.dtype.is_complex]
        for output in reversed([value for value in chain if value in shadow.node_of] or chain[:1]):
            found = _match(output, shadow)
            if found is not None:
                done.update(shadow.cone([output], found.inputs if isinstance(found, Match) else [anchor]))
                yield found
                break


def _is_anchor(value: Value) -> bool:
    if value.op in ADDED_PRODUCTS or value.op in SUMS:
        terms = value.args[:1] if value.op in ADDED_PRODUCTS else value.args[:2]
        return all(isinstance(term, Value) and _factors(_root(term)) is not None for term in terms)
    return value.dtype.is_complex and _factors(value) is not None


def _factors(value: Value) -> tuple[Value, Value] | None:
    """Both factors of a product (or of one that is added to something), neither of them a constant."""
    if value.op not in PRODUCTS | ADDED_PRODUCTS:
        return None
    factors = [arg for arg in value.args[-2:] if isinstance(arg, Value) and not _is_constant(arg)]
    if len(factors) != 2 or any(factor.tensor.dim() == 0 for factor in factors):
        return None
    return factors[0], factors[1]


def _is_constant(value: Value) -> bool:
    """Whether a few operations make the value from nothing, for one row: signs, or indices."""
    if value.tensor.dim() and value.tensor.numel() != value.shape[-1]:
        return False
    seen: set[Value] = set()
    stack = [value]
    while stack and len(seen) < FEW:
        current = stack.pop()
        if current.op is LEAF:
            return False
        seen.add(current)
        stack.extend(operand for operand in current.operands() if operand not in seen)
    return not stack


def _moved(value: Value) -> list[Value]:
    """What the value is a rearrangement of, constant factors included; nothing if it is none."""
    if value.op in MOVES or (value.op in PRODUCTS and _factors(value) is None):
        return [operand for operand in value.operands() if not _is_constant(operand)]
    return []


def _outward(anchor: Value, shadow: Shadow) -> list[Value]:
    """The anchor, and what it successively becomes by joins along the last dimension, reshapes and casts."""
    chain = [anchor]
    while len(chain) <= GROWTH:
        user = _next(chain[-1], shadow)
        if user is None or user.op not in JOINS | RESHAPES | CASTS | COMPLEX_VIEWS:
            break
        if user.op in JOINS:
            rank = user.tensor.dim()
            dim = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
            if dim % rank < rank - (2 if user.op is aten.stack.default else 1):
                break
        chain.append(user)
    return chain


def _next(value: Value, shadow: Shadow) -> Value | None:
    """The one operation that reads the value, or in which all its views are joined again."""
    if value in shadow.escaping or len(value.users) <= 1:
        return shadow.sole_user(value)
    ends = set()
    for user in value.users:
        end: Value | None = user
        while end is not None and end.op in INDEXING | COMPLEX_VIEWS:
            end = shadow.sole_user(end)
        ends.add(end)
    end = ends.pop()
    return end if not ends and end is not None and end.op in JOINS else None


def _match(output: Value, shadow: Shadow) -> Match | Refusal | None:
    products = _products_under(output)
    if not products or len(products) > 4:
        return None
    for data_root in _common_roots(products):
        for tables in _tables(products, data_root, shadow):
            x = _source(output, products, tables, shadow)
            if x is None or x in tables:
                continue
            for source in _reordered(x):
                convention = _identify(output, source, tables, shadow)
                if convention is None:
                    continue
                if any(table.tensor.requires_grad for table in tables):
                    reason = "cos, sin: expected tables without a gradient, got trainable ones"
                    hint = "make the tables under torch.no_grad(), or detach() them"
                    return Refusal("rope", output, reason, {"rope": 1}, hint)
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


def _products_under(output: Value) -> Products:
    """The products that the output is made of, by sums and rearrangements only."""
    products: dict[Value, tuple[Value, Value]] = {}
    seen: set[Value] = set()
    stack = [output]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if (factors := _factors(value)) is not None:
            products[value] = factors
        stack.extend(_terms(value))
        if len(seen) > 64:
            return {}
    return dict(sorted(products.items(), key=lambda item: item[0].index))


def _terms(value: Value) -> list[Value]:
    """What the value is a sum or a rearrangement of."""
    if value.op in ADDED_PRODUCTS:
        return [value.args[0]]
    return list(value.operands()) if value.op in SUMS else _moved(value)


def _root(value: Value) -> Value:
    """The value of which this one is a rearrangement."""
    while below := set(_moved(value)):
        roots = below if len(below) == 1 else {_root(operand) for operand in below}
        if len(roots) > 1:
            return value
        value = roots.pop()
    return value


def _common_roots(products: Products) -> list[Value]:
    """Values of which every product has one factor a rearrangement, the latest first."""
    shared = set.intersection(*({_root(factor) for factor in factors} for factors in products.values()))
    return sorted(shared, key=lambda value: -value.index)


def _tables(products: Products, data_root: Value, shadow: Shadow) -> Iterator[tuple[Value, ...]]:
    """What the products may have for tables: one complex, or two real ones; those nearest to the products first."""
    factors: list[Value] = []
    for left, right in products.values():
        ours = [_root(left) is data_root, _root(right) is data_root]
        if ours == [True, True]:  # data and tables out of one tensor: the table is what was sliced off earlier
            table = min(left, right, key=lambda v: v.tensor.dim())
        elif any(ours):
            table = right if ours[0] else left
        else:
            return
        if table not in factors:
            factors.append(table)
    by_root: dict[Value, list[Value]] = {}
    for factor in factors:
        by_root.setdefault(_root(factor), []).append(factor)
    nearest = factors if len(by_root) == 1 and len(factors) == 2 else [_nearest_common(g) for g in by_root.values()]
    frontier = dict.fromkeys(unrounded(value) for value in nearest)
    while True:
        wanted = 1 if any(value.dtype.is_complex for value in frontier) else 2
        if len(frontier) == wanted and all(unreachable(value, shadow) is None for value in frontier):
            yield tuple(frontier)
        opened = max((value for value in frontier if _opens(value)), key=lambda v: v.index, default=None)
        if opened is None:
            return
        del frontier[opened]
        frontier.update(dict.fromkeys(_moved(opened)))


def _nearest_common(values: list[Value]) -> Value:
    """The value nearest to all of `values` of which each is a rearrangement."""
    frontier = set(values)
    while len(frontier) > 1:
        value = max(frontier, key=lambda v: v.index)
        frontier.remove(value)
        frontier.update(_moved(value))
    return frontier.pop()


def _opens(table: Value) -> bool:
    """Whether what the table is a rearrangement of may stand for it: not where rounding lies between."""
    return bool(_moved(table)) and not narrows(table)


def _source(output: Value, products: Products, tables: tuple[Value, ...], shadow: Shadow) -> Value | None:
    """The value nearest to the output, and of its shape, that all of it comes from, tables aside."""
    frontier, closed = {output}, set(products)
    while True:
        value = max(frontier, key=lambda v: v.index)
        fits = value.shape == output.shape and not value.dtype.is_complex and unreachable(value, shadow) is None
        if len(frontier) == 1 and not closed and fits:
            return unrounded(value)
        frontier.remove(value)
        closed.discard(value)
        data = [factor for factor in products.get(value, ()) if not _derives(factor, tables)]
        below = [*_terms(value), *data]
        if not below or len(data) != (value in products):
            return None
        frontier.update(below)


def _derives(value: Value, tables: tuple[Value, ...]) -> bool:
    """Whether the value is a rearrangement of tables alone."""
    below = _moved(value)
    return value in tables or (bool(below) and all(_derives(operand, tables) for operand in below))


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
        formula=_formula(layout, reverse=reverse),
        rounding=rounded(output.dtype),
    )


def _formula(layout: str, *, reverse: bool) -> str:
    first, second = "+-" if reverse else "-+"
    parts = "halves" if layout == "half" else "even and odd features"
    return f"(a · cos {first} b · sin, b · cos {second} a · sin), (a, b) the {parts} of x"


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
    parts = torch.view_as_real(rotation.resolve_conj())
    return replacement(x, parts.select(-1, 0), parts.select(-1, 1), **params)


PATTERN = Pattern("rope", find, "one pass over memory each way, and backward keeps cos and sin alone")
