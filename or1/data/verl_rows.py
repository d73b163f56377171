"""Problems as rows of verl's schema, which or1, verl and Skywork-OR1-RL-Data share, in one parquet file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from or1.config import ColumnsConfig
from or1.core.errors import DataError, GroundTruthError
from or1.core.files import replacing
from or1.core.types import Prompt
from or1.data.schemas import TEST_COLUMNS
from or1.reward.ground_truth import parse_ground_truth


def difficulty_models(prompts: Sequence[Prompt]) -> list[str]:
    """Return the sorted names of the models that count difficulty in extra_info.model_difficulty of some row."""
    return sorted({model for prompt in prompts for model in _difficulty(prompt)})


def verl_row(prompt: Prompt, columns: ColumnsConfig, models: Sequence[str]) -> dict[str, Any] | None:
    """Return the row of a problem, None if no form of its tests is read as these tests.

    models  names under extra_info.model_difficulty
    """
    truth = json.dumps(list(prompt.golds), ensure_ascii=False) if prompt.tests is None else _tests(prompt, columns)
    if truth is None:
        return None
    file, _, line = prompt.id.rpartition(":")
    info: dict[str, Any] = {"file": file, "line": int(line)}
    if models:
        counts = _difficulty(prompt)
        info["model_difficulty"] = {model: counts.get(model) for model in models}
    return {
        "data_source": prompt.source,
        "prompt": [dict(message) for message in prompt.messages],
        "ability": "math" if prompt.tests is None else "code",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": info,
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    """Write rows of `verl_row` with whole checksums. Raises DataError if there are none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise DataError(
            f"{path}: no row is left, so nothing was written; see which reasons the sources were dropped for"
        )
    text = pa.string()
    info = [("file", text), ("line", pa.int64())]
    if models:
        info.append(("model_difficulty", pa.struct([(model, pa.float64()) for model in models])))
    schema = pa.schema(
        {
            "data_source": text,
            "prompt": pa.list_(pa.struct([("content", text), ("role", text)])),
            "ability": text,
            "reward_model": pa.struct([("ground_truth", text), ("style", text)]),
            "extra_info": pa.struct(info),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        table = pa.Table.from_pylist(list(rows), schema=schema)
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def _difficulty(prompt: Prompt) -> dict[str, float]:
    info = prompt.row.get("extra_info")
    counts = info.get("model_difficulty") if isinstance(info, Mapping) else None
    found = counts.items() if isinstance(counts, Mapping) else ()
    return {str(k): float(v) for k, v in found if isinstance(v, int | float) and not isinstance(v, bool)}


def _tests(prompt: Prompt, columns: ColumnsConfig) -> str | None:
    """Return the tests as JSON, in the first form of the row that is read as exactly these tests."""
    row, tests = prompt.row, prompt.tests
    assert tests is not None
    model = row.get("reward_model")
    forms = [model.get("ground_truth") if isinstance(model, Mapping) else None, row.get(columns.tests or "tests")]
    forms.append({name: row[name] for name in sorted(TEST_COLUMNS & row.keys())})
    forms.append({"inputs": tests.inputs, "outputs": tests.outputs, "fn_name": tests.fn_name})
    for form in forms:
        try:
            text = form if isinstance(form, str) else json.dumps(form, ensure_ascii=False)
            if form and parse_ground_truth(text) == tests:
                return text
        except (GroundTruthError, TypeError, ValueError):
            continue
    return None
