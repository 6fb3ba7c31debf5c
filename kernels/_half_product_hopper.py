"""The product of `_half_product.py` for Hopper's tensor cores, in Gluon: warps that load, that add, and that multiply.

Of a program, which walks over tiles of 128 x 256 of the sum, two groups of 4 warps multiply, each half of the rows of a
tile with a sum of its own to add to: the one adds while the other multiplies. A warp loads the factors, as far ahead as
there is room, and another brings the old sums and takes the new ones away: no group waits for memory.

On an H200, bf16, 2048 x 128256 x 4096 and 1664 x 151936 x 1024, over and over, torch.mm in turn: 3.40 and 0.84 ms where
torch.mm takes 3.21 and 0.79 without a sum to add to; Triton's kernel 3.51 and 0.88 where it takes 3.10 and 0.76. Both
groups in step, one accumulator of 8 warps, take 3.53 and 0.87 ms; tiles of 256 x 128 3.54 and 0.87. What is left to
torch.mm is probably that its programs share what they load, which this dialect cannot say.

Source: Triton's tutorials on Gluon (persistent products, warp specialization)
"""
# Shape letters: C = rows of the chunk (tokens), V = classes (vocabulary), H = features of a token.
# Importing this fails where Triton has no Gluon, or another one.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from graphfuse.kernels._descriptor import Described
from graphfuse.kernels._triton import launch, triton

load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

BLOCK_C, BLOCK_V, BLOCK_H = 64, 128, 256
STAGES = 3  # tiles of factors under way: with the sums all of the shared memory that there is
HALF = BLOCK_V // 2
LOADER_REGISTERS, GROUP_REGISTERS = 24, 240


@gluon.jit
def gl_load_factors(
    grad_desc,
    x_desc,
    grads,
    xs,
    ready,
    empty,
    C,
    V,
    H,
    PROGRAMS,
    BLOCK_C: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One warp: fill the ring with the factors of every tile."""
    HALF: gl.constexpr = BLOCK_V // 2
    across = gl.cdiv(H, BLOCK_H)
    stage = 0
    phase = 1  # of a barrier on which nobody arrived, what was before is over
    for tile in range(gl.program_id(0), gl.cdiv(V, BLOCK_V) * across, PROGRAMS):
        row = tile // across * BLOCK_V
        col = tile % across * BLOCK_H
        for token in range(0, C, BLOCK_C):
            arrived = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(arrived, BLOCK_C * (BLOCK_V + BLOCK_H) * 2)
            load(grad_desc, [token, row], arrived, grads.index(stage * 2))
            load(grad_desc, [token, row + HALF], arrived, grads.index(stage * 2 + 1))
            load(x_desc, [token, col], arrived, xs.index(stage))
            stage += 1
            phase = gl.where(stage == STAGES, phase ^ 1, phase)
            stage = gl.where(stage == STAGES, 0, stage)


@gluon.jit
def gl_keep_sums(
    sum_desc,
    sums,
    arrived,
    added,
    V,
    H,
    PROGRAMS,
    SKIP,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
):
    """One warp: bring the old sums of every tile, and take the new ones away. It alone waits for either."""
    HALF: gl.constexpr = BLOCK_V // 2
    across = gl.cdiv(H, BLOCK_H)
    phase = 0
    for tile in range(gl.program_id(0), gl.cdiv(V, BLOCK_V) * across, PROGRAMS):
        row = tile // across * BLOCK_V
        col = tile % across * BLOCK_H
        for half in gl.static_range(2):
            tma.store_wait(1 - half)  # what is stored has left shared memory: in turn, first the first half
            mbarrier.expect(arrived.index(half), HALF * BLOCK_H * 2)
            load(sum_desc, [row + SKIP + half * HALF, col], arrived.index(half), sums.index(half))
        for half in gl.static_range(2):
            mbarrier.wait(added.index(half), phase)
            store(sum_desc, [row + half * HALF, col], sums.index(half))
        phase ^= 1
    tma.store_wait(0)


@gluon.jit
def gl_multiply(
    scale_ptr,
    grads,
    xs,
    sums,
    ready,
    empty,
    arrived,
    added,
    C,
    V,
    H,
    PROGRAMS,
    IS_LAST,
    BLOCK_C: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Four warps: the products of half of the rows of every tile, added to the old sum."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_H, 16])
    across = gl.cdiv(H, BLOCK_H)
    stage = 0
    before = 0
    phase = 0
    turn = 0
    kept = sums.index(GROUP)
    for tile in range(gl.program_id(0), gl.cdiv(V, BLOCK_V) * across, PROGRAMS):
        product = gl.zeros((BLOCK_V // 2, BLOCK_H), gl.float32, MMA)
        for token in range(0, C, BLOCK_C):
            mbarrier.wait(ready.index(stage), phase)
            grad = grads.index(stage * 2 + GROUP).permute((1, 0))
            product = warpgroup_mma(grad, xs.index(stage), product, is_async=True)
            product = warpgroup_mma_wait(1, deps=(product,))  # the one before has ended, and needs its factors no more
            mbarrier.arrive(empty.index(before), count=1, pred=token > 0)
            before = stage
            stage += 1
            phase = gl.where(stage == STAGES, phase ^ 1, phase)
            stage = gl.where(stage == STAGES, 0, stage)
        features = tile % across * BLOCK_H + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, MMA))
        scale = gl.load(scale_ptr + features, mask=features < H, other=1.0)[None, :]
        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(before), count=1)
        mbarrier.wait(arrived.index(GROUP), turn)
        new = product * scale + kept.load(MMA).to(gl.float16, bitcast=True).to(gl.float32)
        if IS_LAST != 0:
            kept.store((new * (1.0 / scale)).to(gl.bfloat16).to(gl.int16, bitcast=True))
        else:
            kept.store(new.to(gl.float16).to(gl.int16, bitcast=True))
        fence_async_shared()
        mbarrier.arrive(added.index(GROUP), count=1)
        turn ^= 1


@gluon.jit(do_not_specialize=["C", "V", "H", "PROGRAMS", "SKIP", "IS_LAST"])
def _add_product_hopper_kernel(
    scale_ptr,  # [H], fp32
    grad_desc,  # [C, V], bf16, in blocks of [BLOCK_C, BLOCK_V // 2]
    x_desc,  # [C, H], bf16, in blocks of [BLOCK_C, BLOCK_H]
    sum_desc,  # [V, H], int16: fp16, at last bf16; in blocks of [BLOCK_V // 2, BLOCK_H]
    C,
    V,
    H,
    PROGRAMS,
    SKIP,  # how far behind a tile its sum is read: V the first time, outside the matrix, where there are zeros
    IS_LAST,  # 0 or 1
    BLOCK_C: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    STAGES: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
):
    HALF: gl.constexpr = BLOCK_V // 2
    grads = gl.allocate_shared_memory(grad_desc.dtype, [STAGES * 2, BLOCK_C, HALF], grad_desc.layout)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_C, BLOCK_H], x_desc.layout)
    sums = gl.allocate_shared_memory(gl.int16, [2, HALF, BLOCK_H], sum_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for half in gl.static_range(2):
        mbarrier.init(arrived.index(half), count=1)
        mbarrier.init(added.index(half), count=1)
    fence_async_shared()
    # Written out: what a tuple holds that has a name is no constant any more.
    gl.warp_specialize(
        [
            (gl_multiply, (scale_ptr, grads, xs, sums, ready, empty, arrived, added, C, V, H, PROGRAMS, IS_LAST,
                           BLOCK_C, BLOCK_V, BLOCK_H, STAGES, 0)),
            (gl_multiply, (scale_ptr, grads, xs, sums, ready, empty, arrived, added, C, V, H, PROGRAMS, IS_LAST,
                           BLOCK_C, BLOCK_V, BLOCK_H, STAGES, 1)),
            (gl_load_factors, (grad_desc, x_desc, grads, xs, ready, empty, C, V, H, PROGRAMS,
                               BLOCK_C, BLOCK_V, BLOCK_H, STAGES)),
            (gl_keep_sums, (sum_desc, sums, arrived, added, V, H, PROGRAMS, SKIP, BLOCK_V, BLOCK_H)),
        ],
        [4, 1, 1],
        [GROUP_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def add_product(
    total: Tensor, grad: Tensor, x: Tensor, scale: Tensor, programs: int, *, is_first: bool, is_last: bool
) -> None:
    """Launch the kernel: as `_half_product.add_product`, rows of `x` aligned, in no more than `programs`."""
    (tokens, vocab), features = grad.shape, x.shape[1]
    programs = min(triton.cdiv(vocab, BLOCK_V) * triton.cdiv(features, BLOCK_H), programs)
    launch(
        _add_product_hopper_kernel,
        (programs,),
        scale,
        _described(grad, [BLOCK_C, HALF]),
        _described(x, [BLOCK_C, BLOCK_H]),
        _described(total.view(torch.int16), [HALF, BLOCK_H]),
        tokens,
        vocab,
        features,
        programs,
        vocab if is_first else 0,
        int(is_last),
        BLOCK_C=BLOCK_C,
        BLOCK_V=BLOCK_V,
        BLOCK_H=BLOCK_H,
        STAGES=STAGES,
        LOADER_REGISTERS=LOADER_REGISTERS,
        GROUP_REGISTERS=GROUP_REGISTERS,
        num_warps=4,
    )


def _described(matrix: Tensor, block: list[int]) -> Described:
    layout: Any = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return Described(matrix, list(matrix.shape), [matrix.stride(0), 1], block, layout)
