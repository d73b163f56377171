"""The page of results, written by `python -m benchmarks.evaluation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GRADERS = ("strict-match", "flexible-extract", "math-verify")
Row = Mapping[str, Any]


def write_page(file: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write README.md."""
    file.write_text(_text(rows, about), encoding="utf-8")


def _text(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    count = len(rows)
    prompts, same = (sum(row[key] for row in rows) for key in ("same_prompt", "same_response"))
    spaced = sum(row["same_but_for_space"] for row in rows)
    return f"""# GSM8K by or1 eval and by lm-evaluation-harness

Written by `python -m benchmarks.evaluation OUT --model DIR --data FILE`. The first {count} problems of {about["data"]},
greedy, fp32, at most {about["max_response_tokens"]} tokens, batches of {about["batch"]}; lm-eval {about["lm_eval"]},
math-verify {about["math_verify"]}. evaluation.json has a hash of each response, since responses quote the problems.

- Prompt, on both sides: one user message in the model's chat template, the question with the suffix
  {about["suffix"]!r}. No examples (zero-shot). lm-eval's own gsm8k
  has five examples and no chat template, so its published figures differ.
- End of a response, on both sides: the end token of the chat template, or the limit.
- strict-match: the number after `####`. flexible-extract: the last number of the text. Both are lm-eval's, compared as
  text. math-verify: or1's maths reward, which compares the last `\\boxed{{}}`, and gives 0 to a cut response.

| | of {count} |
|---|---|
| same prompt, token for token | {prompts} |
| same response, as text | {same} |
| same response but for space at the ends | {spaced} |

| grader | accuracy on or1's responses | accuracy on lm-eval's responses |
|---|---|---|
{_accuracies(rows)}

## Rows that the sides answer differently

{_different(rows)}

## Rows that the graders judge differently

{_disputed(rows)}
"""


def _accuracies(rows: Sequence[Row]) -> str:
    lines = []
    for name in GRADERS:
        ours, theirs = (sum(row["verdicts"][side][name] for row in rows) for side in ("or1", "lm_eval"))
        lines.append(f"| {name} | {ours} ({ours / len(rows):.1%}) | {theirs} ({theirs / len(rows):.1%}) |")
    return "\n".join(lines)


def _different(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if not row["same_but_for_space"]:
            at = row["parted"]
            lines.append(
                f"- {row['problem']}: token {at['token']} is {at['or1']!r} by or1 and {at['lm_eval']!r} by lm-eval; in "
                f"fp64 their logits are {abs(at['logits_apart']):.1e} apart, and the larger is "
                f"{at['below_largest']:.1e} below the largest"
            )
    return "\n".join(lines) or "None."


def reason(row: Row) -> str:
    """Return why the graders do not agree about or1's response."""
    text, verdicts = row["or1"], row["verdicts"]["or1"]
    if verdicts["math-verify"] and not verdicts["flexible-extract"]:
        return "the last number of the text is not the one in \\boxed{}"
    if "\\boxed" not in text:
        return "no \\boxed{}, so math-verify finds no answer; the last number is right"
    if verdicts["flexible-extract"] and not verdicts["math-verify"]:
        return "the last number is right, but not the whole of the last \\boxed{}, or the response was cut"
    return "no ####, which strict-match needs"


def _disputed(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        verdicts = row["verdicts"]["or1"]
        if len(set(verdicts.values())) > 1:
            right = [name for name in GRADERS if verdicts[name]]
            lines.append(f"- {row['problem']}: right for {', '.join(right)}: {reason(row)}")
    return "\n".join(lines) or "None."
