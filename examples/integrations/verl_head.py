"""verl's fused forward and policy loss, computed by or1: python examples/integrations/verl_head.py

A verl run needs no code, only these settings:
    actor_rollout_ref.model.external_lib=or1.integrations.verl actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.actor.policy_loss.loss_mode=magic
"""

import torch
from tiny import model_and_tokenizer, problems
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.import_utils import import_external_libs
from verl.workers.config import FSDPActorConfig, OptimizerConfig, PolicyLossConfig

if __name__ == "__main__":
    import_external_libs("or1.integrations.verl")
    model, tokenizer = model_and_tokenizer()
    ids = tokenizer([f"{p['question']}={p['answer']}" for p in problems(8)], padding=True, return_tensors="pt")
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="triton")
    out = model(**ids, temperature=1.0, return_dict=True)
    logp, entropy = out.log_probs, out.entropy
    print(f"mean log-prob {logp.mean():.3f}, entropy {entropy.mean():.3f}, no logits: {out.logits is None}")

    config = FSDPActorConfig(
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=8,
        optim=OptimizerConfig(lr=1e-6),
        policy_loss=PolicyLossConfig(loss_mode="magic"),
        clip_ratio_high=0.28,
    )
    loss, metrics = get_policy_loss_fn("magic")(
        old_log_prob=logp.detach(),
        log_prob=logp,
        advantages=torch.randn(8, 1).expand_as(logp),
        response_mask=ids["attention_mask"],
        loss_agg_mode="token-mean",
        config=config,
    )
    loss.backward()
    print(f"loss {loss:.4f}, {metrics}")
