"""Rules about contradictions between the settings of `[loss]`, and of `[loss]` with the division of work."""

from __future__ import annotations

from collections.abc import Iterator

from or1.config import Config, LossConfig
from or1.core.errors import Problem


def weights_given(loss: LossConfig) -> tuple[str, str] | None:
    """Return the setting that compares engine and trainer, and its value; None without one."""
    if loss.is_cap is not None:
        return "loss.is_cap", str(loss.is_cap)
    return None if loss.mismatch.kind == "none" else ("loss.mismatch.kind", f'"{loss.mismatch.kind}"')


def mismatch_sound(config: Config) -> Iterator[Problem]:
    """Find bounds that their kind does not have, and a second importance weight."""
    loss, mismatch = config.loss, config.loss.mismatch
    lower, upper, kind = mismatch.lower, mismatch.upper, mismatch.kind
    if kind == "none":
        for name, value in (("lower", lower), ("upper", upper)):
            if value is not None:
                yield Problem(
                    f"loss.mismatch.{name}", f'{value:g} has no effect with kind = "none"; set a kind, or remove it'
                )
        return
    if loss.is_cap is not None and kind != "geometric":
        yield Problem(
            "loss.mismatch.kind",
            f'"{kind}" is a second importance weight beside loss.is_cap = {loss.is_cap:g}; remove is_cap, or set '
            'kind = "geometric", a mask that acts beside it',
        )
    if kind == "mis" and lower is not None:
        yield Problem(
            "loss.mismatch.lower",
            f'{lower:g} is no part of kind = "mis", which drops weights above `upper` alone; remove it, or set '
            'kind = "icepop"',
        )


def objective_sound(config: Config) -> Iterator[Problem]:
    """Find settings of the objective and its baseline that contradict each other."""
    loss, ranks = config.loss, config.dist.sequence_parallel
    if loss.advantage == "rloo" and loss.advantage_std:
        yield Problem(
            "loss.advantage_std", 'true has no place in advantage = "rloo", which divides by nothing; remove it'
        )
    if loss.advantage == "reinforce_pp" and loss.refill_rounds:
        yield Problem(
            "loss.refill_rounds",
            f'{loss.refill_rounds} has no effect with advantage = "reinforce_pp", where groups of equal rewards have '
            "an advantage and are not rejected; set 0, or remove it",
        )
    if ranks > 1 and any(loss.sees_sequences(on_policy=stage.on_policy) for stage in config.stage):
        yield Problem(
            "loss.kind",
            f'"gspo" needs a whole response on one rank, but dist.sequence_parallel = {ranks} divides it; set '
            'sequence_parallel = 1, or kind = "ppo_clip", or train on-policy with old_logp = "auto"',
        )
