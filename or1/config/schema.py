"""The JSON schema of a config, for editors that complete and check TOML.

    or1 schema > config.schema.json

The schema holds what pydantic knows of one key: name, type, limits, choices, default, meaning. Contradictions between
sections and missing files are found by `or1 train CONFIG --dry-run` only. Short spellings that or1 accepts, such as
"bf16", are not in the schema.
"""

from __future__ import annotations

import json
from typing import Any

from or1.config import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILE_NAME = "config.schema.json"


def schema() -> dict[str, Any]:
    """Return the schema of a TOML file: unknown keys are refused, as by or1 itself."""
    found = Config.model_json_schema()
    _without_nulls(found)
    return {"$schema": DIALECT, **found, "title": "or1 config"}


def schema_text() -> str:
    """Return the contents of examples/config.schema.json."""
    return json.dumps(schema(), indent=1, ensure_ascii=True) + "\n"


def _without_nulls(node: Any) -> None:
    """Remove null from types and defaults: TOML has no null, and an absent key stands for it."""
    if isinstance(node, list):
        for each in node:
            _without_nulls(each)
    if not isinstance(node, dict):
        return
    # Those of a section are the defaults of its keys.
    if "default" in node and (node["default"] is None or "$ref" in node):
        del node["default"]
    if options := node.get("anyOf"):
        kept = [option for option in options if option != {"type": "null"}]
        if len(kept) == 1:
            del node["anyOf"]
            node.update({key: value for key, value in kept[0].items() if key not in node})
        else:
            node["anyOf"] = kept
    for each in node.values():
        _without_nulls(each)
