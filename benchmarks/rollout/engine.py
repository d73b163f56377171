"""One GPU's engine in simulated time: continuous batching, a cache of limited size, steps that slow with the load.

Seconds of a decoding step come from `or1.plan.generation.Decoding`, for a 7B model on an H100: the weights and the
cache of every running response are read once a step, at 80 % of 3,350 GB/s, or the products take longer, at 70 % of
989 TFLOP/s. No time here was measured on a GPU.
"""

# C tokens in the cache

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable

from or1.plan.devices import Device, find_device
from or1.plan.generation import Decoding
from or1.plan.shapes import parse_shape
from or1.rollout.dealing import Window
from or1.rollout.engine import Job

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
Take = Callable[[int], list[Job]]


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


class Running:
    """A response in the engine. `left` and `context` are tokens at the moment of its start."""

    def __init__(self, job: Job, tokens: int):
        self.job, self.left, self.context = job, tokens, PROMPT_TOKENS


class SimulatedEngine:
    """The engine of one rank. `event` advances it to the next change of its batch.

    take     returns the next jobs; the code under test
    lengths  tokens of a job's response
    speed    1 for the planned speed, 0.5 for half
    """

    def __init__(self, take: Take, lengths: Callable[[Job], int], *, shared: bool, speed: float = 1.0):
        self._decoding, self._cache = costs()
        self._take, self._lengths, self._speed = take, lengths, speed
        self._window = Window(BATCH_SIZE, shared=shared)
        self._more, self._number = True, 0
        self._waiting: deque[Running] = deque()
        # (tick at the end, order of the start, tick at the start, response); a tick is a token of every response.
        self._running: list[tuple[int, int, int, Running]] = []
        self._tick, self._used = 0, 0
        self.now, self.ended, self.tokens = 0.0, 0.0, 0

    def event(self) -> bool:
        """Take and start what there is room for, and run to the next event. Return False if all is done."""
        asked = self._ask()
        self._start()
        if not self._running:
            return asked
        ticks = self._running[0][0] - self._tick
        if asked:
            ticks = min(ticks, 1)  # The engine asks again after its next step.
        free = self._cache - self._used
        if len(self._running) * ticks > free:
            ticks = max(free // len(self._running), 1)
        self._advance(ticks)
        return True

    def _ask(self) -> bool:
        room = self._window.room(len(self._running) + len(self._waiting), len(self._waiting))
        if not self._more or not room:
            return False
        jobs = self._take(room)
        self._more = bool(jobs)
        self._waiting.extend(Running(job, self._lengths(job)) for job in jobs)
        return bool(jobs)

    def _start(self) -> None:
        """Start waiting responses while their tokens fit, with room for every running one to grow a little."""
        while self._waiting and len(self._running) < BATCH_SIZE:
            first = self._waiting[0]
            if self._running and self._used + first.context + 16 * len(self._running) > self._cache:
                return
            self._waiting.popleft()
            self._number += 1
            heapq.heappush(self._running, (self._tick + first.left, self._number, self._tick, first))
            self._used += first.context
            self._spend(first.context * self._decoding.token_s)

    def _advance(self, ticks: int) -> None:
        running = len(self._running)
        context = (self._used + running * ticks / 2) / running
        self._spend(ticks * self._decoding.step_seconds(running, context))
        self._tick += ticks
        self._used += running * ticks
        self.tokens += running * ticks
        while self._running and self._running[0][0] <= self._tick:
            _, _, since, done = heapq.heappop(self._running)
            self._used -= done.context + self._tick - since
            self.ended = self.now
        while self._used + len(self._running) > self._cache and len(self._running) > 1:
            self._preempt()

    def _preempt(self) -> None:
        """Move the response that started last back to the waiting ones, as vLLM does; its cache is computed again."""
        entry = max(self._running, key=lambda each: each[1])
        self._running.remove(entry)
        heapq.heapify(self._running)
        end, _, since, response = entry
        done = self._tick - since
        self._used -= response.context + done
        response.context, response.left = response.context + done, end - self._tick
        self._waiting.appendleft(response)

    def _spend(self, seconds: float) -> None:
        self.now += seconds / self._speed


def run(engines: list[SimulatedEngine]) -> None:
    """Run all engines to their end, always the one that is furthest behind."""
    order = [(0.0, i) for i in range(len(engines))]
    heapq.heapify(order)
    while order:
        _, i = heapq.heappop(order)
        if engines[i].event():
            heapq.heappush(order, (engines[i].now if math.isfinite(engines[i].now) else 0.0, i))
