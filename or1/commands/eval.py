"""`or1 eval`: named sets sampled by a checkpoint or a server, with every transcript, a table and eval.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from or1.config import Config, EvalSet
from or1.config.load import dump_config
from or1.core.files import write_whole
from or1.core.quiet import quiet_libraries
from or1.core.types import Group, Prompt, Status
from or1.data import load_eval_sets
from or1.eval.accuracy import EvalResult, Outcome, best_reward, by_source, mean_reward, pass_ks, summarise_set
from or1.eval.sampling import inputs_of, part_size, sample_parts, there_already
from or1.eval.source import Source, open_source
from or1.eval.store import PartStore, move_aside
from or1.eval.target import Target
from or1.report.progress import Bar
from or1.report.tables import print_evaluation
from or1.reward import make_scorer
from or1.reward.scorer import Scorer
from or1.reward.scorers import remarks_of
from or1.reward.terms import is_graded, is_solved
from or1.rollout.engine import Sampling
from or1.run.checkpoint import committed_steps
from or1.run.directory import checkpoints_of

TRANSCRIPTS = pa.schema(
    {
        "set": pa.string(),
        "prompt_id": pa.string(),
        "source": pa.string(),
        "prompt": pa.string(),
        "golds": pa.list_(pa.string()),
        "sample": pa.int32(),
        "response": pa.string(),
        "tokens": pa.int32(),
        "reward": pa.float64(),
        "status": pa.string(),
        "finish": pa.string(),
    }
)
"""One row a response. `prompt` is the question as text; `tokens` is the length of the response."""


def run_evaluation(target: Target, fresh: bool = False) -> dict[str, Any]:
    """Evaluate every set of the config; sets and parts of sets that are done are not sampled again.

    Leaves config.resolved.json, parts/, transcripts/SET.parquet and eval.json in `target.out`; returns what eval.json
    holds. Raises DataError, StoreError, ModelError, EndpointError, ScorerError.
    """
    config, out = target.config, target.out
    quiet_libraries()
    with Bar() as bar, open_source(config) as source:
        if fresh and (message := move_aside(out / "parts")):
            bar.message(message)
        for line in _measured(config, source):
            bar.message(line)
        loaded = load_eval_sets(config, source.tokenizer)
        for line in (line for found in loaded.values() for report in found.reports for line in report.lines()):
            bar.message(line)
        problems = {each.name: loaded[each.name].prompts[: each.limit] for each in config.eval.sets}
        out.mkdir(parents=True, exist_ok=True)
        with make_scorer(config.reward, chain.from_iterable(problems.values()), out) as scorer:
            for remark in remarks_of(scorer, out):
                bar.message(remark)
            outcomes = {
                each.name: _evaluate(config, each, problems[each.name], (source, scorer), (out, bar))
                for each in config.eval.sets
            }
    write_whole(out / "config.resolved.json", dump_config(config))
    results, sources = _summarise(config, outcomes)
    report = {
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
    write_whole(out / "eval.json", json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    remarks = [line for result in results if config.reward.is_function and (line := result.remark())]
    where = f"results: {out / 'eval.json'}, transcripts: {out / 'transcripts'}"
    print_evaluation(results, sources, [*remarks, where])
    return report


def _measured(config: Config, source: Source) -> Iterator[str]:
    """Which weights these are; a config that was trained names those from before."""
    if "url" in source.model:
        yield f"model: {source.model['model']} of {source.model['url']}"
        return
    yield f"model: {config.model.path}"
    trained = committed_steps(checkpoints_of(config.run_path))
    if trained and not Path(config.model.path).resolve().is_relative_to(config.run_path.resolve()):
        yield f"{config.run_dir} has trained it for {trained[-1]} steps; `or1 eval {config.run_dir}` measures that"


def _evaluate(
    config: Config, each: EvalSet, prompts: Sequence[Prompt], tools: tuple[Source, Scorer], shown: tuple[Path, Bar]
) -> list[Outcome]:
    (source, scorer), (out, bar) = tools, shown
    settings = {
        "model": source.model,
        "samples": each.samples,
        "temperature": each.temperature,
        "top_p": each.top_p,
        "max_response_tokens": config.eval_max_response_tokens,
        "seed": config.seed,
        **inputs_of(config, prompts),
    }
    final = out / "transcripts" / f"{each.name}.parquet"
    size = part_size(config, source.engine, each.samples)
    store = PartStore(out / "parts" / each.name, final, settings, TRANSCRIPTS, size)
    sampling = Sampling(each.temperature, config.eval_max_response_tokens, each.samples, config.seed, top_p=each.top_p)

    def rows_of(group: Group) -> Iterator[dict[str, Any]]:
        return _rows(each.name, group)

    def progress(done: int, total: int) -> None:
        bar.show(each.name, done, total)

    there = sample_parts(source.engine, scorer, prompts, sampling, store, rows_of=rows_of, progress=progress)
    if line := there_already(each.name, there, len(prompts) * each.samples):
        bar.message(line)
    store.merge()
    return [outcome for table in store.tables(_COUNTED) for outcome in _outcomes(table.to_pylist(), each.samples)]


def _rows(name: str, group: Group) -> Iterator[dict[str, Any]]:
    prompt = group.prompt
    for sample, (response, score) in enumerate(zip(group.responses, group.scores, strict=True)):
        yield {
            "set": name,
            "prompt_id": prompt.id,
            "source": prompt.source,
            "prompt": prompt.text,
            "golds": list(prompt.golds),
            "sample": sample,
            "response": response.text,
            "tokens": len(response.token_ids),
            "reward": score.reward,
            "status": score.status.value,
            "finish": response.finish,
        }


_COUNTED = ("source", "tokens", "reward", "status", "finish")


def _outcomes(rows: Sequence[dict[str, Any]], samples: int) -> Iterator[Outcome]:
    """The problems of one part, whose rows stand sample by sample."""
    for start in range(0, len(rows), samples):
        group = rows[start : start + samples]
        yield Outcome(
            source=group[0]["source"],
            samples=samples,
            correct=sum(is_solved(row["reward"]) for row in group),
            reward=mean_reward([row["reward"] for row in group]),
            tokens=float(np.mean([row["tokens"] for row in group])),
            truncated=sum(row["finish"] != "stop" for row in group),
            statuses=Counter(row["status"] for row in group),
            best=best_reward(row["reward"] for row in group),
            graded=sum(is_graded(row["reward"]) for row in group),
            unclosed=sum(row["status"] == Status.TRUNCATED and row["finish"] == "stop" for row in group),
        )


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
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
