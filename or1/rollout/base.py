"""What a generation engine is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from or1.types import Prompt, Response


@dataclass(frozen=True)
class Sampling:
    """How to sample: `temperature` 0 is greedy; `seed` makes the result a function of weights, prompts and seed.

    numbers   what each prompt of the call counts as for its random numbers; None: its position. A rank that samples
              prompts 1, 3, 5 of a step names them so, and gets what one process gets for the whole step
    top_p     sample from the likeliest tokens that hold this much probability; 1 is all of them
    """

    temperature: float
    max_tokens: int
    samples: int
    seed: int
    top_p: float = 1.0
    numbers: tuple[int, ...] | None = None

    def slot_seed(self, prompt: int, sample: int) -> int:
        """The seed of one response: `sample` of the `prompt`-th prompt of the call."""
        number = prompt if self.numbers is None else self.numbers[prompt]
        return int(np.random.SeedSequence([self.seed, number, sample]).generate_state(1, np.uint64)[0] >> 1)


class Finished(NamedTuple):
    """One response: to which prompt of the call, the how-manieth sample of it, and what it is."""

    prompt: int
    sample: int
    response: Response


class Engine(Protocol):
    """Generates responses with the weights of one policy version."""

    version: int

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Finished]:
        """Yield every one of len(prompts) * samples responses once, as they finish, in any order."""
        ...

    def update_weights(self, version: int) -> None:
        """Generate with the trainer's present weights from now on, stamping responses with `version`."""
        ...

    def close(self) -> None:
        """End what the engine started. May be called twice."""
        ...
