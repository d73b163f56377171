"""What a person sees in the terminal: the plan before a run, its progress, and the summary after it.

On a terminal the progress is a live panel; elsewhere (a log file, a batch system) it is one plain line per step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from or1.config import Config, EntropyConfig, StageConfig
from or1.humanize import duration, sparkline, value_text, visible
from or1.records import EvalHistory, eval_histories, number, plain_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

_HISTORY = 400  # steps kept for sparklines
_TREND = 5  # steps averaged on either side of a trend
_BAR = 30  # characters of an accuracy bar
_RECENT = 10  # steps behind the estimate of time left
_OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "AdamW with 8-bit moments", "offload": "AdamW in host memory"}


class _Row(NamedTuple):
    """A metric of the live table; `good` is +1 if more is better, -1 if less is, 0 if neither."""

    key: str
    label: str
    kind: str
    good: int


_ROWS = (
    _Row("reward/mean", "reward", "fixed3", 1), _Row("policy/entropy", "entropy", "fixed3", 0),
    _Row("policy/entropy_coef", "entropy coefficient", "fixed4", 0), _Row("completion/len_mean", "length", "count", 0),
    _Row("completion/truncated", "truncated", "percent", -1), _Row("group/kept_share", "groups kept", "percent", 0),
    _Row("perf/tokens_per_s", "tokens/s", "count", 0), _Row("optim/grad_norm", "grad norm", "short", 0),
    _Row("reward/failed", "crash or timeout", "percent", -1),
)  # fmt: skip
class _Phase(NamedTuple):
    name: str
    done: int
    total: int | None
    since: float


class RunDisplay:
    """Progress of a run.

    with RunDisplay(config.total_steps, config.stage) as display:
        display.phase("rollout", 3, 64)
        display.step({"step": 1, "stage": 0, "reward/mean": 0.4, ...})      the record of metrics.jsonl
        display.message("checkpoint step_20 written")

    The terminal is restored however the block ends. Missing and non-finite metrics show as "-".
    """

    def __init__(self, total_steps: int, stages: Sequence[StageConfig], console: Console | None = None):
        self._total, self._stages = total_steps, stages
        self._console = console or default_console()
        self._step = 0
        self._started = time.monotonic()
        self._step_ends: deque[float] = deque(maxlen=_RECENT + 1)
        self._phase: _Phase | None = None
        self._history: dict[str, deque[float]] = {row.key: deque(maxlen=_HISTORY) for row in _ROWS}
        self._evals: dict[str, list[float]] = {}
        self._stage = 0
        self._table: Table | None = None
        self._live: Live | None = None

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if self._live is not None:
            self._phase = None
            self._live.stop()
            self._live = None

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the current phase (rollout, reward, train, eval, checkpoint) and how far it is."""
        old = self._phase
        same = old is not None and old.name == name and done >= old.done
        self._phase = _Phase(name, done, total, old.since if same else time.monotonic())
        if self._live is not None and not same:
            self._live.refresh()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show one record of metrics.jsonl."""
        self._step = int(number(metrics.get("step"), self._step + 1))
        stage = int(number(metrics.get("stage"), self._stage))
        if stage != self._stage:
            self._stage = stage
            self.message(f"{self._stage_text()} began at step {self._step}")
        if 0 <= self._stage < len(self._stages):
            kept = number(metrics.get("group/kept")) / self._stages[self._stage].prompts_per_step
            metrics = {**metrics, "group/kept_share": kept}
        failed = sum(number(metrics.get(f"reward/status/{status}"), 0.0) for status in ("crash", "timeout"))
        # A row from the first failure on.
        if failed or self._history["reward/failed"]:
            metrics = {**metrics, "reward/failed": failed}
        self._step_ends.append(time.monotonic())
        self._phase = None
        for key, values in self._history.items():
            if math.isfinite(value := number(metrics.get(key))):
                values.append(value)
        changes = self._note_evals(metrics)
        if self._live is not None:
            self._table = self._values()
            self._live.refresh()
            return
        if self._step > 0:
            self.message(plain_line(metrics, self._step, self._total, self._left()))
        for line in changes:
            self.message(line)

    def message(self, text: str) -> None:
        """Show a line of text that stays, above the live panel."""
        self._console.print(_safe(text, self._console), soft_wrap=True)

    def _note_evals(self, metrics: Mapping[str, Any]) -> list[str]:
        """Remember the evaluations of a record; their plain lines."""
        lines = []
        for history in eval_histories([{"step": self._step, **metrics}]):
            name, value = f"{history.name} avg@{history.k}", history.before.avg
            values = self._evals.setdefault(name, [])
            values.append(value)
            line = f"eval step {self._step}: {name} {value_text(value, 'percent')}"
            if len(values) > 1:
                line += f", was {value_text(values[0], 'percent')} ({100 * (value - values[0]):+.1f} points)"
            lines.append(line)
        return lines

    def _left(self) -> float | None:
        """Estimated seconds to the end, from the last few steps."""
        intervals = len(self._step_ends) - 1
        if intervals < 1:
            return None
        return (self._step_ends[-1] - self._step_ends[0]) / intervals * max(self._total - self._step, 0)

    def _stage_text(self) -> str:
        if not 0 <= self._stage < len(self._stages):
            return ""
        limit = self._stages[self._stage].max_response_tokens
        return f"stage {self._stage + 1}/{len(self._stages)}, limit {limit:,} tokens"

    def _render(self) -> RenderableType:
        from rich.console import Group

        parts: list[RenderableType] = [self._bars()]
        if self._table is not None:
            parts.append(self._table)
        return Group(*parts)

    def _bars(self) -> Table:
        """The run's bar over that of the current phase; the second row is always there, so that nothing jumps."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now, left, phase = time.monotonic(), self._left(), self._phase
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(min_width=20)
        style = {"width": 28, "complete_style": "cyan", "finished_style": "green"}
        grid.add_row(
            Text(f"step {self._step}/{self._total}", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._step, **style),
            Text(f"elapsed {duration(now - self._started)}", no_wrap=True),
            Text(f"left {'-' if left is None else duration(left)}"),
            Text(self._stage_text(), style="dim", no_wrap=True, overflow="ellipsis"),
        )
        if phase is None:
            grid.add_row(Text(""))
            return grid
        count = f" {phase.done}/{phase.total}" if phase.total else f" {phase.done}" if phase.done else ""
        bar = ProgressBar(total=phase.total, completed=phase.done, **style) if phase.total else Text("")
        grid.add_row(Text(phase.name + count), bar, Text(duration(now - phase.since), style="dim"))
        return grid

    def _values(self) -> Table:
        """The latest values. Built in `step`, not in `_render`, which another thread calls."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        ascii_only = self._console.options.ascii_only
        wide = self._console.width >= 76
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, header_style="dim")
        for title, side in (("", "left"), ("now", "right"), ("trend", "right"), *([("history", "left")] * wide)):
            table.add_column(title, justify=side, no_wrap=True)
        for row in _ROWS:
            values = list(self._history[row.key])
            if values:
                trend, style = _trend(values, row)
                now = Text(value_text(values[-1], row.kind), style="bold")
                history = Text(sparkline(values, 32, ascii_only), style="blue")
                table.add_row(Text(row.label), now, Text(trend, style=style), *[history] * wide)
        for name, values in self._evals.items():
            change = 100 * (values[-1] - values[0])
            style = "green" if change > 0 else "red" if change < 0 else "dim"
            now = Text(value_text(values[-1], "percent"), style="bold")
            was = f"from {value_text(values[0], 'percent')}" if len(values) > 1 else "before training"
            trend = Text(f"{change:+.1f} pts" if len(values) > 1 else "", style=style)
            table.add_row(_safe(name, self._console), now, trend, *[Text(was, style="dim")] * wide)
        return table


def default_console() -> Console:
    """The console of a run: standard output, 110 columns wide where there is no terminal to ask."""
    import sys

    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=110)


def _safe(text: object, console: Console, style: str = "") -> Text:
    """Text from outside: no markup, no control characters, nothing the console's encoding lacks."""
    from rich.text import Text

    shown = visible(text)
    return Text(shown.encode("ascii", "replace").decode() if console.options.ascii_only else shown, style=style)


def _trend(values: Sequence[float], row: _Row) -> tuple[str, str]:
    """Change of the mean of the last few steps against the few before, and its style."""
    span = min(_TREND, len(values) // 2)
    if span == 0:
        return "", "dim"
    recent, earlier = values[-span:], values[-2 * span : -span]
    change = math.fsum(recent) / len(recent) - math.fsum(earlier) / len(earlier)
    text = value_text(abs(change), row.kind).replace("%", "pts")
    if text == value_text(0.0, row.kind).replace("%", "pts"):
        return "=", "dim"
    good = row.good * (1 if change > 0 else -1)
    return ("+" if change > 0 else "-") + text, {1: "green", 0: "", -1: "red"}[good]


@dataclass(frozen=True)
class Summary:
    """What `print_summary` shows after a run. `phase_s` holds seconds, `counts` what went wrong by name, `remark` what
    a person must know first."""

    evals: tuple[EvalHistory, ...]
    steps_done: int
    total_steps: int
    wall_s: float
    run_dir: str
    phase_s: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    report_path: str | None = None
    weights_path: str | None = None
    remark: str = ""


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Accuracy before and after, time, counts and where the results are."""
    from rich.text import Text

    console = console or default_console()
    done = f"{summary.steps_done} of {summary.total_steps} steps in {duration(summary.wall_s)}"
    head = "Run finished" if summary.steps_done >= summary.total_steps else "Run stopped"
    console.print(Text(f"\n{head}: {done}", style="bold"), soft_wrap=True)
    if summary.remark:
        console.print(_safe(summary.remark, console, "bold red"), soft_wrap=True)
    width = max((len(f"{history.name} avg@{history.k}") for history in summary.evals), default=0)
    for history in summary.evals:
        console.print(_eval_line(history, width, console), soft_wrap=True)
    lines = []
    if summary.phase_s:
        total = math.fsum(summary.phase_s.values()) or 1.0
        spent = sorted(summary.phase_s.items(), key=lambda item: -item[1])
        lines.append(("time", ", ".join(f"{name} {duration(s)} ({100 * s / total:.0f} %)" for name, s in spent)))
    if some := {name: n for name, n in summary.counts.items() if n}:
        lines.append(("counts", ", ".join(f"{n:,} {name}" for name, n in some.items())))
    if none := [name for name, n in summary.counts.items() if not n]:
        lines.append(("none of", ", ".join(none)))
    paths = {"run": summary.run_dir, "report": summary.report_path, "weights": summary.weights_path}
    lines += [(name, path) for name, path in paths.items() if path is not None]
    _print_pairs(lines, console)


def _eval_line(history: EvalHistory, width: int, console: Console) -> Text:
    """name, a bar of 0 to 100 %, before -> after, change in points."""
    before, last, change = history.before.avg, (history.after or history.before).avg, history.change_points
    full, gained, lost, empty = "#+-." if console.options.ascii_only else "\u2588\u2593\u2592\u2591"
    low, high = (round(_BAR * min(max(value, 0), 1)) for value in sorted((before, last)))
    line = _safe("  " + f"{history.name} avg@{history.k}".ljust(max(width, 10)) + "  ", console)
    line.append(full * low, style="blue")
    line.append((gained if last >= before else lost) * (high - low), style="green" if last >= before else "red")
    line.append(empty * (_BAR - high), style="dim")
    if change is None:
        return line.append(f"  {value_text(before, 'percent')}, no later evaluation")
    line.append(f"  {value_text(before, 'percent')} -> ").append(value_text(last, "percent"), style="bold")
    return line.append(f"  {change:+.1f} points", style="green" if change > 0 else "red" if change < 0 else "")


def print_plan(config: Config, data_lines: Sequence[str], console: Console | None = None) -> None:
    """What a run will do: shown by `--dry-run` and at the start. `data_lines` describe the data files, one a line."""
    from rich.text import Text

    console = console or default_console()
    stages = "1 stage" if len(config.stage) == 1 else f"{len(config.stage)} stages"
    console.print(Text(f"or1 plan: {config.total_steps} steps in {stages}", style="bold"), soft_wrap=True)
    pairs = [("model", f"{config.model.path} ({config.model.dtype}, device {config.model.device})")]
    pairs += [("" if i else "data", line) for i, line in enumerate(data_lines or config.data.files)]
    _print_pairs(pairs, console)
    console.print(_stage_table(config))
    optim, entropy = config.optim, config.loss.entropy
    pairs = [("reward", config.reward.kind),
             ("loss", f"{config.loss.kind}, clip {config.loss.clip_low:g} / {config.loss.clip_high:g}, "
              f"temperature {config.rollout.temperature:g}"), ("entropy", _entropy_text(entropy))]  # fmt: skip
    pairs.append(("optimizer", f"{_OPTIMIZERS[optim.optimizer]}, lr {optim.lr:g} after {optim.warmup_steps} warm-up "
                  f"updates, gradient norm <= {optim.grad_clip:g}, {optim.max_tokens_per_rank:,} tokens per packed "
                  "row"))  # fmt: skip
    pairs += [("" if i else "evaluation", line) for i, line in enumerate(_eval_texts(config))]
    pairs.append(("checkpoint", f"every {config.checkpoint.every_steps} steps, newest {config.checkpoint.keep} kept"))
    pairs += [("run", config.run_dir), ("seed", str(config.seed))]
    _print_pairs(pairs, console)
    console.print()


def _stage_table(config: Config) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=True, show_edge=False, header_style="dim")
    for title in ("stage", "steps", "max response", "prompts x group", "updates per step", "tokens per step, at most"):
        table.add_column(title, justify="right")
    first = 1
    for number_, stage in enumerate(config.stage, 1):
        most = stage.prompts_per_step * stage.group_size * stage.max_response_tokens
        table.add_row(
            str(number_), f"{first}-{first + stage.steps - 1}", f"{stage.max_response_tokens:,}",
            f"{stage.prompts_per_step} x {stage.group_size}",
            "1, on-policy" if stage.on_policy else str(stage.updates_per_step), f"{most:,}",
        )  # fmt: skip
        first += stage.steps
    return table


def _entropy_text(entropy: EntropyConfig) -> str:
    if entropy.control == "none":
        return "no bonus"
    if entropy.control == "constant":
        return f"constant coefficient {entropy.coef:g}"
    return (f"adaptive ({entropy.variant}): target {entropy.target:g} nats per token, coefficient {entropy.coef:g} "
            f"moving by {entropy.delta:g} within [{entropy.coef_min:g}, {entropy.coef_max:g}]")  # fmt: skip


def _eval_texts(config: Config) -> list[str]:
    if not config.eval.sets:
        return ["no held-out sets"]
    lines = [f"every {config.eval.every_steps} steps, at most {config.eval_max_response_tokens:,} tokens"]
    for each in config.eval.sets:
        limit = "" if each.limit is None else f", first {each.limit}"
        lines.append(f"{each.name}: {each.path}, avg@{each.samples} at temperature {each.temperature:g}{limit}")
    return lines


def _print_pairs(pairs: Sequence[tuple[str, str]], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:  # a log wants neither wrapped lines nor padding
        for name, value in pairs:
            console.print(_safe(f"  {name:<10}  {value}", console), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=12)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(f"  {name}", style="dim"), _safe(value, console))
    console.print(table)
