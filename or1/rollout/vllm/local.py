"""vLLM inside the trainer's process: one engine per rank, or one per group of ranks that share a copy of the model."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from or1.core import faults
from or1.core.errors import EngineError
from or1.core.types import Prompt, Response
from or1.model.export import named_weights
from or1.rollout.engine import Finished, Job, Sampling, Slot, continued, jobs_of
from or1.rollout.vllm.ranks import Ranks
from or1.rollout.vllm.setup import STREAM_TOKENS, VllmSetup, vllm_environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalEngine:
    """vLLM as an `Engine`, with its own copy of the weights beside the trainer's.

    On a GPU it sleeps while the trainer trains (level 2: weights and cache are dropped) and wakes in two stages: room
    for the weights, the push, then room for the cache; so never old weights, new weights and the cache at once.
    """

    def __init__(self, setup: VllmSetup, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.version = 0
        self._setup, self._model, self._tokenizer = setup, model, tokenizer
        self._ranks = Ranks.of(setup.tensor_parallel)
        self._call = itertools.count()
        self._whole, self._asleep = True, False
        self._llm: Any = _start(setup, self._ranks)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, begun: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """See `Engine.generate`."""
        if not self._whole or self._asleep:
            raise EngineError(
                f"vLLM holds no whole set of weights (the push after version {self.version} failed or is "
                "still to come); call update_weights first"
            )
        jobs = self._ranks.share(list(jobs_of(prompts, sampling, begun)))
        requests = _Requests(self._llm.llm_engine, self._setup, sampling, f"{next(self._call)}")
        requests.add(jobs)
        deadline = None if sampling.deadline_s is None else time.monotonic() + sampling.deadline_s
        try:
            while requests.open:
                yield from self._finished(requests.step())
                # Ranks that share a model must step alike, so one of them decides for all.
                if deadline is not None and self._ranks.agree(time.monotonic() > deadline):
                    yield from self._finished(requests.abort())
        finally:
            requests.abort()

    def _finished(self, done: list[tuple[Job, list[int], list[float], str]]) -> Iterator[Finished]:
        for job, tokens, logp, finish in done:
            if not self._ranks.owns(job):
                continue
            added = (np.array(tokens, np.int32), np.array(logp, np.float32))
            response = continued(job, *added, finish, self.version)
            text = self._tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
            yield Finished(*job.slot, replace(response, text=text))

    def update_weights(self, version: int) -> None:
        """See `Engine.update_weights`. An exception on the way leaves the engine unusable until the next push."""
        self._whole = False
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        # vLLM may keep a tensor until its layer is complete, and the trainer updates its own in place.
        copies = ((name, tensor.clone()) for name, tensor in named_weights(self._model))
        if faults.hit("push.weights") != "skip":
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": copies})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        # What the cache holds was computed with the old weights.
        if faults.hit("push.cache") != "skip" and not self._llm.reset_prefix_cache():
            raise EngineError(
                "vLLM did not drop its prefix cache, so that old weights would speak on; requests of an "
                "earlier generate() are still open: exhaust or close it before update_weights"
            )
        self.version, self._whole = version, True

    def release(self) -> None:
        """Sleep until the next push, if this engine was made to."""
        if self._setup.sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def close(self) -> None:
        """Shut vLLM down and free its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


class _Requests:
    """The requests of one call to vLLM's engine, and what each has so far."""

    def __init__(self, engine: Any, setup: VllmSetup, sampling: Sampling, prefix: str):
        self._engine, self._setup, self._sampling, self._prefix = engine, setup, sampling, prefix
        self.open: dict[str, tuple[Job, list[int], list[float]]] = {}

    def add(self, jobs: Sequence[Job]) -> None:
        """Queue them all; vLLM schedules as many together as it may."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for number, job in enumerate(jobs):
            name = f"{self._prefix}-{number}"
            parameters = SamplingParams(
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                stream_interval=STREAM_TOKENS,
                **self._setup.sampling_options(job, self._sampling),
            )
            self._engine.add_request(name, {"prompt_token_ids": job.context_ids.tolist()}, parameters)
            self.open[name] = job, [], []

    def step(self) -> list[tuple[Job, list[int], list[float], str]]:
        """One iteration of the engine; returns what finished in it."""
        done = []
        # Even where every request has a seed, vLLM's sampler draws from the generator that is the trainer's too.
        with torch.random.fork_rng(devices=[]):
            outputs = self._engine.step()
        for output in outputs:
            job, tokens, logp = self.open[output.request_id]
            part = output.outputs[0]
            tokens += part.token_ids
            logp += [entry[token].logprob for token, entry in zip(part.token_ids, part.logprobs or (), strict=True)]
            if output.finished:
                del self.open[output.request_id]
                done.append((job, tokens, logp, part.finish_reason))
        return done

    def abort(self) -> list[tuple[Job, list[int], list[float], str]]:
        """End the open requests; returns what they have."""
        if self.open:
            self._engine.abort_request(list(self.open))
        done = [(job, tokens, logp, "deadline") for job, tokens, logp in self.open.values()]
        self.open.clear()
        return done


def _start(setup: VllmSetup, ranks: Ranks) -> Any:
    os.environ.update(vllm_environment(setup.on_gpu) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    options = setup.engine_options() | {"enable_sleep_mode": setup.sleeps, "disable_log_stats": True}
    options |= ranks.engine_options()
    # Reading the checkpoint shows a progress bar of its own.
    options |= {"use_tqdm_on_load": False}
    from vllm import LLM

    set_threads = torch.set_num_threads
    try:
        with _random_state_kept():
            return LLM(**options)
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            f"vLLM does not start ({type(error).__name__}: {error}); its own message stands above. "
            'Lower rollout.vllm.gpu_memory if memory is short, or set rollout.engine = "hf"'
        ) from error
    finally:
        # vLLM's CPU worker replaces it by a function that does nothing, for everybody.
        torch.set_num_threads = set_threads


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """In one process with the trainer, vLLM seeds the trainer's generators too."""
    import random

    python, state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(state)
