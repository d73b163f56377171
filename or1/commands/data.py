"""`or1 data NAME`: the files of a published dataset. `or1 data build FILE...`: files cleaned and mixed."""

from __future__ import annotations

import argparse
from pathlib import Path

from or1.commands.arguments import positive
from or1.config import ColumnsConfig
from or1.config.mixture import SCREENS
from or1.config.published import PUBLISHED
from or1.core.errors import DataError
from or1.core.quiet import quiet_libraries
from or1.core.text import visible

BUILD = "build"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 data`."""
    names = [*PUBLISHED, BUILD]
    parser.add_argument("name", nargs="?", choices=names, help="dataset, or build; without it, datasets are listed")
    parser.add_argument("sources", nargs="*", metavar="FILE", help="build: files, the one to prefer first")
    parser.add_argument("--out", type=Path, help="folder for a dataset (default: data), or the mixture's parquet file")
    build = parser.add_argument_group("build")
    build.add_argument("--against", action="append", default=[], metavar="FILE", help="problems not to repeat")
    build.add_argument("--near", type=_share, default=0.8, help="similarity of near duplicates (default: 0.8; 1: off)")
    build.add_argument("--longest", type=positive, default=8000, help="characters of a statement (default: 8000)")
    build.add_argument("--allow", action="append", default=[], choices=SCREENS, help="keep what this reason drops")
    build.add_argument("--column", action="append", default=[], metavar="KEY=NAME", help="a name as in [data.columns]")
    build.add_argument("--judged", type=Path, metavar="FILE", help="file of or1 filter --judge; keep what it keeps")
    build.add_argument("--workers", type=positive, default=2, help="processes that check answers (default: 2)")
    build.add_argument("--fresh", action="store_true", help="move the verdicts of earlier checks aside")


def run(arguments: argparse.Namespace) -> int:
    """List the datasets, or write the files of one and verify those that are there. Raises DataError."""
    if arguments.name is None:
        _list()
        return 0
    if arguments.name == BUILD:
        return _build(arguments)
    if arguments.sources:
        raise DataError(f"{arguments.sources[0]!r} is no part of `or1 data {arguments.name}`; use `or1 data build`")
    # First: the hub's library reads the settings when it is imported.
    quiet_libraries()
    from or1.data.obtain import Got, obtain

    def done(got: Got) -> None:
        state = "" if got.is_new else ", verified"
        print(f"{got.path}: {got.entry['rows']:,} rows, sha256 {got.entry['sha256']}{state}", flush=True)

    out = arguments.out or Path("data")
    obtain(arguments.name, PUBLISHED[arguments.name], out, done)
    print(f"sources and commits: {out / arguments.name}.manifest")
    return 0


def _build(arguments: argparse.Namespace) -> int:
    """Build a mixture. Raises DataError, StoreError, ScorerError."""
    if not arguments.sources:
        raise DataError("no files; write or1 data build FILE... --out mixture.parquet")
    quiet_libraries()
    from or1.data.mixture import Recipe, build_mixture, report_lines
    from or1.eval.store import move_aside
    from or1.report.progress import Bar

    recipe = Recipe(
        sources=tuple(arguments.sources),
        out=arguments.out or Path("mixture.parquet"),
        against=tuple(arguments.against),
        near=arguments.near,
        longest=arguments.longest,
        allow=tuple(arguments.allow),
        columns=_columns(arguments.column),
        judged=arguments.judged,
        workers=arguments.workers,
    )
    with Bar(unit="problems") as bar:
        if arguments.fresh and (message := move_aside(recipe.beside("checks.jsonl"))):
            bar.message(message)
        report = build_mixture(recipe, bar)
    for line in report_lines(report):
        print(visible(line))
    print(visible(f"dropped rows with their reasons: {recipe.beside('dropped.jsonl')}"))
    print(visible(f'use it with: [data] train = "{recipe.out}"'))
    return 0


def _columns(given: list[str]) -> ColumnsConfig:
    pairs = dict(text.partition("=")[::2] for text in given)
    if unknown := sorted(pairs.keys() - ColumnsConfig.model_fields.keys()):
        known = ", ".join(ColumnsConfig.model_fields)
        raise DataError(f"--column {unknown[0]}=...: unknown key; known keys: {known}")
    return ColumnsConfig(**pairs)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def _list() -> None:
    for name, published in PUBLISHED.items():
        print(f"{name:14} {published.about}")
        for made in published.files:
            rows = "rows recorded at download" if made.rows is None else f"{made.rows:,} rows"
            print(f"{'':14}   {made.file}, {rows}")
