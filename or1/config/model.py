"""`[model]`: the policy, and how its forward and backward run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from or1.config.lora import LoraConfig
from or1.config.section import MOST_MIB, MOST_TOKENS, FilePath, Section

# Other names for the same types and devices, as other trainers use them.
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "float": "float32", "double": "float64"}
_DEVICES = {"gpu": "cuda", "cuda:0": "cuda"}
UNTUNED_TILE = 16384
"""Tokens of an MLP tile with mlp_tile_tokens = "auto" and no measurement."""


def _from_bool(value: object) -> object:
    return {True: "layer", False: "none"}[value] if isinstance(value, bool) else value


def short_dtype(value: Any) -> Any:
    """Return the name that or1 uses for a dtype: bf16 and torch.bfloat16 are bfloat16."""
    return _DTYPES.get(short := value.removeprefix("torch."), short) if isinstance(value, str) else value


def _device(value: Any) -> Any:
    return _DEVICES.get(value, value) if isinstance(value, str) else value


_Checkpointing = Literal["auto", "none", "layer", "selective", "offload"]
_AS_NAME = BeforeValidator(_from_bool, json_schema_input_type=bool | _Checkpointing)


class ModelConfig(Section):
    """`[model]`"""

    path: FilePath
    """Hugging Face checkpoint folder or hub id of a causal language model."""
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], BeforeValidator(short_dtype)] = "bfloat16"
    """Type of the weights in forward and backward; `optim.weights` sets what the optimizer keeps. fp32, bf16 and fp64
    are accepted too; there is no float16."""
    device: Annotated[Literal["auto", "cpu", "cuda"], BeforeValidator(_device)] = "auto"
    """Training device; auto: the GPU if there is one. gpu and cuda:0 mean cuda. To use another GPU, set the environment
    variable CUDA_VISIBLE_DEVICES."""
    attention: Literal["auto", "flash3", "flash4", "cudnn", "flash", "varlen", "sdpa"] = "auto"
    """Attention over packed rows. flash3, flash4, flash: flash-attn 3, 4 and 2, if installed; cudnn: cuDNN in torch,
    document by document; varlen: torch's own. These need a GPU and 16-bit weights. sdpa: exact on any device and type,
    slow on a GPU. auto: the fastest that can run. docs/attention.md lists what each can do."""
    gradient_checkpointing: Annotated[_Checkpointing, _AS_NAME] = "auto"
    """layer: keep each layer's input and recompute the rest in backward. selective: keep the output of attention too,
    so that attention is not recomputed. offload: keep the inputs in host memory (on the CPU, same as layer). auto:
    selective on a GPU, none on a CPU. true and false mean layer and none."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's Triton kernels for RMSNorm, RoPE and SwiGLU. auto: on a GPU, if Liger is installed and supports the
    architecture; never on the CPU."""
    compile: bool = False
    """Whether torch.compile fuses the norms, gated MLPs and rotary embedding of each layer. Same results to rounding;
    the first rows compile, for up to some minutes. In place of Liger, and it needs triton (GPU) or a C++ compiler."""
    mlp_tile_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | Literal["auto"] = 16384
    """Longer rows pass through each MLP in tiles of at most this many tokens, which bounds the memory of activations.
    No extra cost with gradient checkpointing, one more MLP forward without. 0: never. auto: at most 16384, by
    measurement (`tune`)."""
    head_impl: Literal["auto", "triton", "quack", "native", "torch"] = "auto"
    """Row passes of the LM head. triton: on a GPU; native: C++ on a CPU; torch: anywhere, slower. quack: on Hopper and
    Blackwell with bf16 weights and the extra `quack`, a matrix product that leaves no row passes while the entropy
    coefficient is 0, and triton otherwise. auto: the fastest by measurement (`tune`), or triton, native, torch."""
    head_preset: Literal["auto", "fast", "lean"] = "auto"
    """fast: the LM head has large chunks, and sums the gradient of its weight in fp32. lean: small chunks, and sums in
    the type of the weights, for least memory. auto: fast, unless lean was measured to be faster (`tune`)."""
    head_chunk_rows: int = Field(0, ge=0, le=MOST_TOKENS)
    """Rows of logits that the LM head computes at once. 0: by measurement (`tune`), or by the size of the model."""
    router_aux_coef: float | None = Field(None, ge=0, le=1e3)
    """Factor of the load-balancing loss of a mixture-of-experts model, as its architecture defines it, over trained
    tokens. Above 0, an update makes one more forward. Absent: as config.json says (output_router_logits)."""
    head_stash_mib: int = Field(0, ge=0, le=MOST_MIB)
    """Raw logits in MiB that the LM head keeps until backward, with loss.kind = "gspo" and several updates a rollout: 4
    bytes times vocabulary for each token. They save one of its four GEMMs. 0 keeps none."""
    lora: LoraConfig | None = None
    """Adapters to train instead of the weights."""

    @property
    def tile_tokens(self) -> int:
        """Tokens of an MLP tile; 0: no tiles."""
        return UNTUNED_TILE if self.mlp_tile_tokens == "auto" else self.mlp_tile_tokens
