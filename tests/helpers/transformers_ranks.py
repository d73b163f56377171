"""One rank of a two-rank check over gloo: python -m tests.helpers.transformers_ranks CHECK RANK RENDEZVOUS_FILE.

Exits 0 when it holds.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from or1.integrations.transformers import patch_model

WORLD = 2


def tiny(tied: bool) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=102,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        )
    )


def batch(rank: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(102, (2, 9), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}


def objective(model: nn.Module, rank: int) -> torch.Tensor:
    out = model(**batch(rank))
    return out.loss + 0.1 * out.entropy.sum()


def want(tied: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over the ranks' batches, on one model."""
    model = patch_model(tiny(tied))
    loss = sum(objective(model, r) for r in range(WORLD)) / WORLD
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def same(loss: torch.Tensor, grads: dict[str, torch.Tensor], expected: tuple) -> None:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / WORLD, expected[0], rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected[1].keys(), grads.keys() ^ expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def fsdp2(rank: int) -> None:
    """Check the head in the root's unit, in a unit of its own, and tied to the embedding."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for tied, own_unit in ((False, False), (False, True), (True, False)):
        model = patch_model(tiny(tied))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if own_unit:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.lm_head.weight, DTensor)
        loss = objective(model, rank)
        loss.backward()
        same(loss, {name: p.grad.full_tensor() for name, p in model.named_parameters()}, want(tied))


def fsdp1(rank: int) -> None:
    """Check accelerate's default wrapper; summon_full_params reads the gradients."""
    for own_unit in (False, True):
        model = patch_model(tiny(False))
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        if own_unit:
            model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
        wrapped = FullyShardedDataParallel(model, **options)
        loss = objective(wrapped, rank)
        loss.backward()
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            grads = {
                name.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for name, p in wrapped.named_parameters()
            }
        same(loss, grads, want(False))


if __name__ == "__main__":
    check, rank, rendezvous = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    {"fsdp1": fsdp1, "fsdp2": fsdp2}[check](rank)
    # Neither leaves while the other still talks: gloo aborts a rank whose peer has gone.
    dist.barrier()
    dist.destroy_process_group()
