"""Logits among the outputs of a graph: taken out of it, and put back as lazy tensors.

    outputs (loss, logits)   ->   outputs (loss, hidden), and logits made of hidden and weight outside, when read

Worth it where the loss is fused, so that nothing else computes the logits, and in training, where a loss outside the
graph is likely to be one that can be fused with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphfuse import algebra
from graphfuse.certify import certify
from graphfuse.evidence import Evidence, gather
from graphfuse.lazy.formula import Choice, Formula, Part, Stack, Step, apply_formula, choose
from graphfuse.lazy.tensor import Source, lazy
from graphfuse.match import CASTS, IDENTITIES, VIEWS, Match, argument, scalar, short
from graphfuse.rewrite import erase
from graphfuse.shadow import Shadow, Value, is_nested

aten = torch.ops.aten

MUL = {aten.mul.Tensor, aten.mul.Scalar}
DIV = {aten.div.Tensor, aten.div.Scalar}
PRODUCTS = {aten.mm.default, aten.addmm.default}
JOINS = {aten.add.Tensor, aten.stack.default}
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}

NAME = "lazy_logits"
WHY = "computed when it is read, and then without what has no use"
CLASSES, BIAS = "classes", "bias"  # steps that are none in the end: some of the classes, (start, end); their bias
MIN_VOCABULARY = 8192  # classes, from which an output that no loss in the graph reads is taken for logits


@dataclass(eq=False)
class LazyOutput:
    """One output of a graph that is made of a linear layer and of little else."""

    position: int
    match: Match
    products: list[Value]
    hidden_uses: list[tuple[Value, Value]]  # (operand, user) on the way to the output: no uses if it is taken out


def find(shadow: Shadow) -> list[LazyOutput]:
    """The outputs that can be lazy. Until `settle`, their way out of the graph does not count as a use."""
    found = []
    for position, node in enumerate(_outputs(shadow.graph_module)):
        value = shadow.value_of.get(node) if isinstance(node, fx.Node) else None
        if value is None or any(is_nested(user) for user in node.users):
            continue
        described = _describe(value, shadow)
        if described is None:
            continue
        match, products = described
        if certify(match, shadow) is None:
            found.append(LazyOutput(position, match, products, []))
    for output in found:
        shadow.escaping.discard(output.match.anchor)
    for output in found:
        behind = [output.match.anchor]
        while behind:
            value = behind.pop()
            if value in output.products or value.users or value in shadow.escaping:
                continue
            for operand in list(value.operands())[: None if value.op in JOINS else 1]:
                operand.users.remove(value)
                output.hidden_uses.append((operand, value))
                behind.append(operand)
    return found


def settle(outputs: Sequence[LazyOutput], shadow: Shadow, taken: set[Value]) -> Plan:
    """Take those outputs out of the graph that nothing in it computes any more; the others are outputs again."""
    chosen = [o for o in outputs if taken.issuperset(o.products) or _is_worth_it(o)]
    for output in outputs:
        if output not in chosen:
            shadow.escaping.add(output.match.anchor)
            for operand, user in output.hidden_uses:
                operand.users.append(user)
    graph = shadow.graph_module.graph
    nodes = list(_outputs(shadow.graph_module))
    lazy_at = {output.position for output in chosen}
    kept = [node for k, node in enumerate(nodes) if k not in lazy_at]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]

    def place(value: Value) -> tuple[bool, int]:
        node = shadow.node_of[value]
        if node in placeholders:
            return True, placeholders.index(node)
        if node not in kept:
            kept.append(node)
        return False, kept.index(node)

    slots = [
        Slot(
            o.position,
            tuple(place(v) for v in o.match.inputs),
            **o.match.params,
        )
        for o in sorted(chosen, key=lambda o: o.position)
    ]
    evidence = [gather(output.match, shadow, WHY, is_skipped=True) for output in chosen]
    if chosen:
        graph.output_node().args = (tuple(kept),)
        for output in chosen:
            erase({value.node for value in shadow.cone(output.match.outputs, output.match.inputs)}, shadow)
    return Plan(chosen, slots, len(nodes) - len(chosen), evidence)


@dataclass(frozen=True)
class Slot:
    """Where a lazy output goes, and from where its parts come."""

    position: int
    tensors: tuple[tuple[bool, int], ...]  # those of all parts: (is an input of the graph, which)
    parts: tuple[Part, ...]
    steps: tuple[Step, ...]
    choices: tuple[Choice, ...]
    stack: Stack | None

    def fill(self, args: Sequence[Any], results: Sequence[Any]) -> Tensor:
        """Make the output of one call."""
        tensors = [args[k] if is_input else results[k] for is_input, k in self.tensors]
        if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            return apply_formula(*tensors, parts=self.parts, steps=self.steps, choices=self.choices, stack=self.stack)
        formula = Formula.of(tensors, self.parts, self.steps, self.stack)
        like = choose(formula.like(), self.choices)
        return lazy(Source(formula.chosen(self.choices)), like)


@dataclass(frozen=True)
class Plan:
    """The lazy outputs of one graph, and how many others it has."""

    outputs: Sequence[LazyOutput]
    slots: Sequence[Slot]
    others: int
    evidence: Sequence[Evidence] = ()  # one for each of `outputs`

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, with the lazy outputs put between the others."""
        if not self.slots:
            return compiled

        def call(*args: Any) -> tuple[Any, ...]:
            results = compiled(*args)
            outputs = list(results[: self.others])
            for slot in self.slots:
                outputs.insert(slot.position, slot.fill(args, results))
            return tuple(outputs)

        return call


def _outputs(graph_module: fx.GraphModule) -> Sequence[Any]:
    outputs = graph_module.graph.output_node().args[0]
    return outputs if isinstance(outputs, (tuple, list)) else ()


def _is_worth_it(output: LazyOutput) -> bool:
    """Whether the output looks like logits in training that only a reader outside could want."""
    value = output.match.anchor
    hidden = output.match.inputs[0]
    vocabulary = value.shape[-1]
    return (
        not any(product.users for product in output.products)
        and value.grad_mode
        and value.tensor.requires_grad
        and vocabulary >= max(MIN_VOCABULARY, 2 * hidden.shape[-1])
    )


def _describe(output: Value, shadow: Shadow) -> tuple[Match, list[Value]] | None:
    """The output as a sum or a stack of linear layers, and what follows, with the values of their products."""
    if not output.dtype.is_floating_point or output.tensor.dim() < 2:
        return None
    whole, choices = _before_choices(output)
    found = _before_steps(whole)
    if found is None or not whole.tensor.is_contiguous():
        return None
    bias, all_steps = _first_bias(found[1])
    summands, steps = [found[0]], tuple(step for step in all_steps if step[0] != CLASSES)
    choices = (*(("copy", -1, *where) for name, where in all_steps if name == CLASSES), *choices)
    stack = _stack(found[0], whole)
    if stack is not None:
        summands = list(found[0].args[0])
    while summed := _summed(summands[0]):  # from the left, as a loop adds them
        summands[:1] = summed
    described = [_part(summand, summand.shape if stack else whole.shape, shadow, bias) for summand in summands]
    kept = [each for each in described if each is not None]
    products = [product for product, *_ in kept]
    parts = tuple(part for _, part, _ in kept)
    if len(kept) < len(described) or len(set(products)) < len(products) or BIAS in dict(steps):
        return None
    if len({product.shape[-1] for product in products}) > 1 or (choices and stack):
        return None
    kind = f"{'stack' if stack else 'sum'} of {len(parts)} products"
    match = Match(
        pattern=NAME,
        outputs=(output,),
        inputs=tuple(value for *_, values in kept for value in values),
        replacement=apply_formula,
        params={"parts": parts, "steps": steps, "choices": choices, "stack": stack},
        variant=", ".join([*([kind] if len(parts) > 1 else []), short(output.dtype)]),
        covers={NAME: 1},
        formula=_in_words(parts, steps, stack),
        rounding=f"product rounded to {short(products[0].dtype)}",
        frees="logits",
        scalable=frozenset({output.shape[-1], *(product.args[-2].shape[-1] for product in products)}),
    )
    return match, products


def _before_choices(value: Value) -> tuple[Value, tuple[Choice, ...]]:
    """The value before some of its rows or classes were chosen, and which."""
    choices: list[Choice] = []
    while value.op in (aten.select.int, aten.slice.Tensor, *IDENTITIES):
        operand = value.args[0]
        if value.tensor.is_contiguous() and not operand.tensor.is_contiguous():
            choices.insert(0, ("copy", -1, 0, None))
        if value.op not in IDENTITIES:
            dim = argument(value, 1, "dim", 0) % operand.tensor.dim()
            where = [argument(value, 2, "index" if value.op is aten.select.int else "start")]
            where += [] if value.op is aten.select.int else [argument(value, 3, "end")]
            is_plain = all(type(number) in (int, type(None)) for number in where)
            is_last = dim == operand.tensor.dim() - 1
            if not is_plain or argument(value, 4, "step", 1) != 1 or (is_last and value.op is aten.select.int):
                break
            if is_last and where[1] is not None and where[1] >= 0:  # from the end, as a proof has fewer classes
                where[1] = min(where[1] - operand.shape[-1], 0) or None
            choices.insert(0, ("select" if value.op is aten.select.int else "slice", -1 if is_last else dim, *where))
        value = operand
    return value, tuple(choices)


def _stack(value: Value, output: Value) -> Stack | None:
    """How the value, if it is a stack, is laid out in the output."""
    if value.op is not aten.stack.default:
        return None
    rank = value.tensor.dim()
    dim = argument(value, 1, "dim", 0) % rank
    flat = rank - output.tensor.dim() + 1
    is_flat = flat > 0 and value.shape[flat:] == output.shape[1:]
    return Stack(dim, flat if flat > 1 else 0) if dim < rank - 1 and is_flat else None


def _part(
    summand: Value, shape: tuple[int, ...], shadow: Shadow, added: list[Value]
) -> tuple[Value, Part, list[Value]] | None:
    """The product of a linear layer with what follows it, a bias first, and its tensors as results of graph nodes."""
    found = _before_steps(summand)
    if found is None or found[0].op not in PRODUCTS:
        return None
    own, steps = _first_bias(found[1])
    product = found[0]
    *bias, left, right = product.args
    bias = [*bias, *own, *added]
    if right.op not in TRANSPOSES or right.args[0].tensor.dim() != 2 or product.kwargs:
        return None
    if len(bias) > 1 or {BIAS, CLASSES} & dict(steps).keys():
        return None
    hidden: Value | None = left
    while hidden is not None and hidden.shape[:-1] != shape[:-1]:
        is_view = hidden.op in VIEWS | IDENTITIES and hidden.args[0].shape[-1] == left.shape[-1]
        hidden = hidden.args[0] if is_view else None
    tensors = [_at_node(value, shadow) for value in (hidden, right.args[0], *bias)]
    kept = [tensor for tensor in tensors if tensor is not None]
    return (product, Part(product.dtype, bool(bias), steps), kept) if len(kept) == len(tensors) else None


def _before_steps(value: Value) -> tuple[Value, tuple[Step, ...]] | None:
    """The product, or the sum, that the value was before operations on each element, and those operations."""
    steps: list[Step] = []
    while value.op not in PRODUCTS and value.op is not aten.stack.default and not _summed(value):
        step = _step(value)
        if step is None:
            return None
        value, *name = step
        steps[:0] = [(name[0], name[1])] if name else []
    return value, tuple(steps)


def _first_bias(steps: tuple[Step, ...]) -> tuple[list[Value], tuple[Step, ...]]:
    """The bias, if one is added before all else, and the other steps."""
    return ([steps[0][1]], steps[1:]) if steps and steps[0][0] == BIAS else ([], steps)


def _summed(value: Value) -> list[Value]:
    """The operands of a sum of two tensors of its own shape."""
    operands = [arg for arg in value.args if isinstance(arg, Value) and arg.shape == value.shape]
    return operands if value.op is aten.add.Tensor and len(operands) == 2 and not value.kwargs else []


def _in_words(parts: Sequence[Part], steps: Sequence[Step], stack: Stack | None) -> str:
    formula: Any = None
    for k, part in enumerate(parts):
        mark = "₁₂₃₄₅₆₇₈₉"[(k - 1) % 9] if k else ""
        one = algebra.product(algebra.symbol(f"h{mark}"), algebra.symbol(f"W{mark}ᵀ"))
        one = algebra.total(one, algebra.symbol(f"b{mark}")) if part.has_bias else one
        one = _after_steps(one, part.steps)
        if stack is not None:
            one = one if formula is None else algebra.symbol(f"{algebra.write(formula)}, {algebra.write(one)}")
            formula = algebra.apply("stack", one) if k + 1 == len(parts) else one
        else:
            formula = one if formula is None else algebra.total(formula, one)
    return algebra.write(_after_steps(formula, steps))


def _after_steps(formula: Any, steps: Sequence[Step]) -> Any:
    for name, detail in steps:
        if name == "tanh":
            formula = algebra.apply("tanh", formula)
        elif name in ("mul", "div"):
            factor = algebra.number(detail)
            formula = algebra.product(factor if name == "mul" else algebra.power(factor, -1), formula)
    return formula


def _step(value: Value) -> tuple[Value] | tuple[Value, str, Any] | None:
    """What the value was before one operation on each element, and that operation; views are none."""
    operands = [arg for arg in value.args if isinstance(arg, Value)]
    if not operands:
        return None
    operand = operands[0]
    if value.op in IDENTITIES or (value.op in VIEWS and operand.shape[-1] == value.shape[-1]):
        return (operand,)
    if value.op in CASTS and value.dtype.is_floating_point:
        return operand, "to", value.dtype
    if value.op is aten.slice.Tensor and operand.shape[:-1] == value.shape[:-1]:
        _, choices = _before_choices(value)
        return (operand, CLASSES, choices[-1][2:]) if choices else None
    if value.op is aten.tanh.default:
        return operand, "tanh", None
    if value.op is aten.add.Tensor and len(operands) == 2 and not value.kwargs:
        one, other = operands if operands[0].shape == value.shape else operands[::-1]
        return (one, BIAS, other) if one.shape == value.shape and other.shape == value.shape[-1:] else None
    if value.op in MUL | DIV and len(value.args) == 2:
        factor = scalar(value.args[1] if value.args[0] is operand else value.args[0])
        if factor is not None and (value.args[0] is operand or value.op in MUL):
            return operand, "mul" if value.op in MUL else "div", factor
    return None


def _at_node(value: Value | None, shadow: Shadow) -> Value | None:
    """The value, or what it was before casts inside a node, as the result of a graph node."""
    while value is not None and value not in shadow.node_of:
        value = value.args[0] if value.op in CASTS | IDENTITIES else None
    return value
