"""The push of an adapter alone to vLLM inside the trainer: a few megabytes, under a new id each time.

vLLM keeps the base weights and adds the adapter in its own LoRA layers. vLLM never reads an id twice. So every push has
an id of its own, and the one before is removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from or1.core.errors import EngineError
from or1.model.lora.folder import WEIGHTS, adapter_tensors, write_adapter
from or1.rollout.vllm.memory_folder import MemoryFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from or1.config import Config

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM 0.32 has buffers for."""


class AdapterPush:
    """The adapters of a model as requests of vLLM (vllm.lora.request.LoRARequest). `send` is collective if sharded.

    request  the adapter to sample with; None before the first push, when the adapters change nothing
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        needs = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self._folder = MemoryFolder("or1-adapter-", needs)
        self.request: Any = None

    def send(self, engine: Any, version: int) -> None:
        """Write the adapters to memory, and let vLLM's engine load them. Raises EngineError if vLLM refuses."""
        from vllm.lora.request import LoRARequest

        folder = self._folder.path
        (folder / WEIGHTS).unlink(missing_ok=True)
        # vLLM reads no fp64.
        narrow = {n: t.float() if t.dtype == torch.float64 else t for n, t in adapter_tensors(self._model).items()}
        write_adapter(self._model, folder, narrow)
        # Ids start at 1, and a resumed run may push a version twice.
        number = max(version, self.request.lora_int_id if self.request is not None else 0) + 1
        request = LoRARequest(f"or1-{number}", number, str(folder))
        try:
            added = engine.add_lora(request)
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                f"vLLM does not load the adapter of version {version} ({type(error).__name__}: {error}); "
                'model.lora.push = "merged" needs no support for adapters'
            ) from error
        if not added or number not in engine.list_loras():
            raise EngineError(
                f'vLLM did not take the adapter of version {version}; model.lora.push = "merged" needs no such support'
            )
        if self.request is not None:
            engine.remove_lora(self.request.lora_int_id)
        self.request = request

    def close(self) -> None:
        """Delete the files. Idempotent."""
        self._folder.close()


def adapter_options(config: Config) -> dict[str, Any]:
    """Return vLLM's engine arguments for adapters; none if `model.lora.push` is not "adapter".

    Raises EngineError for a rank of the adapters that vLLM has no buffers for.
    """
    lora = config.model.lora
    if lora is None or lora.push != "adapter":
        return {}
    if lora.rank > RANKS[-1]:
        raise EngineError(
            f'model.lora.rank = {lora.rank}, and vLLM serves at most {RANKS[-1]}; set model.lora.push = "merged"'
        )
    return {
        "enable_lora": True,
        "max_lora_rank": min(rank for rank in RANKS if rank >= lora.rank),
        "max_loras": 1,
        # The new one arrives before the old one leaves.
        "max_cpu_loras": 2,
    }
