"""`or1 plan`: answers fast and without data or weights, says what fits, and its remedies work."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from or1.config import Config
from or1.config.load import load_config
from or1.core.errors import ConfigError, PlanError
from or1.core.text import duration
from or1.plan.choices import choices_of, workload_of
from or1.plan.devices import find_device
from or1.plan.estimate import largest_row, make_plan
from or1.plan.memory import plan_memory
from or1.plan.shapes import parse_shape, shape_of
from or1.plan.table import conclusions
from or1.plan.timing import sequence_cost, step_time

RECIPES = {"or1-math-7b": 8, "or1-7b": 8, "or1-32b": 32}
H200 = find_device("H200", "auto")[0]


def recipe(root: Path, name: str, *overrides: str) -> Config:
    return load_config(root / "examples" / "recipes" / f"{name}.toml", overrides, files=False)


@pytest.mark.parametrize(("name", "gpus"), RECIPES.items())
def test_the_recipes_fit_and_are_planned_without_data_or_weights(
    name: str, gpus: int, or1: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = or1("plan", f"examples/recipes/{name}.toml", "--device", "h200", "--gpus", str(gpus))
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "weights",
        "optimizer",
        "activations",
        "KV cache",
        "rollout",
        "update",
        "tokens/s",
        "Memory: the",
        "Time: ",
        "Largest optim.max_tokens_per_rank that fits: ",
    ):
        assert word in done.stdout, word


def test_the_plan_answers_in_a_second_and_without_torch(root: Path) -> None:
    probe = (
        "import sys; from or1.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code if not {'torch', 'transformers', 'numpy'} & set(sys.modules) else 99)"
    )
    path = str(root / "examples" / "recipes" / "or1-7b.toml")
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", probe, "plan", path, "--device", "H200", "--gpus", "8"], capture_output=True, text=True
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Its own processor time: what an idle machine would take, whatever else runs here.
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 1.5


def test_what_does_not_fit_fails_with_options_that_make_it_fit(
    root: Path, or1: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = or1("plan", "examples/recipes/or1-7b.toml", "--device", "H100")
    assert done.returncode == 70
    assert "It does not fit: " in done.stderr and "It would with: " in done.stderr
    arguments = done.stderr.partition("It would with: ")[2].split()
    assert arguments
    again = or1("plan", "examples/recipes/or1-7b.toml", "--device", "H100", *arguments)
    assert again.returncode == 0, again.stdout + again.stderr


def test_json_holds_the_same_numbers(root: Path, or1: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = or1("plan", "examples/quickstart.toml", "--device", "cpu", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["fits"] and len(found["stages"]) == 2
    phases = found["stages"][1]["phases"]
    assert found["stages"][1]["peak_bytes"] == max(sum(parts.values()) for parts in phases.values())
    assert found["parameters"] == shape_of(str(root / "examples" / "tiny-adder")).parameters


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "H300"), ("H300", "H200")),
        (("--set", "model.path=no/such-model"), ("no/such-model", "config.json", "Qwen/Qwen2.5-7B")),
        (("--gpus", "0"), ("'0'", "at least 1")),
    ],
)
def test_what_cannot_be_planned_is_named(
    arguments: tuple[str, ...], words: tuple[str, ...], or1: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = or1("plan", "examples/recipes/or1-7b.toml", *arguments)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr


def test_an_architecture_without_a_rule_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'mamba' of 'x'.*qwen2, qwen3, llama"):
        parse_shape({"model_type": "mamba"}, "x")
    with pytest.raises(PlanError, match="no vocab_size, intermediate_size"):
        parse_shape({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}, "x")


def test_missing_data_files_are_explained_once_each(root: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(root / "examples" / "recipes" / "or1-7b.toml")
    problems = {p.path: p.message for p in caught.value.problems}
    # The code file is named twice, for twice its share.
    assert set(problems) == {"data.train.0", "data.train.2", "eval.sets.0.path", "eval.sets.1.path"}
    assert all("put the file there: `or1 data " in message for message in problems.values())


# Tables 10 to 12 of the report: steps, response limit, prompts a step, prompts an update, group size.
TABLES = {
    "or1-math-7b": [
        (740, 8192, 256, 128, 16),
        (1000, 16384, 256, 128, 16),
        (340, 32768, 256, 128, 16),
        (80, 32768, 128, 64, 64),
    ],
    "or1-7b": [(660, 16384, 256, 256, 16), (660, 32768, 160, 160, 32)],
    "or1-32b": [(760, 16384, 256, 256, 16), (370, 24576, 160, 160, 32)],
}


@pytest.mark.parametrize("name", TABLES)
def test_the_recipes_are_the_reports_tables(name: str, root: Path) -> None:
    config = recipe(root, name)
    stages = [
        (s.steps, s.max_response_tokens, s.prompts_per_step, s.minibatch_prompts or s.prompts_per_step, s.group_size)
        for s in config.stage
    ]
    assert stages == TABLES[name]
    loss, optim = config.loss, config.optim
    assert (optim.lr, optim.warmup_steps, optim.weight_decay, optim.grad_clip) == (1e-6, 0, 0.01, 1.0)
    assert (loss.clip_low, loss.clip_high, config.rollout.temperature) == (0.2, 0.2, 1.0)
    assert (loss.entropy.control, loss.entropy.target, config.data.max_prompt_tokens) == ("adaptive", 0.2, 2048)


def test_memory_grows_with_tokens_and_the_largest_row_is_the_last_to_fit(root: Path) -> None:
    config = recipe(root, "or1-7b")
    shape, choices = shape_of(config.model.path), choices_of(config, H200, 8)
    work = workload_of(config, config.stage[1], H200, 8, None)

    def peak(tokens: int) -> int:
        return plan_memory(shape, replace(choices, max_tokens=tokens), H200, work).phases[1].total

    sizes = [peak(tokens) for tokens in range(1024, 262_144, 5000)]
    assert sizes == sorted(sizes)
    largest = largest_row(peak, H200.usable)
    assert peak(largest) <= H200.usable < peak(largest + 256)
    assert make_plan(config, shape, H200, 8).largest_tokens == largest
    assert largest_row(peak, peak(256) - 1) == 0


def test_a_reference_model_counts_in_the_stages_with_a_kl_term(root: Path) -> None:
    model = root / "examples" / "tiny-adder"
    options = [f'model.path="{model}"', "loss.kl_coef=0.01", "stage.0.loss.kl_coef=0.0"]
    config = load_config(root / "examples" / "quickstart.toml", options, files=False)
    shape = shape_of(config.model.path)
    without, with_one = make_plan(config, shape, H200, gpus=2).stages[:2]
    for phase in with_one.memory.phases:
        assert phase.parts["reference model"] == phase.parts["weights"]
    assert not any("reference model" in phase.parts for phase in without.memory.phases)
    assert with_one.time.parts["reference log-probs"] > 0 and "reference log-probs" not in without.time.parts
    (lora,) = {
        stage.work.reference_model
        for stage in make_plan(
            load_config(root / "examples" / "quickstart.toml", [*options, "model.lora.rank=4"], files=False),
            shape,
            H200,
        ).stages
    }
    assert not lora, "the policy without its adapters is the reference"


def test_sharding_divides_what_is_sharded(root: Path) -> None:
    config = recipe(root, "or1-7b")
    shape = shape_of(config.model.path)
    one, eight = (
        plan_memory(shape, choices_of(config, H200, g), H200, workload_of(config, config.stage[1], H200, g, None))
        for g in (1, 8)
    )
    for part in ("weights", "gradients", "optimizer"):
        assert eight.phases[1].parts[part] == pytest.approx(one.phases[1].parts[part] / 8, rel=1e-6)
    assert eight.phases[1].parts["activations"] == one.phases[1].parts["activations"]
    assert eight.phases[1].parts["gathered layers"] > 0


def test_cost_of_a_sequence_is_six_operations_a_parameter_and_attention(root: Path) -> None:
    shape = shape_of("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    cost = sequence_cost(shape)
    # All but embedding, norms and biases are multiplied with every token, forward and twice backward.
    assert cost.linear == pytest.approx(6 * (shape.parameters - shape.vocab * shape.hidden), rel=1e-3)
    # One layer's causal scores over n tokens: n^2 / 2 pairs, 2 operations a channel, twice; 2.5 times that backward.
    assert cost.quadratic == 3.5 * (0.5 * 2 * 2) * 28 * 128 * shape.layers


@pytest.mark.parametrize(("placement", "steps"), [("server", 2), ("colocate", 1), ("colocate", 0)])
def test_rollouts_ahead_cost_the_longer_of_rollout_and_update(root: Path, placement: str, steps: int) -> None:
    settings = (f"rollout.max_staleness={steps}", f"rollout.vllm.placement={placement}", "loss.is_cap=2.0")
    own = ('rollout.vllm.devices="8"',) if placement == "server" else ()
    config = recipe(root, "or1-7b", *settings, *own)
    plan = make_plan(config, shape_of(config.model.path), H200, 8)
    time = plan.stages[-1].time
    rollout, update, other = (time.split[name] for name in ("rollout", "update", "other"))
    push = time.parts["weight sync"]
    assert time.overlapped == pytest.approx(max(rollout, update + other - push) + push)
    assert time.overlapped < time.total
    said = [line for line in conclusions(plan) if "ahead" in line]
    assert len(said) == (steps > 0)
    for line in said:
        assert duration(time.overlapped) in line and duration(time.total) in line
        assert f"up to {steps} step" in line and ("share the GPUs" in line) == (placement == "colocate")


def test_time_grows_with_work_and_shrinks_with_gpus(root: Path) -> None:
    config = recipe(root, "or1-7b", "rollout.batch_size=8")
    shape = shape_of(config.model.path)

    def seconds(stage: int, gpus: int, mean: int | None = None) -> float:
        work = workload_of(config, config.stage[stage], H200, gpus, mean)
        return step_time(shape, choices_of(config, H200, gpus), H200, work).total

    assert seconds(1, 8) > seconds(0, 8) > seconds(0, 16)
    assert seconds(1, 8, mean=20_000) > seconds(1, 8, mean=4000)
    time_ = step_time(shape, choices_of(config, H200, 8), H200, workload_of(config, config.stage[1], H200, 8, None))
    assert 0.1 < time_.mfu < H200.efficiency.matmul
