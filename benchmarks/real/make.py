"""Write a file of real inputs for the head benchmarks: `python -m benchmarks.real.make MODEL FILE [--text FILE ...]`.

The model reads text ("text": every token of windows of it is a target), and answers questions ("addition", and
"questions" with --questions FILE). Responses are sampled by the trainer's embedded engine at temperature 1, in the
checkpoint's dtype. Their advantages are those of GRPO. Hidden states are computed in fp32. MODEL is a Hugging Face
folder. --part-mib cuts the file for machines that take only small uploads.
Legend: D documents, T tokens of a document, P questions, M responses each, H hidden.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib import measure
from benchmarks.real import inputs, text
from benchmarks.real.inputs import Section

# Below this many documents with unequal rewards a section keeps all its responses.
_FEWEST = 16
_BATCH = 16


@dataclass(frozen=True)
class Sizes:
    """How much a file holds.

    windows     windows of text, each of `length` tokens
    groups      questions asked, `group_size` responses each
    documents   most responses kept of a section
    tokens      longest answer to an addition; answers to --questions have `length`
    """

    windows: int = 16
    length: int = 128
    groups: int = 24
    group_size: int = 16
    documents: int = 96
    tokens: int = 24


@dataclass(frozen=True)
class Document:
    """Prompt and response ids, the response's log-probs when sampled (None: those of the model), and an advantage."""

    prompt: Sequence[int]
    response: Sequence[int]
    logp: Sequence[float] | None
    advantage: float


class Reader:
    """A model folder: its tokenizer, the model in the checkpoint's dtype, and the same in fp32."""

    def __init__(self, folder: str):
        from transformers import AutoModelForCausalLM

        from or1.model.load import load_tokenizer

        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        load: Any = AutoModelForCausalLM.from_pretrained
        self.sampler = load(folder, dtype="auto").eval()
        self.model = load(folder, dtype=torch.float32).eval()
        head = self.model.get_output_embeddings()
        scaled = [
            name
            for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
            if getattr(self.model.config, name, None) not in (None, 1.0)
        ]
        if head.bias is not None or scaled:
            why = "a bias" if head.bias is not None else scaled[0]
            raise ValueError(f"the head of {folder} has {why}; real inputs are for plain heads")

    @property
    def weight(self) -> Tensor:
        """The head's weight in the checkpoint's dtype."""
        return self.sampler.get_output_embeddings().weight.detach()

    @torch.no_grad()
    def section(self, documents: Sequence[Document], length: int) -> Section:
        """Return the documents with their hidden states, fp32."""
        shape = (len(documents), length)
        width = self.model.config.hidden_size
        made = Section(
            torch.zeros(*shape, width),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape),
            torch.zeros(shape, dtype=torch.bool),
            torch.tensor([d.advantage for d in documents], dtype=torch.float32),
        )
        for row, document in enumerate(documents):
            count = len(document.response)
            ids = torch.tensor([[*document.prompt, *document.response]])
            out = self.model.get_decoder()(input_ids=ids, use_cache=False)
            hidden_TH = out.last_hidden_state[0, len(document.prompt) - 1 : -1]
            made.hidden[row, :count] = hidden_TH
            made.targets[row, :count] = target_T = ids[0, len(document.prompt) :]
            made.live[row, :count] = True
            if document.logp is None:
                log_p_TV = self.model.get_output_embeddings()(hidden_TH).float().log_softmax(-1)
                made.logp[row, :count] = log_p_TV.gather(1, target_T[:, None])[:, 0]
            else:
                made.logp[row, :count] = torch.tensor(document.logp)
        return made

    def windows(self, documents: Sequence[str], count: int, length: int) -> list[Document]:
        """Return windows of the joined text, spread evenly over it. Raises ValueError for less text than one window."""
        end = self.tokenizer.eos_token_id
        ids = [i for page in documents for i in (*self.tokenizer(page, add_special_tokens=False)["input_ids"], end)]
        if len(ids) < length + 1:
            raise ValueError(f"the text has {len(ids)} tokens; a window needs {length + 1}")
        starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
        return [Document(ids[s : s + 1], ids[s + 1 : s + 1 + length], None, 1.0) for s in starts]

    def answers(
        self, asked: Sequence[text.Question], group_size: int, tokens: int, seed: int = 0
    ) -> tuple[list[Document], dict[str, Any]]:
        """Return sampled answers with GRPO's advantages, and facts about them: reward, groups kept, advantages.

        Groups of equal rewards are left out, as in a run. If fewer than 16 answers are left, all stay, with
        advantages of 1 and -1 in turn.
        """
        from or1.core.types import Prompt
        from or1.data.encode import Encoder
        from or1.magic.advantage import group_advantages
        from or1.rollout.engine import Sampling
        from or1.rollout.hf import HfEngine

        encoder = Encoder(self.tokenizer, "")
        prompts = [Prompt("", "", q.text, encoder(q.text, "question").token_ids) for q in asked]
        found = HfEngine(self.sampler, self.tokenizer, _BATCH * 4).generate(
            prompts, Sampling(temperature=1.0, max_tokens=tokens, samples=group_size, seed=seed)
        )
        by_slot = {(f.prompt, f.sample): f.response for f in found}
        rewards_PM = np.array(
            [
                [text.is_right(by_slot[p, m].text, asked[p].answer) for m in range(group_size)]
                for p in range(len(asked))
            ],
            dtype=float,
        )
        advantages_PM = group_advantages(rewards_PM)
        kept = [p for p in range(len(asked)) if advantages_PM[p].any()]
        how = "GRPO's, of groups with unequal rewards"
        if len(kept) * group_size < _FEWEST:
            kept, how = list(range(len(asked))), "1 and -1 in turn, since hardly any group has unequal rewards"
            advantages_PM = np.resize([1.0, -1.0], rewards_PM.shape)
        made = [
            Document(prompts[p].token_ids.tolist(), r.token_ids.tolist(), r.logp.tolist(), float(advantages_PM[p, m]))
            for p in kept
            for m, r in ((m, by_slot[p, m]) for m in range(group_size))
        ]
        facts = {"reward": float(rewards_PM.mean()), "asked": rewards_PM.size, "advantages": how}
        return made, facts


def make(
    folder: str,
    path: Path,
    *,
    name: str | None = None,
    pages: Sequence[Path] = (),
    questions: Path | None = None,
    sizes: Sizes = Sizes(),  # noqa: B008
) -> inputs.Inputs:
    """Write the file and return its content. Raises ValueError for a head that is more than a weight."""
    reader = Reader(folder)
    documents, what = text.pages(pages)
    windows = reader.windows(documents, sizes.windows, sizes.length)
    sections = {"text": reader.section(windows, sizes.length)}
    facts: dict[str, Any] = {"text": {"source": what, "advantages": "1"}}
    asked = {"addition": (text.additions(sizes.groups), sizes.group_size, sizes.tokens)}
    if questions is not None:
        every = text.questions(questions)
        spread = np.linspace(0, len(every) - 1, max(1, sizes.windows // 4)).astype(int)
        asked["questions"] = ([every[i] for i in spread], 4, sizes.length)
    for section, (some, group_size, tokens) in asked.items():
        answers, facts[section] = reader.answers(some, group_size, tokens)
        # Whole groups, so that advantages still sum to 0.
        most = max(group_size, sizes.documents // group_size * group_size)
        sections[section] = reader.section(answers[:most], tokens)
    if questions is not None:
        facts["questions"]["source"] = questions.name
    facts["addition"]["source"] = "questions for sums of two numbers of two digits"
    about = {
        "name": name or Path(folder).name,
        "model_sha256": _model_hash(Path(folder)),
        "dtype": str(reader.weight.dtype).removeprefix("torch."),
        "sections": facts,
        "made": measure.stamp(),
    }
    inputs.save(path, reader.weight, sections, about)
    return inputs.load(path)


def _model_hash(folder: Path) -> str:
    """Return the SHA-256 of the folder's safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Write the file, print what it holds, and return the exit code."""
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
    parser.add_argument("--part-mib", type=int, metavar="N", help="also cut the file into parts of at most N MiB")
    options = parser.parse_args(arguments)
    made = make(options.model, options.file, name=options.name, pages=options.text, questions=options.questions)
    print(f"{options.file}: {made.shape}, {options.file.stat().st_size / 2**20:.1f} MiB, hash {made.sha256[:12]}")
    for name, section in made.sections.items():
        documents, length = section.targets.shape
        print(f"  {name}: {documents} documents of {length}, {int(section.live.sum())} tokens, {made.facts['sections'][name]}")
    if options.part_mib:
        print("cut into", *(part.name for part in inputs.cut(options.file, options.part_mib << 20)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
