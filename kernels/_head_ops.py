"""The two ops of the head: a weighted sum of the tokens' losses, and those losses themselves.

`graphfuse::linear_cross_entropy` knows what each token's losses are multiplied by, so that their gradients, up to the
factor that backward multiplies in, are there before forward returns and no chunk is computed twice: three GEMMs.
`graphfuse::linear_token_losses` does not, so there backward computes the logits again: four.

The gradients that the first one returns are for its backward alone, which may overwrite them.
"""
# Shape letters: N = tokens, H = features of a token, V = classes (vocabulary).

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels._softmax_grad import NO_TARGET, Factors, Logits, scale_triton_
from graphfuse.kernels._token_chunks import Chunks, Head, Needs, compute_dtype, run_chunks
from graphfuse.kernels._triton import HAS_TRITON

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight"
_FACTORS = "Tensor? nll_factor, Tensor? smooth_factor, Tensor? lse_factor, Tensor? square_factor"
_OPTIONS = "float logit_scale, float softcap, int chunk_size, bool? compact"
_NEEDS = "bool need_hidden_grad, bool need_weight_grad, bool need_bias_grad"

torch.library.define(
    "graphfuse::linear_cross_entropy",
    f"({_HEAD}, {_FACTORS}, {_OPTIONS}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "graphfuse::linear_token_losses",
    f"({_HEAD}, {_OPTIONS}, bool want_nll, bool want_smooth, bool want_lse, bool skip) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "graphfuse::linear_token_losses_backward",
    f"(Tensor? nll_grad, Tensor? smooth_grad, Tensor? lse_grad, {_HEAD}, {_OPTIONS}, {_NEEDS}) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of gradients between forward and backward.

    fp16 is trained with an upstream gradient of thousands. Before that is multiplied in, most of a gradient would
    underflow, so it waits in fp32.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def _launches(hidden: Tensor) -> bool:
    """Whether the kernel runs, rather than the reference."""
    return hidden.is_cuda and HAS_TRITON and hidden.dtype != torch.float64


def _sum_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    nll_factor: Tensor | None,
    smooth_factor: Tensor | None,
    lse_factor: Tensor | None,
    square_factor: Tensor | None,
    logit_scale: float,
    softcap: float,
    chunk_size: int,
    compact: bool | None,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors = Factors(nll_factor, smooth_factor, lse_factor, square_factor)
    wants_lse = lse_factor is not None or square_factor is not None
    losses, *grads = run_chunks(
        Head(hidden, weight, bias, target, class_weight),
        factors,
        Logits(logit_scale, softcap),
        (nll_factor is not None, smooth_factor is not None, wants_lse),
        Needs(need_hidden_grad, need_weight_grad, need_bias_grad),
        Chunks(chunk_size, compact),
        _saved_dtype(hidden.dtype),
        use_triton=_launches(hidden),
    )
    square = None if square_factor is None or losses.lse is None else losses.lse.square()
    loss = hidden.new_zeros((), dtype=compute_dtype(hidden.dtype))
    for factor, each in zip(factors, (*losses, square), strict=True):
        if factor is not None and each is not None:
            loss += torch.where(factor == 0, 0, factor * each).sum()
    return loss, grads[0], grads[1], grads[2]


def _each_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    logit_scale: float,
    softcap: float,
    chunk_size: int,
    compact: bool | None,
    want_nll: bool,
    want_smooth: bool,
    want_lse: bool,
    skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = compute_dtype(hidden.dtype)
    losses, *_ = run_chunks(
        Head(hidden, weight, bias, target, class_weight),
        Factors((target != NO_TARGET).to(compute)) if skip else None,
        Logits(logit_scale, softcap),
        (want_nll, want_smooth, want_lse),
        Needs(),
        Chunks(chunk_size, compact),
        hidden.dtype,
        use_triton=_launches(hidden),
    )
    nothing = [hidden.new_empty(0, dtype=compute) for _ in losses]
    nll, smooth, lse = (empty if each is None else each for each, empty in zip(losses, nothing, strict=True))
    return nll, smooth, lse


def _each_backward(
    nll_grad: Tensor | None,
    smooth_grad: Tensor | None,
    lse_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    logit_scale: float,
    softcap: float,
    chunk_size: int,
    compact: bool | None,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, grad_hidden, grad_weight, grad_bias = run_chunks(
        Head(hidden, weight, bias, target, class_weight),
        Factors(nll_grad, smooth_grad, lse_grad),
        Logits(logit_scale, softcap),
        (nll_grad is not None, False, nll_grad is None),
        Needs(need_hidden_grad, need_weight_grad, need_bias_grad),
        Chunks(chunk_size, compact),
        hidden.dtype,
        use_triton=_launches(hidden),
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


torch.library.impl("graphfuse::linear_cross_entropy", "default", _sum_forward)
torch.library.impl("graphfuse::linear_token_losses", "default", _each_forward)
torch.library.impl("graphfuse::linear_token_losses_backward", "default", _each_backward)


@torch.library.register_fake("graphfuse::linear_cross_entropy")
def _(hidden, weight, *args: Any):
    loss = hidden.new_empty((), dtype=compute_dtype(hidden.dtype))
    return loss, *_empty_grads(hidden, weight, _saved_dtype(hidden.dtype), args[-3:])


@torch.library.register_fake("graphfuse::linear_token_losses")
def _(hidden, *args: Any):
    compute = compute_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0] if want else 0, dtype=compute) for want in args[-4:-1])


@torch.library.register_fake("graphfuse::linear_token_losses_backward")
def _(nll_grad, smooth_grad, lse_grad, hidden, weight, *args: Any):
    return _empty_grads(hidden, weight, hidden.dtype, args[-3:])


class _Gradients:
    """What forward leaves for backward, beside autograd's saved tensors.

    A checkpoint drops those and runs forward again to have them back; these are what it would run for, and are small
    beside the GEMMs that make them.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors: tuple[Tensor, ...] | None = tensors

    def take(self, *, keep: bool) -> tuple[Tensor, ...]:
        """Return them; for the last time if not `keep`."""
        if self.tensors is None:
            raise RuntimeError("retain_graph: expected True for a second backward of linear_cross_entropy, got False")
        tensors = self.tensors
        if not keep:
            self.tensors = None
        return tensors


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # A zero gradient for the outputs that are gradients would be as large as the weight.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.needs, ctx.dtype = inputs[-3:], inputs[0].dtype
    ctx.gradients = _Gradients(output[1:])


def _sum_autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None, None]
    wanted = ctx.needs_input_grad[:3]
    _reject_second_derivative("linear_cross_entropy", wanted)
    if grad is not None:
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        saved = ctx.gradients.take(keep=keep)
        for index, name in enumerate(("need_hidden_grad", "need_weight_grad", "need_bias_grad")):
            if wanted[index]:
                if not ctx.needs[index]:
                    raise RuntimeError(f"{name}: expected True for an input that requires grad, got False")
                grads[index] = _scale(saved[index], grad, ctx.dtype, keep=keep)
    return *grads, *[None] * 13


def _scale(saved: Tensor, upstream: Tensor, dtype: torch.dtype, *, keep: bool) -> Tensor:
    """Multiply a gradient that forward left behind by the upstream one.

    Where autograd frees the graph behind itself, nobody can ask for `saved` again and it is scaled in place, which
    costs nothing for an upstream gradient of 1. While a compiler traces, a plain product is best: it knows what it
    may overwrite.
    """
    traced = type(saved) is not Tensor or torch.compiler.is_compiling()
    if saved.dtype != dtype or traced or keep:
        return (saved * upstream).to(dtype)
    if saved.is_cuda and HAS_TRITON and saved.is_contiguous():
        return scale_triton_(saved, upstream)
    return saved.mul_(upstream)


def _each_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(each for each, want in zip(output, inputs[-4:-1], strict=True) if not want))
    ctx.options = inputs[5:9]
    ctx.save_for_backward(*inputs[:5])


def _each_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    _reject_second_derivative("linear_token_losses", wanted)
    if all(grad is None for grad in grads):
        return (None,) * 13
    found = torch.ops.graphfuse.linear_token_losses_backward(*grads, *ctx.saved_tensors, *ctx.options, *wanted)
    return *(grad if want else None for grad, want in zip(found, wanted, strict=True)), *[None] * 10


def _reject_second_derivative(op: str, wanted: tuple[bool, ...]) -> None:
    if torch.is_grad_enabled() and any(wanted):
        raise RuntimeError(f"create_graph: expected False, {op} has no second derivative, got True")


torch.library.register_autograd("graphfuse::linear_cross_entropy", _sum_autograd, setup_context=_sum_setup)
torch.library.register_autograd("graphfuse::linear_token_losses", _each_autograd, setup_context=_each_setup)
