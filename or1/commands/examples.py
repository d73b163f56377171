"""The folder of examples: in a clone of the repository, or in the installed package."""

from __future__ import annotations

import shutil
from pathlib import Path

import or1
from or1.core.errors import RunError

ADDER = "tiny-adder"
"""A model of half a million parameters that adds, with its data; it learns on a CPU in minutes."""
_ADDER_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def examples_folder() -> Path:
    """Return the folder of examples. Raises RunError if this installation has none."""
    home = Path(or1.__file__).resolve().parents[1]
    # setup.py installs examples/ as or1_examples.
    for folder in (home / "examples", home / "or1_examples"):
        if (folder / "quickstart.toml").is_file():
            return folder
    raise RunError("this installation of or1 has no examples; install the wheel or a clone of the repository again")


def copy_adder(folder: Path) -> None:
    """Copy the model of the tiny adder into `folder`. Files that are already there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ADDER_FILES:
        if not (folder / name).exists():
            shutil.copyfile(examples_folder() / ADDER / name, folder / name)
