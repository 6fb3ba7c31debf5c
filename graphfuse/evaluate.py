"""Running a region of the shadow on real tensors, at any size.

Sizes in a graph are those of the user's batch; a proof needs only a few rows. The region is therefore run at *small*
sizes: leading dimensions shrink, and every literal size inside (`view(2, 4096, -1, 64)`) is worked out again from how
the full shapes relate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphfuse.match import CASTS, INDEXING, VIEWS
from graphfuse.shadow import LEAF, Value, hint

aten = torch.ops.aten

NEW = {aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format}
FACTORS = (3, 5, 7, 11, 13)  # stand-ins for large sizes: distinct, so that mistaken dimensions disagree
MOST_CUT = FACTORS[-1] - 3  # that a slice may take away for the difference to stay


class CannotEvaluate(Exception):
    """The region holds something that has no small counterpart; its text is the reason."""


def small_sizes(full: Iterable[int], cut: Mapping[int, int] | None = None) -> dict[int, int]:
    """A small stand-in for every large size; products stay products, and differences differences.

    Args:
        full: the sizes.
        cut: size -> the longer one that it is cut from, as labels of all tokens but the first are.

    >>> small_sizes({2, 4096, 8192})
    {2: 2, 4096: 3, 8192: 6}
    >>> small_sizes({2, 4095, 4096, 8190}, {4095: 4096})
    {2: 2, 4096: 5, 4095: 4, 8190: 8}
    """
    sizes: dict[int, int] = {}
    factors = list(FACTORS)
    cut = {} if cut is None else cut

    def add(size: int) -> None:
        if size in sizes:
            return
        if size in cut:
            add(cut[size])
        known = [s for s in sizes if s > 1]
        pair = next(((a, b) for a in known for b in known if a <= b and a * b == size), None)
        missing = {size - shorter for shorter, longer in cut.items() if longer == size}
        if size in cut:
            sizes[size] = sizes[cut[size]] - (cut[size] - size)
        elif size <= 4:
            sizes[size] = size
        elif pair is not None and not missing:
            sizes[size] = sizes[pair[0]] * sizes[pair[1]]
        else:
            taken = set(sizes.values()) if missing else set()
            fitting = (f for f in factors if f not in taken and all(2 < f - less not in taken for less in missing))
            sizes[size] = next(fitting, size)
            used = {sizes[size], *(sizes[size] - less for less in missing)}
            factors[:] = [factor for factor in factors if factor not in used]

    for size in sorted(set(full)):
        add(size)
    return sizes


def cuts(values: Iterable[Value]) -> dict[int, int]:
    """What slices leave of a size, a few less than there were: size -> the longest one that it is cut from."""
    longest: dict[int, int] = {}
    for value in values:
        if value.op is aten.slice.Tensor:
            for longer, size in zip(value.args[0].shape, value.shape, strict=True):
                if 4 < size < longer <= size + MOST_CUT:
                    longest[size] = max(longer, longest.get(size, 0))
    found = {}
    for size in longest:
        whole = size
        while whole in longest:
            whole = longest[whole]
        if whole - size <= MOST_CUT:
            found[size] = whole
    return found


def small_view(full_in: tuple[int, ...], small_in: tuple[int, ...], full_out: tuple[int, ...]) -> list[int]:
    """The shape that a view of `small_in` must have, when a view of `full_in` has `full_out`."""
    out: list[int] = []
    i = j = 0
    while i < len(full_in) or j < len(full_out):
        before, after = [i], [j]
        i, j = i + 1, j + 1
        left = full_in[before[0]] if before[0] < len(full_in) else 1
        right = full_out[after[0]] if after[0] < len(full_out) else 1
        if before[0] >= len(full_in):
            before = []
        if after[0] >= len(full_out):
            after = []
        while left != right:  # grow the lesser side until the groups hold as many elements
            if left < right:
                if i >= len(full_in):
                    raise CannotEvaluate(f"view: expected {full_in} to factor into {full_out}")
                left *= full_in[i]
                before.append(i)
                i += 1
            else:
                if j >= len(full_out):
                    raise CannotEvaluate(f"view: expected {full_in} to factor into {full_out}")
                right *= full_out[j]
                after.append(j)
                j += 1
        out.extend(_split_small(before, after, full_in, small_in, full_out))
    return out


def _split_small(
    before: list[int], after: list[int], full_in: tuple[int, ...], small_in: tuple[int, ...], full_out: tuple[int, ...]
) -> list[int]:
    """Sizes of one group of output dimensions."""
    total = math.prod(small_in[i] for i in before)
    if not after:
        return []
    if total == math.prod(full_out[j] for j in after):
        return [full_out[j] for j in after]
    if len(after) == 1:
        return [total]
    sizes = small_sizes({*(full_in[i] for i in before), *(full_out[j] for j in after)})
    named = {full_in[i]: small_in[i] for i in before}
    guess = [named.get(full_out[j], sizes[full_out[j]]) for j in after]
    full = [full_out[j] for j in after]
    for others, k in itertools.product((guess, full), range(len(after))):
        rest = math.prod(others[:k] + others[k + 1 :])  # one dimension takes up what the others leave
        if rest and total % rest == 0 and (full[k] > 4 or total // rest == full[k]):
            return [*others[:k], total // rest, *others[k + 1 :]]
    raise CannotEvaluate(f"view: expected {total} elements to split like {full_out}")


def evaluate(
    values: Iterable[Value],
    known: Mapping[Value, Tensor],
    *,
    exact: bool,
    device: torch.device,
    sizes: Mapping[int, int],
) -> dict[Value, Tensor]:
    """Run `values` (in order of execution) from the tensors in `known`.

    Args:
        values: a cone of the shadow.
        known: tensors for its leaves, of small size.
        exact: replace every floating dtype by float64.
        device: where to run.
        sizes: full size -> small size, for literals that create dimensions.

    Returns:
        `known` and a tensor for each of `values`.

    Raises:
        CannotEvaluate: the region holds a leaf that is not known, or something with no small counterpart.
    """
    results = dict(known)
    for value in values:
        if value in results:
            continue
        if value.handed is not None and value.handed in results:
            results[value] = results[value.handed]
            continue
        if value.op is LEAF:
            raise CannotEvaluate(f"{value.node.name}: expected a computed value, got a leaf")
        if torch.Tag.nondeterministic_seeded in value.op.tags and not _drops_nothing(value):
            raise CannotEvaluate(f"{value.node.name}: expected no random numbers, got {value.op}")
        args = [_argument(a, results, exact, device) for a in value.args]
        kwargs = {k: _argument(a, results, exact, device) for k, a in value.kwargs.items()}
        if exact and value.op in NEW and value.dtype.is_floating_point:
            kwargs["dtype"] = torch.float64  # where none is named, it is torch's default
        _resize(value, args, sizes)
        _protect(value.op, args, kwargs)
        with torch.set_grad_enabled(value.grad_mode and torch.is_grad_enabled()):
            try:
                # At small sizes a tensor may have other strides: what was a view there can be a copy here.
                result = args[0].reshape(args[1]) if value.op in VIEWS else value.op(*args, **kwargs)
                # A tensor cut into pieces of a given size may have fewer pieces then.
                results[value] = result[value.output] if isinstance(result, (tuple, list)) else result
            except (RuntimeError, IndexError, ValueError, NotImplementedError) as error:
                message = str(error).splitlines()[0]
                raise CannotEvaluate(f"{value.node.name}: expected {value.op} to run, got: {message}") from error
    return results


def _drops_nothing(value: Value) -> bool:
    """Whether the operation is random only by a dropout that is off."""
    names = [argument.name for argument in value.op._schema.arguments]
    if "dropout_p" not in names:
        return False
    position = names.index("dropout_p")
    probability = value.args[position] if len(value.args) > position else value.kwargs.get("dropout_p", 0)
    return bool(probability == 0)


def _protect(op: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Let an in-place operation write to a copy: the value from before the write may have other readers."""
    for position, spec in enumerate(op._schema.arguments if op._schema.is_mutable else ()):
        if spec.alias_info is None or not spec.alias_info.is_write:
            continue
        if position < len(args) and isinstance(args[position], Tensor):
            args[position] = args[position].clone()
        elif isinstance(kwargs.get(spec.name), Tensor):
            kwargs[spec.name] = kwargs[spec.name].clone()


def _argument(arg: Any, results: Mapping[Value, Tensor], exact: bool, device: torch.device) -> Any:
    if isinstance(arg, Value):
        return results[arg]
    if isinstance(arg, (list, tuple)):
        return [_argument(item, results, exact, device) for item in arg]
    if isinstance(arg, torch.dtype):
        return exact_dtype(arg) if exact else arg
    if isinstance(arg, torch.device):
        return device
    return hint(arg)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 (or complex128) for what is inexact, and the dtype itself for what is not."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _resize(value: Value, args: list[Any], sizes: Mapping[int, int]) -> None:
    """Turn the literal sizes among `args` into small ones."""
    op = value.op
    if op in VIEWS:
        args[1] = small_view(value.args[0].shape, tuple(args[0].shape), value.shape)
    elif op is aten.expand.default:
        before, small = value.args[0].shape, tuple(args[0].shape)
        lead = len(value.shape) - len(before)
        args[1] = [
            sizes.get(size, size) if k < lead or before[k - lead] != size else small[k - lead]
            for k, size in enumerate(value.shape)
        ]
    elif op is aten.slice.Tensor and len(args) >= 4:
        full, small = value.args[0].shape[args[1]], args[0].shape[args[1]]
        if full != small and args[3] is not None and 0 <= args[3] <= full:
            args[3] = small - (full - args[3])  # as far from the end as it was
    elif op in NEW:
        args[0] = [sizes.get(size, size) for size in args[0]]
    elif op is aten.split_with_sizes.default:
        dim = args[2] if len(args) > 2 else 0
        full = value.args[0].shape[dim]
        if full != args[0].shape[dim]:
            raise CannotEvaluate(f"{value.node.name}: expected to split an inner dimension, got a batch one")


def roots(value: Value) -> list[Value]:
    """The values that `value` is a rearrangement of, itself included, nearest first."""
    chain = [value]
    movers = INDEXING | CASTS | {aten.constant_pad_nd.default}
    while chain[-1].op in movers and isinstance(chain[-1].args[0], Value):
        chain.append(chain[-1].args[0])
    return chain


def fingerprint(values: Sequence[Value], leaves: Sequence[Value]) -> tuple[Any, ...]:
    """What a region computes and on what, hashable: equal regions of a graph have equal fingerprints."""
    number = {value: k for k, value in enumerate([*leaves, *values])}

    def plain(arg: Any) -> Any:
        if isinstance(arg, Value):
            return ("value", number.get(arg, -1))
        if isinstance(arg, (list, tuple)):
            return tuple(plain(item) for item in arg)
        return str(hint(arg))

    steps = tuple(
        (str(v.op), plain(v.args), plain(sorted(v.kwargs.items())), v.output, v.shape, v.grad_mode) for v in values
    )
    starts = tuple(
        (v.shape, str(v.dtype), v.tensor.requires_grad, tuple(hint(s) for s in v.tensor.stride())) for v in leaves
    )
    return (steps, starts)
