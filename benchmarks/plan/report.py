"""What `or1 plan` says of the Skywork-OR1 report's own runs, beside what the report measured.

    python -m benchmarks.plan_report            the tables of examples/recipes/README.md
    python -m benchmarks.plan_report --write    put them there

Nothing is run: the plan is arithmetic on shapes, data sheets and assumed shares of peaks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.lib.paths import ROOT
from or1.config.load import load_config
from or1.plan.devices import GIB, find_device
from or1.plan.estimate import Plan, make_plan
from or1.plan.shapes import shape_of

RECIPES = ROOT / "examples" / "recipes"
PAGE = RECIPES / "README.md"
BEGIN, END = "<!-- tables of python -m benchmarks.plan_report -->", "<!-- end of tables -->"
DEVICE = find_device("H800", "cuda")[0]
MACHINES = {"or1-math-7b": 32, "or1-7b": 32, "or1-32b": 256}
"""H800 GPUs: those of Table 8 for the 7B models, and for the 32B model what its authors answered (their issue 28)."""

NO_COST: dict[str, float] = {}
# The released code scores every rollout once more before it trains on it, and gives vLLM 80 % of a GPU.
AS_RELEASED = ("loss.old_logp=recompute", "rollout.vllm.gpu_memory=0.8")
_BASELINE = ("stage.0.prompts_per_step=64", "stage.0.group_size=16", *AS_RELEASED)
TABLE_9 = {32: 375, 64: 270, 128: 225, 256: 205}
"""Seconds of a rollout of 1,024 responses by GPUs; taken to be the 7B model at 16,384 tokens, as in Table 8."""
_LIMIT, _LAYERS = 16_384, 28


def _engine_of_table_9() -> dict[str, float]:
    """What the report's engine takes at least, from the first and the last row of Table 9.

    With n responses a GPU, of half the limit L in the mean, a rollout takes
    L layers engine_layer_s + n L/2 engine_response_s.
    """
    (few, least), (many, most) = ((1024 / gpus, TABLE_9[gpus]) for gpus in (256, 32))
    response = (most - least) / ((many - few) * _LIMIT / 2)
    return {"engine_response_s": response, "engine_layer_s": (least / _LIMIT - few / 2 * response) / _LAYERS}


ENGINE = _engine_of_table_9()
"""Fields of `or1.plan.devices.Efficiency`."""


@dataclass(frozen=True)
class Run:
    """A row of the report's Table 7 or 8: hours per 1000 steps, and the recipe that or1 plans for it.

    shares  of those 1000 steps by stage of the recipe, taken to be the first 1000
    """

    name: str
    table: int
    rollout: float
    update: float
    other: float
    recipe: str
    overrides: tuple[str, ...]
    shares: tuple[float, ...]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of a step."""
        return {name: 3.6 * getattr(self, name) for name in ("rollout", "update", "other")}


def _baseline(updates: int, minibatch: int, rollout: float, update: float, other: float) -> Run:
    name = f"7B, ({updates}, 64, {minibatch}, 1)"
    overrides = (*_BASELINE, f"stage.0.minibatch_prompts={minibatch}")
    return Run(name, 8, rollout, update, other, "or1-7b", overrides, (1.0,))


RUNS = (
    Run("OR1-32B", 7, 223, 27, 59, "or1-32b", AS_RELEASED, (0.76, 0.24)),
    _baseline(1, 64, 90, 8, 18),
    _baseline(2, 32, 87, 10, 17),
    _baseline(4, 16, 90, 12, 16),
)


def plan(
    recipe: str,
    gpus: int,
    overrides: tuple[str, ...] = (),
    *,
    engine: Mapping[str, float] = NO_COST,
    mean_share: float | None = None,
    stage: int = 0,
) -> Plan:
    """The plan of a recipe on H800s. mean_share: mean response over the limit of `stage`, None: what or1 plan takes."""
    config = load_config(RECIPES / f"{recipe}.toml", overrides, files=False)
    device = replace(DEVICE, efficiency=replace(DEVICE.efficiency, **engine))
    mean = None if mean_share is None else round(mean_share * config.stage[stage].max_response_tokens)
    return make_plan(config, shape_of(config.model.path), device, gpus, mean)


def planned(run: Run, engine: Mapping[str, float] = NO_COST, mean_share: float | None = None) -> dict[str, float]:
    """Seconds of a step as `or1 plan` splits it, the mean over the stages of `run`."""
    total = dict.fromkeys(run.seconds, 0.0)
    for stage, share in enumerate(run.shares):
        settings = {"engine": engine, "mean_share": mean_share, "stage": stage}
        split = plan(run.recipe, MACHINES[run.recipe], run.overrides, **settings).stages[stage].time.split
        total = {name: seconds + share * split[name] for name, seconds in total.items()}
    return total


def memory_table() -> Iterator[str]:
    """Whether each recipe fits the machine that the report used."""
    yield "| recipe | H800 GPUs | peak of a GPU, GiB | in | usable, GiB | largest row that fits, tokens |"
    yield "|---|---|---|---|---|---|"
    for recipe, gpus in MACHINES.items():
        found = plan(recipe, gpus)
        peak = found.heaviest.memory.peak
        needs = f"{peak.total / GIB:.1f}" + ("" if found.fits else ", **too much**")
        yield (
            f"| {recipe} | {gpus} | {needs} | {peak.name} | {found.device.usable / GIB:.1f} | "
            f"{found.largest_tokens:,} |"
        )


def _row(name: str, seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    cells = [f"{total:,.0f}"] + [f"{s:,.0f} ({s / total:.1%})" for s in seconds.values()]
    return f"| {name} | {' | '.join(cells)} |"


def split_table() -> Iterator[str]:
    """A step of each run: the report's, or1's plan, and the plan with the report's engine."""
    yield "| run | step, s | rollout | update | other |"
    yield "|---|---|---|---|---|"
    for run in RUNS:
        yield _row(f"**{run.name}**, Table {run.table}", run.seconds)
        yield _row("or1 plan", planned(run))
        yield _row("or1 plan, engine of the report", planned(run, ENGINE))


def length_table() -> Iterator[str]:
    """The plan of OR1-32B for other mean lengths than half of the limit."""
    yield "| mean response over its limit | step, s | rollout | update | other |"
    yield "|---|---|---|---|---|"
    for share in (0.25, 0.5, 0.75):
        yield _row(f"{share:.0%}", planned(RUNS[0], ENGINE, share))


def rollout_table() -> Iterator[str]:
    """Rollouts of 1,024 responses by GPUs."""
    yield "| H800 GPUs | Table 9, s | or1 plan, s | or1 plan, engine of the report, s |"
    yield "|---|---|---|---|"
    for gpus, measured in TABLE_9.items():
        ours = [
            plan("or1-7b", gpus, _BASELINE, engine=engine).stages[0].time.split["rollout"]
            for engine in (NO_COST, ENGINE)
        ]
        yield f"| {gpus} | {measured} | {ours[0]:.0f} | {ours[1]:.0f} |"


def tables() -> str:
    """All of them as Markdown."""
    parts = {
        "Memory": memory_table(),
        "A step": split_table(),
        "OR1-32B by mean length, engine of the report": length_table(),
        "Rollouts of 1,024 responses": rollout_table(),
    }
    lines = [f"{name}\n\n" + "\n".join(rows) for name, rows in parts.items()]
    layer, response = (1e3 * ENGINE[name] for name in ("engine_layer_s", "engine_response_s"))
    note = (
        f"The engine of the report, from the first and last row of Table 9: for a token of each running response "
        f"{layer:.2f} ms a layer and {response:.2f} ms a response."
    )
    return "\n\n".join([*lines, note])


def main() -> None:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"replace the tables in {PAGE.relative_to(ROOT)}")
    if not parser.parse_args().write:
        print(tables())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
