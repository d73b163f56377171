"""One step of MAGIC (Skywork-OR1 report, section 3.1). This file is the algorithm; each call below is one file away.

    G  <- M scored responses to each of P prompts                              train/rollout_queue.py
    K  <- the groups of G whose rewards differ                                 magic/selection.py     section 3.1
    A  <- (r - mean) / std within each group of K                              magic/advantage.py     Eq. 2.5
    e  <- mean of -log p over the tokens of K;   alpha <- controller(e)        magic/entropy.py       Eq. 3.2
    for each minibatch B of K:   theta <- AdamW(theta, d[L(B) - alpha H(B)])   train/update.py        Eq. 3.1
    the engine takes theta                                                     train/engine_check.py

What surrounds a step (metrics.jsonl, checkpoints, display, stop requests) is run/session.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from or1.config import Config, StageConfig
from or1.magic.entropy import rollout_entropy
from or1.magic.mismatch import masked_shares, weigh
from or1.magic.selection import Minibatch, minibatches, select
from or1.magic.stages import Step
from or1.reward.scorer import require_rewards
from or1.rollout.collect import Rollout
from or1.train.build import Parts
from or1.train.engine_check import push_weights, require_rounding
from or1.train.metrics import StepMeter, UpdateStats
from or1.train.rank_rows import Policy
from or1.train.score import with_old_logp, with_ref_logp
from or1.train.stage import enter
from or1.train.update import update


class Trainer:
    """A run: `Trainer(build(config, display)).run()` trains from the newest checkpoint to the last step."""

    def __init__(self, parts: Parts):
        self.config, self.state, self.world, self.session = parts.config, parts.state, parts.world, parts.session
        self.policy, self.reference, self.optimizer = parts.policy, parts.reference, parts.optimizer
        self.engine, self.rollouts, self.evaluator = parts.engine, parts.rollouts, parts.evaluator

    def run(self) -> bool:
        """Run the remaining steps. Return False if a stop was requested before the last; `Session` commits."""
        state, session = self.state, self.session
        with session:
            if not state.begun:
                session.record_start(self.evaluator.run())
            while not state.stages.finished and not session.stopped:
                step = session.begin()
                metrics = self.learn(step, self.sample(step))
                state.step = step.number
                if session.evaluation_is_due():
                    metrics |= self.evaluator.run()
                session.finish(step, metrics)
        return state.stages.finished

    def sample(self, step: Step) -> Rollout:
        """Return the scored responses of a step. With rollout.overlap, start the rollout of the next step."""
        rollout = self.rollouts.take(step)
        torch.manual_seed(step.seed)
        self.rollouts.start_next(step)
        return rollout

    def learn(self, step: Step, rollout: Rollout, *, replayed: bool = False) -> dict[str, float]:
        """Train on a rollout, and push the weights to the engine. Return the metrics of the step.

        replayed  the rollout comes from a file (`or1 replay`): do not log it, nor compare it with the current engine
        """
        state, groups = self.state, rollout.groups
        config, policy = enter(step, self.config, state, self.policy, self.optimizer)
        meter, stats = StepMeter(rollout, state.policy_version, self.rollouts.sources), UpdateStats()

        # Advantages within each group; groups without one are rejected.
        chosen = select(groups, config.loss, config.reward, step.stage)
        if not replayed:
            self.session.log_rollout(step, groups, chosen.advantages_by_group())
        if config.own_rewards:
            require_rewards(step.number, groups)

        with meter.timed("train"):
            if chosen.kept:
                entropy = rollout_entropy(groups if config.loss.entropy.measure == "all" else chosen.kept)
                alpha = state.entropy.alpha(entropy)
                # One optimizer step per minibatch. If there is one alone, the step is on-policy and the clip inert.
                batches = self.with_logps(minibatches(chosen, config.loss, step.stage), config, policy, step.stage)
                meter.add(masked_shares(batches, config.loss.mismatch))
                for batch in batches:
                    took = update(policy, self.optimizer, batch.sequences, alpha, stats, batch.normaliser)
                    if not replayed and len(stats.results) == 1 and not meter.staleness:
                        require_rounding(stats, self.engine, config, step.number, self.world)
                    state.note_update(took, config.optim.max_nonfinite_steps)
                state.entropy.update(entropy)
                meter.add({"policy/entropy": entropy, "policy/entropy_coef": alpha})
            self.session.warn(step, groups, bool(chosen.kept))

        with meter.timed("wait"):
            self.rollouts.settle()
        with meter.timed("sync"):
            prompts = [group.prompt for group in groups] or self.rollouts.prompts
            meter.add(push_weights(self.engine, self.policy.model, state, prompts, config, self.world))
        state.count(groups, config)
        stats.reduce(self.world)
        return meter.finish(stats, len(chosen.kept), state, self.policy.budget)

    def with_logps(
        self, batches: list[Minibatch], config: Config, policy: Policy, stage: StageConfig
    ) -> list[Minibatch]:
        """Return the minibatches of all updates, with the log-probs that the objective compares with."""
        loss, sequences = config.loss, [batch.sequences for batch in batches]
        if loss.old_logp == "rollout":
            sequences = [[replace(s, old_logp=s.rollout_logp) for s in each] for each in sequences]
        elif loss.scores_first(off_policy=len(batches) * stage.reuse > 1):
            sequences = [with_old_logp(policy, each) for each in sequences]
        if loss.mismatch.by_sequence:
            sequences = [weigh(each, loss.mismatch) for each in sequences]
        if (reference := self.reference.of(config)) is not None:
            sequences = [with_ref_logp(reference, each) for each in sequences]
        return [replace(batch, sequences=s) for batch, s in zip(batches, sequences, strict=True)] * stage.reuse
