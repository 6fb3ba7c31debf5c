"""A second product that is added to the chunks of logits, of few features: the adapter of a head.

It is not appended to the first one, as columns of the hidden states and the weight: a copy of the weight is the largest
tensor there is, and a frozen weight would need a gradient. Adding it reads and writes each chunk once more: at 4096
features 4 % of the time of a frozen head's GEMMs, by the bytes and the rates of an H200.

Adapters are often kept in fp32 beside a bf16 head, and a GEMM takes one dtype. An fp32 matrix is a sum of two bf16 ones
to 16 bits, high + low, so that (high + low)(high + low) but for low times low is one product of three times the
features, which are few.
"""
# Shape letters: N = tokens, R = features of the second product, V = classes, C = tokens of a chunk.

from __future__ import annotations

import torch
from torch import Tensor

from graphfuse.kernels._weight_grad import matmul_into


class LowRank:
    """The second product, if there is one, and its gradients as far as they are needed.

    Args:
        hidden: (N, R), the dtype of the logits or fp32.
        weight: (V, R), dtype of `hidden`; `None`, as that, where nothing is added.
        dtype: that of the logits.
        sum_dtype: that in which gradients are summed.
        needs: whether `hidden` gets a gradient, and `weight`.
    """

    def __init__(
        self,
        hidden: Tensor | None,
        weight: Tensor | None,
        dtype: torch.dtype,
        sum_dtype: torch.dtype,
        needs: tuple[bool, bool],
    ) -> None:
        self.factors: tuple[Tensor, Tensor] | None = None
        self.grad_hidden = self.grad_weight = None
        if hidden is None or weight is None:
            return
        self.rank = hidden.shape[1]
        self.width = self.rank if hidden.dtype == dtype else 2 * self.rank
        self.factors = hidden, weight
        if hidden.dtype != dtype:
            (high, low), (weight_high, weight_low) = _split(hidden, dtype), _split(weight, dtype)
            self.factors = (
                torch.cat((high, low, high), 1),
                torch.cat((weight_high, weight_high, weight_low), 1),
            )
        self.grad_hidden = hidden.new_zeros(hidden.shape, dtype=sum_dtype) if needs[0] else None
        self.grad_weight = weight.new_zeros(weight.shape[0], self.width, dtype=sum_dtype) if needs[1] else None

    def add_to(self, logits: Tensor, rows: Tensor | slice) -> None:
        """Add the product for some tokens to their logits, (C, V)."""
        if self.factors is not None:
            torch.addmm(logits, self.factors[0][rows], self.factors[1].t(), out=logits)

    def add_grads(self, grad: Tensor, rows: Tensor | slice) -> None:
        """Add what the gradient of these logits, (C, V), contributes."""
        if self.factors is None:
            return
        hidden, weight = self.factors[0][rows, : self.width], self.factors[1][:, -self.width :]
        if self.grad_weight is not None:
            matmul_into(self.grad_weight, grad.t(), hidden, accumulate=True)
        if self.grad_hidden is not None:
            found = self.grad_hidden.new_empty(hidden.shape)
            matmul_into(found, grad, weight)
            self.grad_hidden[rows] = self._joined(found)

    def grads(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients, in the dtype of their sums: (N, R), (V, R)."""
        return self.grad_hidden, None if self.grad_weight is None else self._joined(self.grad_weight)

    def _joined(self, found: Tensor) -> Tensor:
        return found if self.width == self.rank else found[:, : self.rank] + found[:, self.rank :]


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two tensors of a narrower dtype that add up to `x`, nearly."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)
