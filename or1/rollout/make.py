"""Construction of the engine that `[rollout]` selects."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from or1.core.errors import EngineError
from or1.dist.world import SINGLE, World
from or1.model.load import eos_token_ids
from or1.rollout.hf import HfEngine
from or1.rollout.vllm.process import server_arguments, server_environment, shared_folder
from or1.rollout.vllm.setup import VllmSetup, installed_vllm, is_tested, require_vllm
from or1.rollout.vllm.worker import TOKEN_VARIABLE

if TYPE_CHECKING:
    from or1.config import Config
    from or1.rollout.engine import Engine


def make_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World | None = None
) -> Engine:
    """Start the engine of `[rollout]` with the weights of `config.model.path`.

    "auto" is vLLM if a tested version is installed and the model is on a GPU, else transformers. In a `world` of
    several ranks this call is collective, and so is the engine's `update_weights`.

    Raises EngineError if vLLM is selected and is missing, outside the tested range, or does not start.
    """
    if engine_kind(config, model.device) == "hf":
        return HfEngine(model, tokenizer, config.rollout.batch_size)
    require_vllm(config.rollout.vllm.allow_untested)
    positions = getattr(model.config, "max_position_embeddings", None)
    setup = VllmSetup.of(config, model.device.type == "cuda", positions, eos_token_ids(model, tokenizer))
    # The engines of vLLM are imported here because they need the optional libraries vllm and httpx.
    if config.rollout.vllm.placement == "server":
        return _server_engine(config, setup, model, tokenizer, world or SINGLE)
    from or1.rollout.vllm.local import LocalEngine

    return LocalEngine(setup, model, tokenizer)


def _server_engine(
    config: Config, setup: VllmSetup, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World
) -> Engine:
    """Return the engine of placement = "server": one server, or the several of `rollout.vllm.url`. Collective."""
    vllm, run_path = config.rollout.vllm, config.run_path
    if len(vllm.url or ()) > 1:
        from or1.rollout.vllm.fleet import FollowingFleet, LeadingFleet

        if not world.is_main:
            return FollowingFleet(world, setup, vllm, model, tokenizer)
        return LeadingFleet(world, setup, vllm, model, tokenizer, run_path)
    if world.size > 1:
        from or1.rollout.vllm.shared import FollowingEngine, LeadingEngine

        if not world.is_main:
            return FollowingEngine(world, setup, model, tokenizer)
        return LeadingEngine(world, setup, vllm, model, tokenizer, run_path)
    from or1.rollout.vllm.server import ServerEngine

    return ServerEngine(setup, vllm, model, tokenizer, run_path)


def engine_kind(config: Config, device: torch.device) -> str:
    """Return "hf" or "vllm": the engine of `rollout.engine` for a model on `device`."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    return "vllm" if device.type == "cuda" and is_tested(installed_vllm()) else "hf"


def serve(config: Config, host: str, port: int) -> None:
    """Replace this process by the vLLM server of a config, which runs until it is killed.

    Raises EngineError if vLLM is missing or untested, or if OR1_SERVER_TOKEN is not set.
    """
    require_vllm(config.rollout.vllm.allow_untested)
    if not os.environ.get(TOKEN_VARIABLE):
        raise EngineError(
            f"{TOKEN_VARIABLE} is not set; set it to a secret of your choice, the same for `or1 train`: "
            "whoever has it can replace the weights"
        )
    positions = getattr(AutoConfig.from_pretrained(config.model.path), "max_position_embeddings", None)
    setup = VllmSetup.of(config, torch.cuda.is_available() and config.model.device != "cpu", positions)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *server_arguments(setup, host, port)]
    environment = server_environment(setup, os.environ[TOKEN_VARIABLE], shared_folder(config.run_path))
    os.execvpe(sys.executable, command, environment)
