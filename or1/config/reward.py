"""`[reward]` and `[reward.code]`: scoring of responses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from or1.config.section import MOST_MIB, MOST_SECONDS, MOST_TOKENS, Section


class CodeRewardConfig(Section):
    """`[reward.code]`"""

    sandbox: Literal["auto", "bwrap", "namespaces", "none"] = "auto"
    """Isolation of programs. auto: bwrap, else namespaces, else refuse. none: programs run with your rights."""
    partial: bool = False
    """Reward the fraction of passed tests, instead of 1 for all tests and 0 otherwise. Then every test is run."""
    test_timeout_s: float = Field(6.0, ge=0.01, le=MOST_SECONDS)
    """Time limit of one test, in seconds."""
    total_timeout_s: float = Field(300.0, ge=0.01, le=MOST_SECONDS)
    """Time limit of all tests of a program, in seconds; at most 5 s plus test_timeout_s + 1 s for each test."""
    memory_mib: int = Field(4096, ge=64, le=MOST_MIB)
    """Memory limit of one program and all processes that it starts."""
    processes: int = Field(16, ge=1, le=65536)
    """Limit on processes and threads of one program."""
    output_mib: int = Field(16, ge=1, le=MOST_MIB)
    """Size limit of one output, and of one file that a program writes."""


_KIND = r"^(auto|math|code|[^:]+:[A-Za-z_][A-Za-z0-9_]*)$"


class RewardPart(Section):
    """`[[reward.parts]]`: one reward of a weighted sum."""

    kind: str = Field(pattern=_KIND)
    """As reward.kind."""
    weight: float = Field(1.0, ge=-1e6, le=1e6)
    """Factor of this reward; below 0 for a penalty."""
    name: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", max_length=100)
    """Name in the metrics: reward/part/{name}. Absent means the verifier or the name of the function."""

    @property
    def label(self) -> str:
        """Name in the metrics."""
        return self.name or self.kind.rpartition(":")[2]


class RewardConfig(Section):
    """`[reward]`"""

    kind: str = Field("auto", pattern=_KIND)
    """auto: math or code, depending on the columns of each row. math: compare the last \\boxed{} with the gold answer.
    code: run programs against tests. Or a user-defined function, "module:function" or "path/file.py:function". A
    response counts as solved, in accuracy and pass@k, if its reward is at least 1."""
    parts: tuple[RewardPart, ...] = ()
    """Several rewards, instead of kind: the reward is the sum of weight * reward. Name the verifier first: the first
    part decides the status of a response. Each part has `workers` processes of its own."""
    timeout_s: float = Field(5.0, ge=0.01, le=MOST_SECONDS)
    """Time limit for grading one response by math or a user-defined function, in seconds; beyond it, the response
    counts as a timeout."""
    workers: int = Field(2, ge=1, le=1024)
    """Processes of each verifier in use, which is the number of responses graded at once."""
    memory_mib: int = Field(8192, ge=0, le=MOST_MIB)
    """Memory limit of one process of a user-defined function, including its imports; 0: no limit. Exceeding it counts
    as a crash of that response."""
    require_think_close: bool = False
    """Score a response without `</think>` as truncated (0) instead of grading it."""
    grade_truncated: bool | None = None
    """Grade a truncated response like any other (released code) instead of scoring it 0 (paper, section 3.1). Absent:
    true for a user-defined function, for which 0 may not be the lowest reward, else false."""
    overlong_buffer: int = Field(0, ge=0, le=MOST_TOKENS)
    """Number of tokens before the response limit over which a penalty grows from 0 to overlong_penalty (DAPO's soft
    overlong punishment); 0: no penalty."""
    overlong_penalty: float = Field(1.0, gt=0, le=1e6)
    """Penalty of a response that reaches the limit."""
    code: CodeRewardConfig = CodeRewardConfig()

    @property
    def kinds(self) -> tuple[str, ...]:
        """`kind`, or the kinds of all parts."""
        return tuple(part.kind for part in self.parts) or (self.kind,)

    @property
    def functions(self) -> tuple[str, ...]:
        """The kinds that name a user-defined function."""
        return tuple(kind for kind in self.kinds if ":" in kind)

    @property
    def needs_answers(self) -> bool:
        """True if a built-in verifier compares with the answers or tests of the data."""
        return len(self.functions) < len(self.kinds)
