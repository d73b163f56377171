"""TRL's GRPOTrainer with the fused head, an entropy bonus included: python examples/integrations/trl_grpo.py"""

import tempfile

from datasets import Dataset
from tiny import model_and_tokenizer, problems
from trl import GRPOConfig, GRPOTrainer

from or1.integrations.trl import patch


def right(completions, answer, **_):
    """Return 1 for the right answer, else 0."""
    return [float(c[0]["content"].split("=")[-1].strip().endswith(a)) for c, a in zip(completions, answer, strict=True)]


if __name__ == "__main__":
    model, tokenizer = model_and_tokenizer()
    rows = [{"prompt": [{"role": "user", "content": p["question"]}], "answer": p["answer"]} for p in problems(64)]
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        max_steps=4,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=40,
        learning_rate=1e-4,
        loss_type="dapo",
        entropy_coef=1e-3,
    )
    trainer = patch(
        GRPOTrainer(
            model=model,
            reward_funcs=right,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    )
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(f"step {entry['step']}  reward {entry['reward']:.3f}  entropy {entry['entropy']:.3f}")
