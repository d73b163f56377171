"""What `or1 doctor` says of the machine."""

from __future__ import annotations

import tomllib
from pathlib import Path

from or1.commands.doctor import package_lines


def test_the_doctor_names_every_package_of_the_project_and_no_other(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [
        text
        for name in ("triton", "liger", "flash-attn", "flash-attn-4", "torchao", "wandb", "trackio")
        for text in extras[name]
    ]
    named.append(extras["quack"][0])
    wanted = {text.partition(">=")[0].partition("==")[0] for text in (*project["dependencies"], *named)} | {
        "trl",
        "verl",
    }
    assert {line.name for line in package_lines()} == wanted | {"or1_kernels", "bubblewrap"}
