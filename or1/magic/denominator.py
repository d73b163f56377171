"""What the summed token losses of an update are divided by (Skywork-OR1 report, Eq. 3.1, and two alternatives)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

NormaliserKind = Literal["token", "sequence", "dr_grpo"]


@dataclass(frozen=True)
class Normaliser:
    """loss = sum_s sum_t w(|s|) l_st / (scale * sum_s units(|s|)), over sequences s of |s| trained tokens t.

    token     every token counts the same: l / sum |s|. Eq. 3.1, adopted by the report (MAGIC) and DAPO
    sequence  every response counts the same: (l / |s|) / number of responses. GRPO as first published
    dr_grpo   l / (number of responses * max_tokens), a constant. Dr.GRPO (arXiv:2503.20783)

    max_tokens  the response limit, read by dr_grpo alone
    scale       groups of a full minibatch over those of this one, to divide as the released code does; else 1

    units are additive, so sums over packed rows, minibatches and ranks give the same denominator.
    """

    kind: NormaliserKind = "token"
    max_tokens: int = 1
    scale: float = 1.0

    def units(self, length: int) -> float:
        """Return the share of a response of `length` tokens in the denominator."""
        share = {"token": length, "sequence": 1, "dr_grpo": self.max_tokens}[self.kind]
        return self.scale * share

    def weights(self, lengths_N: Tensor) -> Tensor:
        """Return the factor of each token's loss. lengths_N: tokens of its response, float[N]."""
        return 1.0 / lengths_N if self.kind == "sequence" else 0.0 * lengths_N + 1.0


TOKEN_MEAN = Normaliser()
"""Eq. 3.1."""
