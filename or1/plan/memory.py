"""Peak memory of one GPU in each phase of a step, by component, in bytes.

With several GPUs, FSDP shards weights, gradients and optimizer states evenly, and gathers each layer while it runs.
With dist.shard_ranks each such group of GPUs holds a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from or1.plan.activations import activations
from or1.plan.choices import Choices, Workload
from or1.plan.devices import GIB, Device
from or1.plan.head import head_buffers
from or1.plan.shapes import ModelShape

COMPONENTS = (
    "weights",
    "reference model",
    "gradients",
    "optimizer",
    "activations",
    "head buffers",
    "KV cache",
    "gathered layers",
    "generation",
    "batch",
    "temporaries",
)
# 8-bit moments of torchao: the block size, with one fp32 scale a block, and the least size of a quantized tensor.
_BLOCK, _MIN_QUANTIZED = 256, 4096
# Memory of vLLM apart from weights and cache: CUDA graphs and profiled activations.
_VLLM_OVERHEAD = 2 * GIB


@dataclass(frozen=True)
class Phase:
    """The peak of one phase of a step: bytes of each component on one GPU."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.parts.values())

    @property
    def dominant(self) -> str:
        """Name of the largest component."""
        return max(self.parts, key=self.parts.__getitem__)


@dataclass(frozen=True)
class MemoryPlan:
    """Phases of a step on one GPU, and bytes in host memory by component."""

    phases: tuple[Phase, ...]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.total)


def weight_bytes(shape: ModelShape, choices: Choices) -> int:
    """Return the bytes of the parameters of the whole model without adapters, as an engine has them."""
    return shape.parameters * choices.weight


def trainer_weight_bytes(shape: ModelShape, choices: Choices) -> int:
    """Return the bytes of the trainer's parameters, as used in forward and backward; adapters are in fp32."""
    if choices.adapters is None:
        return weight_bytes(shape, choices)
    own = choices.arithmetic * sum(choices.adapters.sizes(shape))
    return choices.adapters.frozen_bytes(shape, choices.weight) + own


def trained_sizes(shape: ModelShape, choices: Choices) -> Iterator[int]:
    """Yield the number of scalars of every trained tensor."""
    return shape.tensor_sizes() if choices.adapters is None else choices.adapters.sizes(shape)


def gradient_bytes(shape: ModelShape, choices: Choices) -> int:
    """Return the bytes of the gradients of all trained tensors, summed over packed rows."""
    scalar = choices.grad if choices.adapters is None else choices.arithmetic
    return sum(trained_sizes(shape, choices)) * scalar


def checkpoint_bytes(shape: ModelShape, choices: Choices) -> int:
    """Return the bytes of a checkpoint's tensors: the trained weights in the optimizer's dtype, and moments."""
    kept = choices.masters or choices.adapters is not None
    scalar = choices.arithmetic if kept else choices.weight
    own = replace(choices, masters=False, optimizer="adamw" if choices.optimizer == "offload" else choices.optimizer)
    return scalar * sum(trained_sizes(shape, choices)) + optimizer_bytes(shape, own)


def push_bytes(shape: ModelShape, choices: Choices) -> int:
    """Return the bytes that an engine with weights of its own gets after each update."""
    alone = choices.adapters is not None and choices.adapters.alone
    return 4 * sum(trained_sizes(shape, choices)) if alone else weight_bytes(shape, choices)


def optimizer_bytes(shape: ModelShape, choices: Choices) -> int:
    """Return the bytes of masters, moments and step counts of the whole model, on the device or in host memory."""
    if choices.adapters is not None:
        # fp32 beside any base, so without masters.
        choices = replace(choices, weight=choices.arithmetic, masters=False)
    return sum(_state_bytes(size, choices) for size in trained_sizes(shape, choices))


def _state_bytes(size: int, choices: Choices) -> int:
    own_copy = choices.masters or (choices.optimizer == "offload" and choices.weight != 2)
    master = choices.arithmetic * size if own_copy else 0
    moment = choices.arithmetic * size
    if choices.optimizer == "adamw8bit" and size >= _MIN_QUANTIZED and size % _BLOCK == 0:
        moment = size + 4 * (size // _BLOCK)
    return master + 2 * moment + 4


def kv_cache_bytes(shape: ModelShape, choices: Choices, tokens: int) -> int:
    """Return the bytes of keys and values of `tokens` tokens in all layers."""
    return 2 * shape.layers * shape.kv_width * choices.weight * tokens


def plan_memory(
    shape: ModelShape, choices: Choices, device: Device, work: Workload, trained_tokens: int | None = None
) -> MemoryPlan:
    """Return all phases of a step.

    trained_tokens  trained tokens of a full packed row; None: all tokens, which is the upper bound
    """
    weights = _shard(trainer_weight_bytes(shape, choices), choices)
    states = _shard(optimizer_bytes(shape, choices), choices)
    offloaded = choices.optimizer == "offload" and device.is_gpu
    held = {"weights": weights, "optimizer": 0 if offloaded else states}
    if work.reference_model:
        held["reference model"] = _shard(weight_bytes(shape, choices), choices)
    grads = held | {"gradients": _shard(gradient_bytes(shape, choices), choices)}
    trained = choices.max_tokens if trained_tokens is None else trained_tokens
    phases = [
        Phase("rollout", held | _generation(shape, choices, device, work)),
        Phase(
            "update",
            grads
            | _gathered(shape, choices)
            | {"batch": batch_bytes(work, choices)}
            | _row(shape, choices, device, trained),
        ),
        Phase("optimizer", grads | {"temporaries": _update_temporaries(shape, choices, device)}),
    ]
    if work.engine == "vllm":
        phases.append(
            Phase(
                "sync", held | {"generation": _engine_memory(shape, device, work, choices)} | _gathered(shape, choices)
            )
        )
    host = {
        "optimizer": states if offloaded else 0,
        "activations": activations(shape, choices, choices.max_tokens).host,
    }
    return MemoryPlan(tuple(phases), {name: size for name, size in host.items() if size})


def _shard(size: int, choices: Choices) -> int:
    return -(-size // choices.shards)


def _row(shape: ModelShape, choices: Choices, device: Device, trained: int) -> dict[str, int]:
    """Return activations and head buffers at the peak of a packed row's forward and backward."""
    acts, head = activations(shape, choices, choices.max_tokens), head_buffers(shape, choices, device, trained)
    moments = [(acts.saved + acts.final, head.forward), (acts.saved + acts.final, head.backward), (acts.backward, 0)]
    worst = max(moments, key=sum)
    return {"activations": worst[0], "head buffers": worst[1], "temporaries": _row_temporaries(shape, choices)}


def _row_temporaries(shape: ModelShape, choices: Choices) -> int:
    if choices.adapters is not None:
        # A 4-bit weight is expanded for its product.
        return shape.hidden * shape.intermediate * choices.weight if choices.adapters.four_bit else 0
    # The gradient of a weight exists in the dtype of the weight before it is added to a wider sum.
    return max(shape.tensor_sizes()) * choices.weight if choices.grad > choices.weight else 0


def _update_temporaries(shape: ModelShape, choices: Choices, device: Device) -> int:
    """Return the bytes of copies of the largest tensor during its update; tensors are updated one after the other."""
    lora = choices.adapters is not None
    copies = int(choices.grad < choices.arithmetic and not lora) + (not device.is_gpu)
    if choices.weight == 2 and not choices.masters and not lora:
        copies += 3  # the weight in fp32, random bits, the rounded sum
    if choices.optimizer == "offload" and device.is_gpu:
        copies = 2  # a weight in fp32 that arrives while the one before is rounded
    return _shard(max(trained_sizes(shape, choices)), choices) * choices.arithmetic * copies


def _gathered(shape: ModelShape, choices: Choices) -> dict[str, int]:
    """Return the gathered tensors under FSDP: root and two layers, and the gradients of root and one layer."""
    if choices.shards == 1:
        return {}
    root = shape.parameters - shape.layers * shape.layer_parameters
    weights = (root + 2 * shape.layer_parameters) * choices.weight
    if choices.adapters is not None:
        return {
            "gathered layers": weights + 3 * choices.arithmetic * sum(trained_sizes(shape, choices)) // shape.layers
        }
    return {"gathered layers": weights + (root + shape.layer_parameters) * choices.arithmetic}


def batch_bytes(work: Workload, choices: Choices) -> int:
    """Return the bytes of ids, positions, targets and per-token numbers of the packed rows of one update."""
    sequences = -(-work.sequences // work.updates // choices.gpus)
    floats = 2 + work.old_logp_pass
    prompt, response = 16 * work.mean_prompt, (16 + 16 + floats * choices.arithmetic) * work.mean_response
    return int(sequences * (prompt + response))


def _generation(shape: ModelShape, choices: Choices, device: Device, work: Workload) -> dict[str, int]:
    if work.engine == "server":
        return {}
    if work.engine == "vllm":
        taken = _engine_memory(shape, device, work, choices)
        weights = weight_bytes(shape, choices) // work.tensor_parallel
        cache = max(0, taken - weights - _VLLM_OVERHEAD)
        return {"generation": taken - cache, "KV cache": cache}
    sequences, e = work.generated_together, choices.weight
    tokens = sequences * (work.max_prompt + work.max_response)
    cache = kv_cache_bytes(shape, choices, tokens)
    # While the cache of a layer grows by a token, its old copy exists. Masked SDPA repeats keys and values by head.
    growth = tokens * e * (shape.kv_width + (2 * shape.q_width if shape.heads != shape.kv_heads else 0))
    # Logits, and five fp32 forms of them on the way to a sampled token and its log-probability.
    scores = sequences * shape.vocab * (e + 5 * choices.arithmetic) + tokens * (8 + choices.arithmetic)
    prompts = sequences * work.max_prompt
    prefill = prompts * e * (3 * shape.mlp_width + 3 * shape.hidden) + prompts * 4 * shape.hidden
    moments = [(cache, growth + scores), (kv_cache_bytes(shape, choices, prompts), prefill)]
    worst = max(moments, key=sum)
    parts = {"KV cache": worst[0], "generation": worst[1]}
    # Sharded weights are gathered as a whole: gathering a layer at a time for every token would be slow.
    whole = weight_bytes(shape, choices)
    return parts if choices.shards == 1 else parts | {"gathered layers": whole - _shard(whole, choices)}


def _engine_memory(shape: ModelShape, device: Device, work: Workload, choices: Choices) -> int:
    least = weight_bytes(shape, choices) // work.tensor_parallel + _VLLM_OVERHEAD
    return max(int(work.engine_share * device.memory), least)


def cache_tokens(shape: ModelShape, choices: Choices, device: Device, work: Workload) -> int:
    """Return the tokens that vLLM's cache holds on one GPU."""
    cache = _generation(shape, choices, device, replace(work, engine="vllm"))["KV cache"]
    return cache * work.tensor_parallel // max(1, kv_cache_bytes(shape, choices, 1))
