"""[model.lora] on a pretrained model in fp32: the adapter and the merged weights are the policy, and a run resumes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from or1.config.load import load_config
from or1.core.types import TrainSequence
from or1.data import load_eval_sets
from or1.dist.oom_retry import RowBudget
from or1.model.load import load_model, load_tokenizer
from or1.run.checkpoint import load_checkpoint
from or1.run.export import export_run
from or1.train.rank_rows import Policy
from or1.train.score import score
from tests.helpers.plain_logp import plain_logp
from tests.helpers.ranks import or1_ranks
from tests.helpers.real_model import records, write_config

pytestmark = [pytest.mark.nightly, pytest.mark.integrations, pytest.mark.timeout(1800)]
STEPS = 2
SETTINGS = ("model.lora.rank=8", "model.dtype=float32", "optim.lr=1e-3", "eval.sets=[]")


@pytest.fixture(scope="module")
def train(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, int]]:
    """Return a function that starts or resumes the named run and returns its folder and exit code."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")

    def run(name: str, **variables: str) -> tuple[Path, int]:
        config, log = write_config(folder, smollm2, name, STEPS), folder / f"{name}.log"
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        (code,) = or1_ranks(1, ["train", str(config), *settings], log, timeout=900, **variables)
        return folder / name, code

    return run


@pytest.fixture(scope="module")
def adapted(train: Callable[..., tuple[Path, int]]) -> Path:
    """Return the folder of a finished run."""
    run, code = train("run")
    assert code == 0, run.with_suffix(".log.0").read_text()[-2000:]
    return run


def responses(run: Path) -> list[TrainSequence]:
    """Return what the run's last step sampled."""
    config = load_config(str(run.with_suffix(".toml")))
    prompts = load_eval_sets(config, load_tokenizer(config.model.path))["greedy"].prompts
    ids = {prompt.text: prompt.token_ids for prompt in prompts}
    rows = pq.read_table(run / "rollouts" / f"step_{STEPS}.parquet").to_pylist()
    found = [row for row in rows if row["prompt"] in ids]
    assert found
    return [
        TrainSequence(ids[r["prompt"]], np.array(r["token_ids"], np.int32), np.array(r["logp"], np.float32), 0.0)
        for r in found
    ]


def of_policy(run: Path, sequences: list[TrainSequence]) -> Tensor:
    """Return the log-probs that the trainer computes with the weights of the last checkpoint."""
    config = load_config(str(run.with_suffix(".toml")), list(SETTINGS))
    model = load_model(config.model)
    tensors = load_checkpoint(run / "checkpoints" / f"step_{STEPS}").tensors
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"master.{name}"])
    policy = Policy(model, RowBudget(config.optim.max_tokens_per_rank), config.rollout.temperature)
    return torch.cat([torch.tensor(logp, dtype=torch.float64) for logp in score(policy, sequences)])


def test_adapter_and_merged_weights_have_the_log_probs_of_the_policy(adapted: Path, smollm2: Path) -> None:
    """Compare the trainer with PEFT's model of the adapter, and with transformers' of the merged weights."""
    peft = pytest.importorskip("peft")
    assert all(step["optim/grad_norm"] > 0 and step["mismatch/kl"] < 1e-6 for step in records(adapted)[1:])
    merged, adapter = export_run(adapted, None, None), export_run(adapted, None, None, adapter=True)
    sequences = responses(adapted)
    ours = of_policy(adapted, sequences)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    before = plain_logp(base, sequences)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    old = dict(base.named_parameters())
    changed = {name for name, value in whole.named_parameters() if not value.equal(old[name])}
    found = {
        "merged, transformers": plain_logp(whole, sequences),
        "adapter, PEFT": plain_logp(peft.PeftModel.from_pretrained(base, adapter), sequences),
    }
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in (adapted / f"checkpoints/step_{STEPS}", adapter)]
    trained = float((ours - before).abs().max())
    print(f"{len(ours)} tokens; checkpoint {sizes[0]:,} bytes, adapter {sizes[1]:,} bytes")
    print(f"training moved log-probs by up to {trained:.2e} nat")
    for name, theirs in found.items():
        print(f"{name}: largest difference from the trainer {float((ours - theirs).abs().max()):.2e} nat")
    assert trained > 0.01
    for name, theirs in found.items():
        assert float((ours - theirs).abs().max()) < 1e-4, name
    assert changed and all("proj" in name for name in changed)
    assert whole.lm_head.weight.data_ptr() == whole.model.embed_tokens.weight.data_ptr()


def test_resume_after_sigkill_repeats_the_run_bit_for_bit(
    adapted: Path, train: Callable[..., tuple[Path, int]]
) -> None:
    run, code = train("killed", OR1_FAULT="train.backward:rank0:step2:kill")
    assert code == -signal.SIGKILL
    assert train("killed")[1] == 0, run.with_suffix(".log.0").read_text()[-2000:]
    assert records(run) == records(adapted)
    ours, theirs = (load_checkpoint(each / "checkpoints" / f"step_{STEPS}") for each in (run, adapted))
    assert ours.tensors.keys() == theirs.tensors.keys() and ours.state == theirs.state
    assert all(value.equal(theirs.tensors[name]) for name, value in ours.tensors.items())
    print(f"{len(ours.tensors)} tensors, {sum(t.nbytes for t in ours.tensors.values()):,} bytes compared")
