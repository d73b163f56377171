"""The choice of a run: when it is measured, kept, used and overridden."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from or1.config import Config
from or1.config.changes import changed_keys, fixed_keys
from or1.config.load import load_config
from or1.core.errors import ConfigError
from or1.plan.devices import find_device
from or1.plan.rates import measured
from or1.plan.shapes import shape_of
from or1.train.build import _tuned
from or1.tune import cache, run
from or1.tune.apply import head_options, settled
from or1.tune.case import case_of
from or1.tune.choice import Choice, Record
from or1.tune.machine import device_of, key_of
from tests.helpers.ranks import run_ranks
from tests.helpers.small_run import arguments, lines

FAKES = "tests.helpers.tuner_fakes:benches"


class Told:
    """A display that keeps all messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.shown: list[tuple[int, int]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def progress(self, name: str) -> Callable[[int, int], None]:
        assert name == "tune"
        return lambda done, total: self.shown.append((done, total))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # A choice of threads would hold for the tests after this.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return tmp_path / "cache" / "or1" / "tune"


@pytest.fixture
def config_of(root: Path, tmp_path: Path) -> Callable[..., Config]:
    (tmp_path / "run").mkdir()

    def make(*overrides: str) -> Config:
        path = f"model.path={root / 'examples/tiny-adder'}"
        sets = [path, f"run_dir={tmp_path / 'run'}", *overrides]
        return load_config(root / "examples" / "quickstart.toml", sets, files=False)

    return make


def choose(config: Config, first: bool = True) -> tuple[Choice, list[str]]:
    told = Told()
    return run.choice_of_run(config, told, first=first, benches=FAKES), told.messages


def test_a_run_on_a_cpu_measures_and_uses_nothing_by_itself(config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run.measure(config_of(), Told(), 60.0, benches=FAKES)
    monkeypatch.setattr(run, "measure", None)
    assert choose(config_of()) == (Choice(), [])
    assert settled(config_of().model, Choice()) == config_of().model


def test_the_choice_is_measured_once_kept_twice_and_found_again(config_of: Any, home: Path, tmp_path: Path) -> None:
    config = config_of("tune=on")
    choice, messages = choose(config)
    # By the fakes more rows are faster, and the native head twice as fast.
    assert choice == Choice(head_impl="native", head_chunk_rows=2048)
    assert "measuring what is fastest here, at most 60 s" in messages[0]
    assert "head_impl native, head_chunk_rows 2048 (measured now" in messages[1]
    (kept,) = home.glob("*.json")
    assert kept.read_text() == (tmp_path / "run" / "tune.json").read_text()
    (tmp_path / "run" / "tune.json").unlink()
    again, messages = choose(config)
    assert again == choice and messages == [f"tune: {choice.line()} (from an earlier measurement)"]
    assert json.loads((tmp_path / "run" / "tune.json").read_text())["choice"] == choice.values()


def test_another_version_measures_anew(config_of: Any, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    choose(config_of("tune=on"))
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert "measuring" in choose(config_of("tune=on"))[1][0] and len([*home.iterdir()]) == 2


def test_a_damaged_result_is_ignored_with_a_message(config_of: Any, home: Path, tmp_path: Path) -> None:
    choice, _ = choose(config_of("tune=on"))
    (kept,) = home.glob("*.json")
    for path in (kept, tmp_path / "run" / "tune.json"):
        path.write_text("{")
    again, messages = choose(config_of("tune=on"))
    assert again == choice and len([m for m in messages if "holds no usable result" in m]) == 2
    assert any("measuring" in m for m in messages)


def test_a_resumed_run_keeps_its_choice_whatever_the_cache_says(config_of: Any, home: Path, tmp_path: Path) -> None:
    choice, _ = choose(config_of("tune=on"))
    for path in home.iterdir():
        path.unlink()
    # Also with the settings of a later start: the rows changed, so the key is another.
    again, messages = choose(config_of("optim.max_tokens_per_rank=4096"), first=False)
    assert again == choice and messages == [f"tune: {choice.line()} (recorded in {tmp_path / 'run' / 'tune.json'})"]
    assert not [*home.iterdir()], "nothing was measured"


def test_a_run_that_began_without_a_choice_resumes_without_one(config_of: Any, home: Path) -> None:
    assert choose(config_of("tune=on"), first=False) == (Choice(), []) and not home.exists()


def test_a_run_that_moved_to_another_device_uses_the_defaults(config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(config_of("tune=on"))
    monkeypatch.setattr("or1.tune.machine._cpu_name", lambda: "another")
    choice, messages = choose(config_of("tune=on"), first=False)
    assert choice == Choice() and "which this machine is not; the defaults apply" in messages[0]


@pytest.mark.parametrize("off", ["tune=off", "deterministic=true"])
def test_off_and_deterministic_runs_use_nothing(off: str, config_of: Any) -> None:
    choose(config_of("tune=on"))
    for first in (True, False):
        choice, (message,) = choose(config_of(off), first)
        assert choice == Choice() and off.partition("=")[0] in message and "is not used" in message
    with pytest.raises(ConfigError, match="chooses by time"):
        config_of("tune=on", "deterministic=true")


def test_an_explicit_setting_wins(config_of: Any) -> None:
    config = config_of("tune=on", "model.head_impl=torch", "model.head_chunk_rows=100")
    choice, _ = choose(config)
    assert choice.head_impl is None and choice.head_chunk_rows is None
    # Also over a choice that was made without it.
    given = Choice(head_impl="native", head_chunk_rows=512, head_preset="lean", mlp_tile_tokens=2048, attention="sdpa")
    model = settled(config.model, given)
    assert (model.head_impl, model.head_chunk_rows, model.mlp_tile_tokens) == ("torch", 100, 16384)
    assert (model.head_preset, model.attention) == ("lean", "sdpa")
    assert head_options(model) == {"impl": "torch", "preset": "lean", "chunk_rows": 100, "stash_bytes": 0}
    assert settled(config_of("model.mlp_tile_tokens=auto").model, given).tile_tokens == 2048
    assert settled(config_of("model.mlp_tile_tokens=0").model, given).tile_tokens == 0
    assert head_options(config_of().model) == {"impl": "auto", "preset": "fast", "chunk_rows": None, "stash_bytes": 0}


def test_a_choice_that_the_settings_do_not_allow_is_not_used(config_of: Any, tmp_path: Path) -> None:
    config = config_of("tune=on")
    record = Record(key_of(case_of(config), config.model), Choice(attention="magic"), {})
    cache.write(tmp_path / "run" / "tune.json", record)
    for first in (True, False):
        choice, messages = choose(config, first)
        assert choice == Choice() and "does not fit this or1" in messages[0]


def test_a_tuning_that_fails_never_ends_a_run(config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    broken = "tests.helpers.tuner_fakes:broken"
    assert run.choice_of_run(config_of("tune=on"), told, first=True, benches=broken) == Choice()
    monkeypatch.setattr(run, "case_of", lambda *_: (_ for _ in ()).throw(RuntimeError("no such card")))
    choice, messages = choose(config_of("tune=on", "seed=2", "model.head_impl=torch"))
    assert choice == Choice() and messages == ["tune: nothing was measured (no such card); the defaults apply"]


def test_what_failed_is_shown_before_the_first_update(config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("or1.tune.case.Case.as_json", lambda self: {"behaviour": {"native": "raise"}})
    choice, messages = choose(config_of("tune=on"))
    assert messages[1] == "tune: head native is out: RuntimeError: no kernel for this shape"
    assert choice == Choice(head_chunk_rows=2048) and len(messages) == 3


def test_a_hanging_candidate_costs_its_limit_alone(config_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("or1.tune.search.FIRST_LIMIT_S", 1.5)
    monkeypatch.setattr("or1.tune.search.FIRST_SHARE", 0.0)
    monkeypatch.setattr(
        "or1.tune.case.Case.as_json", lambda self: {"behaviour": {"native": "hang", "torch": "raise", "lean": 9.0}}
    )
    told = Told()
    record = run.measure(config_of(), told, 60.0, benches=FAKES)
    why = {trial.name: trial.why_out for trial in record.trials if trial.group == "head"}
    assert why["native"] == "no answer within 1.5 s; it was ended"
    assert why["torch"] == "RuntimeError: no kernel for this shape"
    assert why["auto, lean"].startswith("wrong: its error is 9") and record.choice.head_impl is None
    assert told.shown[-1] == (60, 60)


def _in_ranks(overrides: list[str], config_path: str) -> dict:
    """Return what this rank settles on; the ranks' machines would measure different things."""
    from or1.config import DistConfig
    from or1.dist.world import join

    config = load_config(config_path, overrides, files=False)
    with join(DistConfig(), torch.device("cpu")) as world:
        run.choice_of_run = None
        from or1.train import build

        mine = Choice(head_impl="torch", head_chunk_rows=64 + world.rank)
        build.choice_of_run = lambda *_, **__: mine
        assert world.from_main(str(world.rank).encode()) == b"0"
        model = _tuned(config, Told(), world, first=True)
    return {"impl": model.head_impl, "rows": model.head_chunk_rows}


def test_all_ranks_use_the_choice_of_the_main_rank(root: Path) -> None:
    found = run_ranks(_in_ranks, 2, ["run_dir=unused"], str(root / "examples" / "quickstart.toml"))
    assert found == [{"impl": "torch", "rows": 64}] * 2


def test_tune_may_change_in_a_resumed_run(config_of: Any) -> None:
    old, new = (config_of(f"tune={value}").model_dump(mode="json") for value in ("auto", "off"))
    changed = changed_keys(old, new)
    assert changed == ["tune"] and fixed_keys(changed, 0, 1, 2) == []
    # A run of an or1 without these settings goes on.
    for name in ("head_impl", "head_preset", "head_chunk_rows"):
        del old["model"][name]
    del old["tune"]
    assert changed_keys(old, config_of().model_dump(mode="json")) == []


@pytest.mark.slow
def test_a_training_run_records_uses_and_resumes_its_choice(
    or1: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The choice lies in the user's cache, under the key of this run, so that nothing is measured here.
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    folder = tmp_path / "trained"
    settings = {"tune": "on", "stage.0.steps": 1, "stage.1.steps": 1, "model.head_chunk_rows": 0}
    command = arguments(folder, **settings)
    sets = [part for flag, part in pairwise(command) if flag == "--set"]
    config = load_config(command[1], sets)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    key = key_of(case_of(config), config.model)
    torch.set_num_threads(threads)
    choice = Choice(head_impl="torch", head_chunk_rows=7)
    assert cache.keep(Record(key, choice, {}), print) is not None
    done = or1(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tune: head_impl torch, head_chunk_rows 7 (from an earlier measurement)" in (folder / "log.txt").read_text()
    assert json.loads((folder / "tune.json").read_text())["choice"] == choice.values()
    # One more step, with the recorded choice although the user's cache is gone, and without it if it is off.
    for path in cache.folder().iterdir():
        path.unlink()
    assert or1(*command, "--set", "stage.1.steps=2", "--set", "tune=auto").returncode == 0
    assert "(recorded in" in (folder / "log.txt").read_text()
    assert or1(*command, "--set", "stage.1.steps=3", "--no-tune").returncode == 0
    assert 'is not used (tune = "off")' in (folder / "log.txt").read_text() and len(lines(folder)) == 5


@pytest.mark.slow
def test_the_verb_measures_this_machine_and_the_plan_uses_that(
    or1: Callable[..., subprocess.CompletedProcess[str]], root: Path, home: Path
) -> None:
    done = or1("tune", "examples/quickstart.toml", "--budget", "45")
    assert done.returncode == 0, done.stderr
    (kept,) = home.glob("*.json")
    # The folder's name may be wrapped, the file's is not.
    for part in ("or1 tune: ", "LM head", "head chunk", "attention", "chosen", "choice: ", kept.name, 'tune = "on"'):
        assert part in done.stdout, part
    plan = or1("plan", "examples/quickstart.toml", "--device", "cpu")
    assert "measured: " in plan.stdout and "(or1 tune, " in plan.stdout
    elsewhere = or1("plan", "examples/quickstart.toml", "--device", "H200")
    assert "measured" not in elsewhere.stdout and "assumed" in elsewhere.stdout


def test_measured_rates_replace_the_assumed_shares_of_the_same_device_and_width(root: Path, config_of: Any) -> None:
    shape = shape_of(str(root / "examples" / "tiny-adder"))
    case = {"hidden": shape.hidden, "vocab": shape.vocab, "dtype": "bfloat16"}
    device = {"kind": "cuda", "name": "NVIDIA H200", "capability": "9.0", "driver": "1"}
    rates = {"head": 700e12, "attention": 494.5e12}
    cache.keep(Record({"device": device, "case": case}, Choice(), rates, made="2026-01-01"), print)
    h200 = find_device("H200", "auto")[0]
    found = measured(h200, shape, "bfloat16").efficiency
    assert (found.attention, found.matmul) == (0.5, h200.efficiency.matmul) and found.head == 700 / 989
    assert found.source == "attention, LM head (or1 tune, NVIDIA H200, 2026-01-01)"
    assert measured(h200, shape, "float32") == h200
    h100 = find_device("H100", "auto")[0]
    assert measured(h100, shape, "bfloat16") == h100
    assert device_of("cpu")["kind"] == "cpu"
