"""A tensor multiplied by a number where it stands: the gradient of the weight, as large as that, by the upstream one.

That is 1 where the loss is what backward starts from, and then nothing of the tensor is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._triton import launch, num_sms, tl, triton

BLOCK = 4096
PROGRAMS = 16  # on a multiprocessor


@triton.jit
def _scale_kernel(
    x_ptr,  # [n], dense
    scale_ptr,  # []
    n,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in tl.range(first, n, tl.num_programs(0) * BLOCK):
            offs = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs, mask=offs < n)
            tl.store(x_ptr + offs, (x.to(tl.float32) * scale).to(x_ptr.dtype.element_ty), mask=offs < n)


def scale_(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply `x`, of any layout, by a 0-d `scale` in place."""
    if not (_op.launches(x) and x.is_contiguous() and scale.device == x.device):
        return x.mul_(scale)
    if x.numel():
        # A program for each block would take longer to begin than to find that there is nothing to do.
        programs = min(triton.cdiv(x.numel(), BLOCK), PROGRAMS * num_sms(x.device))
        launch(_scale_kernel, (programs,), x, scale, x.numel(), BLOCK=BLOCK)
    return x


def _scale(x: Tensor, scale: Tensor) -> None:
    scale_(x, scale)


torch.library.define("graphfuse::scale_", "(Tensor(a!) x, Tensor scale) -> ()", tags=_op.TAGS)
_op.implement("scale_", _scale, repeats=True)


@torch.library.register_fake("graphfuse::scale_")
def _(x, scale):
    return None
