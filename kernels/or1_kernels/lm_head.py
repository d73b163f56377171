"""LMHead: an nn.Linear whose forward can return the policy loss.

Legend: N rows, H hidden, V vocab.
"""

from typing import Any, Unpack, overload

from torch import Tensor, nn

from .head import PolicyStats, linear_policy_loss, score
from .objective import PolicyObjective
from .options import HeadOptionsDict, head_options


class PolicyLossDict(HeadOptionsDict, total=False):
    """Keyword arguments of linear_policy_loss."""

    token_weight: Tensor
    old_logp: Tensor | None
    rollout_logp: Tensor | None
    ref_logp: Tensor | None
    sequences: Tensor | None
    objective: PolicyObjective | str | None
    entropy_coef: float | Tensor
    rows: Tensor | str | None


class LMHead(nn.Linear):
    """A drop-in for the language-model head of a Hugging Face model.

        head(hidden)                                          raw logits [..., V], as nn.Linear: generate() works
        head(hidden_NH, targets_N)                            (logp [N], entropy [N])
        head(hidden_NH, targets_N, advantages_N, token_weight=..., ...)    (loss [], PolicyStats)

    forward reads the weight, so FSDP2's module hooks gather it: under FSDP2 the whole weight exists only inside
    forward. Options are those of linear_logprob_entropy and linear_policy_loss, without bias, softcap and logit_scale,
    which belong to the module. softcap and logit_scale apply to the scoring forms only: a Hugging Face model applies
    its own to raw logits.

    Args:
        in_features: H.
        out_features: V.
        bias: True for a bias [V], trained like the weight.
        softcap: above 0, of the scoring forms; None: no cap.
        logit_scale: above 0, of the scoring forms.
        **factory: device and dtype of nn.Linear.
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
        """Return a head that shares the Parameters of `linear`, so a tied embedding stays tied.

        Args:
            linear: the model's head, with weight [V, H].
            softcap: above 0, of the scoring forms; None: no cap.
            logit_scale: above 0, of the scoring forms.

        Returns:
            A head in the training mode of `linear`.
        """
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

    @overload
    def forward(self, hidden: Tensor) -> Tensor: ...

    @overload
    def forward(
        self, hidden: Tensor, targets: Tensor, advantages: None = None, **options: Unpack[HeadOptionsDict]
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, hidden: Tensor, targets: Tensor, advantages: Tensor, **options: Unpack[PolicyLossDict]
    ) -> tuple[Tensor, PolicyStats]: ...

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        advantages: Tensor | None = None,
        **options: Unpack[PolicyLossDict],
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, PolicyStats]:
        """Return logits, log-probs with entropies, or the policy loss, depending on the arguments; see the class.

        Args:
            hidden: [..., H] for logits, else [N, H].
            targets: i64[N], token ids; None for logits.
            advantages: f32[N]; None for log-probs and entropies.
            **options: those of linear_policy_loss, or of linear_logprob_entropy without advantages.

        Returns:
            Logits [..., V] of the weight's dtype, or (logp, entropy), or (loss, PolicyStats).

        Raises:
            ValueError: options or advantages without targets.
            TypeError: an option that belongs to the module.
            Exception: whatever linear_logprob_entropy and linear_policy_loss raise.
        """
        if targets is None:
            if advantages is not None or options:
                raise ValueError(
                    f"LMHead got {sorted(options) or 'advantages'} but no targets; pass the token ids "
                    "to score, or hidden alone for logits"
                )
            return super().forward(hidden)
        clash = [name for name in ("bias", "softcap", "logit_scale") if name in options]
        if clash:
            raise TypeError(f"LMHead got {clash}, which belong to the module; set them when you create it")
        options["bias"], options["softcap"], options["logit_scale"] = self.bias, self.softcap, self.logit_scale
        if advantages is None:
            return score(hidden, self.weight, targets, head_options(options))
        return linear_policy_loss(hidden, self.weight, targets, advantages, **options)
