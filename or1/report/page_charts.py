"""The metrics that the report draws as lines, and their captions. Units and labels are those of the metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from or1.core.metric_names import SHARE, metric
from or1.report.page_data import KEPT_SHARE, RecordedRun


@dataclass(frozen=True)
class Line:
    """One metric drawn as a line.

    color  name of a colour of `or1.report.page_plots.COLORS`
    label  text in the legend; empty: the metric's own
    """

    key: str
    color: str
    label: str = ""

    @property
    def percent(self) -> bool:
        """Whether the values are shares, drawn in percent."""
        return metric(self.key).unit == SHARE

    @property
    def scale(self) -> float:
        """Factor from recorded to drawn values."""
        return 100.0 if self.percent else 1.0

    @property
    def legend(self) -> str:
        """The text in the legend."""
        return self.label or metric(self.key).label


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    lines      lines on a common scale
    height     relative height
    top        upper end of the scale; None: the largest value
    zero       start the scale at 0 if no value is negative
    log        logarithmic scale if the values span more than two decades
    reference  label, steps and values of a dashed line
    exact      the values were set, not sampled: draw them as steps, without smoothing
    """

    lines: tuple[Line, ...]
    height: float = 1.0
    top: float | None = None
    zero: bool = True
    log: bool = False
    reference: tuple[str, Sequence[float], Sequence[float]] | None = None
    exact: bool = False

    @property
    def unit(self) -> str:
        """The unit behind the numbers of the axis: "%" or empty."""
        return "%" if all(line.percent for line in self.lines) else ""


@dataclass(frozen=True)
class Chart:
    """Stacked panels on a common axis of steps."""

    title: str
    caption: str
    panels: tuple[Panel, ...]


_SOURCE_COLORS = ("s1", "s2", "s3", "s5", "s6", "s8")


def charts(run: RecordedRun) -> tuple[Chart, ...]:
    """Return the line charts of a run, in the order of the page."""
    return (
        _reward(run.graded),
        *_sources(run),
        Chart(
            "Entropy",
            "Nats per token of trained and of all sampled responses; below, the bonus coefficient.",
            (
                Panel(
                    (Line("policy/entropy", "s1"), Line("policy/entropy_all", "s3", "all sampled")),
                    height=2.4,
                    reference=_entropy_target(run),
                ),
                Panel((Line("policy/entropy_coef", "s8", "coefficient"),), exact=True),
            ),
        ),
        Chart(
            "Response length",
            "Tokens per response and the stage's limit; below, the share cut at the limit.",
            (
                Panel(
                    (Line("completion/len_mean", "s1", "mean"), Line("completion/len_max", "s3")),
                    height=2.4,
                    reference=_limits(run),
                ),
                Panel((Line("completion/truncated", "s8"),)),
            ),
        ),
        _groups(run.graded),
        Chart(
            "Gradient norm and loss",
            "Gradient norm before clipping; below, the loss, whose level means little.",
            (
                Panel((Line("optim/grad_norm", "s1", "gradient norm"),), height=1.6, log=True),
                Panel((Line("optim/loss", "s5"),), zero=False),
            ),
        ),
        Chart(
            "Mismatch and clipping",
            "KL between the engine's and the trainer's policy; below, the clipped share.",
            (Panel((Line("mismatch/kl", "s1"),), height=1.6, log=True), Panel((Line("policy/clip_frac", "s8"),))),
        ),
        Chart(
            "Throughput and memory",
            "Tokens per second; below, peak memory in GiB.",
            (Panel((Line("perf/tokens_per_s", "s1"),), height=1.6), Panel((Line("perf/peak_mem_gib", "s5"),))),
        ),
    )


def _reward(graded: bool) -> Chart:
    if not graded:
        caption = "Share of sampled responses that earn the reward, before groups are rejected."
        return Chart("Reward", caption, (Panel((Line("reward/mean", "s1", "mean reward"),), top=1.0),))
    caption = (
        "Mean reward of the sampled responses, before groups are rejected. One response in ten earns less than "
        "p10, one in ten more than p90."
    )
    lines = (Line("reward/p90", "s2"), Line("reward/mean", "s1", "mean reward"), Line("reward/p10", "s8"))
    return Chart("Reward", caption, (Panel(lines),))


def _sources(run: RecordedRun) -> tuple[Chart, ...]:
    """Return a chart of the reward and the truncation of each source; none if the data has one source."""
    found = dict.fromkeys(key.split("/")[1] for record in run.records for key in record if key.startswith("source/"))
    # More lines could not be told apart.
    names = list(zip(sorted(found), _SOURCE_COLORS, strict=False))
    if not names:
        return ()
    rewards, cuts = (
        tuple(Line(f"source/{name}/{key}", color, name) for name, color in names) for key in ("reward", "truncated")
    )
    caption = "Mean reward by source of the prompts; below, the share of its responses that was cut."
    return (Chart("Sources", caption, (Panel(rewards, height=2.4), Panel(cuts))),)


def _groups(graded: bool) -> Chart:
    solved, failed, equal = "group/solved", "group/failed", "group/frac_zero_std"
    kept = Line(KEPT_SHARE, "s1", "kept for training")
    lines: tuple[Line, ...]
    if not graded:
        caption = "Groups whose answers are all right or all wrong teach nothing and are left out."
        lines = (Line(solved, "s2", "all right"), Line(failed, "s6", "all wrong"), kept)
    else:
        caption = "Groups whose rewards are all equal teach nothing and are left out, whatever the rewards are."
        lines = (
            Line(solved, "s2", "all equal, solved"),
            Line(failed, "s6", "all equal, at most 0"),
            Line(equal, "s3"),
            kept,
        )
    return Chart("Groups", caption, (Panel(lines, top=100.0),))


def _entropy_target(run: RecordedRun) -> tuple[str, Sequence[float], Sequence[float]] | None:
    if run.config is None:
        return None
    steps, known = set(run.series("policy/entropy")[0]), run.config
    found = []
    for record in run.records:
        if record["step"] in steps and (stage := run.stage_of(record)) is not None:
            entropy = known.with_stage(stage).loss.entropy
            found.append((record["step"], entropy.target if entropy.control == "adaptive" else math.nan))
    targets = {target for _, target in found if math.isfinite(target)}
    if not targets:
        return None
    label = f"target {targets.pop():g}" if len(targets) == 1 else "target"
    return label, [x for step, _ in found for x in (step - 0.5, step + 0.5)], [y for _, y in found for _ in range(2)]


def _limits(run: RecordedRun) -> tuple[str, Sequence[float], Sequence[float]] | None:
    found = [(r["step"], stage.max_response_tokens) for r in run.records if r["step"] and (stage := run.stage_of(r))]
    if not found:
        return None
    xs = [x for step, _ in found for x in (step - 0.5, step + 0.5)]
    return "limit", xs, [limit for _, limit in found for _ in range(2)]
