"""The page of verbs and options, from the parsers of `or1`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from or1 import cli
from tests.helpers.pages.markdown import table

_INTRODUCTION = """# Command line

Made by `python -m tests.helpers.pages`; a test holds page and parsers equal. [Commands](commands.md) has one line a
verb, [exit codes](exit-codes.md) what a verb returns. Each verb also has `--help`.

`--set section.key=value` may be repeated; [settings](configuration.md) lists the keys. A value is read as TOML, and as
text where it is not TOML.
"""


def page() -> str:
    """Return the page."""
    return "\n".join([_INTRODUCTION, *_verbs(cli.make_parser(), "or1", "")]).rstrip() + "\n"


def _verbs(parser: argparse.ArgumentParser, name: str, about: str) -> Iterator[str]:
    """Yield the section of a verb and those of the verbs under it."""
    inner = {}
    arguments = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            inner = {verb: (each, helps.get(verb) or "") for verb, each in action.choices.items()}
        elif not isinstance(action, argparse._HelpAction):
            arguments.append(action)
    yield from (f"## `{name}`", "")
    if about:
        yield from (f"{about[0].upper()}{about[1:]}.", "")
    if arguments:
        yield from (f"    {' '.join([name, *map(_synopsis, arguments)])}", "")
        yield from table(("argument", "meaning"), ((_name(each), _meaning(each)) for each in arguments))
        yield ""
    for verb, (each, text) in inner.items():
        yield from _verbs(each, f"{name} {verb}", text)


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return metavar if action.option_strings else metavar.upper()


def _name(action: argparse.Action) -> str:
    return f"`{' '.join([*action.option_strings[-1:], *filter(None, [_value(action)])])}`"


def _synopsis(action: argparse.Action) -> str:
    bare = _name(action).strip("`")
    return bare if action.required else f"[{bare}]"


def _meaning(action: argparse.Action) -> str:
    """Return the help of an argument, with choices and default where the help lacks them."""
    text = (action.help or "") % {"default": action.default, "prog": "or1"}
    facts = [text] if text else []
    if action.choices:
        facts.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    plain = action.default in (None, argparse.SUPPRESS, False, [], 0)
    if not plain and "default" not in text:
        facts.append(f"default: `{action.default}`")
    return "; ".join(facts)
