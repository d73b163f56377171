"""One GPU's engine in simulated time: continuous batching, a cache of limited size, steps that slow with the load.

Seconds of a decoding step come from `or1.plan.generation.Decoding`, for a 7B model on an H100. A step reads the weights
and the cache of every running response, at 80 % of 3,350 GB/s. If the products take longer, at 70 % of 989 TFLOP/s,
their time counts. No time here was measured on a GPU.
"""

# C tokens in the cache

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from functools import cache

import numpy as np

from or1.plan.devices import Device, find_device
from or1.plan.generation import Decoding
from or1.plan.shapes import parse_shape
from or1.rollout.dealing import Dealt, Window
from or1.rollout.engine import Job, Supply

BATCH_SIZE, PROMPT_TOKENS = 256, 200
GPU_MEMORY, OVERHEAD_BYTES = 0.5, 2.5e9
"""Share of the GPU that the engine reserves (the default), and what it holds beside weights and cache."""
_QWEN_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


@cache
def costs() -> tuple[Decoding, int]:
    """Return the costs of a step, and the tokens that the cache holds."""
    device: Device = find_device("h100", "cuda")[0]
    shape = parse_shape(_QWEN_7B, "Qwen2.5-Math-7B")
    per_layer = 2 * shape.hidden * (shape.q_width + shape.kv_width) + 3 * shape.hidden * shape.intermediate
    parameters = shape.layers * per_layer + shape.vocab * shape.hidden
    bandwidth = device.bandwidth * 1e9 * device.efficiency.memory
    weight_bytes, token_bytes = 2.0 * parameters, 2.0 * 2 * shape.layers * shape.kv_width
    decoding = Decoding(
        weights_s=weight_bytes / bandwidth,
        cache_token_s=token_bytes / bandwidth,
        token_s=2.0 * parameters / (device.tflops * 1e12 * device.efficiency.matmul),
        least_s=0.0,
    )
    room = GPU_MEMORY * device.memory - weight_bytes - OVERHEAD_BYTES
    return decoding, int(room / token_bytes)


def least_seconds(lengths: np.ndarray, ranks: int) -> float:
    """Return seconds that no order of the responses can beat: an even share of all work, or the longest response alone.

    lengths  int[...], tokens of each response

    A step reads the weights once, and all responses together need as many steps as fill the cache or the batch.
    """
    decoding, cache_tokens = costs()
    tokens = lengths.astype(np.float64)
    read = PROMPT_TOKENS * tokens + tokens**2 / 2
    steps = max(tokens.sum() / BATCH_SIZE, read.sum() / cache_tokens)
    prompts_s = PROMPT_TOKENS * decoding.token_s
    work_s = steps * decoding.weights_s + read.sum() * decoding.cache_token_s + lengths.size * prompts_s
    alone_s = tokens.max() * decoding.weights_s + read.max() * decoding.cache_token_s + prompts_s
    return max(float(work_s) / ranks, float(alone_s))


class Running:
    """A response in the engine. `left` and `context` are tokens at the moment of its start."""

    def __init__(self, job: Job, tokens: int):
        self.job, self.left, self.context = job, tokens, PROMPT_TOKENS
        self.since, self.end, self.runs = 0, 0, False


class SimulatedEngine:
    """The engine of one rank. `event` advances it to the next change of its batch.

    supply   hands out the jobs; the code under test
    lengths  tokens of a job's response
    speed    1 for the planned speed, 0.5 for half
    """

    def __init__(self, supply: Supply, lengths: Callable[[Job], int], *, speed: float = 1.0):
        self._decoding, self._cache = costs()
        self._supply, self._lengths, self._speed = supply, lengths, speed
        shared = isinstance(supply, Dealt)
        typical = supply.typical if isinstance(supply, Dealt) else 0.0
        self._window = Window(BATCH_SIZE, shared=shared, cache_tokens=self._cache, typical=typical)
        self._more, self._number, self._held = True, 0, 0.0
        self._waiting: deque[Running] = deque()
        # (tick at the end, order of the start, response); a tick is a token of every response. Preempted ones stay.
        self._ends: list[tuple[int, int, Running]] = []
        self._begun: list[Running] = []
        self._tick, self._used, self._count = 0, 0, 0
        self.now, self.ended, self.tokens, self.calls, self.preempted = 0.0, 0.0, 0, 0, 0

    def event(self) -> bool:
        """Take and start what there is room for, and run to the next event. Return False if all is done."""
        asked = self._ask()
        self._start()
        if not self._count:
            return asked
        while not self._ends[0][2].runs or self._ends[0][2].end != self._ends[0][0]:
            heapq.heappop(self._ends)
        ticks = self._ends[0][0] - self._tick
        if asked:
            ticks = min(ticks, 1)  # The engine asks again after its next step.
        free = self._cache - self._used
        if self._count * ticks > free:
            ticks = max(free // self._count, 1)
        self._advance(ticks)
        return True

    def _ask(self) -> bool:
        room = self._window.room(self._count + len(self._waiting), len(self._waiting), self._held)
        if not self._more or not room:
            return False
        self.calls += 1
        jobs = self._supply.take(room)
        self._more = bool(jobs)
        self._waiting.extend(Running(job, self._lengths(job)) for job in jobs)
        self._held += sum(self._context(job) for job in jobs)
        return bool(jobs)

    def _context(self, job: Job) -> float:
        return self._supply.context(job) if isinstance(self._supply, Dealt) else 0.0

    def _start(self) -> None:
        """Start waiting responses while their tokens fit, while every running one can still grow a little."""
        while self._waiting and self._count < BATCH_SIZE:
            first = self._waiting[0]
            if self._count and self._used + first.context + 16 * self._count > self._cache:
                return
            self._waiting.popleft()
            self._number += 1
            first.since, first.end, first.runs = self._tick, self._tick + first.left, True
            heapq.heappush(self._ends, (first.end, self._number, first))
            self._begun.append(first)
            self._used += first.context
            self._count += 1
            self._spend(first.context * self._decoding.token_s)

    def _advance(self, ticks: int) -> None:
        context = (self._used + self._count * ticks / 2) / self._count
        self._spend(ticks * self._decoding.step_seconds(self._count, context))
        self._tick += ticks
        self._used += self._count * ticks
        self.tokens += self._count * ticks
        while self._ends and self._ends[0][0] <= self._tick:
            end, _, done = heapq.heappop(self._ends)
            if done.runs and done.end == end:
                self._stop(done)
                self._held -= self._context(done.job)
                self.ended = self.now
        while self._used + self._count > self._cache and self._count > 1:
            self._preempt()

    def _stop(self, response: Running) -> None:
        response.runs = False
        self._used -= response.context + self._tick - response.since
        self._count -= 1

    def _preempt(self) -> None:
        """Move the response that started last back to the waiting ones, as vLLM does; its cache is computed again."""
        while not (last := self._begun.pop()).runs:
            pass
        self._stop(last)
        self.preempted += 1
        last.context, last.left = last.context + self._tick - last.since, last.end - self._tick
        self._waiting.appendleft(last)

    def _spend(self, seconds: float) -> None:
        self.now += seconds / self._speed


def run(engines: list[SimulatedEngine]) -> None:
    """Run all engines to their end, always the one that is furthest behind."""
    order = [(0.0, i) for i in range(len(engines))]
    heapq.heapify(order)
    while order:
        _, i = heapq.heappop(order)
        if engines[i].event():
            heapq.heappush(order, (engines[i].now, i))
