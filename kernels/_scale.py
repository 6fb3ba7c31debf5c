"""A tensor multiplied by a number where it stands: the gradient of the weight, as large as that, by the upstream one.

That is 1 where the loss is what backward starts from, and then nothing of the tensor is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._triton import launch, tl, triton

BLOCK = 4096


@triton.jit
def _scale_kernel(
    x_ptr,  # [n], dense
    scale_ptr,  # []
    n,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n)
        tl.store(x_ptr + offs, (x.to(tl.float32) * scale).to(x_ptr.dtype.element_ty), mask=offs < n)


def scale_(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply `x`, of any layout, by a 0-d `scale` in place."""
    if not (_op.launches(x) and x.is_contiguous() and scale.device == x.device):
        return x.mul_(scale)
    if x.numel():
        launch(_scale_kernel, (triton.cdiv(x.numel(), BLOCK),), x, scale, x.numel(), BLOCK=BLOCK)
    return x


def _scale(x: Tensor, scale: Tensor) -> None:
    scale_(x, scale)


torch.library.define("graphfuse::scale_", "(Tensor(a!) x, Tensor scale) -> ()", tags=_op.TAGS)
_op.implement("scale_", _scale, repeats=True)


@torch.library.register_fake("graphfuse::scale_")
def _(x, scale):
    return None
