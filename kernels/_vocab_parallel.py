"""Linear layer and cross-entropy where every process holds some of the classes: a head sharded over the vocabulary.

Each process computes its own classes' lse_p = log sum_c exp(z_c) and, for targets among them, nll_p = lse_p - z_y, in
chunks of tokens that never exist together. What the processes tell each other is three numbers a token:

    m   = max_p lse_p          share_p = exp(lse_p - m)
    lse = m + log(sum_p share_p)
    nll = log(sum_p share_p) + sum_p [y in p] * (nll_p + (m - lse_p))

With G_nll and G_lse upstream, a process' own numbers have the gradients

    d nll_p = [y in p] * G_nll       d lse_p = (G_nll + G_lse) * exp(lse_p - lse) - [y in p] * G_nll

and from there on backward is that of `linear_token_losses`, on its classes alone. The gradient of `hidden` is summed
over the processes. With one process, every number is that of `linear_cross_entropy`.

Source: Megatron-LM, https://arxiv.org/abs/1909.08053 (cross-entropy over a sharded vocabulary).
"""
# Shape letters: N = tokens, H = features of a token, V = classes (vocabulary), of which V_p in this process.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from graphfuse.kernels._loss import REDUCTIONS
from graphfuse.kernels._op import check_choice
from graphfuse.kernels._softmax_grad import NO_TARGET
from graphfuse.kernels.linear_cross_entropy import prepare

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def vocab_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    first_class: int,
    group: ProcessGroup | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Compute the cross-entropy of a linear layer whose classes are spread over the processes of a group.

        z[t]    = softcap * tanh(logit_scale * (hidden[t] @ weight.T + bias) / softcap)    weight and bias of all
        loss[t] = cross_entropy(z[t], target[t]) + z_loss * logsumexp(z[t]) ** 2

    Every process of the group calls it, with the same `hidden`, `target` and options, and gets the same loss.

    Args:
        hidden: (..., H), fp16, bf16, fp32 or fp64. Its gradient is summed over the group.
        weight: (V_p, H), dtype of `hidden`: this process' classes. Of a DTensor, give `to_local()`.
        target: (...), int64 or int32, in [0, V) or `ignore_index`. Elsewhere: an IndexError on CPU, NaN on CUDA.
        bias: (V_p,), dtype of `hidden`.
        first_class: Number of the class of `weight[0]`. Together the processes hold every class once.
        group: The default process group if `None`.
        ignore_index: Tokens of this target count for nothing; their gradient is 0.
        reduction: "mean", "sum" or "none". A mean over no token that counts is NaN, its gradients are 0.
        logit_scale: Factor of the logits, before the soft cap.
        softcap: Bound of the logits; `None` or 0 for none.
        z_loss: Factor of the squared log-sum-exp, averaged or summed as the loss is.
        chunk_size: Tokens whose logits exist at a time; `None` or 0 chooses.

    Returns:
        The loss, fp32, fp64 for fp64: 0-d, or of the shape of `target` with reduction "none".

    Raises:
        TypeError: A dtype is not one of those above, or `weight` or `bias` has another than `hidden`.
        ValueError: Shapes do not fit, or an option is out of its range.
        IndexError: On CPU, a target is a class of no process, or of several.
        RuntimeError: In backward, with `create_graph`: there is no second derivative.

    Numerics: as `linear_cross_entropy` with reduction "none"; backward computes the logits again.
    Source: Megatron-LM, https://arxiv.org/abs/1909.08053
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if first_class < 0:
        raise ValueError(f"first_class: expected the number of a class, got {first_class}")
    if not weight.numel():
        raise ValueError(f"weight: expected at least one class in every process, got shape {tuple(weight.shape)}")
    group = distributed.group.WORLD if group is None else group
    copied: Tensor = _Copied.apply(hidden, group)  # type: ignore[no-untyped-call]
    head = prepare(copied, weight, target, bias, None, None, logit_scale, softcap, chunk_size, None)
    target = target.reshape(-1).to(torch.int64)
    counted = target != ignore_index
    own = target - first_class
    is_here = counted & (own >= 0) & (own < weight.shape[0])
    own = torch.where(is_here, own, NO_TARGET)
    nll, _, lse = head.each(own, None, skip=False, wants=(True, False, True))
    nll, lse = _Joined.apply(nll, lse, is_here, counted, group)  # type: ignore[no-untyped-call]
    loss = torch.where(counted, nll + z_loss * lse.square() if z_loss else nll, 0)
    if reduction == "none":
        return loss.reshape(head.shape)
    return loss.sum() / counted.sum() if reduction == "mean" else loss.sum()


class _Copied(torch.autograd.Function):
    """What every process reads: the same going in, its gradient the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Joined(torch.autograd.Function):
    """The numbers of all classes, from those of each process' own; see the formulas."""

    @staticmethod
    def forward(
        ctx: Any, nll: Tensor, lse: Tensor, is_here: Tensor, counted: Tensor, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        top = lse.clone()
        distributed.all_reduce(top, distributed.ReduceOp.MAX, group=group)
        share = torch.exp(lse - top)
        on_target = torch.where(is_here, nll + (top - lse), 0)
        sums = torch.stack([share, on_target, is_here.to(lse.dtype)])
        distributed.all_reduce(sums, group=group)
        total, on_target, places = sums.unbind()
        is_lost = counted & (places != 1)
        if not lse.is_cuda and is_lost.any():
            raise IndexError("target: expected classes that one process holds, got one of none, or of several")
        ctx.save_for_backward(share / total, is_here)
        return (total.log() + on_target).masked_fill(is_lost, torch.nan), top + total.log()

    @staticmethod
    def backward(ctx: Any, on_nll: Tensor, on_lse: Tensor) -> tuple[Tensor | None, ...]:
        share, is_here = ctx.saved_tensors
        here = torch.where(is_here, on_nll, 0)
        return here, (on_nll + on_lse) * share - here, None, None, None
