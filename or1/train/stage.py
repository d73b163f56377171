"""What the settings of a stage change in the parts of a run: the policy's objective, and the reference model."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from or1.config import Config, LossConfig, ModelConfig
from or1.dist.oom_retry import free_memory
from or1.magic.stages import Step
from or1.model.load import load_model
from or1.run.state import TrainState
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy
from or1_kernels.objective import PolicyObjective


def enter(
    step: Step, config: Config, state: TrainState, policy: Policy, optimizer: MasterAdamW
) -> tuple[Config, Policy]:
    """Take up the settings of the stage of a step. Return the config and the policy with them."""
    settings = state.enter(step, config)
    optimizer.config = settings.optim
    return settings, policy_in(policy, settings)


def policy_in(policy: Policy, config: Config) -> Policy:
    """Return the policy with the temperature and the objective of a config (`Config.in_stage`)."""
    loss = config.loss
    return replace(
        policy,
        temperature=config.rollout.temperature,
        objective=objective_of(loss),
        old_is_engine=loss.old_logp == "rollout",
    )


def objective_of(loss: LossConfig) -> PolicyObjective:
    """Return the objective of a token. Weights of whole responses are in the advantages (or1.magic.mismatch)."""
    objective = PolicyObjective(loss.kind, loss.clip_low, loss.clip_high, loss.kl_coef, loss.is_cap)
    mismatch = loss.mismatch
    if mismatch.kind == "none" or mismatch.by_sequence:
        return objective
    cap = math.inf if mismatch.upper is None else mismatch.upper
    return replace(objective, is_cap=cap, is_floor=mismatch.lower or 0.0, is_mask=mismatch.masks)


class Reference:
    """The reference model of the KL term, in memory only while a stage has kl_coef > 0.

    With [model.lora] and no `loss.reference`, the policy itself is the reference with its adapters off.

    settings  of [model], with tuned choices in place of "auto"
    """

    def __init__(self, settings: ModelConfig, policy: Policy):
        self._settings, self._policy = settings, policy
        self._held: Policy | None = None

    def of(self, config: Config) -> Policy | None:
        """Return the reference of a stage's config, None without a KL term. Loads or frees the model. Collective."""
        if config.loss.kl_coef == 0:
            if self._held is not None:
                self._held = None
                free_memory()
            return None
        if self._held is None:
            self._held = self._load(config)
        return policy_in(self._held, config)

    def _load(self, config: Config) -> Policy:
        if self._settings.lora is not None and config.loss.reference is None:
            return replace(self._policy, adapters=False)
        path = config.loss.reference or config.model.path
        settings = self._settings.model_copy(update={"path": path, "lora": None})
        device = self._policy.model.device
        # A run that resumes in this stage loads the model elsewhere; its random numbers must be the same.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model = load_model(settings, self._policy.world).requires_grad_(False)
        return replace(self._policy, model=model, routers=None)
