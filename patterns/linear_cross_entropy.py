"""lm_head + cross-entropy, however the loss is spelled.

    a scalar that is linear in the tokens' losses   ->   graphfuse::linear_cross_entropy(hidden, weight, ...)
    the tokens' losses themselves                   ->   graphfuse::linear_token_losses(hidden, weight, ...)

Anchor: a matrix product whose rows meet a softmax and a target. `_logits.py` follows it forward: over casts, scales, a
tanh soft-cap, the sum with other products (an adapter on the head), flattening, and choices of rows (the shift of a
language model by slicing), to numbers per token. If all of them end in one scalar that is linear in them (cross-entropy
with label smoothing, masked or weighted means, a z-loss beside it), that is the output, and what each token is
multiplied by is worked out before the op. Otherwise the outputs are the numbers per token (log-probabilities for a
policy gradient), and what follows stays in the graph.

Left alone: logits that something else reads as well; they would have to be computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphfuse.evaluate import roots
from graphfuse.kernels import linear_cross_entropy as _  # noqa: F401  (registers the ops)
from graphfuse.match import CASTS, IDENTITIES, Match, Pattern, Refusal, Sampler, short
from graphfuse.patterns._head import (
    RESHAPES,
    TRANSPOSES,
    Choice,
    Obstacle,
    Source,
    Term,
    Tokens,
    Trail,
    size,
)
from graphfuse.patterns._head_formula import formula
from graphfuse.patterns._head_operands import Summand, common_dtype, summands
from graphfuse.patterns._logits import NLL, follow
from graphfuse.patterns._token_program import Inputs, NotExpressible, replacement
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

NAME = "linear_cross_entropy"
COVERS = {NAME: 1}
ALONE = "compute what else needs the logits outside the compiled model, or from the hidden states"
PRODUCTS_ONLY = "make the logits by matrix products, and then do no more than add, cast, scale, soft-cap and slice them"
ONE_GRAPH = "compute logits and loss in one graph: TORCH_LOGS=graph_breaks says what separates them"


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every loss on the logits of a matrix product."""
    trails = follow(shadow)
    for trail in trails:
        if (anchor := trail.anchor) is not None:
            try:
                yield _match(trail, shadow)
            except (Obstacle, NotExpressible) as obstacle:
                yield Refusal(NAME, anchor, str(obstacle), COVERS, getattr(obstacle, "hint", ""))
    for value in shadow.values:
        if value.op in NLL and not value.output and not any(value in trail for trail in trails):
            reason = _what_lies_between(value, trails)
            if reason is not None:
                yield Refusal(NAME, value, reason, COVERS, ONE_GRAPH if "same graph" in reason else PRODUCTS_ONLY)


def _match(trail: Trail, shadow: Shadow) -> Match:
    _check_private(trail, shadow)
    total = _total(trail, shadow)
    outputs = [total] if total is not None else _frontier(trail, shadow)
    terms = [term for output in outputs for term in trail.tokens[output].terms]
    source, choices = _common_source(terms)
    linear, *others = summands(source, shadow)
    hidden, weight, vocabulary = linear.hidden, linear.weight, source.product.shape[-1]
    lead = hidden.shape[:-1]

    with_target = [term for term in terms if term.targets]
    targets, more = _one(
        "target", [(term.targets, _without_lane(term.source).choices[len(choices) :]) for term in with_target]
    )
    marks = {term.program[0][1] if term.program and term.program[0][0] == "nll" else None for term in with_target}
    ignore_index = marks.pop() if len(marks) == 1 else None
    smooth = [term.class_weight for term in terms if term.loss == "smooth"]
    class_weight = _one("class weight", smooth) if smooth else None

    inputs = Inputs(shadow, [hidden, weight], targets)
    target_expressions = tuple(inputs.expression(target) for target in targets)
    of_targets = range(2, len(inputs.values))
    described = []
    for output in outputs:
        tokens = trail.tokens[output]
        programs = [
            (
                term.loss,
                term.coefficient,
                inputs.program(term.program),
                _without_lane(term.source).choices[len(choices) :],
            )
            for term in tokens.terms
        ]
        described.append((tuple(programs), _dimensions(output, tokens, lead), output.dtype))
    samplers = _samplers(len(inputs.values), of_targets, vocabulary, ignore_index)
    for other in others:
        samplers |= {inputs.add(other.hidden): _normal, inputs.add(other.weight): _small}
    positions = {
        "biases": tuple((inputs.add(bias), factor) for bias, factor in source.biases),
        "added": tuple((inputs.add(o.hidden), inputs.add(o.weight), o.is_transposed, o.factor) for o in others),
        "class_weight": None if class_weight is None else inputs.add(class_weight),
    }
    grad_mode = outputs[0].grad_mode
    operands = {
        "hidden": [hidden],
        "weight": [weight],
        "bias": [each[0] for each in source.biases],
        "low_hidden": [other.hidden for other in others],
        "low_weight": [other.weight for other in others],
    }
    needs = tuple(name for name, vs in operands.items() if grad_mode and any(v.tensor.requires_grad for v in vs))
    return Match(
        pattern=NAME,
        outputs=tuple(outputs),
        inputs=tuple(inputs.values),
        replacement=replacement,
        params={
            **positions,
            "targets": target_expressions,
            "target_choices": more,
            "ignore_index": ignore_index,
            "transposed": linear.is_transposed,
            "classes": source.classes,
            "choices": choices,
            "logit_scale": source.scale,
            "softcap": source.softcap,
            "outputs": tuple(described),
            "is_total": total is not None,
            "compute_dtype": torch.float64 if hidden.dtype == torch.float64 else torch.float32,
            "low_dtype": common_dtype([linear, *others]),
            "needs": needs,
        },
        variant=", ".join([*_words(terms, source, is_total=total is not None), short(hidden.dtype)]),
        covers=COVERS,
        samplers={**dict.fromkeys(range(2, len(inputs.values)), _positive), **samplers},
        scalable=_scalable(trail, terms, source, [linear, *others]),
        formula=formula(terms, source, is_total=total is not None),
        rounding=f"logits rounded to {short(source.product.dtype)}, softmax and losses in float32",
        frees="logits",
    )


def _check_private(trail: Trail, shadow: Shadow) -> None:
    """Nobody else may read the logits, or anything made of them on the way to the loss."""
    for value in trail.rows:
        if value in shadow.escaping:
            raise Obstacle("logits: expected no use besides the loss, got an output of the graph", ALONE)
        for user in value.users:
            if user not in trail and not (user.op in NLL and user.output):
                raise Obstacle(f"logits: expected no use besides the loss, got {user.op} in {user.node.name}", ALONE)


def _total(trail: Trail, shadow: Shadow) -> Value | None:
    """The last scalar through which everything that depends on the logits leaves the trail, if there is one."""
    exits = {v for v in trail.tokens if v in shadow.escaping or any(user not in trail for user in v.users)}
    for value in reversed(trail.tokens):
        if not trail.tokens[value].is_summed or value not in shadow.node_of:
            continue
        behind = {value}  # all that is made of it alone
        for later in trail.tokens:
            made_of = [operand for operand in later.operands() if operand in trail]
            if made_of and behind.issuperset(made_of):
                behind.add(later)
        if exits <= behind:
            return value
    return None


def _frontier(trail: Trail, shadow: Shadow) -> list[Value]:
    """The numbers per token that leave the trail, as early as they are results of graph nodes."""
    early: dict[Value, None] = {}
    for value, tokens in trail.tokens.items():
        made_of = [operand for operand in value.operands() if operand in trail]
        if tokens.is_pure or any(v in trail.rows or (v in early and v not in shadow.node_of) for v in made_of):
            early[value] = None
    found = []
    for value in early:
        if value in shadow.escaping or any(user not in early and user not in trail.rows for user in value.users):
            if value not in shadow.node_of:
                raise Obstacle(f"output: expected the result of a graph node, got a value inside {value.node.name}")
            found.append(value)
    if not found:
        raise Obstacle("loss: expected to be used, got no use")
    return found


def _common_source(terms: Sequence[Term]) -> tuple[Source, tuple[Choice, ...]]:
    """The logits that all losses share, and the choices of rows that they share; the rest must be slices."""
    sources = [_without_lane(source) for source in {term.source: None for term in terms}]
    plain = [replace(source, choices=(), lead=None) for source in sources]
    leads = {source.lead for source in sources if source.lead is not None}
    if any(source != plain[0] for source in plain) or len(leads) > 1:
        raise Obstacle("logits: expected the same scale, soft-cap and classes for all losses, got others")
    shared = 0
    while all(len(s.choices) > shared and s.choices[shared] == sources[0].choices[shared] for s in sources):
        shared += 1
    if any(choice[0] != "slice" for source in sources for choice in source.choices[shared:]):
        raise Obstacle("logits: expected the same tokens for all losses, or slices of them, got others")
    return replace(plain[0], lead=leads.pop() if leads else None), sources[0].choices[:shared]


def _without_lane(source: Source) -> Source:
    """One row of what might have been a loop is one row."""
    if source.lane is None:
        return source
    lead = source.lane.lead
    choice = ("select", len(lead) - 1, source.lane.index)
    lead = lead if source.lead is None else source.lead
    return replace(source, lane=None, choices=(*source.choices, choice), lead=lead)


def _dimensions(output: Value, tokens: Tokens, lead: tuple[int, ...]) -> tuple[str, bool] | None:
    """How the numbers are laid out: flat or like the tokens, and with one more dimension or not; `None`: their sum."""
    for choice in _without_lane(tokens.source).choices:
        lead = _chosen(lead, choice)
    flat = (math.prod(lead),)
    shapes = {
        (): None,
        lead: ("like", False),
        flat: ("flat", False),
        (*lead, 1): ("like", True),
        (*flat, 1): ("flat", True),
    }
    if tokens.is_summed is not (output.shape == ()) or output.shape not in shapes:
        raise Obstacle(f"output: expected the shape of the tokens, {lead}, got {output.shape}")
    return shapes[output.shape]


def _chosen(lead: tuple[int, ...], choice: Choice) -> tuple[int, ...]:
    name, *details = choice
    if name == "flatten":
        return (math.prod(lead),)
    if name == "permute":
        return tuple(lead[d] for d in details[0])
    dim = len(lead) - 1 - details[0]
    kept = (len(range(*slice(details[1], details[2]).indices(lead[dim]))),) if name == "slice" else ()
    return (*lead[:dim], *kept, *lead[dim + 1 :])


def _one(what: str, found: Sequence[Any]) -> Any:
    if any(other != found[0] for other in found):
        raise Obstacle(f"{what}: expected one for all losses of the logits, got several")
    return found[0]


def _words(terms: Sequence[Term], source: Source, *, is_total: bool) -> Iterator[str]:
    """What kind of head this is, for people."""
    steps = [step for term in terms for step in term.program]
    is_mean = any(step[0] == "mean" or (step[0] == "nll" and step[2] == "mean") for step in steps)
    yield ("mean" if is_mean else "sum") if is_total else "per token"
    yield from (word for loss, word in (("smooth", "label smoothing"), ("square", "z-loss")) if _has(terms, loss))
    yield from (word for is_it, word in ((source.softcap, "soft-cap"), (source.scale != 1.0, "scaled")) if is_it)
    if source.others:
        yield f"sum of {1 + len(source.others)} products"
    if source.biases:
        yield "bias"


def _has(terms: Sequence[Term], loss: str) -> bool:
    return any(term.loss == loss for term in terms)


def _what_lies_between(value: Value, trails: Sequence[Trail]) -> str | None:
    """Why a negative log-likelihood is on no trail; `None` if there is no softmax before it."""
    softmax = value.args[0]
    while softmax.op in RESHAPES | IDENTITIES | TRANSPOSES | CASTS:
        softmax = softmax.args[0]
    if softmax.op is not aten._log_softmax.default:
        return None
    below = softmax
    while below.op != LEAF:
        operands = list(below.operands())
        if not operands or any(operand in trail for trail in trails for operand in operands):
            return f"logits: expected casts, scales, a soft-cap and row slices of a matrix product, got {below.op}"
        below = operands[0]
    made_of = [node.meta.get("example_value") for node in below.node.all_input_nodes]
    for tensor in (below.tensor, *made_of):
        if is_traceable_wrapper_subclass(tensor):
            return f"logits: expected a matrix product of plain tensors, got a {type(tensor).__name__}"
    return "logits: expected a matrix product in the same graph, got an input of the graph"


def _scalable(trail: Trail, terms: Sequence[Term], source: Source, summands: Sequence[Summand]) -> frozenset[int]:
    """The sizes that nothing in the region is tied to by a literal number, or by how it is cut."""
    hidden = summands[0].hidden
    sizes = {summand.hidden.shape[-1] for summand in summands}
    is_counted = any(value.op is aten.index.Tensor for value in trail.tokens)  # by arange(tokens)
    if not is_counted and not any(_without_lane(term.source).choices for term in terms):
        sizes |= {*hidden.shape[:-1], math.prod(hidden.shape[:-1])}
    is_one_hot = any(rows.picked is not None for rows in trail.rows.values())  # by arange(classes)
    if not is_one_hot and all(term.source.classes is None for term in terms):
        sizes.add(source.product.shape[-1])
    # Of a weight that is some columns of another, both have the sizes that they have.
    parts = [s for s in summands if size(roots(s.weight)[-1]) != size(s.weight)]
    return frozenset(sizes) - {n for s in parts for n in (s.hidden.shape[-1], roots(s.weight)[-1].shape[-1])}


def _samplers(inputs: int, targets: Iterable[int], vocabulary: int, ignore_index: int | None) -> dict[int, Sampler]:
    """How to draw the inputs: small logits, for at large ones only the softmax's conditioning would show."""
    samplers = {0: _normal, 1: _small, **dict.fromkeys(range(2, inputs), _positive)}
    return samplers | dict.fromkeys(targets, _labels(vocabulary, ignore_index))


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _small(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    return (0.3 * torch.randn(shape, generator=generator, device=device)).to(dtype)


def _positive(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Masks, weights, counts."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator, device=device) < 0.7
    if not dtype.is_floating_point:
        return torch.randint(1, 4, shape, generator=generator, device=device, dtype=dtype)
    return (0.5 + torch.rand(shape, generator=generator, device=device)).to(dtype)


def _labels(vocabulary: int, ignore_index: int | None) -> Sampler:
    def sample(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
        classes = min(vocabulary, 3)  # no fewer than the smallest stand-in for a vocabulary
        target = torch.randint(classes, shape, generator=generator, device=device, dtype=dtype)
        ignored = torch.rand(shape, generator=generator, device=device) < 0.2
        return target if ignore_index is None else target.masked_fill(ignored, ignore_index)

    return sample


PATTERN = Pattern(NAME, find, "the logits exist a chunk of tokens at a time, and turn into their gradient in place")
