"""Master weights and moments of a model, and how a checkpoint holds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from or1.config import OptimConfig
from or1.core.errors import OptimizerError
from or1.dist.fsdp import local_shard
from or1.dist.world import SINGLE, World
from or1.train.adam import FLAT_KEYS, State, make_rule

# Longest first: "exp_avg." is a prefix of "exp_avg.codes." too.
_PREFIXES = sorted((f"{key}." for key in ("master", *FLAT_KEYS)), key=len, reverse=True)


class MasterWeights:
    """The state of an optimizer: weights in its own dtype, and moments.

    A learning rate of 1e-6 moves a bf16 weight by less than its rounding step. An update that is rounded to nearest
    would be lost. So the optimizer keeps fp32 masters, or rounds the sum stochastically (`optim.weights`). fp32 and
    fp64 parameters are their own masters, at no cost. `optim.optimizer` selects the kind of the moments, and whether
    moments and masters are in host memory.

    names    of the trained parameters
    params   those parameters
    shards   this rank's part of each; the parameters themselves without sharding
    masters  the weight of each in the optimizer's dtype and place; None to make one for each update
    states   moments of each, None before its first update
    updates  optimizer steps taken
    """

    def __init__(self, model: nn.Module, config: OptimConfig, world: World = SINGLE):
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
        self.config, self.world = config, world
        self.updates = 0
        self.rule = make_rule(config)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.shards = [local_shard(p) for p in self.params]
        self.masters = [self._new_master(p) for p in self.shards]
        self.states: list[State | None] = [None] * len(self.params)

    def _new_master(self, param: Tensor) -> Tensor | None:
        """Return the parameter, or a copy in the optimizer's dtype and place; None to make one for each update."""
        dtype, device = arithmetic_dtype(param), self.home(param)
        if param.dtype == dtype and param.device == device:
            return param
        if self.config.weights == "stochastic" and param.dtype != dtype:
            return None
        master = param.detach().to(device, dtype, copy=True)
        return master.pin_memory() if param.is_cuda and device.type == "cpu" else master

    def home(self, param: Tensor) -> torch.device:
        """Return the device of a parameter's moments and master."""
        return torch.device("cpu") if self.config.optimizer == "offload" else param.device

    def state_tensors(self) -> dict[str, Tensor]:
        """Return weights and moments by parameter name, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, param, master, state in zip(self.names, self.shards, self.masters, self.states, strict=True):
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
            weight = weight.to(self.home(param), arithmetic_dtype(param))
            self.states[i] = self.rule.restore(weight, state) if state else None


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of the optimizer's arithmetic: fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(param.dtype, torch.float32)
