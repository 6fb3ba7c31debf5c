"""Linear layer and cross-entropy, of which the logits never exist as a whole.

    z_t    = softcap(logit_scale * (hidden_t @ weight^T + bias))
    loss_t = cross_entropy(z_t, target_t) + z_loss * logsumexp(z_t) ** 2
    loss   = sum_t loss_t / count        count: counted tokens, or the sum of their targets' class weights

Tokens go through in chunks. A chunk of logits comes out of one GEMM, one pass turns it into its own gradient in place,
and two more GEMMs take that into the gradients of `hidden` and `weight`: a scalar loss has its gradients, up to the
factor that backward multiplies in, before forward returns, and no chunk is computed twice. Per-token losses
(reduction "none") and log-probabilities have an upstream gradient of their own each, so there backward computes the
chunks again. Tokens that count for nothing are left out of all of it.

Source: Liger-Kernel, https://arxiv.org/abs/2410.10989 (gradients in forward, chunk by chunk).
"""
# Shape letters: N = tokens, H = features of a token, V = classes (vocabulary).

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels import _head_ops as _  # noqa: F401  (registers the ops)
from graphfuse.kernels._loss import (
    LossOptions,
    check_loss,
    check_softcap,
    check_target,
    cross_entropy_reference,
    reduced,
    reject_transforms,
)
from graphfuse.kernels._op import DTYPES, check_device, compute_dtype
from graphfuse.kernels._softmax_grad import NO_TARGET

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference", "linear_log_probs"]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: LossOptions,
    reduction: str,
    logits_dtype: torch.dtype,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Say what the op computes, in differentiable torch operations on whole logits."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    if low_rank is not None:
        z = (z + torch.nn.functional.linear(*low_rank)).to(hidden.dtype)
    return cross_entropy_reference(z, target, class_weight, options, reduction, logits_dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    low_rank: tuple[Tensor, Tensor] | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    compact: bool | None = None,
) -> Tensor:
    """Compute the cross-entropy of a linear layer's output, without that output.

        z[t]    = softcap * tanh(logit_scale * (hidden[t] @ weight.T + bias) / softcap)
        loss[t] = cross_entropy(z[t], target[t]) + z_loss * logsumexp(z[t]) ** 2

    Args:
        hidden: (..., H), fp16, bf16, fp32 or fp64.
        weight: (V, H), dtype of `hidden`.
        target: (...), int64 or int32, in [0, V) or `ignore_index`. Elsewhere: an IndexError on CPU, NaN on CUDA.
        bias: (V,), dtype of `hidden`.
        ignore_index: Tokens of this target count for nothing; their gradient is 0.
        reduction: "mean", "sum" or "none". The first two compute the gradients in forward. A mean over no token that
            counts is NaN, its gradients are 0.
        label_smoothing: In [0, 1], the share of the target spread over all classes.
        class_weight: (V,), any float dtype; weighs tokens and their mean as `torch.nn.functional.cross_entropy` does.
        logit_scale: Factor of the logits, before the soft cap.
        softcap: Bound of the logits; `None` or 0 for none.
        z_loss: Factor of the squared log-sum-exp, averaged or summed as the loss is, without class weights.
        low_rank: (..., R) and (V, R), both of the dtype of `hidden` or both fp32: hidden states and weight of a second
            product that is added to the first, before the scale. What an adapter (LoRA) on the head is.
        logits_dtype: Dtype of the loss. Default: fp32, fp64 for fp64, whatever the dtype of `hidden` rounds to.
        chunk_size: Tokens whose logits exist at a time; `None` or 0 chooses.
        compact: Leave tokens out that do not count. On CUDA the host waits for the number of those that do, which a
            CUDA graph cannot capture. `None`: where it pays, and never while capturing.

    Returns:
        The loss, of `logits_dtype`: 0-d, or of the shape of `target` with reduction "none".

    Raises:
        TypeError: A dtype is not one of those above, or `weight` or `bias` has another than `hidden`.
        ValueError: Shapes do not fit, or an option is out of its range.
        IndexError: On CPU, a target is outside the classes.
        RuntimeError: In backward, with `create_graph`: there is no second derivative. Under `torch.func.grad` and
            others that make derivatives without autograd (`vmap` alone is fine).

    Numerics: logits are rounded to the dtype of `hidden` once, the rest is fp32 (fp64 for fp64) until the gradient of
    the logits is rounded for the last two GEMMs. The weight's gradient is summed over the chunks in fp32, and in
    scaled fp16 for bf16 on a GPU, which is as good as one product there (see `_weight_grad.py`). Results are
    deterministic.
    Source: Liger-Kernel, https://arxiv.org/abs/2410.10989
    """
    check_loss(reduction, label_smoothing, logits_dtype)
    head = prepare(hidden, weight, target, bias, low_rank, class_weight, logit_scale, softcap, chunk_size, compact)
    compute = compute_dtype(hidden.dtype)
    loss = reduced(
        head,
        target,
        weight.shape[0],
        compute,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        z_loss=z_loss,
    )
    return loss.to(logits_dtype or compute)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    chunk_size: int | None = None,
    compact: bool | None = None,
) -> Tensor:
    """Compute the log-probability of one class for each token, under a linear layer's softmax.

        z[t]    = softcap * tanh(logit_scale * (hidden[t] @ weight.T + bias) / softcap)
        logp[t] = log_softmax(z[t])[target[t]]

    Args:
        hidden: (..., H), fp16, bf16, fp32 or fp64.
        weight: (V, H), dtype of `hidden`.
        target: (...), int64 or int32, in [0, V) or `ignore_index`. Elsewhere: an IndexError on CPU, NaN on CUDA.
        bias: (V,), dtype of `hidden`.
        ignore_index: Tokens of this target are left out: their result and their gradient are 0.
        logit_scale: Factor of the logits, before the soft cap: the inverse of a temperature.
        softcap: Bound of the logits; `None` or 0 for none.
        low_rank: As in `linear_cross_entropy`.
        chunk_size: Tokens whose logits exist at a time; `None` or 0 chooses.
        compact: As in `linear_cross_entropy`. In backward, tokens whose upstream gradient is 0 are left out too.

    Returns:
        (...), fp32, fp64 for fp64.

    Raises:
        TypeError: A dtype is not one of those above, or `weight` or `bias` has another than `hidden`.
        ValueError: Shapes do not fit, or an option is out of its range.
        IndexError: On CPU, a target is outside the classes.
        RuntimeError: In backward, with `create_graph`: there is no second derivative. Under `torch.func.grad` and
            others that make derivatives without autograd (`vmap` alone is fine).

    Numerics: as in `linear_cross_entropy`; backward computes the logits again.
    Source: Liger-Kernel, https://arxiv.org/abs/2410.10989
    """
    head = prepare(hidden, weight, target, bias, low_rank, None, logit_scale, softcap, chunk_size, compact)
    target = target.reshape(-1).to(torch.int64)
    target = torch.where(target != ignore_index, target, NO_TARGET)
    found = head.each(target, None, skip=True, wants=(True, False, False))
    return -found[0].reshape(head.shape)


class _Head(NamedTuple):
    """Checked arguments of the ops."""

    hidden: Tensor  # (N, H)
    weight: Tensor
    bias: Tensor | None
    low_hidden: Tensor | None  # (N, R)
    low_weight: Tensor | None
    shape: torch.Size  # of the tokens
    options: tuple[float, float, int, bool | None]  # of the schemas

    def sum(self, target: Tensor, class_weight: Tensor | None, *factors: Tensor | None) -> Tensor:
        """Return the tokens' losses, weighted and summed."""
        tensors = self[:5]
        needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]
        loss: Tensor = torch.ops.graphfuse.linear_cross_entropy(
            *tensors, target, class_weight, *factors, *self.options, needs
        )[0]
        return loss

    def each(
        self, target: Tensor, class_weight: Tensor | None, *, skip: bool, wants: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens' losses."""
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.graphfuse.linear_token_losses(
            *self[:5], target, class_weight, *self.options, *wants, skip
        )
        return found


def _is_autocast(hidden: Tensor) -> bool:
    return torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64


def prepare(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    class_weight: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    chunk_size: int | None,
    compact: bool | None,
) -> _Head:
    """Check arguments that several functions share, and cast them as autocast asks for."""
    low_hidden, low_weight = low_rank or (None, None)
    if _is_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias, low_hidden, low_weight = (None if t is None else t.to(dtype) for t in (bias, low_hidden, low_weight))
    _check(hidden, weight, target, bias, class_weight)
    given = {"hidden": hidden, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    check_device(**given, low_rank=low_hidden)
    if low_hidden is not None and low_weight is not None:
        _check_low_rank(low_hidden, low_weight, hidden, weight)
        low_hidden = low_hidden.reshape(target.numel(), low_hidden.shape[-1])
    check_softcap(softcap)
    if chunk_size is not None and chunk_size < 0:
        raise ValueError(f"chunk_size: expected None or a number of tokens, got {chunk_size}")
    reject_transforms(hidden, weight, bias, low_hidden, low_weight)
    rows = hidden.reshape(target.numel(), hidden.shape[-1])
    options = (logit_scale, softcap or 0.0, chunk_size or 0, compact)
    return _Head(rows, weight, bias, low_hidden, low_weight, target.shape, options)


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None) -> None:
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden: expected fp16, bf16, fp32 or fp64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected {hidden.dtype}, the dtype of hidden, got {weight.dtype}")
    if hidden.ndim == 0:
        raise ValueError("hidden: expected at least 1 dimension, got 0")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least 1 class, got shape {tuple(weight.shape)}")
    check_target(target, hidden.shape[:-1])
    if bias is not None and bias.dtype != hidden.dtype:
        raise TypeError(f"bias: expected {hidden.dtype}, the dtype of hidden, got {bias.dtype}")
    if class_weight is not None and class_weight.dtype not in DTYPES:
        raise TypeError(f"class_weight: expected fp16, bf16, fp32 or fp64, got {class_weight.dtype}")
    for name, vector in (("bias", bias), ("class_weight", class_weight)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape ({weight.shape[0]},), got {tuple(vector.shape)}")


def _check_low_rank(low_hidden: Tensor, low_weight: Tensor, hidden: Tensor, weight: Tensor) -> None:
    if low_hidden.dtype != low_weight.dtype or low_hidden.dtype not in (hidden.dtype, compute_dtype(hidden.dtype)):
        dtypes = f"{low_hidden.dtype} and {low_weight.dtype}"
        raise TypeError(f"low_rank: expected both {hidden.dtype}, the dtype of hidden, or both fp32, got {dtypes}")
    rank = low_weight.shape[-1] if low_weight.ndim else 0
    expected = (*hidden.shape[:-1], rank), (weight.shape[0], rank)
    if (low_hidden.shape, low_weight.shape) != expected:
        found = f"{tuple(low_hidden.shape)} and {tuple(low_weight.shape)}"
        tokens = ", ".join(map(str, hidden.shape[:-1]))
        raise ValueError(f"low_rank: expected shapes ({tokens}, R) and ({weight.shape[0]}, R), got {found}")
