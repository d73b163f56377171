"""`[reward]` and `[reward.code]`: what a response is worth."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from or1.config.section import MOST_MIB, MOST_SECONDS, MOST_TOKENS, Section


class CodeRewardConfig(Section):
    """`[reward.code]`"""

    sandbox: Literal["auto", "bwrap", "namespaces", "none"] = "auto"
    """How programs are isolated. auto: bwrap, else namespaces, else refuse. none: they run with your rights."""
    partial: bool = False
    """Pay the fraction of tests passed instead of 1 for all and 0 otherwise; then no test is left out."""
    test_timeout_s: float = Field(6.0, ge=0.01, le=MOST_SECONDS)
    """Limit for one test."""
    total_timeout_s: float = Field(300.0, ge=0.01, le=MOST_SECONDS)
    """Limit for all tests of a program; the limit is also at most 5 s and test_timeout_s + 1 for each test."""
    memory_mib: int = Field(4096, ge=64, le=MOST_MIB)
    """Memory of one program with all it starts."""
    processes: int = Field(16, ge=1, le=65536)
    """Processes and threads of one program."""
    output_mib: int = Field(16, ge=1, le=MOST_MIB)
    """Size of one output, and of one file that a program writes."""


class RewardConfig(Section):
    """`[reward]`"""

    kind: str = Field("auto", pattern=r"^(auto|math|code|[^:]+:[A-Za-z_][A-Za-z0-9_]*)$")
    """auto: math or code by what each row holds. math: the last \\boxed{} against the gold answer. code: programs
    against tests. Or a function of your own, "module:function" or "path/file.py:function"; a response
    counts as solved, in accuracy and pass@k, from a reward of 1 on."""
    timeout_s: float = Field(5.0, ge=0.01, le=MOST_SECONDS)
    """Limit for grading one response in math or by your function; then it counts as a timeout."""
    workers: int = Field(2, ge=1, le=1024)
    """Processes of each verifier in use: responses graded at once."""
    memory_mib: int = Field(8192, ge=0, le=MOST_MIB)
    """Memory that one process of a function of your own can fill, what it imports included; 0: no limit. More is a
    crash of that response."""
    require_think_close: bool = False
    """Score a response without `</think>` as truncated (0) instead of grading all of it."""
    grade_truncated: bool | None = None
    """Grade a response that was cut at its limit like any other (released code) instead of scoring it as truncated, 0
    (paper, section 3.1). Absent: false, but true for a function of your own, on whose scale 0 may not be the least."""
    overlong_buffer: int = Field(0, ge=0, le=MOST_TOKENS)
    """Tokens before the response limit over which a penalty grows from 0 to overlong_penalty (DAPO's soft overlong
    punishment); 0: none."""
    overlong_penalty: float = Field(1.0, gt=0, le=1e6)
    """Penalty of a response that fills the limit."""
    code: CodeRewardConfig = CodeRewardConfig()

    @property
    def is_function(self) -> bool:
        """Whether `kind` names a function of the user's own."""
        return ":" in self.kind
