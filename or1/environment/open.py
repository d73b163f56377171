"""`open_environment`: the environment of `[environment]`, ready for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from or1.core.errors import EngineError
from or1.dist.world import SINGLE, World
from or1.environment.engine import EnvironmentEngine, EpisodeScorer

if TYPE_CHECKING:
    import verifiers.v1 as vf

    from or1.config import Config
    from or1.data.problems import Problems
    from or1.environment.host import Host
    from or1.rollout.engine import Engine


def problems_of_run(config: Config, tokenizer: Any) -> Problems:
    """Return the tasks of `[environment]`, or else the problems of `[data]`. The environment is closed again."""
    from or1.data.problems import load_problems

    if not config.environment.id:
        return load_problems(config, tokenizer)
    with open_environment(config) as environment:
        return environment.problems


class Environment:
    """An environment in its thread. `problems` are its tasks as prompts, `scorer` has the rewards of its episodes."""

    def __init__(self, config: Config, host: Host, problems: Problems, tasks: dict[str, vf.Task], stops: set[int]):
        self.problems, self.scorer = problems, EpisodeScorer()
        self._timeout_s, self._host, self._tasks, self._stops = config.environment.timeout_s, host, tasks, stops

    def engine(self, engine: Engine, tokenizer: Any, eos_ids: list[int]) -> Engine:
        """Return an engine that plays episodes with `engine`.

        eos_ids  the tokens at which `engine` ends a response

        Raises EngineError if no token ends a turn for the engine and for the renderer.
        """
        if not self._stops & set(eos_ids):
            raise EngineError(
                f"the renderer ends a turn at tokens {sorted(self._stops)}, the engine at {sorted(eos_ids)}; set "
                "eos_token_id in the model's generation_config.json, or choose another environment.renderer"
            )
        episodes = EnvironmentEngine(engine, self._host, self._tasks, tokenizer, self._timeout_s, self.scorer)
        # Its version is the engine's and cannot be set, while the protocol has a plain attribute.
        return cast("Engine", episodes)


@contextmanager
def open_environment(config: Config, world: World = SINGLE) -> Iterator[Environment]:
    """Load and start the environment, and play its first task once without the model, which shows its tools.

    Raises EngineError if verifiers is missing or cannot load the environment, DataError for tasks that cannot be used.
    """
    if world.size > 1:
        raise EngineError(
            f"environment.id: {world.size} ranks would make different numbers of requests to engines whose calls are "
            "collective; train on an environment with one process"
        )
    try:
        import verifiers.v1  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"environment.id needs the package verifiers ({error}); pip install 'or1[verifiers]'"
        ) from error
    from or1.environment import chat
    from or1.environment.host import Host, made
    from or1.environment.tasks import make_renderer, problems_of, taskset_id, tools_of

    settings, model = config.environment, config.model.path
    chat.register()
    taskset = {**settings.args.get("taskset", {}), "id": taskset_id(settings.id)}
    env = made({**settings.args, "taskset": taskset}, chat.HARNESS)
    first = next(iter(env.taskset), None)
    host = Host(env, model, settings.renderer)
    try:
        tools = tools_of(host, first, settings.timeout_s) if first is not None else []
        problems, tasks = problems_of(config, env, tools)
        stops = set(make_renderer(model, settings.renderer).get_stop_token_ids())
        yield Environment(config, host, problems, tasks, stops)
    finally:
        host.close()
