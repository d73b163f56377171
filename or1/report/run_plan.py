"""The plan of a run: shown at the start of a run and by `or1 train --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from or1.config import Config, EntropyConfig, LossConfig, RewardConfig
from or1.config.section import each_of
from or1.report.console import default_console, print_pairs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "AdamW with 8-bit moments", "offload": "AdamW in host memory"}


def print_plan(config: Config, data_lines: Sequence[str], console: Console | None = None) -> None:
    """Print what a run will do. `data_lines` describe the data files; without them the names of the files are shown."""
    from rich.text import Text

    console = console or default_console()
    stages = "1 stage" if len(config.stage) == 1 else f"{len(config.stage)} stages"
    console.print(Text(f"or1 plan: {config.total_steps} steps in {stages}", style="bold"), soft_wrap=True)
    pairs = [("model", f"{config.model.path} ({config.model.dtype}, device {config.model.device})")]
    if (lora := config.model.lora) is not None:
        four = ", frozen layers in 4 bits" if lora.quantize == "nf4" else ""
        pairs.append(("", f"adapters of rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.targets)}{four}"))
    pairs += [("" if i else "data", line) for i, line in enumerate(data_lines or config.data.files)]
    print_pairs(pairs, console)
    console.print(_stage_table(config))
    print_pairs(stage_settings(config), console)
    optim, entropy = config.optim, config.loss.entropy
    pairs = [
        ("reward", _reward_text(config.reward)),
        (
            "loss",
            f"{config.loss.kind}, clip {config.loss.clip_low:g} / {config.loss.clip_high:g}, "
            f"temperature {config.rollout.temperature:g}{_variants_text(config.loss)}",
        ),
        ("entropy", _entropy_text(entropy)),
    ]
    pairs.append(
        (
            "optimizer",
            f"{_OPTIMIZERS[optim.optimizer]}, lr {optim.lr:g} after {optim.warmup_steps} warm-up "
            f"updates, gradient norm <= {optim.grad_clip:g}, {optim.max_tokens_per_rank:,} tokens per packed "
            "row",
        )
    )
    pairs += [("" if i else "evaluation", line) for i, line in enumerate(_eval_texts(config))]
    pairs.append(("checkpoint", f"every {config.checkpoint.every_steps} steps, newest {config.checkpoint.keep} kept"))
    pairs += [("run", config.run_dir), ("seed", str(config.seed))]
    print_pairs(pairs, console)
    console.print()


def stage_settings(config: Config) -> list[tuple[str, str]]:
    """Return a name and what it sets of other sections, for each stage that sets something."""
    found = [(number, stage.own_settings()) for number, stage in enumerate(config.stage, 1)]
    return [(f"stage {number}", ", ".join(f"{k} = {v}" for k, v in own.items())) for number, own in found if own]


def _reward_text(reward: RewardConfig) -> str:
    return " + ".join(f"{part.weight:g} {part.kind}" for part in reward.parts) or reward.kind


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
            str(number_),
            f"{first}-{first + stage.steps - 1}",
            f"{stage.max_response_tokens:,}",
            f"{stage.prompts_per_step} x {stage.group_size}",
            "1, on-policy" if stage.on_policy else str(stage.updates_per_step),
            f"{most:,}",
        )
        first += stage.steps
    return table


def _variants_text(loss: LossConfig) -> str:
    """Return the baseline and the corrections that are not the default, each after a comma."""
    parts = [f"advantage {loss.advantage}"] if loss.advantage != "group" else []
    if loss.is_cap is not None:
        parts.append(f"importance weights <= {loss.is_cap:g}")
    if loss.mismatch.kind != "none":
        bounds = "{} to {}".format(
            *("any" if bound is None else f"{bound:g}" for bound in (loss.mismatch.lower, loss.mismatch.upper))
        )
        parts.append(f"mismatch {loss.mismatch.kind} ({bounds})")
    return "".join(f", {part}" for part in parts)


def _entropy_text(entropy: EntropyConfig) -> str:
    if entropy.control == "none":
        return "no bonus"
    if entropy.control == "constant":
        return f"constant coefficient {entropy.coef:g}"
    return (
        f"adaptive ({entropy.variant}): target {entropy.target:g} nats per token, coefficient {entropy.coef:g} "
        f"moving by {entropy.delta:g} within [{entropy.coef_min:g}, {entropy.coef_max:g}]"
    )


def _eval_texts(config: Config) -> list[str]:
    if not config.eval.sets:
        return ["no held-out sets"]
    lines = [f"every {config.eval.every_steps} steps, at most {config.eval_max_response_tokens:,} tokens"]
    for each in config.eval.sets:
        limit = "" if each.limit is None else f", first {each.limit}"
        files = ", ".join(each_of(each.path))
        lines.append(f"{each.name}: {files}, avg@{each.samples} at temperature {each.temperature:g}{limit}")
    return lines
