"""Configuration: frozen pydantic models, one per TOML section. Imports no torch, so a bad config fails at once.

The docstring under a field is its help text. `or1.config.load` prints it with an error in that field, and
`python -m or1.config.reference` prints all of them as a page.
"""

from __future__ import annotations

from or1.config.data import ColumnsConfig, DataConfig, MixConfig
from or1.config.environment import EnvironmentConfig
from or1.config.eval import EndpointConfig, EvalConfig, EvalSet, FilterConfig
from or1.config.judge import JudgeConfig
from or1.config.lora import LoraConfig
from or1.config.loss import EntropyConfig, LossConfig
from or1.config.model import ModelConfig
from or1.config.optim import OptimConfig
from or1.config.reward import CodeRewardConfig, RewardConfig, RewardPart
from or1.config.rollout import RolloutConfig, SpeculativeConfig, VllmConfig
from or1.config.root import CheckpointConfig, Config, DistConfig, LogConfig
from or1.config.section import Section
from or1.config.stage import StageConfig

__all__ = [
    "CheckpointConfig",
    "CodeRewardConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "DistConfig",
    "EndpointConfig",
    "EntropyConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "EvalSet",
    "FilterConfig",
    "JudgeConfig",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "MixConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "RewardPart",
    "RolloutConfig",
    "Section",
    "SpeculativeConfig",
    "StageConfig",
    "VllmConfig",
]
