"""`[data]`: training problems."""

from __future__ import annotations

from pydantic import Field

from or1.config.base import Section, StringList


class DataConfig(Section):
    """`[data]`"""

    train: StringList = Field(min_length=1)
    """JSONL or parquet files of training problems."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longer prompts are left out and counted."""
    prompt_suffix: str = ""
    """Text put after every question, such as an instruction to answer within \\boxed{}."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop if more than this share of a file's rows is unusable."""
