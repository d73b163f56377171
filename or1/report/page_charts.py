"""Which metrics the report draws as lines, and the words around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from or1.report.page_data import KEPT_SHARE, RecordedRun


@dataclass(frozen=True)
class Line:
    """One metric drawn as a line."""

    key: str
    label: str
    color: str
    scale: float = 1.0


@dataclass(frozen=True)
class Panel:
    """One pair of axes: lines on a common scale. `reference` adds a dashed line of (steps, values)."""

    lines: tuple[Line, ...]
    unit: str = ""
    height: float = 1.0
    top: float | None = None
    zero: bool = True
    log: bool = False
    reference: tuple[str, Sequence[float], Sequence[float]] | None = None
    exact: bool = False


@dataclass(frozen=True)
class Chart:
    """Panels one above the other on one axis of steps."""

    title: str
    caption: str
    panels: tuple[Panel, ...]


def charts(run: RecordedRun) -> tuple[Chart, ...]:
    """Return the charts of a run that are made of lines, in the order of the page."""
    return (
        _reward(run.graded),
        Chart(
            "Entropy",
            "Nats per token of trained and of all sampled responses; below, the bonus coefficient.",
            (
                Panel(
                    (Line("policy/entropy", "entropy", "s1"), Line("policy/entropy_all", "all sampled", "s3")),
                    height=2.4,
                    reference=_entropy_target(run),
                ),
                Panel((Line("policy/entropy_coef", "coefficient", "s8"),), exact=True),
            ),
        ),
        Chart(
            "Response length",
            "Tokens per response and the stage's limit; below, the share cut at the limit.",
            (
                Panel(
                    (Line("completion/len_mean", "mean", "s1"), Line("completion/len_max", "longest", "s3")),
                    height=2.4,
                    reference=_limits(run),
                ),
                Panel((Line("completion/truncated", "truncated", "s8", 100),), unit="%"),
            ),
        ),
        _groups(run.graded),
        Chart(
            "Gradient norm and loss",
            "Gradient norm before clipping; below, the loss, whose level means little.",
            (
                Panel((Line("optim/grad_norm", "gradient norm", "s1"),), height=1.6, log=True),
                Panel((Line("optim/loss", "loss", "s5"),), zero=False),
            ),
        ),
        Chart(
            "Mismatch and clipping",
            "KL between the engine's and the trainer's policy; below, the clipped share.",
            (
                Panel((Line("mismatch/kl", "mismatch KL", "s1"),), height=1.6, log=True),
                Panel((Line("policy/clip_frac", "clipped tokens", "s8", 100),), unit="%"),
            ),
        ),
        Chart(
            "Throughput and memory",
            "Tokens per second; below, peak memory in GiB.",
            (
                Panel((Line("perf/tokens_per_s", "tokens/s", "s1"),), height=1.6),
                Panel((Line("perf/peak_mem_gib", "peak GiB", "s5"),)),
            ),
        ),
    )


def _reward(graded: bool) -> Chart:
    if not graded:
        caption = "Share of sampled responses that earn the reward, before groups are rejected."
        return Chart("Reward", caption, (Panel((Line("reward/mean", "mean reward", "s1"),), top=1.0),))
    caption = (
        "Mean reward of the sampled responses, before groups are rejected. One response in ten earns less than "
        "p10, one in ten more than p90."
    )
    lines = (Line("reward/p90", "p90", "s2"), Line("reward/mean", "mean reward", "s1"), Line("reward/p10", "p10", "s8"))
    return Chart("Reward", caption, (Panel(lines),))


def _groups(graded: bool) -> Chart:
    solved, failed, equal = "group/solved", "group/failed", "group/frac_zero_std"
    kept = Line(KEPT_SHARE, "kept for training", "s1", 100)
    if not graded:
        caption = "Groups whose answers are all right or all wrong teach nothing and are left out."
        lines = (Line(solved, "all right", "s2", 100), Line(failed, "all wrong", "s6", 100), kept)
    else:
        caption = "Groups whose rewards are all equal teach nothing and are left out, whatever the rewards are."
        lines = (
            Line(solved, "all equal, solved", "s2", 100),
            Line(failed, "all equal, at most 0", "s6", 100),
            Line(equal, "all equal", "s3", 100),
            kept,
        )
    return Chart("Groups", caption, (Panel(lines, unit="%", top=100.0),))


def _entropy_target(run: RecordedRun) -> tuple[str, Sequence[float], Sequence[float]] | None:
    if run.config is None or run.config.loss.entropy.control != "adaptive":
        return None
    target = run.config.loss.entropy.target
    steps = run.series("policy/entropy")[0]
    return (f"target {target:g}", [steps[0] - 0.5, steps[-1] + 0.5], [target, target]) if steps else None


def _limits(run: RecordedRun) -> tuple[str, Sequence[float], Sequence[float]] | None:
    found = [(r["step"], stage.max_response_tokens) for r in run.records if r["step"] and (stage := run.stage_of(r))]
    if not found:
        return None
    xs = [x for step, _ in found for x in (step - 0.5, step + 0.5)]
    return "limit", xs, [limit for _, limit in found for _ in range(2)]
