"""`or1 export`: a checkpoint of a run as a Hugging Face model folder, or its adapter as a folder for PEFT."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 export`."""
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the newest)")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN_DIR/weights/step_N)")
    parser.add_argument(
        "--adapter", action="store_true", help="of [model.lora] the adapter alone, to RUN_DIR/adapters/step_N"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and print its path. Raises RunError, CheckpointError, ModelError."""
    from or1.run.export import export_run

    print(export_run(arguments.run_dir, arguments.step, arguments.out, adapter=arguments.adapter))
    return 0
