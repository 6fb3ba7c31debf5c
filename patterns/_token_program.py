"""What stands in the place of a head's region: the op, and what the graph did to its numbers, as data.

The same function is traced into the graph and run by certification, so a program is made of names and numbers:

- an expression is a tensor that the region made out of its inputs: `("input", k)`, flattened, `("number", k)` for a 0-d
  one, or `(operation, arguments, dtype)`;
- a step is what one operation did to the number of each token, see `patterns/_head.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._softmax_grad import NO_TARGET
from graphfuse.kernels._token_chunks import Needs
from graphfuse.kernels.cross_entropy import TokenLogits
from graphfuse.match import CASTS, IDENTITIES
from graphfuse.patterns._head import Choice, Step, origin
from graphfuse.shadow import Shadow, Value

aten = torch.ops.aten

# Operations of one number per token, or one per class, of no literal size; in-place ones by their plain counterpart.
PLAIN = {
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.bitwise_not_.default: aten.bitwise_not.default,
    aten.logical_not_.default: aten.logical_not.default,
}
EXPRESSIBLE = {
    aten.eq.Scalar,
    aten.ne.Scalar,
    aten.bitwise_not.default,
    aten.logical_not.default,
    aten.masked_fill.Scalar,
    aten.gather.default,
    aten.sum.default,
    aten.clamp.default,
    aten.remainder.Scalar,
    aten._to_copy.default,
    *PLAIN,
}
Term = tuple[str, float, tuple[Step, ...], tuple[Choice, ...]]  # loss, coefficient, program, choices of its own
Output = tuple[tuple[Term, ...], tuple[str, bool] | None, torch.dtype]  # its terms, how it is laid out, its dtype
LOSSES = ("nll", "smooth", "lse", "square")


class NotExpressible(Exception):
    """A tensor that the region makes and that a replacement cannot."""


class Inputs:
    """The inputs of a match, collected while its expressions are written."""

    def __init__(self, shadow: Shadow, values: Sequence[Value], labels: Sequence[Value]) -> None:
        self.shadow, self.labels = shadow, set(labels)
        self.values = list(values)

    def add(self, value: Value) -> int:
        """The position of the value among the inputs."""
        if value not in self.values:
            self.values.append(value)
        return self.values.index(value)

    def program(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """The steps with expressions in the place of values."""
        return tuple(tuple(self.expression(i) if isinstance(i, Value) else i for i in step) for step in steps)

    def expression(self, value: Value) -> tuple[Any, ...]:
        """How to compute the value, flattened."""
        source = origin(value)
        if source in self.labels and source in self.shadow.node_of:
            return ("input", self.add(source))
        options = {name: option for name, option in value.kwargs.items() if option is not None}
        # A mask's cast is made again: as a float, its last size would be taken for one of features.
        is_cast = value.op is aten._to_copy.default and [*options] == ["dtype"]
        is_mask = is_cast and not value.args[0].dtype.is_floating_point
        if self._reachable(value) and not self._is_of_labels(value) and not is_mask:
            return ("input" if value.shape else "number", self.add(value))
        if source is not value:
            return self.expression(source)
        if value.op not in EXPRESSIBLE or (options and not is_cast):
            raise NotExpressible(f"{value.node.name}: expected weights that nodes of the graph return, got {value.op}")
        arguments = tuple(self.expression(a) if isinstance(a, Value) else a for a in value.args)
        return (PLAIN.get(value.op, value.op), arguments, options)

    def _reachable(self, value: Value) -> bool:
        while value.op in CASTS | IDENTITIES and value not in self.shadow.node_of:
            value = value.args[0]
        return value in self.shadow.node_of

    def _is_of_labels(self, value: Value) -> bool:
        """Whether the value is made of labels alone: then a proof must draw it with them, and not by itself."""
        value = origin(value)
        if value in self.labels:
            return True
        operands = list(value.operands())
        return value.op in EXPRESSIBLE and bool(operands) and all(map(self._is_of_labels, operands))


def compute(expression: Any, inputs: Sequence[Tensor]) -> Any:
    """What an expression stands for."""
    if not isinstance(expression, tuple):
        return expression
    if expression[0] == "input":
        return inputs[expression[1]].reshape(-1)
    if expression[0] == "number":
        return inputs[expression[1]]
    operation, arguments, options = expression
    return operation(*(compute(argument, inputs) for argument in arguments), **options)


def run(
    program: Sequence[Step], numbers: Tensor, target: Tensor, inputs: Sequence[Tensor], classes: int
) -> tuple[Tensor, list[Tensor]]:
    """What the steps make of one number per token, and what their sum is divided by.

    Sums are left out: all steps are linear, so `run(program, x).sum()` is what they make of x with them.
    """
    counts = []
    for name, *details in program:
        if name == "nll":
            ignore_index, reduction, class_weight = details
            counted = target != ignore_index
            weights = torch.ones_like(numbers)
            if class_weight is not None:
                weights = compute(class_weight, inputs).to(numbers.dtype)[torch.where(counted, target, 0)]
            weights = torch.where(counted, weights, 0)
            numbers = torch.where(counted, numbers * weights, 0)
            if reduction == "mean":
                counts.append(weights.sum())
                numbers = torch.where(counted, numbers / counts[-1], 0)
        elif name == "mul":
            numbers = numbers * compute(details[0], inputs)
        elif name == "div":
            counts += [compute(details[0], inputs)] if details[0][0] != "input" else []
            numbers = numbers / compute(details[0], inputs)
        elif name == "fill":
            numbers = torch.where(compute(details[0], inputs), 0, numbers)
        elif name == "keep":
            numbers = torch.where(compute(details[0], inputs), numbers, 0)
        elif name == "per class":
            numbers = numbers / classes
        elif name == "mean":
            numbers = numbers / numbers.numel()
    return numbers, counts


def choose(tokens: Tensor, choices: Sequence[Choice], features: int) -> Tensor:
    """Choose among tokens, which the leading dimensions of the tensor lay out; `features` dimensions follow them."""
    for name, *details in choices:
        if name == "slice":
            after, start, end = details
            tokens = tokens[(..., slice(start, end)) + (slice(None),) * (after + features)]
        elif name == "select":
            tokens = tokens.select(-1 - details[0] - features, details[1])
        elif name == "flatten":
            tokens = tokens.flatten(0, -1 - features)
        else:
            (order,) = details
            tokens = tokens.permute(*order, *range(len(order), len(order) + features))
    return tokens


def _spread(numbers: Tensor, like: Tensor, slices: Sequence[Choice], fill: int) -> Tensor:
    """Put the numbers of some tokens, those of `like`, at their places among all of which slices chose them."""
    if not slices:
        return numbers
    numbers = numbers.reshape_as(like)
    for _, after, start, end in reversed(slices):
        numbers = torch.nn.functional.pad(numbers, (0, 0) * after + (start, -(end or 0)), value=fill)
    return numbers.reshape(-1)


class _Tokens(NamedTuple):
    """What programs run on."""

    layout: Tensor  # of the shape of the tokens
    target: Tensor  # (N,), as the loss gets it
    inputs: Sequence[Tensor]
    classes: int

    def marked(self, target_choices: Sequence[Choice], ignore_index: int | None) -> Tensor:
        """The target of every token, NO_TARGET where it does not count or is not chosen."""
        target = self.target
        marked = target if ignore_index is None else torch.where(target != ignore_index, target, NO_TARGET)
        return _spread(marked, choose(self.layout, target_choices, 0), target_choices, NO_TARGET)

    def factors(self, terms: Sequence[Term], dtype: torch.dtype) -> tuple[list[Tensor | None], Tensor | None]:
        """What each of the tokens' losses is multiplied by in a total; NaN to add to that where nothing counts."""
        factors: dict[str, Tensor] = {}
        nan_if_none = None
        for term in terms:
            weights, counts = self.weights(term, dtype)
            factors[term[0]] = factors[term[0]] + weights if term[0] in factors else weights
            for count in counts:
                one = torch.where((count == 0) & (weights == 0).all(), torch.nan, 0.0)
                nan_if_none = one if nan_if_none is None else nan_if_none + one
        return [factors.get(loss) for loss in LOSSES], nan_if_none

    def outputs(self, outputs: Sequence[Output], found: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs that are made of the numbers per token that an op has found."""
        losses = {"nll": found[0], "smooth": found[1], "lse": found[2]}
        if "square" in _wanted(outputs):
            losses["square"] = found[2] * found[2]
        return tuple(self.output(terms, layout, losses).to(dtype) for terms, layout, dtype in outputs)

    def weights(self, term: Term, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """What each token's loss is multiplied by, and what means are divided by."""
        _, coefficient, program, choices = term
        like = choose(self.layout, choices, 0)
        ones = torch.full_like(like, coefficient, dtype=dtype).reshape(-1)
        # From the end, as a gradient comes: what is masked is 0 then, whatever it is divided by.
        weights, counts = run(program[::-1], ones, self.target, self.inputs, self.classes)
        return _spread(weights, like, choices, 0), counts

    def output(self, terms: Sequence[Term], layout: tuple[str, bool] | None, losses: dict[str, Tensor]) -> Tensor:
        """The sum of terms of losses, laid out as the graph has it."""
        total = None
        like = self.layout
        for loss, coefficient, program, choices in terms:
            numbers = losses[loss]
            if choices:
                like = choose(self.layout, choices, 0)
                numbers = choose(numbers.reshape_as(self.layout), choices, 0).reshape(-1)
            numbers, counts = run(program, numbers * coefficient, self.target, self.inputs, self.classes)
            if layout is None:
                numbers = numbers.sum()
                for count in counts:
                    numbers = numbers + torch.where((count == 0) & (numbers == 0), torch.nan, 0.0)
            total = numbers if total is None else total + numbers
        assert total is not None, "output: expected terms"
        if layout is None:
            return total
        total = total.reshape_as(like) if layout[0] == "like" else total
        return total.unsqueeze(-1) if layout[1] else total


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _wanted(outputs: Sequence[Output]) -> set[str]:
    """The losses that the outputs are made of."""
    return {term[0] for terms, *_ in outputs for term in terms}


def _asked(outputs: Sequence[Output], ignore_index: int | None) -> tuple[tuple[bool, bool, bool], bool]:
    """Which numbers per token an op has to find, and whether it may skip tokens without a target."""
    wanted = _wanted(outputs)
    wants = ("nll" in wanted, "smooth" in wanted, bool(wanted & {"lse", "square"}))
    return wants, ignore_index is not None and wanted == {"nll"}


def _tokens(layout: Tensor, targets: Sequence[Any], inputs: Sequence[Tensor], classes: int) -> _Tokens:
    parts = [compute(part, inputs) for part in targets]
    target = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(torch.int64)
    return _Tokens(layout, target, inputs, classes)


def _beside(parts: Sequence[Tensor]) -> Tensor | None:
    """The columns of all parts in one matrix."""
    return torch.cat(tuple(parts), 1) if len(parts) > 1 else (*parts, None)[0]


def replacement(
    hidden: Tensor,
    weight: Tensor,
    *others: Tensor,
    targets: tuple[Any, ...],
    target_choices: tuple[Choice, ...],
    ignore_index: int | None,
    biases: tuple[tuple[int, float], ...],
    added: tuple[tuple[int, int, bool, float], ...],
    class_weight: int | None,
    transposed: bool,
    classes: tuple[int, int | None] | None,
    choices: tuple[Choice, ...],
    logit_scale: float,
    softcap: float,
    outputs: tuple[Output, ...],
    is_total: bool,
    compute_dtype: torch.dtype,
    low_dtype: torch.dtype,
    needs: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """What stands in the place of the region: the rows are chosen on the hidden states.

    Biases, the factors of other products, and class weight are given by their positions, targets by expressions; the
    former with what they are multiplied by. An output is its terms, how it is laid
    out (flat or like the tokens, with a dimension of 1 after them or not; `None`: summed), and its dtype. `needs` names
    what gets a gradient.
    """
    inputs = (hidden, weight, *others)
    hidden = choose(hidden, choices, 1)
    layout = hidden.select(-1, 0)
    weight = weight.t() if transposed else weight
    offset = None
    for position, factor in biases:
        bias = _times(inputs[position].reshape(-1).to(hidden.dtype), factor)
        offset = bias if offset is None else offset + bias
    low_hidden = [_times(choose(inputs[h], choices, 1).flatten(0, -2).to(low_dtype), f) for h, _, _, f in added]
    low_weight = [(inputs[w].t() if is_turned else inputs[w]).to(low_dtype) for _, w, is_turned, _ in added]
    if classes is not None:
        weight = weight[slice(*classes)]
        offset = None if offset is None else offset[slice(*classes)]
        low_weight = [each[slice(*classes)] for each in low_weight]
    on_class = None if class_weight is None else inputs[class_weight].reshape(-1).to(compute_dtype)

    tokens = _tokens(layout, targets, inputs, weight.shape[0])
    marked = tokens.marked(target_choices, ignore_index)
    head = (hidden.flatten(0, -2), weight, offset, _beside(low_hidden), _beside(low_weight), marked, on_class)
    options = (logit_scale, softcap, 0, None)

    if is_total:
        ((terms, _, dtype),) = outputs
        factors, nan_if_none = tokens.factors(terms, compute_dtype)
        total = torch.ops.graphfuse.linear_cross_entropy.default(
            *head,
            *factors,
            *options,
            [name in needs for name in Needs._fields],
        )[0]
        return ((total if nan_if_none is None else total + nan_if_none).to(dtype),)

    wants, skips = _asked(outputs, ignore_index)
    return tokens.outputs(outputs, torch.ops.graphfuse.linear_token_losses.default(*head, *options, *wants, skips))


def replacement_of_logits(
    logits: Tensor,
    *others: Tensor,
    targets: tuple[Any, ...],
    target_choices: tuple[Choice, ...],
    ignore_index: int | None,
    class_weight: int | None,
    classes: tuple[int, int | None] | None,
    choices: tuple[Choice, ...],
    logit_scale: float,
    softcap: float,
    outputs: tuple[Output, ...],
    is_total: bool,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """What stands in the place of a region of which the logits are given; as in `replacement`."""
    inputs = (logits, *others)
    logits = choose(logits, choices, 1)
    layout = logits.select(-1, 0)
    logits = logits if classes is None else logits[(..., slice(*classes))]
    on_class = None if class_weight is None else inputs[class_weight].reshape(-1).to(compute_dtype)
    tokens = _tokens(layout, targets, inputs, logits.shape[-1])
    marked = tokens.marked(target_choices, ignore_index)
    source = TokenLogits(logits.flatten(0, -2), logit_scale, softcap)

    if is_total:
        ((terms, _, dtype),) = outputs
        factors, nan_if_none = tokens.factors(terms, compute_dtype)
        total = source.sum(marked, on_class, *factors)
        return ((total if nan_if_none is None else total + nan_if_none).to(dtype),)

    wants, _ = _asked(outputs, ignore_index)
    is_nll = wants == (True, False, False)  # of which a token without a target has none
    return tokens.outputs(outputs, source.each(marked, on_class, skip=is_nll, wants=wants))
