"""The evaluations of a run: every held-out set, with the engine and the scorer of training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from or1.config import Config
from or1.core.display import Display
from or1.core.types import Prompt, Status
from or1.dist.world import SINGLE, World
from or1.eval.accuracy import evaluate_set
from or1.reward.scorer import Scorer
from or1.rollout.engine import Engine
from or1.rollout.vllm.drafts import taken_from
from or1.run.state import TrainState


class Evaluator:
    """The held-out sets of a config, and what evaluates them."""

    def __init__(
        self,
        config: Config,
        prompts: Mapping[str, Sequence[Prompt]],
        engine: Engine,
        scorer: Scorer,
        state: TrainState,
        display: Display,
        *,
        world: World = SINGLE,
    ):
        self._config, self._prompts, self._engine, self._scorer = config, prompts, engine, scorer
        self._state, self._display, self._world = state, display, world

    def run(self) -> dict[str, float]:
        """Return avg@k, pass@k and the other metrics of every held-out set. Collective."""
        began = time.perf_counter()
        metrics: dict[str, float] = {}
        for settings in self._config.eval.sets:
            result = evaluate_set(
                self._engine,
                self._scorer,
                self._prompts[settings.name],
                settings,
                self._config.eval_max_response_tokens,
                pass_k=self._config.eval.pass_k,
                progress=self._display.progress(f"eval {settings.name}"),
                world=self._world,
            )
            metrics |= result.metrics()
            remark = result.remark() if self._config.reward.functions or result.unverifiable else ""
            failed = (result.count(Status.CRASH), result.count(Status.TIMEOUT))
            if first := self._state.note_evaluation(*failed, remark):
                self._display.message(first)
        taken_from(self._engine)  # The drafts of an evaluation are not those of a rollout.
        return metrics | {"time/eval": time.perf_counter() - began}
