"""The file of real inputs: a head's weight, and sections of documents with hidden states and tokens.

    python -m benchmarks.real.make MODEL FILE          writes one
    load(FILE).problem("addition", tokens=1536)        gives the inputs of the head benchmarks

The file is safetensors. Reading needs torch and safetensors only.
Legend: D documents, T tokens of a document, N rows, H hidden, V vocab.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.lib.problems import Problem, Shape

PREFIX = "real "
"""Start of `Problem.logits` of real inputs; the section follows."""
FIELDS = ("hidden", "targets", "logp", "live", "advantages")
_WEIGHT = "weight"


class Section(NamedTuple):
    """Documents of one kind, padded on the right to equal length.

    hidden      float[D, T, H], the states that predict the targets
    targets     i64[D, T]
    logp        f32[D, T], log-probabilities of the targets from these hidden states, nats; 0 where not live
    live        bool[D, T], False where a document has ended
    advantages  f32[D]
    """

    hidden: Tensor
    targets: Tensor
    logp: Tensor
    live: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class Inputs:
    """Content of a file. facts: model, texts and versions, as the command that made the file found them."""

    weight: Tensor
    sections: Mapping[str, Section]
    facts: Mapping[str, Any]
    sha256: str

    @property
    def shape(self) -> Shape:
        """Sizes of the head, under the model's name."""
        vocab, hidden = self.weight.shape
        return Shape(str(self.facts["name"]), hidden, vocab)

    def rows(self, section: str) -> int:
        """Return the rows of a section, padding included."""
        return self.sections[section].targets.numel()

    def masked(self, section: str) -> float:
        """Return the part of a section's rows that is padding, rounded to two digits."""
        return round(1 - float(self.sections[section].live.float().mean()), 2)

    def problem(
        self,
        section: str,
        tokens: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Problem:
        """Return `tokens` rows of a section, rounded down to whole documents; documents repeat if there are too few.

        None: the section once. Raises ValueError for a section that the file lacks, and for less than one document.
        """
        if section not in self.sections:
            raise ValueError(f"section is {section!r}; the file has {', '.join(self.sections)}")
        part = self.sections[section]
        count, length = part.targets.shape
        documents = count if tokens is None else tokens // length
        if documents < 1:
            raise ValueError(f"tokens is {tokens}; a document of section {section!r} has {length}")
        index_D = torch.arange(documents) % count
        live_N = part.live[index_D].flatten()
        return Problem(
            shape=self.shape,
            logits=PREFIX + section,
            masked=self.masked(section),
            documents=documents,
            hidden=part.hidden[index_D].flatten(0, 1).to(device, dtype),
            weight=self.weight.to(device, dtype),
            targets=part.targets[index_D].flatten().to(device),
            advantages=part.advantages[index_D].repeat_interleave(length).to(device),
            token_weight=(live_N.float() / live_N.sum().clamp_min(1)).to(device),
            old_logp=part.logp[index_D].flatten().to(device),
        )


def save(path: Path, weight_VH: Tensor, sections: Mapping[str, Section], facts: Mapping[str, Any]) -> str:
    """Write a file and return the SHA-256 of its tensors. Hidden states and weight keep their dtypes."""
    from safetensors.torch import save_file

    tensors = {_WEIGHT: weight_VH.detach().contiguous().clone()}
    for name, section in sections.items():
        tensors |= {f"{name}/{field}": x.detach().contiguous() for field, x in section._asdict().items()}
    digest = _digest(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"facts": json.dumps(facts), "sha256": digest})
    return digest


@lru_cache(maxsize=2)
def load(path: str | Path) -> Inputs:
    """Return a file's content.

    Raises FileNotFoundError if there is no file, and ValueError if the tensors do not have the hash that they were
    saved with.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; python -m benchmarks.real.make MODEL {path.name} writes one")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
        facts, saved = json.loads(header["facts"]), header["sha256"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no whole file of python -m benchmarks.real.make: {error!r}") from error
    digest = _digest(tensors)
    if digest != saved:
        raise ValueError(f"{path} has the hash {digest[:12]} and was saved with {saved[:12]}; write or copy it again")
    sections = {name: Section(*(tensors[f"{name}/{field}"] for field in FIELDS)) for name in facts["sections"]}
    return Inputs(tensors[_WEIGHT], sections, facts, digest)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
