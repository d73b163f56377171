"""Architectures that train: random checkpoints of two to four layers, checked and trained for one step.

    python -m benchmarks.architectures > docs/models.md

Every checkpoint comes from the configuration class of transformers, with dropout and the architecture's special
features. It is written as a folder and loaded and checked as in `or1 train`. A slow test compares the page with this
program's output.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from benchmarks.architectures.cases import CASES, SHAPE, VOCAB, Case
from or1.config import ModelConfig
from or1.config.optim import OptimConfig
from or1.core.errors import PackingError
from or1.core.types import TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.model.attention import register
from or1.model.folder import read_config
from or1.model.isolation import rehearse_model
from or1.model.load import load_model
from or1.train.metrics import UpdateStats
from or1.train.optim import MasterAdamW
from or1.train.rank_rows import Policy
from or1.train.score import with_old_logp
from or1.train.update import update

_PAGE = """# Models

Made by `python -m benchmarks.architectures > docs/models.md`; a test holds the two equal. Every architecture is a
random checkpoint of two or three layers, made from the configuration class of transformers. An architecture trains if

- documents of a packed row get no gradient from each other, nor from later tokens (exactly none);
- log-probs in a packed row are those that the model computes for each sequence alone, with or1's attention and with its
  own plain one;
- nothing is random in training mode;
- one optimizer step moves its weights.

`or1 train` asks the same of every model when it is loaded, and `--dry-run` asks it of the first layers with random
weights, so an architecture that is not listed here is trained only if the answers are the same. Names are values of
`model_type` in config.json.

## Trains ({good})

Dropout, left-out layers and noise on routers are set to 0 when a model is loaded, whatever its config.json says.

| model_type | what it has | set to 0 |
|---|---|---|
{trained}

Experts: `router/entropy`, `router/load_max` and `router/unused` are logged. `model.router_aux_coef` adds the
load-balancing loss that transformers defines for the architecture. It is off by default, unless config.json turns it on
(`output_router_logits`). Experts are not spread over GPUs; FSDP shards them as other weights.

Soft caps run in flash-attn 2, 3 or 4 and sinks in flash-attn 4, where these are installed. Elsewhere both are computed
in plain torch, a block of queries at a time: exact, but slower than a kernel.

## Does not train ({bad})

| model_type | what it is | why not |
|---|---|---|
{refused}

Qwen3-Next and Qwen3.5 need the package flash-linear-attention, which needs a GPU; transformers then keeps documents
apart. or1 asks the model the questions above there too, and no such run was made here yet.

"Documents of a row see each other" is how layers with a running state (Mamba, linear attention, convolutions) and
attention that is not exchangeable look from outside: gradients would be wrong, so or1 refuses the model in one line.
"""


def write_checkpoint(case: Case, folder: Path) -> None:
    """Write a random checkpoint of an architecture."""
    config = CONFIG_MAPPING[case.name](**(SHAPE if case.common else {}) | case.settings)
    torch.manual_seed(0)
    (AutoModelForCausalLM if case.causal else AutoModel).from_config(config).save_pretrained(folder)


@dataclass(frozen=True)
class Verdict:
    """Result for an architecture: text is "trains" or the reason against; silenced: settings that or1 sets to 0."""

    text: str
    silenced: tuple[str, ...] = ()


def verdict(case: Case, folder: Path) -> Verdict:
    """Return the verdict of `or1 train --dry-run`. Raises AssertionError if loading and one step disagree with it."""
    write_checkpoint(case, folder)
    settings = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    dry, found = _reason(folder, settings, rehearse_model), _reason(folder, settings, _one_step)
    if dry != found:
        raise AssertionError(f"{case.name}: the dry run says {dry!r}, training {found!r}")
    _, remarks = read_config(settings.path, register("sdpa")) if found == "trains" else (None, [])
    return Verdict(found, tuple(re.findall(r"(\w+) = ", " ".join(remarks))))


def _reason(folder: Path, settings: ModelConfig, action: Callable[[ModelConfig], object]) -> str:
    try:
        action(settings)
    except PackingError as error:
        return error.reason
    except ValueError as error:
        if not type(error).__module__.startswith("or1"):
            raise
        text = str(error).replace(f"{str(folder)!r}: ", "").partition("cannot be trained: ")
        return " ".join((text[2] or text[0]).partition("; ")[0].split())
    return "trains"


def _one_step(settings: ModelConfig) -> None:
    """Load the folder and take one on-policy step. Raises AssertionError unless most decoder tensors change."""
    model = load_model(settings).train()
    random = np.random.default_rng(0)
    prompt = random.integers(3, VOCAB, 5, dtype=np.int32)
    sequences = [
        TrainSequence(prompt, random.integers(3, VOCAB, n, dtype=np.int32), np.zeros(n, np.float32), advantage)
        for n, advantage in ((6, 1.0), (9, -1.0), (4, 0.5))
    ]
    policy = Policy(model, RowBudget(64), sharing="on")
    scored = with_old_logp(policy, sequences)
    sequences = [replace(s, rollout_logp=s.old_logp.astype(np.float32)) for s in scored]
    # Only the decoder: a vision tower is not trained.
    before = {name: p.detach().clone() for name, p in model.get_decoder().named_parameters()}
    optimizer, stats = MasterAdamW(model, OptimConfig(lr=1e-2, max_tokens_per_rank=64)), UpdateStats()
    took = update(policy, optimizer, sequences, 0.0, stats)
    numbers = stats.metrics()
    moved = [name for name, p in model.get_decoder().named_parameters() if not p.equal(before[name])]
    if not took or abs(numbers["mismatch/ratio_max"] - 1) > 1e-4 or numbers["optim/grad_norm"] == 0:
        raise AssertionError(f"a step of {settings.path} was not taken, or its ratios are not 1: {numbers}")
    # Experts that no token chose do not change, nor does a bias before a norm.
    if len(moved) < 0.7 * len(before):
        raise AssertionError(f"only {len(moved)} of {len(before)} tensors of {settings.path} moved")


def verdicts(names: Sequence[str] = ()) -> Iterator[tuple[Case, Verdict]]:
    """Yield the named cases, or all, with their verdicts."""
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if not names or case.name in names:
                yield case, verdict(case, Path(folder) / case.name)


def page() -> str:
    """Return the text of docs/models.md."""
    found = list(verdicts())
    good = [(case, what) for case, what in found if what.text == "trains"]
    bad = [(case, what) for case, what in found if what.text != "trains"]
    trained = [f"| {case.name} | {case.note} | {', '.join(what.silenced)} |" for case, what in good]
    refused = [f"| {case.name} | {case.note} | {what.text} |" for case, what in bad]
    return _PAGE.format(good=len(good), bad=len(bad), trained="\n".join(trained), refused="\n".join(refused))
