"""`or1 plan`: memory and time of a config, before anything is loaded."""

from __future__ import annotations

import argparse
import json

from or1.commands.arguments import add_overrides, positive
from or1.commands.exit import fail
from or1.config.load import load_config
from or1.core.errors import EXIT_RUN


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
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Return EXIT_RUN if the config does not fit the device. Raises ConfigError, PlanError."""
    from or1.plan.devices import find_device
    from or1.plan.estimate import make_plan
    from or1.plan.rates import measured
    from or1.plan.shapes import shape_of
    from or1.plan.table import plan_json, print_plan_table, verdict

    config = load_config(arguments.config, arguments.overrides, files=False)
    shape = shape_of(config.model.path)
    device, why = find_device(arguments.device, config.model.device)
    device = measured(device, shape, config.model.dtype)
    plan = make_plan(config, shape, device, gpus=arguments.gpus, mean_response=arguments.mean_response)
    if arguments.json:
        print(json.dumps(plan_json(plan), indent=2))
    else:
        print_plan_table(plan, why)
    return 0 if plan.fits else fail(verdict(plan), EXIT_RUN)
