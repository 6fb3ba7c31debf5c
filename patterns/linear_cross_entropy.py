"""lm_head + cross-entropy.

    nll_loss(log_softmax(f(hidden @ weight.T + bias)), target)   ->   graphfuse::linear_cross_entropy(hidden, ...)

Anchor: a negative log-likelihood of a log-softmax. From there back to the matrix product, over what may lie between:
casts, a scale, a tanh soft-cap, flattening, and choices of rows (the shift of a language model by slicing), which are
made on the hidden states instead.

Left alone: logits that something else reads as well; they would have to be computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphfuse.kernels import linear_cross_entropy as _  # noqa: F401  (registers the op)
from graphfuse.match import CASTS, IDENTITIES, Match, Pattern, Refusal, argument, scalar, short
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default} | IDENTITIES
MUL = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar}
DIV = {aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar}
TANH = {aten.tanh.default, aten.tanh_.default}
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}
REDUCTIONS = ("none", "mean", "sum")

NAME = "linear_cross_entropy"
COVERS = {NAME: 1}


class _Obstacle(Exception):
    """Why the head cannot be fused."""


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every loss on the logits of a matrix product."""
    for value in shadow.values:
        if value.op is not aten.nll_loss_forward.default or value.output != 0:
            continue
        if value.args[0].op is not aten._log_softmax.default:
            continue
        try:
            yield _match(value, shadow)
        except _Obstacle as obstacle:
            yield Refusal(NAME, value, str(obstacle), COVERS)


def _match(loss: Value, shadow: Shadow) -> Match:
    log_softmax, target, class_weight, reduction, ignore_index = loss.args[:5]
    rows, dim = log_softmax.args[0], log_softmax.args[1]
    if rows.tensor.dim() != 2 or dim not in (1, -1):
        raise _Obstacle(f"logits: expected (tokens, vocabulary), got {rows.shape}")
    vocabulary = rows.shape[-1]
    chain = _Chain(rows, vocabulary)
    product = chain.product
    bias, left, right = (None, *product.args[:2]) if product.op is aten.mm.default else product.args[:3]
    transposed = right.op in TRANSPOSES
    weight = right.args[0] if transposed else right
    hidden = _unflattened(left)
    if chain.lead != (hidden.shape[:-1] if chain.steps else chain.lead):
        hidden = left
    if chain.steps and chain.lead != hidden.shape[:-1]:
        raise _Obstacle(f"logits: expected the leading sizes of the hidden states, got {chain.lead}")
    if bias is not None and bias.shape != (vocabulary,):
        raise _Obstacle(f"bias: expected shape ({vocabulary},), got {bias.shape}")
    if target.dtype != torch.int64:
        raise _Obstacle(f"target: expected int64, got {short(target.dtype)}")
    inputs = [hidden, weight, target]
    inputs += [bias] if bias is not None else []
    inputs += [class_weight] if class_weight is not None else []
    _check_private(loss, inputs, shadow)
    needs = [bool(loss.grad_mode and v is not None and v.tensor.requires_grad) for v in (hidden, weight, bias)]
    words = [REDUCTIONS[reduction]]
    words += ["soft-cap"] if chain.softcap else []
    words += ["scaled"] if chain.scale != 1.0 else []
    words += ["bias"] if bias is not None else []
    return Match(
        pattern=NAME,
        outputs=(loss,),
        inputs=tuple(inputs),
        replacement=replacement,
        params={
            "has_bias": bias is not None,
            "transposed": not transposed,
            "rows": tuple(chain.steps),
            "ignore_index": int(ignore_index),
            "reduction": REDUCTIONS[reduction],
            "logit_scale": chain.scale,
            "softcap": chain.softcap,
            "logits_dtype": log_softmax.dtype,
            "need_hidden_grad": needs[0],
            "need_weight_grad": needs[1],
            "need_bias_grad": needs[2],
        },
        variant=", ".join([*words, short(hidden.dtype)]),
        covers=COVERS,
        samplers={0: _normal, 1: _normal, 2: _sampler(vocabulary, int(ignore_index))},
        scalable=frozenset({vocabulary, hidden.shape[-1]}),
    )


class _Chain:
    """What lies between the matrix product and the log-softmax."""

    def __init__(self, rows: Value, vocabulary: int) -> None:
        self.scale, self.softcap = 1.0, 0.0
        self.steps: list[tuple[int, int, int | None]] = []  # slices of rows: dim, start, end
        self.lead: tuple[int, ...] = ()  # leading sizes before the first of them
        value = rows
        while value.op not in (aten.mm.default, aten.addmm.default):
            value = self._back(value, vocabulary)
        self.product = value

    def _back(self, value: Value, vocabulary: int) -> Value:
        op = value.op
        if op is LEAF:
            raise _Obstacle("logits: expected a matrix product in the same graph, got an input of the graph")
        operand = value.args[0] if value.args and isinstance(value.args[0], Value) else None
        factor = scalar(value.args[1]) if len(value.args) == 2 else None
        if operand is None and op in MUL:
            operand, factor = value.args[1], scalar(value.args[0])
        if operand is None:
            raise _Obstacle(f"logits: expected a matrix product, got {op}")
        if op in CASTS or op in IDENTITIES:
            return operand
        if op in VIEWS:
            if operand.shape[-1] != vocabulary:
                raise _Obstacle(f"logits: expected views to keep the vocabulary last, got {operand.shape}")
            return operand
        if op in MUL | DIV and factor:
            factor = factor if op in MUL else 1.0 / factor
            below = operand
            while below.op in CASTS:
                below = below.args[0]
            if below.op in TANH:
                if self.softcap or self.scale != 1.0:
                    raise _Obstacle("logits: expected at most one soft-cap and no scale after it, got more")
                return self._softcap(below, factor)
            self.scale *= factor
            return operand
        if op is aten.slice.Tensor:
            return self._slice(value, operand)
        raise _Obstacle(f"logits: expected casts, scales, a soft-cap and row slices, got {op}")

    def _softcap(self, tanh: Value, cap: float) -> Value:
        """`cap * tanh(z / cap)`; the inner factor, where it is not `1 / cap`, is a scale."""
        self.softcap = cap
        self.scale *= cap
        inner: Value = tanh.args[0]
        return inner

    def _slice(self, value: Value, operand: Value) -> Value:
        dim = argument(value, 1, "dim", 0) % value.tensor.dim()
        start, end, step = argument(value, 2, "start"), argument(value, 3, "end"), argument(value, 4, "step", 1)
        size = operand.shape[dim]
        if dim == value.tensor.dim() - 1 and operand.shape != value.shape:
            raise _Obstacle("logits: expected the whole vocabulary, got a slice of it")
        if step != 1:
            raise _Obstacle(f"logits: expected consecutive rows, got a step of {step}")
        begin = int(start or 0)
        stop = None if end is None or end >= size else int(end)
        if stop is not None and stop > 0:
            stop -= size  # from the end, so that it holds at any size
        if begin or stop is not None:
            self.steps.insert(0, (dim, begin, stop))
        self.lead = operand.shape[:-1]
        return operand


def _unflattened(left: Value) -> Value:
    """The hidden states before they were flattened for the product."""
    while left.op in VIEWS and left.args[0].shape[-1] == left.shape[-1]:
        left = left.args[0]
    return left


def _check_private(loss: Value, inputs: list[Value], shadow: Shadow) -> None:
    """Nobody else may read the logits, or anything made of them on the way to the loss."""
    region = shadow.cone([loss], inputs)
    inside = set(region)
    for value in region:
        if value is loss:
            continue
        if value in shadow.escaping:
            raise _Obstacle("logits: expected no use besides the loss, got an output of the graph")
        for user in value.users:
            if user not in inside and not (user.op is loss.op and user.output == 1):
                raise _Obstacle(f"logits: expected no use besides the loss, got {user.op} in {user.node.name}")


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Logits of everyday size: at extreme ones, only the conditioning of the softmax would be compared."""
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _sampler(vocabulary: int, ignore_index: int) -> Any:
    def sample(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
        classes = min(vocabulary, 3)  # no fewer than the smallest stand-in for a vocabulary
        target = torch.randint(classes, shape, generator=generator, device=device, dtype=dtype)
        ignored = torch.rand(shape, generator=generator, device=device) < 0.2
        return target.masked_fill(ignored, ignore_index)

    return sample


def replacement(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *extra: Tensor,
    has_bias: bool,
    transposed: bool,
    rows: tuple[tuple[int, int, int | None], ...],
    ignore_index: int,
    reduction: str,
    logit_scale: float,
    softcap: float,
    logits_dtype: torch.dtype,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> Tensor:
    """What stands in the place of the region: the rows are chosen on the hidden states."""
    for dim, start, end in rows:
        where = (slice(None),) * dim + (slice(start, end),)
        hidden = hidden[where]
    hidden = hidden.flatten(0, -2)
    optional = list(extra)
    bias = optional.pop(0) if has_bias else None
    class_weight = optional.pop(0) if optional else None
    outputs = torch.ops.graphfuse.linear_cross_entropy.default(
        hidden,
        weight.t() if transposed else weight,
        bias,
        target,
        class_weight,
        ignore_index,
        reduction,
        0.0,
        logit_scale,
        softcap,
        0.0,
        logits_dtype,
        0,
        need_hidden_grad,
        need_weight_grad,
        need_bias_grad,
    )
    loss: Tensor = outputs[0]
    return loss


PATTERN = Pattern(NAME, find)
