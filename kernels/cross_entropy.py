"""Cross-entropy of logits that are there, without a copy of them in a wider dtype.

    z_t    = softcap(logit_scale * logits_t)
    loss_t = cross_entropy(z_t, target_t) + z_loss * logsumexp(z_t) ** 2
    loss   = sum_t loss_t / count        count: counted tokens, or the sum of their targets' class weights

For logits that something else needs too, or that no matrix product gives: else `linear_cross_entropy` need not have
them at all. Forward reads them once and keeps nothing of their size; backward reads them once more and writes their
gradient, in their own dtype. Tokens that count for nothing are not read.

Source: Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867 (one pass for the softmax's denominator).
"""
# Shape letters: N = tokens, V = classes (vocabulary).

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._cross_entropy_kernel import (
    token_losses_gradient_reference,
    token_losses_gradient_triton,
    token_losses_reference,
    token_losses_triton,
)
from graphfuse.kernels._loss import check_loss, check_softcap, check_target, reduced, reject_transforms
from graphfuse.kernels._softmax_grad import NO_TARGET, Factors, Logits, TokenLosses

__all__ = ["TokenLogits", "cross_entropy"]

_OPTIONS = "float logit_scale, float softcap"

torch.library.define(
    "graphfuse::token_losses",
    "(Tensor logits, Tensor target, Tensor? counted, Tensor? class_weight, "
    f"{_OPTIONS}, bool want_nll, bool want_smooth, bool want_lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::token_losses_backward",
    "(Tensor? nll_grad, Tensor? smooth_grad, Tensor? lse_grad, Tensor logits, Tensor target, Tensor? class_weight, "
    f"Tensor top, Tensor total, {_OPTIONS}) -> Tensor",
    tags=_op.TAGS,
)


def _forward(
    logits: Tensor,
    target: Tensor,
    counted: Tensor | None,
    class_weight: Tensor | None,
    logit_scale: float,
    softcap: float,
    *wants: bool,
) -> tuple[Tensor, ...]:
    *losses, top, total = _empty_numbers(logits, wants)
    given = TokenLosses(*(each if want else None for each, want in zip(losses, wants, strict=True)))
    run = token_losses_triton if _op.launches(logits) else token_losses_reference
    run(
        _dense(logits),
        target.contiguous(),
        None if counted is None else counted.contiguous(),
        None if class_weight is None else class_weight.to(top.dtype).contiguous(),
        Logits(logit_scale, softcap),
        given,
        top,
        total,
    )
    return *losses, top, total


def _backward(
    nll_grad: Tensor | None,
    smooth_grad: Tensor | None,
    lse_grad: Tensor | None,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    top: Tensor,
    total: Tensor,
    logit_scale: float,
    softcap: float,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    run = token_losses_gradient_triton if _op.launches(logits) else token_losses_gradient_reference
    run(
        _dense(logits),
        grad,
        target.contiguous(),
        None if class_weight is None else class_weight.to(top.dtype).contiguous(),
        Logits(logit_scale, softcap),
        top,
        total,
        Factors(nll_grad, smooth_grad, lse_grad).map(lambda factor: factor.to(top.dtype).contiguous()),
    )
    return grad


def _dense(logits: Tensor) -> Tensor:
    """Rows without gaps between their classes."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _empty_numbers(logits: Tensor, wants: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Nll, smooth and lse, empty where they are not wanted, and what backward needs of each row."""
    dtype = _op.compute_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[0] if want else 0, dtype=dtype) for want in (*wants, True, True))


_op.implement("token_losses", _forward, repeats=True)
_op.implement("token_losses_backward", _backward, repeats=True)


@torch.library.register_fake("graphfuse::token_losses")
def _(logits, *args: Any):
    return _empty_numbers(logits, args[-3:])


@torch.library.register_fake("graphfuse::token_losses_backward")
def _(nll_grad, smooth_grad, lse_grad, logits, *args: Any):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, _, class_weight, *options = inputs
    ctx.set_materialize_grads(False)
    unwanted = [each for each, want in zip(output, options[2:], strict=False) if not want]
    ctx.mark_non_differentiable(*unwanted, *output[3:])
    ctx.options = options[:2]
    ctx.save_for_backward(logits, target, class_weight, *output[3:])


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _op.refuse_second_derivative("cross_entropy")
    rest = (None,) * (len(ctx.needs_input_grad) - 1)
    if all(grad is None for grad in grads[:3]):
        return None, *rest
    found = torch.ops.graphfuse.token_losses_backward(*grads[:3], *ctx.saved_tensors, *ctx.options)
    return found, *rest


torch.library.register_autograd("graphfuse::token_losses", _autograd, setup_context=_setup)


class TokenLogits(NamedTuple):
    """Logits as a source of losses."""

    logits: Tensor  # (N, V)
    logit_scale: float = 1.0
    softcap: float = 0.0

    def sum(self, target: Tensor, class_weight: Tensor | None, *factors: Tensor | None) -> Tensor:
        """Return the tokens' losses, weighted and summed; those whose factors are all 0 are not read."""
        nll, smooth, lse, square = factors
        wants = (nll is not None, smooth is not None, lse is not None or square is not None)
        found = self._run(target, Factors(*factors).any(), class_weight, wants)
        total: Tensor | None = None
        for k, factor in enumerate(factors):
            if factor is not None:
                each = found[k] if k < len(found) else found[2] * found[2]
                term = torch.where(factor == 0, 0, factor * each)
                total = term if total is None else total + term
        assert total is not None, "factors: expected at least one"
        return total.sum()

    def each(
        self, target: Tensor, class_weight: Tensor | None, *, skip: bool, wants: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens' losses; with `skip`, those without a target are not read."""
        return self._run(target, target != NO_TARGET if skip else None, class_weight, wants)

    def _run(
        self, target: Tensor, counted: Tensor | None, class_weight: Tensor | None, wants: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = torch.ops.graphfuse.token_losses.default(
            self.logits, target, counted, class_weight, self.logit_scale, self.softcap, *wants
        )
        return found[0], found[1], found[2]


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute the cross-entropy of logits, as `torch.nn.functional.cross_entropy` does for class indices.

        z[t]    = softcap * tanh(logit_scale * logits[t] / softcap)
        loss[t] = cross_entropy(z[t], target[t]) + z_loss * logsumexp(z[t]) ** 2

    Args:
        logits: (..., V), fp16, bf16, fp32 or fp64. Read where they are if the tokens have one stride and the classes
            stride 1; otherwise a contiguous copy is, each way.
        target: (...), int64 or int32, in [0, V) or `ignore_index`. Elsewhere: an IndexError on CPU, NaN on CUDA.
        ignore_index: Tokens of this target count for nothing; their gradient is 0.
        reduction: "mean", "sum" or "none". A mean over no token that counts is NaN, its gradients are 0.
        label_smoothing: In [0, 1], the share of the target spread over all classes.
        class_weight: (V,), any float dtype; weighs tokens and their mean as `torch.nn.functional.cross_entropy` does.
        logit_scale: Factor of the logits, before the soft cap.
        softcap: Bound of the logits; `None` or 0 for none.
        z_loss: Factor of the squared log-sum-exp, averaged or summed as the loss is, without class weights.
        logits_dtype: Dtype of the loss. Default: fp32, fp64 for fp64, whatever the dtype of `logits` rounds to.

    Returns:
        The loss, of `logits_dtype`: 0-d, or of the shape of `target` with reduction "none".

    Raises:
        TypeError: A dtype is not one of those above.
        ValueError: Shapes do not fit, there is no class, or an option is out of its range.
        IndexError: On CPU, a target is outside the classes.
        RuntimeError: In backward, with `create_graph`: there is no second derivative. Under `torch.func.grad` and
            others that make derivatives without autograd.

    Numerics: all arithmetic in fp32 (fp64 for fp64), the gradient rounded once, to the dtype of `logits`. Saved for
    backward: `logits` themselves and two numbers a token. Results are deterministic.
    Source: Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867
    """
    check_loss(reduction, label_smoothing, logits_dtype)
    check_softcap(softcap)
    _op.check_operands(logits=logits, class_weight=class_weight)
    _op.check_device(logits=logits, target=target)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected a last dimension of at least 1 class, got shape {tuple(logits.shape)}")
    check_target(target, logits.shape[:-1])
    _op.check_vectors(logits.shape[-1], class_weight=class_weight)
    reject_transforms(logits)
    compute = _op.compute_dtype(logits.dtype)
    loss = reduced(
        TokenLogits(logits.reshape(-1, logits.shape[-1]), logit_scale, softcap or 0.0),
        target,
        logits.shape[-1],
        compute,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        z_loss=z_loss,
    )
    return loss.to(logits_dtype or compute)
