"""Rules about contradictions between sections and about missing files, which no single field can check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from typing import Literal

from or1.config import Config
from or1.config.environment_rules import environment_alone, no_environment
from or1.config.file_rules import (
    files_exist,
    missing_files,
    nothing_to_execute,
    paths_usable,
    positions_reach,
    reward_file_exists,
    training_files,
)
from or1.config.lora_rules import adapters_fit
from or1.config.loss_rules import mismatch_sound, objective_sound
from or1.config.rollout_rules import (
    engine_fits,
    importance_weights_sound,
    sampled_from_all_tokens,
    staleness_sound,
    vllm_samples,
)
from or1.config.vllm_rules import VLLM_RULES
from or1.core.errors import Problem

Verb = Literal["train", "filter", "judge", "eval"]
_COLDEST = 1e-3
_MOST_RESPONSES = 2**20


def contradictions(config: Config, verb: Verb = "train", files: bool = True) -> list[Problem]:
    """Return the problems that the rules find in a config whose fields are valid individually.

    verb   the command that will use the config
    files  False: do not check that training files, evaluation sets and models exist
    """
    skipped = () if files else (training_files, files_exist)
    if verb == "judge":  # needs neither the model nor evaluation sets
        skipped = (*skipped, files_exist)
    rules = [rule for rule in (*_NEEDS[verb], *_RULES) if rule not in skipped]
    return [*(problem for rule in rules for problem in rule(config)), *_stage_problems(config)]


def _stage_problems(config: Config) -> Iterator[Problem]:
    """Yield what the rules about stages find in the settings that are in effect in each stage."""
    plain = tuple(stage for stage in config.stage if not stage.own_settings())
    seen: set[Problem] = set()
    if plain or not config.stage:
        rest = config.model_copy(update={"stage": plain})
        seen = {problem for rule in _STAGE_RULES for problem in rule(rest)}
        yield from (problem for rule in _STAGE_RULES for problem in rule(rest))
    for i, stage in enumerate(config.stage):
        if not (own := stage.own_settings()):
            continue
        alone = config.in_stage(i).model_copy(update={"stage": (stage,)})
        for problem in (problem for rule in _STAGE_RULES for problem in rule(alone)):
            if problem in seen:
                continue
            seen.add(problem)
            where = f"stage.{i}.{problem.path}" if problem.path in own else problem.path
            yield Problem(where, f"in stage {i}: {problem.message}")


def _stages_given(config: Config) -> Iterator[Problem]:
    if not config.stage:
        yield Problem(
            "stage",
            "missing; add at least one [[stage]] with steps, max_response_tokens, prompts_per_step and group_size",
        )


def _data_given(config: Config) -> Iterator[Problem]:
    data = config.data
    if not data.files and not config.environment.id:
        yield Problem("data.train", "missing; name JSONL, JSON-array or parquet files of training problems")
    if data.train and data.mix:
        yield Problem("data.mix", "cannot be combined with data.train; name the files in one of them")


def _difficulty_given(config: Config) -> Iterator[Problem]:
    data = config.data
    given = [name for name in ("difficulty_model", "difficulty_file") if getattr(data, name) is not None]
    if data.keep_difficulty is not None and len(given) != 1:
        yield Problem(
            "data.keep_difficulty",
            f"needs one source of counts but has {' and '.join(given) or 'none'}; "
            "set data.difficulty_model or data.difficulty_file",
        )
    if data.keep_difficulty is None and given:
        yield Problem(f"data.{given[0]}", "has no effect without data.keep_difficulty; set it, for example to [1, 15]")
    if data.keep_difficulty is not None and data.keep_difficulty[0] > data.keep_difficulty[1]:
        yield Problem("data.keep_difficulty", f"{list(data.keep_difficulty)} keeps nothing; write [least, most]")


def _sets_given(config: Config) -> Iterator[Problem]:
    if not config.eval.sets:
        yield Problem("eval.sets", "missing; add at least one [[eval.sets]] with a name and a path")


def _limit_given(section: str) -> Callable[[Config], Iterator[Problem]]:
    def rule(config: Config) -> Iterator[Problem]:
        if not config.stage and getattr(config, section).max_response_tokens is None:
            yield Problem(
                f"{section}.max_response_tokens", "missing, and there is no [[stage]] to take it from; set it"
            )

    return rule


def _judges_given(config: Config) -> Iterator[Problem]:
    judge = config.judge
    if not judge.url:
        yield Problem("judge.url", "missing; name the server of each judge, or give --judge URL")
    for name in ("model", "key_env", "price_in", "price_out"):
        count, each = len(getattr(judge, name)), len(judge.url)
        allowed = (0, each) if name == "model" else (0, 1, each)
        if each and count not in allowed:
            yield Problem(f"judge.{name}", f"has {count} values for {each} judges; give one for each, in their order")
    if bool(judge.price_in) != bool(judge.price_out):
        yield Problem("judge.price_in", "needs judge.price_out too; set both or none")
    if judge.url and judge.keep > judge.votes * len(judge.url):
        yield Problem(
            "judge.keep",
            f"{judge.keep} valid votes cannot be reached by {len(judge.url)} judges with {judge.votes} votes each; "
            "lower it, or raise judge.votes",
        )


def _prompt_given(config: Config) -> Iterator[Problem]:
    if config.judge.prompt is not None:
        yield from missing_files([("judge.prompt", config.judge.prompt)])


def _no_endpoint(config: Config) -> Iterator[Problem]:
    if config.endpoint.url is not None:
        yield Problem(
            "endpoint.url", "or1 cannot send weights to an endpoint; it is for `or1 eval` and `or1 filter`; remove it"
        )


def _reward_parts_have_names(config: Config) -> Iterator[Problem]:
    reward = config.reward
    if reward.parts and reward.kind != "auto":
        yield Problem("reward.kind", "cannot be combined with reward.parts; make it one of the parts")
    labels = [part.label for part in reward.parts]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            yield Problem(f"reward.parts.{i}.name", f"{label!r} is the name of an earlier part; give it another name")
    if reward.parts and not any(part.weight for part in reward.parts):
        yield Problem("reward.parts", "every weight is 0, so every reward is 0; give a part a weight")


def _think_close_is_looked_for(config: Config) -> Iterator[Problem]:
    if not config.reward.needs_answers and config.reward.require_think_close:
        yield Problem(
            "reward.require_think_close",
            "true has no effect with a function of your own, which is given the whole text; remove it, and let the "
            "function check for </think>",
        )


def _one_fuses(config: Config) -> Iterator[Problem]:
    if config.model.compile and config.model.liger == "on":
        yield Problem(
            "model.compile",
            'true replaces the same parts of a layer as model.liger = "on"; set liger = "off", or compile = false',
        )


def _heartbeat_is_shorter(config: Config) -> Iterator[Problem]:
    limit, beat = config.dist.timeout_s, config.dist.heartbeat_timeout_s
    if beat > limit:
        yield Problem(
            "dist.heartbeat_timeout_s",
            f"{beat:g} is above dist.timeout_s = {limit:g}, which would end the run first; lower it",
        )


def _stages_fit(config: Config) -> Iterator[Problem]:
    for i, stage in enumerate(config.stage):
        if stage.prompts_per_step * stage.group_size > _MOST_RESPONSES:
            yield Problem(
                f"stage.{i}.prompts_per_step",
                f"{stage.prompts_per_step} times group_size = "
                f"{stage.group_size} is more than {_MOST_RESPONSES} responses a step; lower one of them",
            )
        minibatch = stage.minibatch_prompts
        if minibatch is not None and minibatch > stage.prompts_per_step:
            yield Problem(
                f"stage.{i}.minibatch_prompts",
                f"{minibatch} is more than prompts_per_step = "
                f"{stage.prompts_per_step}; lower it, or leave it out for on-policy training",
            )
        longest = config.data.max_prompt_tokens + stage.max_response_tokens
        if longest > config.optim.max_tokens_per_rank:
            yield Problem(
                "optim.max_tokens_per_rank",
                f"{config.optim.max_tokens_per_rank} is less than the longest "
                f"sequence of stage {i} ({config.data.max_prompt_tokens} prompt + "
                f"{stage.max_response_tokens} response tokens); raise it to at least {longest}",
            )


def _temperatures_sound(config: Config) -> Iterator[Problem]:
    named = [("filter.temperature", config.filter.temperature)]
    named += [(f"eval.sets.{i}.temperature", each.temperature) for i, each in enumerate(config.eval.sets)]
    for where, temperature in named:
        if 0 < temperature < _COLDEST:
            yield Problem(
                where,
                f"{temperature:g} divides logits into infinities; set 0, which is greedy, or at least {_COLDEST:g}",
            )


def _entropy_bounds(config: Config) -> Iterator[Problem]:
    entropy = config.loss.entropy
    if entropy.coef_min > entropy.coef_max:
        yield Problem("loss.entropy.coef_min", f"{entropy.coef_min} is above coef_max = {entropy.coef_max}; swap them")
    if entropy.control == "adaptive" and not entropy.coef_min <= entropy.coef <= entropy.coef_max:
        yield Problem(
            "loss.entropy.coef",
            f"{entropy.coef} is outside [{entropy.coef_min}, {entropy.coef_max}], "
            "the bounds of the adaptive controller; start inside them",
        )
    if entropy.control == "none" and entropy.coef > 0:
        yield Problem(
            "loss.entropy.coef",
            f'{entropy.coef} has no effect under control = "none"; set control = "constant" or remove coef',
        )


def _betas_valid(config: Config) -> Iterator[Problem]:
    for i, beta in enumerate(config.optim.betas):
        if not 0 <= beta < 1:
            yield Problem(f"optim.betas.{i}", f"{beta} is outside [0, 1); AdamW's usual values are 0.9 and 0.999")


def _weights_are_16_bit(config: Config) -> Iterator[Problem]:
    if config.optim.weights == "stochastic" and config.model.dtype != "bfloat16":
        yield Problem(
            "optim.weights",
            f'"stochastic" rounds bf16 weights, but model.dtype = "{config.model.dtype}"; '
            'set model.dtype = "bfloat16" or remove it',
        )


def _eval_names_unique(config: Config) -> Iterator[Problem]:
    names = [s.name for s in config.eval.sets]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield Problem("eval.sets", f"{names.count(name)} sets are named {name!r}; give each its own name")


def _magic_variants_sound(config: Config) -> Iterator[Problem]:
    loss, reward = config.loss, config.reward
    if loss.reference is not None and not config.needs_reference:
        yield Problem(
            "loss.reference",
            f"{loss.reference!r} has no effect with loss.kl_coef = 0; set kl_coef, for example to 1e-3, or remove it",
        )
    if loss.refill_rounds and not loss.reject_zero_advantage:
        yield Problem(
            "loss.refill_rounds",
            f"{loss.refill_rounds} has no effect without rejection; set "
            "loss.reject_zero_advantage = true, or remove it",
        )
    if loss.refill_rounds and config.rollout.partial_tokens is not None:
        yield Problem(
            "loss.refill_rounds",
            f"{loss.refill_rounds} needs groups that are complete in their step; remove it, or rollout.partial_tokens",
        )
    for i, stage in enumerate(config.stage):
        if reward.overlong_buffer > stage.max_response_tokens:
            yield Problem(
                "reward.overlong_buffer",
                f"{reward.overlong_buffer} tokens is more than "
                f"stage.{i}.max_response_tokens = {stage.max_response_tokens}; lower it",
            )
        if stage.until == "plateau" and not config.eval.sets:
            yield Problem(
                f"stage.{i}.until",
                '"plateau" needs evaluations, but there are none; add [[eval.sets]], or set until = "steps"',
            )


def _tuning_sound(config: Config) -> Iterator[Problem]:
    if config.tune == "on" and config.deterministic:
        yield Problem(
            "tune",
            'is "on", which chooses by time, and deterministic = true wants equal bits from equal settings; '
            'set tune = "off", and the settings in [model] to what `or1 tune` found',
        )


def _trackers_installed(config: Config) -> Iterator[Problem]:
    for name, project in (("wandb", config.log.wandb), ("trackio", config.log.trackio)):
        # By its metadata: a folder named wandb, as earlier runs leave it, can be imported too.
        if project is not None and not list(distributions(name=name)):
            yield Problem(f"log.{name}", f"needs the package {name}; pip install 'or1[{name}]', or omit the setting")


_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    paths_usable,
    files_exist,
    reward_file_exists,
    _reward_parts_have_names,
    _think_close_is_looked_for,
    nothing_to_execute,
    positions_reach,
    _one_fuses,
    _heartbeat_is_shorter,
    _stages_fit,
    _temperatures_sound,
    _betas_valid,
    _weights_are_16_bit,
    _eval_names_unique,
    engine_fits,
    staleness_sound,
    _magic_variants_sound,
    _tuning_sound,
    environment_alone,
    _trackers_installed,
    adapters_fit,
)
# Rules about settings that a stage may override: they look at one stage at a time.
_STAGE_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _entropy_bounds,
    sampled_from_all_tokens,
    importance_weights_sound,
    mismatch_sound,
    objective_sound,
    vllm_samples,
    *VLLM_RULES,
)
_NEEDS: dict[Verb, tuple[Callable[[Config], Iterator[Problem]], ...]] = {
    "train": (_stages_given, _data_given, training_files, _difficulty_given, _no_endpoint),
    "filter": (no_environment, _data_given, training_files, _limit_given("filter")),
    "judge": (no_environment, _data_given, training_files, _judges_given, _prompt_given),
    "eval": (no_environment, _sets_given, _limit_given("eval")),
}
