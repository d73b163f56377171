"""`or1 plan`: memory and time of a config, before anything is loaded."""

from __future__ import annotations

import argparse
import json

from or1.commands.arguments import add_job_limits, add_overrides, positive
from or1.commands.exit import fail
from or1.config.load import load_config
from or1.core.errors import EXIT_RUN
from or1.core.text import visible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 plan`."""
    parser.add_argument("config", help="TOML file; the data files that it names need not exist")
    add_overrides(parser)
    parser.add_argument("--device", metavar="NAME", help="device to plan for, such as H200 (default: this machine's)")
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="GPUs that share the model (default: 1)")
    parser.add_argument(
        "--mean-response",
        type=positive,
        metavar="TOKENS",
        help="mean response, for times (default: half of each stage's limit)",
    )
    add_job_limits(parser)
    parser.add_argument(
        "--grace", action="store_true", help="print only the seconds that the run needs after SIGTERM, for a job script"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Return EXIT_RUN if the config does not fit the device. Raises ConfigError, PlanError."""
    from or1.plan.devices import find_device
    from or1.plan.estimate import make_plan
    from or1.plan.job import JobLimits, grace_of, job_lines, job_warnings, measured_step, planned_steps, steps_of
    from or1.plan.rates import measured
    from or1.plan.shapes import shape_of
    from or1.plan.table import plan_json, print_plan_table, verdict

    config = load_config(arguments.config, arguments.overrides, files=False)
    if arguments.grace:
        print(grace_of(steps_of(config, arguments.gpus)))
        return 0
    shape = shape_of(config.model.path)
    device, why = find_device(arguments.device, config.model.device)
    device = measured(device, shape, config.model.dtype)
    plan = make_plan(config, shape, device, gpus=arguments.gpus, mean_response=arguments.mean_response)
    if arguments.json:
        print(json.dumps(plan_json(plan), indent=2))
    else:
        print_plan_table(plan, why)
        own = measured_step(config.run_path)
        steps = [*([] if own is None else [own]), *planned_steps(plan)]
        limits = JobLimits.found(arguments.job_hours, arguments.grace_s)
        for line in [*job_lines(config, steps), *job_warnings(config, steps, limits)]:
            print(visible(line))
    return 0 if plan.fits else fail(verdict(plan), EXIT_RUN)
