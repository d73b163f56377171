"""Votes of language models on training problems.

The Skywork-OR1 report (section 6) asks two judges for 16 votes each, and keeps problems with at least 9 valid votes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from or1.config import Config, JudgeConfig
from or1.core.display import Display
from or1.core.errors import DataError, EndpointError
from or1.core.files import replacing
from or1.core.result_log import ResultLog
from or1.core.seeds import seed_of_32_bits
from or1.core.types import Prompt
from or1.data import load_training_files
from or1.eval.store import move_aside
from or1.reward.math import answer_part
from or1.rollout.chat_client import ChatClient, Reply, RequestRefused, at_once

VALID, INVALID, UNPARSED, REFUSED = "valid", "invalid", "unparsed", "refused"
"""A vote; an answer without a verdict; a request that the server refuses, which the next start repeats."""
KEPT, REJECTED, UNDECIDED = "kept", "rejected", "undecided"
"""Enough valid votes; too few; too few, but votes without a verdict could have been enough."""
JUDGED = pa.schema(
    {
        "prompt_id": pa.string(),
        "source": pa.string(),
        "prompt": pa.string(),
        "votes": pa.int32(),
        VALID: pa.int32(),
        INVALID: pa.int32(),
        UNPARSED: pa.int32(),
        REFUSED: pa.int32(),
        "valid_by_judge": pa.list_(pa.int32()),
        "verdict": pa.string(),
    }
)
"""One row a problem."""

_FORMAT = {"votes": 1}
"""Version of the file of votes."""
_VERDICT = re.compile(r"verdict\W{0,8}(valid|invalid)\b", re.IGNORECASE)
_ALONE = re.compile(r"\W*(valid|invalid)\W*", re.IGNORECASE)
_PLACES = re.compile(r"\{(problem|answer)\}")
_MOST_REFUSED = 20
_PATIENCE_S = 30.0
"""Time that answers have to arrive after a judge has failed: they are paid for."""
_SHOWN = 300


class _Job(NamedTuple):
    """One vote to ask for: the judge's number, the vote's number, the question, and the key of the answer."""

    judge: int
    vote: int
    question: str
    key: str


@dataclass(frozen=True, kw_only=True)
class JudgeCounts:
    """Counts of one judge over all problems.

    votes       number of votes by VALID, INVALID, UNPARSED and REFUSED
    new         votes that this call asked for
    prompt_tokens, tokens  tokens of all recorded votes, as the server counts
    cost        by the prices of [judge], None without prices
    """

    model: str
    url: str
    votes: Counter[str]
    new: int
    prompt_tokens: int
    tokens: int
    cost: float | None


@dataclass(frozen=True)
class Judged:
    """Result of `judge_problems`: problems by KEPT, REJECTED and UNDECIDED, and the counts of each judge."""

    verdicts: Counter[str]
    judges: list[JudgeCounts]


def judge_problems(config: Config, out: Path, display: Display, fresh: bool = False) -> Judged:
    """Let every judge of `[judge]` vote on every problem of `[data]`, and write one row a problem to `out`.

    Each vote is kept in `out`.votes.jsonl when it arrives, by judge and question. The same command resumes, and asks
    for no vote twice; new problems and more votes cost only what is new.

    Raises DataError, StoreError, EndpointError.
    """
    settings, votes_file = config.judge, out.with_name(f"{out.name}.votes.jsonl")
    ask = read_question(settings.prompt)
    prompts = _problems(config, display)
    judges = [ChatClient(endpoint, "judge") for endpoint in settings.endpoints()]
    _require_different(judges)
    if fresh and (message := move_aside(votes_file)):
        display.message(message)
    jobs = [list(_jobs(settings, judges, ask(prompt))) for prompt in prompts]
    with ResultLog(votes_file, _FORMAT) as results:
        new = _ask_all(config, judges, jobs, results, display)
        rows = [_row(settings, prompt, of_prompt, results) for prompt, of_prompt in zip(prompts, jobs, strict=True)]
        counts = [_counts(settings, i, judge, jobs, results, new[i]) for i, judge in enumerate(judges)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        table = pa.Table.from_pylist(rows, schema=JUDGED)
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
    return Judged(Counter(row["verdict"] for row in rows), counts)


def read_question(path: str | None) -> Callable[[Prompt], str]:
    """Return the function that puts a problem into the question of a file, or of or1's own. Raises DataError."""
    file = Path(__file__).with_name("judge.txt") if path is None else Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"judge.prompt {str(file)!r} cannot be read ({error}); name a text file in UTF-8") from error
    if "{problem}" not in text:
        raise DataError(f"judge.prompt {str(file)!r} has no {{problem}}; write it where the problem belongs")

    def question(prompt: Prompt) -> str:
        values = {"problem": prompt.text.strip(), "answer": " or ".join(prompt.golds)}
        # In one pass: a problem may contain {answer}.
        return _PLACES.sub(lambda place: values[place[1]], text)

    return question


def vote_of(reply: Reply) -> str:
    """Return the vote in a judge's answer: what its last verdict says, or UNPARSED."""
    if reply.finish != "stop":
        return UNPARSED
    text = answer_part(reply.text)
    text = reply.text if text is None else text
    found = _VERDICT.findall(text)
    if not found and (alone := _ALONE.fullmatch(text)):
        found = [alone[1]]
    return found[-1].lower() if found else UNPARSED


def _problems(config: Config, display: Display) -> list[Prompt]:
    # As the files have them: a suffix or a system message belongs to the policy, and `or1 data build` knows neither.
    plain = config.data.model_copy(update={"prompt_suffix": "", "system_prompt": ""})
    loaded = load_training_files(config.model_copy(update={"data": plain}), None)
    for report in loaded.reports:
        for line in report.lines():
            display.message(line)
    return list({prompt.text: prompt for prompt in reversed(loaded.prompts)}.values())[::-1]


def _require_different(judges: Sequence[ChatClient]) -> None:
    names = [judge.model for judge in judges]
    for name in names:
        if names.count(name) > 1:
            raise EndpointError(
                f"two judges are the model {name!r}, whose votes are kept by its name; name each model once, and raise "
                "judge.votes for more votes"
            )


def _jobs(settings: JudgeConfig, judges: Sequence[ChatClient], question: str) -> Iterator[_Job]:
    for i, judge in enumerate(judges):
        asked = (judge.model, question, settings.temperature, settings.max_tokens)
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
        for vote in range(settings.votes):
            yield _Job(i, vote, question, f"{digest}:{vote}")


def _ask_all(
    config: Config, judges: Sequence[ChatClient], jobs: Sequence[Sequence[_Job]], results: ResultLog, display: Display
) -> Counter[int]:
    """Ask for the votes that are missing. Return how many each judge gave."""
    total = sum(map(len, jobs))
    missing = [job for of_prompt in jobs for job in of_prompt if job.key not in results]
    if total - len(missing) > 0:
        display.message(f"judge: {total - len(missing):,} of {total:,} votes are there from an earlier start")
    progress = display.progress("judge")
    asker = _Asker(config, judges, results)
    votes = at_once(missing, asker.ask, config.judge.concurrency, _PATIENCE_S)
    for done, _ in enumerate(votes, total - len(missing) + 1):
        progress(done, total)
    return asker.new


class _Asker:
    """Asks for votes and keeps them, in many threads.

    new  number of votes that each judge gave, by the judge's number
    """

    def __init__(self, config: Config, judges: Sequence[ChatClient], results: ResultLog):
        self.new: Counter[int] = Counter()
        self._refused: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._config, self._judges, self._results = config, judges, results

    def ask(self, job: _Job) -> None:
        """Ask for one vote. Raises EndpointError; RequestRefused if a judge has refused everything so far."""
        settings = self._config.judge
        try:
            reply = self._judges[job.judge].chat(
                [{"role": "user", "content": job.question}],
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                seed=seed_of_32_bits(self._config.seed, int(job.key[:8], 16), job.vote),
            )
        except RequestRefused:
            with self._lock:
                self._refused[job.judge] += 1
                # A wrong setting is refused every time; a single problem may be too long.
                if not self.new[job.judge] and self._refused[job.judge] >= _MOST_REFUSED:
                    raise
            return
        vote = vote_of(reply)
        # In this thread: an answer that has arrived is kept, whatever happens to the others.
        end = [] if vote != UNPARSED else [reply.text[-_SHOWN:]]
        self._results.add(job.key, [vote, reply.prompt_tokens, reply.tokens, *end])
        with self._lock:
            self.new[job.judge] += 1


def _votes(jobs: Sequence[_Job], results: ResultLog) -> list[str]:
    return [results[job.key][0] if job.key in results else REFUSED for job in jobs]


def _row(settings: JudgeConfig, prompt: Prompt, jobs: Sequence[_Job], results: ResultLog) -> dict[str, Any]:
    each = _votes(jobs, results)
    votes = Counter(each)
    by_judge = Counter(job.judge for job, vote in zip(jobs, each, strict=True) if vote == VALID)
    verdict = KEPT if votes[VALID] >= settings.keep else UNDECIDED
    if votes[VALID] + votes[UNPARSED] + votes[REFUSED] < settings.keep:
        verdict = REJECTED
    return {
        "prompt_id": prompt.id,
        "source": prompt.source,
        "prompt": prompt.text,
        "votes": len(jobs),
        **{name: votes[name] for name in (VALID, INVALID, UNPARSED, REFUSED)},
        "valid_by_judge": [by_judge[i] for i in range(len(settings.url))],
        "verdict": verdict,
    }


def _counts(
    settings: JudgeConfig, number: int, judge: ChatClient, jobs: Sequence[Sequence[_Job]], results: ResultLog, new: int
) -> JudgeCounts:
    own = [job for of_prompt in jobs for job in of_prompt if job.judge == number]
    kept = [results[job.key] for job in own if job.key in results]
    tokens = sum(value[1] for value in kept), sum(value[2] for value in kept)
    prices = [prices[number if len(prices) > 1 else 0] for prices in (settings.price_in, settings.price_out) if prices]
    return JudgeCounts(
        model=judge.model,
        url=judge.url,
        votes=Counter(_votes(own, results)),
        new=new,
        prompt_tokens=tokens[0],
        tokens=tokens[1],
        cost=sum(p * t for p, t in zip(prices, tokens, strict=True)) / 1e6 if prices else None,
    )


def judged_lines(found: Judged, settings: JudgeConfig, out: Path) -> Iterator[str]:
    """Yield the counts for a person."""
    for judge in found.judges:
        votes: Mapping[str, int] = judge.votes
        counts = ", ".join(f"{votes.get(name, 0):,} {name}" for name in (VALID, INVALID, UNPARSED, REFUSED))
        cost = "" if judge.cost is None else f", cost {judge.cost:,.2f}"
        yield (
            f"{judge.model} ({judge.url}): {counts} of {sum(votes.values()):,} votes, {judge.new:,} of them new; "
            f"{judge.prompt_tokens:,} prompt and {judge.tokens:,} completion tokens{cost}"
        )
    names = ", ".join(f"{found.verdicts[name]:,} {name}" for name in (KEPT, REJECTED, UNDECIDED))
    all_votes = settings.votes * len(settings.url)
    yield f"{found.verdicts.total():,} problems: {names}; kept with at least {settings.keep} of {all_votes} valid votes"
    if refused := sum(judge.votes[REFUSED] for judge in found.judges):
        yield f"{refused:,} requests were refused; the same command asks again"
    yield f"results: {out}"
    yield f"use it with: or1 data build FILE... --judged {out}"
