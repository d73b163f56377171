"""Shared prompts: a packed row holds the responses of a group after one copy of their prompt.

    prompt  response 1  response 2  response 3        instead of        prompt response 1  prompt response 2  ...

Every response attends to the prompt and to itself (or1.model.attention), at the positions of an unshared sequence.
Hidden states, loss and gradients equal those of the unshared row, but the prompt is computed once.
"""

# P prompt tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Fraction of tokens that "auto" must save. benchmarks.prefix breaks even below it, but units are longer than sequences,
# so rows may be less full.
MIN_SAVED_FRACTION = 0.1

Sharing = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Unit:
    """Sequences that must be in the same row.

    members  indices of sequences, all with the same prompt
    tokens   number of packed tokens
    """

    members: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class UnitRows:
    """Layout of a unit's tokens; rows count from the first token of the unit.

    positions     i64[tokens], position of each token in its sequence
    predicts      for each member, the rows whose hidden states predict its trained tokens
    q_lens        number of queries of each document
    key_rows      for each document, the rows of its keys
    """

    positions: np.ndarray
    predicts: list[np.ndarray]
    q_lens: list[int]
    key_rows: list[np.ndarray]


def saved_fraction(prompts: Sequence[np.ndarray], responses: Sequence[int]) -> float:
    """Return the fraction of packed tokens that sharing would save, 0 to 1; `responses` are lengths in tokens."""
    total = sum(len(p) + n - 1 for p, n in zip(prompts, responses, strict=True))
    distinct = {p.tobytes(): len(p) for p in prompts}
    saved = sum(len(p) for p in prompts) - sum(distinct.values())
    return saved / total if total else 0.0


def make_units(
    prompts: Sequence[np.ndarray], responses: Sequence[int], max_tokens: int, sharing: Sharing = "auto"
) -> list[Unit]:
    """Group sequences with the same prompt into units of at most `max_tokens`; every sequence is in exactly one unit.

    A sequence longer than `max_tokens` gets a unit of its own; `plan_rows` raises an error that names the sequence.
    """
    share = sharing == "on" or (sharing == "auto" and saved_fraction(prompts, responses) >= MIN_SAVED_FRACTION)
    if not share:
        return [Unit((i,), len(p) + n - 1) for i, (p, n) in enumerate(zip(prompts, responses, strict=True))]
    groups: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.tobytes(), []).append(i)
    return [unit for group in groups.values() for unit in _units_of_group(group, prompts, responses, max_tokens)]


def _units_of_group(
    group: list[int], prompts: Sequence[np.ndarray], responses: Sequence[int], max_tokens: int
) -> list[Unit]:
    """Split one group by first fit, longest response first."""
    prompt = len(prompts[group[0]])
    units: list[list[int]] = []
    loads: list[int] = []
    for i in sorted(group, key=lambda i: -responses[i]):
        own = responses[i] - 1
        home = next((u for u, load in enumerate(loads) if load + own <= max_tokens), None)
        if home is None:
            units.append([i])
            loads.append(prompt + own)
        else:
            units[home].append(i)
            loads[home] += own
    return [Unit(tuple(sorted(unit)), load) for unit, load in zip(units, loads, strict=True)]


def unit_rows(prompt: int, responses: Sequence[int]) -> UnitRows:
    """Return the layout of a unit: `prompt` tokens, then all but the last token of each response.

    The first response continues the prompt's document. Every other response is a document of its own that uses the
    prompt's keys.
    """
    prompt_rows = np.arange(prompt)
    positions, predicts, q_lens, key_rows = [prompt_rows], [], [], []
    start = prompt
    for j, response in enumerate(responses):
        own = np.arange(start, start + response - 1)
        # The hidden state at the prompt's last token predicts the first token of every response.
        predicts.append(np.append(prompt - 1, own))
        positions.append(np.arange(prompt, prompt + len(own)))
        if j == 0 or len(own):
            q_lens.append(len(own) + (prompt if j == 0 else 0))
            key_rows.append(np.concatenate([prompt_rows, own]))
        start += len(own)
    return UnitRows(np.concatenate(positions), predicts, q_lens, key_rows)
