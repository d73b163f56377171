"""Policy objectives: each maps token log-probabilities to (loss, dloss/dlogp), one value a token.

The LM head needs only the slope g = dloss/dlogp of an objective. A new objective is one function of `_Terms` and one
line in `_SURROGATES`; kernels/README.md lists all steps.

Legend: N tokens. Log-probs of the sampled token, in nats:
    lp       under the current policy
    old      under the policy that the clip compares with
    rollout  as the engine sampled the token
    ref      under the reference model
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

K3_MAX = 10.0
"""Upper bound on k3 of a token, as in the released code. Without the bound, one token that is e^89 times as likely
under the reference model makes a whole update infinite."""


@dataclass(frozen=True)
class PolicyObjective:
    """Kind of token loss, and its constants.

    kind        "ppo_clip": PPO with separate clip bounds (DAPO's clip-higher, arXiv:2503.14476 eq. 8);
                "cispo": REINFORCE weighted by a clipped, detached ratio (arXiv:2506.13585 eq. 4-5)
    clip_low    the ratio is clipped below at 1 - clip_low
    clip_high   the ratio is clipped above at 1 + clip_high
    kl_coef     weight of the k3 estimate of KL(policy || reference), clamped at K3_MAX; needs ref_logp unless 0
    is_cap      cap C of the truncated importance weight min(exp(old - rollout), C). The weight corrects for an engine
                whose log-probs differ from the trainer's; needs rollout_logp. None: no correction

    Raises ValueError for a value outside these limits.
    """

    kind: str = "ppo_clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    is_cap: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _SURROGATES:
            raise ValueError(f"objective.kind is {self.kind!r}; it must be one of {sorted(_SURROGATES)}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(
                f"objective.clip_low is {self.clip_low}; a ratio is clipped below at 1 - clip_low >= 0, "
                "so choose it in [0, 1]"
            )
        for name in ("clip_high", "kl_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; it must be at least 0")
        if self.is_cap is not None and not self.is_cap > 0:
            raise ValueError(f"objective.is_cap is {self.is_cap}; it must be above 0, or None for no correction")


def as_objective(given: PolicyObjective | str | None) -> PolicyObjective:
    """Return a PolicyObjective: the given one, one of the given kind, or the default for None.

    Raises TypeError for another type, ValueError for an unknown kind.
    """
    if given is None:
        return PolicyObjective()
    if isinstance(given, str):
        return PolicyObjective(kind=given)
    if not isinstance(given, PolicyObjective):
        raise TypeError(
            f"objective is {given!r}, a {type(given).__name__}; pass a PolicyObjective, or its kind as "
            f"text, one of {sorted(_SURROGATES)}"
        )
    return given


class TokenLoss(NamedTuple):
    """Loss of each token, slope dloss/dlogp, ratio exp(lp - old), and clipped: bool[N], the clip changed the token."""

    loss_N: Tensor
    slope_N: Tensor
    ratio_N: Tensor
    clipped_N: Tensor


class _Terms(NamedTuple):
    logp_N: Tensor
    ratio_N: Tensor
    advantages_N: Tensor
    low: float
    high: float


def _ppo_clip(t: _Terms) -> TokenLoss:
    clamped_N = t.ratio_N.clamp(t.low, t.high)
    loss_N = -torch.minimum(t.ratio_N * t.advantages_N, clamped_N * t.advantages_N)
    up_N = (t.advantages_N > 0) & (t.ratio_N > t.high)
    down_N = (t.advantages_N < 0) & (t.ratio_N < t.low)
    clipped_N = up_N | down_N
    slope_N = torch.where(clipped_N, 0.0, -t.ratio_N * t.advantages_N)
    return TokenLoss(loss_N, slope_N, t.ratio_N, clipped_N)


def _cispo(t: _Terms) -> TokenLoss:
    weight_N = t.ratio_N.detach().clamp(t.low, t.high)
    slope_N = -weight_N * t.advantages_N
    clipped_N = (t.ratio_N < t.low) | (t.ratio_N > t.high)
    return TokenLoss(slope_N * t.logp_N, slope_N, t.ratio_N, clipped_N)


_SURROGATES: dict[str, Callable[[_Terms], TokenLoss]] = {"ppo_clip": _ppo_clip, "cispo": _cispo}


def token_loss(
    objective: PolicyObjective,
    logp_N: Tensor,
    advantages_N: Tensor,
    *,
    old_logp_N: Tensor | None = None,
    rollout_logp_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
) -> TokenLoss:
    """Return loss and slope of every token, not summed, masked or normalised. loss_N is differentiable as well.

    All tensors are f32[N] or f64[N], log-probs in nats. old_logp None means on-policy: old = lp, detached, so the
    ratio is exactly 1. is_cap multiplies the advantage by the constant min(exp(old - rollout), is_cap). kl_coef adds
    kl_coef * min(exp(ref - lp) - (ref - lp) - 1, K3_MAX), Schulman's k3 estimate, without a slope beyond the bound.

    Raises ValueError if the objective needs rollout_logp or ref_logp and the log-probs are missing.
    """
    check_inputs(objective, rollout_logp_N, ref_logp_N)
    anchor_N = (logp_N if old_logp_N is None else old_logp_N).detach()
    weighted_N = advantages_N
    if objective.is_cap is not None:
        rollout_N = _rollout_of(objective, rollout_logp_N)
        weighted_N = advantages_N * (anchor_N - rollout_N).exp().clamp_max(objective.is_cap)
    ratio_N = (logp_N - anchor_N).exp()
    terms = _Terms(logp_N, ratio_N, weighted_N, 1 - objective.clip_low, 1 + objective.clip_high)
    out = _SURROGATES[objective.kind](terms)
    if objective.kl_coef == 0:
        return out
    # A larger gap exceeds the bound anyway, and e^89 would be inf in float32.
    gap_N = (_ref_of(objective, ref_logp_N) - logp_N).clamp(-2 * K3_MAX, 2 * K3_MAX)
    rise_N = gap_N.expm1()
    k3_N = rise_N - gap_N
    return out._replace(
        loss_N=out.loss_N + objective.kl_coef * k3_N.clamp_max(K3_MAX),
        slope_N=out.slope_N - objective.kl_coef * torch.where(k3_N > K3_MAX, 0.0, rise_N),
    )


def check_inputs(objective: PolicyObjective, rollout_logp_N: Tensor | None, ref_logp_N: Tensor | None) -> None:
    """Raise ValueError if a log-prob that the objective reads is missing."""
    if objective.is_cap is not None:
        _rollout_of(objective, rollout_logp_N)
    if objective.kl_coef != 0:
        _ref_of(objective, ref_logp_N)


def _rollout_of(objective: PolicyObjective, rollout_logp_N: Tensor | None) -> Tensor:
    if rollout_logp_N is None:
        raise ValueError(
            f"objective.is_cap is {objective.is_cap} but rollout_logp is missing; pass the engine's "
            "log-probs or set is_cap=None"
        )
    return rollout_logp_N


def _ref_of(objective: PolicyObjective, ref_logp_N: Tensor | None) -> Tensor:
    if ref_logp_N is None:
        raise ValueError(
            f"objective.kl_coef is {objective.kl_coef} but ref_logp is missing; pass the reference "
            "model's log-probs or set kl_coef=0"
        )
    return ref_logp_N
