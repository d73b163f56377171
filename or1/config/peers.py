"""Names that other trainers use for or1's settings: TRL, verl, OpenRLHF, prime-rl, AReaL."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from or1.config.section import section_of
from or1.config.stage import OVERRIDDEN

_PEERS = {
    "learning_rate": "optim.lr",
    "actor_learning_rate": "optim.lr",
    "lr_warmup_steps": "optim.warmup_steps",
    "num_warmup_steps": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps",
    "lr_warmup_ratio": "optim.warmup_steps",
    "lr_warmup_steps_ratio": "optim.warmup_steps",
    "max_grad_norm": "optim.grad_clip",
    "clip_grad": "optim.grad_clip",
    "max_norm": "optim.grad_clip",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_betas": "optim.betas",
    "adam_epsilon": "optim.eps",
    "optimizer_impl": "optim.optimizer",
    "adam_offload": "optim.optimizer",
    "optimizer_offload": "optim.optimizer",
    "ppo_max_token_len_per_gpu": "optim.max_tokens_per_rank",
    "max_tokens_per_gpu": "optim.max_tokens_per_rank",
    "seq_len": "optim.max_tokens_per_rank",
    "gradient_accumulation_steps": "optim.max_tokens_per_rank",
    "ppo_micro_batch_size": "optim.max_tokens_per_rank",
    "ppo_micro_batch_size_per_gpu": "optim.max_tokens_per_rank",
    "micro_train_batch_size": "optim.max_tokens_per_rank",
    "train_max_tokens_per_gpu": "optim.max_tokens_per_rank",
    "n": "stage.0.group_size",
    "num_generations": "stage.0.group_size",
    "rollouts_per_example": "stage.0.group_size",
    "n_samples_per_prompt": "stage.0.group_size",
    "num_return_sequences": "stage.0.group_size",
    "rollout_n": "stage.0.group_size",
    "train_batch_size": "stage.0.prompts_per_step",
    "rollout_batch_size": "stage.0.prompts_per_step",
    "generation_batch_size": "stage.0.prompts_per_step",
    "gen_batch_size": "stage.0.prompts_per_step",
    "per_device_train_batch_size": "stage.0.prompts_per_step",
    "ppo_mini_batch_size": "stage.0.minibatch_prompts",
    "mini_batch_size": "stage.0.minibatch_prompts",
    "ppo_epochs": "stage.0.reuse",
    "num_iterations": "stage.0.reuse",
    "max_epochs": "stage.0.reuse",
    "max_completion_length": "stage.0.max_response_tokens",
    "max_response_length": "stage.0.max_response_tokens",
    "max_new_tokens": "stage.0.max_response_tokens",
    "generate_max_len": "stage.0.max_response_tokens",
    "max_tokens": "stage.0.max_response_tokens",
    "response_length": "stage.0.max_response_tokens",
    "max_steps": "stage.0.steps",
    "total_training_steps": "stage.0.steps",
    "num_train_epochs": "stage.0.steps",
    "total_epochs": "stage.0.steps",
    "num_episodes": "stage.0.steps",
    "max_prompt_length": "data.max_prompt_tokens",
    "prompt_length": "data.max_prompt_tokens",
    "prompt_max_len": "data.max_prompt_tokens",
    "train_files": "data.train",
    "train_dataset": "data.train",
    "dataset_name": "data.train",
    "prompt_data": "data.train",
    "chat_template_kwargs": "data.chat_template",
    "apply_chat_template_kwargs": "data.chat_template",
    "custom_chat_template": "data.chat_template",
    "prompt_key": "data.columns.prompt",
    "input_key": "data.columns.prompt",
    "label_key": "data.columns.answer",
    "val_files": "eval.sets",
    "eval_dataset": "eval.sets",
    "test_freq": "eval.every_steps",
    "eval_steps": "eval.every_steps",
    "eval_interval": "eval.every_steps",
    "num_generations_eval": "eval.sets.0.samples",
    "eval_n_samples_per_prompt": "eval.sets.0.samples",
    "val_max_samples": "eval.sets.0.limit",
    "save_freq": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "max_actor_ckpt_to_keep": "checkpoint.keep",
    "beta": "loss.kl_coef",
    "kl_loss_coef": "loss.kl_coef",
    "use_kl_loss": "loss.kl_coef",
    "kl_coeff": "loss.kl_coef",
    "init_kl_coef": "loss.kl_coef",
    "epsilon": "loss.clip_low",
    "clip_ratio": "loss.clip_low",
    "clip_ratio_low": "loss.clip_low",
    "epsilon_low": "loss.clip_low",
    "eps_clip": "loss.clip_low",
    "eps_clip_low": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "clip_ratio_high": "loss.clip_high",
    "eps_clip_high": "loss.clip_high",
    "entropy_coeff": "loss.entropy.coef",
    "entropy_coef": "loss.entropy.coef",
    "entropy_loss_coef": "loss.entropy.coef",
    "use_adaptive_entropy": "loss.entropy.control",
    "entropy_target": "loss.entropy.target",
    "entropy_coef_min": "loss.entropy.coef_min",
    "entropy_coef_max": "loss.entropy.coef_max",
    "entropy_coef_delta": "loss.entropy.delta",
    "scale_rewards": "loss.advantage_std",
    "norm_adv_by_std_in_grpo": "loss.advantage_std",
    "loss_type": "loss.normaliser",
    "loss_agg_mode": "loss.normaliser",
    "loss_mode": "loss.kind",
    "policy_loss_type": "loss.kind",
    "mask_truncated_completions": "loss.advantage_mask",
    "vllm_importance_sampling_cap": "loss.is_cap",
    "tis_imp_ratio_cap": "loss.is_cap",
    "vllm_importance_sampling_correction": "loss.is_cap",
    "vllm_importance_sampling_mode": "loss.mismatch.kind",
    "rollout_is": "loss.mismatch.kind",
    "rollout_rs": "loss.mismatch.kind",
    "rollout_is_threshold": "loss.mismatch.upper",
    "rollout_rs_threshold": "loss.mismatch.upper",
    "vllm_importance_sampling_clip_min": "loss.mismatch.lower",
    "vllm_importance_sampling_clip_max": "loss.mismatch.upper",
    "importance_sampling_level": "loss.kind",
    "adv_estimator": "loss.advantage",
    "advantage_estimator": "loss.advantage",
    "ref_model": "loss.reference",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "pretrain": "model.path",
    "bf16": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "enable_gradient_checkpointing": "model.gradient_checkpointing",
    "activation_checkpointing": "model.gradient_checkpointing",
    "torch_compile": "model.compile",
    "use_torch_compile": "model.compile",
    "router_aux_loss_coef": "model.router_aux_coef",
    "aux_loss_coef": "model.router_aux_coef",
    "use_liger_kernel": "model.liger",
    "use_liger": "model.liger",
    "model_dtype": "model.dtype",
    "param_dtype": "model.dtype",
    "lora_rank": "model.lora.rank",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "target_modules": "model.lora.targets",
    "lora_target_modules": "model.lora.targets",
    "lora_dropout": "model.lora.dropout",
    "use_rslora": "model.lora.rslora",
    "load_in_4bit": "model.lora.quantize",
    "use_vllm": "rollout.engine",
    "backend": "rollout.engine",
    "vllm_mode": "rollout.vllm.placement",
    "gpu_memory_utilization": "rollout.vllm.gpu_memory",
    "vllm_gpu_memory_utilization": "rollout.vllm.gpu_memory",
    "tensor_model_parallel_size": "rollout.vllm.tensor_parallel",
    "vllm_tensor_parallel_size": "rollout.vllm.tensor_parallel",
    "tensor_parallel_size": "rollout.vllm.tensor_parallel",
    "vllm_gpu_memory_util": "rollout.vllm.gpu_memory",
    "vllm_server_base_url": "rollout.vllm.url",
    "max_async_level": "rollout.max_staleness",
    "steps_per_generation": "stage.0.minibatch_prompts",
    "ulysses_sequence_parallel_size": "dist.sequence_parallel",
    "ulysses_parallel_size": "dist.sequence_parallel",
    "ring_attn_size": "dist.sequence_parallel",
    "fsdp_size": "dist.shard_ranks",
    "nccl_timeout": "dist.timeout_s",
    "ddp_timeout": "dist.timeout_s",
    "reward_funcs": "reward.kind",
    "reward_func": "reward.kind",
    "reward_fn": "reward.kind",
    "custom_reward_function": "reward.kind",
    "reward_manager": "reward.kind",
    "reward_weights": "reward.parts.0.weight",
    "output_dir": "run_dir",
    "default_local_dir": "run_dir",
    "save_path": "run_dir",
    "ckpt_path": "run_dir",
    "data_seed": "seed",
    "full_determinism": "deterministic",
    "project_name": "log.wandb",
    "wandb_project": "log.wandb",
    "use_wandb": "log.wandb",
    "report_to": "log.wandb",
    "num_completions_to_print": "log.samples",
    "log_completions": "log.samples",
    "log_val_generations": "log.samples",
}


def known_as(config: type[BaseModel], name: str, given: object = None) -> list[str]:
    """Return the paths of the settings that an unknown key may mean, best first.

    config  the class of the whole configuration
    name    the key: a name of another trainer, or of a setting in another section
    given   its value; if it is a table, the keys of that table are looked up instead
    """
    if isinstance(given, Mapping) and given:
        found = [path for leaf in _leaves(given) for path in _of_name(config, leaf)]
        return list(dict.fromkeys(found))[:3]
    return _of_name(config, name)


def nearest(config: type[BaseModel], name: str) -> list[str]:
    """Return the path of the setting, in any section, whose name here or in another trainer is spelt most similarly."""
    names = {path.rpartition(".")[2]: path for path in reversed(_of_the_run(config))}
    close = difflib.get_close_matches(name.lower(), [*names, *_PEERS], n=1, cutoff=0.8)
    return [names.get(close[0]) or _PEERS[close[0]]] if close else []


def settings(config: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the path of every setting; tables in a list get the index 0."""
    for name, field in config.model_fields.items():
        section, listed = section_of(field.annotation)
        if section is None:
            yield f"{prefix}{name}"
        else:
            yield from settings(section, f"{prefix}{name}.{'0.' if listed else ''}")


def _of_name(config: type[BaseModel], name: str) -> list[str]:
    name = name.lower().replace("-", "_")
    if name in _PEERS:
        return [_PEERS[name]]
    return [path for path in _of_the_run(config) if path.rpartition(".")[2] == name][:3]


def _of_the_run(config: type[BaseModel]) -> list[str]:
    """Return the paths of all settings but those by which a stage replaces a setting of the run."""
    replaced = tuple(f"stage.0.{section}." for section in OVERRIDDEN)
    return [path for path in settings(config) if not path.startswith(replaced)]


def _leaves(table: Mapping[str, Any], depth: int = 8) -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, Mapping) and depth:
            yield from _leaves(value, depth - 1)
        else:
            yield str(name)
