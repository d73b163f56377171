"""`[data]`: training problems, which of them, and in what shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from or1.config.section import MOST_TOKENS, FilePath, Section, StringList

_Solved = Annotated[int, Field(ge=0, le=65536)]


class MixConfig(Section):
    """`[[data.mix]]`"""

    path: FilePath
    """JSONL, JSON-array or parquet file of training problems."""
    weight: float = Field(1.0, ge=1e-6, le=1e6)
    """Share of this file in every epoch: weight / sum of all weights."""


class DataConfig(Section):
    """`[data]`"""

    train: StringList = ()
    """JSONL, JSON-array or parquet files of training problems; a file named twice counts twice."""
    mix: tuple[MixConfig, ...] = ()
    """Files with weights, instead of train."""
    max_prompt_tokens: int = Field(2048, ge=1, le=MOST_TOKENS)
    """Longer prompts are left out and counted."""
    prompt_suffix: str = ""
    """Text put after every question, such as an instruction to answer within \\boxed{}."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop if more than this share of a file's rows is unusable."""
    keep_difficulty: tuple[_Solved, _Solved] | None = None
    """Train on prompts solved at least and at most this often, as [1, 15] of 16 samples; absent keeps all."""
    difficulty_model: str | None = None
    """Whose count keep_difficulty reads: a model's name in the rows' extra_info.model_difficulty."""
    difficulty_file: FilePath | None = None
    """Or a file written by `or1 filter`, with counts of your own model."""
    drop_solved: bool = False
    """At the start of each stage, drop the prompts that the stage before solved by every response."""
    solved_visits: Literal["all", "last"] = "all"
    """Where a stage sees a prompt more than once, which visits drop_solved looks at: a prompt that was wrong once stays
    (all), or goes if it is right by now (last). The report's words fit both."""
    decontaminate: Literal["off", "report", "drop"] = "report"
    """What to do about training prompts that repeat a problem of [[eval.sets]]."""
    decontaminate_ngram: int = Field(13, ge=5, le=1000)
    """Words in a row that two problems must share; a shorter problem is compared as a whole."""
    decontaminate_against: StringList = ()
    """More files to hold apart from the training data."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files of training problems, from train or mix."""
        return self.train or tuple(part.path for part in self.mix)
