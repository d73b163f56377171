"""`or1 show`: which responses it chooses, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from or1.cli import main
from or1.commands.show import STATUSES
from or1.core.errors import ReportError
from or1.core.types import Status
from or1.report.samples import load_shown
from tests.helpers.report_runs import make_rollout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (2, 4):
        make_rollout(folder, step, attack="[red]")
    return folder


def test_one_response_of_each_kind_of_the_newest_step_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "step 4: 4 responses (1 rewarded, 1 wrong, 1 truncated, 1 no answer), mean reward 0.250" in shown
    assert "train.jsonl:17  reward 1.000  rewarded  104 tokens  advantage +1.50" in shown
    assert "    What is 47 + 35?[red]\n" in shown, "untrusted text is no markup"
    assert "    Then the tens: 4+3+1=8." in shown


@pytest.mark.parametrize(
    ("options", "statuses"),
    [
        ({"order": "best", "count": 1}, ["ok"]),
        ({"order": "worst", "count": 2}, ["wrong", "truncated"]),
        ({"status": "no_answer"}, ["no_answer"]),
        ({"status": "crash"}, []),
        ({"count": 3}, ["ok", "wrong", "truncated"]),
        ({"step": 2, "order": "best", "count": 9}, ["ok", "wrong", "truncated", "no_answer"]),
    ],
)
def test_responses_are_chosen_by_reward_or_status(run: Path, options: dict, statuses: list[str]) -> None:
    assert [row["status"] for row in load_shown(run, **options).rows] == statuses


def test_a_response_without_a_reward_is_neither_best_nor_worst(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    make_rollout(tmp_path, 1)
    path = tmp_path / "rollouts" / "step_1.parquet"
    table = pq.read_table(path)
    rewards = table.column("reward").to_pylist()
    table = table.set_column(table.schema.get_field_index("reward"), "reward", [[rewards[0], float("nan"), 0.0, 0.5]])
    pq.write_table(table, path)
    assert [row["reward"] for row in load_shown(tmp_path, order="worst").rows] == [0.0, 0.5, 1.0]


def test_equal_rewards_show_one_response_of_each_prompt_first(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    make_rollout(tmp_path, 1)
    path = tmp_path / "rollouts" / "step_1.parquet"
    table = pq.read_table(path)
    for name, values in (("reward", [1.0, 1.0, 1.0, 0.0]), ("prompt_id", ["a", "a", "b", "b"])):
        table = table.set_column(table.schema.get_field_index(name), name, [values])
    pq.write_table(table, path)
    assert [row["prompt_id"] for row in load_shown(tmp_path, order="best").rows] == ["a", "b", "a", "b"]


def test_a_long_response_is_shortened_unless_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_rollout(tmp_path, 1, attack="x" * 4000)
    assert main(["show", str(tmp_path), "--best", "--count", "1"]) == 0
    assert "characters left out; --full shows them]" in capsys.readouterr().out
    assert main(["show", str(tmp_path), "--best", "--count", "1", "--full"]) == 0
    assert "x" * 4000 in capsys.readouterr().out


def test_what_cannot_be_shown_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ReportError, match=r"no saved rollout of step 3 .* the nearest of its 2 is step 2"):
        load_shown(run, 3)
    assert main(["show", str(tmp_path)]) == 70
    assert "has no saved rollout; name the run_dir" in capsys.readouterr().err
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_1.parquet").write_bytes(b"PAR1")
    with pytest.raises(ReportError, match=r"step_1\.parquet cannot be read"):
        load_shown(tmp_path)


def test_the_choices_are_the_statuses() -> None:
    assert sorted(STATUSES) == sorted(status.value for status in Status)
