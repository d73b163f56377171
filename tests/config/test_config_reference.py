"""docs/configuration.md is what or1.config.reference prints, and lists every setting."""

from __future__ import annotations

import re
from pathlib import Path

from or1.config import Config
from or1.config.peers import settings
from or1.config.reference import reference


def test_the_page_is_fresh(root: Path) -> None:
    page = (root / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run python -m or1.config.reference > docs/configuration.md"


def test_every_setting_is_listed_once_with_a_meaning() -> None:
    listed, section = [], ""
    for line in reference().splitlines():
        if found := re.fullmatch(r"## (?:Top level|`(\[+)(.+?)\]+`)", line):
            section = f"{found[2] or ''}{'.0' if found[1] == '[[' else ''}".lstrip(".")
            section = section.replace("eval.sets.columns", "eval.sets.0.columns")  # a table in a list of tables
            section = re.sub(r"^stage\.(?=[a-z])", "stage.0.", section)
        elif found := re.match(r"\| `(\w+)` \| .* \| (.*) \|$", line):
            assert found[2], line
            listed.append(f"{section}.{found[1]}".lstrip("."))
    assert sorted(listed) == sorted(settings(Config))


def test_types_defaults_and_limits() -> None:
    page = reference()
    assert '| `dtype` | `"float32"`, `"bfloat16"`, `"float64"` | `"bfloat16"` |  |' in page
    assert "| `keep_difficulty` | list of 2: integer | - | >= 0, <= 65,536 |" in page
    assert "| `pass_k` | list of integer | `[]` | >= 1, <= 65,536 |" in page
    assert "| `group_size` | integer | **required** | >= 2, <= 65,536 |" in page
    assert "| `betas` | list of 2: number | `[0.9, 0.999]` |  |" in page
