"""The fused head inside TRL's GRPOTrainer: policy, old and reference passes, every loss_type, no logits.

The patch replaces only log-probs and entropies. The loss is TRL's own, so each of its losses, importance weights, masks
and entropy controls keeps its meaning. `Or1GRPOTrainer`, with GRPOTrainer's arguments, is patched on construction.
Legend: B sequences, T prompt and completion tokens, C completion tokens.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Unpack

import torch
from packaging.version import Version
from torch import Tensor

from or1.integrations.transformers import ScoreSettings, install
from or1_kernels import HeadOptionsDict

if TYPE_CHECKING:
    from trl import GRPOTrainer

OLDEST, NEWEST = Version("1.0.0"), Version("1.16.0")
# From this version on, TRL asks its models for log-probs with this keyword. Older versions read logits.
_FUSED_FLAG, _ASKS_FOR_LOGPROBS = "fused_lm_head", Version("1.15.0")
_RETURNS_AUX_LOSS = Version("1.7.0")
_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
    "pixel_position_ids",
    "spatial_shapes",
    "num_tiles",
)


class UnsupportedTRLError(RuntimeError):
    """A TRL version or trainer that cannot be patched; the message names what is supported."""


def patch(trainer: GRPOTrainer, **options: Unpack[HeadOptionsDict]) -> GRPOTrainer:
    """Make a GRPOTrainer score tokens with or1's fused head. Call once, before train(). Return the trainer.

        trainer = patch(GRPOTrainer(model=..., reward_funcs=..., args=..., train_dataset=...))

    Works with PEFT, gradient accumulation, accelerate, DDP, FSDP and DeepSpeed: models run
    through their wrappers. use_liger_kernel keeps Liger's layers but not its loss, so options that TRL refuses with
    that loss work.

    Before TRL 1.15 the patch scores text only. It never scores padding. TRL before 1.5 includes padding in the mean of
    loss_type "luspo" with weights per token, so this mean differs.

    Args:
        trainer: TRL's GRPOTrainer, or a subclass, with its model and reference model.
        **options: the fields of or1_kernels.HeadOptions without temperature, which is the trainer's. stash_bytes=2**30
            trades memory for one GEMM less.

    Returns:
        The same trainer.

    Raises:
        UnsupportedTRLError: another trainer, or a TRL outside 1.0.0 to 1.16.0.
        UnsupportedModelError: the model has no LM head or no backbone of its own (or1.integrations.transformers).
        UnsupportedHeadError: its head is not a plain or LoRA linear layer (or1.integrations.heads).
        TypeError: an unknown option, or a value of a wrong type.
        ValueError: temperature, or a value that no call accepts.
    """
    version = _check(trainer)
    if "temperature" in options:
        raise ValueError(
            f"temperature is {options['temperature']}; set GRPOConfig.temperature, which sampling also obeys"
        )
    settings = ScoreSettings(
        flag=_FUSED_FLAG,
        fp32=getattr(trainer.args, "cast_lm_head_to_fp32", False),
        options=HeadOptionsDict(temperature=trainer.temperature) | options,
    )
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            install(model, settings)
    if version < _ASKS_FOR_LOGPROBS:
        outputs = 3 if version >= _RETURNS_AUX_LOSS else 2
        trainer._get_per_token_logps_and_entropies = _Scores(trainer, outputs)
        # In these versions the attribute selects Liger's loss. Liger's layers are already patched in.
        trainer.use_liger_kernel = False
    return trainer


def _check(trainer: Any) -> Version:
    import trl
    from trl import GRPOTrainer

    version = Version(trl.__version__)
    if not OLDEST <= Version(version.base_version) <= NEWEST:
        raise UnsupportedTRLError(
            f"trl is {version}; this or1 is tested with {OLDEST} to {NEWEST}. Install one of these, or call "
            "or1.integrations.trl.patch from an or1 that names yours"
        )
    if not isinstance(trainer, GRPOTrainer):
        raise UnsupportedTRLError(
            f"the trainer is {type(trainer).__name__}; patch takes TRL's GRPOTrainer. For others "
            "there is or1.integrations.transformers.patch_model"
        )
    return version


class _Scores:
    """Replacement for GRPOTrainer._get_per_token_logps_and_entropies of TRL before 1.15, without logits.

    Returns (logps f32[B, C], entropies f32[B, C] or None, aux loss or None). Before TRL 1.7 there is no aux loss.
    """

    def __init__(self, trainer: Any, outputs: int) -> None:
        self.trainer = trainer
        self.outputs = outputs

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        *,
        compute_aux_loss: bool = False,
        **extra: Any,
    ) -> tuple[Tensor | None, ...]:
        given = [name for name in _MULTIMODAL if extra.get(name) is not None]
        if given:
            raise UnsupportedTRLError(
                f"the batch has {given}; with images or token types or1 needs trl >= {_ASKS_FOR_LOGPROBS}"
            )
        options = {_FUSED_FLAG: True} | ({"output_router_logits": True} if compute_aux_loss else {})
        parts = []
        size = batch_size or len(input_ids)
        for ids_BT, mask_BT in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
            labels_BT[:, :-logits_to_keep] = -100
            with self.trainer.accelerator.autocast():
                parts.append(model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, **options))
        logps_BC = torch.cat([part.log_probs[:, -logits_to_keep:] for part in parts])
        entropy_BC = None
        if compute_entropy:
            entropy_BC = torch.cat([part.entropy[:, -logits_to_keep:] for part in parts])
            if not getattr(self.trainer, "_entropy_bonus_enabled", False):
                entropy_BC = entropy_BC.detach()
        aux_loss = torch.stack([part.aux_loss for part in parts]).mean() if compute_aux_loss else None
        return (logps_BC, entropy_BC, aux_loss)[: self.outputs]


@functools.cache
def _trainer_class() -> type:
    from trl import GRPOTrainer

    class Or1GRPOTrainer(GRPOTrainer):
        """TRL's GRPOTrainer, patched on construction. Same arguments as GRPOTrainer."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            patch(self)

    return Or1GRPOTrainer


def __getattr__(name: str) -> Any:
    # A class statement at the top of the module would import trl.
    if name == "Or1GRPOTrainer":
        return _trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
