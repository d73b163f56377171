"""The process group of a GPU run, with torch's own calls written down instead of made."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from or1.config import DistConfig
from or1.dist import world
from or1.dist.world import join


@pytest.mark.parametrize("splits", [None, "0", "1"])
def test_a_rank_has_its_own_gpu_and_is_bound_to_it_where_groups_are_split(
    splits: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, object]] = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("VLLM_DISTRIBUTED_USE_SPLIT_GROUP", raising=False)
    if splits is not None:
        monkeypatch.setenv("VLLM_DISTRIBUTED_USE_SPLIT_GROUP", splits)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.append((backend, options)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(("end", None)))
    monkeypatch.setattr(world, "world_of", lambda kind, size, limit_s, shards: (kind, size))
    with join(DistConfig(sequence_parallel=2), torch.device("cuda")) as found:
        assert found == ("cuda", 2)
    own = torch.device("cuda", 3)
    assert calls[0] == ("device", own) and calls[-1][0] == "end"
    backend, options = calls[1]
    assert backend == "cpu:gloo,cuda:nccl" and options["device_id"] == (own if splits == "1" else None)
