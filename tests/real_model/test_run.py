"""A pretrained model with a tied head, a chat template and 49,152 tokens in bf16, through every command of a run."""

from __future__ import annotations

import json
import os
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
from tests.helpers.ranks import exit_codes, or1_command, or1_ranks, started
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


def killed_after(step: int, config: Path, run_dir: Path, log: Path) -> None:
    """Start the run and SIGKILL its process once checkpoint `step` is committed."""
    with started(or1_command, 1, ["train", str(config)], str(log)) as ranks:
        deadline = time.monotonic() + 600
        while step not in committed_steps(run_dir / "checkpoints"):
            assert ranks[0][0].is_alive() and time.monotonic() < deadline, Path(f"{log}.0").read_text()[-2000:]
            time.sleep(0.1)
        os.kill(ranks[0][0].pid, signal.SIGKILL)
        exit_codes(ranks, 60)


def test_resume_after_sigkill_repeats_the_run_bit_for_bit(trained: Path, smollm2: Path, tmp_path: Path) -> None:
    config, killed, log = write_config(tmp_path, smollm2, "killed"), tmp_path / "killed", tmp_path / "log"
    killed_after(1, config, killed, log)
    at = max(committed_steps(killed / "checkpoints"))
    assert at < STEPS
    began = time.perf_counter()
    assert or1_ranks(1, ["train", str(config)], log, timeout=900) == [0], Path(f"{log}.0").read_text()[-2000:]
    print(f"killed after step {at}; {time.perf_counter() - began:.0f} s for the rest")
    assert records(killed) == records(trained)
    for step in range(1, STEPS + 1):
        tables = [pq.read_table(run / "rollouts" / f"step_{step}.parquet") for run in (trained, killed)]
        assert tables[0].equals(tables[1]), f"samples of step {step}"
    ours, theirs = (load_checkpoint(run / "checkpoints" / f"step_{STEPS}") for run in (trained, killed))
    assert ours.state == theirs.state
    different = [name for name, value in ours.tensors.items() if not value.equal(theirs.tensors[name])]
    print(f"{len(ours.tensors)} tensors, {sum(t.nbytes for t in ours.tensors.values()):,} bytes compared")
    assert not different


def test_two_ranks_sample_and_train_as_one_in_fp32(smollm2: Path, tmp_path: Path) -> None:
    """Compare in fp32, since bf16 log-probs depend on the batch, by up to 0.2 nat, and so do sampled tokens."""
    runs = {}
    for size in (1, 2):
        config, log = write_config(tmp_path, smollm2, f"ranks{size}", steps=1), tmp_path / f"log{size}"
        arguments = ["train", str(config), "--set", "model.dtype=float32", "--set", "eval.sets=[]"]
        assert or1_ranks(size, arguments, log, timeout=900) == [0] * size, Path(f"{log}.0").read_text()[-2000:]
        runs[size] = tmp_path / f"ranks{size}"
    one, two = (records(run)[-1] for run in runs.values())
    tables = [pq.read_table(run / "rollouts" / "step_1.parquet") for run in runs.values()]
    same = sum(a == b for a, b in zip(*(t["token_ids"].to_pylist() for t in tables), strict=True))
    print(f"{same} of {tables[0].num_rows} responses have the same tokens")
    for key in ("reward/mean", "policy/entropy", "optim/loss", "optim/grad_norm", "mismatch/kl"):
        print(f"{key}: {one[key]:.9g} on one rank, {two[key]:.9g} on two")
    assert same == tables[0].num_rows
    for key in ("reward/mean", "policy/entropy", "optim/grad_norm"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key
    # The sum of rounding errors: on-policy the loss is near 0.
    assert two["optim/loss"] == pytest.approx(one["optim/loss"], abs=1e-5)


@pytest.mark.integrations
def test_lora_trains_adapters_and_its_merged_export_reloads(smollm2: Path, or1: Or1, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config, log, run = write_config(tmp_path, smollm2, "lora", 2), tmp_path / "log", tmp_path / "lora"
    arguments = ["train", str(config), "--set", "model.lora.rank=8", "--set", "optim.lr=1e-4"]
    assert or1_ranks(1, arguments, log, timeout=900) == [0], Path(f"{log}.0").read_text()[-2000:]
    assert all(step["optim/grad_norm"] > 0 and step["mismatch/kl"] < 2e-2 for step in records(run)[1:])
    sizes = [sum(f.stat().st_size for f in (run / "checkpoints" / "step_2").iterdir())]
    for flags in ((), ("--adapter",)):
        done = or1("export", str(run), *flags)
        assert done.returncode == 0, done.stderr
    adapter = run / "adapters" / "step_2"
    sizes.append(sum(f.stat().st_size for f in adapter.iterdir()))
    print(f"checkpoint {sizes[0]:,} bytes, adapter {sizes[1]:,} bytes")
    assert sizes[0] < 100e6
    merged, base = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (run / "weights" / "step_2", smollm2)
    )
    theirs = dict(base.named_parameters())
    changed = {name for name, value in merged.named_parameters() if not value.equal(theirs[name])}
    assert changed and all("proj" in name for name in changed)
    assert merged.lm_head.weight.equal(base.lm_head.weight)
