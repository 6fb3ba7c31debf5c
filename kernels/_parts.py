"""Sums of what each program of a backward has of a weight's gradient: in a fixed order, so that runs agree.

They are a kernel of a few microseconds behind one that may itself take only ten. So it is on its way before that one
has ended, on GPUs that can do so: Hopper's and later ones. It waits for the parts then, and not for its own launch.
"""
# Shape letters: D = features of a row, P = programs of backward.

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from graphfuse.kernels._triton import launch, tl, triton

# Of a program: two 16-byte loads of a thread at a time, of all parts at once up to MAX_BLOCK_P. Of more loads, some
# would wait for others: the compiler spares registers.
TILE, NUM_WARPS = 4096, 16
MIN_BLOCK_P, MAX_BLOCK_P = 256, 1024
OVERLAPS = True  # whether the kernel is launched early where that is possible


@triton.jit
def tl_let_next_begin(OVERLAP: tl.constexpr):
    """Say that the next kernel, if it was launched to be early, may occupy what this one leaves free."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def tl_wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the kernel before this one has ended, and what it wrote can be read."""
    if OVERLAP:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


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
    OVERLAP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tl_wait_for_previous(OVERLAP)
    if other_parts_ptr is None or tl.program_id(1) == 0:
        tl_add_parts(parts_ptr, total_ptr, P, D, BLOCK_P, BLOCK_D)
    else:
        tl_add_parts(other_parts_ptr, other_total_ptr, P, OTHER_D, BLOCK_P, BLOCK_D)


@lru_cache(maxsize=64)
def can_overlap(device: torch.device) -> bool:
    """Whether kernels can begin before the one in front of them has ended."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap(device: torch.device) -> bool:
    """Whether `add_parts_` launches early: then the kernel that writes the parts has to `tl_let_next_begin`."""
    return OVERLAPS and can_overlap(device)


def add_parts_(*parts_and_totals: tuple[Tensor | None, Tensor | None]) -> None:  # (P, D), (D,) each
    """Launch the kernel that writes the sum of all parts of one total, or of two, those that there are.

    It has to follow the kernel that writes the parts: where it is early, it waits for no other.
    """
    wanted = [(parts, total) for parts, total in parts_and_totals if parts is not None]
    if not wanted:
        return
    (parts, total), *others = wanted
    other_parts, other_total = others[0] if others else (None, None)
    programs, features = parts.shape
    other_features = None if other_parts is None else other_parts.shape[1]
    block_p = min(max(MIN_BLOCK_P, triton.next_power_of_2(programs)), MAX_BLOCK_P)
    block_d = TILE // block_p
    is_early = overlap(parts.device)
    launch(
        add_parts_kernel,
        (triton.cdiv(max(features, other_features or 0), block_d), len(wanted)),
        parts,
        total,
        other_parts,
        other_total,
        programs,
        features,
        other_features,
        OVERLAP=is_early,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        num_warps=NUM_WARPS,
        **({"launch_pdl": True} if is_early else {}),  # an option of NVIDIA's compiler alone
    )
