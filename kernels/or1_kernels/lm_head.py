"""LMHead: an nn.Linear whose forward can return the policy loss, so that FSDP2's module hooks gather its weight.

Legend: N rows, H hidden, V vocab.
"""

from typing import Any

from torch import Tensor, nn

from .head import PolicyStats, linear_logprob_entropy, linear_policy_loss


class LMHead(nn.Linear):
    """A drop-in for the language-model head of a Hugging Face model.

        head(hidden)                                          raw logits [..., V], as nn.Linear: generate() works
        head(hidden_NH, targets_N)                            (logp [N], entropy [N])
        head(hidden_NH, targets_N, advantages_N, token_weight=..., ...)    (loss [], PolicyStats)

    The weight is read inside forward: under FSDP2 it exists in full only there. Options are those of
    linear_logprob_entropy and linear_policy_loss. softcap and logit_scale apply to the scoring forms only: a Hugging
    Face model applies its own to the raw logits.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, **factory)
        self.softcap = softcap
        self.logit_scale = logit_scale

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, softcap: float | None = None, logit_scale: float = 1.0) -> "LMHead":
        """A head over the very Parameters of `linear`: an embedding tied to it stays tied."""
        head = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            softcap=softcap,
            logit_scale=logit_scale,
            device="meta",
        )
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, advantages: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, PolicyStats]:
        """Logits, log-probs and entropies, or the policy loss, by which arguments are given; see the class."""
        if targets is None:
            if advantages is not None or options:
                raise ValueError(
                    f"LMHead got {sorted(options) or 'advantages'} but no targets; pass the token ids "
                    "to score, or hidden alone for logits"
                )
            return super().forward(hidden)
        shared = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        if advantages is None:
            return linear_logprob_entropy(hidden, self.weight, targets, **shared, **options)
        return linear_policy_loss(hidden, self.weight, targets, advantages, **shared, **options)
