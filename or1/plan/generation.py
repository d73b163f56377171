"""Time of a rollout, which is limited by reads of weights and caches and ends with its longest response.

Response lengths are assumed to follow a distribution with limit L and mean m. The share of responses longer than t
tokens is

    S(t) = (1 - t/L)^(L/m - 1)

which is uniform for m = L/2 and has mean m for any m. Of many responses some reach the limit. So a rollout takes at
least L decoding steps, the last ones with few running responses.
"""

# n responses of a GPU, m their mean length, L their limit

from __future__ import annotations

from dataclasses import dataclass

from or1.plan.choices import Choices, Workload
from or1.plan.devices import Device
from or1.plan.memory import cache_tokens, kv_cache_bytes, weight_bytes
from or1.plan.shapes import ModelShape

# Transformers' generate launches its kernels one by one from Python.
_HF_LAYER_SECONDS = 1e-3
_POINTS = 64


def rollout_seconds(shape: ModelShape, choices: Choices, device: Device, work: Workload) -> float:
    """Return the seconds of one rollout with its prompts, on GPUs that have equal numbers of responses."""
    n = work.sequences / choices.gpus
    together: float
    prefill = 2.0 * shape.matrix_parameters * n * work.mean_prompt / (device.tflops * 1e12 * device.efficiency.matmul)
    decode = Decoding.of(shape, choices, device, work)
    if work.engine == "hf":
        # A batch runs until its longest response ends; of many responses the longest has L tokens.
        batches, together = -(-n // work.generated_together), work.generated_together
        context = work.mean_prompt + work.max_response / 2
        return batches * work.max_response * decode.step_seconds(together, context) + prefill
    # The prompt, and the mean length of a running response, which is above half of m: long responses run longer.
    context = work.mean_prompt + work.max_response * work.mean_response / (work.max_response + work.mean_response)
    together = max(1.0, min(n, cache_tokens(shape, choices, device, work) / context))
    # The cache is full until the last responses begin; then the responses end one after the other.
    full = (n / together - 1) * work.mean_response if n > together else 0.0
    return full * decode.step_seconds(together, context) + drain_seconds(decode, together, work) + prefill


@dataclass(frozen=True)
class Decoding:
    """Costs of a decoding step on one GPU, in seconds.

    weights_s         to read the weights
    cache_token_s     to read one cached token
    token_s           to compute one token
    least_s           least time of a step that the engine takes
    least_response_s  least time of a step that the engine takes for each running response
    """

    weights_s: float
    cache_token_s: float
    token_s: float
    least_s: float
    least_response_s: float = 0.0

    @classmethod
    def of(cls, shape: ModelShape, choices: Choices, device: Device, work: Workload) -> Decoding:
        """Return the costs of a model on a device."""
        bandwidth = device.bandwidth * 1e9 * device.efficiency.memory
        computed = 2.0 * (shape.matrix_parameters + shape.vocab * shape.hidden)
        efficiency, hf = device.efficiency, work.engine == "hf"
        return cls(
            weights_s=weight_bytes(shape, choices) / work.tensor_parallel / bandwidth,
            cache_token_s=kv_cache_bytes(shape, choices, 1) / bandwidth,
            token_s=computed / (device.tflops * 1e12 * device.efficiency.matmul),
            least_s=shape.layers * (_HF_LAYER_SECONDS if hf else efficiency.engine_layer_s),
            # The GPUs of an engine with tensor parallelism share its responses.
            least_response_s=0.0 if hf else efficiency.engine_response_s * work.tensor_parallel,
        )

    def step_seconds(self, running: float, context: float) -> float:
        """Return the seconds of one more token for each of `running` responses, with `context` tokens each so far."""
        least = self.least_s + running * self.least_response_s
        return max(self.weights_s + running * context * self.cache_token_s, running * self.token_s, least)


def drain_seconds(decode: Decoding, together: float, work: Workload) -> float:
    """Return the seconds that `together` responses take from their common start to the end of the longest."""
    exponent = work.max_response / work.mean_response - 1
    step = work.max_response / _POINTS
    total = 0.0
    for point in range(_POINTS):
        share = (1 - (point + 0.5) / _POINTS) ** exponent
        context = work.mean_prompt + (point + 0.5) * step
        total += step * decode.step_seconds(max(1.0, together * share), context)
    return total
