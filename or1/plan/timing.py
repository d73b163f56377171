"""Time of a step, from operation counts and the shares of a device's peaks in `devices.Efficiency`.

The shares are assumed, or measured by `or1 tune` on the same device and kind of model (`rates`).
"""

# n tokens of a sequence, H hidden, Q width of all query heads, V vocab

from __future__ import annotations

from dataclasses import dataclass

from or1.model.row_plan import SequenceCost
from or1.plan.activations import layer_saved
from or1.plan.choices import Choices, Workload
from or1.plan.devices import Device
from or1.plan.generation import rollout_seconds
from or1.plan.memory import gradient_bytes, optimizer_bytes, push_bytes, weight_bytes
from or1.plan.shapes import ModelShape

# Passes over the saved tensors of a layer: write and read in forward, read in backward, and their gradients.
_ACTIVATION_PASSES = 4
_HOST_LINK = 25e9  # bytes/s between host and GPU memory, PCIe 4 or 5 with other traffic
_OTHER = ("old log-probs", "reference log-probs", "weight sync")


@dataclass(frozen=True)
class StepTime:
    """Time of one rollout step.

    parts   seconds by activity
    tokens  tokens of prompts and responses, on all GPUs
    mfu     model FLOPs of the update, without recomputation, as a share of the device's peak
    """

    parts: dict[str, float]
    tokens: int
    mfu: float

    @property
    def total(self) -> float:
        """Seconds of the step, without verifiers and evaluations."""
        return sum(self.parts.values())

    @property
    def split(self) -> dict[str, float]:
        """The seconds in the categories of Tables 7 and 8 of the Skywork-OR1 report: rollout, update and other."""
        rollout, other = self.parts["generation"], sum(self.parts.get(name, 0.0) for name in _OTHER)
        return {"rollout": rollout, "update": self.total - rollout - other, "other": other}

    @property
    def overlapped(self) -> float:
        """Seconds of a step whose rollout was made during earlier steps: the longer of rollout and update, and a push.

        Without the prompts that a push during generation computes again.
        """
        push = self.parts.get("weight sync", 0.0)
        return max(self.split["rollout"], self.total - self.split["rollout"] - push) + push

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the step divided by its seconds, all GPUs together."""
        return self.tokens / self.total

    @property
    def dominant(self) -> str:
        """Name of the longest part."""
        return max(self.parts, key=self.parts.__getitem__)


def sequence_cost(shape: ModelShape) -> SequenceCost:
    """Return the FLOPs of forward and backward of a sequence of n tokens, as coefficients of n and n^2.

    Linear: 6 FLOPs a matrix scalar and token, including the head. Quadratic: causal attention takes 2 n^2 Q FLOPs a
    layer in forward (half of the square, scores and values), and 2.5 times as many in backward.
    """
    matrices = shape.matrix_parameters + shape.vocab * shape.hidden
    return SequenceCost(linear=6.0 * matrices, quadratic=7.0 * shape.q_width * shape.layers)


def step_time(shape: ModelShape, choices: Choices, device: Device, work: Workload) -> StepTime:
    """Return the time of one rollout step.

    Assumes sequences of mean length, no rejected group, balanced ranks, and collectives overlapped with arithmetic.
    """
    sequences = work.sequences / choices.gpus
    tokens = sequences * (work.mean_prompt + work.mean_response)
    update = _update_seconds(shape, choices, device, work)
    parts = {"generation": rollout_seconds(shape, choices, device, work)} | update
    scored = sum(_pass_seconds(shape, choices, device, work, forwards=1, backwards=0).values())
    scored = max(scored, _gather_seconds(shape, choices, device, work, choices.weight))
    parts |= {"old log-probs": scored} if work.old_logp_pass else {}
    parts |= {"reference log-probs": scored} if work.ref_logp_pass else {}
    if work.engine != "hf":
        parts["weight sync"] = _sync_seconds(shape, choices, device)
    length = work.mean_prompt + work.mean_response
    model_flops = (
        work.reuse * sequences * _flops(shape, length, work.mean_response, frozen=choices.adapters is not None)
    )
    mfu = model_flops / (sum(update.values()) * device.tflops * 1e12)
    return StepTime(parts, round(tokens * choices.gpus), mfu)


def _flops(shape: ModelShape, length: float, trained: float, *, frozen: bool) -> float:
    cost = sequence_cost(shape)
    head = 6.0 * shape.vocab * shape.hidden
    # A frozen matrix has no gradient: two products of three.
    part = 2 / 3 if frozen else 1.0
    return part * ((cost.linear - head) * length + head * trained) + cost.quadratic * length**2


def _update_seconds(shape: ModelShape, choices: Choices, device: Device, work: Workload) -> dict[str, float]:
    """Return the seconds of forward, backward and optimizer steps of all minibatches, with their reuse."""
    bandwidth = device.bandwidth * 1e9 * device.efficiency.memory
    # Gradient checkpointing runs the forward of the layers, but not of the head, a second time.
    forwards = 1 + (choices.checkpointing != "none")
    parts = _pass_seconds(shape, choices, device, work, forwards=forwards, backwards=1)
    if work.logits_twice:
        parts["LM head"] *= 4 / 3
    if choices.checkpointing == "selective":
        # 3.5 forwards of attention instead of 4.5: backward costs 2.5, and the first output is kept.
        parts["attention"] *= 3.5 / 4.5
    reduced = choices.arithmetic if choices.adapters is None else 0
    gathered = _gather_seconds(shape, choices, device, work, 2 * choices.weight + reduced)
    exposed = max(0.0, gathered - sum(parts.values()))
    states = optimizer_bytes(shape, choices) / choices.shards
    weights = gradient_bytes(shape, choices) if choices.adapters is not None else weight_bytes(shape, choices)
    update = (2 * states + 3 * weights / choices.shards) / bandwidth
    if choices.optimizer == "offload" and device.is_gpu:
        update = 2 * states / 40e9 + 3 * weights / choices.shards / _HOST_LINK
    parts = {name: work.reuse * seconds for name, seconds in (parts | {"collectives": exposed}).items()}
    parts["collectives"] += work.updates * work.reuse * _replica_seconds(shape, choices, device)
    return parts | {"optimizer": work.updates * work.reuse * update}


def _pass_seconds(
    shape: ModelShape, choices: Choices, device: Device, work: Workload, *, forwards: int, backwards: int
) -> dict[str, float]:
    """Return the seconds of all sequences of a GPU: `forwards` and `backwards` of the layers, one pass of the head."""
    peak, e = device.tflops * 1e12, device.efficiency
    sequences, length = work.sequences / choices.gpus, work.mean_prompt + work.mean_response
    # Backward costs a matrix product twice its forward, attention 2.5 times. A frozen matrix has no gradient.
    products = 2 * backwards if choices.adapters is None else backwards
    matrices = 2.0 * shape.matrix_parameters * length * (forwards + products)
    if choices.adapters is not None:
        matrices += 2.0 * sum(choices.adapters.sizes(shape)) * length * (forwards + 2 * backwards)
    head = 2.0 * shape.vocab * shape.hidden * work.mean_response * (1 + products)
    attention = sequence_cost(shape).quadratic / 3.5 * length**2 * (forwards + 2.5 * backwards)
    passes = 2 * forwards + (_ACTIVATION_PASSES - 2) * backwards
    moved = shape.layers * layer_saved(shape, choices, round(length)) * passes
    return {
        "matrix products": sequences * matrices / (peak * e.matmul),
        "attention": sequences * attention / (peak * e.attention),
        "LM head": sequences * head / (peak * (e.head or e.matmul)),
        "memory traffic": sequences * moved / (device.bandwidth * 1e9 * e.memory),
    }


def _gather_seconds(shape: ModelShape, choices: Choices, device: Device, work: Workload, scalar_bytes: int) -> float:
    """Return the seconds that FSDP's collectives take on one rank.

    For each packed row, `scalar_bytes` of each parameter cross the links: weights are gathered in forward and
    backward, gradients are reduce-scattered.
    """
    if choices.shards == 1:
        return 0.0
    tokens = work.sequences / choices.gpus * (work.mean_prompt + work.mean_response)
    rows = max(1.0, tokens / choices.max_tokens)
    return rows * shape.parameters * scalar_bytes / device.link_bytes(choices.shards)


def _replica_seconds(shape: ModelShape, choices: Choices, device: Device) -> float:
    """Return the seconds in which the copies of the model add up their gradients, once an update, with nothing beside.

    Each GPU has the gradient of its shard; a ring sends twice the bytes, but for the part that a GPU has already.
    """
    copies = choices.gpus // choices.shards
    shard = shape.parameters / choices.shards * choices.arithmetic
    return 2 * (copies - 1) / copies * shard / device.link_bytes(choices.gpus)


def _sync_seconds(shape: ModelShape, choices: Choices, device: Device) -> float:
    """Return the seconds of a weight sync: every GPU gathers all shards, and the engine copies its weights."""
    weights = push_bytes(shape, choices)
    gathered = 0.0 if choices.shards == 1 else weights / device.link_bytes(choices.shards)
    return gathered + 2 * weights / (device.bandwidth * 1e9 * device.efficiency.memory)
