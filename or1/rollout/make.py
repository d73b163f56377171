"""Generation engines: what samples responses, and with which weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from or1.config import Config
    from or1.dist.world import World
    from or1.rollout.engine import Engine


def make_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World | None = None
) -> Engine:
    """The engine of `[rollout]`, started, with the weights of `config.model.path`; `update_weights` brings others.

    In a `world` of several ranks it is collective, and so is `update_weights`.

    "auto" is vLLM where it is installed in a tested version and the model is on a GPU, else transformers.
    Raises EngineError if vLLM is asked for and missing, outside the tested range, or does not start.
    """
    from or1.model.load import eos_token_ids
    from or1.rollout.hf import HfEngine
    from or1.rollout.vllm.setup import VllmSetup, installed_vllm, is_tested, require_vllm

    choice = config.rollout.engine
    if choice == "auto":
        choice = "vllm" if model.device.type == "cuda" and is_tested(installed_vllm()) else "hf"
    if choice == "hf":
        return HfEngine(model, tokenizer, config.rollout.batch_size)
    require_vllm(config.rollout.vllm.allow_untested)
    positions = getattr(model.config, "max_position_embeddings", None)
    setup = VllmSetup.of(config, model.device.type == "cuda", positions, eos_token_ids(model, tokenizer))
    if config.rollout.vllm.placement == "server":
        if world is not None and world.size > 1:
            from or1.rollout.vllm.shared import FollowingEngine, LeadingEngine

            if not world.is_main:
                return FollowingEngine(world, setup, model, tokenizer)
            return LeadingEngine(world, setup, config.rollout.vllm, model, tokenizer, config.run_path)
        from or1.rollout.vllm.server import ServerEngine

        return ServerEngine(setup, config.rollout.vllm, model, tokenizer, config.run_path)
    from or1.rollout.vllm.local import LocalEngine

    return LocalEngine(setup, model, tokenizer)


def serve(config: Config, host: str, port: int) -> None:
    """Become the vLLM server of a config: it replaces this process and runs until it is killed.

    Raises EngineError if vLLM is missing or untested, or OR1_SERVER_TOKEN is not set.
    """
    import os
    import sys

    from or1.core.errors import EngineError
    from or1.rollout.vllm.setup import VllmSetup, require_vllm
    from or1.rollout.vllm.worker import TOKEN_VARIABLE

    require_vllm(config.rollout.vllm.allow_untested)
    if not os.environ.get(TOKEN_VARIABLE):
        raise EngineError(
            f"{TOKEN_VARIABLE} is not set; set it to a secret of your choice, the same for `or1 train`: "
            "whoever has it can replace the weights"
        )
    import torch
    from transformers import AutoConfig

    from or1.rollout.vllm.process import server_arguments, server_environment, shared_folder

    positions = getattr(AutoConfig.from_pretrained(config.model.path), "max_position_embeddings", None)
    setup = VllmSetup.of(config, torch.cuda.is_available() and config.model.device != "cpu", positions)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *server_arguments(setup, host, port)]
    environment = server_environment(setup, os.environ[TOKEN_VARIABLE], shared_folder(config.run_path))
    os.execvpe(sys.executable, command, environment)
