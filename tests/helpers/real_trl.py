"""Two steps of TRL's GRPOTrainer on a pretrained model, stock or with or1's head, in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.lib.measure import peak_extra_bytes
from tests.helpers.grpo import parameters
from tests.helpers.real_model import reward, rows

STEPS = 2


def train(side: str, model: str, folder: str) -> dict[str, Any]:
    """Train, and write gradients of step 1 and the last weights to `folder`/`side`.safetensors.

    Return losses, gradient norms and sampled tokens of the steps. For one more pass, of loss and backward on the last
    batch, return CPU seconds and the growth of memory in bytes.
    """
    trainer = trainer_of(side, model, folder)
    losses, batches, gradients = [], [], {}
    inner_step, inner_loss = trainer.training_step, trainer.compute_loss

    def training_step(*arguments: Any, **named: Any) -> torch.Tensor:
        loss = inner_step(*arguments, **named)
        losses.append(float(loss))
        if not gradients:
            gradients.update({f"gradient.{n}": p.grad.clone() for n, p in trainer.model.named_parameters()})
        return loss

    def compute_loss(module: Any, inputs: Any, *rest: Any, **named: Any) -> torch.Tensor:
        batches.append(inputs)
        return inner_loss(module, inputs, *rest, **named)

    trainer.training_step, trainer.compute_loss = training_step, compute_loss
    trainer.train()
    ends = {f"weight.{name}": value for name, value in parameters(trainer.model).items()}
    save_file(gradients | ends, Path(folder) / f"{side}.safetensors")
    gradients.clear()
    ends.clear()

    def one_pass() -> None:
        inner_loss(trainer.model, batches[-1]).backward()

    # The first allocates gradients and buffers that stay.
    one_pass()
    peak = peak_extra_bytes(one_pass, torch.device("cpu"))
    seconds = []
    for _ in range(3):
        began = time.process_time()
        one_pass()
        seconds.append(time.process_time() - began)
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    tokens = [batch["completion_ids"].tolist() for batch in batches]
    return {"losses": losses, "norms": norms, "tokens": tokens, "peak": peak, "seconds": min(seconds)}


def trainer_of(side: str, model: str, folder: str) -> Any:
    """Return a trainer in fp32 whose head is TRL's for "stock", or1's for "or1"."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from or1.integrations.trl import patch

    tokenizer = AutoTokenizer.from_pretrained(model)
    problems = [
        {
            "prompt": tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
            ),
            "answer": row["answer"],
        }
        for row in rows()
    ]
    torch.manual_seed(1)
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(Path(folder) / side),
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=32,
            logging_steps=1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=datasets.Dataset.from_list(problems),
        processing_class=tokenizer,
    )
    return patch(trainer) if side == "or1" else trainer
