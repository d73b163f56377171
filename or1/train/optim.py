"""AdamW over master weights: gradient sums, clipping, and the check that skips non-finite updates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from or1.config import OptimConfig
from or1.dist.fsdp import local_shard, total_norm
from or1.dist.world import SINGLE, World
from or1.train.adam import round_stochastically
from or1.train.host_steps import Gradients, HostSteps
from or1.train.masters import MasterWeights, arithmetic_dtype


class UpdateResult(NamedTuple):
    """The result of one optimizer step.

    grad_norm  L2 norm over all parameters before clipping
    lr         learning rate of the step
    took       False if the step was skipped for a non-finite loss or gradient
    """

    grad_norm: float
    lr: float
    took: bool


class MasterAdamW(MasterWeights):
    """AdamW with fp32 arithmetic (fp64 for fp64 models), whatever the dtype of the model's parameters.

    Gradients are summed over backward passes in `optim.grad_dtype` until `step_if_finite` or `zero_grad`.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, world: World = SINGLE):
        super().__init__(model, config, world)
        self.on_host = HostSteps.of(self)
        self._sums: dict[int, Tensor] = {}
        if config.grad_dtype == "float32":
            for i, param in enumerate(self.params):
                if param.dtype not in (torch.float32, torch.float64):
                    param.register_post_accumulate_grad_hook(lambda p, i=i: self._sum_gradient(i, p))

    def _sum_gradient(self, i: int, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if grad is None:
            return
        if i in self._sums:
            self._sums[i] += grad
        else:
            self._sums[i] = grad.to(torch.float32)

    def main_grad(self, param: Tensor) -> Tensor | None:
        """Return the fp32 gradient sum of a parameter, tied or not, for a head that adds to the sum; None if none."""
        i = next((i for i, p in enumerate(self.params) if p is param), None)
        if i is None or self.world.size > 1 or self.config.grad_dtype != "float32" or param.dtype.itemsize > 2:
            return None
        if i not in self._sums:
            self._sums[i] = torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
        return self._sums[i]

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient sums by parameter name, without parameters that the loss does not reach."""
        found = {name: self._gradient(i) for i, name in enumerate(self.names)}
        return {name: grad for name, grad in found.items() if grad is not None}

    def _gradient(self, i: int) -> Tensor | None:
        grad = self._sums.get(i, self.params[i].grad)
        return None if grad is None else local_shard(grad)

    def _drop(self, i: int) -> None:
        self._sums.pop(i, None)
        self.params[i].grad = None

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._sums.clear()
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step_if_finite(self, loss: Tensor) -> UpdateResult:
        """Clip and update if loss and gradient norm are finite; else change nothing. Drop the gradients. Collective."""
        norm = total_norm(list(self.gradients().values()), self.world)
        lr = self.config.lr * min(1.0, (self.updates + 1) / max(self.config.warmup_steps, 1))
        took = self.world.all_agree(bool(torch.isfinite(norm) & torch.isfinite(loss)))
        if took:
            # As in torch's clip_grad_norm_: the small constant avoids a division by 0.
            scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            if self.on_host:
                self.on_host.step(self, Gradients(self._gradient, self._drop), scale, lr)
            else:
                for i in range(len(self.params)):
                    self._step_one(i, scale, lr)
            self.updates += 1
        self.zero_grad()
        return UpdateResult(float(norm), lr, took)

    def _step_one(self, i: int, scale: Tensor, lr: float) -> None:
        param, master = self.shards[i], self.masters[i]
        grad = self._gradient(i)
        if grad is None:
            return
        dtype, device = arithmetic_dtype(param), self.home(param)
        weight = param.to(device, dtype) if master is None else master
        grad = grad.to(device, dtype).mul_(scale.to(device))
        # One parameter at a time, and its gradient freed after use: copies of all would be the memory peak of the step.
        self._drop(i)
        self.rule.update(weight.detach(), grad, self.state_of(i), lr, self.decay_of(i))
        if master is None:
            weight = round_stochastically(weight, seed=self.updates * len(self.params) + i)
        if master is not param:
            param.copy_(weight)
