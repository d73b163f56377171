"""Fused LM-head losses for RL: token log-probs, entropy and the clipped loss, without a [tokens, vocab] tensor."""
