"""The configuration: frozen pydantic models, one per TOML section. Imports no torch, so a bad config answers at once.

The docstring under a field is its help text; `or1.config_load` prints it beside an error in that field.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from or1.config.base import FilePath, Section
from or1.config.data import DataConfig, MixConfig
from or1.config.dist import DistConfig
from or1.config.eval import EndpointConfig, EvalConfig, EvalSet, FilterConfig
from or1.config.loss import EntropyConfig, LossConfig
from or1.config.model import ModelConfig
from or1.config.optim import OptimConfig
from or1.config.reward import CodeRewardConfig, RewardConfig
from or1.config.rollout import RolloutConfig, VllmConfig
from or1.config.run import CheckpointConfig, LogConfig
from or1.config.stage import StageConfig

__all__ = [
    "CheckpointConfig",
    "CodeRewardConfig",
    "Config",
    "DataConfig",
    "DistConfig",
    "EndpointConfig",
    "EntropyConfig",
    "EvalConfig",
    "EvalSet",
    "FilterConfig",
    "LogConfig",
    "LossConfig",
    "MixConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
    "StageConfig",
    "VllmConfig",
]


class Config(Section):
    """A whole run. `or1.config_load.load_config` makes one from TOML."""

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
