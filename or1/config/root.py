"""`Config`, the whole of a TOML file, and its smallest sections: `[[stage]]`, `[dist]`, `[checkpoint]`, `[log]`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from or1.config.data import DataConfig
from or1.config.eval import EndpointConfig, EvalConfig, FilterConfig
from or1.config.loss import LossConfig
from or1.config.model import ModelConfig
from or1.config.optim import OptimConfig
from or1.config.reward import RewardConfig
from or1.config.rollout import RolloutConfig
from or1.config.section import MOST_SECONDS, MOST_STEPS, MOST_TOKENS, FilePath, Section


class StageConfig(Section):
    """`[[stage]]`"""

    steps: int = Field(ge=1, le=MOST_STEPS)
    """Rollout steps in this stage; with `until = "plateau"`, the most it takes."""
    until: Literal["steps", "plateau"] = "steps"
    """When to hand over: after `steps`, or as soon as evaluations are surely flat: in accuracy (in mean reward where
    rewards are graded), and in the truncation rate of the training steps between them."""
    plateau_evals: int = Field(6, ge=1, le=MOST_STEPS)
    """Evaluations of a window. A line through the last two windows tells what a window gains; more windows need more
    evaluations, and bear more noise. 1 compares two evaluations and allows for no noise."""
    plateau_gain: float = Field(0.005, gt=0, le=1e6)
    """Smallest rise of accuracy or mean reward, or fall of the truncation rate, in a window that counts as a gain."""
    max_response_tokens: int = Field(ge=1, le=MOST_TOKENS)
    """Response limit of this stage; a longer response is truncated and, by default, scores 0."""
    prompts_per_step: int = Field(ge=1, le=2**20)
    """Prompts of one rollout step (the paper's D_R)."""
    group_size: int = Field(ge=2, le=65536)
    """Responses per prompt (the paper's gs)."""
    minibatch_prompts: int | None = Field(None, ge=1, le=2**20)
    """Prompts of one optimizer step (the paper's D_T); absent means prompts_per_step, which is on-policy."""

    reuse: int = Field(1, ge=1, le=1000)
    """Passes over each rollout (the paper's N_reuse); above 1 is off-policy."""

    @property
    def updates_per_step(self) -> int:
        """N_SGD = D_R / D_T * N_reuse (paper, Eq. 4.1), before rejection makes the rollout smaller."""
        return -(-self.prompts_per_step // (self.minibatch_prompts or self.prompts_per_step)) * self.reuse

    @property
    def on_policy(self) -> bool:
        """Whether one rollout feeds exactly one optimizer step, so that the ratio is 1 and the clip inert."""
        return self.updates_per_step == 1


class DistConfig(Section):
    """`[dist]`: has no effect in a single process."""

    sequence_parallel: int = Field(1, ge=1, le=1024)
    """Ranks that share one packed row, each with part of its tokens (Ulysses); divides the number of ranks and the
    model's query and key-value heads. Raise it where one row's activations do not fit."""
    timeout_s: float = Field(1800.0, ge=1, le=MOST_SECONDS)
    """A rank waits this long for the others, generation of the slowest included; then the run ends."""
    heartbeat_timeout_s: float = Field(60.0, ge=1, le=MOST_SECONDS)
    """A rank that gives no sign of life for this long is dead, and the run ends on all others."""


class CheckpointConfig(Section):
    """`[checkpoint]`"""

    every_steps: int = Field(20, ge=1, le=MOST_STEPS)
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(2, ge=1, le=MOST_STEPS)
    """Newest checkpoints kept."""


class LogConfig(Section):
    """`[log]`"""

    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    rollouts_every_steps: int = Field(1, ge=1, le=MOST_STEPS)
    """Steps between saved rollouts (rollouts/step_N.parquet)."""


class Config(Section):
    """A whole run. `or1.config.load.load_config` makes one from TOML."""

    run_dir: FilePath
    """Folder of the run: metrics, rollouts, checkpoints, weights, report."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of data order and sampling."""
    deterministic: bool = False
    """On a GPU, use only algorithms whose result has the same bits every time, and fail where there is none; slower. A
    CPU run always is."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    dist: DistConfig = DistConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    filter: FilterConfig = FilterConfig()
    endpoint: EndpointConfig = EndpointConfig()
    log: LogConfig = LogConfig()
    stage: tuple[StageConfig, ...] = Field((), max_length=1000)
    """Stages in order; each may grow the context."""

    @property
    def total_steps(self) -> int:
        """Rollout steps of all stages together."""
        return sum(stage.steps for stage in self.stage)

    @property
    def eval_max_response_tokens(self) -> int:
        """Response limit of evaluations."""
        return self.eval.max_response_tokens or self.stage[-1].max_response_tokens

    @property
    def filter_max_response_tokens(self) -> int:
        """Response limit of `or1 filter`."""
        return self.filter.max_response_tokens or self.stage[-1].max_response_tokens

    @property
    def run_path(self) -> Path:
        """The run directory as a path."""
        return Path(self.run_dir)
