"""One rank of a two-rank check over gloo: python -m tests.helpers.kernel_ranks CHECK[,CHECK...] RANK RENDEZVOUS_FILE.

Exits 0 when all hold. A script and not a test: each rank is a process of its own, started by test_ranks.
Legend: N rows, H hidden, V vocab.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from or1_kernels import LMHead, PolicyObjective, linear_logprob_entropy, linear_policy_loss

WORLD = 2
N, H, V = 45, 16, 202


def problem(dtype, scale=4.0):
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=gen).to(dtype)
    weight = (torch.randn(V, H, generator=gen) * scale / H**0.5).to(dtype)
    bias = torch.randn(V, generator=gen).to(dtype)
    bias[-3:] = -torch.inf  # columns that pad the vocabulary
    targets = torch.randint(0, V - 3, (N,), generator=gen)
    targets[:4] = torch.tensor([0, V // 2 - 1, V // 2, V - 4])
    rows = {"token_weight": torch.rand(N, generator=gen) / N, "old_logp": -torch.rand(N, generator=gen) * 5}
    return hidden, weight, bias, targets, torch.randn(N, generator=gen), rows


def close(got, want, tolerance, name):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


def vocab_parallel(rank):
    """Compare results and gradients of a vocabulary in two halves with those of the whole one."""
    size = V // WORLD
    part = slice(rank * size, (rank + 1) * size)
    for dtype, impl, tolerance in ((torch.float64, "torch", 1e-11), (torch.float32, "auto", 1e-5)):
        hidden, weight, bias, targets, advantages, rows = problem(dtype)
        options = {
            "temperature": torch.linspace(0.5, 2, N),
            "softcap": 30.0,
            "logit_scale": 0.9,
            "chunk_rows": 16,
            "impl": impl,
            "entropy_coef": 0.1,
            "objective": PolicyObjective(clip_high=0.28),
        } | rows
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        want, want_stats = linear_policy_loss(whole[0], whole[1], targets, advantages, bias=whole[2], **options)
        want.backward()
        mine = [x.clone().requires_grad_() for x in (hidden, weight[part], bias[part])]
        loss, stats = linear_policy_loss(
            mine[0], mine[1], targets, advantages, bias=mine[2], group=dist.group.WORLD, **options
        )
        loss.backward()
        close(loss, want, tolerance, "loss")
        for name in ("logp", "entropy", "ratio"):
            close(getattr(stats, name), getattr(want_stats, name), tolerance, name)
        for name, a, b in zip(["hidden", "weight", "bias"], mine, (whole[0], whole[1], whole[2]), strict=True):
            close(a.grad, b.grad if name == "hidden" else b.grad[part], tolerance, f"d{name}")


def vocab_parallel_extremes(rank):
    """Certain and impossible targets, wherever they and the maximum lie; arbitrary upstream gradients."""
    size = V // WORLD
    part = slice(rank * size, (rank + 1) * size)
    hidden, weight, _, targets, *_ = problem(torch.float32, scale=120.0)
    upstream = [torch.linspace(-1, 1, N), torch.linspace(0.5, -0.5, N)]
    results = []
    for w, group in ((weight, None), (weight[part], dist.group.WORLD)):
        leaves = hidden.clone().requires_grad_(), w.clone().requires_grad_()
        outs = linear_logprob_entropy(*leaves, targets, group=group, chunk_rows=16)
        torch.autograd.backward(outs, upstream)
        results.append((*(o.detach() for o in outs), leaves[0].grad, leaves[1].grad))
    assert results[0][0].min() < -90, "the problem should hold impossible targets"
    for name, a, b in zip(["logp", "entropy", "dhidden", "dweight"], results[1], results[0], strict=True):
        torch.testing.assert_close(a, b[part] if name == "dweight" else b, rtol=2e-5, atol=2e-4, msg=f"{name}")


class TiedModel(nn.Module):
    """Embedding, one layer, LMHead; optionally one Parameter for both ends."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(50, H)
        self.layer = nn.Linear(H, H)
        self.head = LMHead(H, 50)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, targets, advantages, token_weight):
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        loss, _ = self.head(hidden, targets, advantages, token_weight=token_weight, entropy_coef=0.1)
        logp, entropy = self.head(hidden, targets)
        return loss, logp, entropy


def fsdp(rank, tied=False):
    """Three SGD steps of a sharded model equal those of one process on the whole batch."""
    gen = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(0, 50, (2, N), generator=gen)
    advantages, weight = torch.randn(N, generator=gen), torch.full((N,), 1 / N)
    single, sharded = TiedModel(tied), TiedModel(tied)
    mesh = init_device_mesh("cpu", (WORLD,))
    if not tied:  # a tied weight belongs to the root's group, which both ends see gathered
        fully_shard(sharded.head, mesh=mesh)
    fully_shard(sharded.layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    mine = slice(rank, None, WORLD)
    # FSDP averages over ranks while token_weight holds the global denominator: the factor undoes the average.
    for model, rows, factor in ((single, slice(None), 1), (sharded, mine, WORLD)):
        token_weight = weight[rows] * factor
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            loss, logp, entropy = model(ids[rows], targets[rows], advantages[rows], token_weight)
            (loss - (token_weight * (logp + 0.1 * entropy)).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, want), got in zip(single.named_parameters(), sharded.parameters(), strict=True):
        close(got.full_tensor(), want, 1e-5, name)


def fsdp_tied(rank):
    """Check FSDP2 with the embedding's weight as the head's."""
    fsdp(rank, tied=True)


CHECKS = {f.__name__: f for f in (vocab_parallel, vocab_parallel_extremes, fsdp, fsdp_tied)}


def main():
    """Join the group, run the checks, leave."""
    checks, rank, rendezvous = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    for check in checks.split(","):
        CHECKS[check](rank)
    # Neither leaves while the other still talks: gloo aborts a rank whose peer has gone.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
