"""A pretrained model with a tied head, a chat template and 49,152 tokens in bf16, through every command of a run."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from or1.commands.replay import COMPARED, replay
from or1.run.checkpoint import committed_steps, load_checkpoint
from tests.helpers.ranks import or1_ranks
from tests.helpers.real_model import STEPS, records, write_config

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
Or1 = Callable[..., subprocess.CompletedProcess[str]]


def test_every_step_trains_and_the_engine_agrees_within_bf16(trained: Path) -> None:
    steps = records(trained)[1:]
    assert len(steps) == STEPS
    for step in steps:
        print({key: step.get(key) for key in ("reward/mean", "mismatch/kl", "mismatch/ratio_max", "optim/grad_norm")})
        assert step["optim/updates"] == 1 and step["optim/grad_norm"] > 0
        # or1/train/engine_check.py: LIMIT_KL of bf16.
        assert 0 <= step["mismatch/kl"] < 2e-2


def test_replay_repeats_a_step_bit_for_bit(trained: Path) -> None:
    threads = torch.get_num_threads()
    # As the run's only thread: sums over threads are in another order.
    torch.set_num_threads(1)
    try:
        found = replay(trained, STEPS)
    finally:
        torch.set_num_threads(threads)
    recorded = records(trained)[STEPS]
    same = {key: found[key] for key in COMPARED if key in found and key in recorded}
    assert len(same) >= 8 and same == {key: recorded[key] for key in same}


def test_export_is_the_checkpoint_and_transformers_loads_it_tied(trained: Path, or1: Or1, smollm2: Path) -> None:
    done = or1("export", str(trained))
    assert done.returncode == 0, done.stderr
    folder = trained / "weights" / f"step_{STEPS}"
    model, before = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (folder, smollm2))
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    theirs = dict(before.named_parameters())
    changed = [name for name, value in model.named_parameters() if not value.equal(theirs[name])]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{size:,} bytes; {len(changed)} of {len(theirs)} tensors differ from the weights before training")
    # One copy of the tied matrix.
    assert size == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=1e-3)
    assert "model.embed_tokens.weight" in changed
    ours, old = (AutoTokenizer.from_pretrained(path) for path in (folder, smollm2))
    chat = [{"role": "user", "content": "Which is larger, 9 or 11?"}]
    assert ours.apply_chat_template(chat, tokenize=False) == old.apply_chat_template(chat, tokenize=False)
    assert ours.get_vocab() == old.get_vocab()


def test_eval_of_the_export_repeats_the_accuracy_of_the_run(trained: Path, or1: Or1, tmp_path: Path) -> None:
    done = or1("eval", str(trained), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    accuracy = json.loads((tmp_path / "eval.json").read_text())["sets"]["greedy"]["avg@1"]
    recorded = records(trained)[-1]["eval/greedy/avg@1"]
    print(f"greedy accuracy: {accuracy} by or1 eval, {recorded} in the run")
    assert accuracy == recorded


def test_filter_counts_every_prompt(config_file: Path, or1: Or1, tmp_path: Path) -> None:
    done = or1("filter", str(config_file), "--out", str(tmp_path / "difficulty.parquet"))
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "difficulty.parquet")
    print(table.schema.names, table.num_rows)
    assert table.num_rows == 16


def test_the_report_is_a_page_with_the_run_s_responses(trained: Path, or1: Or1) -> None:
    done = or1("report", str(trained))
    assert done.returncode == 0, done.stderr
    page = (trained / "report.html").read_text(encoding="utf-8")
    print(f"{len(page):,} bytes")
    assert "Reply with the number only." in page


def test_resume_after_sigkill_repeats_the_run_bit_for_bit(trained: Path, smollm2: Path, tmp_path: Path) -> None:
    """Kill the run at the first token of step 3, and its resumption between forward and backward of that step."""
    config, killed, log = write_config(tmp_path, smollm2, "killed"), tmp_path / "killed", tmp_path / "log"
    for fault in ("rollout.token:rank0:step3:kill", "train.backward:rank0:step3:kill"):
        codes = or1_ranks(1, ["train", str(config)], log, timeout=900, OR1_FAULT=fault)
        assert codes == [-signal.SIGKILL], Path(f"{log}.0").read_text()[-2000:]
        left = committed_steps(killed / "checkpoints")
        print(f"{fault}: checkpoints of steps {left}")
        assert left and STEPS not in left
    began = time.perf_counter()
    assert or1_ranks(1, ["train", str(config)], log, timeout=900) == [0], Path(f"{log}.0").read_text()[-2000:]
    print(f"{time.perf_counter() - began:.0f} s for the last resumption")
    assert records(killed) == records(trained)
    for step in range(1, STEPS + 1):
        tables = [pq.read_table(run / "rollouts" / f"step_{step}.parquet") for run in (trained, killed)]
        assert tables[0].equals(tables[1]), f"samples of step {step}"
    ours, theirs = (load_checkpoint(run / "checkpoints" / f"step_{STEPS}") for run in (trained, killed))
    assert ours.state == theirs.state
    different = [name for name, value in ours.tensors.items() if not value.equal(theirs.tensors[name])]
    print(f"{len(ours.tensors)} tensors, {sum(t.nbytes for t in ours.tensors.values()):,} bytes compared")
    assert not different


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], prefix: str) -> float:
    """Return the norm of the difference of all tensors named `prefix`..., as one vector, over that of `theirs`."""
    names = [name for name in theirs if name.startswith(prefix)]
    assert names and ours.keys() == theirs.keys()
    squares = [((ours[n] - theirs[n]).double().square().sum(), theirs[n].double().square().sum()) for n in names]
    return float((sum(s[0] for s in squares) / sum(s[1] for s in squares)) ** 0.5)


def test_two_ranks_sample_and_train_as_one_in_fp32(smollm2: Path, tmp_path: Path) -> None:
    """Compare gradients, as first moments, and weights; at temperature 0.5.

    The engine's log-probs depend on the batch by rounding, 1e-5 nat in fp32. At temperature 1, one of 32 responses of
    two runs parted: at a draw between two neighbours in the vocabulary with probabilities of 1.8e-5 and 6e-7.
    """
    runs, ends = {}, {}
    settings = ("model.dtype=float32", "eval.sets=[]", "rollout.temperature=0.5", "checkpoint.keep=3")
    for size in (1, 2):
        config, log = write_config(tmp_path, smollm2, f"ranks{size}", steps=2), tmp_path / f"log{size}"
        arguments = ["train", str(config), *(word for setting in settings for word in ("--set", setting))]
        assert or1_ranks(size, arguments, log, timeout=900) == [0] * size, Path(f"{log}.0").read_text()[-2000:]
        runs[size] = tmp_path / f"ranks{size}"
        ends[size] = [load_checkpoint(runs[size] / "checkpoints" / f"step_{step}").tensors for step in (1, 2)]
    for step in (1, 2):
        one, two = (records(run)[step] for run in runs.values())
        tables = [pq.read_table(run / "rollouts" / f"step_{step}.parquet") for run in runs.values()]
        same = sum(a == b for a, b in zip(*(t["token_ids"].to_pylist() for t in tables), strict=True))
        count = tables[0].num_rows
        print(f"step {step}: {same} of {count} responses have the same tokens")
        for key in ("reward/mean", "policy/entropy", "optim/loss", "optim/grad_norm", "mismatch/kl"):
            print(f"{key}: {one[key]:.9g} on one rank, {two[key]:.9g} on two")
        moments, weights = (distance(ends[2][step - 1], ends[1][step - 1], p) for p in ("exp_avg.", "master."))
        print(f"relative distance of all first moments {moments:.2e}, of all weights {weights:.2e}")
        assert same == count
        for key in ("reward/mean", "policy/entropy", "optim/grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
        # The sum of rounding errors: on-policy the loss is near 0.
        assert two["optim/loss"] == pytest.approx(one["optim/loss"], abs=1e-5)
        # The first moment after step 1 is a tenth of the gradient, which was clipped by its norm.
        assert moments < 2e-5 and weights < 1e-6
