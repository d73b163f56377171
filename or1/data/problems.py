"""Problems that `[data]` and `[[eval.sets]]` select: files, mixture, difficulty, decontamination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from or1.config import Config, DataConfig
from or1.config.section import each_of
from or1.core.errors import DataError
from or1.core.types import Prompt
from or1.data.contamination import EvalIndex, Overlap, decontamination_lines
from or1.data.difficulty import DifficultyFilter, read_rates
from or1.data.duplicates import duplicate_lines, lost_text_lines
from or1.data.load import FileReport, PromptSet, load_prompts
from or1.data.sampler import Pool


@dataclass(frozen=True)
class Problems:
    """Problems of a run.

    prompts       training prompts, file after file
    pools         position of each file of a mixture in `prompts`; empty without a mixture
    eval_prompts  problems of each evaluation set by its name
    reports       row counts of each training file
    eval_reports  row counts of each evaluation set
    overlaps      training prompts that repeat an evaluation problem
    notes         lines for the user about difficulty, duplicates, lost text and contamination
    """

    prompts: list[Prompt]
    pools: tuple[Pool, ...]
    eval_prompts: dict[str, list[Prompt]]
    reports: list[FileReport]
    eval_reports: list[FileReport]
    overlaps: list[Overlap]
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the report for the user. Evaluation sets appear only if some of their rows were dropped."""
        shown = [*self.reports, *(report for report in self.eval_reports if report.kept < report.rows)]
        return [line for report in shown for line in report.lines()] + self.notes


def load_eval_sets(config: Config, tokenizer: Any) -> dict[str, PromptSet]:
    """Return all problems of every evaluation set by its name. Raises DataError."""
    data = config.data
    return {
        each.name: load_prompts(
            each_of(each.path),
            tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            max_bad_fraction=data.max_bad_fraction,
            prompt_suffix=data.prompt_suffix if each.prompt_suffix is None else each.prompt_suffix,
            answers=config.reward.needs_answers,
            columns=each.columns or data.columns,
            columns_required=each.columns is not None,
            system_prompt=data.system_prompt,
            chat_template=data.chat_template,
        )
        for each in config.eval.sets
    }


def load_problems(config: Config, tokenizer: Any) -> Problems:
    """Read, filter and decontaminate all problems. Raises DataError for an unusable file, or one without prompts."""
    difficulty, notes = _difficulty(config.data)
    loaded = load_training_files(config, tokenizer, difficulty)
    sets = load_eval_sets(config, tokenizer)
    evals = {name: found.prompts for name, found in sets.items()}
    overlaps, found_lines = _decontaminate(config, loaded.prompts, evals, tokenizer)
    left_out = {o.prompt_id for o in overlaps} if config.data.decontaminate == "drop" else set()
    prompts, pools = _without(loaded, left_out, _weights(config.data, loaded))
    limited = {each.name: evals[each.name][: each.limit] for each in config.eval.sets}
    eval_reports = [report for found in sets.values() for report in found.reports]
    notes += duplicate_lines(prompts) + lost_text_lines(prompts)
    return Problems(
        prompts=prompts,
        pools=pools,
        eval_prompts=limited,
        reports=loaded.reports,
        eval_reports=eval_reports,
        overlaps=overlaps,
        notes=notes + found_lines,
    )


def load_training_files(config: Config, tokenizer: Any, difficulty: DifficultyFilter | None = None) -> PromptSet:
    """Return the problems of data.train or data.mix, file after file. Raises DataError."""
    data = config.data
    return load_prompts(
        data.files,
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        prompt_suffix=data.prompt_suffix,
        max_bad_fraction=data.max_bad_fraction,
        difficulty=difficulty,
        answers=config.reward.needs_answers,
        columns=data.columns,
        system_prompt=data.system_prompt,
        chat_template=data.chat_template,
    )


def _difficulty(data: DataConfig) -> tuple[DifficultyFilter | None, list[str]]:
    if data.keep_difficulty is None:
        return None, []
    low, high = data.keep_difficulty
    if data.difficulty_file is None:
        return DifficultyFilter(low, high, model=data.difficulty_model), []
    rates, notes = read_rates(data.difficulty_file, high)
    return DifficultyFilter(low, high, rates=rates), notes


def _decontaminate(
    config: Config, prompts: Sequence[Prompt], evals: dict[str, list[Prompt]], tokenizer: Any
) -> tuple[list[Overlap], list[str]]:
    data = config.data
    others = {
        path: load_prompts(
            [path],
            tokenizer,
            max_prompt_tokens=1 << 30,
            max_bad_fraction=data.max_bad_fraction,
            answers=False,
            columns=data.columns,
            columns_required=False,
        ).prompts
        for path in data.decontaminate_against
    }
    if data.decontaminate == "off" or not (evals or others):
        return [], []
    index = EvalIndex(evals | others, data.decontaminate_ngram)
    overlaps = index.find(prompts)
    return overlaps, decontamination_lines(overlaps, len(prompts), data.decontaminate == "drop")


def _weights(data: DataConfig, loaded: PromptSet) -> list[float]:
    """Return the weight of each file of a mixture: a part's weight, divided among its files by their prompts."""
    weights: list[float] = []
    reports = iter(loaded.reports)
    for part in data.mix:
        kept = [next(reports).kept for _ in each_of(part.path)]
        weights += [part.weight * count / sum(kept) for count in kept]
    return weights


def _without(loaded: PromptSet, left_out: set[str], weights: Sequence[float]) -> tuple[list[Prompt], tuple[Pool, ...]]:
    """Return the remaining prompts, and one pool per file if there are weights."""
    prompts: list[Prompt] = []
    pools: list[Pool] = []
    place = 0
    for i, report in enumerate(loaded.reports):
        stay = [p for p in loaded.prompts[place : place + report.kept] if p.id not in left_out]
        if not stay:
            raise DataError(
                f"{report.path}: every usable prompt repeats an evaluation problem; remove the file from "
                'the data, or set data.decontaminate = "report"'
            )
        if weights:
            pools.append(Pool(len(prompts), len(stay), weights[i]))
        prompts += stay
        place += report.kept
    return prompts, tuple(pools)
