"""From a config to the parts of a run: data, scorer, model, optimizer, engine, state."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from or1.config import Config, ModelConfig
from or1.core.display import StepDisplay
from or1.data import Problems, Sampler, load_problems
from or1.data.fingerprint import inputs_of
from or1.dist.oom_retry import RowBudget
from or1.dist.world import SINGLE, World
from or1.environment.open import Environment, open_environment
from or1.eval.evaluator import Evaluator
from or1.model.load import eos_token_ids, load_model, load_tokenizer
from or1.model.routers import routers_of
from or1.reward import make_scorer
from or1.reward.scorer import Scorer
from or1.reward.scorers import remarks_of
from or1.rollout.engine import Engine
from or1.rollout.make import engine_warnings, make_engine
from or1.run.base_weights import base_input, require_base
from or1.run.checkpoint import committed_steps
from or1.run.directory import cap_rows, checkpoints_of
from or1.run.resume import Checkpointed
from or1.run.session import Session
from or1.run.state import TrainState
from or1.train.device_room import require_room, states_fit
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy
from or1.train.rollout_queue import RolloutQueue
from or1.train.stage import Reference, policy_in
from or1.tune.apply import head_options, settled
from or1.tune.choice import Choice
from or1.tune.run import choice_of_run
from or1_kernels.options import HeadOptionsDict


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run. Use as a context manager: it ends the engine, the scorer and a rollout that is being made."""

    config: Config
    world: World
    data: Problems
    tokenizer: PreTrainedTokenizerBase
    state: TrainState
    policy: Policy
    reference: Reference
    optimizer: MasterAdamW
    engine: Engine
    rollouts: RolloutQueue
    evaluator: Evaluator
    session: Session
    stack: ExitStack

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def build(
    config: Config,
    display: StepDisplay,
    world: World = SINGLE,
    *,
    stop: Callable[[], bool] = bool,
    resume: int | None = None,
    scorer: Scorer | None = None,
) -> Parts:
    """Load what a run needs, and resume from its newest checkpoint. Collective.

    What fails fast comes first: the data and the scorer are checked before the model is loaded.

    stop    returns True once the run was asked to stop
    resume  step to resume from, 0 for the start; None for the newest checkpoint
    scorer  used instead of the scorer of `[reward]`; the caller closes it
    """
    with ExitStack() as stack:
        tokenizer = load_tokenizer(config.model.path)
        environment, data = _source(config, tokenizer, world, stack)
        scorer = environment.scorer if environment else scorer or _scorer(config, data, display, stack)
        first = not resume and not committed_steps(checkpoints_of(config.run_path))
        settings = _tuned(config, display, world, first=first)
        model = load_model(settings, world).train()
        policy = _policy(config, model, display, world, head_options(settings))
        # Everything that stays on the device comes before the engine, which takes a share of what is left.
        with states_fit(model.device):
            optimizer = MasterAdamW(model, config.optim, world)
            optimizer.reserve()
        reference = Reference(settings, policy)
        # Loaded here even if a later stage is the first with a KL term: a run must not find then that it does not fit.
        other = reference.of(config.with_reference())
        require_room(config, model, optimizer, None if other is None or other.model is model else other.model)
        del other
        engine = _engine(config, model, tokenizer, display, world)
        stack.callback(engine.close)
        player = environment.engine(engine, tokenizer, eos_token_ids(model, tokenizer)) if environment else engine
        saved = Checkpointed(config, world, optimizer, policy.budget, data.prompts, tokenizer)
        state = _state(saved, data, engine, display, resume)
        reference.of(config.in_stage(state.stages.index))
        sampler = Sampler(len(data.prompts), config.seed, data.pools)
        rollouts = RolloutQueue(
            config, data.prompts, player, scorer, state, display, sampler=sampler, world=world, stop=stop
        )
        stack.callback(rollouts.close)
        return Parts(
            config=config,
            world=world,
            data=data,
            tokenizer=tokenizer,
            state=state,
            policy=policy,
            reference=reference,
            optimizer=optimizer,
            engine=engine,
            rollouts=rollouts,
            evaluator=Evaluator(config, data.eval_prompts, player, scorer, state, display, world=world),
            session=Session(config, state, saved, display, world, stop=stop),
            stack=stack.pop_all(),
        )


def _scorer(config: Config, data: Problems, display: StepDisplay, stack: ExitStack) -> Scorer:
    """Start the scorer of `[reward]`, and show its remarks."""
    prompts = chain(data.prompts, *data.eval_prompts.values())
    scorer = stack.enter_context(make_scorer(config.reward, prompts, config.run_path))
    for remark in remarks_of(scorer, config.run_path):
        display.message(remark)
    return scorer


def _engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, display: StepDisplay, world: World
) -> Engine:
    """Start the engine, and say so if another one would be faster. Collective."""
    for warning in engine_warnings(config, model.device):
        display.message(warning)
    return make_engine(config, model, tokenizer, world)


def _source(
    config: Config, tokenizer: PreTrainedTokenizerBase, world: World, stack: ExitStack
) -> tuple[Environment | None, Problems]:
    """Return the environment, if there is one, and the problems of the run."""
    if not config.environment.id:
        return None, load_problems(config, tokenizer)
    environment = stack.enter_context(open_environment(config, world))
    return environment, environment.problems


def _state(saved: Checkpointed, data: Problems, engine: Engine, display: StepDisplay, resume: int | None) -> TrainState:
    """Return the state to start from, with its weights in the model and the engine. Collective."""
    state = saved.restore(resume, display.message)
    inputs = inputs_of(saved.config, data) | base_input(saved.config, saved.world)
    require_base(state.inputs, inputs, saved.config.model.path)
    if state.step:
        engine.update_weights(state.policy_version)
    for changed in state.note_inputs(inputs):
        display.message(changed)
    if resume is None:
        saved.cap_rows(display.message)
    return state


def _tuned(config: Config, display: StepDisplay, world: World, *, first: bool) -> ModelConfig:
    """Return `[model]` with the choice of the main rank in place of settings that are "auto". Collective."""
    choice = Choice()
    if world.is_main:
        choice = choice_of_run(config, display, first=first, sequence_size=world.sequence_size)
    # The ranks of one model must compute the same, and their checkpoints hold the same shards.
    sent = json.loads(world.from_main(json.dumps(choice.values()).encode()))
    return settled(config.model, Choice.of(sent))


def _policy(
    config: Config, model: PreTrainedModel, display: StepDisplay, world: World, head: HeadOptionsDict
) -> Policy:
    budget = RowBudget(
        config.optim.max_tokens_per_rank, message=display.message, cap=partial(cap_rows, config.run_path)
    )
    policy = Policy(
        model,
        budget,
        sharing=config.optim.share_prompts,
        world=world,
        progress=display.progress("train"),
        head=head,
        routers=routers_of(model, config.model.router_aux_coef),
    )
    return policy_in(policy, config.in_stage(0))
