"""The gradient of the head's weight, summed over chunks of tokens.

A sum in bf16 is rounded once a chunk, and after 8 chunks is 1.4 to 2 times as far from the truth as a single product. A
sum in fp32 takes as much memory again as all else together. So bf16 models sum in fp16: two bytes as well, but 11 bits
of significand in the place of 8. Its narrow range is no matter as long as it is put to use. The gradient of the logits
and each feature are scaled by powers of two so that their largest values, and the largest possible sum, just fit; both
factors, and the sum, then keep all their bits over 28 octaves, and elements 38 octaves below the largest become 0. At
the end the sum is turned into bf16 where it stands.

cuBLAS wants both factors in fp16 for that. The pass over the logits writes their gradient so, in the memory of the bf16
logits; it is turned into bf16 there for the product with the weight, once it has been added. The hidden states' fp16
copy stands where their gradient is going to.

Relative error of the sum over 16384 tokens, over that of one product rounded once (simulated, logits in bf16):

    chunks                     4       8       16
    random logits     bf16     1.57    2.11    2.97
                      fp16     1.02    1.03    1.06
    a model's, Zipf   bf16     1.36    1.73    2.33
                      fp16     1.01    1.02    1.04
    peaked            either   1.00    1.00    1.01

On an H200, forward and backward of 16384 x 4096 x 128256 in 8 chunks and 16384 x 1024 x 151936 in 10, random logits:
error over eager's, memory beyond the inputs, time (of the three GEMMs alone: 76.5 and 23.0 ms):

    fp16    1.05, 1.594 GiB, 83.8 ms      1.06, 0.793 GiB, 32.0 ms
    bf16    1.36, 1.594 GiB, 80.7 ms      1.59, 0.793 GiB, 29.7 ms
    fp32    1.00, 3.551 GiB, 83.7 ms      1.00, 1.373 GiB, 30.4 ms

Not taken: chunks of tokens sorted by label (in bf16 5 times the error, where a row's positive and negative parts then
meet late); a second bf16 matrix for what the first rounds away (as large as fp32).
"""
# Shape letters: N = tokens, H = features of a token, V = classes (vocabulary), L = row stride of the chunk.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels._softmax_grad import Factors
from graphfuse.kernels._triton import HAS_TRITON, launch, tl, triton

GRAD_TOP = 2.0**15  # what the largest possible gradient of a logit becomes
FEATURE_TOP = 2.0**8  # what the largest value of a feature becomes
SUM_TOP = 2.0**15  # what the sum would become if all of them met

LARGEST_LSE = 1024.0  # a z-loss alone overflows at logits of twice this

CONVERT_BLOCK = 4096
CONVERT_ROWS = 1024  # of the matrix at a time, without Triton


def weight_grad(
    weight: Tensor,
    hidden: Tensor,
    factors: Factors,
    class_weight: Tensor | None,
    logit_scale: float,
    sum_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> WideSum | HalfSum:
    """Choose how to sum: in `sum_dtype`, that of the result if there is one chunk, or in fp16 for bf16 on a GPU."""
    if sum_dtype == grad_dtype or not sums_in_half(weight, grad_dtype):
        return WideSum(weight, sum_dtype)
    classes = weight.shape[0] if class_weight is None else class_weight.abs().sum()
    bounds = zip(factors, (1, classes, 1, 2 * LARGEST_LSE), strict=True)
    top = torch.stack([factor.abs().amax() * bound for factor, bound in bounds if factor is not None]).sum()
    return HalfSum(weight, hidden, top * abs(logit_scale))


def sums_in_half(weight: Tensor, grad_dtype: torch.dtype) -> bool:
    """Whether memory is worth more than simplicity."""
    return weight.is_cuda and grad_dtype == torch.bfloat16


class WideSum:
    """A sum in a dtype that is no narrower than that of the factors."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.sum = torch.empty_like(weight, dtype=dtype)
        self.started = False

    def add(self, grad: Tensor, x: Tensor) -> None:
        """Add the product of `grad`, (C, V), the gradient of a chunk of logits, and `x`, (C, H)."""
        matmul_into(self.sum, grad.t(), x, accumulate=self.started)
        self.started = True

    def total(self) -> Tensor:
        """Return the sum, (V, H)."""
        return self.sum if self.started else self.sum.zero_()


class HalfSum:
    """A sum of bf16 products in scaled fp16.

    Args:
        weight: (V, H).
        hidden: (N, H), all that will be added, or more.
        top: 0-d, bound of the gradient of a logit.
    """

    def __init__(self, weight: Tensor, hidden: Tensor, top: Tensor) -> None:
        self.sum = torch.empty_like(weight, dtype=torch.float16)
        self.started = False
        # Powers of two cost no bits.
        self.from_grad = GRAD_TOP / power_of_two(top)
        self.from_x = FEATURE_TOP / power_of_two(torch.linalg.vector_norm(hidden, float("inf"), dim=0).float())
        self.alpha = SUM_TOP / (GRAD_TOP * FEATURE_TOP * 2.0 ** (hidden.shape[0] - 1).bit_length())
        self.to_sum = 1.0 / (self.alpha * self.from_grad * self.from_x)

    def scaled(self, factor: Tensor) -> Tensor:
        """Return what must multiply the losses for their gradient to be scaled."""
        return factor * self.from_grad

    def add(self, grad: Tensor, x: Tensor, room: Tensor | None) -> None:
        """Add the product of `grad`, (C, V), scaled and in fp16, and `x`, (C, H), bf16.

        `room` is memory of the size of `x`, or `x` itself if it is of no more use.
        """
        half = torch.empty_like(x, dtype=torch.float16) if room is None else room.view(torch.float16)
        if room is x:
            convert_(x, torch.float16, self.from_x)
        else:
            torch.mul(x, self.from_x, out=half)
        torch.addmm(self.sum, grad.t(), half, beta=int(self.started), alpha=self.alpha, out=self.sum)
        self.started = True

    def restored(self, chunk: Tensor) -> Tensor:
        """Turn a chunk, (C, L), from scaled fp16 back into bf16, in its memory."""
        return convert_(chunk.view(torch.float16), torch.bfloat16, 1.0 / self.from_grad)

    def total(self) -> Tensor:
        """Return the sum in bf16, (V, H), in the memory of the fp16 one."""
        if not self.started:
            self.sum.zero_()
        return convert_(self.sum, torch.bfloat16, self.to_sum)


def power_of_two(x: Tensor) -> Tensor:
    """Return the power of two that is at least `x` and less than 2 x; 1 for 0."""
    mantissa, exponent = torch.frexp(x)
    return torch.where(mantissa == 0, 1.0, torch.ldexp(torch.ones_like(x), exponent))


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """Write a @ b to `out`, or add it; `out` may be wider than the factors."""
    if out.dtype != a.dtype and (not out.is_cuda or torch.version.hip):  # only CUDA multiplies into a wider dtype
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **wider)
    else:
        torch.mm(a, b, out=out, **wider)


@triton.jit
def _convert_kernel(
    x_ptr,  # [n], dense
    y_ptr,  # [n], the same memory
    scale_ptr,  # [COUNT], fp32
    n,
    STEP,  # elements between one scale and the next
    COUNT,
    LARGEST: tl.constexpr,  # of y
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    scale = tl.load(scale_ptr + offs // STEP % COUNT, mask=mask, other=0.0)
    y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale
    y = tl.where(y > LARGEST, LARGEST, tl.where(y < -LARGEST, -LARGEST, y))  # NaN stays what it is
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def convert_(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """Multiply a dense matrix by a 0-d scale, or one for each column, and leave it in its memory in another dtype."""
    out = x.view(dtype)
    largest = torch.finfo(dtype).max
    if not (x.is_cuda and HAS_TRITON):
        for start in range(0, x.shape[0], CONVERT_ROWS):
            rows = slice(start, start + CONVERT_ROWS)
            out[rows] = (x[rows].float() * scale).clamp(-largest, largest)
        return out
    assert x.is_contiguous() or x.t().is_contiguous(), "the kernel walks over memory"
    step = 1 if x.is_contiguous() else x.shape[0]
    if x.numel():
        launch(
            _convert_kernel,
            (triton.cdiv(x.numel(), CONVERT_BLOCK),),
            x,
            out,
            scale,
            x.numel(),
            step,
            scale.numel(),
            LARGEST=largest,
            BLOCK=CONVERT_BLOCK,
        )
    return out
