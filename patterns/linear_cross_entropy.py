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

from collections.abc import Iterator, Sequence

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphfuse.evaluate import roots
from graphfuse.kernels import linear_cross_entropy as _  # noqa: F401  (registers the ops)
from graphfuse.match import CASTS, IDENTITIES, Match, Pattern, Refusal, short
from graphfuse.patterns._head import RESHAPES, TRANSPOSES, Obstacle, Source, Trail, size
from graphfuse.patterns._head_formula import formula
from graphfuse.patterns._head_operands import Summand, common_dtype, summands
from graphfuse.patterns._logits import NLL, follow, products
from graphfuse.patterns._losses import Losses, losses_of, normal, positive, small
from graphfuse.patterns._token_program import NotExpressible, replacement
from graphfuse.shadow import LEAF, Shadow, Value

aten = torch.ops.aten

NAME = "linear_cross_entropy"
COVERS = {NAME: 1}
ALONE = "compute what else needs the logits outside the compiled model, or from the hidden states"
PRODUCTS_ONLY = "make the logits by matrix products, and then do no more than add, cast, scale, soft-cap and slice them"
ONE_GRAPH = "compute logits and loss in one graph: TORCH_LOGS=graph_breaks says what separates them"


def find(shadow: Shadow) -> Iterator[Match | Refusal]:
    """Every loss on the logits of a matrix product."""
    trails = follow(shadow, products(shadow))
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
    losses = losses_of(trail, shadow)
    source, terms = losses.source, losses.terms
    linear, *others = summands(source, shadow)
    hidden, weight = linear.hidden, linear.weight
    inputs, params, samplers = losses.describe([hidden, weight], shadow)
    samplers |= {0: normal, 1: small}
    for other in others:
        samplers |= {inputs.add(other.hidden): normal, inputs.add(other.weight): small}
    params |= {
        "biases": tuple((inputs.add(bias), factor) for bias, factor in source.biases),
        "added": tuple((inputs.add(o.hidden), inputs.add(o.weight), o.is_transposed, o.factor) for o in others),
    }
    grad_mode = losses.outputs[0].grad_mode
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
        outputs=losses.outputs,
        inputs=tuple(inputs.values),
        replacement=replacement,
        params={
            **params,
            "transposed": linear.is_transposed,
            "low_dtype": common_dtype([linear, *others]),
            "needs": needs,
        },
        variant=", ".join([*losses.words(), *_parts(source), short(hidden.dtype)]),
        covers=COVERS,
        samplers={**dict.fromkeys(range(2, len(inputs.values)), positive), **samplers},
        scalable=_scalable(losses, [linear, *others]),
        formula=formula(terms, source, is_total=losses.is_total),
        rounding=f"logits rounded to {short(source.start.dtype)}, softmax and losses in float32",
        frees="logits",
    )


def _parts(source: Source) -> Iterator[str]:
    """What the logits are a sum of, for people."""
    if source.others:
        yield f"sum of {1 + len(source.others)} products"
    if source.biases:
        yield "bias"


def _check_private(trail: Trail, shadow: Shadow) -> None:
    """Nobody else may read the logits, or anything made of them on the way to the loss."""
    for value in trail.rows:
        if value in shadow.escaping:
            raise Obstacle("logits: expected no use besides the loss, got an output of the graph", ALONE)
        for user in value.users:
            if user not in trail and not (user.op in NLL and user.output):
                raise Obstacle(f"logits: expected no use besides the loss, got {user.op} in {user.node.name}", ALONE)


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


def _scalable(losses: Losses, summands: Sequence[Summand]) -> frozenset[int]:
    """The sizes that nothing in the region is tied to by a literal number, or by how it is cut."""
    sizes = losses.scalable(summands[0].hidden.shape[:-1]) | {summand.hidden.shape[-1] for summand in summands}
    # Of a weight that is some columns of another, both have the sizes that they have.
    parts = [s for s in summands if size(roots(s.weight)[-1]) != size(s.weight)]
    return frozenset(sizes) - {n for s in parts for n in (s.hidden.shape[-1], roots(s.weight)[-1].shape[-1])}


PATTERN = Pattern(NAME, find, "the logits exist a chunk of tokens at a time, and turn into their gradient in place")
