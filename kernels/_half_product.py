"""A product of bf16 matrices added to a sum in fp16: what cuBLAS does not have.

    sum <- sum + scale * gradᵀ x        and of the last one        out <- (sum + scale * gradᵀ x) / scale, in bf16

with a power of two for each column as scale. Both stand in the same memory. The products are those of the tensor cores,
added up in fp32; a program walks over tiles of the sum, and loads the factors of the next tile beside what it stores.

Hopper has a kernel of its own (`_half_product_hopper.py`), which is tried before it is used. This one, on an H200,
bf16, 2048 x 128256 x 4096 and 1664 x 151936 x 1024: 3.01 and 0.76 ms. cuBLAS takes 2.79 and 0.68 ms, all of
it in fp16, and another 0.25 and 0.25 ms to turn the one factor into fp16 and back. Tiles of 128 x 128 took 3.5 and
0.80 ms, of 256 x 128 3.3 and 0.80 ms, a program for each tile 3.03 and 0.81 ms.

Source: Triton's tutorial on persistent matrix products (tiles, tensor descriptors)
"""
# Shape letters: C = rows of the chunk (tokens), V = classes (vocabulary), H = features of a token.

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels._ahead import address, is_fake
from graphfuse.kernels._descriptor import Described
from graphfuse.kernels._triton import launch, num_sms, tl, triton

log = logging.getLogger("graphfuse")

ALIGNED = 8  # elements: rows of what a tensor descriptor describes start at multiples of 16 bytes

_tried: dict[int, bool] = {}  # whether Hopper's kernel was right, by device


# What is passed for one call and not for another is no constant: a variant takes more than a second to compile.
@triton.jit(do_not_specialize=["C", "PROGRAMS", "SKIP", "IS_LAST"])
def _add_product_kernel(
    scale_ptr,  # [H], fp32
    grad_desc,  # [C, V], in blocks of [BLOCK_C, BLOCK_V]
    x_desc,  # [C, H], in blocks of [BLOCK_C, BLOCK_H]
    bits_desc,  # [V, H], int16: fp16, at last the dtype of x; in blocks of [BLOCK_V, BLOCK_H // 2]
    C,
    V,
    H,
    PROGRAMS,
    SKIP,  # how far behind a tile its sum is read: V the first time, outside the matrix, where there are zeros
    IS_LAST,  # 0 or 1
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_H // 2
    across = tl.cdiv(H, BLOCK_H)
    for tile in tl.range(tl.program_id(0), tl.cdiv(V, BLOCK_V) * across, PROGRAMS, flatten=True):
        row = tile // across * BLOCK_V
        col = tile % across * BLOCK_H
        product = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
        for token in range(0, C, BLOCK_C):
            product = tl.dot(grad_desc.load([token, row]).T, x_desc.load([token, col]), product)
        # In halves, which take half the shared memory on their way out.
        left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK_V, 2, HALF)), (0, 2, 1)))
        for side in tl.static_range(2):
            half = left if side == 0 else right
            at = col + side * HALF
            features = at + tl.arange(0, HALF)
            scale = tl.load(scale_ptr + features, mask=features < H, other=1.0)[None, :]
            half *= scale
            half += bits_desc.load([row + SKIP, at]).to(tl.float16, bitcast=True).to(tl.float32)
            as_sum = half.to(tl.float16).to(tl.int16, bitcast=True)
            as_result = (half * (1.0 / scale)).to(x_desc.dtype).to(tl.int16, bitcast=True)
            bits_desc.store([row, at], tl.where(IS_LAST != 0, as_result, as_sum))


def add_product(total: Tensor, grad: Tensor, x: Tensor, scale: Tensor, *, is_first: bool, is_last: bool) -> None:
    """Launch the kernel.

    Args:
        total: (V, H), fp16, contiguous; what it holds is overwritten if `is_first`, and bf16 afterwards if `is_last`.
        grad: (C, V), bf16; rows of any distance, dense.
        x: (C, H), bf16.
        scale: (H,), fp32, powers of two.
        is_first: whether nothing was added so far.
        is_last: whether nothing will be.
    """
    if x.stride(1) != 1 or x.stride(0) < x.shape[1] or x.stride(0) % ALIGNED or address(x) % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    (tokens, vocab), features = grad.shape, x.shape[1]
    device = x.get_device()
    hopper = _hopper(device) if x.dtype == torch.bfloat16 else None
    if hopper is not None and features >= hopper.BLOCK_H and (is_fake(x) or _is_right(device)):
        hopper.add_product(total, grad, x, scale, num_sms(x.device), is_first=is_first, is_last=is_last)
        return
    tile = _tile(features, device)
    tiles = triton.cdiv(vocab, tile["BLOCK_V"]) * triton.cdiv(features, tile["BLOCK_H"])
    programs = min(tiles, num_sms(x.device))
    half = [tile["BLOCK_V"], tile["BLOCK_H"] // 2]
    launch(
        _add_product_kernel,
        (programs,),
        scale,
        Described(grad, [tokens, vocab], [grad.stride(0), 1], [tile["BLOCK_C"], tile["BLOCK_V"]]),
        Described(x, [tokens, features], [x.stride(0), 1], [tile["BLOCK_C"], tile["BLOCK_H"]]),
        Described(total.view(torch.int16), [vocab, features], [features, 1], half),
        tokens,
        vocab,
        features,
        programs,
        vocab if is_first else 0,
        int(is_last),
        **tile,
    )


@cache
def _hopper(device: int) -> Any:
    """Return the kernel's module for Hopper, or None: on other devices, or where Triton has another Gluon."""
    if device < 0 or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from graphfuse.kernels import _half_product_hopper
    except Exception as error:
        log.debug("products are added by Triton's kernel: %s", error)
        return None
    return _half_product_hopper


def _is_right(device: int) -> bool:
    """Whether Hopper's kernel computes what it should, where it has run; a CUDA graph has to know before."""
    if device in _tried:
        return _tried[device]
    if torch.cuda.is_current_stream_capturing():
        return False
    try:
        _tried[device] = _tries(device)
    except torch.OutOfMemoryError:
        return False  # there may be room the next time
    except Exception as error:
        log.warning("products are added by Triton's kernel: %s", error)
        _tried[device] = False
    return _tried[device]


def _tries(device: int) -> bool:
    """Add two products, of tiles that are not whole, in more than one round of programs."""
    numbers = torch.Generator(device=f"cuda:{device}").manual_seed(0)
    on: dict[str, Any] = {"generator": numbers, "device": numbers.device}
    tokens, vocab, features = 200, 1000, 320
    scale = torch.full((features,), 0.25, dtype=torch.float32, device=numbers.device)
    total = torch.empty(vocab, features, dtype=torch.float16, device=numbers.device)
    expected = torch.zeros(vocab, features, dtype=torch.float32, device=numbers.device)
    for is_last in (False, True):
        grad, x = (torch.randn(tokens, width, **on).to(torch.bfloat16) for width in (vocab, features))
        _hopper(device).add_product(total, grad, x, scale, 5, is_first=not is_last, is_last=is_last)
        expected += grad.float().t() @ x.float()
    off = (total.view(torch.bfloat16).float() - expected).abs().amax() / expected.abs().amax()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)  # it is waited for, once in a process
    try:
        return bool(off < 2.0**-7)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@cache
def _tile(features: int, device: int) -> dict[str, Any]:
    """Return the sizes of a tile, and the launch options."""
    widest = min(256, max(32, triton.next_power_of_2(features)))
    if device < 0:  # the interpreter
        return {"BLOCK_C": 16, "BLOCK_V": 32, "BLOCK_H": min(widest, 64), "num_warps": 4, "num_stages": 1}
    if torch.cuda.get_device_capability(device)[0] in (9, 10):
        return {"BLOCK_C": 64, "BLOCK_V": 128, "BLOCK_H": widest, "num_warps": 8, "num_stages": 3}
    # Less shared memory: 99 KiB, also where the number is larger (12), and mostly no copy engine that fills it.
    return {"BLOCK_C": 32, "BLOCK_V": 128, "BLOCK_H": min(widest, 128), "num_warps": 4, "num_stages": 3}
