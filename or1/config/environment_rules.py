"""Rules about `[environment]`, which replaces data and rewards."""

from __future__ import annotations

from collections.abc import Iterator

from or1.config import Config
from or1.core.errors import Problem


def no_environment(config: Config) -> Iterator[Problem]:
    """Refuse an environment for a command that does not play one."""
    if config.environment.id:
        yield Problem("environment.id", "only `or1 train` plays environments; remove the section, and name files")


def environment_alone(config: Config) -> Iterator[Problem]:
    """Refuse settings that have no effect with an environment, or that episodes do not have."""
    environment = config.environment
    if not environment.id:
        for name in ("args", "renderer"):
            if getattr(environment, name):
                yield Problem(f"environment.{name}", "has no effect without environment.id; set it, or remove this")
        return
    taskset = environment.args.get("taskset", {})
    if not isinstance(taskset, dict) or "id" in taskset:
        yield Problem("environment.args", "taskset must be a table without id; environment.id names the taskset")
    no_rows = "the tasks of an environment are not rows of a file"
    no_score = "the environment gives the rewards"
    no_later = "an episode cannot be continued or saved in the middle"
    for where, is_set, why in (
        ("data.train", bool(config.data.train), no_rows),
        ("data.mix", bool(config.data.mix), no_rows),
        ("data.keep_difficulty", config.data.keep_difficulty is not None, no_rows),
        ("data.columns", config.data.columns.names_problems, no_rows),
        ("data.system_prompt", bool(config.data.system_prompt), no_rows),
        ("data.prompt_suffix", bool(config.data.prompt_suffix), no_rows),
        ("data.chat_template", bool(config.data.chat_template), "environment.renderer has these settings"),
        ("eval.sets", bool(config.eval.sets), "a file of problems has no environment"),
        ("reward.kind", config.reward.kind != "auto", no_score),
        ("reward.parts", bool(config.reward.parts), no_score),
        ("reward.require_think_close", config.reward.require_think_close, no_score),
        ("reward.grade_truncated", config.reward.grade_truncated is not None, no_score),
        ("rollout.partial_tokens", config.rollout.partial_tokens is not None, no_later),
        ("rollout.overlap", config.rollout.overlap, no_later),
        ("rollout.max_staleness", config.rollout.max_staleness > 0, no_later),
    ):
        if is_set:
            yield Problem(where, f"cannot be combined with environment.id: {why}; remove it")
