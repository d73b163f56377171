"""AdamW in host memory for parameters on a GPU: gradients down, weights up, and the update between them, at once.

lane down  gradient 0 | gradient 1 | gradient 2 | ...
host                  | update 0   | update 1   | update 2 | ...
lane up                            | weight 0   | weight 1 | weight 2
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from or1.model.host_copies import Lane, Mark, host_buffer
from or1.train.adam import round_stochastically
from or1.train.masters import MasterWeights


class Gradients(NamedTuple):
    """How an optimizer gives away its gradients, by the parameter's index."""

    get: Callable[[int], Tensor | None]
    drop: Callable[[int], None]


class _Arriving(NamedTuple):
    """A gradient on its way to host memory: the parameter's index, the copy, and the mark of the copy's end."""

    i: int
    copy: Tensor
    mark: Mark


class HostSteps:
    """The update of an optimizer whose masters and moments are in host memory.

    Gradients arrive in two page-locked buffers in turn, each of the largest parameter's size. Weights leave from the
    page-locked masters themselves in fp32 and are rounded on the GPU. So nothing is converted on the way.
    """

    def __init__(self, device: torch.device, down: Lane, up: Lane):
        self._device, self._down, self._up = device, down, up
        self._staging: list[Tensor] = []

    @classmethod
    def of(cls, optimizer: MasterWeights) -> HostSteps | None:
        """Return the steps for an optimizer on a GPU with optim.optimizer = "offload", else None."""
        device = next((p.device for p in optimizer.shards if p.is_cuda), None)
        if device is None or optimizer.config.optimizer != "offload":
            return None
        return cls(device, Lane(device), Lane(device))

    def step(self, optimizer: MasterWeights, gradients: Gradients, scale: Tensor, lr: float) -> None:
        """Update every parameter that has a gradient, and drop the gradients.

        gradients  the gradient sum of a parameter by its index, None if the loss does not reach it; how to drop it
        scale      factor of the gradients, for clipping
        """
        # The only wait for the device: the norm has been read already, so its scale is there.
        scale = scale.cpu()
        waiting: _Arriving | None = None
        turn = 0
        for i in range(len(optimizer.params)):
            if (grad := gradients.get(i)) is None:
                continue
            buffer = self._buffer(optimizer, turn % 2)
            copy = buffer[: grad.nbytes].view(grad.dtype).view(grad.shape)
            arriving = _Arriving(i, copy, self._down.copy(copy, grad))
            gradients.drop(i)
            if waiting is not None:
                self._update(optimizer, waiting, scale, lr)
            waiting, turn = arriving, turn + 1
        if waiting is not None:
            self._update(optimizer, waiting, scale, lr)

    def _buffer(self, optimizer: MasterWeights, which: int) -> Tensor:
        if not self._staging:
            widest = max(p.numel() * torch.promote_types(p.dtype, torch.float32).itemsize for p in optimizer.shards)
            pin = self._device.type == "cuda"
            self._staging = [host_buffer(widest, torch.uint8, pin) for _ in range(2)]
        return self._staging[which]

    def _update(self, optimizer: MasterWeights, arrived: _Arriving, scale: Tensor, lr: float) -> None:
        i, copy, mark = arrived
        param, master = optimizer.shards[i], optimizer.masters[i]
        dtype = torch.promote_types(param.dtype, torch.float32)
        weight = param.to("cpu", dtype) if master is None else master
        self._down.finish(mark)
        optimizer.rule.update(
            weight.detach(), copy.to(dtype).mul_(scale), optimizer.state_of(i), lr, optimizer.decay_of(i)
        )
        if master is None:
            seed = optimizer.updates * len(optimizer.params) + i
            param.copy_(round_stochastically(weight, seed=seed))
        elif master.dtype == param.dtype:
            self._up.join(self._up.copy(param, master))
        else:
            wide = torch.empty(param.shape, dtype=master.dtype, device=param.device)
            self._up.join(self._up.copy(wide, master))
            param.copy_(wide)
