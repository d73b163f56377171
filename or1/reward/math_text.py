r"""Rules on the text of a maths answer, for what math-verify drops or misreads before its comparison starts.

math-verify drops number bases, units and trailing text, reads `1:2:3` as divisions and a word as a product of letters.
These rules see the answer and the gold as written. `verdict` only refuses, except where both sides are words or based
numbers, which it decides. Pure functions; each is linear in the length of a text, or nearly so.
"""

from __future__ import annotations

import re
from decimal import Decimal

_TEXT = r"\\(?:text|textbf|textit|textrm|textsf|textnormal|mbox|mathrm|mathbf|mathit|mathsf|operatorname)\s*"
_TEXT_GROUP = re.compile(_TEXT + r"\{([^{}]*)\}")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN, _CLOSE = frozenset(("{", "(", "[", "\\{")), frozenset(("}", ")", "]", "\\}"))

# --- one spelling for what means the same

_THIN = r"(?:\\[,;:! ]|~|\\thinspace(?![A-Za-z]))"
_GROUPED = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_THIN}\s*\d{{3}})+(?!\d)")
_GROUPED_BY_SPACES = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_THIN_SPACE = re.compile(r"(?<!\\)\\[,;: ]")
_MIXED = re.compile(r"([+-]?\d+)\s+(\d+)\s*/\s*(\d+)")
_DELIMITER = re.compile(r"(?<!\\)(?<!\\left)(?<!\\right)(?:\\[()\[\]]|\$)")
# Not the stop of \right., of an ellipsis, or of p.m.
_FINAL_STOP = re.compile(r"(?<!\\left)(?<!\\right)(?<!\.)(?<!\.[A-Za-z])(?<!\\)[.,;]$")
_E_NOTATION = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,4})(?![\w.^{])")
_MAX_DIGITS = 400
"""A number in e-notation with a larger exponent is not written out."""


def tidy(text: str) -> str:
    r"""Write an answer without what carries no meaning: $...$, \(...\), thin spaces, a final full stop."""
    text = _GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _THIN_SPACE.sub(" ", text)
    # A space, for the numbers of \(8\)\(7\) must not grow together.
    text = _DELIMITER.sub(" ", text)
    text = _FINAL_STOP.sub("", text.strip()).strip()
    if mixed := _MIXED.fullmatch(text):
        return f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    return text.replace(" ", "") if _GROUPED_BY_SPACES.fullmatch(text) else text


def readings(text: str) -> tuple[str, ...]:
    """What a text may stand for. `1e3` is 1000; `2e-3` is 0.002, or two times Euler's number minus 3."""
    decimal = _E_NOTATION.sub(_as_decimal, text)
    if decimal == text:
        return (text,)
    # Both spellings, for math-verify holds 6.02\times10^{23} and the written-out integer apart.
    numbers = decimal, _E_NOTATION.sub(r"\1\\times10^{\2}", text)
    signed = any(not found[2].isdigit() for found in _E_NOTATION.finditer(text))
    return (*numbers, text) if signed else numbers


def _as_decimal(found: re.Match[str]) -> str:
    exponent = int(found[2])
    return format(Decimal(f"{found[1]}e{exponent}"), "f") if abs(exponent) <= _MAX_DIGITS else found[0]


def split_top(text: str, separator: str) -> list[str]:
    """The parts of a text between the separators that stand outside all brackets."""
    parts, depth, start, before = [], 0, 0, ""
    for token in _TOKEN.finditer(text):
        depth = max(0, depth + (token[0] in _OPEN) - (token[0] in _CLOSE))
        # <= and != hold no equals sign.
        if depth == 0 and token[0] == separator and not (separator == "=" and before in ("<", ">", "!")):
            parts.append(text[start : token.start()])
            start = token.end()
        before = token[0]
    return [*parts, text[start:]]


# --- the rules


def verdict(answer: str, gold: str) -> bool | None:
    """Whether the tidied texts say by themselves that the answer is right or wrong; None where they do not.

    A number with a base is right with the same digits and the same base. The base may be missing in the gold only.
    A word is right if it is the gold's word, whatever the case of its letters.
    """
    based = _based(gold)
    if based:
        return based == _based(answer)
    words = _as_words(answer, gold)
    if words:
        return words[0] == words[1]
    if len(_ratio(gold)) > 2 and len(_ratio(answer)) != len(_ratio(gold)):
        return False
    if _adds_words(answer, gold) or _other_unit(answer, gold) or _numbers_side_by_side(answer, gold):
        return False
    return None


_WORD = re.compile(rf"{_TEXT}\{{\s*([A-Za-z][A-Za-z' -]*?)\s*\}}|([A-Za-z]+(?: [A-Za-z]+)*)")
_SHORTEST_WORD = 4
"""Fewer letters outside \\text{} may be a product, `abc` = `cab`, or the names of points."""


def _as_words(answer: str, gold: str) -> tuple[str, str] | None:
    found = [_WORD.fullmatch(text) for text in (answer, gold)]
    if not all(found):
        return None
    texts = [(word[1] or word[2]).lower() for word in found]
    if any(part in ("and", "or") for text in texts for part in text.split()):
        return None  # a list, whose order is free
    wrapped = any(word[1] for word in found)
    words = [re.sub("[^a-z]", "", text) for text in texts]
    if min(map(len, words)) < (2 if wrapped else _SHORTEST_WORD):
        return None
    if not wrapped and any(len(part) == 1 for text in texts for part in text.split()):
        return None
    # Neighbours in the alphabet, abcd or wxyz, name quantities, and their product has no order.
    spelled = "".join(sorted(words[1]))
    if not wrapped and spelled == "".join(map(chr, range(ord(spelled[0]), ord(spelled[0]) + len(spelled)))):
        return None
    return words[0], words[1]


_BASED = re.compile(r"([0-9A-F.]+)(?:_(?:base)?|(?:in)?base)(\d{1,3}|[a-z]+)")
_BASE_NAMES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "sixteen": 16,
}


def _based(text: str) -> tuple[str, int] | None:
    """Digits and base of a number such as 1011_2."""
    text = _TEXT_GROUP.sub(_upper_digits, split_top(text, "=")[-1])
    found = _BASED.fullmatch(re.sub(r"\\!|[\s,{}()]", "", text))
    if not found or not any(digit.isdigit() for digit in found[1]):
        return None
    base = int(found[2]) if found[2].isdigit() else _BASE_NAMES.get(found[2])
    return (found[1].lstrip("0"), base) if base else None


def _upper_digits(group: re.Match[str]) -> str:
    return group[1].upper() if re.fullmatch("[0-9A-Fa-f ]+", group[1]) else group[1]


_DOUBT = frozenset(
    (
        "or",
        "nor",
        "maybe",
        "perhaps",
        "possibly",
        "probably",
        "not",
        "never",
        "neither",
        "either",
        "except",
        "unless",
        "if",
        "otherwise",
        "but",
        "than",
        "least",
        "most",
        "plus",
        "minus",
        "half",
    )
)
_SEPARATOR = re.compile(r"\s*,?\s*(?:and|or)\s*")
_NUMBER_IN_WORDS = re.compile(r"(?<![\w^.])(?<!base )(?<!mod )\d+")


def _adds_words(answer: str, gold: str) -> bool:
    r"""Whether text in the answer changes what its mathematics says: a doubt, a choice, or one more number.

    math-verify drops trailing text, a unit or not. `7\text{ cm}` stays 7; `7\text{ or maybe 8}` is wrong.
    """
    groups = [group for group in _TEXT_GROUP.findall(answer) if not _SEPARATOR.fullmatch(group)]
    if not groups:
        return False
    text = " ".join(groups).lower()
    if _DOUBT & set(re.findall("[a-z]+", text)) - set(re.findall("[a-z]+", gold.lower())):
        return True
    # A number that is all of the answer stands in a \text{} of its own at times.
    if not any(map(str.isalnum, _TEXT_GROUP.sub("", answer))):
        return False
    return not set(_NUMBER_IN_WORDS.findall(text)) <= set(re.findall(r"\d+", gold))


# \frac 1 2 takes its two numbers; behind ^ and _ stands an exponent or an index.
_NUMBERS = re.compile(r"(\\[dtc]?(?:frac|binom)\s*)?(?<![\w.^}])\d[\d.]*\s+\d[\d.]*(?!\s*/|[\d.])")
_WIDE_SPACE = re.compile(r"\\(?:q?quad|enspace|hspace\{[^{}]*\})(?![A-Za-z])")


def _numbers_side_by_side(answer: str, gold: str) -> bool:
    """Whether the answer holds two numbers with nothing between, whose sum math-verify takes; `2 1/2` is one number."""
    return _has_numbers_side_by_side(answer) and not _has_numbers_side_by_side(gold)


def _has_numbers_side_by_side(text: str) -> bool:
    text = _WIDE_SPACE.sub(" ", _TEXT_GROUP.sub(" ", text))
    if not any(sign in text for sign in "\\^_"):
        text = text.replace("{", " ").replace("}", " ")
    return any(not found[1] for found in _NUMBERS.finditer(text))


_UNITS = {
    name: unit
    for unit, names in {
        "second": "s sec secs second seconds",
        "minute": "min mins minute minutes",
        "hour": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "yr yrs year years",
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm cms centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kms kilometer kilometers kilometre kilometres",
        "inch": "in inch inches",
        "foot": "ft foot feet",
        "yard": "yd yds yard yards",
        "mile": "mi mile miles",
        "mg": "mg milligram milligrams",
        "g": "g gram grams",
        "kg": "kg kgs kilogram kilograms",
        "pound": "lb lbs pound pounds",
        "ounce": "oz ounce ounces",
        "liter": "l liter liters litre litres",
        "ml": "ml milliliter milliliters millilitre millilitres",
        "gallon": "gal gallon gallons",
        "cent": "cent cents",
        "dollar": "dollar dollars",
        "euro": "euro euros",
        "degree": "degree degrees deg",
        "radian": "rad radian radians",
        "mph": "mph",
        "km/h": "kmh kmph kph km/h km/hr",
        "m/s": "m/s m/sec",
        "ft/s": "ft/s ft/sec",
    }.items()
    for name in names.split()
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
# Letters without \text{} are a unit behind a number only; behind letters they are one more variable.
_UNIT = re.compile(
    rf"(?s:.+?){_TEXT}\{{([^{{}}]*)\}}\s*(?:\^\s*\{{?\s*(\d)\s*\}}?)?|"
    r"[-\d.,\s/]*\d\s*([A-Za-z]+(?:/[A-Za-z]+)?)\s*(?:\^\s*\{?\s*(\d)\s*\}?)?"
)
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})$")


def _other_unit(answer: str, gold: str) -> bool:
    """Whether both sides end in a known unit and the units differ. A missing or unknown unit is right."""
    units = [_unit(text) for text in (answer, gold)]
    return None not in units and units[0] != units[1]


def _unit(text: str) -> tuple[str, int] | None:
    """The unit that a text ends in, and its power."""
    if _DEGREES.search(text):
        return "degree", 1
    found = _UNIT.fullmatch(text)
    if not found:
        return ("dollar", 1) if text.startswith("\\$") else None
    name, power = (found[1], found[2]) if found[1] is not None else (found[3], found[4])
    *before, unit = name.replace(".", "").split() or [""]
    if len(before) > 1 or any(word not in _POWERS for word in before):
        return None
    plain, _, inside = unit.partition("^")
    if plain not in _UNITS or (inside and not inside.isdigit()):
        return None
    return _UNITS[plain], int(power or inside or 1) * (_POWERS[before[0]] if before else 1)


# --- rules that compare parts, for which the caller brings the comparison

_ASSIGNMENT = re.compile(r"\s*((?:[A-Za-z]+|\\[A-Za-z]+)(?:_(?:\w|\{\w+\}))?)\s*=([^=<>]+)")
_AND = re.compile(r",?\s*(?:\\text\s*\{\s*and\s*\}|(?<![A-Za-z])and(?![A-Za-z]))")
_WRAPPED = re.compile(r"(?:\\left)?\s*(?:\(|\\\{|\[)(.*?)(?:\\right)?\s*(?:\)|\\\}|\])")


def parts_to_match(answer: str, gold: str) -> list[tuple[str, str]]:
    """The pairs (answer, gold) of parts that must be equal one by one; none where the whole is enough.

    They are the members of a ratio of three or more, which math-verify reads as divisions, and the values of a plain
    list where the gold is `x=3, y=4`, for the list's order then says which value is x.
    """
    ratio = _ratio(gold)
    if len(ratio) > 2:
        return list(zip(_ratio(answer), ratio, strict=True))
    assigned = [_ASSIGNMENT.fullmatch(part) for part in _members(gold)]
    names = {found[1] for found in assigned if found}
    values = _members(answer)
    if len(names) < 2 or len(names) != len(assigned) or "=" in answer or len(values) != len(assigned):
        return []
    return [(value.strip(), found[2].strip()) for value, found in zip(values, assigned, strict=True) if found]


def _ratio(text: str) -> list[str]:
    return [part.strip() for part in split_top(text.replace("\\colon", ":").replace("\\!", ""), ":")]


def is_list(text: str) -> bool:
    """Whether a text lists several members, in a pair of brackets or without."""
    return len(_members(text)) > 1


def _members(text: str) -> list[str]:
    text = text.strip()
    wrapped = _WRAPPED.fullmatch(text) if len(split_top(text, ",")) == 1 else None
    return split_top(_AND.sub(",", wrapped[1] if wrapped else text).replace(";", ","), ",")


# 60^\circ = \pi/3, 1.5\text{ h} = 90\text{ min} and 11_{10} = 1011_2 hold, though their numbers differ.
_MEASURED = re.compile(rf"\\circ|[_:%]|\\\$|{_TEXT}\{{|\d\s*[A-Za-z]+$")


def chain(text: str) -> list[str]:
    """The members without a unit of a chain of equations, `6=7`; none where the text is no chain, or a list of them."""
    if "=" not in text or ";" in text or "mod" in text or len(split_top(text, ",")) > 1:
        return []
    parts = [tidy(part) for part in split_top(text, "=")]
    return [part for part in parts if part and not _MEASURED.search(part)]
