"""SFT with transformers' Trainer, then a policy gradient by hand, without logits:
python examples/integrations/transformers_sft.py
"""

import tempfile

import torch
from tiny import model_and_tokenizer, problems
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from or1.integrations.transformers import patch_model

if __name__ == "__main__":
    model, tokenizer = model_and_tokenizer()
    patch_model(model)
    rows = [tokenizer(f"{p['question']}={p['answer']}") for p in problems(128)]
    args = TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=4,
        max_steps=12,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, args, train_dataset=rows, data_collator=collator).train()

    batch = collator(rows[:8])
    out = model(**batch)
    print(f"mean log-prob {out.log_probs[out.label_mask].mean():.3f}, entropy {out.entropy[out.label_mask].mean():.3f}")
    advantages = torch.randn(len(out.log_probs), 1)
    (-(advantages * out.log_probs).sum() / out.label_mask.sum()).backward()
    print(f"gradient norm {torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]):.3f}")
