"""Time of a step from operation counts and a device's peaks; `devices.Efficiency` states what is assumed of them."""

# n tokens of a sequence, H hidden, Q width of all query heads, V vocab

from __future__ import annotations

from dataclasses import dataclass

from or1.balance import SequenceCost
from or1.plan.activations import layer_saved
from or1.plan.choices import Choices, Workload
from or1.plan.devices import Device
from or1.plan.memory import cache_tokens, kv_cache_bytes, optimizer_bytes, weight_bytes
from or1.plan.shapes import ModelShape

# Passes over what a layer saves: written and read forward, read backward, and their gradients.
_ACTIVATION_PASSES = 4
_HOST_LINK = 25e9  # bytes/s between host and GPU memory, PCIe 4 or 5 with other traffic
# Transformers' generate launches its kernels one by one from Python.
_HF_LAYER_SECONDS = 1e-3


@dataclass(frozen=True)
class StepTime:
    """Seconds of one rollout step. mfu: model FLOPs (recomputation left out) over what the device could do meanwhile.

    tokens: prompt and response tokens of the step on all GPUs. parts: seconds by what they are spent on.
    """

    parts: dict[str, float]
    tokens: int
    mfu: float

    @property
    def total(self) -> float:
        """Seconds of the step, verifiers and evaluations left out."""
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the step over its seconds, all GPUs together."""
        return self.tokens / self.total

    @property
    def dominant(self) -> str:
        """What takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


def sequence_cost(shape: ModelShape) -> SequenceCost:
    """Forward and backward of a sequence in FLOPs: 6 a matrix scalar and token, head included; attention over n^2.

    Causal attention takes 2 n^2 Q multiplications forward (half of the square, scores and values), 2.5 times that
    backward.
    """
    matrices = shape.matrix_parameters + shape.vocab * shape.hidden
    return SequenceCost(linear=6.0 * matrices, quadratic=7.0 * shape.q_width * shape.layers)


def step_time(shape: ModelShape, choices: Choices, device: Device, work: Workload) -> StepTime:
    """One rollout step at the mean lengths of the workload, all groups kept, ranks balanced, collectives overlapped."""
    sequences = work.sequences / choices.gpus
    tokens = sequences * (work.mean_prompt + work.mean_response)
    train = _train_seconds(shape, choices, device, work, sequences)
    parts = {"generation": _rollout_seconds(shape, choices, device, work, sequences)} | train
    if work.engine != "hf":
        parts["weight sync"] = 2 * weight_bytes(shape, choices) / (device.bandwidth * 1e9 * device.efficiency.memory)
    length = work.mean_prompt + work.mean_response
    model_flops = sequences * _flops(shape, length, work.mean_response)
    mfu = model_flops / (sum(train.values()) * device.tflops * 1e12)
    return StepTime(parts, round(tokens * choices.gpus), mfu)


def _flops(shape: ModelShape, length: float, trained: float) -> float:
    cost = sequence_cost(shape)
    head = 6.0 * shape.vocab * shape.hidden
    return (cost.linear - head) * length + head * trained + cost.quadratic * length**2


def _train_seconds(
    shape: ModelShape, choices: Choices, device: Device, work: Workload, sequences: float
) -> dict[str, float]:
    peak, e = device.tflops * 1e12, device.efficiency
    bandwidth = device.bandwidth * 1e9 * e.memory
    length = work.mean_prompt + work.mean_response
    # Forward is a third of the matrices' work; with checkpoints there is one more, and one for old log-probs.
    forwards = int(choices.checkpointing != "none") + work.old_logp_pass
    matrices = 6.0 * shape.matrix_parameters * length * (1 + forwards / 3)
    head = shape.vocab * shape.hidden * work.mean_response * (6.0 + 2.0 * work.old_logp_pass)
    attention = sequence_cost(shape).quadratic * length**2 * (1 + forwards / 3.5)
    moved = shape.layers * layer_saved(shape, choices, round(length)) * (_ACTIVATION_PASSES + 2 * forwards)
    states = optimizer_bytes(shape, choices) / choices.gpus
    update = (2 * states + 3 * weight_bytes(shape, choices) / choices.gpus) / bandwidth
    if choices.optimizer == "offload" and device.is_gpu:
        update = 2 * states / 40e9 + 3 * weight_bytes(shape, choices) / choices.gpus / _HOST_LINK
    parts = {
        "matrix products": sequences * matrices / (peak * e.matmul),
        "attention": sequences * attention / (peak * e.attention),
        "LM head": sequences * head / (peak * e.matmul),
        "memory traffic": sequences * moved / bandwidth,
    }
    exposed = _collective_seconds(shape, choices, device, sequences * length) - sum(parts.values())
    return parts | {"optimizer": work.updates * update, "collectives": max(0.0, exposed)}


def _collective_seconds(shape: ModelShape, choices: Choices, device: Device, tokens: float) -> float:
    """FSDP of one rank: weights gathered forward and backward of every packed row, gradients scattered as sums."""
    if choices.gpus == 1:
        return 0.0
    rows = max(1.0, tokens / choices.max_tokens)
    moved = shape.parameters * (2 * choices.weight + choices.arithmetic)
    return rows * moved / device.link_bytes(choices.gpus)


def _rollout_seconds(
    shape: ModelShape, choices: Choices, device: Device, work: Workload, sequences: float
) -> float:
    peak, e = device.tflops * 1e12, device.efficiency
    bandwidth = device.bandwidth * 1e9 * e.memory
    weights = weight_bytes(shape, choices) / work.tensor_parallel
    context = work.mean_prompt + work.mean_response / 2
    if work.engine == "hf":
        # A batch runs until its longest response ends, which with many responses is the limit.
        batches, together, steps = -(-sequences // work.generated_together), work.generated_together, work.max_response
        context, overhead = work.mean_prompt + work.max_response / 2, shape.layers * _HF_LAYER_SECONDS
    else:
        fit = cache_tokens(shape, choices, device, work) / max(context, 1.0)
        together = max(1.0, min(sequences, fit))
        batches, steps, overhead = sequences / together, work.mean_response, 0.0
    moved = weights + together * kv_cache_bytes(shape, choices, 1) * context
    computed = 2.0 * (shape.matrix_parameters + shape.vocab * shape.hidden) * together
    step = max(moved / bandwidth, computed / (peak * e.matmul), overhead)
    prefill = 2.0 * shape.matrix_parameters * sequences * work.mean_prompt / (peak * e.matmul)
    return batches * steps * step + prefill
