"""Formulas as people write them: `x · (mean(x²) + 1e-06)^(-1/2) · (1 + w)`.

sympy holds the expression and knows what a number is (`0.08838834764831845` is `√2/16`); what it would reorder or
simplify away is left as the pattern wrote it, for a reader compares it with the code.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

DIGITS = 6  # of a number that is written as a decimal
LARGEST = 1 << 20  # numerator or denominator under a root


def symbol(name: str) -> sympy.Symbol:
    """A tensor, by the name that the formula gives it."""
    return sympy.Symbol(name)


def apply(name: str, *arguments: Any) -> sympy.Expr:
    """A function of tensors that sympy need not know: `mean(x²)`."""
    return sympy.Function(name)(*arguments)


def number(value: float) -> sympy.Expr:
    """The number; exactly, where it is the root of a short fraction and no short decimal."""
    if value == int(value):
        return sympy.Integer(int(value))
    if float(f"{value:.{DIGITS}g}") != value:
        square = Fraction(value * value).limit_denominator(LARGEST)
        if square.numerator < LARGEST and math.isclose(math.sqrt(square), abs(value), rel_tol=1e-12):
            root = sympy.sqrt(sympy.Rational(square.numerator, square.denominator))
            return root if value > 0 else -root
    return sympy.Float(value)


def power(base: Any, exponent: Any) -> sympy.Expr:
    """`base ^ exponent`, left as it is."""
    return sympy.Pow(base, sympy.nsimplify(exponent), evaluate=False)


def product(*factors: Any) -> sympy.Expr:
    """The factors in their order, ones left out."""
    kept = [factor for factor in map(sympy.sympify, factors) if factor != 1]
    return sympy.Mul(*kept, evaluate=False) if len(kept) > 1 else (kept or [sympy.Integer(1)])[0]


def total(*terms: Any) -> sympy.Expr:
    """The terms in their order, zeros left out."""
    kept = [term for term in map(sympy.sympify, terms) if term != 0]
    return sympy.Add(*kept, evaluate=False) if len(kept) > 1 else (kept or [sympy.Integer(0)])[0]


class _Printer(StrPrinter):  # type: ignore[misc]  # sympy has no types
    def _print_Mul(self, expr: sympy.Mul) -> str:  # noqa: N802  (sympy finds the method by this name)
        factors = list(expr.args)
        if factors[0] == -1:
            return f"-{self.doprint(product(*factors[1:]))}"
        if isinstance(factors[0], sympy.Rational) and factors[0].p == 1 and len(factors) == 2:
            return f"{self.parenthesize(factors[1], PRECEDENCE['Mul'])}/{factors[0].q}"
        return " · ".join(self.parenthesize(factor, PRECEDENCE["Mul"]) for factor in factors)

    def _print_Add(self, expr: sympy.Add, order: Any = None) -> str:  # noqa: N802
        text = ""
        for term in expr.args:
            written = self.doprint(term)
            minus = written.startswith("-")
            text += (" - " if minus else " + ") + written.removeprefix("-") if text else written
        return text

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:  # noqa: N802
        base = self.parenthesize(expr.base, PRECEDENCE["Pow"])
        if expr.exp == 2:
            return f"{base}²"
        if expr.exp == sympy.Rational(1, 2):
            return f"√{base}"
        return f"{base}^({self.doprint(expr.exp)})"

    def _print_Float(self, expr: sympy.Float) -> str:  # noqa: N802
        return f"{float(expr):.{DIGITS}g}"


def write(expression: Any) -> str:
    """The expression as one line of text."""
    return str(_Printer().doprint(sympy.sympify(expression)))
