"""QLoRA (arXiv 2305.14314): the frozen linear layers in 4-bit NormalFloat, by bitsandbytes through transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from or1.config import ModelConfig
from or1.core.errors import ModelError


def quantization_options(config: ModelConfig, device: torch.device, ranks: int, *, trains: bool) -> dict[str, Any]:
    """Return the arguments of from_pretrained for `model.lora.quantize`; none for "none".

    trains  False for an export, which may run on a CPU, where bitsandbytes is slow

    Raises ModelError for "nf4" without a GPU, with several ranks, or without bitsandbytes.
    """
    if config.lora is None or config.lora.quantize == "none":
        return {}
    setting = 'model.lora.quantize = "nf4"'
    if trains and device.type != "cuda":
        raise ModelError(
            f"{setting} needs a GPU and the model is on the {device.type}: bitsandbytes has fast products "
            "of 4-bit weights for GPUs alone; remove the setting"
        )
    if ranks > 1:
        raise ModelError(
            f"{setting} runs on one rank, not on {ranks}: FSDP shards rows, and the 4-bit blocks of a weight cross "
            "them; use one rank, or remove the setting, since FSDP shards the bf16 weights"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f'{setting} needs bitsandbytes; pip install "or1[qlora]", or remove the setting')
    return nf4_options(config, device)


def nf4_options(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Return the arguments of from_pretrained that load linear layers in 4 bits. The head stays as it is."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        # The scales of the blocks in 8 bits: 4.13 bits a weight in all.
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    # Quantized while reading: the whole model in 16 bits might not fit.
    return {"quantization_config": settings, "device_map": {"": device}}
