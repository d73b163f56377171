"""Rules about the engine: what it may sample, how stale its samples may be, and the weights that they need."""

from __future__ import annotations

from collections.abc import Iterator

from or1.config import Config
from or1.config.loss_rules import weights_given
from or1.core.errors import Problem

_VLLM_HOTTEST = 2.0


def importance_weights_sound(config: Config) -> Iterator[Problem]:
    """Find samples of older policies without importance weights, and weights that are not available."""
    rollout, loss = config.rollout, config.loss
    if not loss.weighs_engine:
        stale = {name: getattr(rollout, name) for name in ("partial_tokens", "overlap", "max_staleness")}
        for name, value in stale.items():
            if value:
                yield Problem(
                    f"rollout.{name}",
                    f"{str(value).lower()} trains on tokens of older policies, which "
                    "needs importance weights; set loss.is_cap, for example to 2.0, or remove this",
                )
    given = weights_given(config.loss)
    if not given:
        return
    for name, setting, off in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, 0)):
        if setting != off:
            yield Problem(
                f"rollout.{name}",
                f"{setting} together with {given[0]} = {given[1]}: tokens are sampled "
                "from a truncated distribution, whose probabilities are those of the whole one divided by "
                "the mass that survives, so every importance weight would be multiplied by that mass; set "
                f"{name} = {off}, or remove {given[0]}",
            )
    if loss.old_logp == "rollout":
        yield Problem(
            given[0],
            f'{given[1]} has no effect with loss.old_logp = "rollout", where the ratio '
            f'itself compares with the engine; set old_logp = "auto", or remove {given[0].rpartition(".")[2]}',
        )


def sampled_from_all_tokens(config: Config) -> Iterator[Problem]:
    """Find settings that use the engine's log-probs as the policy's, which truncated sampling makes wrong."""
    rollout, loss = config.rollout, config.loss
    for name, value, off in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, 0)):
        if value == off:
            continue
        # transformers' generate reports log-probs among all tokens, so its ratio is correct.
        if loss.old_logp == "rollout" and rollout.engine != "hf":
            yield Problem(
                f"rollout.{name}",
                f'{value} together with loss.old_logp = "rollout": vLLM reports log-probs '
                "among the tokens that survive, so every ratio would be multiplied by the mass that "
                f'survives and start outside 1; set {name} = {off}, or loss.old_logp = "auto", or '
                'rollout.engine = "hf"',
            )
        if loss.entropy.control == "adaptive":
            yield Problem(
                f"rollout.{name}",
                f'{value} together with loss.entropy.control = "adaptive": the controller '
                "estimates the policy's entropy from the sampled tokens, which is biased for tokens of a truncated "
                f'distribution, so the target would not be held; set {name} = {off}, or control = "constant" or "none"',
            )


def _shown_urls(urls: tuple[str, ...]) -> str:
    return repr(urls[0]) if len(urls) == 1 else repr(list(urls))


def engine_fits(config: Config) -> Iterator[Problem]:
    """Find settings that the engine does not have."""
    rollout, vllm = config.rollout, config.rollout.vllm
    if vllm.url is not None and vllm.placement != "server":
        yield Problem(
            "rollout.vllm.url",
            f"{_shown_urls(vllm.url)} has no effect with placement = "
            f'"{vllm.placement}"; set placement = "server", or remove url',
        )
    if vllm.url is not None and len(set(vllm.url)) < len(vllm.url):
        yield Problem("rollout.vllm.url", f"{_shown_urls(vllm.url)} names a server twice; name each once")
    if rollout.partial_tokens is not None and len({stage.group_size for stage in config.stage}) > 1:
        yield Problem(
            "rollout.partial_tokens",
            f"{rollout.partial_tokens} carries groups from one stage into the "
            "next, so all stages need the same group_size",
        )
    sampled = [config.in_stage(i).rollout for i in range(len(config.stage))]
    if rollout.partial_tokens is not None and len({(each.temperature, each.top_p) for each in sampled}) > 1:
        yield Problem(
            "rollout.partial_tokens",
            f"{rollout.partial_tokens} carries responses from one stage into the "
            "next, so all stages need the same temperature and top_p",
        )


def staleness_sound(config: Config) -> Iterator[Problem]:
    """Find staleness that the engine or other settings do not allow."""
    rollout, k = config.rollout, config.rollout.max_staleness
    name, value = ("overlap", "true") if rollout.overlap else ("max_staleness", str(k))
    if rollout.steps_ahead and rollout.engine != "vllm":
        yield Problem(
            f"rollout.{name}",
            f"{value} needs an engine with weights of its own, but rollout.engine = "
            f'"{rollout.engine}"; set it to "vllm"',
        )
    if k < 2:
        return
    if rollout.overlap:
        yield Problem("rollout.overlap", f"true is max_staleness = 1, but max_staleness = {k}; remove one of them")
    if rollout.vllm.placement != "server":
        yield Problem(
            "rollout.max_staleness",
            f"{k} lets the engine generate at all times, also while weights are pushed; a colocated vLLM works in "
            'turns with the trainer. Set rollout.vllm.placement = "server", or max_staleness = 1',
        )
    if rollout.partial_tokens is not None:
        yield Problem(
            "rollout.partial_tokens",
            f"{rollout.partial_tokens} carries responses from step to step beyond max_staleness = {k}, under which "
            "responses continue across pushes anyway; remove one of them",
        )
    if config.deterministic:
        yield Problem(
            "rollout.max_staleness",
            f"{k} pushes weights while the engine generates, so the tokens depend on time, and deterministic = true "
            "wants equal bits from equal settings; set max_staleness = 1, or deterministic = false",
        )


def vllm_samples(config: Config) -> Iterator[Problem]:
    """Refuse temperatures that vLLM refuses; a run would fail only in its first rollout."""
    if config.rollout.engine != "vllm" or config.endpoint.url is not None:
        return
    named = [("rollout.temperature", config.rollout.temperature), ("filter.temperature", config.filter.temperature)]
    named += [(f"eval.sets.{i}.temperature", each.temperature) for i, each in enumerate(config.eval.sets)]
    for where, temperature in named:
        if temperature > _VLLM_HOTTEST:
            yield Problem(
                where,
                f"{temperature:g} is above {_VLLM_HOTTEST:g}, the highest that vLLM samples at; lower "
                'it, or set rollout.engine = "hf"',
            )
