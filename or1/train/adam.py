"""AdamW of one weight, with moments in full precision or 8 bits, and stochastic rounding to bf16."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from or1.config import OptimConfig
from or1.core.errors import OptimizerError

# The block of bitsandbytes and torchao. Below the second size 8 bits save too little for their error.
_BLOCK, _MIN_QUANTIZED = 256, 4096

State = dict[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")
# Keys that the `flatten` of a rule may return.
FLAT_KEYS = ("step", "exp_avg", "exp_avg_sq", "exp_avg.codes", "exp_avg.scale", "exp_avg_sq.codes", "exp_avg_sq.scale")


class Rule(Protocol):
    """The update rule of one weight. A state is a dict of tensors, which `flatten` makes plain for a checkpoint."""

    def new_state(self, weight: Tensor) -> State:
        """Return the state before the first update."""

    def update(self, weight: Tensor, grad: Tensor, state: State, lr: float, weight_decay: float) -> None:
        """Take one step of AdamW (arXiv 1711.05101, Algorithm 2) on `weight` and `state`, in place."""

    def flatten(self, state: State) -> dict[str, Tensor]:
        """Return plain tensors that hold the state exactly."""

    def restore(self, state: State, tensors: dict[str, Tensor]) -> State:
        """Return `state` with the values of the state that `flatten` was given, in place.

        Raises OptimizerError for tensors of another kind of state.
        """


def make_rule(config: OptimConfig) -> Rule:
    """Return the rule of `optim.optimizer`. Raises OptimizerError if its library is missing."""
    if config.optimizer != "adamw8bit":
        return FullAdamW(config)
    if importlib.util.find_spec("torchao") is None:
        raise OptimizerError(
            'optim.optimizer = "adamw8bit" needs torchao; pip install "or1[torchao]", or use "adamw" or "offload"'
        )
    return AdamW8bit(config)


class FullAdamW:
    """AdamW with moments of the weight's dtype."""

    def __init__(self, config: OptimConfig):
        self.config = config

    def new_state(self, weight: Tensor) -> State:
        # A fused update counts its steps on the device, so that the host does not wait for the device.
        step = torch.zeros((), dtype=torch.float32, device=weight.device if self._fused(weight) else "cpu")
        return {"step": step, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def update(self, weight: Tensor, grad: Tensor, state: State, lr: float, weight_decay: float) -> None:
        beta1, beta2 = self.config.betas
        adamw(
            [weight],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            fused=self._fused(weight),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.config.eps,
            maximize=False,
        )

    def flatten(self, state: State) -> dict[str, Tensor]:
        return dict(state)

    def restore(self, state: State, tensors: dict[str, Tensor]) -> State:
        return _fill(state, self.flatten(state), tensors)

    def _fused(self, weight: Tensor) -> bool:
        return weight.is_cuda or self.config.optimizer == "offload"


class AdamW8bit:
    """AdamW with moments in torchao's blocks of 256 values of 8 bits and one fp32 scale (arXiv 2110.02861).

    Small weights, and weights that do not divide into blocks, have full moments.
    """

    def __init__(self, config: OptimConfig):
        self.config = config

    def new_state(self, weight: Tensor) -> State:
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": _moment(weight, signed=True),
            "exp_avg_sq": _moment(weight, signed=False),
        }

    def update(self, weight: Tensor, grad: Tensor, state: State, lr: float, weight_decay: float) -> None:
        state["step"] += 1
        beta1, beta2 = self.config.betas
        _adam_of(weight.is_cuda)(
            weight,
            grad,
            state["step"],
            state["exp_avg"],
            state["exp_avg_sq"],
            None,
            torch.tensor(lr, dtype=torch.float32),
            beta1,
            beta2,
            weight_decay,
            self.config.eps,
            IS_ADAMW=True,
            BF16_STOCHASTIC_ROUND=False,
        )

    def flatten(self, state: State) -> dict[str, Tensor]:
        flat = {"step": state["step"]}
        for key in MOMENTS:
            moment = state[key]
            # The third part, the map from code to value, is constant.
            parts = (
                {".codes": _part(moment, "codes"), ".scale": _part(moment, "scale")}
                if _quantized(moment)
                else {"": moment}
            )
            flat |= {key + part: tensor for part, tensor in parts.items()}
        return flat

    def restore(self, state: State, tensors: dict[str, Tensor]) -> State:
        return _fill(state, self.flatten(state), tensors)


def _quantized(moment: Tensor) -> bool:
    return hasattr(moment, "codes")


def _part(moment: Tensor, name: str) -> Tensor:
    # An attribute of torchao's subclass of Tensor.
    part: Tensor = getattr(moment, name)
    return part


def _moment(weight: Tensor, signed: bool) -> Tensor:
    if weight.numel() < _MIN_QUANTIZED or weight.numel() % _BLOCK:
        return torch.zeros_like(weight)
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit.zeros(weight.shape, signed, _BLOCK, weight.device, dtype=weight.dtype)


@functools.cache
def _adam_of(compiled: bool) -> Callable[..., None]:
    """Return torchao's update of one weight, compiled on the GPU, where eager mode holds many copies of the weight."""
    from torchao.optim.adam import single_param_adam

    if not compiled:
        return single_param_adam
    fast = torch.compile(single_param_adam, fullgraph=True, dynamic=False)

    @functools.wraps(single_param_adam)
    def update(*args: object, **kwargs: object) -> None:
        # Compiled for every shape. Some models have more shapes than torch.compile allows by default.
        with torch._dynamo.utils.disable_cache_limit():
            fast(*args, **kwargs)

    return update


def _fill(state: State, flat: dict[str, Tensor], tensors: dict[str, Tensor]) -> State:
    _require(flat.keys(), tensors)
    for key, value in flat.items():
        value.copy_(tensors[key])
    return state


def _require(keys: Iterable[str], tensors: dict[str, Tensor]) -> None:
    missing = sorted(set(keys) - tensors.keys())
    if missing:
        raise OptimizerError(
            f"the checkpoint has no {', '.join(missing)} but {', '.join(sorted(tensors))}: it is of another "
            "optim.optimizer; resume with the settings of the run"
        )


def round_stochastically(weight: Tensor, seed: int) -> Tensor:
    """Return a bf16 copy of an fp32 tensor: each value is rounded to a neighbour at random, unbiased.

    The bits depend on `seed` alone, so that a resumed run rounds as the first run did.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, weight.shape, generator=generator, device=weight.device, dtype=torch.int32)
    # bf16 is the upper half of fp32: noise below carries into it as often as the lower half demands.
    return noise.add_(weight.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
