"""Linear layer and cross-entropy, of which the logits never exist as a whole.

    z_t    = softcap(logit_scale * (hidden_t @ weight^T + bias))
    loss_t = cross_entropy(z_t, target_t) + z_loss * logsumexp(z_t) ** 2
    loss   = sum_t loss_t / count        count: counted tokens, or the sum of their targets' class weights

Tokens go through in chunks. A chunk of logits comes out of one GEMM, one pass turns it into its own gradient in place,
and two more GEMMs take that into the gradients of `hidden` and `weight`: a scalar loss has its gradients, up to the
factor that backward multiplies in, before forward returns, and no chunk is computed twice. Per-token losses
(reduction "none") have an upstream gradient of their own each, so there backward computes the chunks again.

Source: Liger-Kernel, https://arxiv.org/abs/2410.10989 (gradients in forward, chunk by chunk).
"""
# Shape letters: N = tokens, H = features of a token, V = classes (vocabulary).

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels._softmax_grad import LossOptions, scale_triton_
from graphfuse.kernels._token_chunks import Needs, count_tokens, run_chunks
from graphfuse.kernels._triton import HAS_TRITON

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: LossOptions,
    reduction: str,
    logits_dtype: torch.dtype,
) -> Tensor:
    """Say what the op computes, in differentiable torch operations on whole logits."""
    z = torch.nn.functional.linear(hidden, weight, bias).to(logits_dtype) * options.logit_scale
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
    losses = losses + torch.where(target != options.ignore_index, options.z_loss * z.logsumexp(1) ** 2, 0)
    if reduction == "none":
        return losses
    count = count_tokens(target, class_weight, options.ignore_index, losses.dtype)
    return losses.sum() / count if reduction == "mean" else losses.sum()


def _compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype of gradients between forward and backward.

    fp16 is trained with an upstream gradient of thousands. Before that is multiplied in, 1/count would make most of a
    gradient underflow, so it waits in fp32.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def _launches(hidden: Tensor, compute: torch.dtype) -> bool:
    return hidden.is_cuda and HAS_TRITON and compute == torch.float32


_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

torch.library.define(
    "graphfuse::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int ignore_index, "
    "str reduction, float label_smoothing, float logit_scale, float softcap, float z_loss, ScalarType logits_dtype, "
    "int chunk_size, bool need_hidden_grad, bool need_weight_grad, bool need_bias_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "graphfuse::linear_cross_entropy_backward",
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int ignore_index, "
    "float label_smoothing, float logit_scale, float softcap, float z_loss, int chunk_size, "
    "bool need_hidden_grad, bool need_weight_grad, bool need_bias_grad) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    z_loss: float,
    logits_dtype: torch.dtype,
    chunk_size: int,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = _compute_dtype(hidden.dtype, logits_dtype)
    saved = _saved_dtype(hidden.dtype)
    scale = count = hidden.new_ones((), dtype=compute)
    # What multiplies the gradients only after the GEMMs: see `_saved_dtype`, the chunks themselves are fp16.
    late = None
    if reduction == "mean":
        count = count_tokens(target, class_weight, ignore_index, compute)
        if saved == hidden.dtype:
            scale = count.reciprocal()
        else:
            late = count.reciprocal().nan_to_num(posinf=0.0)  # nothing counted: zeros stay zeros
    losses, *grads = run_chunks(
        hidden,
        weight,
        bias,
        target,
        class_weight,
        scale,
        LossOptions(ignore_index, label_smoothing, logit_scale, softcap, z_loss),
        compute,
        saved,
        chunk_size,
        Needs() if reduction == "none" else Needs(need_hidden_grad, need_weight_grad, need_bias_grad),
        use_triton=_launches(hidden, compute),
    )
    if late is not None:
        grads = [grad.mul_(late) for grad in grads]
    loss = losses if reduction == "none" else losses.sum() / count
    return loss.to(logits_dtype), grads[0], grads[1], grads[2]


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float,
    z_loss: float,
    chunk_size: int,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = _compute_dtype(hidden.dtype, grad.dtype)
    _, grad_hidden, grad_weight, grad_bias = run_chunks(
        hidden,
        weight,
        bias,
        target,
        class_weight,
        grad,
        LossOptions(ignore_index, label_smoothing, logit_scale, softcap, z_loss),
        compute,
        hidden.dtype,
        chunk_size,
        Needs(need_hidden_grad, need_weight_grad, need_bias_grad),
        use_triton=_launches(hidden, compute),
    )
    return grad_hidden, grad_weight, grad_bias


def _empty_grads(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = [hidden.new_empty(0, dtype=dtype) for _ in needs]
    return (
        torch.empty_like(hidden, dtype=dtype) if needs[0] else nothing[0],
        torch.empty_like(weight, dtype=dtype) if needs[1] else nothing[1],
        hidden.new_empty(weight.shape[0], dtype=dtype) if needs[2] else nothing[2],
    )


torch.library.impl("graphfuse::linear_cross_entropy", "default", _forward)
torch.library.impl("graphfuse::linear_cross_entropy_backward", "default", _backward)


@torch.library.register_fake("graphfuse::linear_cross_entropy")
def _(hidden, weight, bias, target, class_weight, ignore_index, reduction, *args: Any):
    logits_dtype, needs = args[4], args[6:]
    loss = hidden.new_empty(hidden.shape[:1] if reduction == "none" else (), dtype=logits_dtype)
    needs = (False, False, False) if reduction == "none" else needs
    return loss, *_empty_grads(hidden, weight, _saved_dtype(hidden.dtype), needs)


@torch.library.register_fake("graphfuse::linear_cross_entropy_backward")
def _(grad, hidden, weight, *args: Any):
    return _empty_grads(hidden, weight, hidden.dtype, args[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, class_weight, ignore_index, reduction, *rest = inputs
    # A zero gradient for the outputs that are gradients would be as large as the weight.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.recompute = reduction == "none"
    ctx.options = (ignore_index, *rest[:4])
    ctx.chunk_size, ctx.needs = rest[5], rest[6:]
    ctx.dtype = hidden.dtype
    ctx.save_for_backward(*((hidden, weight, bias, target, class_weight) if ctx.recompute else output[1:]))


def _autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None, None]
    wanted = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() and any(wanted):
        raise RuntimeError("create_graph: expected False, linear_cross_entropy has no second derivative, got True")
    if grad is not None and ctx.recompute:
        found = torch.ops.graphfuse.linear_cross_entropy_backward(
            grad, *ctx.saved_tensors, *ctx.options, ctx.chunk_size, *wanted
        )
        grads = [value if want else None for value, want in zip(found, wanted, strict=True)]
    elif grad is not None:
        names = ("need_hidden_grad", "need_weight_grad", "need_bias_grad")
        for index, saved in enumerate(ctx.saved_tensors):
            if wanted[index]:
                if not ctx.needs[index]:
                    raise RuntimeError(f"{names[index]}: expected True for an input that requires grad, got False")
                grads[index] = _scale(saved, grad, ctx.dtype)
    return *grads, *[None] * 13


def _scale(saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a gradient that forward left behind by the upstream one.

    Where autograd frees the graph behind itself, nobody can ask for `saved` again and it is scaled in place, which
    costs nothing for an upstream gradient of 1. While a compiler traces, a plain product is best: it knows what it
    may overwrite.
    """
    traced = type(saved) is not Tensor or torch.compiler.is_compiling()
    if saved.dtype != dtype or traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return (saved * upstream).to(dtype)
    if saved.is_cuda and HAS_TRITON and saved.is_contiguous():
        return scale_triton_(saved, upstream)
    return saved.mul_(upstream)


torch.library.register_autograd("graphfuse::linear_cross_entropy", _autograd, setup_context=_setup_context)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int = 0,
) -> Tensor:
    """Compute the cross-entropy of a linear layer's output, without that output.

        z[t]    = softcap * tanh(logit_scale * (hidden[t] @ weight.T + bias) / softcap)
        loss[t] = cross_entropy(z[t], target[t]) + z_loss * logsumexp(z[t]) ** 2

    Args:
        hidden: (..., H), fp16, bf16, fp32 or fp64.
        weight: (V, H), dtype of `hidden`.
        target: (...), int64 or int32, in [0, V) or `ignore_index`. Elsewhere: an IndexError on CPU, NaN on CUDA.
        bias: (V,), dtype of `hidden`.
        class_weight: (V,), any float dtype; weighs tokens and their mean as `torch.nn.functional.cross_entropy` does.
        ignore_index: Tokens of this target count for nothing; their gradient is 0.
        reduction: "mean", "sum" or "none". The first two compute the gradients in forward.
        label_smoothing: In [0, 1], the share of the target spread over all classes.
        logit_scale: Factor of the logits, before the soft cap.
        softcap: Bound of the logits; 0 for none.
        z_loss: Factor of the squared log-sum-exp, averaged or summed as the loss is, without class weights.
        logits_dtype: Dtype of the loss. Default: that of `hidden`, fp32 under autocast.
        chunk_size: Tokens whose logits exist at a time; 0 chooses.

    Returns:
        The loss, of `logits_dtype`: 0-d, or of the shape of `target` with reduction "none".

    Raises:
        TypeError: A dtype is not one of those above, or `weight` or `bias` has another than `hidden`.
        ValueError: Shapes do not fit, or an option is out of its range.
        IndexError: On CPU, a target is outside the classes.

    Numerics: logits are rounded to the dtype of `hidden` once, the rest is fp32 (fp64 for fp64) until the gradient of
    the logits is rounded for the last two GEMMs. On a GPU, a weight gradient that would take over 512 MiB in fp32 is
    summed over the chunks in its own dtype. Results are deterministic. There is no second derivative.
    Source: Liger-Kernel, https://arxiv.org/abs/2410.10989
    """
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        logits_dtype = logits_dtype or torch.float32
    _check(hidden, weight, target, bias, class_weight)
    _check_options(reduction, label_smoothing, softcap, logits_dtype, chunk_size)
    tracked = torch.is_grad_enabled()
    loss: Tensor = torch.ops.graphfuse.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1).to(torch.int64),
        class_weight,
        ignore_index,
        reduction,
        label_smoothing,
        logit_scale,
        softcap,
        z_loss,
        logits_dtype or hidden.dtype,
        chunk_size,
        tracked and hidden.requires_grad,
        tracked and weight.requires_grad,
        tracked and bias is not None and bias.requires_grad,
    )[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None) -> None:
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden: expected fp16, bf16, fp32 or fp64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected {hidden.dtype}, the dtype of hidden, got {weight.dtype}")
    if hidden.ndim == 0:
        raise ValueError("hidden: expected at least 1 dimension, got 0")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: expected int64 or int32, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target: expected shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    if bias is not None and bias.dtype != hidden.dtype:
        raise TypeError(f"bias: expected {hidden.dtype}, the dtype of hidden, got {bias.dtype}")
    if class_weight is not None and class_weight.dtype not in DTYPES:
        raise TypeError(f"class_weight: expected fp16, bf16, fp32 or fp64, got {class_weight.dtype}")
    for name, vector in (("bias", bias), ("class_weight", class_weight)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape ({weight.shape[0]},), got {tuple(vector.shape)}")


def _check_options(
    reduction: str, label_smoothing: float, softcap: float, logits_dtype: torch.dtype | None, chunk_size: int
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"softcap: expected 0 or a positive number, got {softcap}")
    if logits_dtype is not None and logits_dtype not in DTYPES:
        raise TypeError(f"logits_dtype: expected fp16, bf16, fp32 or fp64, got {logits_dtype}")
    if chunk_size < 0:
        raise ValueError(f"chunk_size: expected 0 or a number of tokens, got {chunk_size}")
