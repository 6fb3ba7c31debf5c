"""The gradient of the head's weight, summed over chunks of tokens.

A sum in bf16 is rounded once a chunk, and after 8 chunks is 1.4 to 2 times as far from the truth as a single product. A
sum in fp32 takes as much memory again as all else together. So bf16 models sum in fp16: two bytes as well, but 11 bits
of significand in the place of 8. Its narrow range is no matter as long as it is put to use. Each column is scaled by a
power of two so that the largest possible sum just fits; it then keeps all its bits over 28 octaves, and elements 38
octaves below the largest become 0. cuBLAS does not add a product of bf16 matrices to a sum in fp16, `_half_product.py`
does; its last call leaves the result in bf16 where the sum stood.

Relative error of the sum over 16384 tokens, over that of one product rounded once (simulated, logits in bf16):

    chunks                     4       8       16
    random logits     bf16     1.57    2.11    2.97
                      fp16     1.02    1.03    1.06
    a model's, Zipf   bf16     1.36    1.73    2.33
                      fp16     1.01    1.02    1.04
    peaked            either   1.00    1.00    1.01

On an H200, forward and backward of 16384 x 4096 x 128256 in 8 chunks and 16384 x 1024 x 151936 in 10, random logits:
error over eager's, memory beyond the inputs, time (of the three GEMMs alone: 76.5 and 23.0 ms). In fp16 as cuBLAS
adds up, with passes that turn both factors into fp16 and one back; what they cost now is in docs/performance.md:

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

from graphfuse.kernels._half_product import ALIGNED, add_product
from graphfuse.kernels._op import VECTOR_BYTES
from graphfuse.kernels._softmax_grad import Factors
from graphfuse.kernels._triton import HAS_TRITON

SUM_TOP = 2.0**15  # what the sum would become if the largest gradients and features met in all tokens

LARGEST_LSE = 1024.0  # a z-loss alone overflows at logits of twice this

# Of features that are nearly 0, of which infinity would make NaN. What is below the last digit, 2**-144, is 0 in bf16.
LARGEST_SCALE = 2.0**120


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
    """Whether memory is worth more than simplicity, and the kernel takes such a matrix."""
    fits = weight.is_contiguous() and weight.shape[1] % ALIGNED == 0
    return weight.is_cuda and HAS_TRITON and fits and weight.dtype == grad_dtype == torch.bfloat16


class WideSum:
    """A sum in a dtype that is no narrower than that of the factors."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.sum = torch.empty_like(weight, dtype=dtype)
        self.started = False

    def add(self, grad: Tensor, x: Tensor, *, is_last: bool) -> None:
        """Add the product of `grad`, (C, V), the gradient of a chunk of logits, and `x`, (C, H)."""
        for classes in whole_loads(grad.shape[1], grad):
            matmul_into(self.sum[classes], grad[:, classes].t(), x, accumulate=self.started)
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
        self.started = self.ended = False
        # Powers of two cost no bits. One after the other: their product may be too large for fp32.
        largest = torch.linalg.vector_norm(hidden, float("inf"), dim=0).float()
        most = 2.0 ** (max(hidden.shape[0], 1) - 1).bit_length()
        self.scale = (SUM_TOP / most / power_of_two(top) / power_of_two(largest)).clamp(max=LARGEST_SCALE)

    def add(self, grad: Tensor, x: Tensor, *, is_last: bool) -> None:
        """Add the product of `grad`, (C, V), the gradient of a chunk of logits, and `x`, (C, H)."""
        if x.is_cuda and HAS_TRITON:
            add_product(self.sum, grad, x, self.scale, is_first=not self.started, is_last=is_last)
        else:
            total = grad.float().t() @ x.float() * self.scale
            total += self.sum if self.started else 0.0
            (self.sum.view(x.dtype) if is_last else self.sum).copy_(total / self.scale if is_last else total)
        self.started, self.ended = True, is_last

    def total(self) -> Tensor:
        """Return the sum in bf16, (V, H), in the memory of the fp16 one."""
        total = self.sum.view(torch.bfloat16)
        return total if self.ended else total.zero_()


def power_of_two(x: Tensor) -> Tensor:
    """Return the power of two that is at least `x` and less than 2 x; 1 for 0."""
    mantissa, exponent = torch.frexp(x)
    return torch.where(mantissa == 0, 1.0, torch.ldexp(torch.ones_like(x), exponent))


def splits(x: Tensor) -> bool:
    """Whether products are cut where a dim ends inside a load."""
    return x.is_cuda


def whole_loads(length: int, x: Tensor) -> list[slice]:
    """Return the part of a dim, in tensors like `x`, that fills loads of 16 bytes, and the few elements behind it.

    cuBLAS has kernels of another decade for dims that do not: on an H200 they take 66 ms for the logits of 16384 tokens
    of 2048 features and 49155 classes and the gradient of the hidden states.
    """
    multiple = VECTOR_BYTES // x.element_size()
    whole = length // multiple * multiple
    if not splits(x) or whole in (0, length):
        return [slice(0, length)]
    return [slice(0, whole), slice(whole, length)]


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """Write a @ b to `out`, or add it; `out` may be wider than the factors."""
    if out.dtype != a.dtype and (not out.is_cuda or torch.version.hip):  # only CUDA multiplies into a wider dtype
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **wider)
    else:
        torch.mm(a, b, out=out, **wider)
