"""The bench of the LM head: policy loss, log-probs and both gradients, for implementations, presets and chunk sizes."""

# N rows, K sampled rows, H hidden, V vocab, S sampled tokens of the vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from or1.tune.accuracy import Outputs
from or1.tune.bench import TorchBench
from or1_kernels import PolicyObjective, linear_policy_loss, reference

_ROWS, _TOKENS = 64, 4096
# Rows of the weight that are converted to fp64 at once.
_PART = 16384
_ENTROPY_COEF = 0.002


@dataclass
class _Inputs:
    hidden_NH: Tensor
    weight_VH: Tensor
    targets_N: Tensor
    advantages_N: Tensor
    token_weight_N: Tensor
    rows_K: Tensor
    tokens_S: Tensor


class HeadBench(TorchBench):
    """Runs `linear_policy_loss` and its backward."""

    @cached_property
    def _in(self) -> _Inputs:
        case = self.case
        n, h, v = case.head_tokens, case.hidden, case.vocab
        hidden_NH = self.normal(n, h).requires_grad_()
        weight_VH = self.normal(v, h, scale=4 / h**0.5).requires_grad_()
        targets_N = torch.randint(v, (n,), generator=self.random, device=self.device)
        rows_K = self.sample(n, _ROWS)
        with torch.no_grad():
            # Half of the sampled rows get their most likely token: p is then not always near 0.
            likely_K = (hidden_NH[rows_K] @ weight_VH.T).argmax(-1)
        targets_N[rows_K[::2]] = likely_K[::2]
        token_weight_N = torch.zeros(n, dtype=self._acc, device=self.device)
        token_weight_N[rows_K] = 1.0 / len(rows_K)
        advantages_N = torch.randn(n, generator=self.random, device=self.device).to(self._acc)
        tokens_S = torch.cat([self.sample(v, _TOKENS), targets_N[rows_K]]).unique()
        return _Inputs(hidden_NH, weight_VH, targets_N, advantages_N, token_weight_N, rows_K, tokens_S)

    @property
    def _acc(self) -> torch.dtype:
        return torch.float64 if self.case.dtype == "float64" else torch.float32

    @property
    def _coef(self) -> float:
        # Exactly 0 without a bonus: an implementation may have a shorter way then.
        return _ENTROPY_COEF if self.case.entropy else 0.0

    def run(self, options: Mapping[str, Any]) -> None:
        """Compute loss and gradients."""
        inputs, case = self._in, self.case
        inputs.hidden_NH.grad = inputs.weight_VH.grad = None
        loss, self._stats = linear_policy_loss(
            inputs.hidden_NH,
            inputs.weight_VH,
            inputs.targets_N,
            inputs.advantages_N,
            token_weight=inputs.token_weight_N,
            objective=PolicyObjective(kind=case.objective),
            entropy_coef=self._coef,
            temperature=case.temperature,
            softcap=case.softcap,
            logit_scale=case.logit_scale,
            **head_options(options),
        )
        loss.backward()

    def outputs(self) -> Outputs:
        """Return log-probs, entropies and gradients of the sampled rows and tokens."""
        inputs = self._in
        dhidden_NH, dweight_VH = inputs.hidden_NH.grad, inputs.weight_VH.grad
        assert dhidden_NH is not None and dweight_VH is not None
        others_N = torch.ones(len(dhidden_NH), dtype=torch.bool, device=self.device)
        others_N[inputs.rows_K] = False
        return {
            "logp": self._stats.logp[inputs.rows_K],
            "entropy": self._stats.entropy[inputs.rows_K],
            "dhidden": dhidden_NH[inputs.rows_K],
            "dweight": dweight_VH[inputs.tokens_S],
            # Rows without weight must get no gradient.
            "others": dhidden_NH[others_N].abs().amax().reshape(1) if bool(others_N.any()) else dhidden_NH[:0, 0],
        }

    def exact(self, dtype: torch.dtype) -> Outputs:
        """Return the same from full logits of the sampled rows, with autograd through the definition."""
        inputs = self._in
        hidden_KH = inputs.hidden_NH.detach()[inputs.rows_K].to(dtype)
        weight_VH = inputs.weight_VH.detach()
        parts = [hidden_KH @ part.to(dtype).T for part in weight_VH.split(_PART)]
        raw_KV = torch.cat(parts, 1).requires_grad_()
        z_KV = raw_KV * self.case.logit_scale
        if self.case.softcap is not None:
            z_KV = self.case.softcap * torch.tanh(z_KV / self.case.softcap)
        logp_K, entropy_K = reference.logprob_entropy(z_KV / self.case.temperature, inputs.targets_N[inputs.rows_K])
        loss, _ = reference.policy_loss(
            logp_K,
            entropy_K,
            inputs.advantages_N[inputs.rows_K].to(dtype),
            token_weight_N=inputs.token_weight_N[inputs.rows_K].to(dtype),
            objective=PolicyObjective(kind=self.case.objective),
            entropy_coef=self._coef,
        )
        (draw_KV,) = torch.autograd.grad(loss, raw_KV)
        dhidden_KH = torch.zeros_like(hidden_KH)
        for draw_KP, part in zip(draw_KV.split(_PART, 1), weight_VH.split(_PART), strict=True):
            dhidden_KH += draw_KP @ part.to(dtype)
        others = 1 if len(inputs.rows_K) < len(inputs.hidden_NH) else 0
        return {
            "logp": logp_K.detach(),
            "entropy": entropy_K.detach(),
            "dhidden": dhidden_KH,
            "dweight": draw_KV[:, inputs.tokens_S].T @ hidden_KH,
            "others": torch.zeros(others, dtype=dtype, device=self.device),
        }


def head_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the head for values of `or1.tune.choice.Choice`."""
    names = {"head_impl": "impl", "head_preset": "preset", "head_chunk_rows": "chunk_rows"}
    return {option: values[name] for name, option in names.items() if name in values}
