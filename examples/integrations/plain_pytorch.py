"""GRPO with MAGIC in a plain PyTorch loop: python examples/integrations/plain_pytorch.py

A linear policy answers 8 questions with one of 512 tokens; rewards fall with the distance to the right one.
"""

import torch

from or1 import magic
from or1_kernels import PolicyObjective, linear_logprob_entropy, linear_policy_loss

PROMPTS, RESPONSES, HIDDEN, VOCAB = 8, 16, 32, 512
torch.manual_seed(0)
policy = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
optimizer = torch.optim.AdamW(policy.parameters(), lr=0.004)
controller = magic.EntropyController(target=3.0, delta=1e-2, coef_max=0.2)
hidden = torch.randn(PROMPTS, HIDDEN).repeat_interleave(RESPONSES, dim=0)
right = torch.randint(VOCAB, (PROMPTS,)).repeat_interleave(RESPONSES)

for step in range(121):
    with torch.no_grad():
        tokens = torch.multinomial(policy(hidden).softmax(-1), 1)[:, 0]
        old_logp, _ = linear_logprob_entropy(hidden, policy.weight, tokens)
    rewards = torch.exp(-(tokens - right).abs() / 50).view(PROMPTS, RESPONSES)
    mask = magic.reject_zero_advantage(torch.ones(len(tokens), 1), rewards)
    entropy = magic.rollout_entropy(old_logp[:, None], torch.ones(len(tokens), 1))
    alpha = controller.alpha(entropy)
    loss, stats = linear_policy_loss(
        hidden,
        policy.weight,
        tokens,
        magic.group_advantages(rewards).flatten(),
        old_logp=old_logp,
        token_weight=mask[:, 0] / magic.token_denominator(mask),
        objective=PolicyObjective(clip_high=0.28),
        entropy_coef=alpha,
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    controller.update(entropy)
    if step % 20 == 0:
        print(f"step {step:3}  reward {rewards.mean():.3f}  entropy {entropy:.3f}  alpha {alpha:.4f}  {stats.impl}")
