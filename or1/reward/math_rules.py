r"""Rules on parsed maths answers, for pairs that math-verify wrongly calls equal.

`agrees` checks only pairs that math-verify accepted, and rejects:

    equations    accepted because neither has a real solution, such as identities and `1=2`
    numbers      that differ by less than the absolute tolerance, such as 2^{-100} and 2^{-101}
    arithmetic   that is unfinished, such as 46+11 where the gold is 57

Any of these functions may never return, like math-verify itself. They do not modify parsed values, since golds are
cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import sympy
from sympy import Add, Basic, Eq, Expr, FiniteSet, Float, Integer, Interval, MatrixBase, Mul, Rational, Tuple
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import And

SMALL = 1e-6
"""Size below which decimals are compared by their ratio, since math-verify compares to 6 places."""
_SIGNIFICANT = 5e-6
"""Relative difference allowed between two small decimals: a rounding to 6 digits."""
_ROUNDED = 5e-2
"""Relative difference allowed in a chain of equations, where a decimal may be rounded: x = 22/7 = 3.14."""
_HUGE = 10_000
"""Exponent or factorial from which numbers are compared by their ratio, not digit by digit."""

# The errors of sympy for values that an operation does not support.
_ERRORS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError)
_UNDONE = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative, sympy.factorial, sympy.factorial2)

Accepts = Callable[[Any, Any], bool]
"""math-verify's comparison of two parsed values."""


def agrees(gold: Any, answer: Any, accepts: Accepts) -> bool:
    """Return whether `answer`, which math-verify calls equal to `gold`, is equal by the rules of this module too."""
    if _same(gold, answer):
        return True
    gold, answer = _assigned(gold), _assigned(answer)
    if _is_equation(answer) and not _is_equation(gold):
        answer = _relations(answer)[-1].rhs
    elif _is_equation(gold) and _is_name(gold.lhs if isinstance(gold, Eq) else None) and not _is_equation(answer):
        gold = gold.rhs
    if isinstance(gold, Relational | And) and isinstance(answer, Relational | And):
        return _relations_agree(gold, answer, accepts)
    if isinstance(gold, Relational | And):
        return answer is not sympy.S.EmptySet
    if isinstance(answer, FiniteSet) and len(answer) == 1 and isinstance(gold, Expr):
        (answer,) = answer
    pairs = _elements(gold, answer)
    if pairs is not None:
        return all(agrees(one, other, accepts) for one, other in pairs)
    return not (_is_number(gold) and _is_number(answer)) or _numbers_agree(gold, answer)


def chain_holds(parsed: Sequence[Any]) -> bool:
    """Return whether all numbers in a chain, `x = 3+4 = 7`, are equal to the last one.

    Values of functions are ignored: \\log may have another base, and \\sin may take degrees.
    """
    numbers = [value for value in parsed if _is_number(value) and not value.has(sympy.Function, *_UNDONE)]
    return all(_close(number, numbers[-1], _ROUNDED) for number in numbers[:-1])


def is_number_for_set(golds: Sequence[Any], parsed: Sequence[Any]) -> bool:
    """Return whether the gold is a single number and the answer a set."""
    return any(map(_is_number, golds)) and any(isinstance(value, FiniteSet) for value in parsed)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, Expr) and not value.free_symbols and bool(value.is_number)


# --- sets, tuples, matrices


def _elements(gold: Any, answer: Any) -> list[tuple[Any, Any]] | None:
    """Return the pairs of corresponding elements; None if the values have no elements or their number differs."""
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return list(zip(gold.flat(), answer.flat(), strict=True)) if gold.shape == answer.shape else None
    of_gold, of_answer = _listed(gold), _listed(answer)
    if of_gold is None or of_answer is None or len(of_gold) != len(of_answer):
        return None
    if isinstance(gold, FiniteSet) or isinstance(answer, FiniteSet):
        of_gold, of_answer = sorted(of_gold, key=_order), sorted(of_answer, key=_order)
    return list(zip(of_gold, of_answer, strict=True))


def _listed(value: Any) -> list[Any] | None:
    if isinstance(value, Interval):
        return [value.start, value.end]
    return list(value.args) if isinstance(value, FiniteSet | Tuple) else None


def _order(value: Any) -> Any:
    value = _assigned(value)
    value = value.rhs if isinstance(value, Eq) and _is_name(value.lhs) else value
    try:
        return sympy.default_sort_key(value.evalf())
    except _ERRORS:
        return sympy.default_sort_key(value)


# --- numbers


def _numbers_agree(gold: Expr, answer: Expr) -> bool:
    if isinstance(gold, Integer | Float) and _is_undone(answer):
        return False
    # math-verify calls 40 and 40% equal.
    return any(_close(one, other) for one, other in product(_with_percent(gold), _with_percent(answer)))


def _with_percent(value: Expr) -> list[Expr]:
    percent = isinstance(value, Mul) and len(value.args) == 2 and isinstance(value.args[1], sympy.UnevaluatedExpr)
    return [value, value.args[0]] if percent else [value]


def _is_undone(value: Expr) -> bool:
    """Return whether a number is unfinished: a sum or product of written numbers, a factorial, a sum, an integral.

    2^{10}-1, 5 \\cdot 10^3, 3\\pi/4, \\frac{114}{2}, \\binom{10}{3} and all values with at most one written number in
    each node are finished.
    """
    return any(isinstance(node, _UNDONE) or _written(node) > 1 for node in sympy.preorder_traversal(value))


def _written(node: Basic) -> int:
    """Return how many members of a sum or product are written numbers, or sums and products of written numbers."""
    if isinstance(node, Add):
        return sum(_is_written(term) for term in node.args)
    if isinstance(node, Mul):
        return sum(_is_written(factor) and abs(factor) != 1 for factor in node.args)
    return 0


def _is_written(value: Basic) -> bool:
    if isinstance(value, Add | Mul):
        return all(map(_is_written, value.args))
    return isinstance(value, Integer | Float)


def _close(one: Expr, other: Expr, rounded: float | None = None) -> bool:
    """Return whether two numbers are equal: to the digits of a decimal if there is one, else exactly.

    rounded  allowed relative difference of a decimal; default: decimals of ordinary size are equal, since math-verify
             compared them
    """
    huge = any(map(_has_huge, (one, other)))
    if not huge:
        one, other = one.doit(), other.doit()
        if _same(one, other):
            return True
        if isinstance(one, Rational) and isinstance(other, Rational):
            return False
    if not huge and not any(value.has(Float, *_UNDONE) for value in (one, other)):
        try:
            return not (one - other).evalf(3, maxn=400, strict=True)
        except PrecisionExhausted:
            return True  # 400 digits of the difference are zero
        except _ERRORS:
            pass
    return _close_decimals(one, other, rounded)


def _close_decimals(one: Expr, other: Expr, rounded: float | None) -> bool:
    try:
        difference, size = abs(sympy.N(one - other, 30)), max(abs(sympy.N(one, 30)), abs(sympy.N(other, 30)))
        if rounded is not None:
            return bool(difference <= rounded * size)
        return bool(size >= SMALL) or bool(difference <= _SIGNIFICANT * size)
    except _ERRORS:
        return True


def _has_huge(value: Expr) -> bool:
    powers = (node.exp for node in value.atoms(sympy.Pow))
    factorials = (node.args[0] for node in value.atoms(sympy.factorial))
    return any(not _below(size, _HUGE) for size in (*powers, *factorials))


def _below(value: Expr, limit: int) -> bool:
    return not isinstance(value, Integer) or abs(value) < limit


# --- equations and inequalities


def _relations(value: Any) -> list[Any]:
    """Return the members of a conjunction in written order, or a list of the value itself."""
    return list(getattr(value, "_unsorted_args", value.args)) if isinstance(value, And) else [value]


def _is_equation(value: Any) -> bool:
    return isinstance(value, Eq | And) and all(isinstance(part, Eq) for part in _relations(value))


def _is_name(value: Any) -> bool:
    """Return whether the left side of an equation is only a name for the right side, as `x`, `f(x)` and `A/S`."""
    if not isinstance(value, Basic):
        return False
    return bool(value.is_Symbol) or (bool(value.args) and all(_is_name(arg) or arg == -1 for arg in value.args))


def _assigned(value: Any) -> Any:
    """Return a chain `x = ... = 7` as `x = 7`, as math-verify reads it; other values unchanged."""
    if isinstance(value, And) and _is_equation(value) and _is_name(_relations(value)[0].lhs):
        return Eq(_relations(value)[0].lhs, _relations(value)[-1].rhs, evaluate=False)
    return value


def _relations_agree(gold: Any, answer: Any, accepts: Accepts) -> bool:
    pairs = list(zip(_relations(gold), _relations(answer), strict=False))
    return all(_relation_agrees(one, other, accepts) for one, other in pairs)


def _relation_agrees(gold: Any, answer: Any, accepts: Accepts) -> bool:
    if not isinstance(gold, Relational) or not isinstance(answer, Relational):
        return True
    if gold.lhs == answer.lhs and _is_number(gold.rhs) and _is_number(answer.rhs):
        return accepts(gold.rhs, answer.rhs) and _numbers_agree(gold.rhs, answer.rhs)
    differences = [_difference(relation) for relation in (gold, answer)]
    # Two identities, 2+3=5 and 1=1, differ only in their form.
    if differences[0] is not None and _always_zero(differences[0]):
        return _sides_agree(gold, answer, lambda one, other: _form(one) == _form(other))
    if _sides_agree(gold, answer, lambda one, other: accepts(one, other) and agrees(one, other, accepts)):
        return True
    if differences[0] is None or differences[1] is None:
        return False
    proportional = _proportional(differences[0], differences[1])
    if isinstance(gold, Eq) and isinstance(answer, Eq) and not proportional:
        return _solutions_agree(gold, answer, accepts)
    return proportional is not False


def _solutions_agree(gold: Eq, answer: Eq, accepts: Accepts) -> bool:
    """Return whether the equations have equal solutions. Unlike math-verify, two equations without any are unequal."""
    try:
        found = [sympy.solve(equation, equation.free_symbols, dict=True) for equation in (gold, answer)]
    except _ERRORS:
        return False
    if not found[0] or len(found[0]) != len(found[1]):
        return False
    return all(any(_solution_agrees(one, other, accepts) for other in found[1]) for one in found[0])


def _solution_agrees(gold: dict[Any, Any], answer: dict[Any, Any], accepts: Accepts) -> bool:
    if gold.keys() != answer.keys():
        return False
    return all(accepts(value, answer[name]) and agrees(value, answer[name], accepts) for name, value in gold.items())


def _sides_agree(gold: Relational, answer: Relational, equal: Accepts) -> bool:
    """Return whether the relations have the same two sides, in either order."""
    for left, right in ((answer.lhs, answer.rhs), (answer.rhs, answer.lhs)):
        try:
            if equal(gold.lhs, left) and equal(gold.rhs, right):
                return True
        except _ERRORS:
            continue
    return False


def _form(value: Any) -> Any:
    """Return a value's form, which ignores the order in sums and products and the type of numbers."""
    if isinstance(value, sympy.Number):
        return str(sympy.N(value))
    if not isinstance(value, Basic) or not value.args:
        return str(value)
    parts = [_form(arg) for arg in value.args]
    return type(value).__name__, tuple(sorted(parts, key=str) if isinstance(value, Add | Mul) else parts)


def _difference(relation: Relational) -> Expr | None:
    """Return left minus right side, with a symbol for each unknown function; None for matrices and sets."""
    try:
        difference = relation.lhs - relation.rhs
    except _ERRORS:
        return None
    if not isinstance(difference, Expr) or isinstance(difference, sympy.MatrixExpr):
        return None
    unknown = difference.atoms(AppliedUndef, sympy.Derivative)
    return difference.xreplace({part: sympy.Symbol(f"[{part}]", real=True) for part in unknown})


def _proportional(gold: Expr, answer: Expr) -> bool | None:
    """Return whether two expressions are equal up to a constant nonzero factor; None if they have no values.

    The comparison is at three points. Two numbers are never proportional, nor are two expressions that are always 0:
    the sides of such relations are compared instead.
    """
    rounded = gold.has(Float) or answer.has(Float)
    names = [symbol.name for symbol in gold.free_symbols | answer.free_symbols]
    ratios = []
    for point in _points(names):
        of_gold, of_answer = _at(gold, point), _at(answer, point)
        if of_gold is None or of_answer is None:
            return None
        if _is_zero(of_gold, rounded) != _is_zero(of_answer, rounded):
            return False
        if not _is_zero(of_gold, rounded):
            ratios.append(of_gold / of_answer)
    if not names or not ratios:
        return False
    share = 1e-9 if rounded else 1e-40
    return all(bool(abs(ratio - ratios[0]) <= share * abs(ratios[0])) for ratio in ratios)


def _always_zero(difference: Expr) -> bool:
    """Return whether a relation constrains no variable: its sides are numbers, or differ by 0 at every point."""
    names = [symbol.name for symbol in difference.free_symbols]
    return all(_is_zero(_at(difference, point), difference.has(Float)) for point in _points(names)) if names else True


def _is_zero(value: Expr | None, rounded: bool) -> bool:
    return value is not None and bool(abs(value) < (1e-12 if rounded else 1e-50))


def _points(names: Iterable[str]) -> Iterator[dict[str, Rational]]:
    """Yield three points, each a value for each name, the same for the same names."""
    for start in (5, 7, 11):
        yield {name: Rational(start * (index + 2) + 3, 7 + index) for index, name in enumerate(sorted(set(names)))}


def _at(expression: Expr, point: dict[str, Rational]) -> Expr | None:
    values = {symbol: point[symbol.name] for symbol in expression.free_symbols}
    try:
        value = sympy.N(expression.subs(values), 60)
    except _ERRORS:
        return None
    return value if value.is_number and value.is_finite else None
