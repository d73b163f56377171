"""The JSON schema of a config: fresh, accepts every example, refuses what or1 refuses, and is found by editors."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from or1 import cli
from or1.config.schema import DIALECT, FILE_NAME, schema, schema_text
from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").rglob("*.toml"))
PREFIX = "#:schema "


def errors_of(settings: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    found = schema()
    return [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(found).iter_errors(settings)
    ]


def named_schema(config: Path) -> Path:
    """Return the file that the first line of a config names."""
    first = config.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(PREFIX), f"{config}: the first line is {first!r}, not `{PREFIX}PATH`"
    return (config.parent / first.removeprefix(PREFIX)).resolve()


def quickstart() -> dict[str, Any]:
    return tomllib.loads((ROOT / "examples" / "quickstart.toml").read_text(encoding="utf-8"))


def test_the_committed_schema_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    printed = capsys.readouterr().out
    committed = (ROOT / "examples" / FILE_NAME).read_text(encoding="utf-8")
    assert printed == committed == schema_text(), "run `or1 schema > examples/config.schema.json`"
    assert json.loads(printed)["$schema"] == DIALECT
    pytest.importorskip("jsonschema").Draft202012Validator.check_schema(json.loads(printed))


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_names_the_schema_and_fits_it(config: Path) -> None:
    assert named_schema(config) == ROOT / "examples" / FILE_NAME
    assert errors_of(tomllib.loads(config.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("optim", "learning_rate", 1e-6, "'learning_rate' was unexpected"),
        ("optim", "lr", -1.0, "-1.0 is less than"),
        ("optim", "lr", "fast", "'fast' is not of type 'number'"),
        ("rollout", "engine", "sglang", "'sglang' is not one of"),
        ("checkpoint", "every_steps", 0, "0 is less than the minimum of 1"),
    ],
)
def test_a_mistake_is_marked_at_its_key(section: str, key: str, value: object, said: str) -> None:
    settings = quickstart()
    settings.setdefault(section, {})[key] = value
    (error,) = errors_of(settings)
    assert error.startswith(f"$.{section}") and said in error


def test_unknown_sections_and_missing_values_are_marked() -> None:
    assert "'rewards' was unexpected" in errors_of(quickstart() | {"rewards": {}})[0]
    nameless = quickstart()
    del nameless["model"]["path"]
    assert errors_of(nameless) == ["$.model: 'path' is a required property"]


def test_no_null_is_left_which_toml_does_not_have() -> None:
    text = schema_text()
    assert '"null"' not in text and ": null" not in text


def test_every_setting_has_a_meaning() -> None:
    silent = [
        f"{name}.{key}"
        for name, section in schema()["$defs"].items()
        for key, value in section.get("properties", {}).items()
        if not ({"description", "$ref"} & value.keys()) and "Config" not in json.dumps(value)
    ]
    assert not silent


def test_init_writes_a_schema_beside_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "mine"]) == 0
    found = named_schema(tmp_path / "mine" / "config.toml")
    assert found == tmp_path / "mine" / FILE_NAME and found.read_text(encoding="utf-8") == schema_text()
    assert errors_of(tomllib.loads((tmp_path / "mine" / "config.toml").read_text(encoding="utf-8"))) == []
