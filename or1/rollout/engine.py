"""The interface of a generation engine, and the work items that all engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from or1.core.seeds import seed_of
from or1.core.types import Prompt, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


INTERRUPTED = "interrupted"
"""Finish reason of a response that a stopped call did not complete; a later call continues the response."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one call of `Engine.generate`.

    temperature  0 is greedy
    max_tokens   limit of a whole response, including tokens of earlier calls
    samples      responses per prompt
    seed         the result is a function of weights, prompts and seed
    new_tokens   limit of the tokens that one call adds to a response; None: no limit
    deadline_s   seconds after the start of the call at which unfinished responses are aborted; None: never
    top_p, top_k restrict sampling to the likeliest tokens; 1 and 0 turn them off
    numbers      index of each prompt of the call for its random numbers; None: its position in the call. A rank that
                 samples prompts 1, 3, 5 of a step passes (1, 3, 5) and gets the responses of a single process
    stop         returns True once the call is to end early. The engine asks between tokens. Then the engine yields
                 every remaining response with the finish reason INTERRUPTED and its tokens so far, or leaves it out
    """

    temperature: float
    max_tokens: int
    samples: int
    seed: int
    new_tokens: int | None = None
    deadline_s: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    numbers: tuple[int, ...] | None = None
    stop: Callable[[], bool] = field(default=bool, compare=False)

    def slot_seed(self, prompt: int, sample: int) -> int:
        """Return the seed of one response: sample number `sample` of prompt number `prompt` of the call."""
        number = prompt if self.numbers is None else self.numbers[prompt]
        return seed_of(self.seed, number, sample)


class Finished(NamedTuple):
    """One finished response.

    prompt    index of the prompt in the call
    sample    index of this sample among the prompt's samples
    """

    prompt: int
    sample: int
    response: Response


Slot = tuple[int, int]
"""Index of a prompt in the call, and index of a sample among that prompt's samples."""


class Engine(Protocol):
    """A generator of responses from the weights of one policy version. Made by `or1.rollout.make_engine`."""

    version: int
    """Policy version of the weights, which every response records."""
    shares_weights: bool
    """True if the engine samples from the trainer's own tensors, so a push copies nothing and cannot go wrong."""
    continuous_batching: bool
    """True if a finished response is replaced at once; False if a batch lasts until its longest response."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield every response once, as it finishes, in any order.

        slots  the slots to fill, each with the unfinished response to continue, or None for a new response.
               Without `slots`, all len(prompts) * sampling.samples slots are filled with new responses

        Raises EngineError if the engine died and could not be restarted, or has no complete set of weights.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Load the trainer's current weights; responses of later calls carry `version`.

        Raises EngineError on failure: `version` is unchanged, and `generate` raises until a later call succeeds.
        """
        ...

    def release(self) -> None:
        """Free the memory that only generation needs, until the next `update_weights`."""
        ...

    def close(self) -> None:
        """Stop every process that the engine started. Idempotent."""
        ...


class Supply(Protocol):
    """The jobs of a call, which an engine takes as it has room."""

    def take(self, room: int) -> list[Job]:
        """Return the next jobs, about `room` of them at most; an empty list if there are no more."""
        ...


@runtime_checkable
class TakingEngine(Protocol):
    """An engine that takes jobs as it has room, so that ranks can share the jobs of a rollout. Optional.

    batch_size       most responses generated together, the same on all ranks
    ranks_per_model  neighbouring ranks that share one model and take their jobs together
    """

    batch_size: int
    ranks_per_model: int

    def generate_from(self, supply: Supply, sampling: Sampling) -> Iterator[Finished]:
        """Take jobs until there are none, and yield every response once, as `Engine.generate`.

        After the deadline, take the remaining jobs too and yield them with the tokens so far, none for a new response.
        """
        ...


@runtime_checkable
class MeteredEngine(Protocol):
    """An engine with metrics of its own. Optional."""

    def metrics(self) -> dict[str, float]:
        """Return metrics by name, for the record of the step; called after each push."""
        ...


class Job(NamedTuple):
    """One slot to fill.

    prompt_ids  i32[Lp]
    unfinished  the response to continue; None: a new response
    max_new     most tokens that the call may add
    seed        seed of this slot's random numbers
    """

    slot: Slot
    prompt_ids: np.ndarray
    unfinished: Response | None
    max_new: int
    seed: int

    @property
    def context_ids(self) -> np.ndarray:
        """Prompt and the tokens of the unfinished response, i32[L]."""
        if self.unfinished is None:
            return self.prompt_ids
        return np.concatenate([self.prompt_ids, self.unfinished.token_ids])


def jobs_of(
    prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None
) -> Iterator[Job]:
    """Yield the jobs of a call of `Engine.generate`, in order. A seed depends on the call's seed and the slot only."""
    if slots is None:
        slots = dict.fromkeys((p, s) for p in range(len(prompts)) for s in range(sampling.samples))
    for (p, s), response in slots.items():
        room = sampling.max_tokens - (0 if response is None else len(response.token_ids))
        limit = room if sampling.new_tokens is None else min(room, sampling.new_tokens)
        yield Job(
            slot=(p, s),
            prompt_ids=prompts[p].token_ids,
            unfinished=response,
            max_new=limit,
            seed=sampling.slot_seed(p, s),
        )


def decoded(job: Job, response: Response, tokenizer: PreTrainedTokenizerBase) -> Finished:
    """Return the finished response of a job, with its text."""
    # Declared as str or list[str], but one sequence gives a str.
    text: Any = tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
    return Finished(*job.slot, replace(response, text=text))


def continued(job: Job, token_ids: np.ndarray, logp: np.ndarray, finish: str, version: int) -> Response:
    """Return the response of a job, without its text: the unfinished part, then the added tokens.

    token_ids  i32[N], the added tokens
    logp       f32[N], their log-probabilities, nats
    finish     as `Response.finish`
    version    policy version of the added tokens; tokens of earlier calls keep theirs
    """
    before = job.unfinished
    if before is None:
        return Response(token_ids=token_ids, logp=logp, finish=finish, version=version, text="")
    versions = np.concatenate([before.token_versions, np.full(len(token_ids), version, np.int32)])
    last = version if len(token_ids) else before.version
    return Response(
        token_ids=np.concatenate([before.token_ids, token_ids]),
        logp=np.concatenate([before.logp, logp]),
        finish=finish,
        version=last,
        text="",
        versions=None if (versions == last).all() else versions,
    )
