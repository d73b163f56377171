"""`or1 schema`: the JSON schema of a config, for editors."""

from __future__ import annotations

import argparse

from or1.config.schema import schema_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 schema`: none."""
    parser.epilog = (
        "An editor with a TOML language server (taplo) completes and checks a config whose first line is "
        "`#:schema FILE`, where FILE is a path relative to the config."
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    print(schema_text(), end="")
    return 0
