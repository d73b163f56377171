"""`[data]`: training problems, their selection and their weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from or1.config.section import MOST_TOKENS, FilePath, FilePaths, Section, StringList, each_of

_Solved = Annotated[int, Field(ge=0, le=65536)]


class MixConfig(Section):
    """`[[data.mix]]`: a part of a mixture."""

    path: FilePaths
    """Training problems: a file, a folder, a pattern or a dataset, as in data.train; or a list of these."""
    weight: float = Field(1.0, ge=1e-6, le=1e6)
    """Share of this part in every epoch: weight / sum of all weights."""


class ColumnsConfig(Section):
    """`[data.columns]`: names of the columns, for files whose columns have other names than or1 looks for."""

    prompt: str | None = None
    """Column of the question: text, or chat messages."""
    answer: str | None = None
    """Column of the gold answer, or of a list of equally correct answers; after `####` if a text has that mark."""
    tests: str | None = None
    """Column of program tests, instead of answer."""
    source: str | None = None
    """Column of the name under which the metrics count a row; absent means data_source, then the file's name."""

    @property
    def names_problems(self) -> bool:
        """True if a column of questions, answers or tests is named."""
        return (self.prompt or self.answer or self.tests) is not None


class DataConfig(Section):
    """`[data]`"""

    train: StringList = ()
    """Training problems: JSONL, JSON-array, parquet, CSV or TSV files, folders of them, patterns such as data/*.jsonl,
    and datasets of the Hugging Face hub such as hf:openai/gsm8k:main/train. A file named twice counts twice."""
    mix: tuple[MixConfig, ...] = ()
    """Parts with weights, instead of train."""
    columns: ColumnsConfig = ColumnsConfig()
    max_prompt_tokens: int = Field(2048, ge=1, le=MOST_TOKENS)
    """Longer prompts are dropped and counted."""
    prompt_suffix: str = ""
    """Text appended to every question, such as an instruction to answer within \\boxed{}."""
    system_prompt: str = ""
    """System message in front of every chat that has none. Needs a model with a chat template."""
    chat_template: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Arguments of the model's chat template, such as {enable_thinking = false}."""
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
        """Files and datasets of training problems, from train or mix."""
        return self.train or tuple(path for part in self.mix for path in each_of(part.path))
