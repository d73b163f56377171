"""The configuration: frozen pydantic models, one per TOML section. Imports no torch, so a bad config answers at once.

The docstring under a field is its help text; `or1.config_load` prints it beside an error in that field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A closed, immutable table: an unknown key is an error, a field never changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


StringList = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class ModelConfig(Section):
    """`[model]`"""

    path: str
    """Hugging Face checkpoint folder or hub id of a causal language model."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Type of the weights in forward and backward; the optimizer always keeps a master copy of at least fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""


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


class RolloutConfig(Section):
    """`[rollout]`"""

    engine: Literal["hf"] = "hf"
    """Generation engine; hf is transformers' generate inside the trainer."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the loss scales its logits by the same number."""
    batch_size: int = Field(256, ge=1)
    """Responses generated together."""


class RewardConfig(Section):
    """`[reward]`"""

    kind: Literal["math"] = "math"
    """Verifier: math compares the last \\boxed{} with the gold answer through math-verify."""
    timeout_s: float = Field(5.0, gt=0)
    """Limit for one response; then its worker is killed and the response counted as a timeout."""
    workers: int = Field(2, ge=1)
    """Verifier processes."""
    require_think_close: bool = False
    """Score a response without `</think>` as truncated (0) instead of grading all of it."""


class EntropyConfig(Section):
    """`[loss.entropy]`"""

    control: Literal["none", "constant", "adaptive"] = "none"
    """none: no bonus. constant: always `coef`. adaptive: the MAGIC controller (paper, Eq. 3.2)."""
    variant: Literal["script", "paper"] = "script"
    """script: the released code (gate lags a step, coefficient clipped). paper: Eq. 3.2 (gate on the same step)."""
    coef: float = Field(0.0, ge=0)
    """Initial coefficient; for `constant`, the coefficient."""
    target: float = Field(0.2, ge=0)
    """Entropy in nats per token that the adaptive controller holds."""
    delta: float = Field(1e-4, gt=0)
    """Change of the coefficient per step. Default 1e-4 (script) or 5e-3 (paper)."""
    coef_min: float = Field(0.0, ge=0)
    """Lower bound of the coefficient."""
    coef_max: float = Field(5e-3, gt=0)
    """Upper bound of the coefficient. Default 5e-3 (script) or 1.0 (paper, which names no bound)."""

    @model_validator(mode="before")
    @classmethod
    def _variant_defaults(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("variant") == "paper":
            return {"delta": 5e-3, "coef_max": 1.0} | data
        return data


class LossConfig(Section):
    """`[loss]`"""

    kind: Literal["ppo_clip", "cispo"] = "ppo_clip"
    """Per-token objective."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above 1 + clip_high; larger than clip_low is DAPO's clip-higher."""
    old_logp: Literal["auto", "recompute", "rollout"] = "auto"
    """Old log-probs. auto: none when on-policy, else recompute. rollout: trust the engine's."""
    is_cap: float | None = Field(None, gt=0)
    """Cap of the truncated importance weight between engine and trainer; absent means no correction."""
    reject_zero_advantage: bool = True
    """Leave out groups whose responses are all wrong or all right (paper, section 3.1)."""
    entropy: EntropyConfig = EntropyConfig()


class OptimConfig(Section):
    """`[optim]`"""

    lr: float = Field(1e-6, gt=0)
    """Learning rate of AdamW, constant after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays, each in [0, 1)."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay on matrices; norms and biases have none."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest gradient norm of one update."""
    max_tokens_per_rank: int = Field(32768, ge=1)
    """Tokens in one packed row; sets peak memory, never the gradient."""
    max_nonfinite_steps: int = Field(3, ge=1)
    """Stop after this many updates in a row were skipped for a non-finite loss or gradient."""


class CheckpointConfig(Section):
    """`[checkpoint]`"""

    every_steps: int = Field(20, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""


class EvalSet(Section):
    """`[[eval.sets]]`"""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in the metrics: eval/{name}/avg@k."""
    path: str
    """JSONL or parquet file of problems."""
    samples: int = Field(1, ge=1)
    """Responses per problem: the k of avg@k and pass@k."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    limit: int | None = Field(None, ge=1)
    """Take only the first problems."""


class EvalConfig(Section):
    """`[eval]`"""

    every_steps: int = Field(20, ge=1)
    """Steps between evaluations; the first and the last step always have one."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Response limit of evaluations; absent means that of the last stage."""
    sets: tuple[EvalSet, ...] = ()
    """Held-out sets."""


class LogConfig(Section):
    """`[log]`"""

    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    rollouts_every_steps: int = Field(1, ge=1)
    """Steps between saved rollouts (rollouts/step_N.parquet)."""


class StageConfig(Section):
    """`[[stage]]`"""

    steps: int = Field(ge=1)
    """Rollout steps in this stage."""
    max_response_tokens: int = Field(ge=1)
    """Response limit of this stage; a longer response is truncated and scores 0."""
    prompts_per_step: int = Field(ge=1)
    """Prompts of one rollout step (the paper's D_R)."""
    group_size: int = Field(ge=2)
    """Responses per prompt (the paper's gs)."""
    minibatch_prompts: int | None = Field(None, ge=1)
    """Prompts of one optimizer step (the paper's D_T); absent means prompts_per_step, which is on-policy."""

    @property
    def on_policy(self) -> bool:
        """Whether one rollout feeds exactly one optimizer step, so that the ratio is 1 and the clip inert."""
        return self.minibatch_prompts is None or self.minibatch_prompts == self.prompts_per_step


class Config(Section):
    """A whole run. `or1.config_load.load_config` makes one from TOML."""

    run_dir: str
    """Folder of the run: metrics, rollouts, checkpoints, weights, report."""
    seed: int = Field(1, ge=0)
    """Seed of data order and sampling."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    stage: tuple[StageConfig, ...] = Field(min_length=1)
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
    def run_path(self) -> Path:
        """The run directory as a path."""
        return Path(self.run_dir)
