"""`[data]`: training problems, their selection and their weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from or1.config.section import MOST_TOKENS, FilePath, Section, StringList

_Solved = Annotated[int, Field(ge=0, le=65536)]


class MixConfig(Section):
    """`[[data.mix]]`: a file of a mixture."""

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
    """Longer prompts are dropped and counted."""
    prompt_suffix: str = ""
    """Text appended to every question, such as an instruction to answer within \\boxed{}."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop if more than this fraction of a file's rows is unusable."""
    keep_difficulty: tuple[_Solved, _Solved] | None = None
    """Train on prompts solved at least and at most this often, as [1, 15] of 16 samples; absent keeps all."""
    difficulty_model: str | None = None
    """The model whose count keep_difficulty reads: its name in the rows' extra_info.model_difficulty."""
    difficulty_file: FilePath | None = None
    """Alternative to difficulty_model: a file written by `or1 filter`, with counts of your own model."""
    drop_solved: bool = False
    """At the start of each stage, drop the prompts for which every response of the previous stage was correct."""
    solved_visits: Literal["all", "last"] = "all"
    """Which visits drop_solved considers if a stage visits a prompt several times. all: one incorrect response in any
    visit keeps the prompt. last: only the last visit counts. The report's wording allows both."""
    decontaminate: Literal["off", "report", "drop"] = "report"
    """Treatment of training prompts that repeat a problem of [[eval.sets]]."""
    decontaminate_ngram: int = Field(13, ge=5, le=1000)
    """Consecutive words that two problems must share; a shorter problem is compared as a whole."""
    decontaminate_against: StringList = ()
    """More files whose problems the training data must not repeat."""

    @property
    def files(self) -> tuple[str, ...]:
        """Files of training problems, from train or mix."""
        return self.train or tuple(part.path for part in self.mix)
