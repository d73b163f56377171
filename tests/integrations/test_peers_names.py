"""The table of other trainers' setting names, against the trainers that are installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import pytest

from or1.config import Config
from or1.config.peers import known_as

pytestmark = pytest.mark.integrations

TRL = {
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.grad_clip",
    "warmup_steps": "optim.warmup_steps",
    "gradient_accumulation_steps": "optim.max_tokens_per_rank",
    "per_device_train_batch_size": "stage.0.prompts_per_step",
    "num_generations": "stage.0.group_size",
    "num_iterations": "stage.0.reuse",
    "max_completion_length": "stage.0.max_response_tokens",
    "max_steps": "stage.0.steps",
    "beta": "loss.kl_coef",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "scale_rewards": "loss.advantage_std",
    "entropy_coef": "loss.entropy.coef",
    "entropy_target": "loss.entropy.target",
    "vllm_gpu_memory_utilization": "rollout.vllm.gpu_memory",
    "reward_weights": "reward.parts.0.weight",
    "use_liger_kernel": "model.liger",
    "log_completions": "log.samples",
    "report_to": "log.wandb",
    "save_steps": "checkpoint.every_steps",
    "output_dir": "run_dir",
}
VERL = {
    "lr": "optim.lr",
    "clip_grad": "optim.grad_clip",
    "lr_warmup_steps": "optim.warmup_steps",
    "ppo_micro_batch_size_per_gpu": "optim.max_tokens_per_rank",
    "ppo_max_token_len_per_gpu": "optim.max_tokens_per_rank",
    "train_batch_size": "stage.0.prompts_per_step",
    "ppo_mini_batch_size": "stage.0.minibatch_prompts",
    "ppo_epochs": "stage.0.reuse",
    "n": "stage.0.group_size",
    "max_response_length": "stage.0.max_response_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "kl_loss_coef": "loss.kl_coef",
    "clip_ratio_high": "loss.clip_high",
    "entropy_coeff": "loss.entropy.coef",
    "loss_agg_mode": "loss.normaliser",
    "loss_mode": "loss.kind",
    "rollout_is": "loss.mismatch.kind",
    "gpu_memory_utilization": "rollout.vllm.gpu_memory",
    "tensor_model_parallel_size": "rollout.vllm.tensor_parallel",
    "ulysses_sequence_parallel_size": "dist.sequence_parallel",
    "save_freq": "checkpoint.every_steps",
    "test_freq": "eval.every_steps",
    "project_name": "log.wandb",
    "train_files": "data.train",
    "default_local_dir": "run_dir",
}


def translated(names: Mapping[str, str]) -> dict[str, list[str]]:
    return {name: known_as(Config, name) for name in names}


def test_names_of_trl_exist_there_and_are_translated() -> None:
    trl = pytest.importorskip("trl")
    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert not set(TRL) - fields
    assert translated(TRL) == {name: [path] for name, path in TRL.items()}


def test_names_of_verl_exist_there_and_are_translated() -> None:
    pytest.importorskip("verl")
    yaml = pytest.importorskip("yaml")
    (file,) = [each for each in metadata.files("verl") or () if each.name == "_generated_ppo_trainer.yaml"]
    found = set(leaves(yaml.safe_load(file.read_text())))
    assert not set(VERL) - found
    assert translated(VERL) == {name: [path] for name, path in VERL.items()}


def leaves(table: Mapping[str, Any]) -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value)
        else:
            yield name
