"""AdamW over fp32 master weights, gradient clipping, and the gate that refuses non-finite updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from or1.config import OptimConfig
from or1.dist import SINGLE, World
from or1.fsdp import local_shard


class UpdateResult(NamedTuple):
    """grad_norm: L2 norm over all parameters before clipping. lr: rate used. took: whether parameters changed."""

    grad_norm: float
    lr: float
    took: bool


class MasterAdamW:
    """AdamW whose state and weights are fp32 (fp64 for fp64 models), whatever the type of the model's parameters.

    A learning rate of 1e-6 moves a bf16 weight by less than its rounding step, so an update applied to bf16 weights
    alone would be lost. Parameters that are fp32 or fp64 already are their own masters and cost nothing more.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, world: World = SINGLE):
        self.config, self.world = config, world
        self.updates = 0
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters = [_master(p) for p in self.params]
        # Biases and norm gains are vectors; decaying them pulls activations towards zero.
        decay = [m for m in self.masters if m.ndim >= 2]
        plain = [m for m in self.masters if m.ndim < 2]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], config.lr, config.betas, config.eps)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for param, master in zip(self.params, self.masters, strict=True):
            param.grad = master.grad = None

    def step_if_finite(self, loss: Tensor) -> UpdateResult:
        """Clip, then update if loss and gradient norm are finite; else leave parameters, moments and schedule alone."""
        for param, master in zip(self.params, self.masters, strict=True):
            if master is not param and param.grad is not None:
                master.grad = local_shard(param.grad).to(master.dtype)
        # A parameter that the loss does not reach has no gradient; everything else must have one.
        grads = [m.grad for m in self.masters if m.grad is not None]
        norm = _total_norm(grads, self.world)
        lr = self.config.lr * min(1.0, (self.updates + 1) / max(self.config.warmup_steps, 1))
        took = self.world.all_agree(bool(torch.isfinite(norm) & torch.isfinite(loss)))
        if took:
            nn.utils.clip_grads_with_norm_(self.masters, self.config.grad_clip, norm)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.updates += 1
            self._publish()
        self.zero_grad()
        return UpdateResult(float(norm), lr, took)

    @torch.no_grad()
    def _publish(self) -> None:
        for param, master in zip(self.params, self.masters, strict=True):
            shard = local_shard(param)
            if shard.data_ptr() != master.data_ptr():
                shard.copy_(master)

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by parameter name, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master.{name}"] = master.detach()
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def state_rows(self) -> dict[str, int]:
        """Rows of the whole tensor, for those of `state_tensors` that are split over ranks where there are several."""
        rows: dict[str, int] = {}
        for name, param, master in zip(self.names, self.params, self.masters, strict=True):
            split = [key for key, value in self.adamw.state.get(master, {}).items() if value.ndim]
            rows |= {f"{key}.{name}": param.shape[0] for key in ("master", *split) if param.ndim}
        return rows

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Restore what `state_tensors` gave, bit for bit. Raises KeyError for a parameter that is missing."""
        self.updates = updates
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(tensors[f"master.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            state = {key: tensors[f"{key}.{name}"].clone() for key in keys if f"{key}.{name}" in tensors}
            if state:
                # torch keeps `step` on the host unless the optimizer is capturable; the moments live with the weight.
                state = {k: v if k == "step" else v.to(master.device) for k, v in state.items()}
                self.adamw.state[master] = state
        self._publish()


def _master(param: nn.Parameter) -> Tensor:
    shard = local_shard(param)
    return shard if shard.dtype in (torch.float32, torch.float64) else shard.detach().to(torch.float32, copy=True)


def _total_norm(grads: Sequence[Tensor], world: World) -> Tensor:
    if world.size == 1:
        return nn.utils.get_total_norm(grads)
    squares = [g.square().sum(dtype=torch.float64) for g in grads]
    return world.sum(torch.stack(squares).sum().reshape(1))[0].sqrt()
