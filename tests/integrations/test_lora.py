"""[model.lora] against PEFT itself: gradients, losses, folders, ranks, a killed run."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")

from or1.config import DistConfig, ModelConfig, OptimConfig  # noqa: E402
from or1.core.errors import ModelError, RunError  # noqa: E402
from or1.dist.oom_retry import RowBudget  # noqa: E402
from or1.dist.world import SINGLE  # noqa: E402
from or1.model.export import export_model, named_weights, weight_forms  # noqa: E402
from or1.model.load import load_model, load_tokenizer  # noqa: E402
from or1.model.lora.folder import export_adapter  # noqa: E402
from or1.plan.activations import activations  # noqa: E402
from or1.plan.choices import choices_of  # noqa: E402
from or1.plan.devices import find_device  # noqa: E402
from or1.plan.memory import gradient_bytes, optimizer_bytes, trainer_weight_bytes  # noqa: E402
from or1.plan.shapes import shape_of  # noqa: E402
from or1.run.checkpoint import committed_steps, load_checkpoint  # noqa: E402
from or1.run.export import export_run  # noqa: E402
from or1.train.metrics import UpdateStats  # noqa: E402
from or1.train.optim import MasterAdamW  # noqa: E402
from or1.train.rank_rows import Policy  # noqa: E402
from or1.train.score import score  # noqa: E402
from or1.train.update import update  # noqa: E402
from tests.helpers import lora_work  # noqa: E402
from tests.helpers.dist_work import ALPHA, policy_of, sequences_of  # noqa: E402
from tests.helpers.ranks import exit_codes, or1_command, or1_ranks, run_ranks, started  # noqa: E402
from tests.helpers.small_run import arguments, lines  # noqa: E402

pytestmark = pytest.mark.integrations
IDS = torch.randint(5, 19, (3, 17), generator=torch.Generator().manual_seed(2))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def apart(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """Return the relative error of all gradients as one vector."""
    assert got.keys() == want.keys() and want
    error = sum(np.square(got[name] - grad).sum() for name, grad in want.items())
    return float(np.sqrt(error / sum(np.square(grad).sum() for grad in want.values())))


@pytest.fixture(scope="module")
def exact(adder: Path) -> dict[str, np.ndarray]:
    """Return the gradients of an update in fp64."""
    return lora_work.gradients(adder, "float64")


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
def test_gradients_are_those_of_peft_and_plain_autograd(adder: Path, dtype: str, bound: float) -> None:
    ours = lora_work.gradients(adder, dtype)
    plain = lora_work.peft_model(adder, lora_work.load(adder, dtype), getattr(torch, dtype))
    lora_work.plain_loss(plain, sequences_of(13)).backward()
    theirs = {name.removeprefix("base_model.model."): p.grad for name, p in plain.named_parameters()}
    assert {name for name, grad in theirs.items() if grad is not None} == ours.keys()
    for name, grad in ours.items():
        assert relative(grad, theirs[name].double().numpy()) < bound, name


def test_twenty_steps_have_the_losses_of_peft(adder: Path) -> None:
    ours, theirs = lora_work.twenty_losses(adder)
    assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-9)
    assert len({round(loss, 6) for loss in ours}) > 15


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": "layer"},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": "offload"},
        {"mlp_tile_tokens": 7},
        {"mlp_tile_tokens": 7, "gradient_checkpointing": "layer"},
        {"sharing": "on", "max_tokens": 400},
        {"head_chunk_rows": 5},
    ],
    ids=str,
)
def test_memory_settings_do_not_change_the_gradient(adder: Path, exact: dict[str, np.ndarray], settings: dict) -> None:
    got = lora_work.gradients(adder, "float64", **settings)
    # The norms of an fp64 model compute in fp32, and shared prompts change the last bits of what enters them.
    assert apart(got, exact) < (1e-7 if "sharing" in settings else 1e-10)


def test_only_adapters_are_trained_in_fp32_beside_a_bf16_base(adder: Path, exact: dict[str, np.ndarray]) -> None:
    model = lora_work.load(adder, "bfloat16")
    optimizer = MasterAdamW(model, OptimConfig())
    optimizer.reserve()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert optimizer.names == list(trained) and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    # They are their own masters, and no gradient of the head is kept, tied or not.
    assert all(master is shard for master, shard in zip(optimizer.masters, optimizer.shards, strict=True))
    assert optimizer.main_grad(model.get_output_embeddings().weight) is None
    assert apart(lora_work.gradients(adder, "bfloat16"), exact) < 0.05


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(adder: Path) -> None:
    def factors(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed + 40)
        config = ModelConfig(path=str(adder), dtype="float32", device="cpu", lora=lora_work.LORA | {"seed": seed})
        model = load_model(config, packs=False)
        plain = AutoModelForCausalLM.from_pretrained(adder, dtype=torch.float32)
        assert (lora_work.logp_of(model, IDS) - lora_work.logp_of(plain, IDS)).abs().max() < 1e-5
        return [p for p in model.parameters() if p.requires_grad]

    first, again, other = factors(1), factors(1), factors(2)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_targets_are_found_or_named(adder: Path) -> None:
    model = lora_work.load(adder, lora=lora_work.LORA | {"targets": ["v_proj", "self_attn.q_proj"]}, liger="off")
    assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    with pytest.raises(ModelError, match=r"names 'no_proj'.*it has down_proj, gate_proj"):
        lora_work.load(adder, lora=lora_work.LORA | {"targets": ["no_proj"]})


@pytest.mark.parametrize("rslora", [False, True])
def test_the_merged_folder_and_the_adapter_are_the_policy(adder: Path, tmp_path: Path, rslora: bool) -> None:
    model = lora_work.load(adder, lora=lora_work.LORA | {"rslora": rslora})
    want = lora_work.logp_of(model, IDS)
    merged = AutoModelForCausalLM.from_pretrained(export_model(model, load_tokenizer(str(adder)), tmp_path / "merged"))
    assert (lora_work.logp_of(merged, IDS) - want).abs().max() < 1e-5

    base = AutoModelForCausalLM.from_pretrained(adder, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, export_adapter(model, tmp_path / "adapter"))
    assert (lora_work.logp_of(adapted, IDS) - want).abs().max() < 1e-5
    by_peft = adapted.merge_and_unload().state_dict()
    pushed = dict(named_weights(model))
    assert pushed.keys() == by_peft.keys() == {name for name, *_ in weight_forms(model)}
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, by_peft[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(pushed[name], tensor)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000


def test_the_reference_of_the_kl_term_is_the_base(adder: Path) -> None:
    model, sequences = lora_work.load(adder), sequences_of(7)
    base = load_model(ModelConfig(path=str(adder), dtype="float32", device="cpu"))
    found = score(Policy(model, RowBudget(96), adapters=False), sequences)
    want = score(Policy(base, RowBudget(96)), sequences)
    assert all(map(np.array_equal, found, want))
    again = score(Policy(model, RowBudget(96)), sequences)
    assert np.abs(again[0] - want[0]).max() > 1e-2, "the adapters are on again"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_the_tensors_of_adapters(adder: Path, dtype: str) -> None:
    from types import SimpleNamespace

    from benchmarks.plan.tensor_bytes import storage_bytes

    model, device = lora_work.load(adder, dtype), find_device("cpu", "auto")[0]
    config = ModelConfig(path=str(adder), dtype=dtype, device="cpu", lora=lora_work.LORA)
    planned = choices_of(SimpleNamespace(model=config, optim=OptimConfig(), dist=DistConfig()), device, gpus=1)
    shape = shape_of(str(adder))
    assert trainer_weight_bytes(shape, planned) == storage_bytes(model.parameters())
    optimizer = MasterAdamW(model, OptimConfig())
    optimizer.reserve()
    held = optimizer.resident_bytes()
    assert gradient_bytes(shape, planned) == held["gradients"]
    assert optimizer_bytes(shape, planned) == held["moments"] and held["masters"] == 0
    assert activations(shape, planned, 64).saved > 0


def test_four_bits_are_trained_and_merged_as_they_are_rounded(adder: Path, tmp_path: Path) -> None:
    """On a CPU, where a run refuses nf4: bitsandbytes is slow there, but the same code."""
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(path=str(adder), dtype="bfloat16", device="cpu", lora=lora_work.LORA | {"quantize": "nf4"})
    model = load_model(config, packs=False).train()
    lora_work.fill(model)
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert len(packed) == 7 * 3 and not any(p.requires_grad for p in packed)
    optimizer, stats = MasterAdamW(model, OptimConfig(lr=1e-3)), UpdateStats()
    assert all("lora_" in name for name in optimizer.names)
    assert update(policy_of(model, SINGLE), optimizer, sequences_of(5), ALPHA, stats)
    folder = export_model(model, load_tokenizer(str(adder)), tmp_path / "merged")
    assert "quantization" not in (folder / "config.json").read_text()
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.bfloat16
    # With gradients on: without, bitsandbytes has another path on a CPU, for other widths than the adder's.
    ours = model(input_ids=IDS, use_cache=False).logits[:, :-1].double().log_softmax(-1).gather(-1, IDS[:, 1:, None])
    gap = (lora_work.logp_of(merged, IDS) - ours[..., 0]).abs().mean()
    assert gap < 0.05, "rounding of merged weights to bf16"
    forms = [(name, tensor.dtype, tensor.shape) for name, tensor in named_weights(model)]
    assert forms == weight_forms(model)


NIGHTLY = [pytest.mark.slow, pytest.mark.nightly]


@pytest.mark.parametrize(
    ("size", "sequence", "dtype"),
    [(2, 1, "float32"), pytest.param(2, 2, "bfloat16", marks=NIGHTLY), pytest.param(4, 2, "float32", marks=NIGHTLY)],
)
def test_ranks_share_base_and_adapters(adder: Path, size: int, sequence: int, dtype: str) -> None:
    alone = lora_work.update_on_ranks(adder, dtype, 1)
    several = run_ranks(lora_work.update_on_ranks, size, adder, dtype, sequence)
    full = dtype == "float32"
    for found in several:
        assert found["base dtypes"] == alone["base dtypes"] == {f"torch.{dtype}"}
        assert found["state"] == alone["state"]
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6 if full else 1e-2)
        assert apart(found["grads"], alone["grads"]) < (1e-6 if full else 3e-2)
        assert found["merged"].keys() == alone["merged"].keys()
        if full:
            assert max(relative(found["merged"][n], t) for n, t in alone["merged"].items()) < 1e-5


QUICK = {
    "model__lora__rank": 4,
    "model__lora__alpha": 8,
    "optim__lr": 1e-3,
    "loss__kl_coef": 0.01,
    "stage__0__steps": 4,
    "stage__1__steps": 1,
    "stage__0__max_response_tokens": 14,
    "stage__1__max_response_tokens": 14,
}


def test_a_checkpoint_holds_adapters_and_goes_on_with_the_same_bits(adder: Path) -> None:
    def start() -> tuple[Policy, MasterAdamW]:
        model = lora_work.load(adder)
        return policy_of(model, SINGLE), MasterAdamW(model, OptimConfig(lr=1e-3))

    def step(policy: Policy, optimizer: MasterAdamW, seed: int) -> None:
        update(policy, optimizer, sequences_of(6, seed), ALPHA, UpdateStats())

    straight, resumed = start(), start()
    step(*straight, 1)
    saved = {name: tensor.clone() for name, tensor in straight[1].state_tensors().items()}
    assert saved and all("lora_" in name for name in saved)
    assert sum(t.nbytes for t in saved.values()) < 400_000
    step(*straight, 2)
    resumed[1].load_state_tensors(saved, 1)
    step(*resumed, 2)
    ends = [each[1].state_tensors() for each in (straight, resumed)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_run_is_exported_on_its_own_base_alone(tmp_path: Path, adder: Path) -> None:
    moved, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(adder, moved)
    assert or1_ranks(1, arguments(run, model__path=moved, **QUICK | {"stage__0__steps": 1}), tmp_path / "log") == [0]
    saved = load_checkpoint(run / "checkpoints" / "step_2").tensors
    assert all("lora_" in name for name in saved if name.startswith(("master.", "exp_avg")))

    base = AutoModelForCausalLM.from_pretrained(adder, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, export_run(run, None, None, adapter=True))
    merged = AutoModelForCausalLM.from_pretrained(run / "weights" / "step_2")
    assert (lora_work.logp_of(adapted, IDS) - lora_work.logp_of(merged, IDS)).abs().max() < 1e-5

    other = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 3] += 1
    other.save_pretrained(moved)
    with pytest.raises(RunError, match="are not those that the adapters of this run were trained on"):
        export_run(run, None, None, adapter=True)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_run_resumes_bit_for_bit_on_its_own_base_alone(tmp_path: Path, adder: Path, size: int) -> None:
    moved, straight, killed, log = (tmp_path / name for name in ("base", "straight", "killed", "log"))
    shutil.copytree(adder, moved)
    settings = QUICK | {"model__path": moved}
    assert or1_ranks(size, arguments(straight, **settings), log) == [0] * size
    with started(or1_command, size, arguments(killed, **settings), str(log)) as ranks:
        deadline = time.monotonic() + 100
        while 2 not in committed_steps(killed / "checkpoints"):
            assert ranks[0][0].is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        for process, _ in ranks:
            os.kill(process.pid, signal.SIGKILL)
        exit_codes(ranks, 20)
    assert max(committed_steps(killed / "checkpoints")) < 5

    weights = moved / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\0\0")
    assert or1_ranks(size, arguments(killed, **settings), tmp_path / "refused") != [0] * size
    assert "are not those that the adapters of this run" in (tmp_path / "refused.0").read_text()
    weights.write_bytes(kept)

    assert or1_ranks(size, arguments(killed, **settings), log) == [0] * size
    for ours, theirs in zip(lines(straight), lines(killed), strict=True):
        for key in ("step", "reward/mean", "policy/entropy", "optim/loss", "optim/grad_norm", "policy/kl"):
            assert ours.get(key) == theirs.get(key), (ours["step"], key)
    ends = [load_checkpoint(each / "checkpoints" / "step_5") for each in (straight, killed)]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert all(torch.equal(t, ends[1].tensors[name]) for name, t in ends[0].tensors.items())
