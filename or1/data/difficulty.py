"""Model-aware difficulty: keep the prompts that a model solves sometimes (Skywork-OR1 report, section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from or1.core.errors import DataError, RowError
from or1.data.rows import Row

TOO_EASY, TOO_HARD, UNRATED = "too easy", "too hard", "without a difficulty"


@dataclass(frozen=True)
class DifficultyFilter:
    """Filter that keeps prompts solved `low` to `high` times, both included.

    model        the model whose count is read from a row's extra_info.model_difficulty (Skywork-OR1-RL-Data: out of 16)
    rates        whole prompt text -> times solved, from `read_rates`; used instead of `model` if given
    seen_models  models with a count in any row, for the message if the wanted model has none
    """

    low: int
    high: int
    model: str | None = None
    rates: Mapping[str, int] | None = None
    seen_models: set[str] = field(default_factory=set)

    def verdict(self, row: Row, text: str) -> str | None:
        """Return None to keep a prompt, else the reason to drop it. Raises RowError if the count is not a number."""
        solved = self.rates.get(text) if self.rates is not None else self._of_model(row)
        if solved is None:
            return UNRATED
        if solved > self.high:
            return TOO_EASY
        return TOO_HARD if solved < self.low else None

    def _of_model(self, row: Row) -> int | None:
        info = row.get("extra_info")
        counts = info.get("model_difficulty") if isinstance(info, Mapping) else None
        if not isinstance(counts, Mapping):
            return None
        # Columnar files have all models in every row, with null for a missing count.
        self.seen_models.update(model for model, count in counts.items() if count is not None)
        solved = counts.get(self.model)
        if solved is None:
            return None
        if isinstance(solved, bool) or not isinstance(solved, int | float):
            raise RowError(f"extra_info.model_difficulty[{self.model!r}] is {solved!r}, not a number")
        return int(solved)


def times_solved(rows: Iterable[tuple[str, int, int]]) -> dict[str, int]:
    """Return how often each text was solved, from (text, passes, samples) of every measured prompt.

    Prompts with equal text count as one problem that was sampled more often: passes and samples are summed. The rate is
    scaled to the samples of one prompt. A text that was solved sometimes never becomes "always" or "never" by rounding.
    """
    sums: dict[str, tuple[int, int, int]] = {}
    for text, passes, samples in rows:
        before = sums.get(text, (0, 0, 0))
        sums[text] = (before[0] + passes, before[1] + samples, samples)
    return {text: _count(*of_text) for text, of_text in sums.items()}


def _count(passes: int, total: int, samples: int) -> int:
    if passes in (0, total) or total == samples:
        return passes * samples // total if total else 0
    return min(max((2 * passes * samples + total) // (2 * total), 1), samples - 1)


def read_rates(path: str, high: int) -> tuple[dict[str, int], list[str]]:
    """Return times solved by whole prompt text from a file of `or1 filter`, and warnings about its use with `high`.

    The key is the text with its suffix, since the model was asked exactly that. `times_solved` merges repeated texts.
    Raises DataError for any other file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["prompt", "samples", "passes"])
    except (pyarrow.ArrowException, OSError) as error:
        cause = str(error).partition("\n")[0]
        raise DataError(f"data.difficulty_file {path!r} is not a file of `or1 filter` ({cause})") from error
    rows = table.to_pylist()
    if not rows:
        raise DataError(f"data.difficulty_file {path!r} has no rows; let `or1 filter` finish first")
    warnings = []
    samples = min(row["samples"] for row in rows)
    if high >= samples:
        warnings.append(
            f"{Path(path).name} counts out of {samples}, so keep_difficulty up to {high} keeps prompts "
            f"that were always solved; end at {samples - 1} to leave them out"
        )
    return times_solved((row["prompt"], row["passes"], row["samples"]) for row in rows), warnings
