"""vLLM inside the trainer's process: one engine per rank, or one per group of ranks that share a model."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from or1.core import faults
from or1.core.errors import EngineError
from or1.core.pulse import pulse
from or1.core.types import Prompt, Response
from or1.model.export import named_weights
from or1.rollout.dealing import Dealt, Given, Window
from or1.rollout.engine import INTERRUPTED, Finished, Sampling, Slot, Supply, continued, decoded, jobs_of
from or1.rollout.vllm.adapter_push import AdapterPush
from or1.rollout.vllm.drafts import DraftCounts, counts_of
from or1.rollout.vllm.ranks import RankJob, Ranks
from or1.rollout.vllm.setup import STREAM_TOKENS, VllmSetup, vllm_environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Steps of vLLM between two looks at `Sampling.stop`, on which ranks that share a model have to agree.
_STOP_STEPS = 16


@dataclass
class _Request:
    """A request and what it has so far: tokens as C ints and log-probs as C floats, an eighth of a list's memory."""

    job: RankJob
    tokens: array[int] = field(default_factory=lambda: array("i"))
    logp: array[float] = field(default_factory=lambda: array("f"))


_Done = tuple[_Request, str]
"""A request and its finish reason."""


class LocalEngine:
    """vLLM as an `Engine`, with its own copy of the weights.

    On a GPU, vLLM sleeps while the trainer trains (`VllmSetup.sleep_level`). It wakes in two stages: allocate the
    weights, push, allocate the cache. So old weights, new weights and cache never exist together.
    """

    shares_weights = False
    continuous_batching = True

    def __init__(self, setup: VllmSetup, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.version = 0
        self._setup, self._model, self._tokenizer = setup, model, tokenizer
        self._ranks = Ranks.of(setup.tensor_parallel)
        self.batch_size, self.ranks_per_model = setup.batch_size, self._ranks.size
        self._call = itertools.count()
        # _complete is False from the start of a push until its end: vLLM may have part of the new weights.
        self._complete, self._asleep = True, False
        self._drafts = DraftCounts()
        self._adapter = AdapterPush(model) if setup.adapters else None
        self._llm: Any = _start(setup, self._ranks)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, slots: Mapping[Slot, Response | None] | None = None
    ) -> Iterator[Finished]:
        """Yield responses, as `Engine.generate`. Collective in a group of ranks that share a model."""
        yield from self.generate_from(Given(jobs_of(prompts, sampling, slots)), sampling)

    def generate_from(self, supply: Supply, sampling: Sampling) -> Iterator[Finished]:
        """Yield responses, as `TakingEngine.generate_from`. Collective in a group of ranks that share a model."""
        if not self._complete or self._asleep:
            raise EngineError(
                f"vLLM has no complete set of weights (the push after version {self.version} failed or has not "
                "happened yet); call update_weights first"
            )
        adapter = self._adapter.request if self._adapter else None
        requests = _Requests(
            self._llm.llm_engine, self._setup, sampling, f"{next(self._call)}", self._window(supply), adapter
        )
        deadline = None if sampling.deadline_s is None else time.monotonic() + sampling.deadline_s
        steps = itertools.count(1)
        try:
            while requests.fill(supply, self._ranks):
                yield from self._finished(requests.step())
                # Ranks that share a model must abort at the same step, so the first rank's clock decides.
                if deadline is not None and self._ranks.agree(time.monotonic() > deadline):
                    yield from self._finished(requests.abort("deadline"))
                    while late := self._ranks.take(supply, self.batch_size):
                        yield from self._finished([(_Request(job), "deadline") for job in late])
                elif next(steps) % _STOP_STEPS == 0 and self._ranks.agree(sampling.stop()):
                    yield from self._finished(requests.abort(INTERRUPTED))
                    return
        finally:
            requests.abort(INTERRUPTED)

    def _window(self, supply: Supply) -> Window:
        if not isinstance(supply, Dealt):
            return Window(self.batch_size, shared=False)
        cache = self._llm.llm_engine.vllm_config.cache_config
        tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        return Window(self.batch_size, shared=True, cache_tokens=tokens, typical=supply.typical)

    def _finished(self, done: list[_Done]) -> Iterator[Finished]:
        for request, finish in done:
            job, own = request.job
            if not own:
                continue
            added = (np.array(request.tokens, np.int32), np.array(request.logp, np.float32))
            yield decoded(job, continued(job, *added, finish, self.version), self._tokenizer)

    def update_weights(self, version: int) -> None:
        """Copy the weights, as `Engine.update_weights`. Collective if the model is sharded or shared."""
        self._complete = False
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        if faults.hit("push.weights") != "skip":
            self._push(version)
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        # The prefix cache was computed with the old weights.
        if faults.hit("push.cache") != "skip" and not self._llm.reset_prefix_cache():
            raise EngineError(
                "vLLM did not drop its prefix cache, so results of old weights would be used; requests of an "
                "earlier generate() are still open: exhaust or close its iterator before update_weights"
            )
        self.version, self._complete = version, True

    def _push(self, version: int) -> None:
        if self._adapter is not None:
            self._adapter.send(self._llm.llm_engine, version)
            return
        # Cloned: vLLM may keep a tensor until its layer is complete, and the trainer updates its tensors in place.
        copies = ((name, tensor.clone()) for name, tensor in named_weights(self._model))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": copies})

    def release(self) -> None:
        """Sleep until the next push, if `VllmSetup.sleeps`."""
        if self._setup.sleeps and not self._asleep:
            # Base weights that no push brings back move to host memory; others are dropped.
            self._llm.sleep(level=self._setup.sleep_level if self._adapter is None else 1)
            self._asleep = True

    def take_drafts(self) -> DraftCounts:
        """Return the counts of speculative decoding since the last call."""
        if self._setup.drafts is None:
            return DraftCounts()
        before, self._drafts = self._drafts, counts_of(self._llm.get_metrics())
        return self._drafts.since(before)

    def close(self) -> None:
        """Shut vLLM down and free its memory. Idempotent."""
        if self._adapter is not None:
            self._adapter.close()
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


class _Requests:
    """Requests of one call of `generate`, and the tokens and log-probs of each so far.

    adapter  the LoRARequest to sample with; None: the plain weights
    """

    def __init__(
        self, engine: Any, setup: VllmSetup, sampling: Sampling, prefix: str, window: Window, adapter: Any = None
    ):
        self._engine, self._setup, self._sampling, self._prefix = engine, setup, sampling, prefix
        self._window, self._number, self._more, self._adapter = window, itertools.count(), True, adapter
        self.open: dict[str, _Request] = {}

    def fill(self, supply: Supply, ranks: Ranks) -> bool:
        """Submit jobs while vLLM has room; return False if no request is open and no job is left."""
        # Equal on ranks that share a model: they see the same requests in the same state.
        waiting = sum(not each.tokens for each in self.open.values())
        held = sum(self._held(supply, each.job) for each in self.open.values())
        while self._more and (room := self._window.room(len(self.open), waiting, held)):
            jobs = ranks.take(supply, room)
            self._more = bool(jobs)
            self.add(jobs)
            waiting += len(jobs)
            held += sum(self._held(supply, each) for each in jobs)
        return bool(self.open)

    def _held(self, supply: Supply, each: RankJob) -> float:
        return supply.context(each.job) if isinstance(supply, Dealt) else 0.0

    def add(self, jobs: Sequence[RankJob]) -> None:
        """Submit jobs; vLLM schedules them."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for rank_job in jobs:
            job = rank_job.job
            name = f"{self._prefix}-{next(self._number)}"
            parameters = SamplingParams(
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                stream_interval=STREAM_TOKENS,
                # Lists of numbers instead of a dict and an object for every token: less memory, no garbage collection.
                flat_logprobs=True,
                **self._setup.sampling_options(job, self._sampling),
            )
            prompt = {"prompt_token_ids": job.context_ids.tolist()}
            self._engine.add_request(name, prompt, parameters, lora_request=self._adapter)
            self.open[name] = _Request(rank_job)

    def step(self) -> list[_Done]:
        """Run one iteration of vLLM; return the requests that finished in this iteration."""
        done: list[_Done] = []
        pulse()
        # Even if every request has a seed, vLLM's sampler draws from torch's default generator, which the trainer uses.
        with torch.random.fork_rng(devices=[]):
            outputs = self._engine.step()
        for output in outputs:
            request, part = self.open[output.request_id], output.outputs[0]
            request.tokens.extend(part.token_ids)
            request.logp.extend(flat_logp(part))
            if output.finished:
                del self.open[output.request_id]
                done.append((request, part.finish_reason))
        return done

    def abort(self, finish: str) -> list[_Done]:
        """Abort the open requests; return them with the tokens generated so far and this finish reason."""
        if self.open:
            self._engine.abort_request(list(self.open))
        done: list[_Done] = [(request, finish) for request in self.open.values()]
        self.open.clear()
        return done


def flat_logp(part: Any) -> list[float]:
    """Return the log-probs of the tokens of a `CompletionOutput` with flat log-probs.

    Raises EngineError unless there is one for each token, that of the token itself.
    """
    flat, count = part.logprobs, len(part.token_ids)
    if count == 0:
        return []
    if flat is None or flat.token_ids != list(part.token_ids) or len(flat.logprobs) != count:
        held = 0 if flat is None else len(flat.logprobs)
        raise EngineError(f"vLLM reports {held} log-probs for {count} tokens, or those of other tokens")
    found: list[float] = flat.logprobs
    return found


def _start(setup: VllmSetup, ranks: Ranks) -> Any:
    os.environ.update(vllm_environment(setup.on_gpu) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    options = setup.engine_options() | {"enable_sleep_mode": setup.sleeps}
    options |= ranks.engine_options()
    # No progress bar while vLLM reads the checkpoint.
    options |= {"use_tqdm_on_load": False}
    from vllm import LLM

    set_threads = torch.set_num_threads
    try:
        with _random_state_kept():
            return LLM(**options)
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            f"vLLM does not start ({type(error).__name__}: {error}); see vLLM's own messages above. "
            'Lower rollout.vllm.gpu_memory if memory is short, or set rollout.engine = "hf"'
        ) from error
    finally:
        # vLLM's CPU worker replaces this function of torch by a no-op for the whole process.
        torch.set_num_threads = set_threads


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the process's random number generators on exit; vLLM seeds them, and the trainer uses them."""
    python, state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(state)
