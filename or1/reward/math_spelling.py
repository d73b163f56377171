r"""The spelling of maths answers in LaTeX, for expressions that math-verify cannot read or takes for another.

math-verify drops the last letter of `a + b + c` as a unit, and reads `2007 + \frac\pi 2` as 2. It does not read
`\frac{2469}{20,\!000}` at all. `respelled` and `with_symbols` write such texts in a form that it reads. They change no
meaning. `same_spelling` compares two texts as written. Pure functions, each nearly linear in the length of a text.
"""

from __future__ import annotations

import re

_THIN = r"\\[,;:! ]|~|\\thinspace(?![A-Za-z])"
# `1{,}000` and `1,\!000` are one number. A plain comma may separate two: 1,000 is a number or a pair.
_GROUP = rf"(?:(?:{_THIN}|\{{,\}}|,\s*\\!)\s*\d{{3}})"
_GROUPED = re.compile(rf"(?<![\d.,])\d{{1,3}}{_GROUP}+(?!\d)")
# A numerator or a denominator is never a pair.
_FRACTION = re.compile(r"(\\[dtc]?frac)\{\s*([-+]?[\d,]+)\s*\}\{\s*([-+]?[\d,]+)\s*\}")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+")
_PHANTOM = re.compile(r"\\[hv]?phantom(?![A-Za-z])\s*(?:\{[^{}]*\}|[^\\{}])")

_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|"
    "varphi|chi|psi|omega"
)
_UNKNOWN = rf"\\(?:{_GREEK})(?![A-Za-z])"
_LETTER = rf"(?:{_UNKNOWN}|\\pi(?![A-Za-z]))"
_ARGUMENT = rf"(?:(?P<%s>{_LETTER}|[A-Za-z0-9])|(?P<%s>\{{[^{{}}]*\}}))"
_BARE_FRACTION = re.compile(rf"(\\[dtc]?frac)\s*{_ARGUMENT % ('a', 'b')}\s*{_ARGUMENT % ('c', 'd')}")
_BARE_ROOT = re.compile(rf"\\sqrt\s*({_LETTER})")


def respelled(text: str) -> str:
    r"""Return a text with whole numbers in place of `20,\!000`, with braces in `\frac\pi 2`, and without `\phantom`."""
    text = _GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _FRACTION.sub(_without_commas, text)
    text = _PHANTOM.sub(" ", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    return _BARE_FRACTION.sub(_braced, text) if re.search(_LETTER, text) else text


def _without_commas(found: re.Match[str]) -> str:
    parts = [part.replace(",", "") if _THOUSANDS.fullmatch(part) else part for part in (found[2], found[3])]
    return f"{found[1]}{{{parts[0]}}}{{{parts[1]}}}"


def _braced(found: re.Match[str]) -> str:
    over, under = found["b"] or f"{{{found['a']}}}", found["d"] or f"{{{found['c']}}}"
    return f"{found[1]}{over}{under}"


# --- symbols that math-verify drops as units

_LAST = re.compile(r"(?<![A-Za-z\\.])([cdghlmost]|ab|bc)$")
# No space can separate a letter and its full stop in `p.m`.
_VARIABLE = re.compile(rf"(?<![A-Za-z\\.])[A-Za-z](?![A-Za-z.])|{_UNKNOWN}")
_RELATION = re.compile(r"[=,;<>]|\\(?:[lg]eq?|[lg]t|in|approx|sim|to)(?![A-Za-z])")
_OPERATOR = re.compile(
    r"(?:[-+*]|\\(?:cdot|times|div|pm|mp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|(?:sin|cos|tan)h|log|ln|exp)"
    r"(?:\s*[_^]\s*(?:\w|\{[^{}]*\}))*)$"
)
_RATE = re.compile(r"[-+\d.\s]*\d\s*[A-Za-z]+\s*/$")
_NO_LETTERS = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s*\{[^{}]*\}|_\{[^{}]*\}")


def with_symbols(text: str) -> str:
    r"""Return a text whose last letter is in braces if the letter is a symbol and no unit: `a + b + {c}`.

    A last letter is a symbol after an operator or a function, and if its term or sum holds another variable. A letter
    that occurs before is a symbol too, as in `f(t) = 3t`. `5 m`, `x = 5 m` and `5 m / s` have units.
    """
    text = text.rstrip()
    last = _LAST.search(text)
    if last is None or (not (before := text[: last.start()].rstrip()) or _RATE.fullmatch(_member(before))):
        return text
    member = _member(before)
    known = set(_VARIABLE.findall(_NO_LETTERS.sub(" ", before)))
    if last[1] in (*known, "ab", "bc") or _OPERATOR.search(member) or known & set(_VARIABLE.findall(member)):
        return f"{before} {{{last[1]}}}"
    return text


def _member(text: str) -> str:
    """Return what follows the last relation or comma."""
    return _RELATION.split(text)[-1].strip()


# --- equal as written

_TOKEN = re.compile(r"\\(?:text|textbf|textit|textrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_SPACES = frozenset((r"\,", r"\;", r"\:", r"\!", "\\ ", "~", r"\quad", r"\qquad", r"\thinspace"))
_SILENT = frozenset((r"\displaystyle", r"\textstyle", r"\limits"))
_SAME = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\le": r"\leq", r"\ge": r"\geq"}
_NUMERIC = frozenset("0123456789.,")


def same_spelling(answer: str, gold: str) -> bool:
    r"""Return whether two texts are the same expression as written, up to white space and the size of delimiters.

    A space between digits counts: `1 2` is not 12, and `1, 234` is not 1,234.
    """
    return _spelling(answer) == _spelling(gold)


def _spelling(text: str) -> list[str]:
    found: list[str] = []
    for token in _TOKEN.findall(text):
        if token.isspace() or token in _SPACES:
            if found and found[-1] != " ":
                found.append(" ")
        elif token not in _SILENT:
            found.append(_SAME.get(token, " ".join(token.split())))
    tokens: list[str] = []
    for i, token in enumerate(found):
        after = next((each for each in found[i + 1 : i + 3] if each != " "), "")
        if token in (r"\left", r"\right") and after not in (".", ""):
            continue
        if token == " " and not (tokens and tokens[-1] in _NUMERIC and after in _NUMERIC):
            continue
        tokens.append(token)
    return tokens
