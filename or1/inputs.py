"""What a run reads that its config only names: problems and the user's own reward function, as fingerprints."""

from __future__ import annotations

import hashlib
from pathlib import Path

from or1.config import Config
from or1.data import RunData
from or1.offline.sample import fingerprint


def inputs_of(config: Config, data: RunData) -> dict[str, str]:
    """sha256 of each input, by what a person calls it. A function in a module has none, and nor has what it imports."""
    found = {"the training problems": fingerprint(data.prompts)}
    found |= {f"the problems of {name}": fingerprint(prompts) for name, prompts in data.eval_prompts.items()}
    place = Path(config.reward.kind.rpartition(":")[0])
    if place.suffix == ".py":
        found[f"the reward function in {place}"] = hashlib.sha256(place.read_bytes()).hexdigest()
    return found
