"""Master weights and moments of a model, and how a checkpoint holds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from or1.config import OptimConfig
from or1.core.errors import OptimizerError
from or1.dist.fsdp import local_shard
from or1.dist.world import SINGLE, World
from or1.model.host_copies import host_buffer
from or1.train.adam import FLAT_KEYS, MOMENTS, State, make_rule

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

    With "offload", masters and moments are views of one buffer of host memory for each kind and dtype.
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
        self._rooms = _Rooms() if config.optimizer == "offload" else None
        self.masters = self._new_masters()
        self.states: list[State | None] = [None] * len(self.params)
        # Moments that exist, of parameters before their first update.
        self._reserved: dict[int, State] = {}

    def _new_masters(self) -> list[Tensor | None]:
        """Return each parameter, or a copy in the optimizer's dtype and place; None to make one for each update."""
        own = [p.dtype == arithmetic_dtype(p) and p.device == self.home(p) for p in self.shards]
        passing = [self.config.weights == "stochastic" and p.dtype != arithmetic_dtype(p) for p in self.shards]
        copied = [p for p, mine, brief in zip(self.shards, own, passing, strict=True) if not (mine or brief)]
        if self._rooms is not None:
            # Only masters travel to the device. To lock the moments' memory too would take time and gain nothing.
            self._rooms.open("master", copied, pin=any(p.is_cuda for p in copied))
        masters: list[Tensor | None] = []
        for param, mine, brief in zip(self.shards, own, passing, strict=True):
            masters.append(param if mine else None if brief else self._new_master(param))
        return masters

    def _new_master(self, param: Tensor) -> Tensor:
        if self._rooms is None:
            return param.detach().to(self.home(param), arithmetic_dtype(param), copy=True)
        return self._rooms.take("master", param).copy_(param.detach())

    @torch.no_grad()
    def reserve(self) -> None:
        """Make the moments of every parameter now. Without this call each is made in the parameter's first update.

        An engine in the same process takes what is left of the device's memory, so the moments must exist before.
        """
        missing = [i for i, state in enumerate(self.states) if state is None and i not in self._reserved]
        if self._rooms is not None:
            for key in MOMENTS:
                self._rooms.open(key, [self.shards[i] for i in missing], pin=False)
        for i in missing:
            self._reserved[i] = self._new_state(i)

    def _new_state(self, i: int) -> State:
        param = self.shards[i]
        # Only a form: no value of this tensor is read. One exists at a time.
        state = self.rule.new_state(torch.empty(param.shape, dtype=arithmetic_dtype(param), device=self.home(param)))
        if self._rooms is not None:
            state |= {key: self._rooms.take(key, param).zero_() for key in MOMENTS}
        return state

    def state_of(self, i: int) -> State:
        """Return the moments of a parameter for its update; zeros before the first."""
        state = self.states[i]
        if state is None:
            state = self.states[i] = self._reserved.pop(i, None) or self._new_state(i)
        return state

    def decay_of(self, i: int) -> float:
        """Return the weight decay of a parameter."""
        # Biases and norm gains are vectors; decaying them pulls activations towards zero.
        return self.config.weight_decay if self.shards[i].ndim >= 2 else 0.0

    def resident_bytes(self) -> dict[str, int]:
        """Return the bytes on the parameters' devices of weights, masters and moments that exist, and of gradients.

        Gradients are those of a whole update: they exist from its first row to its end.
        """
        pairs = list(zip(self.shards, self.masters, strict=True))
        states = [s for s in (*self.states, *self._reserved.values()) if s is not None]
        device = {p.device for p in self.shards}
        flat = (t for s in states for t in self.rule.flatten(s).values())
        wide = 4 if self.config.grad_dtype == "float32" else 2
        return {
            "weights": sum(p.nbytes for p in self.shards),
            "masters": sum(m.nbytes for p, m in pairs if m is not None and m is not p and m.device == p.device),
            "moments": sum(t.nbytes for t in flat if t.device in device),
            "gradients": sum(p.numel() * max(p.element_size(), wide) for p in self.shards),
        }

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
            self._load_state(i, state)

    def _load_state(self, i: int, saved: dict[str, Tensor]) -> None:
        state = self.states[i]
        if saved:
            self.states[i] = self.rule.restore(state or self._reserved.pop(i, None) or self._new_state(i), saved)
        elif state is not None:
            # Back to before the first update. The memory stays taken: an engine has taken the rest.
            for value in self.rule.flatten(state).values():
                value.zero_()
            self.states[i], self._reserved[i] = None, state


class _Rooms:
    """Flat buffers in host memory: all masters, all first moments, all second moments, without a byte between.

    A parameter at a time, the memory of a large model would be thousands of blocks, each rounded up by the allocator.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[str, torch.dtype], Tensor] = {}

    def open(self, kind: str, params: list[Tensor], pin: bool) -> None:
        """Allocate room for a tensor of `kind` for each of the parameters."""
        for dtype in {arithmetic_dtype(p) for p in params}:
            numel = sum(p.numel() for p in params if arithmetic_dtype(p) == dtype)
            self._free[kind, dtype] = host_buffer(numel, dtype, pin)

    def take(self, kind: str, param: Tensor) -> Tensor:
        """Return the next part of the room, in the shape of a parameter; without room left, memory of its own."""
        dtype = arithmetic_dtype(param)
        free = self._free.get((kind, dtype))
        if free is None or free.numel() < param.numel():
            return torch.empty(param.shape, dtype=dtype)
        self._free[kind, dtype] = free[param.numel() :]
        return free[: param.numel()].view(param.shape)


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of the optimizer's arithmetic: fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(param.dtype, torch.float32)
