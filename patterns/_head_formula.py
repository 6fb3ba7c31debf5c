"""Losses, and the head that they are of, as a formula, for people."""

from __future__ import annotations

from collections.abc import Sequence

from graphfuse import algebra
from graphfuse.patterns._head import Source, Term

LOSSES = {
    "nll": "-log_softmax(z)[target]",
    "smooth": "-sum(log_softmax(z))",
    "lse": "logsumexp(z)",
    "square": "logsumexp(z)²",
}


def formula(terms: Sequence[Term], source: Source, *, is_total: bool, is_given: bool = False) -> str:
    """What the losses are of the logits z, and what these are of the hidden states h, or of logits x that are given."""
    losses = " + ".join(_loss(term) for term in dict.fromkeys(terms))
    if is_total:
        steps = [step for term in terms for step in term.program]
        is_mean = any(step[0] == "mean" or (step[0] == "nll" and step[2] == "mean") for step in steps)
        losses = f"{'mean' if is_mean else 'sum'}({losses})"
    z = algebra.symbol("x") if is_given else algebra.product(algebra.symbol("h"), algebra.symbol("Wᵀ"))
    for k, (_, factor) in enumerate(source.others):
        mark = "₁₂₃₄₅₆₇₈₉"[k % 9]
        other = algebra.product(algebra.number(factor), algebra.symbol(f"h{mark}"), algebra.symbol(f"W{mark}ᵀ"))
        z = algebra.total(z, other)
    if source.biases:
        z = algebra.total(z, algebra.symbol("b"))
    z = algebra.product(algebra.number(source.scale), z)
    if source.softcap:
        cap = algebra.number(source.softcap)
        z = algebra.product(cap, algebra.apply("tanh", algebra.symbol(f"{algebra.write(z)} / {algebra.write(cap)}")))
    return f"{losses}, z = {algebra.write(z)}"


def _loss(term: Term) -> str:
    factor = "" if term.coefficient == 1.0 else f"{algebra.write(algebra.number(term.coefficient))} · "
    mask = any(step[0] in ("mul", "div", "fill", "keep") for step in term.program)
    weight = "m · " if mask else ""
    return f"{factor}{weight}{LOSSES.get(term.loss, term.loss)}"
