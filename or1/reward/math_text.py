r"""Rules on the text of a maths answer, for all that math-verify drops or misreads before its comparison starts.

math-verify drops number bases, units and trailing text. It reads `1:2:3` as divisions and a word as a product of
letters. These rules compare the answer and the gold as written. `verdict` only rejects, except for words and numbers
with a base, which it decides. Pure functions, each nearly linear in the length of a text.
"""

from __future__ import annotations

import re
from decimal import Decimal

from or1.reward import math_spelling

_TEXT = r"\\(?:text|textbf|textit|textrm|textsf|textnormal|mbox|mathrm|mathbf|mathit|mathsf|operatorname)\s*"
_TEXT_GROUP = re.compile(_TEXT + r"\{([^{}]*)\}")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN, _CLOSE = frozenset(("{", "(", "[", "\\{")), frozenset(("}", ")", "]", "\\}"))

# --- one spelling for equal meanings

_GROUPED_BY_SPACES = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_THIN_SPACE = re.compile(r"(?<!\\)\\[,;: ]")
_MIXED = re.compile(r"([+-]?\d+)\s+(\d+)\s*/\s*(\d+)")
_DELIMITER = re.compile(r"(?<!\\)(?<!\\left)(?<!\\right)(?:\\[()\[\]]|\$)")
# Excludes the full stop of \right., of an ellipsis, and of p.m.
_FINAL_STOP = re.compile(r"(?<!\\left)(?<!\\right)(?<!\.)(?<!\.[A-Za-z])(?<!\\)[.,;]$")
_E_NOTATION = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,4})(?![\w.^{])")
_MAX_DIGITS = 400
"""Largest exponent of a number in e-notation that is written out in digits."""


def tidy(text: str) -> str:
    r"""Remove the parts of an answer without meaning: $...$, \(...\), thin spaces, a final full stop."""
    text = math_spelling.respelled(text)
    text = _THIN_SPACE.sub(" ", text)
    # A space, since the numbers of \(8\)\(7\) must not become 87.
    text = _DELIMITER.sub(" ", text)
    text = _FINAL_STOP.sub("", text.strip()).strip()
    if mixed := _MIXED.fullmatch(text):
        return f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    return text.replace(" ", "") if _GROUPED_BY_SPACES.fullmatch(text) else text


def readings(text: str) -> tuple[str, ...]:
    """Return the possible readings of a text. `1e3` is 1000; `2e-3` is 0.002, or two times Euler's number minus 3."""
    text = math_spelling.with_symbols(text)
    decimal = _E_NOTATION.sub(_as_decimal, text)
    if decimal == text:
        return (text,)
    # Both spellings, since math-verify calls 6.02\times10^{23} and the same integer in digits different.
    numbers = decimal, _E_NOTATION.sub(r"\1\\times10^{\2}", text)
    signed = any(not found[2].isdigit() for found in _E_NOTATION.finditer(text))
    return (*numbers, text) if signed else numbers


def _as_decimal(found: re.Match[str]) -> str:
    exponent = int(found[2])
    return format(Decimal(f"{found[1]}e{exponent}"), "f") if abs(exponent) <= _MAX_DIGITS else found[0]


def split_top(text: str, separator: str) -> list[str]:
    """Split a text at the separators outside all brackets."""
    parts, depth, start, before = [], 0, 0, ""
    for token in _TOKEN.finditer(text):
        depth = max(0, depth + (token[0] in _OPEN) - (token[0] in _CLOSE))
        # The sign in <= and != is not an equals sign.
        if depth == 0 and token[0] == separator and not (separator == "=" and before in ("<", ">", "!")):
            parts.append(text[start : token.start()])
            start = token.end()
        before = token[0]
    return [*parts, text[start:]]


# --- the rules


def verdict(answer: str, gold: str) -> bool | None:
    """Return True or False if the tidied texts alone decide the answer, else None.

    A number with a base is right with the same digits and the same base. Only the gold may omit the base.
    A word is right if it is the gold's word; letter case does not count.
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
"""Least letters of a word outside \\text{}. Fewer may be a product, `abc` = `cab`, or the names of points."""


def _as_words(answer: str, gold: str) -> tuple[str, str] | None:
    found = [word for text in (answer, gold) if (word := _WORD.fullmatch(text))]
    if len(found) < 2:
        return None
    texts = [(word[1] or word[2]).lower() for word in found]
    if any(part in ("and", "or") for text in texts for part in text.split()):
        return None  # a list, in any order
    wrapped = any(word[1] for word in found)
    words = [re.sub("[^a-z]", "", text) for text in texts]
    if min(map(len, words)) < (2 if wrapped else _SHORTEST_WORD):
        return None
    if not wrapped and any(len(part) == 1 for text in texts for part in text.split()):
        return None
    # Neighbours in the alphabet, abcd or wxyz, are names of quantities, whose product has no order.
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
    """Return the digits and the base of a number such as 1011_2."""
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
    r"""Return whether text in the answer changes its meaning: a doubt, a choice, or another number.

    math-verify drops all trailing text, not only units. `7\text{ cm}` is 7; `7\text{ or maybe 8}` is wrong.
    """
    groups = [group for group in _TEXT_GROUP.findall(answer) if not _SEPARATOR.fullmatch(group)]
    if not groups:
        return False
    text = " ".join(groups).lower()
    if _DOUBT & set(re.findall("[a-z]+", text)) - set(re.findall("[a-z]+", gold.lower())):
        return True
    # The whole answer may be one number inside \text{}.
    if not any(map(str.isalnum, _TEXT_GROUP.sub("", answer))):
        return False
    return not set(_NUMBER_IN_WORDS.findall(text)) <= set(re.findall(r"\d+", gold))


# The two numbers of \frac 1 2 are its arguments. A number after ^ or _ is an exponent or an index.
_NUMBERS = re.compile(r"(\\[dtc]?(?:frac|binom)\s*)?(?<![\w.^}])\d[\d.]*\s+\d[\d.]*(?!\s*/|[\d.])")
_WIDE_SPACE = re.compile(r"\\(?:q?quad|enspace|hspace\{[^{}]*\})(?![A-Za-z])")


def _numbers_side_by_side(answer: str, gold: str) -> bool:
    """Return whether only the answer has two numbers side by side, which math-verify adds. `2 1/2` is one number."""
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
# Letters without \text{} are a unit only after a number. After letters they are another variable.
_UNIT = re.compile(
    rf"(?s:.+?){_TEXT}\{{([^{{}}]*)\}}\s*(?:\^\s*\{{?\s*(\d)\s*\}}?)?|"
    r"[-\d.,\s/]*\d\s*([A-Za-z]+(?:/[A-Za-z]+)?)\s*(?:\^\s*\{?\s*(\d)\s*\}?)?"
)
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})$")


def _other_unit(answer: str, gold: str) -> bool:
    """Return whether both sides end in known units that differ. A missing or unknown unit is accepted."""
    units = [_unit(text) for text in (answer, gold)]
    return None not in units and units[0] != units[1]


def _unit(text: str) -> tuple[str, int] | None:
    """Return the unit at the end of a text, and its power."""
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


# --- parts that the caller must compare

_ASSIGNMENT = re.compile(r"\s*((?:[A-Za-z]+|\\[A-Za-z]+)(?:_(?:\w|\{\w+\}))?)\s*=([^=<>]+)")
_AND = re.compile(r",?\s*(?:\\text\s*\{\s*and\s*\}|(?<![A-Za-z])and(?![A-Za-z]))")
_WRAPPED = re.compile(r"(?:\\left)?\s*(?:\(|\\\{|\[)(.*?)(?:\\right)?\s*(?:\)|\\\}|\])")


def parts_to_match(answer: str, gold: str) -> list[tuple[str, str]]:
    """Return the pairs (answer, gold) of parts that must be equal one by one; empty if the whole is enough.

    The parts are the members of a ratio of three or more, which math-verify reads as divisions. If the gold is
    `x=3, y=4` and the answer a plain list, the parts are the values: their order decides which value is x.
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
    """Return whether a text is a list of several members, with or without brackets."""
    return len(_members(text)) > 1


def _members(text: str) -> list[str]:
    text = text.strip()
    wrapped = _WRAPPED.fullmatch(text) if len(split_top(text, ",")) == 1 else None
    return split_top(_AND.sub(",", wrapped[1] if wrapped else text).replace(";", ","), ",")


# 60^\circ = \pi/3, 1.5\text{ h} = 90\text{ min} and 11_{10} = 1011_2 are true, though their numbers differ.
_MEASURED = re.compile(rf"\\circ|[_:%]|\\\$|{_TEXT}\{{|\d\s*[A-Za-z]+$")


def chain(text: str) -> list[str]:
    """Return the members without a unit of a chain of equations, `6=7`; empty for other texts and lists of chains."""
    if "=" not in text or ";" in text or "mod" in text or len(split_top(text, ",")) > 1:
        return []
    parts = [tidy(part) for part in split_top(text, "=")]
    return [part for part in parts if part and not _MEASURED.search(part)]
