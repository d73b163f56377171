"""Policy objectives: each maps token log-probabilities to (loss, dloss/dlogp), one value a token.

The LM head needs only the slope g = dloss/dlogp of an objective. A new objective is one function of `_Terms` and one
line in `_SURROGATES`; kernels/README.md lists all steps, docs/objectives.md compares the objectives.

Legend: N tokens; y a sequence and |y| its tokens. Log-probs of the sampled token, in nats:
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
                "cispo": REINFORCE weighted by a clipped, detached ratio (arXiv:2506.13585 eq. 4-5);
                "gspo": PPO's clip of the sequence's ratio (arXiv:2507.18071 eq. 5 and 14), see `sequence_ratio`
    clip_low    the ratio is clipped below at 1 - clip_low
    clip_high   the ratio is clipped above at 1 + clip_high
    kl_coef     weight of the k3 estimate of KL(policy || reference), clamped at K3_MAX; needs ref_logp unless 0
    is_cap      upper bound C of the importance weight rho = exp(old - rollout). The weight corrects for an engine
                whose log-probs differ from the trainer's; needs rollout_logp. None: no correction
    is_floor    lower bound of the weight; 0: none. Needs is_cap
    is_mask     treatment of a weight outside [is_floor, is_cap]. False: moved to the bound (`truncated_weight`).
                True: 0 (`masked_weight`), so the token has no policy gradient

    Raises ValueError for a value outside these limits.
    """

    kind: str = "ppo_clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    is_cap: float | None = None
    is_floor: float = 0.0
    is_mask: bool = False

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
        if self.is_cap is None and (self.is_floor or self.is_mask):
            raise ValueError(
                f"objective.is_floor is {self.is_floor} and is_mask {self.is_mask}, but is_cap is None; set is_cap, or "
                "math.inf for no upper bound"
            )
        if self.is_cap is not None and not 0 <= self.is_floor <= self.is_cap:
            raise ValueError(f"objective.is_floor is {self.is_floor}; it must lie in [0, is_cap = {self.is_cap}]")


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
    """Loss of each token, with its slope.

    loss_N     differentiable
    slope_N    dloss/dlogp
    ratio_N    exp(lp - old), or that of the token's sequence for "gspo"
    clipped_N  bool[N]: the clip changed the token
    """

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


# GSPO is PPO's clip with another ratio.
_SURROGATES: dict[str, Callable[[_Terms], TokenLoss]] = {"ppo_clip": _ppo_clip, "cispo": _cispo, "gspo": _ppo_clip}


def truncated_weight(ratio_N: Tensor, floor: float, cap: float) -> Tensor:
    """Return min(max(rho, floor), cap): truncated importance sampling (TIS; Yao et al. 2025, fengyao.notion.site).

    TRL calls this "token_truncate". A nan stays nan.
    """
    return ratio_N.clamp(floor, cap)


def masked_weight(ratio_N: Tensor, floor: float, cap: float) -> Tensor:
    """Return rho where floor <= rho <= cap, else 0. A nan stays nan.

    With both bounds this is IcePop's M(rho; alpha, beta) (Ring-1T, arXiv:2510.18855; INTELLECT-3, arXiv:2512.16144
    eq. 1). With floor 0 this is masked importance sampling, MIS (Liu et al. 2025, richardli.xyz/rl-collapse), which
    TRL calls "token_mask".
    """
    return torch.where((ratio_N < floor) | (ratio_N > cap), 0.0, ratio_N)


def engine_weight(objective: PolicyObjective, anchor_N: Tensor, rollout_N: Tensor) -> Tensor:
    """Return the importance weight of every token, of rho = exp(anchor - rollout). Raises ValueError without is_cap.

    anchor_N  log-probs of the trainer's policy that rollout_N, the engine's log-probs, stand for
    """
    if objective.is_cap is None:
        raise ValueError("objective.is_cap is None, so there is no importance weight; set is_cap")
    weigh = masked_weight if objective.is_mask else truncated_weight
    return weigh((anchor_N - rollout_N).exp(), objective.is_floor, objective.is_cap)


def sequence_ratio(logp_N: Tensor, old_N: Tensor, sequences_N: Tensor) -> Tensor:
    """Return GSPO's ratio of each token: s = exp(1/|y| sum over t of y of (lp_t - old_t)), in value.

    The token form (arXiv:2507.18071 eq. 14): s_t = sg[s] exp(lp_t - sg[lp_t]), whose derivative by lp_t is s. The mean
    of s_t over the tokens of y has the gradient of s itself.

    sequences_N  i64[N], tokens of equal number form a sequence
    """
    # Numbers below N, found without a look at their values: on a GPU the host would wait for them.
    sorted_N, order_N = sequences_N.sort()
    starts_N = torch.zeros_like(sorted_N)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    slots_N = torch.empty_like(starts_N).index_copy_(0, order_N, starts_N.cumsum(0))
    drift_N = (logp_N - old_N).detach().double()
    totals_N, counts_N = (torch.zeros_like(drift_N) for _ in range(2))
    totals_N.index_add_(0, slots_N, drift_N)
    counts_N.index_add_(0, slots_N, torch.ones_like(drift_N))
    mean_N = (totals_N / counts_N.clamp_min(1))[slots_N].to(logp_N.dtype)
    return (mean_N + logp_N - logp_N.detach()).exp()


def token_loss(
    objective: PolicyObjective,
    logp_N: Tensor,
    advantages_N: Tensor,
    *,
    old_logp_N: Tensor | None = None,
    rollout_logp_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    sequences_N: Tensor | None = None,
) -> TokenLoss:
    """Return loss and slope of every token, not summed, masked or normalised. loss_N is differentiable as well.

    is_cap multiplies the advantage by the constant `engine_weight`. kl_coef adds kl_coef * min(k3, K3_MAX), where
    k3 = exp(ref - lp) - (ref - lp) - 1 is Schulman's estimate (joschu.net/blog/kl-approx.html). Beyond the bound the
    estimate has no slope.

    Args:
        objective: kind and constants; the class names the paper and equation of every kind.
        logp_N: f32[N] or f64[N], nats, under the current policy.
        advantages_N: of the same dtype.
        old_logp_N: nats. None means on-policy: old = lp, detached, so the ratio is exactly 1.
        rollout_logp_N: nats, of the engine that sampled; needed for is_cap.
        ref_logp_N: nats, of the reference model; needed for kl_coef.
        sequences_N: i64[N], as in `sequence_ratio`; needed for "gspo" with old_logp_N.

    Returns:
        A TokenLoss, with tensors of logp_N's dtype.

    Raises:
        ValueError: an input that the objective needs is missing.
    """
    check_inputs(objective, rollout_logp_N, ref_logp_N)
    anchor_N = (logp_N if old_logp_N is None else old_logp_N).detach()
    weighted_N = advantages_N
    if objective.is_cap is not None:
        rollout_N = _rollout_of(objective, rollout_logp_N)
        weighted_N = advantages_N * engine_weight(objective, anchor_N, rollout_N)
    if needs_sequences(objective, old_logp_N):
        ratio_N = sequence_ratio(logp_N, anchor_N, _sequences_of(objective, sequences_N))
    else:
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


def needs_sequences(objective: PolicyObjective, old_logp_N: Tensor | None) -> bool:
    """Return True if the loss of a token depends on its whole sequence. On-policy the ratio of any sequence is 1."""
    return objective.kind == "gspo" and old_logp_N is not None


def _sequences_of(objective: PolicyObjective, sequences_N: Tensor | None) -> Tensor:
    if sequences_N is None:
        raise ValueError(
            f"objective.kind is {objective.kind!r} and old_logp is given, but sequences is missing; pass the number of "
            "each row's sequence, i64[N]"
        )
    return sequences_N


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
