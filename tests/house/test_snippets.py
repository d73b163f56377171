"""Every snippet of README, docs/ and rooms is one: Python runs somewhere, TOML is a config, commands parse."""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

import pytest

from or1.cli import VERBS, make_parser
from or1.config import Config
from or1.config.rules import contradictions
from tests.helpers import public_api
from tests.helpers.snippets import FENCED, MINIMAL, blocks, commands, merged, names_of_peers, options, pages

# The tests that run the Python of a page.
RUN_BY = {
    "README.md": "tests/house/test_readme.py",
    "docs/own-task.md": "tests/house/test_readme.py",
    "docs/drop-in.md": "tests/integrations/test_readme.py",
    "docs/notebook.md": "tests/commands/test_notebook.py",
    "kernels/README.md": "tests/house/test_community.py",
    "docs/environments.md": "tests/environment/test_verifiers.py",
    "or1/reward/README.md": "tests/reward/test_custom.py",
    "or1/rollout/README.md": "tests/rollout/test_engine_example.py",
}
# A reward's file and optional packages need not be on this machine.
ABSENT = re.compile("no file '|needs the package ")
LANGUAGES = {"python", "toml", "json", "bash", "text", "py"}


def test_python_is_run_by_a_test(root: Path) -> None:
    for name, text in pages(root).items():
        if blocks(text, "python"):
            page = name if name.startswith("or1/") else name.rpartition("/")[2]
            assert name in RUN_BY, f"name the test that runs the Python of {name} in RUN_BY"
            assert page in (root / RUN_BY[name]).read_text(encoding="utf-8"), f"{RUN_BY[name]} no longer runs {name}"


def test_every_block_has_a_language_that_is_checked(root: Path) -> None:
    for name, text in pages(root).items():
        assert {language for language, _ in FENCED.findall(text)} <= LANGUAGES, name
        tables = [line for line in FENCED.sub("", text).splitlines() if line.startswith("    [")]
        assert not tables, f"put this TOML of {name} into a block ```toml, so that the test below finds it"


def test_toml_is_a_config_or_a_part_of_one(root: Path) -> None:
    count, wrong = 0, []
    for name, text in pages(root).items():
        for block in blocks(text, "toml"):
            count += 1
            raw = tomllib.loads(block)
            config = Config.model_validate(raw if {"model", "stage"} <= set(raw) else merged(MINIMAL, raw))
            found = [each for each in contradictions(config, files=False) if not ABSENT.match(each.message)]
            wrong += [f"{name}: {each.path}: {each.message}" for each in found]
    assert count > 10 and not wrong, "\n".join(wrong)


def test_commands_parse(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count, wrong = 0, []
    for name, text in pages(root).items():
        # The forms of the generated page are the parsers' own.
        for words in commands(text) if name != "docs/cli.md" else ():
            count += 1
            try:
                make_parser().parse_args(words)
            except SystemExit:
                wrong.append(f"{name}: or1 {' '.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")
    assert count > 50 and not wrong, "\n".join(wrong)


def known_options() -> dict[str, set[str]]:
    """Return the options of every verb, those of its actions included."""
    found: dict[str, set[str]] = {}

    def add(verb: str, parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            found.setdefault(verb, set()).update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    add(verb, inner)

    verbs = next(each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    for verb, parser in verbs.choices.items():
        add(verb, parser)
    return found


def test_named_verbs_and_options_exist(root: Path) -> None:
    known, wrong = known_options(), []
    for name, text in pages(root).items():
        for verb, flags in options(text):
            if verb not in VERBS:
                wrong.append(f"{name}: or1 {verb}")
            wrong += [f"{name}: or1 {verb} {flag}" for flag in flags if flag not in known.get(verb, ())]
    assert not wrong


def test_settings_of_the_table_of_names_exist(root: Path) -> None:
    keys = {line.partition(":")[0].replace("[]", "") for line in public_api._keys(Config.model_json_schema())}
    sections = {key.rpartition(".")[0] for key in keys} | {"model.lora"}
    named = [name for ours, *_ in names_of_peers(pages(root)["docs/coming-from.md"]) for name in ours]
    assert len(named) > 40
    assert not [name for name in named if name not in keys | sections | {"environment.renderer", "data.chat_template"}]


def test_commands_are_found_in_text() -> None:
    text = (
        "    or1 eval RUN --step N        the newest\n    cd x && or1 plan a.toml --gpus 8 \\\n        --json\n"
        "    or1 eval TARGET [--step N]\n```bash\nor1 doctor   # says more\n```\n"
        "See `or1 train A --nope`.\n\n    or1 data > list\n"
    )
    assert list(commands(text)) == [
        ["eval", "RUN", "--step", "1"],
        ["plan", "a.toml", "--gpus", "8", "--json"],
        ["data"],
        ["doctor"],
    ]
    flags = [("eval", ["--step"]), ("eval", ["--step"]), ("train", ["--nope"]), ("data", [])]
    assert list(options(text)) == flags
    base = {"a": {"b": 1, "c": 2}, "d": [1], "e": [{"f": 1}]}
    both = {"a": {"b": 3, "c": 2}, "d": [2], "e": [{"f": 1, "g": 1}, {"f": 2}]}
    assert merged(base, {"a": {"b": 3}, "d": [2], "e": [{"g": 1}, {"f": 2}]}) == both
