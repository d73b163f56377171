"""Parts of an evaluation on disk: kept, sampled again where damaged, refused under other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from or1.config import EvalSet
from or1.core.errors import StoreError
from or1.eval.store import PartStore

SCHEMA = pa.schema({"x": pa.int64()})


def store(folder: Path, **settings: Any) -> PartStore:
    return PartStore(folder / "parts", folder / "all.parquet", {"seed": 1} | settings, SCHEMA, 2)


def test_damaged_or_exchanged_parts_are_sampled_again(tmp_path: Path) -> None:
    parts = store(tmp_path)
    for index in range(4):
        parts.write(index, [{"x": 10 * index}, {"x": 10 * index + 1}])
    paths = sorted((tmp_path / "parts").glob("part_*.parquet"))
    paths[0].write_bytes(paths[1].read_bytes())
    data = bytearray(paths[2].read_bytes())
    data[data.index(b"PAR1") + 40] ^= 4
    paths[2].write_bytes(data)
    parts = store(tmp_path)
    assert [index in parts for index in range(4)] == [False, True, False, True]


def test_changed_settings_of_parts_and_damaged_results_are_one_line(tmp_path: Path) -> None:
    parts = store(tmp_path)
    parts.write(0, [{"x": 1}])
    record = tmp_path / "parts" / "settings.json"
    record.write_text(record.read_text().replace('"part_size": 2', '"part_size": 3'))
    with pytest.raises(StoreError, match="it was altered"):
        store(tmp_path)
    record.write_text(json.dumps({"seed": 1, "part_size": 2, "merged": False}))
    parts = store(tmp_path)
    assert 0 in parts, "parts of an older or1"
    parts.merge()
    data = bytearray((tmp_path / "all.parquet").read_bytes())
    data[40] ^= 4
    (tmp_path / "all.parquet").write_bytes(data)
    with pytest.raises(StoreError, match=r"all\.parquet cannot be read"):
        list(store(tmp_path).tables())


@pytest.mark.parametrize("name", ["..", ".", "...."])
def test_an_eval_set_cannot_be_a_folder_above(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        EvalSet(name=name, path="x")
    assert EvalSet(name="aime.24", path="x").name == "aime.24"
