"""objective.token_loss in Triton, for one token, and the logarithms and exponentials that objective needs.

tests/kernels/test_triton_policy.py holds the twin equal to objective.py: value, slope, ratio and clipped, all options.
"""

import triton
import triton.language as tl

from ..objective import K3_MAX, PolicyObjective

KINDS = ("ppo_clip", "cispo")

_LOG2E = tl.constexpr(1.4426950408889634)
_K3_MAX = tl.constexpr(K3_MAX)


def cap_of(objective: PolicyObjective) -> int:
    """Return 0 for no importance weight, 1 for a truncated one, 2 for a masked one."""
    return 0 if objective.is_cap is None else 2 if objective.is_mask else 1


@triton.jit
def exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def log(u):
    """Return log u of a normal u > 0, within a few units of rounding; tl.log is not near 1 on a GPU."""
    bits = u.to(tl.int32, bitcast=True)
    power = (bits >> 23) - 127
    m = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    large = m > 1.4142135
    m = tl.where(large, m * 0.5, m)
    power = tl.where(large, power + 1, power).to(tl.float32)
    s = (m - 1) / (m + 1)
    out = power * 0.6931471805599453 + _atanh2(s)
    # inf and nan have no such bits.
    return tl.where(u < float("inf"), out, u)


@triton.jit
def _atanh2(s):
    """Return 2 atanh s for |s| <= 1 / 3."""
    q = s * s
    p = 1.0 / 15 + q * (1.0 / 17)
    p = 1.0 / 11 + q * (1.0 / 13 + q * p)
    p = 1.0 / 7 + q * (1.0 / 9 + q * p)
    p = 1.0 / 3 + q * (1.0 / 5 + q * p)
    return 2 * s + 2 * s * q * p


@triton.jit
def log1p(x):
    """Return log(1 + x) for x >= 0, exact near 0."""
    return tl.where(x < 1, _atanh2(x / (2 + x)), log(1 + x))


@triton.jit
def expm1(x):
    near = x * (
        1 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040))))))
    )
    return tl.where(tl.abs(x) < 0.4, near, exp(x) - 1)


@triton.jit
def _least(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamped(x, low, high):
    return _least(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high)


@triton.jit
def token_loss(
    logp, advantage, logs, constants, KIND: tl.constexpr, HAS_OLD: tl.constexpr, CAP: tl.constexpr, HAS_KL: tl.constexpr
):
    """Return loss, slope, ratio and clipped.

    logs: old, rollout, ref; constants: low, high, kl_coef, is_floor, is_cap. CAP: see `cap_of`.
    """
    old, rollout, ref = logs
    low, high, kl_coef, is_floor, is_cap = constants
    anchor = old if HAS_OLD else logp
    if CAP == 1:
        advantage = advantage * _clamped(exp(anchor - rollout), is_floor, is_cap)
    if CAP == 2:
        weight = exp(anchor - rollout)
        advantage = advantage * tl.where((weight < is_floor) | (weight > is_cap), 0.0, weight)
    ratio = exp(logp - anchor)
    clamped = _clamped(ratio, low, high)
    if KIND == 0:
        loss = -_least(ratio * advantage, clamped * advantage)
        clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
        slope = tl.where(clipped, 0.0, -ratio * advantage)
    else:
        clipped = (ratio < low) | (ratio > high)
        slope = -clamped * advantage
        loss = slope * logp
    if HAS_KL:
        gap = _clamped(ref - logp, -2 * _K3_MAX, 2 * _K3_MAX)
        rise = expm1(gap)
        k3 = rise - gap
        loss = loss + kl_coef * _least(k3, _K3_MAX)
        slope = slope - kl_coef * tl.where(k3 > _K3_MAX, 0.0, rise)
    return loss, slope, ratio, clipped
