"""`or1 plan` for the Skywork-OR1 report's runs, beside the report's measurements.

    python -m benchmarks.plan_report            print the tables of examples/recipes/README.md
    python -m benchmarks.plan_report --write    write the tables into that page

No model is run: the plan is arithmetic on shapes, data sheets and assumed shares of peak rates.
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
"""H800 GPUs: from Table 8 for the 7B models, from the authors' answer in their issue 28 for the 32B model."""

NO_COST: dict[str, float] = {}
# The released code recomputes old log-probs before training on a rollout, and gives vLLM 80 % of a GPU.
AS_RELEASED = ("loss.old_logp=recompute", "rollout.vllm.gpu_memory=0.8")
_BASELINE = ("stage.0.prompts_per_step=64", "stage.0.group_size=16", *AS_RELEASED)
TABLE_9 = {32: 375, 64: 270, 128: 225, 256: 205}
"""Seconds of a rollout of 1,024 responses, by number of GPUs. Assumed: the 7B model at 16,384 tokens, as in Table 8."""
_LIMIT, _LAYERS = 16_384, 28


def _engine_of_table_9() -> dict[str, float]:
    """Return the minimal times of the report's engine, solved from the first and the last row of Table 9.

    With n responses a GPU of mean length L/2, where L is the limit, a rollout takes
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

    shares  of these 1000 steps by stage of the recipe; assumed to be the first 1000 steps
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
    return Run(
        name=name,
        table=8,
        rollout=rollout,
        update=update,
        other=other,
        recipe="or1-7b",
        overrides=overrides,
        shares=(1.0,),
    )


RUNS = (
    Run(
        name="OR1-32B",
        table=7,
        rollout=223,
        update=27,
        other=59,
        recipe="or1-32b",
        overrides=AS_RELEASED,
        shares=(0.76, 0.24),
    ),
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
    """Return the plan of a recipe on H800s.

    mean_share  mean response length over the limit of `stage`; None: the default of or1 plan
    """
    config = load_config(RECIPES / f"{recipe}.toml", overrides, files=False)
    device = replace(DEVICE, efficiency=replace(DEVICE.efficiency, **engine))
    mean = None if mean_share is None else round(mean_share * config.stage[stage].max_response_tokens)
    return make_plan(config, shape_of(config.model.path), device, gpus, mean)


def planned(run: Run, engine: Mapping[str, float] = NO_COST, mean_share: float | None = None) -> dict[str, float]:
    """Return the seconds of a step by phase, as `or1 plan` splits it, averaged over the stages of `run`."""
    total = dict.fromkeys(run.seconds, 0.0)
    for stage, share in enumerate(run.shares):
        found = plan(run.recipe, MACHINES[run.recipe], run.overrides, engine=engine, mean_share=mean_share, stage=stage)
        split = found.stages[stage].time.split
        total = {name: seconds + share * split[name] for name, seconds in total.items()}
    return total


def memory_table() -> Iterator[str]:
    """Yield the table of memory: does each recipe fit the machine of the report?"""
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
    """Yield the table of step times: the report's, or1's plan, and the plan with the report's engine."""
    yield "| run | step, s | rollout | update | other |"
    yield "|---|---|---|---|---|"
    for run in RUNS:
        yield _row(f"**{run.name}**, Table {run.table}", run.seconds)
        yield _row("or1 plan", planned(run))
        yield _row("or1 plan, engine of the report", planned(run, ENGINE))


def length_table() -> Iterator[str]:
    """Yield the table of OR1-32B by mean response length."""
    yield "| mean response over its limit | step, s | rollout | update | other |"
    yield "|---|---|---|---|---|"
    for share in (0.25, 0.5, 0.75):
        yield _row(f"{share:.0%}", planned(RUNS[0], ENGINE, share))


def rollout_table() -> Iterator[str]:
    """Yield the table of rollouts of 1,024 responses by number of GPUs."""
    yield "| H800 GPUs | Table 9, s | or1 plan, s | or1 plan, engine of the report, s |"
    yield "|---|---|---|---|"
    for gpus, measured in TABLE_9.items():
        ours = [
            plan("or1-7b", gpus, _BASELINE, engine=engine).stages[0].time.split["rollout"]
            for engine in (NO_COST, ENGINE)
        ]
        yield f"| {gpus} | {measured} | {ours[0]:.0f} | {ours[1]:.0f} |"


def tables() -> str:
    """Return all tables as Markdown."""
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
    """Print the tables, or write them into the page."""
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
