"""Walking over several tensors of one shape at once, in as few dims as their strides allow."""

from __future__ import annotations

from collections.abc import Sequence


def fold(shape: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Merge the dims of tensors that share a shape wherever the strides of all of them allow it.

    Args:
        shape: The sizes, none of them 0.
        strides: Of each tensor, one per size.

    Returns:
        Size and strides of every dim that is left, outermost in the memory of the first tensor
        first; dims of size 1 are dropped. Dense tensors of the same layout come down to one dim.
    """
    dims = [(size, steps) for size, *steps in zip(shape, *strides, strict=True) if size != 1]
    dims.sort(key=lambda dim: dim[1][0], reverse=True)
    folded: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in dims:
        outer_size, outer_steps = folded[-1] if folded else (1, ())
        if folded and outer_steps == tuple(size * step for step in steps):
            folded[-1] = (outer_size * size, tuple(steps))
        else:
            folded.append((size, tuple(steps)))
    return folded
