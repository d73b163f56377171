"""FSDP2: parameters, gradients and optimizer state in shards over all ranks; gradients are summed, never averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from or1.core.errors import DistError
from or1.dist.oom_peers import count_collectives
from or1.dist.world import World, split_evenly


def shard_model(model: PreTrainedModel, world: World, device: torch.device) -> PreTrainedModel:
    """Shard every decoder layer, the head, and what is left, in place. Collective; in a world of one it only moves.

    Tensors on the meta device get memory, and `fill_shards` gives them their values.
    Shards are fp32 at least and serve as the optimizer's masters; forward and backward run in the model's own type,
    gradients are reduced in fp32 at least. A tied head stays in the root's group with the embedding.
    """
    if world.size == 1:
        return model.to(device)
    compute, full = model.dtype, torch.promote_types(model.dtype, torch.float32)
    # Inputs are never cast: token ids need no cast, and the loss takes fp32 weights and advantages beside bf16 states.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=full, cast_forward_inputs=False)
    options = {"mesh": world.shard_mesh, "mp_policy": policy}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for layer in decoder_layers(model):
        fully_shard(layer.to(full), **options)
    if head.weight is not embedding.weight:
        fully_shard(head.to(full), **options)
    fully_shard(model.to(full), **options)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    for module in _sharded_modules(model):
        # The loss is divided by the tokens of all ranks already; FSDP's own division by the ranks would come on top.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        count_collectives(module)
    # Training calls the decoder and the head, not forward: this entry gathers what the root holds for both.
    decoder = model.get_decoder()
    model.decode = lambda **inputs: decoder(**inputs)
    register_fsdp_forward_method(model, "decode")
    # FSDP2 finds out which module is the root in the first forward, and cannot be reset before.
    model.find_root = lambda: None
    register_fsdp_forward_method(model, "find_root")
    model.find_root()
    model.reshard()
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the decoder, whatever the architecture calls them.

    Raises DistError if they are not one list.
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
    """The parameters and buffers of `whole`, which the main rank has, into a sharded model, one by one. Collective."""
    values = {} if whole is None else dict(whole.named_parameters()) | dict(whole.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        shard = local_shard(tensor)
        value = values[name].to(shard.device, tensor.dtype) if values else shard.new_empty(tensor.shape)
        dist.broadcast(value, src=0)
        if isinstance(tensor, DTensor):
            mine = split_evenly(len(value), world.size)[world.rank]
            value = value[mine.start : mine.stop]
        shard.copy_(value)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` has sharded it."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole parameters on every rank inside, so that each may run forward as often as it likes. Collective on entry.

    Generation needs it: ranks generate different numbers of tokens, and a gather in each forward would never match.
    """
    modules = list(_sharded_modules(model))
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            # The root alone keeps its parameters after a forward: they are the first that backward needs.
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor is its own part."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (m for m in model.modules() if isinstance(m, FSDPModule))


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, each whole, one at a time; a tied one comes once. Collective."""
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if name not in shared:
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
