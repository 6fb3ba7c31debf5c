"""Sums of what each program of a backward has of a weight's gradient: in a fixed order, so that runs agree."""
# Shape letters: D = features of a row, P = programs of backward.

from __future__ import annotations

from torch import Tensor

from graphfuse.kernels._triton import launch, tl, triton

PARTS_BLOCK_P, PARTS_BLOCK_D = 128, 32


@triton.jit
def tl_add_parts(parts_ptr, total_ptr, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the sums of BLOCK_D columns."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, P, BLOCK_P):
        programs = first + tl.arange(0, BLOCK_P)[:, None]
        part_ptrs = parts_ptr + programs.to(tl.int64) * D + cols
        total += tl.load(part_ptrs, mask=(programs < P) & (cols < D), other=0.0)
    total = tl.sum(total, axis=0)[None, :].to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + cols, total, mask=cols < D)


@triton.jit(do_not_specialize_on_alignment=["P"])
def add_parts_kernel(
    parts_ptr,  # [P, D]
    total_ptr,  # [D]
    other_parts_ptr,  # [P, OTHER_D] or None
    other_total_ptr,  # [OTHER_D] or None
    P,
    D,
    OTHER_D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if other_parts_ptr is None or tl.program_id(1) == 0:
        tl_add_parts(parts_ptr, total_ptr, P, D, BLOCK_P, BLOCK_D)
    else:
        tl_add_parts(other_parts_ptr, other_total_ptr, P, OTHER_D, BLOCK_P, BLOCK_D)


def add_parts_(*parts_and_totals: tuple[Tensor | None, Tensor | None]) -> None:  # (P, D), (D,) each
    """Launch the kernel that writes the sum of all parts of one total, or of two, those that there are."""
    wanted = [(parts, total) for parts, total in parts_and_totals if parts is not None]
    if not wanted:
        return
    (parts, total), *others = wanted
    other_parts, other_total = others[0] if others else (None, None)
    programs, features = parts.shape
    other_features = None if other_parts is None else other_parts.shape[1]
    launch(
        add_parts_kernel,
        (triton.cdiv(max(features, other_features or 0), PARTS_BLOCK_D), len(wanted)),
        parts,
        total,
        other_parts,
        other_total,
        programs,
        features,
        other_features,
        BLOCK_P=PARTS_BLOCK_P,
        BLOCK_D=PARTS_BLOCK_D,
    )
