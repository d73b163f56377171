"""`Config`, the whole of a TOML file, and its small sections: `[dist]`, `[checkpoint]`, `[log]`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from or1.config.data import DataConfig
from or1.config.environment import EnvironmentConfig
from or1.config.eval import EndpointConfig, EvalConfig, FilterConfig
from or1.config.judge import JudgeConfig
from or1.config.loss import LossConfig
from or1.config.model import ModelConfig
from or1.config.optim import OptimConfig
from or1.config.reward import RewardConfig
from or1.config.rollout import RolloutConfig
from or1.config.section import MOST_SECONDS, MOST_STEPS, FilePath, Section
from or1.config.stage import StageConfig, with_settings


class DistConfig(Section):
    """`[dist]`: has no effect in a single process."""

    sequence_parallel: int = Field(1, ge=1, le=1024)
    """Ranks that share one packed row, each with part of its tokens (Ulysses). Must divide the number of ranks and the
    model's query and key-value heads. Raise it if the activations of one row do not fit into memory."""
    shard_ranks: int | None = Field(None, ge=1, le=2**20)
    """Ranks that share one copy of weights, gradients and optimizer state (HSDP); neighbours, so that the GPUs of a
    node can be such a group. Groups exchange only sums of gradients, once an update. Must divide the number of ranks.
    Absent: all ranks share one copy, which takes the least memory."""
    timeout_s: float = Field(1800.0, ge=1, le=MOST_SECONDS)
    """Longest silence in seconds of a rank that others wait for; then the run ends. A rank that generates or scores is
    not silent, and waiting for it has no limit. It also limits a single collective and the start of all ranks."""
    heartbeat_timeout_s: float = Field(60.0, ge=1, le=MOST_SECONDS)
    """A rank without a heartbeat for this many seconds counts as dead, and the run ends on all ranks."""


class CheckpointConfig(Section):
    """`[checkpoint]`"""

    every_steps: int = Field(20, ge=1, le=MOST_STEPS)
    """Steps between checkpoints; there is always one after the last step."""
    keep: int = Field(2, ge=1, le=MOST_STEPS)
    """Number of newest checkpoints to keep."""
    every_minutes: float | None = Field(None, gt=0, le=MOST_SECONDS)
    """Also write a checkpoint at the end of a step once this many minutes have passed since the last one. For steps of
    minutes to hours, where every_steps alone may mean a day. Absent: by steps alone."""
    keep_stage_ends: bool = False
    """Write a checkpoint at the end of every stage, and keep it in addition to the newest."""
    keep_every: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Write a checkpoint at every multiple of this many steps, and keep it in addition to the newest. Absent: none."""


_LONGEST_NAME = 100
NAME, TIME = "{config}", "{time}"
"""Placeholders in run_dir: the name of the config's file, and the time of the start."""
_PROJECT = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"


class LogConfig(Section):
    """`[log]`"""

    tensorboard: bool = True
    """Write TensorBoard events in addition to metrics.jsonl."""
    wandb: str | None = Field(None, pattern=_PROJECT)
    """Project of Weights & Biases that the run is sent to; needs the package wandb. Absent: none (docs/trackers.md)."""
    trackio: str | None = Field(None, pattern=_PROJECT)
    """Project of trackio that the run is sent to; needs the package trackio. Absent: none."""
    samples: int = Field(4, ge=0, le=1000)
    """Responses, with prompt and reward, in the table that each saved rollout sends to these projects; 0 sends none."""
    rollouts_every_steps: int = Field(1, ge=1, le=MOST_STEPS)
    """Steps between saved rollouts (rollouts/step_N.parquet)."""


class Config(Section):
    """All settings of a run. `or1.config.load.load_config` builds one from TOML."""

    run_dir: FilePath = f"runs/{NAME}-{TIME}"
    """Folder of the run: metrics, rollouts, checkpoints, weights, report. `{config}` becomes the name of the config's
    file. `{time}` becomes the time of the start: the same command resumes the newest such run that has the same
    settings, and other settings start a new folder (docs/resume.md). Commands that do not train leave `-{time}` out."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of data order and sampling."""
    deterministic: bool = False
    """On a GPU, use only deterministic algorithms, and fail for an operation without one; slower. Runs on the CPU are
    always deterministic."""
    tune: Literal["auto", "on", "off"] = "auto"
    """Choose attention backend, LM head, its chunk size and MLP tiles by measurement, where their settings are "auto"
    (or 0). auto: on a GPU, once a model and machine, for at most a minute before the first update. on: on a CPU too,
    with its threads; runs there may then differ in their last bits. off: never. A resumed run keeps its choice; with
    `deterministic` nothing is measured."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    dist: DistConfig = DistConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    filter: FilterConfig = FilterConfig()
    endpoint: EndpointConfig = EndpointConfig()
    judge: JudgeConfig = JudgeConfig()
    log: LogConfig = LogConfig()
    stage: tuple[StageConfig, ...] = Field((), max_length=1000)
    """Stages in order; each may grow the context."""

    @property
    def total_steps(self) -> int:
        """Number of rollout steps of all stages."""
        return sum(stage.steps for stage in self.stage)

    def in_stage(self, index: int) -> Config:
        """Return `with_stage` of stage `index`, from 0; past the last stage the run's own settings apply."""
        return self.with_stage(self.stage[index]) if index < len(self.stage) else self

    def with_stage(self, stage: StageConfig) -> Config:
        """Return the config with what a stage sets of [loss], [rollout] and [optim]; itself if it sets nothing."""
        if not (own := stage.own_settings()):
            return self
        if own.get("loss.entropy.control") == "none":
            own.setdefault("loss.entropy.coef", 0.0)
        return with_settings(self, own)

    @property
    def needs_reference(self) -> bool:
        """True if a stage has a KL term, so that a reference model is loaded at some time."""
        return self.with_reference().loss.kl_coef > 0

    def with_reference(self) -> Config:
        """Return the config in the first stage with a KL term; in the first stage if none has one."""
        stages = [self.in_stage(i) for i in range(max(len(self.stage), 1))]
        return next((each for each in stages if each.loss.kl_coef > 0), stages[0])

    @property
    def own_rewards(self) -> bool:
        """True if a function or an environment of the user's decides rewards."""
        return bool(self.reward.functions or self.environment.id)

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
        """Run directory as a Path. A `{time}` that `or1.run.naming.named` has not filled in is left out."""
        return Path(self.run_dir.replace(f"-{TIME}", "").replace(TIME, ""))

    def named_after(self, file: Path) -> Config:
        """Return the config with `{config}` in run_dir replaced by the name of its file, without the suffix."""
        name = file.name.removesuffix(file.suffix)[:_LONGEST_NAME] or "run"
        return self.model_copy(update={"run_dir": self.run_dir.replace(NAME, name)}) if NAME in self.run_dir else self
