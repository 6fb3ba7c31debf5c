"""What logits end in: one scalar that is linear in the tokens' losses, or numbers per token; and that as data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphfuse.match import Sampler
from graphfuse.patterns._head import Choice, Obstacle, Source, Term, Tokens, Trail
from graphfuse.patterns._token_program import Inputs
from graphfuse.shadow import Shadow, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Losses:
    """The end of a trail."""

    trail: Trail
    outputs: tuple[Value, ...]
    is_total: bool
    source: Source  # the logits that all terms share
    choices: tuple[Choice, ...]  # of rows, which all of them share

    @property
    def terms(self) -> list[Term]:
        return [term for output in self.outputs for term in self.trail.tokens[output].terms]

    def describe(self, operands: Sequence[Value], shadow: Shadow) -> tuple[Inputs, dict[str, Any], dict[int, Sampler]]:
        """Inputs of a match, of which the operands are the first, parameters over them, and how to draw labels.

        The first operand has the leading sizes of the tokens.
        """
        lead = operands[0].shape[:-1]
        shared = len(self.choices)
        with_target = [term for term in self.terms if term.targets]
        targets, more = _one(
            "target", [(term.targets, without_lane(term.source).choices[shared:]) for term in with_target]
        )
        marks = {term.program[0][1] if term.program and term.program[0][0] == "nll" else None for term in with_target}
        ignore_index = marks.pop() if len(marks) == 1 else None
        smooth = [term.class_weight for term in self.terms if term.loss == "smooth"]
        class_weight = _one("class weight", smooth) if smooth else None

        inputs = Inputs(shadow, operands, targets)
        expressions = tuple(inputs.expression(target) for target in targets)
        of_targets = range(len(operands), len(inputs.values))
        described = []
        for output in self.outputs:
            tokens = self.trail.tokens[output]
            programs = [
                (term.loss, term.coefficient, inputs.program(term.program), without_lane(term.source).choices[shared:])
                for term in tokens.terms
            ]
            described.append((tuple(programs), _dimensions(output, tokens, lead), output.dtype))
        params = {
            "class_weight": None if class_weight is None else inputs.add(class_weight),
            "targets": expressions,
            "target_choices": more,
            "ignore_index": ignore_index,
            "classes": self.source.classes,
            "choices": self.choices,
            "logit_scale": self.source.scale,
            "softcap": self.source.softcap,
            "outputs": tuple(described),
            "is_total": self.is_total,
            "compute_dtype": torch.float64 if operands[0].dtype == torch.float64 else torch.float32,
        }
        return inputs, params, dict.fromkeys(of_targets, _labels(self.source.start.shape[-1], ignore_index))

    def words(self) -> Iterator[str]:
        """What kind of losses these are, for people."""
        source = self.source
        steps = [step for term in self.terms for step in term.program]
        is_mean = any(step[0] == "mean" or (step[0] == "nll" and step[2] == "mean") for step in steps)
        yield ("mean" if is_mean else "sum") if self.is_total else "per token"
        names = (("smooth", "label smoothing"), ("square", "z-loss"))
        yield from (word for loss, word in names if any(term.loss == loss for term in self.terms))
        yield from (word for is_it, word in ((source.softcap, "soft-cap"), (source.scale != 1.0, "scaled")) if is_it)

    def scalable(self, lead: tuple[int, ...]) -> set[int]:
        """The sizes of tokens and classes, where nothing is tied to them by a literal number, or by how it is cut."""
        sizes: set[int] = set()
        is_counted = any(value.op is aten.index.Tensor for value in self.trail.tokens)  # by arange(tokens)
        if not is_counted and not any(without_lane(term.source).choices for term in self.terms):
            sizes |= {*lead, math.prod(lead)}
        is_one_hot = any(rows.picked is not None for rows in self.trail.rows.values())  # by arange(classes)
        if not is_one_hot and all(term.source.classes is None for term in self.terms):
            sizes.add(self.source.start.shape[-1])
        return sizes


def losses_of(trail: Trail, shadow: Shadow, *, slices_targets: bool = False) -> Losses:
    """The losses that a trail ends in; with `slices_targets` no slice of rows is shared, and all are of targets.

    Raises:
        Obstacle: they are not of the same logits.
    """
    total = _total(trail, shadow)
    outputs = [total] if total is not None else _frontier(trail, shadow)
    terms = [term for output in outputs for term in trail.tokens[output].terms]
    source, choices = _common_source(terms, slices_targets=slices_targets)
    return Losses(trail, tuple(outputs), total is not None, source, choices)


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


def _common_source(terms: Sequence[Term], *, slices_targets: bool) -> tuple[Source, tuple[Choice, ...]]:
    """The logits that all losses share, and the choices of rows that they share; the rest must be slices."""
    sources = [without_lane(source) for source in {term.source: None for term in terms}]
    plain = [replace(source, choices=(), lead=None) for source in sources]
    leads = {source.lead for source in sources if source.lead is not None}
    if any(source != plain[0] for source in plain) or len(leads) > 1:
        raise Obstacle("logits: expected the same scale, soft-cap and classes for all losses, got others")
    shared = 0
    while all(len(s.choices) > shared and s.choices[shared] == sources[0].choices[shared] for s in sources):
        shared += 1
    if slices_targets and all(choice[0] == "slice" for source in sources for choice in source.choices):
        shared = 0
    if any(choice[0] != "slice" for source in sources for choice in source.choices[shared:]):
        raise Obstacle("logits: expected the same tokens for all losses, or slices of them, got others")
    return replace(plain[0], lead=leads.pop() if leads else None), sources[0].choices[:shared]


def without_lane(source: Source) -> Source:
    """One row of what might have been a loop is one row."""
    if source.lane is None:
        return source
    lead = source.lane.lead
    choice = ("select", len(lead) - 1, source.lane.index)
    lead = lead if source.lead is None else source.lead
    return replace(source, lane=None, choices=(*source.choices, choice), lead=lead)


def _dimensions(output: Value, tokens: Tokens, lead: tuple[int, ...]) -> tuple[str, bool] | None:
    """How the numbers are laid out: flat or like the tokens, and with one more dimension or not; `None`: their sum."""
    for choice in without_lane(tokens.source).choices:
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


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Hidden states, logits."""
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def small(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Weights, of small logits: at large ones only the softmax's conditioning would show."""
    return (0.3 * torch.randn(shape, generator=generator, device=device)).to(dtype)


def positive(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
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
