"""Write a file of real inputs for the head benchmarks: `python -m benchmarks.real.make MODEL FILE [--text FILE ...]`.

The model reads text ("text": every token of a window is a target), and answers questions ("addition", and "questions"
with --questions FILE). Answers are sampled by the trainer's embedded engine at temperature 1, in the checkpoint's
dtype, and get GRPO's advantages. Hidden states are computed in --dtype. MODEL is a Hugging Face folder. The prompts and
answers as token ids go to FILE with the suffix .rollouts.json, for benchmarks.step.
Legend: D documents, T tokens of a document, P questions, M answers each, H hidden, V vocab.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib import measure
from benchmarks.real import inputs, text
from benchmarks.real.inputs import Section
from or1.core.types import Prompt
from or1.magic.advantage import group_advantages

# Below this many answers in groups with unequal rewards a section keeps all its answers.
_FEWEST = 16
_BATCH = 64
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Sizes:
    """How much a file holds.

    windows     windows of text, each of `length` tokens
    groups      additions asked, `group_size` answers each
    documents   most answers kept of a section, in whole groups
    tokens      longest answer to an addition; answers to --questions have `length`
    questions   questions of --questions asked, `samples` answers each
    """

    windows: int = 16
    length: int = 128
    groups: int = 24
    group_size: int = 16
    documents: int = 96
    tokens: int = 24
    questions: int = 4
    samples: int = 8


@dataclass(frozen=True)
class Document:
    """Token ids of a prompt and a response, and the response's advantage."""

    prompt: list[int]
    response: list[int]
    advantage: float


class Reader:
    """A model folder: its tokenizer, the model in the checkpoint's dtype, and the same in `dtype`.

    Raises ValueError for a head that is more than a weight.
    """

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForCausalLM

        from or1.model.load import load_tokenizer

        self.tokenizer = load_tokenizer(folder)
        load: Any = AutoModelForCausalLM.from_pretrained
        self.sampler = load(folder, dtype="auto").eval()
        self.model = load(folder, dtype=dtype).eval()
        scaled = [
            name
            for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
            if getattr(self.model.config, name, None) not in (None, 1.0)
        ]
        if self.model.get_output_embeddings().bias is not None:
            scaled.append("bias")
        if scaled:
            raise ValueError(f"the head of {folder} has {scaled[0]}; real inputs are for heads of a weight alone")

    @property
    def weight(self) -> Tensor:
        """The head's weight in the checkpoint's dtype."""
        return self.sampler.get_output_embeddings().weight.detach()

    @torch.no_grad()
    def section(self, documents: Sequence[Document], length: int) -> Section:
        """Return the documents with their hidden states in the model's dtype, padded to `length` tokens."""
        shape = (len(documents), length)
        made = Section(
            torch.zeros(*shape, self.model.config.hidden_size, dtype=self.model.dtype),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape),
            torch.zeros(shape, dtype=torch.bool),
            torch.tensor([d.advantage for d in documents], dtype=torch.float32),
        )
        weight_VH = self.weight.float()
        for row, document in enumerate(documents):
            count = len(document.response)
            ids = torch.tensor([[*document.prompt, *document.response]])
            out = self.model.get_decoder()(input_ids=ids, use_cache=False)
            hidden_TH = out.last_hidden_state[0, len(document.prompt) - 1 : -1]
            target_T = ids[0, len(document.prompt) :]
            log_p_TV = (hidden_TH.float() @ weight_VH.T).log_softmax(-1)
            made.hidden[row, :count] = hidden_TH
            made.targets[row, :count] = target_T
            made.logp[row, :count] = log_p_TV.gather(1, target_T[:, None])[:, 0]
            made.live[row, :count] = True
        return made

    def windows(self, documents: Sequence[str], count: int, length: int) -> list[Document]:
        """Return windows of the joined text, spread evenly over it. Raises ValueError for less text than one window."""
        end = self.tokenizer.eos_token_id
        ids = [i for page in documents for i in (*self.tokenizer(page, add_special_tokens=False)["input_ids"], end)]
        if len(ids) < length + 1:
            raise ValueError(f"the text has {len(ids)} tokens; a window needs {length + 1}")
        starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
        return [Document(ids[s : s + 1], ids[s + 1 : s + 1 + length], 1.0) for s in starts]

    def answers(
        self, asked: Sequence[text.Question], group_size: int, tokens: int, seed: int = 0
    ) -> tuple[list[Document], dict[str, Any]]:
        """Return sampled answers with GRPO's advantages, and facts about them.

        Groups of equal rewards are left out, as in a run. If fewer than 16 answers are left, all stay, with
        advantages of 1 and -1 in turn.
        """
        from or1.data.encode import Encoder
        from or1.rollout.engine import Sampling
        from or1.rollout.hf import HfEngine

        encoder = Encoder(self.tokenizer, "")
        prompts = [Prompt("", "", q.text, encoder(q.text, "question").token_ids) for q in asked]
        sampling = Sampling(temperature=1.0, max_tokens=tokens, samples=group_size, seed=seed)
        found = HfEngine(self.sampler, self.tokenizer, _BATCH).generate(prompts, sampling)
        by_slot = {(f.prompt, f.sample): f.response for f in found}
        slots = [[(p, m) for m in range(group_size)] for p in range(len(asked))]
        rewards_PM = np.array(
            [[float(text.is_right(by_slot[slot].text, asked[slot[0]].answer)) for slot in group] for group in slots]
        )
        advantages_PM, how = group_advantages(rewards_PM), "GRPO's, of groups with unequal rewards"
        kept = np.flatnonzero(advantages_PM.any(1))
        if len(kept) * group_size < _FEWEST:
            kept, how = np.arange(len(asked)), "1 and -1 in turn, since hardly any group has unequal rewards"
            advantages_PM = np.resize([1.0, -1.0], rewards_PM.shape)
        made = [
            Document(prompts[p].token_ids.tolist(), by_slot[p, m].token_ids.tolist(), float(advantages_PM[p, m]))
            for p in kept
            for m in range(group_size)
        ]
        return made, {"reward": float(rewards_PM.mean()), "answers": rewards_PM.size, "advantages": how}


def make(
    folder: str,
    path: Path,
    *,
    name: str | None = None,
    pages: Sequence[Path] = (),
    questions: Path | None = None,
    dtype: torch.dtype = torch.float32,
    sizes: Sizes = Sizes(),
) -> inputs.Inputs:
    """Write the file and its rollouts, and return the file's content."""
    reader = Reader(folder, dtype)
    documents, what = text.pages(pages)
    windows = reader.windows(documents, sizes.windows, sizes.length)
    sections = {"text": reader.section(windows, sizes.length)}
    facts: dict[str, Any] = {"text": {"source": what, "advantages": "1"}}
    asked = {"addition": (text.additions(sizes.groups), sizes.group_size, sizes.tokens)}
    sources = {"addition": "questions for sums of two numbers of two digits"}
    if questions is not None:
        every = text.questions(questions)
        spread = np.linspace(0, len(every) - 1, sizes.questions).astype(int)
        asked["questions"] = ([every[i] for i in spread], sizes.samples, sizes.length)
        sources["questions"] = questions.name
    rollouts: dict[str, list[dict[str, Any]]] = {}
    for section, (some, group_size, tokens) in asked.items():
        answers, about = reader.answers(some, group_size, tokens)
        # Whole groups, so that advantages still sum to 0.
        answers = answers[: max(group_size, sizes.documents // group_size * group_size)]
        sections[section] = made = reader.section(answers, tokens)
        about["nats"] = -float(made.logp.sum() / made.live.sum())
        facts[section] = about | {"source": sources[section], "group_size": group_size}
        rollouts[section] = [asdict(document) for document in answers]
    about = {
        "name": name or Path(folder).name,
        "model_sha256": _model_hash(Path(folder)),
        "dtype": str(dtype).removeprefix("torch."),
        "weight_dtype": str(reader.weight.dtype).removeprefix("torch."),
        "sections": facts,
        "made": measure.stamp(),
    }
    inputs.save(path, reader.weight, sections, about)
    rollouts_of(path).write_text(json.dumps(rollouts) + "\n", encoding="utf-8")
    return inputs.load(path)


def rollouts_of(path: Path) -> Path:
    """Return the path of the rollouts beside a file of inputs."""
    return path.with_suffix(".rollouts.json")


def _model_hash(folder: Path) -> str:
    """Return the SHA-256 of the folder's safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Write the file, print what the file holds, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.make", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("file", type=Path, help="file to write, .safetensors")
    parser.add_argument("--name", help="name in tables (default: the folder's)")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text, or JSONL with question and answer (default: the repository's own pages)",
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="JSONL with question and answer, to be answered")
    parser.add_argument("--dtype", choices=_DTYPES, default=_DTYPES[0], help="of the hidden states (default float32)")
    options = parser.parse_args(arguments)
    made = make(
        options.model,
        options.file,
        name=options.name,
        pages=options.text,
        questions=options.questions,
        dtype=getattr(torch, options.dtype),
    )
    print(f"{options.file}: {made.shape}, {options.file.stat().st_size / 2**20:.1f} MiB, hash {made.sha256[:12]}")
    for name, section in made.sections.items():
        size = "{} documents of {}".format(*section.targets.shape)
        print(f"  {name}: {size}, {int(section.live.sum())} tokens, {made.facts['sections'][name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
