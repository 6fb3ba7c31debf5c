"""What cross-entropies do alike, wherever their logits come from: options, weights of the tokens, reductions."""
# Shape letters: N = tokens, V = classes (vocabulary).

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from graphfuse.kernels._op import DTYPES, check_choice
from graphfuse.kernels._softmax_grad import NO_TARGET

REDUCTIONS = ("mean", "sum", "none")


class LossOptions(NamedTuple):
    """Numbers of the loss; see `linear_cross_entropy`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float = 0.0
    z_loss: float = 0.0


class Source(Protocol):
    """Where the losses of tokens come from: logits, or what makes them."""

    def sum(self, target: Tensor, class_weight: Tensor | None, *factors: Tensor | None) -> Tensor:
        """Return the tokens' losses, weighted and summed: `factors` are those of nll, smooth, lse and its square."""
        ...

    def each(
        self, target: Tensor, class_weight: Tensor | None, *, skip: bool, wants: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens' losses: nll, smooth and lse where they are wanted; 0 without a target, if that skips."""
        ...


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    options: LossOptions,
    reduction: str,
    logits_dtype: torch.dtype,
) -> Tensor:
    """Say what the loss is, in differentiable torch operations on whole logits."""
    z = logits.to(logits_dtype) * options.logit_scale
    if options.softcap:
        z = options.softcap * torch.tanh(z / options.softcap)
    if class_weight is not None:
        class_weight = class_weight.to(logits_dtype)
    losses = torch.nn.functional.cross_entropy(
        z,
        target,
        class_weight,
        ignore_index=options.ignore_index,
        reduction="none" if options.z_loss else reduction,
        label_smoothing=options.label_smoothing,
    )
    if not options.z_loss:
        return losses
    counted = target != options.ignore_index
    losses = losses + torch.where(counted, options.z_loss * z.logsumexp(1) ** 2, 0)
    if reduction == "none":
        return losses
    count = _of_target(target, counted, class_weight, losses.dtype).sum()
    return losses.sum() / count if reduction == "mean" else losses.sum()


def check_loss(reduction: str, label_smoothing: float, logits_dtype: torch.dtype | None) -> None:
    """Raise ValueError or TypeError unless the options are ones that there are."""
    check_choice("reduction", reduction, REDUCTIONS)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if logits_dtype is not None and logits_dtype not in DTYPES:
        raise TypeError(f"logits_dtype: expected fp16, bf16, fp32 or fp64, got {logits_dtype}")


def check_target(target: Tensor, shape: torch.Size) -> None:
    """Raise TypeError or ValueError unless there is an integer for each token."""
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: expected int64 or int32, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target: expected shape {tuple(shape)}, got {tuple(target.shape)}")


def check_softcap(softcap: float | None) -> None:
    """Raise ValueError unless it is a bound, or none."""
    if softcap is not None and not 0.0 <= softcap < float("inf"):
        raise ValueError(f"softcap: expected None or a positive number, got {softcap}")


def reject_transforms(*tensors: Tensor | None) -> None:
    """vmap alone is fine; derivatives as functions are not those of autograd."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if torch._C._are_functorch_transforms_active() and tensor.requires_grad:
            inner = tensor
            while torch._C._functorch.is_functorch_wrapped_tensor(inner):
                if torch._C._functorch.is_gradtrackingtensor(inner):
                    raise RuntimeError("torch.func: expected no grad, vjp or jacrev of this op, got one; use autograd")
                inner = torch._C._functorch.get_unwrapped(inner)
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError("torch.func: expected no forward-mode derivative of this op, got one; use autograd")


def reduced(
    source: Source,
    target: Tensor,  # of any shape
    vocab: int,
    compute: torch.dtype,
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    class_weight: Tensor | None,
    z_loss: float,
) -> Tensor:
    """Return the loss in `compute`: 0-d, or of the shape of `target` with reduction "none"."""
    shape = target.shape
    target = target.reshape(-1).to(torch.int64)
    counted = target != ignore_index
    if class_weight is not None:
        class_weight = class_weight.detach().to(compute)
    of_target = _of_target(target, counted, class_weight, compute)
    on_nll = (1.0 - label_smoothing) * of_target
    on_smooth = label_smoothing / vocab * counted.to(compute) if label_smoothing else None
    on_square = z_loss * counted.to(compute) if z_loss else None
    target = torch.where(counted, target, NO_TARGET)
    if reduction == "none":
        wants = (True, on_smooth is not None, on_square is not None)
        nll, smooth, lse = source.each(target, class_weight, skip=True, wants=wants)
        loss = torch.where(counted, nll * on_nll, 0)
        if on_smooth is not None:
            loss = loss + torch.where(counted, smooth * on_smooth, 0)
        if on_square is not None:
            loss = loss + lse.square() * on_square
        return loss.reshape(shape)
    factors: list[Tensor | None] = [on_nll, on_smooth, None, on_square]
    if reduction == "sum":
        return source.sum(target, class_weight, *factors)
    count = of_target.sum()
    factors = [None if factor is None else torch.where(counted, factor / count, 0) for factor in factors]
    # Added, because a sum saves nothing for backward: a checkpoint has no reason to run the op again.
    nan_if_none = torch.where(count == 0, torch.nan, torch.zeros_like(count))
    return source.sum(target, class_weight, *factors) + nan_if_none


def _of_target(target: Tensor, counted: Tensor, class_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the class weight of each token's target, 0 where it does not count."""
    if class_weight is None:
        return counted.to(dtype)
    index = target.clamp(0, class_weight.shape[0] - 1)  # what is outside is found out later
    return torch.where(counted, class_weight[index], 0)
