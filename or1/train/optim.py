"""AdamW over master weights: gradient sums, clipping, and the check that skips non-finite updates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from or1.config import OptimConfig
from or1.core.errors import OptimizerError
from or1.dist.fsdp import local_shard
from or1.dist.world import SINGLE, World
from or1.train.adam import FLAT_KEYS, State, make_rule, round_stochastically

# Longest first: "exp_avg." is a prefix of "exp_avg.codes." too.
_PREFIXES = sorted((f"{key}." for key in ("master", *FLAT_KEYS)), key=len, reverse=True)


class UpdateResult(NamedTuple):
    """The result of one optimizer step.

    grad_norm  L2 norm over all parameters before clipping
    lr         learning rate of the step
    took       False if the step was skipped for a non-finite loss or gradient
    """

    grad_norm: float
    lr: float
    took: bool


class MasterAdamW:
    """AdamW with fp32 arithmetic (fp64 for fp64 models), whatever the dtype of the model's parameters.

    A learning rate of 1e-6 moves a bf16 weight by less than its rounding step. An update that is rounded to nearest
    would be lost. So the optimizer keeps fp32 masters, or rounds the sum stochastically (`optim.weights`). fp32 and
    fp64 parameters are their own masters, at no cost. `optim.optimizer` selects the kind of the moments, and whether moments
    and masters are in host memory.

    Gradients are summed over backward passes in `optim.grad_dtype` until `step_if_finite` or `zero_grad`.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, world: World = SINGLE):
        self.config, self.world = config, world
        self.updates = 0
        self.rule = make_rule(config)
        if world.size > 1 and config.optimizer == "adamw8bit":
            raise OptimizerError(
                'optim.optimizer = "adamw8bit" quantises blocks that do not end where shards do; with '
                'several ranks the moments are sharded anyway: use "adamw" or "offload"'
            )
        if world.size > 1 and config.weights == "stochastic":
            raise OptimizerError(
                'optim.weights = "stochastic" saves fp32 masters, but the shards of several ranks are '
                'fp32 and their own masters: use "master"'
            )
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.params = [p for p in model.parameters() if p.requires_grad]
        # This rank's shards; the parameters themselves without sharding.
        self.shards = [local_shard(p) for p in self.params]
        self.masters = [self._new_master(p) for p in self.shards]
        self._states: list[State | None] = [None] * len(self.params)
        self._sums: dict[int, Tensor] = {}
        if config.grad_dtype == "float32":
            for i, param in enumerate(self.params):
                if param.dtype not in (torch.float32, torch.float64):
                    param.register_post_accumulate_grad_hook(lambda p, i=i: self._sum_gradient(i, p))

    def _new_master(self, param: Tensor) -> Tensor | None:
        """Return the parameter, or a copy in the optimizer's dtype and place; None to make one for each update."""
        dtype, device = _arithmetic_dtype(param), self._home(param)
        if param.dtype == dtype and param.device == device:
            return param
        if self.config.weights == "stochastic" and param.dtype != dtype:
            return None
        master = param.detach().to(device, dtype, copy=True)
        return master.pin_memory() if param.is_cuda and device.type == "cpu" else master

    def _home(self, param: Tensor) -> torch.device:
        return torch.device("cpu") if self.config.optimizer == "offload" else param.device

    def _sum_gradient(self, i: int, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if grad is None:
            return
        if i in self._sums:
            self._sums[i] += grad
        else:
            self._sums[i] = grad.to(torch.float32)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient sums by parameter name, without parameters that the loss does not reach."""
        found = {name: self._gradient(i) for i, name in enumerate(self.names)}
        return {name: grad for name, grad in found.items() if grad is not None}

    def _gradient(self, i: int) -> Tensor | None:
        grad = self._sums.get(i, self.params[i].grad)
        return None if grad is None else local_shard(grad)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._sums.clear()
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step_if_finite(self, loss: Tensor) -> UpdateResult:
        """Clip and update if loss and gradient norm are finite; else change nothing. Drop the gradients. Collective."""
        norm = _total_norm(list(self.gradients().values()), self.world)
        lr = self.config.lr * min(1.0, (self.updates + 1) / max(self.config.warmup_steps, 1))
        took = self.world.all_agree(bool(torch.isfinite(norm) & torch.isfinite(loss)))
        if took:
            # As in torch's clip_grad_norm_: the small constant avoids a division by 0.
            scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
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
        dtype, device = _arithmetic_dtype(param), self._home(param)
        weight = param.to(device, dtype) if master is None else master
        state = self._states[i] or self.rule.new_state(weight)
        self._states[i] = state
        grad = grad.to(device, dtype).mul_(scale.to(device))
        # One parameter at a time, and its gradient freed after use: copies of all would be the memory peak of the step.
        self._sums.pop(i, None)
        self.params[i].grad = None
        # Biases and norm gains are vectors; decaying them pulls activations towards zero.
        decay = self.config.weight_decay if param.ndim >= 2 else 0.0
        self.rule.update(weight.detach(), grad, state, lr, decay)
        if master is None:
            weight = round_stochastically(weight, seed=self.updates * len(self.params) + i)
        if master is not param:
            param.copy_(weight)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return weights and moments by parameter name, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, param, master, state in zip(self.names, self.shards, self.masters, self._states, strict=True):
            tensors[f"master.{name}"] = (param if master is None else master).detach()
            for key, value in self.rule.flatten(state).items() if state else ():
                tensors[f"{key}.{name}"] = value
        return tensors

    def state_rows(self) -> dict[str, int]:
        """Return the rows of the whole tensor for each of `state_tensors` that is sharded with several ranks."""
        whole = dict(zip(self.names, zip(self.params, self.shards, strict=True), strict=True))
        rows: dict[str, int] = {}
        for key, tensor in self.state_tensors().items():
            param, shard = whole[key.removeprefix(next(k for k in _PREFIXES if key.startswith(k)))]
            if tensor.shape == shard.shape and tensor.ndim:
                rows[key] = param.shape[0]
        return rows

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Restore what `state_tensors` returned, bit for bit.

        Raises KeyError for a missing parameter, OptimizerError for state of other optimizer settings.
        """
        self.updates = updates
        for i, (name, param, master) in enumerate(zip(self.names, self.shards, self.masters, strict=True)):
            weight, saved = param if master is None else master, tensors[f"master.{name}"]
            if saved.dtype != weight.dtype:
                raise OptimizerError(
                    f"the checkpoint's weights are {saved.dtype}, these settings keep {weight.dtype}: "
                    "it is of another optim.weights or model.dtype; resume with the run's settings"
                )
            if saved.shape != weight.shape:
                raise ValueError(f"master.{name} has shape {list(saved.shape)}, the model's has {list(weight.shape)}")
            weight.copy_(saved)
            if master is not None and master is not param:
                param.copy_(master)
            state = {key: tensors[f"{key}.{name}"] for key in FLAT_KEYS if f"{key}.{name}" in tensors}
            weight = weight.to(self._home(param), _arithmetic_dtype(param))
            self._states[i] = self.rule.restore(weight, state) if state else None


def _arithmetic_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _total_norm(grads: list[Tensor], world: World) -> Tensor:
    if world.size > 1:
        squares = torch.stack([g.square().sum(dtype=torch.float64) for g in grads]).sum()
        return world.sum(squares).sqrt()
    norms = [torch.linalg.vector_norm(g, dtype=_arithmetic_dtype(g)) for g in grads]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
