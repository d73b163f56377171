"""One GRPO step by or1, by TRL's trainer and by plain transformers, on equal weights and the same batch.

All use the token-level loss divided by the trained tokens of the batch (TRL's "dapo"), on-policy. All compute the
entropy as TRL does, clip the gradient's norm to 1 and update with AdamW at the same rate.
"""

# B responses, C completion tokens, V vocab

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.lib.paths import ROOT
from benchmarks.step.batch import GROUP_SIZE, make_model, padded
from or1.config import ModelConfig, OptimConfig
from or1.core.types import TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.model.attention import choose_backend, register
from or1.model.prepare import prepare_model
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy
from or1.train.update import update

LR = 1e-6


@dataclass(frozen=True)
class StepNumbers:
    """Results of a step, which must agree between engines. entropy in nats per trained token."""

    loss: float
    entropy: float
    grad_norm: float

    def as_dict(self) -> dict[str, float]:
        """Return a dict of numbers."""
        return asdict(self)


class Engine(Protocol):
    """Protocol of a model with its optimizer and a batch."""

    def step(self) -> StepNumbers:
        """Run forward, backward, clipping and the update."""


def make_engine(
    name: str, architecture: str, sequences: Sequence[TrainSequence], device: torch.device, **options: Any
) -> Engine:
    """Return the engine "or1", "trl", "trl-liger" or "plain". Raises ImportError for a missing package."""
    if name == "or1":
        return Or1Engine(architecture, sequences, device, **options)
    if name == "plain":
        return PlainEngine(architecture, sequences, device, **options)
    return TrlEngine(architecture, sequences, device, liger=name == "trl-liger", **options)


class Or1Engine:
    """The update of or1's trainer. `checkpointing`, `optimizer` and `row_tokens` are config settings."""

    def __init__(
        self,
        architecture: str,
        sequences: Sequence[TrainSequence],
        device: torch.device,
        *,
        checkpointing: str = "none",
        optimizer: str = "adamw",
        weights: Literal["master", "stochastic"] = "master",
        grad_dtype: Literal["float32", "bfloat16"] = "float32",
        row_tokens: int = 0,
        sharing: Literal["auto", "on", "off"] = "auto",
    ):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = make_model(architecture, dtype, device, register(choose_backend("auto", device, dtype)))
        config = ModelConfig(path=architecture, gradient_checkpointing=checkpointing)
        self.model = prepare_model(model, config, device)
        self.optimizer = MasterAdamW(
            self.model, OptimConfig(lr=LR, optimizer=optimizer, weights=weights, grad_dtype=grad_dtype)
        )
        self.sequences = sequences
        budget = RowBudget(max(row_tokens, *(s.packed_tokens for s in sequences)))
        self.policy = Policy(self.model, budget, sharing=sharing)

    def step(self) -> StepNumbers:
        stats = UpdateStats()
        update(self.policy, self.optimizer, self.sequences, 0.0, stats)
        metrics = stats.metrics()
        if self.policy.budget.out_of_memory:
            # or1 would retry with smaller rows, but this measurement is for the given size.
            raise torch.OutOfMemoryError(f"rows had to shrink to {self.policy.budget.max_tokens} tokens")
        return StepNumbers(metrics["optim/loss"], metrics["policy/entropy_exact"], metrics["optim/grad_norm"])


class PaddedEngine:
    """Base of TRL and the plain loop: micro-batches of padded rows, gradient accumulation, and a fused AdamW.

    On a GPU weights are fp32 under bf16 autocast. This is TRL's default and needs no separate master copy.
    """

    def __init__(self, model: PreTrainedModel, sequences: Sequence[TrainSequence], micro_batch: int):
        self.model, self.device = model, model.device
        self.batch = padded(sequences, model.device)
        self.tokens = int(self.batch["completion_mask"].sum())
        self.micro_batch = micro_batch or len(sequences)
        self.adamw = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01, fused=True)

    def micro_batches(self) -> list[dict[str, Tensor]]:
        """Return micro-batches in order. Widths are the batch's, as TRL's trainer pads once per generation batch."""
        keys = self.batch.keys()
        split = zip(*(self.batch[key].split(self.micro_batch) for key in keys), strict=True)
        return [dict(zip(keys, parts, strict=True)) for parts in split]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return bf16 autocast on a GPU, a null context on the CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    def loss_of(self, micro: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Return the micro-batch's share of the batch loss, [], and its sum of entropies."""
        raise NotImplementedError

    def step(self) -> StepNumbers:
        loss, entropy = 0.0, 0.0
        for micro in self.micro_batches():
            part, entropies = self.loss_of(micro)
            part.backward()
            loss, entropy = loss + part.item(), entropy + entropies
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        return StepNumbers(loss, entropy / self.tokens, float(norm))


class PlainEngine(PaddedEngine):
    """Plain transformers with a log-softmax over all logits."""

    def __init__(
        self,
        architecture: str,
        sequences: Sequence[TrainSequence],
        device: torch.device,
        *,
        micro_batch: int = 0,
        checkpointing: str = "none",
    ):
        model = make_model(architecture, torch.float32, device, "sdpa")
        if checkpointing != "none":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        super().__init__(model, sequences, micro_batch)

    def loss_of(self, micro: dict[str, Tensor]) -> tuple[Tensor, float]:
        ids = torch.cat([micro["prompt_ids"], micro["completion_ids"]], dim=1)
        mask = torch.cat([micro["prompt_mask"], micro["completion_mask"]], dim=1)
        width = micro["completion_ids"].shape[1]
        with self.autocast():
            logits_BCV = self.model(ids, attention_mask=mask, logits_to_keep=width + 1).logits[:, :-1]
        log_p_BCV = logits_BCV.float().log_softmax(-1)
        logp_BC = log_p_BCV.gather(-1, micro["completion_ids"][..., None])[..., 0]
        with torch.no_grad():
            entropy_BC = -(log_p_BCV.exp() * log_p_BCV).sum(-1)
        gain_BC = (logp_BC - logp_BC.detach()).exp() * micro["advantages"][:, None]
        weight_BC = micro["completion_mask"]
        return -(gain_BC * weight_BC).sum() / self.tokens, float((entropy_BC * weight_BC).sum())


class TrlEngine(PaddedEngine):
    """TRL's GRPOTrainer: its model preparation and its `_compute_loss`, fed with the batch instead of a rollout."""

    def __init__(
        self,
        architecture: str,
        sequences: Sequence[TrainSequence],
        device: torch.device,
        *,
        liger: bool = False,
        micro_batch: int = 0,
        checkpointing: str = "none",
    ):
        model = make_model(architecture, torch.float32, device, "sdpa")
        self.trainer = _trainer(model, len(sequences), micro_batch or len(sequences), checkpointing != "none", liger)
        super().__init__(self.trainer.model, sequences, micro_batch)
        self.trainer.current_gradient_accumulation_steps = self.trainer.args.gradient_accumulation_steps
        if liger:
            from transformers.integrations.liger import apply_liger_kernel

            # The trainer does this at the start of train().
            apply_liger_kernel(self.model, self.trainer.args.liger_kernel_config)
        if checkpointing != "none":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss_of(self, micro: dict[str, Tensor]) -> tuple[Tensor, float]:
        tokens = torch.tensor(float(self.tokens), device=self.device)
        loss = self.trainer._compute_loss(self.model, micro | {"num_items_in_batch": tokens})
        mean_entropy = self.trainer._metrics["train"]["entropy"][-1]
        return loss, mean_entropy * float(micro["completion_mask"].sum())


def _trainer(model: PreTrainedModel, rows: int, micro_batch: int, checkpointing: bool, liger: bool) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    # Random weights have no folder. Their batch has no text, so any tokenizer serves.
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path or ROOT / "examples" / "tiny-adder")
    on_gpu = model.device.type == "cuda"
    # TRL refuses groups of one. A single long row counts as half of a group, and only its loss is computed.
    accumulate = -(-rows // micro_batch) if rows > 1 else 2
    args = GRPOConfig(
        output_dir=str(Path(tempfile.gettempdir()) / "or1-benchmark-trl"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulate,
        num_generations=GROUP_SIZE if rows > 1 else 2,
        steps_per_generation=accumulate,
        loss_type="dapo",
        temperature=1.0,
        beta=0.0,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=checkpointing,
        use_liger_kernel=liger,
        report_to=[],
    )
    prompts = Dataset.from_list([{"prompt": "1+1="}] * max(rows, 2))
    return GRPOTrainer(
        model=model, reward_funcs=_no_reward, args=args, train_dataset=prompts, processing_class=tokenizer
    )


def _no_reward(completions: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)
