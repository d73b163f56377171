"""The training loop. This file is the whole of one step; everything it calls does one thing and can be read later.

One step of MAGIC (Skywork-OR1 report, section 3.1):
  1. sample M responses to each of P prompts and score them                     -> groups
  2. leave out groups whose rewards are all equal                               -> kept
  3. advantages within each group; the entropy coefficient from the rollout's own entropy
  4. one optimizer step per minibatch of prompts; if that is all of them the step is on-policy
"""

# K kept groups, M responses each, T packed tokens of a row, N trained tokens of a row, H hidden

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from or1.config import Config, StageConfig
from or1.core import faults
from or1.core.errors import DiskError
from or1.core.seeds import seed_of
from or1.core.types import Group, Prompt, Status
from or1.data import Problems, Sampler, load_problems
from or1.data.fingerprint import inputs_of
from or1.dist.oom_retry import Budget
from or1.dist.world import SINGLE, World
from or1.eval.accuracy import evaluate_set
from or1.magic.empty_steps import note_step
from or1.magic.entropy import rollout_entropy
from or1.magic.plateau import eval_level
from or1.magic.selection import Minibatch, Trainable, choose, is_known, minibatches, unknown_tokens
from or1.model.export import export_model
from or1.model.load import load_model, load_tokenizer
from or1.reward import make_scorer
from or1.reward.scorer import require_rewards
from or1.rollout import make_engine
from or1.rollout.collect import Progress, Rollout
from or1.rollout.hf import HfEngine
from or1.run.checkpoint import Checkpoint
from or1.run.checkpoint_writer import CheckpointWriter
from or1.run.directory import cap_rows, checkpoints_of, row_cap
from or1.run.marks import mark_commit
from or1.run.metrics_log import MetricsWriter, rewind_metrics
from or1.run.resume import restore
from or1.run.rollout_log import write_rollouts
from or1.run.state import TrainState
from or1.train.engine_check import compare_engine, require_rounding
from or1.train.metrics import UpdateStats, engine_metrics, peak_memory_gib, rollout_metrics
from or1.train.optim import MasterAdamW
from or1.train.rollout_queue import RolloutFeed
from or1.train.update import UpdateSettings, prepared, update_policy
from or1_kernels.objective import PolicyObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from or1.report.rank_display import RankDisplay


class Trainer:
    """A run: `Trainer(config, display).run()` trains from the newest checkpoint to the last step."""

    def __init__(
        self,
        config: Config,
        display: RankDisplay,
        world: World = SINGLE,
        stop: Callable[[], bool] = lambda: False,
        resume: int | None = None,
        check: Callable[[Problems], None] = lambda data: None,
    ):
        """`stop` is asked after every step. `resume` is the step to go on from, 0 for the start; None: the newest.
        `check` sees the data before the model is loaded."""
        self.config, self.display, self.world, self._stop = config, display, world, stop
        self.tokenizer = load_tokenizer(config.model.path)
        self.data = load_problems(config, self.tokenizer)
        check(self.data)
        self.sampler = Sampler(len(self.data.prompts), config.seed, self.data.pools)
        self.model = load_model(config.model, world).train()
        self.reference = self._load_reference()
        self.optimizer = MasterAdamW(self.model, config.optim, world)
        self.engine = make_engine(config, self.model, self.tokenizer, world)
        mark = partial(mark_commit, config.run_path)
        self.checkpoints = CheckpointWriter(checkpoints_of(config.run_path), config.checkpoint.keep, world, mark)
        cap = partial(cap_rows, config.run_path)
        self.budget = Budget(config.optim.max_tokens_per_rank, tell=display.message, cap=cap)
        self._checkpoint_s: float | None = None
        self.state = restore(self, resume) or TrainState.start(config)
        for message in self.state.note_inputs(inputs_of(config, self.data)):
            display.message(message)
        if resume is None:
            self._cap_rows()
        self.feed = RolloutFeed(config, self.data.prompts, self.sampler, self.engine, self.state, world)

    def run(self) -> bool:
        """All steps that are left, or as many as run before a stop is asked for; returns whether all are done.

        Every step ends with a line in metrics.jsonl; some with a checkpoint, and the last one that runs always.
        """
        stopped = False
        with (
            closing(self.engine),
            closing(self.feed),
            closing(self.checkpoints),
            self._metrics() as writer,
            make_scorer(self.config.reward, self._all_prompts(), self.config.run_path) as self.scorer,
        ):
            if self.state.step == 0:
                start = self.evaluate()
                self._hand_over(0, start)
                self._report(writer, 0, start)
            while not self.state.stages.finished(self.config) and not stopped:
                stopped = self._one_step(writer)
            self.checkpoints.wait()
        finished = self.state.stages.finished(self.config)
        if finished and (unfinished := len(self.state.in_flight.carried)):
            self.display.message(f"{unfinished} groups were still open after the last step and are left out")
        return finished

    @contextmanager
    def _metrics(self) -> Iterator[MetricsWriter | None]:
        """metrics.jsonl from the step after the newest checkpoint on; None on all ranks but the main one."""
        if not self.world.is_main:
            yield None
            return
        path, last = self.config.run_path / "metrics.jsonl", self.state.step if self.state.step else -1
        kept, remarks = rewind_metrics(path, last)
        for remark in remarks:
            self.display.message(remark)
        self.display.recall(kept)
        writer = MetricsWriter(self.config.run_path, self.config.log.tensorboard, first_step=self.state.step + 1)
        with closing(writer):
            yield writer

    def _one_step(self, writer: MetricsWriter | None) -> bool:
        """The next step and what belongs to it; returns whether any rank was asked to stop."""
        began = time.perf_counter()
        number = self.state.step + 1
        faults.at_step(number)
        self.display.begin(number)
        index, stage = self.state.stages.at(self.config, number)
        metrics = self.step(number, index, stage)
        self.state.step = number
        if number % self.config.eval.every_steps == 0 or self.state.stages.is_last_step(self.config, number):
            metrics |= self.evaluate()
        self._hand_over(number, metrics)
        metrics |= {"time/step": time.perf_counter() - began, "perf/peak_mem_gib": peak_memory_gib()}
        if self._checkpoint_s is not None:
            metrics["time/checkpoint"], self._checkpoint_s = self._checkpoint_s, None
        # The line comes before the commit: a crash between them repeats the step, the other order would lose the line.
        self._report(writer, index, metrics)
        stopped = self.world.any(self._stop())
        self._look_after(self.checkpoints.poll)
        due = number % self.config.checkpoint.every_steps == 0
        if stopped or due or self.state.stages.finished(self.config):
            self._checkpoint_s = self._save()
        return stopped

    def step(self, number: int, index: int, stage: StageConfig) -> dict[str, float]:
        """Rollout step `number`, in stage `index`: generate, score, reject, update. Returns its metrics."""
        self._drop_solved(index)

        def progress(done: int, total: int) -> None:
            self.display.phase("rollout", done, total)

        rollout = self._refilled(number, stage, self.feed.take(number, self.scorer, progress), progress)
        torch.manual_seed(seed_of(self.config.seed, number))
        self.feed.ahead(number + 1, self.scorer)
        if not self.config.rollout.overlap:
            self.engine.release()
        return self.learn(number, index, stage, rollout)

    def begin(self, number: int, index: int) -> None:
        """Take the prompts of a step whose rollout exists already, and seed what the step draws."""
        self._drop_solved(index)
        self.feed.skip(number)
        torch.manual_seed(seed_of(self.config.seed, number))

    def learn(
        self, number: int, index: int, stage: StageConfig, rollout: Rollout, log: bool = True
    ) -> dict[str, float]:
        """The rest of a step, from its groups on; without `log` they are another engine's, and not compared with it."""
        metrics = rollout_metrics(rollout.groups) | engine_metrics(rollout, self.state.policy_version)
        chosen = self._choose(rollout.groups, stage)
        if log and number % self.config.log.rollouts_every_steps == 0 and self.world.is_main:
            advantages = chosen.advantages_by_group()
            write_rollouts(self.config.run_path / "rollouts", number, index, rollout.groups, advantages)

        if self.config.reward.is_function:
            require_rewards(number, rollout.groups)

        train_began = time.perf_counter()
        stats, entropy_all = UpdateStats(), rollout_entropy(rollout.groups)
        if chosen.kept:
            measured = self.config.loss.entropy.measure
            entropy = entropy_all if measured == "all" else rollout_entropy(chosen.kept)
            alpha = self.state.entropy.alpha(entropy)
            for batch in self._prepared(minibatches(chosen, self.config.loss, stage), stage):
                settings = replace(self._update_settings(alpha), normaliser=batch.normaliser)
                took = update_policy(self.model, self.optimizer, batch.sequences, settings, stats)
                if log and len(stats.results) == 1 and not metrics["policy/staleness"]:
                    require_rounding(stats, self.engine, self.config, number, self.world)
                self.state.note_update(took, self.config.optim.max_nonfinite_steps)
            self.state.entropy.update(entropy)
            metrics |= {"policy/entropy": entropy, "policy/entropy_coef": alpha}
        if math.isfinite(entropy_all):
            metrics["policy/entropy_all"] = entropy_all
            if warning := self.state.watch.note(number, entropy_all, self.config, stage):
                self.state.totals["entropy_alarms"] += 1
                self.display.message(warning)
        if said := note_step(self.state.totals, rollout.groups, bool(chosen.kept), self.config):
            self.display.message(f"step {number}: {said}")
        trained = time.perf_counter()

        self.feed.settle()
        synced = time.perf_counter()
        metrics |= self._push([group.prompt for group in rollout.groups])
        self.state.count(rollout.groups)
        if self.config.data.drop_solved:
            self.state.solved.note(rollout.groups, self.config.data.solved_visits)
        tokens = sum(len(r.token_ids) for g in rollout.groups for r in g.responses)
        stats.reduce(self.world)
        return (
            metrics
            | stats.metrics()
            | {
                "group/kept": float(len(chosen.kept)),
                "rollout/nonfinite_logp": float(unknown_tokens(rollout.groups)),
                "policy/entropy_controller": self.state.entropy.coef,
                "optim/out_of_memory": float(self.budget.out_of_memory),
                "optim/row_tokens": float(self.budget.max_tokens),
                "data/epoch": float(self.state.sampler.epoch),
                "data/dropped_solved": float(len(self.state.solved.dropped)),
                "perf/tokens_per_s": tokens / (rollout.generate_s + rollout.reward_s + synced - train_began),
                # A rollout made ahead costs what the step waits for it after training.
                "time/rollout": rollout.generate_s + synced - trained,
                "time/reward": rollout.reward_s,
                "time/reward_exposed": rollout.reward_s,
                "time/train": trained - train_began,
                "time/sync": time.perf_counter() - synced,
            }
        )

    def _push(self, prompts: list[Prompt]) -> dict[str, float]:
        """The present weights to the engine, as the next version; now and then, see that they arrived.

        `prompts` are those of the rollout: what the engine has kept of old weights, it has kept for them.
        """
        version = self.state.policy_version + 1
        self.engine.update_weights(version)
        self.state.policy_version = version
        every = self.config.rollout.verify_every
        if isinstance(self.engine, HfEngine) or not every or version % every:
            return {}
        return compare_engine(self.engine, self.model, prompts or self.data.prompts, self.config).require().metrics()

    def _choose(self, groups: Sequence[Group], stage: StageConfig) -> Trainable:
        usable = [is_known(group) for group in groups]
        return choose(groups, usable, self.config.loss, self.config.reward, stage)

    def _refilled(self, number: int, stage: StageConfig, rollout: Rollout, progress: Progress) -> Rollout:
        """The rollout, with new groups in place of rejected ones for at most `loss.refill_rounds` rounds."""
        for attempt in range(1, self.config.loss.refill_rounds + 1):
            missing = stage.prompts_per_step - sum(self._choose(rollout.groups, stage).flags)
            if missing <= 0:
                break
            rollout = rollout.plus(self.feed.refill(number, attempt, missing, self.scorer, progress))
        return rollout

    def _prepared(self, batches: list[Minibatch], stage: StageConfig) -> list[Minibatch]:
        """Minibatches in the order of their updates, with the log-probs that the objective compares with."""
        old_logp = self.config.loss.old_logp
        if old_logp == "auto":
            old_logp = "recompute" if len(batches) * stage.reuse > 1 else "none"
        return prepared(batches, self.model, self.reference, self._update_settings(0.0), old_logp) * stage.reuse

    def _hand_over(self, number: int, metrics: dict[str, float]) -> None:
        """Note an evaluation, and go on to the next stage if this one ends here."""
        stages = self.state.stages
        stages.note_step(metrics.get("completion/truncated", math.nan))
        if (level := eval_level(metrics)) is not None:
            stages.note_evaluation(number, level)
        if (why := stages.advance(self.config, number)) and not stages.finished(self.config):
            self.display.message(f"stage {stages.index} ends with step {number}: {why}")

    def evaluate(self) -> dict[str, float]:
        """avg@k and pass@k of every held-out set."""
        began = time.perf_counter()
        metrics: dict[str, float] = {}
        for settings in self.config.eval.sets:

            def progress(done: int, total: int, name: str = settings.name) -> None:
                self.display.phase(f"eval {name}", done, total)

            prompts = self.data.eval_prompts[settings.name]
            limit = self.config.eval_max_response_tokens
            result = evaluate_set(
                self.engine,
                self.scorer,
                prompts,
                settings,
                limit,
                pass_k=self.config.eval.pass_k,
                progress=progress,
                world=self.world,
            )
            metrics |= result.metrics()
            remark = result.remark() if self.config.reward.is_function else ""
            failed = (result.count(Status.CRASH), result.count(Status.TIMEOUT))
            if first := self.state.note_evaluation(*failed, remark):
                self.display.message(first)
        return metrics | {"time/eval": time.perf_counter() - began}

    def _load_reference(self) -> PreTrainedModel | None:
        """The reference model of the KL term, None without one."""
        if self.config.loss.kl_coef == 0:
            return None
        path = self.config.loss.reference or self.config.model.path
        settings = self.config.model.model_copy(update={"path": path})
        return load_model(settings, self.world).requires_grad_(False)

    def _all_prompts(self) -> Iterator[Prompt]:
        yield from self.data.prompts
        for prompts in self.data.eval_prompts.values():
            yield from prompts

    @property
    def weights_folder(self) -> Path:
        """Where `export` writes the present weights."""
        return self.config.run_path / "weights" / f"step_{self.state.step}"

    def export(self) -> str:
        """Write the present weights as a Hugging Face checkpoint; returns the folder."""
        return str(export_model(self.model, self.tokenizer, self.weights_folder, self.world))

    def _save(self) -> float:
        began = time.perf_counter()
        self.display.phase("checkpoint")
        self._look_after(self.checkpoints.wait)
        self.state.updates, self.state.budget = self.optimizer.updates, self.budget.state()
        in_flight, tensors = self.state.in_flight.to_checkpoint(self.data.prompts)
        state, moments = self.state.to_json() | {"in_flight": in_flight}, self.optimizer.state_tensors()
        checkpoint = Checkpoint(self.state.step, state, moments | tensors, self.optimizer.state_rows())
        self.checkpoints.save(checkpoint)
        return time.perf_counter() - began

    def _look_after(self, how: Callable[[], None]) -> None:
        """A checkpoint that cannot be written is counted and told, and the run goes on; only the last one has to be."""
        try:
            how()
        except DiskError as error:
            self.state.totals["failed_checkpoints"] += 1
            self.display.message(str(error))

    def _cap_rows(self) -> None:
        """Shorter rows than the checkpoint's, if the run ended because those did not fit."""
        cap = int(self.world.gather(str(row_cap(self.config.run_path) or self.budget.max_tokens).encode())[0])
        if cap < self.budget.max_tokens:
            self.display.message(f"rows of {cap} tokens, since those of {self.budget.max_tokens} ran out of memory")
            self.budget.max_tokens, self.budget.out_of_memory = cap, self.budget.out_of_memory + 1

    def _report(self, writer: MetricsWriter | None, stage_index: int, metrics: dict[str, float]) -> None:
        if writer is not None:
            writer.write(self.state.step, stage_index, metrics)
        self.display.step({"step": self.state.step, "stage": stage_index} | metrics)

    def _drop_solved(self, stage_index: int) -> None:
        """At the start of a stage, say how many prompts it does without; they are noted only if `drop_solved` is on."""
        if dropped := self.state.solved.enter(stage_index):
            left = len(self.data.prompts) - len(self.state.solved.dropped)
            self.display.message(
                f"{dropped} prompts that the stage before always solved are dropped; {left} of "
                f"{len(self.data.prompts)} are left"
            )

    def _update_settings(self, alpha: float) -> UpdateSettings:
        config = self.config
        return UpdateSettings(
            PolicyObjective(
                kind=config.loss.kind,
                clip_low=config.loss.clip_low,
                clip_high=config.loss.clip_high,
                kl_coef=config.loss.kl_coef,
                is_cap=config.loss.is_cap,
            ),
            alpha,
            config.rollout.temperature,
            self.budget,
            config.optim.share_prompts,
            lambda done, total: self.display.phase("train", done, total),
            world=self.world,
            old_is_engine=config.loss.old_logp == "rollout",
        )
