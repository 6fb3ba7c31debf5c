"""A sum of matrix products, each added to those before it as it is made.

    out = a_1 @ b_1 + ... + a_n @ b_n

The products of a sum are never there side by side, and no pass over memory adds them up: cuBLAS reads what it adds to
while it multiplies. Rounded once for each product, as eager's sums of gradients are.
"""
# Shape letters: M, N = rows and columns of the result, K = what is summed over, each product its own.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphfuse.kernels import _op

torch.library.define("graphfuse::sum_of_products", "(Tensor[] a, Tensor[] b) -> Tensor", tags=_op.TAGS)


def _sum(
    a: Sequence[Tensor],  # (M, K) each
    b: Sequence[Tensor],  # (K, N) each
) -> Tensor:
    out = torch.mm(a[0], b[0])
    for left, right in zip(a[1:], b[1:], strict=True):
        torch.addmm(out, left, right, out=out)
    return out


_op.implement("sum_of_products", _sum)


@torch.library.register_fake("graphfuse::sum_of_products")
def _(a, b):
    return a[0].new_empty(a[0].shape[0], b[0].shape[1])
