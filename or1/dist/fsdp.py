"""FSDP2: parameters, gradients and optimizer state are sharded over ranks; gradients are summed, not averaged.

With `dist.shard_ranks` each group of ranks shards a copy of its own. FSDP2 then knows the group alone. Gradients are
summed over the groups once an update and not in every row. So the bytes between nodes do not grow with the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from or1.core.errors import DistError
from or1.dist.oom_peers import count_collectives
from or1.dist.world import World, split_evenly

_LARGE, _BLOCK = 2**18, 4096


def shard_model(model: PreTrainedModel, world: World, device: torch.device) -> PreTrainedModel:
    """Shard every decoder layer, the head and the remaining parameters in place. Return the model. Collective.

    In a world of size 1 the model only moves to the device. Tensors on the meta device get memory; `fill_shards` sets
    their values afterwards.

    Shards are at least fp32 and serve as the optimizer's master weights. Forward and backward run in the model's dtype.
    Gradients are reduced in fp32 or wider. A tied head stays in the root's group, together with the embedding.
    A model with frozen weights keeps the dtype of each tensor instead: frozen weights have no masters.
    """
    # The override of `to` in transformers has wrong types.
    module: nn.Module = model
    if world.size == 1:
        module.to(device)
        return model
    compute, full = model.dtype, torch.promote_types(model.dtype, torch.float32)
    # Inputs are not cast: token ids must stay integers, and the loss takes fp32 weights and advantages.
    frozen = not all(parameter.requires_grad for parameter in model.parameters())
    policy = MixedPrecisionPolicy(param_dtype=None if frozen else compute, reduce_dtype=full, cast_forward_inputs=False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    groups = [*decoder_layers(model)]
    if head.weight is not embedding.weight:
        groups.append(head)
    # The root last: FSDP2 gives it the parameters that no group has.
    for group in (*groups, module):
        fully_shard(group if frozen else group.to(full), mesh=world.shard_mesh, mp_policy=policy)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    for sharded in _sharded_modules(model):
        # The loss is already divided by the tokens of all ranks, so FSDP must not divide by the number of ranks.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        count_collectives(sharded)
    # torch types every attribute of a module as Tensor or Module.
    root: Any = model
    # Training calls the decoder and the head, not forward. This entry gathers the root's parameters for both.
    decoder = model.get_decoder()
    root.decode = lambda **inputs: decoder(**inputs)
    register_fsdp_forward_method(root, "decode")
    # FSDP2 determines the root module in the first forward, and `reshard` fails before that.
    root.find_root = lambda: None
    register_fsdp_forward_method(root, "find_root")
    root.find_root()
    root.reshard()
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers, whatever attribute of the architecture contains them.

    Raises DistError if the decoder does not have exactly one list of layers.
    """
    decoder = model.get_decoder()
    if isinstance(found := getattr(decoder, "layers", None), nn.ModuleList):
        return found
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1:
        raise DistError(f"{type(model).__name__} has no list of decoder layers to shard; train it on one rank")
    return lists[0]


@torch.no_grad()
def fill_shards(model: PreTrainedModel, whole: PreTrainedModel | None, world: World) -> None:
    """Copy parameters and buffers of `whole` into the sharded model, one tensor at a time. Collective.

    whole  the unsharded model on the main rank, None on the others
    """
    values = {} if whole is None else dict(whole.named_parameters()) | dict(whole.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        shard = local_shard(tensor)
        value = values[name].to(shard.device, tensor.dtype) if values else shard.new_empty(tensor.shape)
        dist.broadcast(value, src=0)
        if isinstance(tensor, DTensor):
            mine = split_evenly(len(value), world.shard_size)[world.shard_rank]
            value = value[mine.start : mine.stop]
        shard.copy_(value)


def is_sharded(model: nn.Module) -> bool:
    """Return True if `shard_model` has sharded the model."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold whole parameters on every rank inside the block, so that ranks may call forward independently.

    Collective on entry. Generation needs this: ranks generate different numbers of tokens, so gathers inside forward
    would not match up between ranks.
    """
    modules = list(_sharded_modules(model))
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            # Only the root keeps its parameters after forward, since backward needs them first.
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory. Any other tensor is returned unchanged."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else tensor


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (m for m in model.modules() if isinstance(m, FSDPModule))


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and whole tensors of parameters and persistent buffers, one at a time. Collective.

    A tied parameter is yielded once.
    """
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if name not in shared:
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_replicas(grads: Iterable[Tensor], world: World) -> None:
    """Add the gradients of the other copies of the model, after the last row of an update. Collective."""
    for grad in grads:
        world.sum_replicas(grad)


def total_norm(grads: list[Tensor], world: World) -> Tensor:
    """Return the L2 norm of all gradients, of which each rank holds shards. Collective."""
    if world.size > 1:
        # Squares in 16 bits would be rounded, and beyond 65504 infinite in fp16.
        wide = (g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads)
        squares = torch.stack([g.square().sum(dtype=torch.float64) for g in wide]).sum()
        if not world.in_first_replica:
            # The other copies hold the same gradients.
            squares = torch.zeros_like(squares)
        return world.sum(squares).sqrt()
    norms = [_norm(g) for g in grads]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _norm(grad: Tensor) -> Tensor:
    """Return the L2 norm of a whole gradient, in fp32 or wider.

    On a CPU, torch adds the squares of all elements into a few sums in fp32, which is 1.6e-3 off for 28 M elements. So
    a large gradient is summed in blocks, and the blocks in fp64.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.device.type != "cpu" or grad.numel() < _LARGE:
        return torch.linalg.vector_norm(grad, dtype=dtype)
    flat = grad.flatten()
    whole = len(flat) // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=dtype)
    return torch.linalg.vector_norm(torch.cat([blocks, rest[None]]), dtype=torch.float64).to(dtype)
