"""What a generation engine is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from or1.core.seeds import seed_of
from or1.core.types import Prompt, Response

if TYPE_CHECKING:
    from torch import Tensor

Weights = Callable[[], "Iterable[tuple[str, Tensor]]"]
"""Gives the trainer's present weights under their Hugging Face names, one tensor at a time."""


@dataclass(frozen=True)
class Sampling:
    """How to sample: `temperature` 0 is greedy; `seed` makes the result a function of weights, prompts and seed.

    max_tokens   limit of a whole response, the part it was begun with included
    new_tokens   limit of what one call adds to a response; None: no such limit
    deadline_s   seconds after the start of the call at which unfinished responses are aborted; None: never
    top_p, top_k restrict sampling to the likeliest tokens; 1 and 0 do not
    numbers      what each prompt of the call counts as for its random numbers; None: its position. A rank that samples
                 prompts 1, 3, 5 of a step names them so, and gets what one process gets for the whole step
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

    def slot_seed(self, prompt: int, sample: int) -> int:
        """The seed of one response: `sample` of the `prompt`-th prompt of the call."""
        number = prompt if self.numbers is None else self.numbers[prompt]
        return seed_of(self.seed, number, sample)


class Finished(NamedTuple):
    """One response: to which prompt of the call, the how-manieth sample of it, and what it is."""

    prompt: int
    sample: int
    response: Response


Slot = tuple[int, int]
"""Prompt of the call and sample of that prompt."""


class Engine(Protocol):
    """Generates responses with the weights of one policy version. Made by `or1.rollout.make_engine`."""

    version: int

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, begun: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield responses once each, as they finish, in any order.

        `begun` names the slots to fill, with the response that each goes on from; None there starts anew. Without
        `begun` all len(prompts) * samples slots are filled.

        Raises EngineError if the engine died and could not be brought back, or holds no whole set of weights.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Generate with the trainer's present weights from now on, stamping responses with `version`.

        Raises EngineError if that fails; the version stays what it was and nothing is generated until a later call
        succeeds.
        """
        ...

    def release(self) -> None:
        """Free the memory that only generation needs; `update_weights` takes it back."""
        ...

    def close(self) -> None:
        """End what the engine started. May be called twice."""
        ...


class Job(NamedTuple):
    """One slot to fill: the tokens to go on from, how many may be added, and a seed of its own."""

    slot: Slot
    prompt_ids: np.ndarray
    begun: Response | None
    max_new: int
    seed: int

    @property
    def context_ids(self) -> np.ndarray:
        """Prompt and what the response has so far."""
        return self.prompt_ids if self.begun is None else np.concatenate([self.prompt_ids, self.begun.token_ids])


def jobs_of(
    prompts: Sequence[Prompt], sampling: Sampling, begun: Mapping[Slot, Response | None] | None
) -> Iterator[Job]:
    """The slots of a call, in order. A job's seed depends on the call's and on its slot, not on its neighbours."""
    everything = ((p, s) for p in range(len(prompts)) for s in range(sampling.samples))
    slots = dict.fromkeys(everything) if begun is None else begun
    for (p, s), response in slots.items():
        room = sampling.max_tokens - (0 if response is None else len(response.token_ids))
        limit = room if sampling.new_tokens is None else min(room, sampling.new_tokens)
        yield Job((p, s), prompts[p].token_ids, response, limit, sampling.slot_seed(p, s))


def continued(job: Job, token_ids: np.ndarray, logp: np.ndarray, finish: str, version: int) -> Response:
    """The response of a job from the tokens that were added, without its text.

    token_ids i32[N], logp f32[N]: the added part. Each token keeps the version that sampled it.
    """
    if job.begun is None:
        return Response(token_ids, logp, finish, version, "")
    versions = np.concatenate([job.begun.token_versions, np.full(len(token_ids), version, np.int32)])
    whole = (np.concatenate([job.begun.token_ids, token_ids]), np.concatenate([job.begun.logp, logp]))
    last = version if len(token_ids) else job.begun.version
    return Response(*whole, finish, last, "", None if (versions == last).all() else versions)
