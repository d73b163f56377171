"""Detection of training prompts that repeat an evaluation problem.

A training prompt overlaps if it shares n consecutive words with a problem, or contains a short problem as a whole.
Words are runs of letters and digits, in lower case.

Instructions that a set repeats ("Let's think step by step and output the final answer within ...") do not indicate
contamination. Stretches of words that many problems of a set share are therefore removed first. Common phrases ("m/n
where m and n are relatively prime positive integers. Find m+n") do not count either: words that occur in more than
ten different training prompts are ignored, a rule of GPT-3's decontamination. Some phrases still pass, so the default
is to report overlaps and not to drop the prompts.

A problem with fewer than n words of its own is compared as a whole, including its symbols: "3 + 4" and "3 - 4" have
the same words. With fewer than eight words, it must equal the whole training prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from or1.core.types import Prompt

_WORD = re.compile(r"[^\W_]+")
_SYMBOL_OR_WORD = re.compile(r"[^\W_]+|[^\w\s]")
_BOILERPLATE_WORDS = 6
_MIN_CONTAINED_WORDS = 8
_MAX_TEXTS = 10


class Overlap(NamedTuple):
    """A training prompt, the evaluation problem it repeats, and the words they share."""

    prompt_id: str
    eval_set: str
    eval_id: str
    words: str


class EvalIndex:
    """Index of the problems of evaluation sets, given by name, in which training prompts are looked up."""

    def __init__(self, sets: Mapping[str, Sequence[Prompt]], n: int = 13):
        self._n = n
        self._grams: dict[str, tuple[str, str]] = {}
        self._wholes: dict[tuple[str, ...], tuple[str, str]] = {}
        self._contained_sizes: set[int] = set()
        for name, prompts in sets.items():
            words = [_words(prompt.text) for prompt in prompts]
            common = _boilerplate(words)
            for prompt, of_prompt in zip(prompts, words, strict=True):
                self._add(prompt, (name, prompt.id), _own_stretches(of_prompt, common))

    def find(self, prompts: Sequence[Prompt]) -> list[Overlap]:
        """Return one overlap for each training prompt that has any, in the order of the prompts."""
        shared = [[g for g in _grams(_words(prompt.text), self._n) if g in self._grams] for prompt in prompts]
        by_text = {prompt.text: grams for prompt, grams in zip(prompts, shared, strict=True)}
        spread = Counter(gram for grams in by_text.values() for gram in set(grams))
        found = []
        for prompt, grams in zip(prompts, shared, strict=True):
            gram = next((gram for gram in grams if spread[gram] <= _MAX_TEXTS), None)
            overlap = self._find_whole(prompt) if gram is None else Overlap(prompt.id, *self._grams[gram], gram)
            found += [] if overlap is None else [overlap]
        return found

    def _find_whole(self, prompt: Prompt) -> Overlap | None:
        tokens = _SYMBOL_OR_WORD.findall(prompt.text.lower())
        for size in {len(tokens)} | self._contained_sizes:
            for start in range(len(tokens) - size + 1):
                found = self._wholes.get(tuple(tokens[start : start + size]))
                if found is not None:
                    return Overlap(prompt.id, *found, " ".join(tokens[start : start + size]))
        return None

    def _add(self, prompt: Prompt, where: tuple[str, str], stretches: Iterable[Sequence[str]]) -> None:
        grams = [gram for stretch in stretches for gram in _grams(stretch, self._n) if _is_prose(gram)]
        for gram in grams:
            self._grams.setdefault(gram, where)
        if not grams:
            tokens = tuple(_SYMBOL_OR_WORD.findall(prompt.text.lower()))
            self._wholes.setdefault(tokens, where)
            if len(_words(prompt.text)) >= _MIN_CONTAINED_WORDS:
                self._contained_sizes.add(len(tokens))


def decontamination_lines(overlaps: Sequence[Overlap], n_prompts: int, dropped: bool, listed: int = 3) -> list[str]:
    """Return a report for the user: the number of overlaps per evaluation set, and the first `listed` of them."""
    if not overlaps:
        return [f"decontamination: none of {n_prompts:,} training prompts repeats an evaluation problem"]
    by_set = ", ".join(f"{count:,} in {name}" for name, count in Counter(o.eval_set for o in overlaps).items())
    fate = "left out" if dropped else 'kept; data.decontaminate = "drop" leaves them out'
    lines = [
        f"decontamination: {len(overlaps):,} of {n_prompts:,} training prompts repeat an evaluation problem "
        f"({by_set}): {fate}"
    ]
    lines += [f"  {o.prompt_id} ~ {o.eval_set} {o.eval_id}: {o.words[:100]}" for o in overlaps[:listed]]
    return lines + ([f"  and {len(overlaps) - listed:,} more"] if len(overlaps) > listed else [])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str], n: int) -> list[str]:
    return [" ".join(words[start : start + n]) for start in range(len(words) - n + 1)]


def _is_prose(gram: str) -> bool:
    """Return True if at least half of the words contain letters. Many problems may share a mere sequence of numbers."""
    words = gram.split()
    return 2 * sum(not word.isdigit() for word in words) >= len(words)


def _boilerplate(problems: Sequence[Sequence[str]]) -> set[str]:
    """Return short stretches of words that at least three, and at least a fifth, of a set's problems share."""
    counts = Counter(gram for words in problems for gram in set(_grams(words, _BOILERPLATE_WORDS)))
    return {gram for gram, count in counts.items() if count >= max(3, len(problems) / 5)}


def _own_stretches(words: Sequence[str], common: set[str]) -> list[list[str]]:
    """Return the stretches of a problem between its boilerplate."""
    shared = [False] * len(words)
    for start, gram in enumerate(_grams(words, _BOILERPLATE_WORDS)):
        if gram in common:
            shared[start : start + _BOILERPLATE_WORDS] = [True] * _BOILERPLATE_WORDS
    stretches: list[list[str]] = [[]]
    for word, is_shared in zip(words, shared, strict=True):
        if is_shared:
            stretches.append([])
        else:
            stretches[-1].append(word)
    return [stretch for stretch in stretches if stretch]
