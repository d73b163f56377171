"""The settings of a config that memory and time depend on. Other modules of the plan do not read the config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from or1.config import Config, StageConfig
from or1.core.errors import PlanError
from or1.plan.adapters import Adapters
from or1.plan.devices import Device

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
# Assumed mean response as a share of the limit, without --mean-response; chains of thought start near this share.
_MEAN_SHARE = 0.5
_MEAN_PROMPT = 256


@dataclass(frozen=True)
class Choices:
    """How weights, gradients, moments and activations are stored.

    weight, grad     bytes of a parameter in forward and backward, and of a gradient summed over packed rows
    masters          whether the optimizer keeps fp32 copies of 16-bit weights
    optimizer        "adamw", "adamw8bit" or "offload"
    checkpointing    "none", "layer", "selective" or "offload"
    attention        "sdpa" (padded copies) or "varlen"
    liger            whether Liger's RMSNorm, RoPE and SwiGLU are used, which save less than plain torch
    mlp_tile_tokens  rows longer than this pass the MLP in tiles; 0: never
    max_tokens       tokens of a packed row
    gpus             GPUs of the run
    shard_gpus       GPUs that share one copy of the model (dist.shard_ranks); 0: all
    adapters         of [model.lora]; None: all weights are trained
    """

    weight: int
    grad: int
    masters: bool
    optimizer: str
    checkpointing: str
    attention: str
    liger: bool
    mlp_tile_tokens: int
    max_tokens: int
    gpus: int = 1
    shard_gpus: int = 0
    adapters: Adapters | None = None

    @property
    def shards(self) -> int:
        """Parts into which weights, gradients and optimizer state are cut."""
        return self.shard_gpus or self.gpus

    @property
    def arithmetic(self) -> int:
        """Bytes of a scalar in sums: fp32, or fp64 for an fp64 model."""
        return max(4, self.weight)


@dataclass(frozen=True)
class Workload:
    """One step of a stage, on all GPUs together.

    max_prompt, max_response    limits of a sequence in tokens
    mean_prompt, mean_response  assumed means in tokens
    sequences                   responses of a rollout
    updates, reuse              minibatches of a rollout, and how often each is trained
    old_logp_pass               whether a forward pass computes old log-probs first
    generated_together          responses in the engine at once, on one GPU; vllm limits them by its cache
    engine                      "hf", "vllm" (on the trainer's GPUs) or "server" (on other GPUs)
    engine_share                share of a GPU's memory that vllm reserves
    tensor_parallel             GPUs that share the engine's weights
    logits_twice                whether the LM head computes its logits again in backward
    steps_ahead                 steps that a rollout is made ahead of its own, at most
    ref_logp_pass               whether a forward pass computes log-probs of a reference model (loss.kl_coef)
    reference_model             whether that model has weights of its own
    """

    max_prompt: int
    max_response: int
    mean_prompt: float
    mean_response: float
    sequences: int
    updates: int
    old_logp_pass: bool
    generated_together: int
    reuse: int = 1
    engine: str = "hf"
    engine_share: float = 0.0
    tensor_parallel: int = 1
    logits_twice: bool = False
    steps_ahead: int = 0
    ref_logp_pass: bool = False
    reference_model: bool = False


def choices_of(config: Config, device: Device, gpus: int) -> Choices:
    """Return the choices that `[model]`, `[optim]` and `[dist]` make.

    Raises PlanError if `dist.shard_ranks` does not divide several `gpus`.
    """
    model, optim, shards = config.model, config.optim, config.dist.shard_ranks
    if gpus > 1 and gpus % (shards or 1):
        raise PlanError(
            f"dist.shard_ranks = {shards} does not divide the {gpus} GPUs; plan for a multiple of it with --gpus, or "
            "lower it with --set dist.shard_ranks=..."
        )
    weight = _BYTES[model.dtype]
    return Choices(
        weight=weight,
        grad=_BYTES[optim.grad_dtype] if weight == 2 else weight,
        masters=weight == 2 and optim.weights == "master",
        optimizer=optim.optimizer,
        checkpointing=_checkpointing(model.gradient_checkpointing, device),
        attention="varlen" if device.is_gpu and weight == 2 and model.attention != "sdpa" else "sdpa",
        liger=device.is_gpu and weight < 8 and model.liger != "off",
        mlp_tile_tokens=model.tile_tokens,
        max_tokens=optim.max_tokens_per_rank,
        gpus=gpus,
        shard_gpus=0 if shards is None or shards >= gpus else shards,
        adapters=Adapters.of(model.lora),
    )


def _checkpointing(value: str, device: Device) -> str:
    if value == "auto":
        return "selective" if device.is_gpu else "none"
    return value


def workload_of(config: Config, stage: StageConfig, device: Device, gpus: int, mean_response: int | None) -> Workload:
    """Return one step of `stage`. mean_response: tokens; None: half of the stage's limit."""
    sequences, loss = stage.prompts_per_step * stage.group_size, config.with_stage(stage).loss
    updates = stage.updates_per_step // stage.reuse
    engine = _engine_of(config, device, -(-sequences // gpus))
    mean = _MEAN_SHARE * stage.max_response_tokens if mean_response is None else mean_response
    return Workload(
        max_prompt=config.data.max_prompt_tokens,
        max_response=stage.max_response_tokens,
        mean_prompt=min(_MEAN_PROMPT, config.data.max_prompt_tokens),
        mean_response=min(mean, stage.max_response_tokens),
        sequences=sequences,
        updates=updates,
        reuse=stage.reuse,
        old_logp_pass=loss.scores_first(off_policy=not stage.on_policy),
        logits_twice=config.model.head_stash_mib == 0 and loss.sees_sequences(on_policy=stage.on_policy),
        generated_together=engine.together,
        engine=engine.name,
        engine_share=engine.share,
        tensor_parallel=engine.tensor_parallel,
        steps_ahead=config.rollout.steps_ahead,
        ref_logp_pass=loss.kl_coef > 0,
        # With adapters, the policy without them is the reference.
        reference_model=loss.kl_coef > 0 and (config.model.lora is None or loss.reference is not None),
    )


class _Engine(NamedTuple):
    """The fields of a Workload that describe the engine."""

    name: str
    together: int
    share: float = 0.0
    tensor_parallel: int = 1


def _engine_of(config: Config, device: Device, sequences: int) -> _Engine:
    """Return the engine that generates `sequences` responses on one GPU."""
    engine, vllm = config.rollout.engine, config.rollout.vllm
    if engine == "auto":
        engine = "vllm" if device.is_gpu else "hf"
    if engine != "vllm":
        return _Engine("hf", min(config.rollout.batch_size, sequences))
    elsewhere = vllm.placement == "server" and (vllm.devices is not None or vllm.url is not None)
    return _Engine("server" if elsewhere else "vllm", sequences, vllm.gpu_memory, vllm.tensor_parallel)


def alternatives(config: Config, choices: Choices, work: Workload) -> Iterator[tuple[str, Choices, Workload]]:
    """Yield single changes of the config that save memory, as option text; the cheapest in time first."""
    if choices.checkpointing == "none":
        yield "model.gradient_checkpointing=true", replace(choices, checkpointing="layer"), work
    if work.engine == "hf" and work.generated_together > 1:
        half = work.generated_together // 2
        yield f"rollout.batch_size={half}", choices, replace(work, generated_together=half)
    if work.engine == "vllm" and work.engine_share > 0.2:
        share = round(work.engine_share - 0.1, 2)
        yield f"rollout.vllm.gpu_memory={share:g}", choices, replace(work, engine_share=share)
    if choices.shard_gpus:
        # Absent in a config means all GPUs, so the largest group has the number of all.
        wider = 2 * choices.shard_gpus if choices.gpus % (2 * choices.shard_gpus) == 0 else choices.gpus
        yield f"dist.shard_ranks={wider}", replace(choices, shard_gpus=wider % choices.gpus), work
    if choices.optimizer == "adamw":
        yield "optim.optimizer=adamw8bit", replace(choices, optimizer="adamw8bit"), work
    if choices.adapters is not None:
        yield from _with_adapters(choices, work)
        return
    if choices.masters:
        yield "optim.weights=stochastic", replace(choices, masters=False), work
    if choices.weight == 2 < choices.grad:
        yield "optim.grad_dtype=bfloat16", replace(choices, grad=2), work
    yield from _fewer_activations(choices, work)
    if choices.optimizer != "offload":
        yield "optim.optimizer=offload", replace(choices, optimizer="offload"), work
    if choices.weight > 2:
        yield "model.dtype=bfloat16", replace(choices, weight=2, grad=min(choices.grad, 4), masters=True), work


def _fewer_activations(choices: Choices, work: Workload) -> Iterator[tuple[str, Choices, Workload]]:
    if choices.checkpointing == "selective":
        yield "model.gradient_checkpointing=layer", replace(choices, checkpointing="layer"), work
    if choices.checkpointing == "layer":
        yield "model.gradient_checkpointing=offload", replace(choices, checkpointing="offload"), work


def _with_adapters(choices: Choices, work: Workload) -> Iterator[tuple[str, Choices, Workload]]:
    """Yield what else helps with [model.lora], where gradients and optimizer state are small."""
    yield from _fewer_activations(choices, work)
    found = choices.adapters
    if found is not None and not found.four_bit and not found.alone and choices.weight == 2 and choices.gpus == 1:
        yield "model.lora.quantize=nf4", replace(choices, adapters=replace(found, four_bit=True)), work
