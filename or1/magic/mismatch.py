"""Weights and masks of whole responses for an engine whose log-probs differ from the trainer's.

    rho_t = exp(trainer's logp_t - engine's logp_t)      of a token
    rho_y = product of rho_t over the tokens of y        of a response, `product_ratio`
    g_y   = rho_y ^ (1 / |y|)                            `geometric_ratio`

Weights of tokens are part of the objective (or1_kernels.objective.engine_weight). Those of a response are constants
known before the update, so they multiply the advantage: every objective is linear in a weight that is at least 0. A
masked response stays in the denominator of the loss, as in TRL; entropy bonus and KL term still act on its tokens.
"""

# L tokens of a response

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from or1.core.types import TrainSequence

if TYPE_CHECKING:
    from or1.config.loss import MismatchConfig
    from or1.magic.selection import Minibatch

# exp of a larger number is near the limit of fp64; no bound is.
_LARGEST = 700.0


def product_ratio(drift_L: np.ndarray) -> float:
    """Return rho_y = exp(sum of drift), the exact importance weight of a response.

    drift_L: float[L], trainer's logp - engine's logp. Liu et al. 2025 (richardli.xyz/rl-collapse); TRL's "sequence_*".
    """
    return float(np.exp(np.clip(drift_L.sum(), -_LARGEST, _LARGEST)))


def geometric_ratio(drift_L: np.ndarray) -> float:
    """Return g_y = exp(mean of drift), whose spread does not grow with the length. Liu et al. 2025; verl's seq_mean_k1.

    drift_L: float[L], trainer's logp - engine's logp; 1 for no token.
    """
    return float(np.exp(np.clip(drift_L.mean(), -_LARGEST, _LARGEST))) if len(drift_L) else 1.0


def truncated(ratio: float, lower: float | None, upper: float | None) -> float:
    """Return min(max(ratio, lower), upper): "sequence_tis", TRL's "sequence_truncate". None: no bound."""
    return float(np.clip(ratio, lower, upper)) if lower is not None or upper is not None else ratio


def masked(ratio: float, lower: float | None, upper: float | None) -> float:
    """Return ratio where lower <= ratio <= upper, else 0: "sequence_mis", TRL's "sequence_mask". None: no bound."""
    outside = (lower is not None and ratio < lower) or (upper is not None and ratio > upper)
    return 0.0 if outside else ratio


def geometric_mask(drift_L: np.ndarray, lower: float | None, upper: float | None) -> float:
    """Return 1 where lower <= g_y <= upper, else 0: "geometric", the Geo-Mask of Liu et al. 2025. None: no bound."""
    ratio = masked(geometric_ratio(drift_L), lower, upper)
    return ratio if np.isnan(ratio) else float(ratio != 0)


def sequence_weight(drift_L: np.ndarray, mismatch: MismatchConfig) -> float:
    """Return the weight of a response by `[loss.mismatch]`. Raises ValueError for a kind that weighs tokens."""
    lower, upper = mismatch.lower, mismatch.upper
    match mismatch.kind:
        case "sequence_tis":
            return truncated(product_ratio(drift_L), lower, upper)
        case "sequence_mis":
            return masked(product_ratio(drift_L), lower, upper)
        case "geometric":
            return geometric_mask(drift_L, lower, upper)
    raise ValueError(f"mismatch.kind is {mismatch.kind!r}, which weighs tokens; or1_kernels.objective does that")


def weigh(sequences: Sequence[TrainSequence], mismatch: MismatchConfig) -> list[TrainSequence]:
    """Return the sequences with the weight of each in its advantage. Tokens without an engine's log-prob are left out.

    Raises ValueError for a sequence without old_logp.
    """
    return [_weighed(sequence, mismatch) for sequence in sequences]


def _weighed(sequence: TrainSequence, mismatch: MismatchConfig) -> TrainSequence:
    if sequence.old_logp is None:
        raise ValueError(
            f'a sequence has no old_logp, which mismatch.kind = "{mismatch.kind}" compares with the engine; score the '
            "sequences first (or1.train.score.with_old_logp)"
        )
    known_L = np.isfinite(sequence.rollout_logp)
    drift_L = np.subtract(sequence.old_logp[known_L], sequence.rollout_logp[known_L], dtype=np.float64)
    weight = sequence_weight(drift_L, mismatch)
    return replace(sequence, weight=weight, advantage=sequence.advantage * weight)


def masked_shares(batches: Sequence[Minibatch], mismatch: MismatchConfig) -> dict[str, float]:
    """Return the shares of responses and of their known tokens that a mask of responses removed; else empty."""
    if not (mismatch.by_sequence and mismatch.masks):
        return {}
    sequences = [s for batch in batches for s in batch.sequences]
    gone = np.array([s.weight == 0 for s in sequences])
    tokens = np.array([s.known_tokens for s in sequences])
    return {
        "mismatch/masked_sequences": float(gone.mean()),
        "mismatch/masked_tokens": float(tokens[gone].sum() / tokens.sum()),
    }
