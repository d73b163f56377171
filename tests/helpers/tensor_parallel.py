"""One rank of tests/rollout/test_vllm_ranks.py, run by torchrun: two ranks that share one copy of the model in vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.rollout.paced import LengthScorer
from or1.config import Config
from or1.core.types import Prompt, TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.dist.world import world_of
from or1.model.load import load_model, load_tokenizer
from or1.rollout import make_engine
from or1.rollout.across_ranks import collect_share, exchange
from or1.rollout.engine import Sampling
from or1.train.rank_rows import Policy
from or1.train.score import with_old_logp


def main() -> None:
    """Generate for this rank's own prompts, push, generate again with a deadline; write what happened."""
    config = Config.model_validate_json(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), world_of("cpu", 1, 60)
    model, tokenizer = load_model(config.model).train(), load_tokenizer(config.model.path)
    engine = make_engine(config, model, tokenizer)
    # Unequal work: rank 0 has three prompts, rank 1 two.
    ids = np.random.default_rng(rank).integers(5, 19, (3 - rank, 40)).astype(np.int32)
    prompts = [Prompt(f"{rank}:{i}", "made", "", row, ("0",)) for i, row in enumerate(ids)]
    result = {"drift": [], "slots": [], "prompts": len(prompts)}
    for version in range(3):
        if version:
            generator = torch.Generator().manual_seed(version)
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.1 * p.std() * torch.randn(p.shape, generator=generator)
            engine.update_weights(version)
        found = list(engine.generate(prompts, Sampling(1.0, 24, 4, seed=version)))
        sequences = [
            TrainSequence(prompts[f.prompt].token_ids, f.response.token_ids, f.response.logp, 0.0) for f in found
        ]
        scored = with_old_logp(Policy(model, RowBudget(4096)), sequences)
        result["drift"].append(max(float(np.abs(s.old_logp - s.rollout_logp).max()) for s in scored))
        result["slots"].append(sorted([f.prompt, f.sample] for f in found))
    # Prompts of all ranks: the first rank takes responses for both, and they keep them in turn.
    asked = [Prompt(f"all:{i}", "made", "", np.array([5 + i, 6, 7], np.int32), ("0",)) for i in range(5)]
    share = collect_share(world, engine, LengthScorer(), asked, Sampling(1.0, 24, 4, seed=3))
    whole = exchange(world, share, asked, ())
    result["share"] = len(share.parts)
    result["shared"] = [[r.token_ids.tolist() for r in group.responses] for group in whole.groups]
    late = list(engine.generate(prompts, Sampling(1.0, 64, 4, seed=9, deadline_s=1e-6 if rank == 0 else 100.0)))
    result["late"] = [f.response.finish for f in late]
    Path(sys.argv[2], f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    engine.close()


if __name__ == "__main__":
    main()
