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
from or1.rollout.vllm.drafts import require_sound_sampling
from or1.rollout.vllm.interface import require_known
from or1.rollout.vllm.process import server_arguments, server_environment, shared_folder
from or1.rollout.vllm.setup import VllmSetup, installed_vllm, is_tested, require_vllm, tested_range
from or1.rollout.vllm.worker import TOKEN_VARIABLE

if TYPE_CHECKING:
    from or1.config import Config
    from or1.rollout.engine import Engine


LONG_FOR_EMBEDDED = 2048
"""Response limit in tokens beyond which the embedded engine is warned about."""


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
    _require_arguments(setup, starts=config.rollout.vllm.url is None)
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


def engine_warnings(config: Config, device: torch.device) -> list[str]:
    """Return a warning with its remedy for each reason why the engine of a run on `device` is slow without need."""
    if engine_kind(config, device) != "hf":
        return []
    found, version = [], installed_vllm()
    remedy = f'pip install "vllm{tested_range()}" and set rollout.engine = "vllm"'
    if config.rollout.engine == "auto" and device.type == "cuda":
        lacks = "vLLM is not installed" if version is None else f"vLLM {version} is not a tested version"
        found.append(
            f'WARNING: rollout.engine = "auto" takes transformers\' generate on a GPU, because {lacks}; it is many '
            f'times slower than vLLM. {remedy}; or say rollout.engine = "hf"'
        )
    longest = max((stage.max_response_tokens for stage in config.stage), default=0)
    if longest > LONG_FOR_EMBEDDED:
        found.append(
            f"WARNING: responses of up to {longest:,} tokens from transformers' generate, where a batch lasts until "
            f"its longest response and vLLM's would not; above {LONG_FOR_EMBEDDED:,} tokens {remedy}"
        )
    return found


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
    _require_arguments(setup)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *server_arguments(setup, host, port)]
    environment = server_environment(setup, os.environ[TOKEN_VARIABLE], shared_folder(config.run_path))
    os.execvpe(sys.executable, command, environment)


def _require_arguments(setup: VllmSetup, starts: bool = True) -> None:
    """Raise EngineError for arguments that the installed vLLM lacks, or that it would sample wrongly with.

    starts  False: another process starts vLLM, and checks the arguments
    """
    if starts:
        require_known(setup.extra)
        if setup.drafts is not None and not setup.on_gpu:
            require_sound_sampling()
