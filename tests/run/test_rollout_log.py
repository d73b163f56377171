"""Recorded rollouts: read back bit for bit, damage named."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from or1.core.errors import RolloutError
from or1.core.types import Prompt
from or1.run.rollout_log import read_rollouts, write_rollouts
from tests.helpers.hand_run import EOS, ONE, ZERO, group, response


def rollouts(folder: Path) -> tuple[Path, dict[str, Prompt]]:
    groups = [
        replace(
            group([1.0, 0.0], [response(ZERO, ONE, EOS, text="01\u00e9"), response(ONE, text="")]),
            prompt=Prompt(name, "s", "1+1", np.array([7], np.int32), ("0",)),
        )
        for name in "ab"
    ]
    path = write_rollouts(folder / "rollouts", 3, 0, groups, [[1.0, -1.0], None])
    return path, {g.prompt.id: g.prompt for g in groups}


def test_rollouts_come_back_and_every_flipped_bit_is_told_or_harmless(tmp_path: Path) -> None:
    path, prompts = rollouts(tmp_path)
    whole, dice = path.read_bytes(), np.random.default_rng(5)
    want = repr(read_rollouts(path, 3, prompts, 2))
    told = 0
    for place in dice.integers(0, 8 * len(whole), 400).tolist():
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            assert repr(read_rollouts(path, 3, prompts, 2)) == want, f"bit {place}"
        except RolloutError as error:
            told += 1
            assert str(path) in str(error)
    assert told > 50


@pytest.mark.parametrize("size", [0, 4, 100, 1000])
def test_cut_or_exchanged_rollouts_are_one_line(size: int, tmp_path: Path) -> None:
    path, prompts = rollouts(tmp_path)
    with pytest.raises(RolloutError, match="holds the rollouts of step 3"):
        read_rollouts(path, 4, prompts, 2)
    os.truncate(path, size)
    with pytest.raises(RolloutError, match="cannot be read"):
        read_rollouts(path, 3, prompts, 2)


def test_rollouts_of_an_older_or1_are_read(tmp_path: Path) -> None:
    path, prompts = rollouts(tmp_path)
    want = repr(read_rollouts(path, 3, prompts, 2))
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path, compression="zstd")
    assert repr(read_rollouts(path, 3, prompts, 2)) == want


def test_rollouts_into_a_folder_that_is_gone_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="was removed or renamed while the run was at work"):
        rollouts(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
