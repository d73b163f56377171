"""Rows of problems in files, and prompts without tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from or1.core.types import Prompt
from or1.data import load_prompts

NO_IDS = np.empty(0, np.int32)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(text: str, name: str = "p") -> Prompt:
    return Prompt(name, "s", text, NO_IDS, ("1",))


def load(path: Path, **options):
    return load_prompts([path], None, max_prompt_tokens=100, **options)
