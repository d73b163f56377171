"""The one place where names of the configuration become what memory and time depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from or1.config import Config, StageConfig
from or1.plan.devices import Device

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
# Share of the response limit that a response is taken to use where nobody says; chains of thought start near it.
_MEAN_SHARE = 0.5
_MEAN_PROMPT = 256


@dataclass(frozen=True)
class Choices:
    """How weights, gradients, moments and activations are held; sizes in bytes of one scalar.

    weight, grad     parameters in forward and backward; gradients as they are summed over packed rows
    masters          whether the optimizer keeps fp32 copies of 16-bit weights
    optimizer        "adamw", "adamw8bit" or "offload"
    checkpointing    "none", "layer" or "offload"
    attention        "sdpa" (padded copies) or "varlen"
    liger            Liger's RMSNorm, RoPE and SwiGLU, which save less than plain torch
    mlp_tile_tokens  rows longer than this pass the MLP in tiles; 0: never
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

    @property
    def arithmetic(self) -> int:
        """Bytes of a scalar where sums are made: fp32, or fp64 for an fp64 model."""
        return max(4, self.weight)


@dataclass(frozen=True)
class Workload:
    """One step of a stage, all GPUs together; tokens of one sequence where not said otherwise.

    max_prompt, max_response  limits;  mean_prompt, mean_response  what a sequence is taken to be
    sequences                 responses of a rollout step;  updates  minibatches that they make, each trained `reuse`
                              times
    old_logp_pass             whether a forward pass computes old log-probs first
    generated_together        responses in the engine at once, on one GPU; vllm: as many as its cache holds
    engine                    "hf", "vllm" (beside the trainer on its GPUs) or "server" (elsewhere)
    engine_share              share of a GPU's memory that vllm takes;  tensor_parallel  GPUs that share its weights
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


def choices_of(config: Config, device: Device, gpus: int) -> Choices:
    """What `[model]` and `[optim]` say, as far as memory and time go."""
    model, optim = config.model, config.optim
    weight = _BYTES[model.dtype]
    return Choices(
        weight=weight,
        grad=_BYTES[_option(optim, "grad_dtype", model.dtype)] if weight == 2 else weight,
        masters=weight == 2 and _option(optim, "weights", "master") == "master",
        optimizer=_option(optim, "optimizer", "adamw"),
        checkpointing=_checkpointing(model.gradient_checkpointing),
        attention="varlen"
        if device.is_gpu and weight == 2 and _option(model, "attention", "auto") != "sdpa"
        else "sdpa",
        liger=device.is_gpu and weight < 8 and _option(model, "liger", "off") != "off",
        mlp_tile_tokens=_option(model, "mlp_tile_tokens", 0),
        max_tokens=optim.max_tokens_per_rank,
        gpus=gpus,
    )


def _checkpointing(value: bool | str) -> str:
    return {True: "layer", False: "none"}[value] if isinstance(value, bool) else value


def _option(section: object, name: str, default):
    """An option of the section, or what a trainer that does not have it does."""
    return getattr(section, name, default)


def workload_of(config: Config, stage: StageConfig, device: Device, gpus: int, mean_response: int | None) -> Workload:
    """One step of `stage`. `mean_response` None: half the stage's limit."""
    sequences = stage.prompts_per_step * stage.group_size
    updates = stage.updates_per_step // stage.reuse
    mean = _MEAN_SHARE * stage.max_response_tokens if mean_response is None else mean_response
    return Workload(
        max_prompt=config.data.max_prompt_tokens,
        max_response=stage.max_response_tokens,
        mean_prompt=min(_MEAN_PROMPT, config.data.max_prompt_tokens),
        mean_response=min(mean, stage.max_response_tokens),
        sequences=sequences,
        updates=updates,
        reuse=stage.reuse,
        old_logp_pass=config.loss.old_logp == "recompute" or (config.loss.old_logp == "auto" and not stage.on_policy),
        **_engine_of(config, device, -(-sequences // gpus)),
    )


def _engine_of(config: Config, device: Device, sequences: int) -> dict[str, object]:
    """How `sequences` responses on one GPU are generated."""
    engine, vllm = config.rollout.engine, _option(config.rollout, "vllm", None)
    if engine == "auto":
        engine = "vllm" if device.is_gpu else "hf"
    if engine != "vllm" or vllm is None:
        return {"engine": "hf", "generated_together": min(config.rollout.batch_size, sequences)}
    elsewhere = vllm.placement == "server" and (vllm.devices is not None or vllm.url is not None)
    return {
        "engine": "server" if elsewhere else "vllm",
        "generated_together": sequences,
        "engine_share": vllm.gpu_memory,
        "tensor_parallel": vllm.tensor_parallel,
    }


def alternatives(config: Config, choices: Choices, work: Workload) -> Iterator[tuple[str, Choices, Workload]]:
    """Single changes of the configuration that save memory, each as it would be written; the cheapest in time first."""
    if choices.checkpointing == "none":
        yield "model.gradient_checkpointing=true", replace(choices, checkpointing="layer"), work
    if work.engine == "hf" and work.generated_together > 1:
        half = work.generated_together // 2
        yield f"rollout.batch_size={half}", choices, replace(work, generated_together=half)
    if work.engine == "vllm" and work.engine_share > 0.2:
        share = round(work.engine_share - 0.1, 2)
        yield f"rollout.vllm.gpu_memory={share:g}", choices, replace(work, engine_share=share)
    if choices.optimizer == "adamw" and hasattr(config.optim, "optimizer"):
        yield "optim.optimizer=adamw8bit", replace(choices, optimizer="adamw8bit"), work
    if choices.masters and hasattr(config.optim, "weights"):
        yield "optim.weights=stochastic", replace(choices, masters=False), work
    if choices.weight == 2 < choices.grad:
        yield "optim.grad_dtype=bfloat16", replace(choices, grad=2), work
    if choices.checkpointing == "layer" and not isinstance(config.model.gradient_checkpointing, bool):
        yield "model.gradient_checkpointing=offload", replace(choices, checkpointing="offload"), work
    if choices.optimizer != "offload" and hasattr(config.optim, "optimizer"):
        yield "optim.optimizer=offload", replace(choices, optimizer="offload"), work
    if choices.weight > 2:
        yield "model.dtype=bfloat16", replace(choices, weight=2, grad=min(choices.grad, 4), masters=True), work
