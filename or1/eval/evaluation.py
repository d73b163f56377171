"""The evaluation sets of a config, sampled by a checkpoint or a server: transcripts, statistics and eval.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from or1.config import Config, EvalSet
from or1.config.load import dump_config
from or1.core.display import Display
from or1.core.files import write_whole
from or1.core.types import Prompt
from or1.data import load_eval_sets
from or1.eval.accuracy import EvalResult, Outcome, by_source, pass_ks, summarise_set
from or1.eval.sampling import part_size, reuse_message, sample_parts, score_inputs
from or1.eval.source import Source, open_source
from or1.eval.store import PartStore, move_aside
from or1.eval.target import Target
from or1.eval.transcripts import COUNTED, TRANSCRIPTS, outcomes_of, transcript_rows
from or1.reward import make_scorer
from or1.reward.scorer import Scorer
from or1.reward.scorers import remarks_of
from or1.rollout.engine import Sampling
from or1.run.checkpoint import committed_steps
from or1.run.directory import checkpoints_of


@dataclass(frozen=True)
class Evaluation:
    """Statistics of every set in the order of the config.

    sources  statistics of each source of a set, by the name of the set
    report   the contents of eval.json
    """

    results: list[EvalResult]
    sources: dict[str, list[EvalResult]]
    report: dict[str, Any]


def evaluate_target(target: Target, display: Display, fresh: bool = False) -> Evaluation:
    """Evaluate every set of the config. Finished sets, and finished parts of sets, are reused.

    Write config.resolved.json, parts/, transcripts/SET.parquet and eval.json to `target.out`.
    Raises DataError, StoreError, ModelError, EndpointError, ScorerError.
    """
    config, out = target.config, target.out
    with open_source(config) as source:
        if fresh and (message := move_aside(out / "parts")):
            display.message(message)
        for line in weights_lines(config, source):
            display.message(line)
        loaded = load_eval_sets(config, source.tokenizer)
        for line in (line for found in loaded.values() for report in found.reports for line in report.lines()):
            display.message(line)
        problems = {each.name: loaded[each.name].prompts[: each.limit] for each in config.eval.sets}
        out.mkdir(parents=True, exist_ok=True)
        with make_scorer(config.reward, chain.from_iterable(problems.values()), out) as scorer:
            for remark in remarks_of(scorer, out):
                display.message(remark)
            outcomes = {
                each.name: _sample_set(target, each, problems[each.name], source=source, scorer=scorer, display=display)
                for each in config.eval.sets
            }
    write_whole(out / "config.resolved.json", dump_config(config))
    results, sources = _summarise(config, outcomes)
    report = _report(config, source, results, sources)
    write_whole(out / "eval.json", json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    return Evaluation(results, sources, report)


def weights_lines(config: Config, source: Source) -> Iterator[str]:
    """Yield which weights are evaluated. The config of a trained run names the weights before training: warn."""
    if "url" in source.model:
        yield f"model: {source.model['model']} of {source.model['url']}"
        return
    yield f"model: {config.model.path}"
    trained = committed_steps(checkpoints_of(config.run_path))
    if trained and not Path(config.model.path).resolve().is_relative_to(config.run_path.resolve()):
        yield f"{config.run_dir} has trained it for {trained[-1]} steps; `or1 eval {config.run_dir}` measures that"


def _sample_set(
    target: Target, each: EvalSet, prompts: Sequence[Prompt], *, source: Source, scorer: Scorer, display: Display
) -> list[Outcome]:
    config, out = target.config, target.out
    settings = {
        "model": source.model,
        "samples": each.samples,
        "temperature": each.temperature,
        "top_p": each.top_p,
        "max_response_tokens": config.eval_max_response_tokens,
        "seed": config.seed,
        **score_inputs(config, prompts),
    }
    final = out / "transcripts" / f"{each.name}.parquet"
    size = part_size(config, source.engine, each.samples)
    store = PartStore(out / "parts" / each.name, final, settings=settings, schema=TRANSCRIPTS, size=size)
    sampling = Sampling(each.temperature, config.eval_max_response_tokens, each.samples, config.seed, top_p=each.top_p)
    reused = sample_parts(
        source.engine,
        scorer,
        prompts,
        sampling,
        store,
        rows_of=partial(transcript_rows, each.name),
        progress=display.progress(each.name),
    )
    if line := reuse_message(each.name, reused, len(prompts) * each.samples):
        display.message(line)
    store.merge()
    return [outcome for table in store.tables(COUNTED) for outcome in outcomes_of(table.to_pylist(), each.samples)]


def _summarise(
    config: Config, outcomes: dict[str, list[Outcome]]
) -> tuple[list[EvalResult], dict[str, list[EvalResult]]]:
    results, sources = [], {}
    for each in config.eval.sets:
        ks = pass_ks(each.samples, config.eval.pass_k)
        results.append(summarise_set(each.name, outcomes[each.name], ks))
        grouped = by_source(outcomes[each.name])
        sources[each.name] = [summarise_set(name, found, ks) for name, found in grouped.items()]
    return results, sources


def _report(
    config: Config, source: Source, results: Sequence[EvalResult], sources: dict[str, list[EvalResult]]
) -> dict[str, Any]:
    return {
        "model": source.model,
        "max_response_tokens": config.eval_max_response_tokens,
        "interval": "ci95: half width, 1.96 standard errors of the mean over problems",
        "sets": {
            each.name: _plain(result)
            | {
                "temperature": each.temperature,
                "top_p": each.top_p,
                "by_source": {s.name: _plain(s) for s in sources[each.name]},
            }
            for each, result in zip(config.eval.sets, results, strict=True)
        },
    }


def _plain(result: EvalResult) -> dict[str, Any]:
    return {
        "problems": result.problems,
        f"avg@{result.samples}": result.avg.value,
        f"avg@{result.samples}_ci95": result.avg.ci95,
        **{f"pass@{k}": estimate.value for k, estimate in result.pass_at.items()},
        **{f"pass@{k}_ci95": estimate.ci95 for k, estimate in result.pass_at.items()},
        "reward_mean": result.reward.value,
        "reward_mean_ci95": result.reward.ci95,
        "graded": result.graded,
        "len_mean": result.length,
        "truncated": result.truncated,
        "no_think_close": result.unclosed,
        "statuses": dict(result.statuses),
    }


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
