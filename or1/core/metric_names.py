"""Every metric of a run: name, unit, meaning, and how a person sees the value.

`python -m or1.core.metric_names` prints the reference that is kept in docs/metrics.md.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

SHARE, NATS, TOKENS, SECONDS, GIB = "share", "nats", "tokens", "s", "GiB"
TOKENS_PER_S, COUNT, REWARD, NUMBER = "tokens/s", "count", "reward", "number"
UNITS = (SHARE, NATS, TOKENS, SECONDS, GIB, TOKENS_PER_S, COUNT, REWARD, NUMBER)
"""`share` is a fraction from 0 to 1, `reward` is on the scale of the reward function, `number` has no unit."""

_PLACEHOLDERS = {"NAME": "[^/]+", "K": "[0-9]{1,9}", "STATUS": "[a-z_]+"}


class Metric(NamedTuple):
    """One metric, or a family of metrics.

    name     as in metrics.jsonl; NAME (of an evaluation set or a source), K (samples) and STATUS stand for many names
    unit     one of UNITS
    kind     style of the value, see `or1.core.text.value_text`
    label    short name in the panel, in charts and in tables
    meaning  one line
    derived  True: computed for display only, not written to metrics.jsonl
    """

    name: str
    unit: str
    kind: str
    label: str
    meaning: str
    derived: bool = False


METRICS = (
    Metric(
        "reward/mean", REWARD, "fixed3", "reward", "Mean reward of the sampled responses, before groups are rejected."
    ),
    Metric(
        "reward/mean_complete",
        REWARD,
        "fixed3",
        "reward, complete",
        "Mean reward of the responses that were not cut; absent if all were.",
    ),
    Metric("reward/p10", REWARD, "fixed3", "p10", "10th percentile of the rewards."),
    Metric("reward/p50", REWARD, "fixed3", "p50", "Median of the rewards."),
    Metric("reward/p90", REWARD, "fixed3", "p90", "90th percentile of the rewards."),
    Metric("reward/part/NAME", REWARD, "fixed3", "part", "Mean of one of [[reward.parts]], without its weight."),
    Metric("reward/graded", SHARE, "percent", "graded rewards", "Responses whose reward is neither 0 nor 1."),
    Metric(
        "reward/status/STATUS",
        SHARE,
        "percent",
        "status",
        "Responses with this status of scoring: ok, wrong, no_answer, truncated, timeout, crash or skipped.",
    ),
    Metric(
        "reward/unverifiable",
        COUNT,
        "count",
        "unverifiable",
        "Groups with a wrong answer whose gold answer the maths verifier cannot read; absent if 0.",
    ),
    Metric(
        "reward/failed",
        SHARE,
        "percent",
        "crash or timeout",
        "Responses whose verifier crashed or timed out.",
        derived=True,
    ),
    Metric(
        "router/entropy",
        NATS,
        "fixed3",
        "router entropy",
        "Mixture of experts: mean entropy of the softmax of the router logits, over trained tokens and layers.",
    ),
    Metric(
        "router/load_max",
        NUMBER,
        "fixed3",
        "largest load",
        "Load of the busiest expert divided by an even load, mean over layers; 1 is an even load.",
    ),
    Metric("router/unused", SHARE, "percent", "unused experts", "Experts of all layers that got no trained token."),
    Metric("group/kept", COUNT, "count", "groups kept", "Groups that were trained; 0 is an empty step."),
    Metric(
        "group/kept_share", SHARE, "percent", "groups kept", "group/kept divided by prompts_per_step.", derived=True
    ),
    Metric("group/frac_zero_std", SHARE, "percent", "all equal", "Groups whose rewards are all equal."),
    Metric(
        "group/solved", SHARE, "percent", "all solved", "Groups whose rewards are all equal, with a mean of at least 1."
    ),
    Metric(
        "group/failed", SHARE, "percent", "all failed", "Groups whose rewards are all equal, with a mean of at most 0."
    ),
    Metric("group/open", COUNT, "count", "open groups", "Unfinished groups that the next policy continues."),
    Metric("completion/count", COUNT, "count", "responses", "Responses sampled for training in this step."),
    Metric("completion/len_mean", TOKENS, "count", "length", "Mean length of a response."),
    Metric("completion/len_max", TOKENS, "count", "longest", "Length of the longest response."),
    Metric(
        "completion/truncated", SHARE, "percent", "truncated", "Responses cut at the token limit or at the deadline."
    ),
    Metric(
        "completion/no_think_close",
        SHARE,
        "percent",
        "no </think>",
        "Complete responses that were scored 0 because `</think>` is missing.",
    ),
    Metric("completion/deadline", SHARE, "percent", "deadline", "Responses aborted at the deadline of the rollout."),
    Metric(
        "source/NAME/reward",
        REWARD,
        "fixed3",
        "reward",
        "Mean reward of the responses to prompts of a source: a data file, or a name in the column data_source. Absent "
        "if the data has one source; the 16 largest have their own metrics, the rest is `others`.",
    ),
    Metric("source/NAME/entropy", NATS, "fixed3", "entropy", "As policy/entropy_all, over the tokens of a source."),
    Metric("source/NAME/len_mean", TOKENS, "count", "length", "Mean length of a response of a source."),
    Metric("source/NAME/truncated", SHARE, "percent", "truncated", "Responses of a source that were cut."),
    Metric(
        "policy/entropy",
        NATS,
        "fixed3",
        "entropy",
        "Entropy per token that controls the coefficient (Eq. 3.2): mean of -log p over sampled tokens, of trained or "
        "of all groups as loss.entropy.measure selects.",
    ),
    Metric("policy/entropy_all", NATS, "fixed3", "entropy, all", "The same mean over the tokens of all groups."),
    Metric(
        "policy/entropy_exact",
        NATS,
        "fixed3",
        "entropy, exact",
        "Mean over trained tokens of the exact entropy of the next-token distribution, during the update.",
    ),
    Metric(
        "policy/entropy_coef",
        NUMBER,
        "fixed4",
        "entropy coefficient",
        "Coefficient of the entropy bonus in this step; 0 while the controller's gate is closed.",
    ),
    Metric(
        "policy/entropy_controller",
        NUMBER,
        "fixed4",
        "controller",
        "Coefficient that the entropy controller holds after this step.",
    ),
    Metric(
        "policy/clip_frac",
        SHARE,
        "percent",
        "clipped tokens",
        "Trained tokens whose gradient (ppo_clip) or weight (cispo) the clip changes.",
    ),
    Metric("policy/ratio_mean", NUMBER, "short", "ratio", "Mean over trained tokens of exp(logp - old logp)."),
    Metric(
        "policy/staleness",
        COUNT,
        "short",
        "staleness",
        "Mean over sampled tokens of the policy versions between sampling and this update.",
    ),
    Metric(
        "policy/staleness_max",
        COUNT,
        "count",
        "staleness, largest",
        "Largest number of policy versions between the sampling of a token and this update.",
    ),
    Metric("mismatch/kl", NATS, "short", "mismatch KL", "k3 estimate of KL(engine || trainer) per trained token."),
    Metric(
        "mismatch/ratio_max",
        NUMBER,
        "short",
        "largest ratio",
        "Largest exp(trainer's logp - engine's logp) of a trained token, before loss.is_cap and loss.mismatch.",
    ),
    Metric(
        "mismatch/masked_tokens",
        SHARE,
        "percent",
        "masked tokens",
        "Trained tokens that loss.mismatch removes from the policy gradient, with their responses or alone.",
    ),
    Metric(
        "mismatch/masked_sequences",
        SHARE,
        "percent",
        "masked responses",
        "Trained responses that loss.mismatch removes from the policy gradient; only for masks of responses.",
    ),
    Metric(
        "mismatch/check_max",
        NATS,
        "short",
        "check, largest",
        "Largest |engine - trainer| log-prob in the check after a push of weights; every rollout.verify_every pushes.",
    ),
    Metric("mismatch/check_mean", NATS, "short", "check, mean", "Mean |engine - trainer| log-prob in the same check."),
    Metric("optim/loss", NUMBER, "short", "loss", "Mean loss of the updates of this step."),
    Metric("optim/grad_norm", NUMBER, "short", "grad norm", "Mean L2 norm of the gradient before clipping."),
    Metric("optim/lr", NUMBER, "short", "learning rate", "Learning rate of the last update."),
    Metric("optim/updates", COUNT, "count", "updates", "Optimizer updates that changed parameters."),
    Metric("optim/skipped", COUNT, "count", "skipped updates", "Updates skipped because the gradient was not finite."),
    Metric("optim/out_of_memory", COUNT, "count", "out of memory", "Times that the row limit was halved, so far."),
    Metric(
        "optim/row_tokens", TOKENS, "tokens", "row limit", "Limit of a packed row, at most optim.max_tokens_per_rank."
    ),
    Metric(
        "rollout/nonfinite_logp",
        COUNT,
        "count",
        "unknown log-probs",
        "Sampled tokens whose log-prob from the engine is not finite.",
    ),
    Metric(
        "rollout/draft_accepted",
        SHARE,
        "percent",
        "accepted drafts",
        "Tokens of drafts that the responses took, among all drafted (rollout.vllm.speculative).",
    ),
    Metric(
        "rollout/draft_len",
        TOKENS,
        "short",
        "tokens a pass",
        "Mean tokens that a response gains in a pass with a draft: the accepted ones and the one after them.",
    ),
    Metric(
        "rollout/servers",
        COUNT,
        "count",
        "servers",
        "Servers of rollout.vllm.url that took the last push, if there are several.",
    ),
    Metric("data/epoch", COUNT, "count", "epoch", "Completed passes over the training prompts."),
    Metric("data/dropped_solved", COUNT, "count", "prompts dropped", "Prompts dropped as solved (data.drop_solved)."),
    Metric(
        "perf/rollout_idle",
        SHARE,
        "percent",
        "ranks idle",
        "Part of the rollout in which a rank waits for the slowest one, mean over the ranks.",
    ),
    Metric(
        "perf/tokens_per_s",
        TOKENS_PER_S,
        "count",
        "tokens/s",
        "Sampled tokens divided by the time of rollout, reward and training, of all ranks together.",
    ),
    Metric("perf/push_gib", GIB, "short", "pushed GiB", "Size of the weights in a push to the engine."),
    Metric(
        "perf/peak_mem_gib",
        GIB,
        "short",
        "peak GiB",
        "Largest memory of the main rank so far: allocated GPU memory, or resident memory without a GPU.",
    ),
    Metric(
        "time/rollout",
        SECONDS,
        "short",
        "rollout",
        "Generation. For a rollout that is made ahead: the time that the step waits for it.",
    ),
    Metric("time/reward", SECONDS, "short", "reward", "Scoring that generation does not hide."),
    Metric(
        "time/reward_exposed", SECONDS, "short", "exposed reward", "The same value as time/reward, for older readers."
    ),
    Metric("time/train", SECONDS, "short", "train", "Log-prob passes and optimizer updates."),
    Metric("time/sync", SECONDS, "short", "sync", "Push of the weights to the engine, and its check."),
    Metric("time/push", SECONDS, "short", "push", "Push of the weights to the engine, without its check."),
    Metric("time/eval", SECONDS, "short", "eval", "Evaluation of all sets."),
    Metric("time/step", SECONDS, "short", "step", "Wall time of the step with its evaluation, without its checkpoint."),
    Metric("time/checkpoint", SECONDS, "short", "checkpoint", "Saving the checkpoint of the step before."),
    Metric("eval/NAME/avg@K", SHARE, "percent", "accuracy", "Solved responses of a set, K samples a problem."),
    Metric(
        "eval/NAME/avg@K_ci95",
        SHARE,
        "percent",
        "accuracy, 95 %",
        "Half width of the 95 % interval of avg@K: 1.96 standard errors of the mean over problems.",
    ),
    Metric("eval/NAME/pass@K", SHARE, "percent", "pass@k", "Unbiased probability that one of K responses is solved."),
    Metric("eval/NAME/reward_mean", REWARD, "fixed3", "mean reward", "Mean over problems of the mean reward."),
    Metric("eval/NAME/reward_mean_ci95", REWARD, "fixed3", "mean reward, 95 %", "Half width of its 95 % interval."),
    Metric("eval/NAME/len_mean", TOKENS, "count", "mean tokens", "Mean length of a response."),
    Metric("eval/NAME/truncated", SHARE, "percent", "truncated", "Responses cut at the token limit."),
    Metric("eval/NAME/graded", SHARE, "percent", "graded rewards", "As reward/graded; absent if 0."),
    Metric("eval/NAME/no_think_close", SHARE, "percent", "no </think>", "As completion/no_think_close; absent if 0."),
    Metric("eval/NAME/unverifiable", COUNT, "count", "unverifiable", "As reward/unverifiable, problems; absent if 0."),
    Metric("eval/NAME/crash", SHARE, "percent", "crash", "Responses whose verifier crashed; absent if 0."),
    Metric("eval/NAME/timeout", SHARE, "percent", "timeout", "Responses whose verifier timed out; absent if 0."),
)

RECORD_KEYS = ("step", "stage", "time")
"""Keys of a line of metrics.jsonl that are no metrics: step, index of the stage, Unix time in seconds."""


def metric(name: str) -> Metric:
    """Return the entry of a metric. Raises KeyError for a name that is not in METRICS."""
    found = find_metric(name)
    if found is None:
        raise KeyError(f"{name} is no metric; add it to or1/core/metric_names.py")
    return found


@cache
def find_metric(name: str) -> Metric | None:
    """Return the entry of a metric, or None for an unknown name."""
    return next((each for each in METRICS if _pattern(each.name).fullmatch(name)), None)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(rf"\b({'|'.join(_PLACEHOLDERS)})(?=\b|_)", name)
    return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


_INTRODUCTION = """# Metrics

Made by `python -m or1.core.metric_names > docs/metrics.md`; a test holds the two equal.

A run writes one line a step to `metrics.jsonl`, and the same numbers as TensorBoard events. Each line also has `step`
(0 is the evaluation before training), `stage` (index of the stage) and `time` (Unix time in seconds). A value that is
not finite is `null`.

A `share` is a fraction from 0 to 1. A `reward` is on the scale of the reward function. A `number` has no unit.
"""


def markdown() -> str:
    """Return the reference of all metrics as Markdown."""
    lines = _INTRODUCTION.splitlines()
    groups: dict[str, list[Metric]] = {}
    for each in METRICS:
        groups.setdefault("Derived" if each.derived else each.name.partition("/")[0], []).append(each)
    # Derived values last.
    for title in sorted(groups, key=lambda title: title == "Derived"):
        heading = "Computed for display, not in the file" if title == "Derived" else title
        lines += ["", f"## {heading}", "", "| metric | unit | meaning |", "|---|---|---|"]
        # A plain pipe would start a new cell.
        cells = ((each.name, each.unit, each.meaning.replace("|", r"\|")) for each in groups[title])
        lines += [f"| `{name}` | {unit} | {meaning} |" for name, unit, meaning in cells]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
