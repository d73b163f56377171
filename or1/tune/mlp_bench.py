"""The bench of the tiles in which long rows pass a gated MLP."""

# T packed tokens, K sampled tokens, H hidden, I intermediate

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from or1.model.memory import tile_mlps
from or1.tune.accuracy import Outputs
from or1.tune.bench import TorchBench
from or1.tune.case import Case, dtype_of
from or1.tune.options import DEFAULT_TILE

_TOKENS = 64


class _Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), with the names that `tile_mlps` looks for."""

    def __init__(self, case: Case):
        super().__init__()
        linear = partial(nn.Linear, bias=False, device=case.device, dtype=dtype_of(case))
        self.gate_proj = linear(case.hidden, case.intermediate)
        self.up_proj = linear(case.hidden, case.intermediate)
        self.down_proj = linear(case.intermediate, case.hidden)

    def forward(self, x: Tensor) -> Any:
        """Return float[..., H]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MlpBench(TorchBench):
    """Runs one MLP and its backward, with checkpointing if the run has that."""

    @cached_property
    def _parts(self) -> tuple[_Mlp, Tensor, Tensor, Tensor]:
        """The MLP, its input, the upstream gradient, and the sampled tokens."""
        case = self.case
        mlp = _Mlp(case)
        with torch.no_grad():
            for parameter in mlp.parameters():
                parameter.copy_(self.normal(*parameter.shape, scale=parameter.shape[1] ** -0.5))
        x_1TH = self.normal(1, case.mlp_tokens, case.hidden).requires_grad_()
        tokens_K = self.sample(case.mlp_tokens, _TOKENS)
        upstream_1TH = torch.zeros_like(x_1TH)
        upstream_1TH[0, tokens_K] = self.normal(len(tokens_K), case.hidden)
        return mlp, x_1TH, upstream_1TH, tokens_K

    def run(self, options: Mapping[str, Any]) -> None:
        """Compute the output and all gradients."""
        mlp, x_1TH, upstream_1TH, _ = self._parts
        vars(mlp).pop("forward", None)
        if tile := options.get("mlp_tile_tokens", DEFAULT_TILE):
            tile_mlps(cast(Any, mlp), tile)
        mlp.zero_grad()
        x_1TH.grad = None
        self._out_1TH = checkpoint(mlp, x_1TH, use_reentrant=False) if self.case.checkpointed else mlp(x_1TH)
        self._out_1TH.backward(upstream_1TH)

    def outputs(self) -> Outputs:
        """Return output and input gradient of the sampled tokens, and the gradients of the weights."""
        mlp, x_1TH, _, tokens_K = self._parts
        assert x_1TH.grad is not None
        weights = {name: p.grad for name, p in mlp.named_parameters() if p.grad is not None}
        return {"out": self._out_1TH.detach()[0, tokens_K], "dx": x_1TH.grad[0, tokens_K], **weights}

    def exact(self, dtype: torch.dtype) -> Outputs:
        """Return the same from the sampled tokens alone."""
        mlp, x_1TH, upstream_1TH, tokens_K = self._parts
        weights = {name: p.detach().to(dtype).requires_grad_() for name, p in mlp.named_parameters()}
        x_KH = x_1TH.detach()[0, tokens_K].to(dtype).requires_grad_()
        gate, up, down = (weights[f"{part}_proj.weight"] for part in ("gate", "up", "down"))
        out_KH = (nn.functional.silu(x_KH @ gate.T) * (x_KH @ up.T)) @ down.T
        grads = torch.autograd.grad(out_KH, (x_KH, *weights.values()), upstream_1TH[0, tokens_K].to(dtype))
        return {"out": out_KH.detach(), "dx": grads[0], **dict(zip(weights, grads[1:], strict=True))}
