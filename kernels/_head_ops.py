"""The two ops of the head: a weighted sum of the tokens' losses, and those losses themselves.

`graphfuse::linear_cross_entropy` knows what each token's losses are multiplied by, so that their gradients, up to the
factor that backward multiplies in, are there before forward returns and no chunk is computed twice: three GEMMs.
`graphfuse::linear_token_losses` does not, so there backward computes the logits again: four.

The gradients that the first one returns are for its backward alone, which may overwrite them.
"""
# Shape letters: N = tokens, H = features of a token, V = classes (vocabulary), R = features of an added product.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._scale import scale_
from graphfuse.kernels._softmax_grad import NO_TARGET, Factors, Logits, TokenLosses
from graphfuse.kernels._token_chunks import Chunks, Head, Needs, count_kept, run_chunks

# The fields of `Head`, `Factors` and `Needs`, in their order: the first two are passed flat.
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? low_hidden, Tensor? low_weight, "
    "Tensor target, Tensor? class_weight"
)
_FACTORS = "Tensor? nll_factor, Tensor? smooth_factor, Tensor? lse_factor, Tensor? square_factor"
_OPTIONS = "float logit_scale, float softcap, int chunk_size, bool? compact"
_NEEDS = "bool[5] needs"
_GRADS = "Tensor, Tensor, Tensor, Tensor, Tensor"

torch.library.define(
    "graphfuse::linear_cross_entropy",
    f"({_HEAD}, {_FACTORS}, {_OPTIONS}, {_NEEDS}, Tensor? kept=None) -> (Tensor, {_GRADS})",
    tags=_op.TAGS,
)
torch.library.define("graphfuse::count_kept", f"({_FACTORS}, int? work) -> Tensor", tags=_op.TAGS)
torch.library.define(
    "graphfuse::linear_token_losses",
    f"({_HEAD}, {_OPTIONS}, bool want_nll, bool want_smooth, bool want_lse, bool skip) -> (Tensor, Tensor, Tensor)",
    tags=_op.TAGS,
)
torch.library.define(
    "graphfuse::linear_token_losses_backward",
    f"(Tensor? nll_grad, Tensor? smooth_grad, Tensor? lse_grad, {_HEAD}, {_OPTIONS}, {_NEEDS}) -> ({_GRADS})",
    tags=_op.TAGS,
)


def _saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of gradients between forward and backward.

    fp16 is trained with an upstream gradient of thousands. Before that is multiplied in, most of a gradient would
    underflow, so it waits in fp32.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def _sum_forward(*args: Any) -> tuple[Tensor, ...]:
    head, factors, options, needs = Head(*args[:7]), Factors(*args[7:11]), args[11:15], Needs(*args[15])
    wants_lse = factors.lse is not None or factors.square is not None
    losses, grads = _run(
        head,
        factors,
        options,
        (factors.nll is not None, factors.smooth is not None, wants_lse),
        needs,
        _saved_dtype(head.hidden.dtype),
        args[16] if len(args) > 16 else None,
    )
    square = None if factors.square is None or losses.lse is None else losses.lse.square()
    loss = head.hidden.new_zeros((), dtype=_op.compute_dtype(head.hidden.dtype))
    for factor, each in zip(factors, (*losses, square), strict=True):
        if factor is not None and each is not None:
            loss += torch.where(factor == 0, 0, factor * each).sum()
    return loss, *grads


def _each_forward(*args: Any) -> tuple[Tensor, ...]:
    head, options, wants, skip = Head(*args[:7]), args[7:11], args[11:14], args[14]
    compute = _op.compute_dtype(head.hidden.dtype)
    factors = Factors((head.target != NO_TARGET).to(compute)) if skip else None
    losses, _ = _run(head, factors, options, wants, Needs(), head.hidden.dtype)
    return tuple(head.hidden.new_empty(0, dtype=compute) if each is None else each for each in losses)


def _each_backward(*args: Any) -> tuple[Tensor, ...]:
    grads, head, options, needs = args[:3], Head(*args[3:10]), args[10:14], Needs(*args[14])
    wants = (grads[0] is not None, False, grads[0] is None)
    return _run(head, Factors(*grads), options, wants, needs, head.hidden.dtype)[1]


def _run(
    head: Head,
    factors: Factors | None,
    options: tuple[float, float, int, bool | None],
    wants: tuple[bool, bool, bool],
    needs: Needs,
    grad_dtype: torch.dtype,
    count: Tensor | None = None,
) -> tuple[TokenLosses, tuple[Tensor, ...]]:
    logits, chunks, use_triton = Logits(*options[:2]), Chunks(*options[2:]), _op.launches(head.hidden)
    return run_chunks(head, factors, logits, wants, needs, chunks, grad_dtype, use_triton=use_triton, count=count)


def _count(*args: Any) -> Tensor:
    return count_kept(Factors(*args[:4]), args[4])


def _empty_grads(head: Head, dtype: torch.dtype, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    hidden, weight, _, low_hidden, low_weight, *_ = head
    low_dtype = dtype if low_hidden is None else torch.promote_types(dtype, low_hidden.dtype)
    wanted = Needs(*needs)

    def dense(is_needed: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return hidden.new_empty(shape if is_needed else (0,), dtype=dtype)

    return (
        torch.empty_like(hidden, dtype=dtype) if wanted.hidden else dense(False, dtype),
        torch.empty_like(weight, dtype=dtype) if wanted.weight else dense(False, dtype),
        dense(wanted.bias, dtype, weight.shape[0]),
        dense(wanted.low_hidden, low_dtype, *(() if low_hidden is None else low_hidden.shape)),
        dense(wanted.low_weight, low_dtype, *(() if low_weight is None else low_weight.shape)),
    )


_op.implement("linear_cross_entropy", _sum_forward)
_op.implement("count_kept", _count)
_op.implement("linear_token_losses", _each_forward)
_op.implement("linear_token_losses_backward", _each_backward)


@torch.library.register_fake("graphfuse::linear_cross_entropy")
def _(hidden, *args: Any):
    loss = hidden.new_empty((), dtype=_op.compute_dtype(hidden.dtype))
    return loss, *_empty_grads(Head(hidden, *args[:6]), _saved_dtype(hidden.dtype), args[14])


@torch.library.register_fake("graphfuse::count_kept")
def _(*args: Any):
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("graphfuse::linear_token_losses")
def _(hidden, *args: Any):
    compute = _op.compute_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0] if want else 0, dtype=compute) for want in args[-4:-1])


@torch.library.register_fake("graphfuse::linear_token_losses_backward")
def _(nll_grad, smooth_grad, lse_grad, hidden, *args: Any):
    return _empty_grads(Head(hidden, *args[:6]), hidden.dtype, args[-1])


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
    ctx.needs = inputs[15]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[: len(Needs._fields)]]
    ctx.gradients = _Gradients(output[1:])


def _sum_autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * len(Needs._fields)
    wanted = ctx.needs_input_grad[: len(grads)]
    if grad is not None:
        _reject_second_derivative("linear_cross_entropy", wanted)
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        saved = ctx.gradients.take(keep=keep)
        for index, name in enumerate(Needs._fields):
            if wanted[index]:
                if not ctx.needs[index]:
                    raise RuntimeError(f"needs: expected True for {name}, which requires grad, got False")
                grads[index] = _scale(saved[index], grad, ctx.dtypes[index], keep=keep)
    return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def _scale(saved: Tensor, upstream: Tensor, dtype: torch.dtype, *, keep: bool) -> Tensor:
    """Multiply a gradient that forward left behind by the upstream one.

    Where autograd frees the graph behind itself, nobody can ask for `saved` again and it is scaled in place, which
    costs nothing for an upstream gradient of 1. While a compiler traces, a plain product is best: it knows what it
    may overwrite.
    """
    traced = type(saved) is not Tensor or torch.compiler.is_compiling()
    if saved.dtype != dtype or traced or keep:
        return (saved * upstream).to(dtype)
    return scale_(saved, upstream)


def _each_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(each for each, want in zip(output, inputs[-4:-1], strict=True) if not want))
    ctx.options = inputs[7:11]
    ctx.save_for_backward(*inputs[:7])


def _each_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[: len(Needs._fields)]
    if all(grad is None for grad in grads):
        return (None,) * len(ctx.needs_input_grad)
    _reject_second_derivative("linear_token_losses", wanted)
    found = torch.ops.graphfuse.linear_token_losses_backward(*grads, *ctx.saved_tensors, *ctx.options, wanted)
    given = (grad if want else None for grad, want in zip(found, wanted, strict=True))
    return *given, *[None] * (len(ctx.needs_input_grad) - len(wanted))


def _reject_second_derivative(op: str, wanted: tuple[bool, ...]) -> None:
    if torch.is_grad_enabled() and any(wanted):
        raise RuntimeError(f"create_graph: expected False, {op} has no second derivative, got True")


torch.library.register_autograd("graphfuse::linear_cross_entropy", _sum_autograd, setup_context=_sum_setup)
torch.library.register_autograd("graphfuse::linear_token_losses", _each_autograd, setup_context=_each_setup)
