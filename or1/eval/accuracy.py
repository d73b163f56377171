"""avg@k and pass@k of problems that are sampled several times, in training runs and in `or1 eval`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from or1.config import EvalSet
from or1.core.types import Group, Prompt, Status
from or1.data.unverifiable import unverifiable_text
from or1.dist.world import SINGLE, World
from or1.reward.scorer import Scorer
from or1.reward.terms import RIGHT, is_graded, is_unclosed, unverifiable_groups
from or1.rollout.across_ranks import collect_spread
from or1.rollout.collect import Progress, no_progress
from or1.rollout.engine import Engine, Sampling


@dataclass(frozen=True)
class Outcome:
    """Statistics of the responses to one problem.

    samples    number of responses
    correct    number of right responses
    reward     mean reward of the responses that have a reward; NaN if none has
    best       largest reward; NaN if no response has a reward
    tokens     mean length
    truncated  number of responses cut at the token limit
    statuses   number of responses by `Status` value
    graded     number of responses whose reward is neither 0 nor 1
    unclosed   number of complete responses that were scored 0 because `</think>` is missing
    unverifiable  True if a response was compared with a gold answer that cannot be verified
    """

    source: str
    samples: int
    correct: int
    reward: float
    tokens: float
    truncated: int
    statuses: Mapping[str, int]
    best: float = math.nan
    graded: int = 0
    unclosed: int = 0
    unverifiable: bool = False

    @classmethod
    def of(cls, group: Group) -> Outcome:
        """Return the statistics of a group of responses."""
        return cls(
            source=group.prompt.source,
            samples=len(group.responses),
            correct=int((group.rewards >= RIGHT).sum()),
            reward=mean_reward(group.rewards),
            tokens=float(np.mean([r.sampled_tokens for r in group.responses])),
            truncated=sum(r.truncated for r in group.responses),
            statuses=Counter(score.status.value for score in group.scores),
            best=best_reward(group.rewards),
            graded=sum(map(is_graded, group.rewards)),
            unclosed=sum(map(is_unclosed, group.responses, group.scores)),
            unverifiable=bool(unverifiable_groups([group])),
        )


def mean_reward(rewards: Sequence[float] | np.ndarray) -> float:
    """Return the mean of the rewards that are not NaN; NaN if there is none. NaN means no reward."""
    given = [reward for reward in rewards if not math.isnan(reward)]
    return float(np.mean(given)) if given else math.nan


def best_reward(rewards: Iterable[float]) -> float:
    """Return the largest reward that is not NaN; NaN if there is none."""
    return max((reward for reward in rewards if not math.isnan(reward)), default=math.nan)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and the half width of its 95 % interval: 1.96 standard errors of the mean over problems.

    The interval covers the choice of problems of the same kind, not the sampling of responses to fixed problems. For
    a single problem the half width is NaN.
    """

    value: float
    ci95: float

    @classmethod
    def of(cls, values_P: Sequence[float]) -> Estimate:
        """Return the estimate of one value per problem; NaN without values."""
        if not values_P:
            return cls(math.nan, math.nan)
        spread = float(np.std(values_P, ddof=1)) if len(values_P) > 1 else math.nan
        return cls(float(np.mean(values_P)), 1.96 * spread / math.sqrt(len(values_P)))


@dataclass(frozen=True)
class EvalResult:
    """Statistics of one evaluation set, or of one source of a set.

    samples    responses a problem
    avg        mean correctness over `samples` responses (avg@k)
    pass_at    k -> unbiased probability that at least one of k responses is right
    reward     mean over problems of the mean reward of their responses; NaN if no response has a reward
    length     mean length in tokens
    truncated  share of responses cut at the token limit
    best       largest reward; NaN if no response has a reward
    graded     share of responses whose reward is neither 0 nor 1
    unclosed   share of complete responses that were scored 0 because `</think>` is missing
    unverifiable  number of problems whose gold answers cannot be verified
    """

    name: str
    samples: int
    problems: int
    avg: Estimate
    pass_at: Mapping[int, Estimate]
    reward: Estimate
    length: float
    truncated: float
    statuses: Mapping[str, int]
    best: float = math.nan
    graded: float = 0.0
    unclosed: float = 0.0
    unverifiable: int = 0

    def count(self, status: Status) -> int:
        """Return the number of responses with this status."""
        return self.statuses.get(status.value, 0)

    def remark(self) -> str:
        """Return a warning if accuracy counts right responses as wrong; else an empty text.

        The causes are golds that cannot be verified, and rewards on a scale that never reaches 1.
        """
        if self.unverifiable:
            return f"{self.name}: {unverifiable_text(self.unverifiable)}"
        if not 0 < self.best < RIGHT:
            return ""
        return (
            f"{self.name}: the best reward is {self.best:g}, but accuracy and pass@k count a response as solved "
            f"from {RIGHT:g} on, so both are 0 here; look at the mean reward, or scale the rewards"
        )

    def metrics(self) -> dict[str, float]:
        """Return the statistics as metrics of metrics.jsonl."""
        total = self.problems * self.samples
        some = {status.value: self.count(status) / total for status in (Status.CRASH, Status.TIMEOUT)}
        some |= {"graded": self.graded, "no_think_close": self.unclosed, "unverifiable": float(self.unverifiable)}
        prefix, avg = f"eval/{self.name}", f"eval/{self.name}/avg@{self.samples}"
        return {
            avg: self.avg.value,
            f"{avg}_ci95": self.avg.ci95,
            **{f"{prefix}/pass@{k}": estimate.value for k, estimate in self.pass_at.items()},
            f"{prefix}/reward_mean": self.reward.value,
            f"{prefix}/reward_mean_ci95": self.reward.ci95,
            f"{prefix}/len_mean": self.length,
            f"{prefix}/truncated": self.truncated,
            **{f"{prefix}/{name}": share for name, share in some.items() if share},
        }


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased probability that k of n samples contain a right one: 1 - C(n-c, k) / C(n, k).

    n is `samples`, c is `correct` (Chen et al. 2021, arXiv 2107.03374, Eq. 1). Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples, but there are {samples} samples; raise samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_ks(samples: int, wanted: Sequence[int] = ()) -> list[int]:
    """Return the values of k for pass@k: those of `wanted` up to `samples`, by default 1, 2, 4, ... and `samples`."""
    found = set(wanted) or {2**i for i in range(samples.bit_length())} | {samples}
    return sorted(k for k in found if 1 <= k <= samples)


def summarise_set(name: str, outcomes: Sequence[Outcome], ks: Sequence[int]) -> EvalResult:
    """Return the statistics of problems with equal numbers of samples. Raises ValueError without problems."""
    if not outcomes:
        raise ValueError(f"evaluation set {name!r} has no problems")
    samples = outcomes[0].samples
    total = samples * len(outcomes)
    return EvalResult(
        name=name,
        samples=samples,
        problems=len(outcomes),
        avg=Estimate.of([outcome.correct / samples for outcome in outcomes]),
        pass_at={k: Estimate.of([pass_at_k(samples, outcome.correct, k) for outcome in outcomes]) for k in ks},
        reward=Estimate.of([outcome.reward for outcome in outcomes if not math.isnan(outcome.reward)]),
        length=float(np.mean([outcome.tokens for outcome in outcomes])),
        truncated=sum(outcome.truncated for outcome in outcomes) / total,
        statuses=sum((Counter(outcome.statuses) for outcome in outcomes), Counter()),
        best=best_reward(outcome.best for outcome in outcomes),
        graded=sum(outcome.graded for outcome in outcomes) / total,
        unclosed=sum(outcome.unclosed for outcome in outcomes) / total,
        unverifiable=sum(outcome.unverifiable for outcome in outcomes),
    )


def by_source(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes of each source, in order of first appearance."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.source, []).append(outcome)
    return found


def evaluate_set(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    settings: EvalSet,
    max_tokens: int,
    *,
    pass_k: Sequence[int] = (),
    progress: Progress = no_progress,
    world: World = SINGLE,
) -> EvalResult:
    """Sample every problem `settings.samples` times, on all ranks together, and return the statistics. Collective.

    The seed is fixed, so that two evaluations differ by the policy only.
    """
    sampling = Sampling(settings.temperature, max_tokens, settings.samples, seed=0, top_p=settings.top_p)
    groups = collect_spread(world, engine, scorer, prompts, sampling, progress).groups
    return summarise_set(settings.name, [Outcome.of(group) for group in groups], pass_ks(settings.samples, pass_k))
