"""`or1 demo`: train the tiny adder from the installed package, in a folder of its own."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from or1.commands import train
from or1.commands.arguments import Parser, positive
from or1.commands.examples import ADDER, copy_adder, examples_folder
from or1.config.schema import FILE_NAME, schema_text
from or1.core.errors import RunError
from or1.core.files import write_whole

_CONFIG = "quickstart.toml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 demo`."""
    parser.add_argument("--dir", type=Path, default=Path("or1-demo"), metavar="DIR", help="folder (default: or1-demo)")
    parser.add_argument("--steps", type=positive, metavar="N", help="steps of each of the two stages (default: 30, 50)")


def run(arguments: argparse.Namespace) -> int:
    """Write config, model and data into the folder, then run `or1 train` with them; a second call resumes.

    Raises RunError for a folder that holds something else, and what `or1 train` raises.
    """
    folder: Path = arguments.dir
    config = folder / _CONFIG
    if folder.exists() and not config.is_file() and any(folder.iterdir()):
        raise RunError(f"{folder} has files, but not those of a demo; name another folder with --dir")
    copy_adder(folder / ADDER)
    for name in ("train.jsonl", "heldout.jsonl"):
        if not (folder / ADDER / name).exists():
            shutil.copyfile(examples_folder() / ADDER / name, folder / ADDER / name)
    if not config.is_file():
        write_whole(config, _own_config(folder))
        write_whole(folder / FILE_NAME, schema_text())
    steps = [] if arguments.steps is None else [f"stage.{i}.steps={arguments.steps}" for i in (0, 1)]
    code = train.run(_parsed([str(config), *(word for text in steps for word in ("--set", text))]))
    if code == 0:
        print(f"\nNext: read {folder / 'run' / 'report.html'}, or start a task of your own with `or1 init my-task`")
    return code


def _own_config(folder: Path) -> str:
    """Return the quickstart's config with the paths of the folder."""
    text = (examples_folder() / _CONFIG).read_text(encoding="utf-8")
    text = text.replace('"runs/quickstart"', f'"{(folder / "run").as_posix()}"')
    return text.replace("examples/quickstart.toml", f"{folder.as_posix()}/{_CONFIG}").replace("examples/", "")


def _parsed(words: list[str]) -> argparse.Namespace:
    parser = Parser(prog="or1 train")
    train.add_arguments(parser)
    return parser.parse_args(words)
