"""Config errors: all at once, each with its path and a remedy, fast, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from or1.config import Config
from or1.config_load import ConfigError, dump_config, load_config

QUICKSTART = "examples/quickstart.toml"

FIVE_MISTAKES = """
run_dir = "runs/x"
[model]
path = "no/such/folder/here"
[data]
train = "no-such-file.jsonl"
[rollout]
temprature = 0.7
[optim]
lr = -1.0
[[stage]]
steps = 5
max_response_tokens = 64
prompts_per_step = 8
group_size = 4
minibatch_prompts = 16
"""


@pytest.fixture(autouse=True)
def _from_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def problems_of(text: str, tmp_path: Path, *overrides: str) -> dict[str, str]:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return {p.path: p.message for p in caught.value.problems}


def test_five_mistakes_are_all_named_with_remedies(tmp_path: Path) -> None:
    found = problems_of(FIVE_MISTAKES, tmp_path)
    assert set(found) == {"model.path", "data.train.0", "rollout.temprature", "optim.lr", "stage.0.minibatch_prompts"}
    assert "did you mean 'temperature'?" in found["rollout.temprature"]
    assert "-1.0" in found["optim.lr"] and "greater than 0" in found["optim.lr"]
    assert "no-such-file.jsonl" in found["data.train.0"]
    assert "16" in found["stage.0.minibatch_prompts"] and "prompts_per_step = 8" in found["stage.0.minibatch_prompts"]


def test_a_refused_value_that_is_required_hides_no_other_mistake(tmp_path: Path) -> None:
    text = FIVE_MISTAKES.replace("steps = 5", 'steps = "ten"').replace("prompts_per_step = 8\n", "")
    found = problems_of(text + '[[eval.sets]]\npath = "no-set.jsonl"\n', tmp_path, "optim.betas=[0.9, 1.5]")
    assert set(found) == {"model.path", "data.train.0", "rollout.temprature", "optim.lr", "stage.0.steps",
                          "stage.0.prompts_per_step", "eval.sets.0.name", "eval.sets.0.path", "optim.betas.1"}
    without = problems_of(text.replace("[model]", "").replace('path = "no/such/folder/here"', ""), tmp_path)
    assert "missing" in without["model"] and "model.path" not in without and "data.train.0" in without


def test_scaled_positions_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 9, "rope_scaling": {"rope_type": "yarn"}}')
    overrides = ["stage.1.max_response_tokens=400", "optim.max_tokens_per_rank=4096"]
    assert load_config(QUICKSTART, [f"model.path={tmp_path}", *overrides]).stage[1].max_response_tokens == 400
    with pytest.raises(ConfigError, match="400 is more than max_position_embeddings = 256 in examples/tiny-adder"):
        load_config(QUICKSTART, overrides)


def test_a_mistyped_model_folder_is_not_taken_for_a_hub_id(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json in 'examples/tiny-addr'"):
        load_config(QUICKSTART, ["model.path=examples/tiny-addr"])
    assert load_config(QUICKSTART, ["model.path=Qwen/Qwen2.5-1.5B"]).model.path == "Qwen/Qwen2.5-1.5B"


def test_bad_config_exits_2_within_a_second_and_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(FIVE_MISTAKES)
    probe = (
        "import sys; from or1.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code if not {'torch', 'transformers', 'pyarrow'} & set(sys.modules) else 99)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", probe, "train", str(path)], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert done.returncode == 2, done.stderr
    for number in "12345":
        assert f"  {number}. " in done.stderr
    assert "6. " not in done.stderr
    # Two processes' worth of slack over the promised second, since tests share the machine.
    assert seconds < 2.0


def test_help_needs_no_torch() -> None:
    probe = "import sys, runpy\ntry:\n    from or1.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run([sys.executable, "-c", probe + "sys.exit('torch' in sys.modules)"], capture_output=True)
    assert done.returncode == 0 and b"train" in done.stdout


def test_overrides_reach_nested_values_and_lists() -> None:
    config = load_config(QUICKSTART, ["optim.lr=2e-5", "seed=7", "stage.1.steps=3", "run_dir=runs/other"])
    assert (config.optim.lr, config.seed, config.stage[1].steps, config.run_dir) == (2e-5, 7, 3, "runs/other")


@pytest.mark.parametrize("bad", ["optim.lr", "stage.9.steps=1", "seed.deeper=1", "=3"])
def test_a_bad_override_is_named(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"--set|unknown key"):
        load_config(QUICKSTART, [bad])


def test_config_is_frozen_and_round_trips_through_json() -> None:
    config = load_config(QUICKSTART)
    assert Config.model_validate(json.loads(dump_config(config))) == config
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0


def test_entropy_variants_have_their_own_defaults(tmp_path: Path) -> None:
    paper = load_config(QUICKSTART, ["loss.entropy.variant=paper", 'loss.entropy.control="adaptive"'])
    assert (paper.loss.entropy.delta, paper.loss.entropy.coef_max) != (1e-4, 5e-3)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("optim.max_tokens_per_rank=10", "optim.max_tokens_per_rank"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1"),
        ("optim.weights=stochastic", "optim.weights"),
        ("model.attention=fast", "model.attention"),
        ("loss.entropy.coef=0.5", "loss.entropy.coef"),
        ("loss.clip_low=1.5", "loss.clip_low"),
        ("stage.0.group_size=1", "stage.0.group_size"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("optim.lr=nan", "optim.lr"),
        ("data.train=[]", "data.train"),
        ("stage=[]", "stage"),
        ('run_dir=3', "run_dir"),
        ("stage.1.max_response_tokens=400", "stage.1.max_response_tokens"),
        ("eval.max_response_tokens=257", "eval.max_response_tokens"),
    ],
)
def test_each_limit_names_its_path(override: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [override])
    assert where in {p.path for p in caught.value.problems}


def test_require_think_close_is_refused_where_nothing_heeds_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("")
    override = [f"reward.kind={tmp_path}/own.py:f", "reward.require_think_close=true"]
    with pytest.raises(ConfigError, match=r"reward.require_think_close: true has no effect with a function of your"):
        load_config(QUICKSTART, override)
    assert load_config(QUICKSTART, override[1:]).reward.require_think_close


def test_unreadable_files_are_one_clear_problem(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'run_dir = "caf\xe9"')
    (tmp_path / "broken.toml").write_text("run_dir = [")
    for name, word in (("latin.toml", "UTF-8"), ("broken.toml", "TOML"), ("absent.toml", "cannot be read")):
        with pytest.raises(ConfigError, match=word):
            load_config(tmp_path / name)
