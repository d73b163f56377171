"""The folder of a run without a run_dir: the same command resumes, other settings start anew, nothing is moved."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from or1.cli import main
from or1.config import Config
from or1.config.load import load_config
from or1.core.errors import ConfigError, RunError
from or1.run.directory import RECORD, prepare_run_dir
from or1.run.marks import mark_commit
from or1.run.naming import named
from tests.helpers.small_run import ROOT

ADDER = ROOT / "examples" / "tiny-adder"


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = (ROOT / "examples/quickstart.toml").read_text().replace("examples/tiny-adder", str(ADDER))
    file = tmp_path / "adding.toml"
    file.write_text(re.sub(r"(?m)^run_dir.*$", "", text))
    monkeypatch.chdir(tmp_path)
    return file


def begin(config: Config, step: int = 1) -> None:
    """Make the folder of a run that has a checkpoint."""
    prepare_run_dir(config)
    folder = config.run_path / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    state = {"step": step, "stages": {"index": 0, "began": 0, "history": []}}
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "step": step, "files": {}, "state": state}))


def test_the_same_command_resumes_and_other_settings_start_anew(toml: Path) -> None:
    config = load_config(toml)
    assert (config.run_dir, config.run_path) == ("runs/adding-{time}", Path("runs/adding"))
    first = named(config)
    assert re.fullmatch(r"runs/adding-\d{8}-\d{6}", first.config.run_dir) and first.line.endswith(": new")
    assert not Path("runs").exists(), "nothing is written"
    begin(first.config)
    again = named(config)
    assert again.config == first.config and "resumes" in again.line
    other = named(load_config(toml, ["optim.lr=0.5"]))
    assert other.config.run_path != first.config.run_path
    assert other.line.endswith(": new; 1 earlier with other settings")
    begin(other.config)
    assert named(config).config == first.config, "also after another run"
    assert named(load_config(toml, ["optim.lr=0.5", "log.samples=9"])).config.run_dir == other.config.run_dir
    fresh = named(config, fresh=True)
    assert not fresh.config.run_path.exists() and fresh.line.endswith(": new")


def test_a_folder_that_is_named_is_taken_as_it_is(toml: Path) -> None:
    config = load_config(toml, ["run_dir=here"])
    assert named(config) == (config, "")
    assert load_config(toml, ["run_dir={config}/{time}"]).run_dir == "adding/{time}"
    with pytest.raises(ConfigError, match=r"run_dir: \{time\} may stand once"):
        load_config(toml, ["run_dir={time}/x"])
    served = ['rollout.engine="vllm"', 'rollout.vllm.placement="server"', 'rollout.vllm.url=["http://127.0.0.1:8000"]']
    served.append('rollout.vllm.transport="file"')
    with pytest.raises(ConfigError, match=r"run_dir: .* the same for `or1 serve` and `or1 train`"):
        load_config(toml, served)
    assert load_config(toml, [*served, "run_dir=here"]).run_dir == "here"


def test_a_damaged_run_is_told_instead_of_starting_anew(toml: Path) -> None:
    config = load_config(toml)
    run = named(config).config
    begin(run)
    (run.run_path / RECORD).write_text("{")
    with pytest.raises(RunError, match=r"does not hold a run's settings.*--fresh starts in a new folder"):
        named(config)
    assert named(config, fresh=True).config.run_dir != run.run_dir


def test_commands_of_the_same_second_do_not_meet(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    sweep = [load_config(toml, [f"seed={seed}"]) for seed in (1, 2, 3)]
    first = named(sweep[0], claim=True)
    # The second starts before the first has written anything, the third when no step is done.
    second = named(sweep[1], claim=True)
    prepare_run_dir(first.config)
    prepare_run_dir(second.config)
    third = named(sweep[2], claim=True)
    assert [each.config.run_dir for each in (first, second, third)] == [
        f"runs/adding-20260101-000000{repeat}" for repeat in ("", "-1", "-2")
    ]
    assert (second.line[-5:], third.line[-35:]) == (": new", ": new; 2 earlier with other settings"[-35:])
    assert named(sweep[0]).config == first.config, "the same command takes the folder whose run has no step yet"


def test_a_damaged_run_of_other_settings_stops_no_one(toml: Path) -> None:
    config = load_config(toml)
    run = named(config).config
    begin(run, step=5)
    mark_commit(run.run_path, 5)
    shutil.rmtree(run.run_path / "checkpoints")
    with pytest.raises(RunError, match="had a checkpoint of step 5"):
        named(config)
    (run.run_path / "metrics.jsonl").write_text('{"step": 5}\n')
    assert named(load_config(toml, ["optim.lr=0.5"])).line.endswith(": new; 1 earlier with other settings")


def test_ranks_of_torchrun_need_one_folder(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RunError, match="--set run_dir=FOLDER"):
        named(load_config(toml))


def test_a_start_tells_its_folder_and_gives_it_to_its_ranks(
    toml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr("or1.dist.local_ranks.run_ranks", lambda nproc, command: commands.append(command) or 0)
    assert main(["train", str(toml), "--nproc", "2"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run_dir = ")]
    folder = line.removeprefix("run_dir = ").removesuffix(": new")
    assert commands[0][-2:] == ["--set", f'run_dir="{folder}"']
    assert [str(each) for each in Path("runs").iterdir()] == [folder]
    assert main(["train", str(toml), "--dry-run"]) == 0
    assert "run_dir = runs/adding-" in capsys.readouterr().out and len([*Path("runs").iterdir()]) == 1
    odd = toml.rename(toml.with_name('\U0001f600 "a".toml'))
    assert main(["train", str(odd), "--nproc", "2"]) == 0
    assert load_config(odd, commands[1][-1:]).run_dir.startswith('runs/\U0001f600 "a"-2')
