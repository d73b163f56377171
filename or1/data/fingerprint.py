"""Fingerprints of a run's inputs that the config only names: problems, and a user-defined reward function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from or1.config import Config
from or1.core.types import Prompt
from or1.data import Problems
from or1.reward.custom import file_of


def inputs_of(config: Config, data: Problems) -> dict[str, str]:
    """Return the sha256 of each input by its name for people. For a reward function, its file without its imports."""
    functions = config.reward.functions
    own = config.own_rewards
    found = {"the training problems": fingerprint(data.prompts, own)}
    found |= {f"the problems of {name}": fingerprint(prompts, own) for name, prompts in data.eval_prompts.items()}
    for file in filter(None, map(file_of, functions)):
        found[f"the reward function in {file}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    if config.environment.id.endswith(".py"):
        file = Path(config.environment.id)
        found[f"the environment in {file}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def fingerprint(prompts: Iterable[Prompt], columns: bool = False) -> str:
    """Return the sha256 of all fields of the prompts that their responses and scores depend on.

    columns  include the other columns of the rows, which a user-defined reward function may read
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        row = [json.dumps(prompt.row, default=str)] if columns else []
        for part in (prompt.id, prompt.text, repr(prompt.golds), repr(prompt.tests), *row):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(prompt.token_ids.tobytes())
    return digest.hexdigest()
