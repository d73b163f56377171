"""What a run reads that its config only names: problems and the user's own reward function, as fingerprints."""

from __future__ import annotations

import hashlib

from or1.config import Config
from or1.data import RunData
from or1.eval.sampling import fingerprint
from or1.reward.custom import file_of


def inputs_of(config: Config, data: RunData) -> dict[str, str]:
    """sha256 of each input, by what a person calls it; of a reward function its file, not what that imports."""
    own = config.reward.is_function
    found = {"the training problems": fingerprint(data.prompts, own)}
    found |= {f"the problems of {name}": fingerprint(prompts, own) for name, prompts in data.eval_prompts.items()}
    if own and (file := file_of(config.reward.kind)) is not None:
        found[f"the reward function in {file}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found
