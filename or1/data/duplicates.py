"""Report of training prompts with equal text or tokens. They are kept: a file may repeat prompts to weight them."""

from __future__ import annotations

from collections.abc import Sequence

from or1.core.types import Prompt


def duplicate_lines(prompts: Sequence[Prompt]) -> list[str]:
    """Return lines for the user about prompts with equal text; none if there are no such prompts.

    A file that is named twice counts once, because its prompt ids are equal.
    """
    first: dict[str, Prompt] = {}
    unlike: list[tuple[Prompt, Prompt]] = []
    repeats: list[tuple[Prompt, Prompt]] = []
    by_id = {prompt.id: prompt for prompt in prompts}
    for prompt in by_id.values():
        one = first.setdefault(prompt.text, prompt)
        if one is prompt:
            continue
        repeats.append((prompt, one))
        if (prompt.golds, prompt.tests) != (one.golds, one.tests):
            unlike.append((prompt, one))
    if not repeats:
        return []
    again, one = repeats[0]
    lines = [
        f"duplicates: {len(repeats):,} of {len(by_id):,} training prompts have the text of an earlier one "
        f"({again.id} that of {one.id}); kept, so they are trained on more often"
    ]
    if unlike:
        again, one = unlike[0]
        lines.append(
            f"  {len(unlike):,} of them with another answer, so one of the two is wrong: {again.id} has "
            f"{_answer(again)}, {one.id} has {_answer(one)}"
        )
    return lines


def lost_text_lines(prompts: Sequence[Prompt]) -> list[str]:
    """Return lines for the user about prompts whose texts differ and whose tokens do not; none if there are none.

    White space does not count. Prompts without token ids are skipped.
    """
    first: dict[bytes, Prompt] = {}
    lost: list[tuple[Prompt, Prompt]] = []
    encoded = {prompt.id: prompt for prompt in prompts if len(prompt.token_ids)}
    for prompt in encoded.values():
        one = first.setdefault(prompt.token_ids.tobytes(), prompt)
        if prompt.text.split() != one.text.split():
            lost.append((prompt, one))
    if not lost:
        return []
    again, one = lost[0]
    return [
        f"WARNING: {len(lost):,} of {len(encoded):,} training prompts have another text than an earlier one, but the "
        f"same tokens ({again.id} those of {one.id}): the tokenizer or its chat template drops a part of them; look at "
        "the first prompt of --dry-run, and use characters or a model that fit"
    ]


def _answer(prompt: Prompt) -> str:
    text = " or ".join(map(repr, prompt.golds)) if prompt.tests is None else "tests"
    return text if len(text) <= 60 else f"{text[:60]}..."
