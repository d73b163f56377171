"""`or1 serve`: the vLLM server of a config, for a trainer on this or another machine."""

from __future__ import annotations

import argparse

from or1.commands.arguments import add_overrides
from or1.config.load import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 serve`."""
    parser.add_argument("config", help="TOML file")
    add_overrides(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; use an address other than loopback only in a network that you trust",
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")


def run(arguments: argparse.Namespace) -> int:
    """Replace this process by the server, which runs until it is killed. Raises ConfigError, EngineError."""
    config = load_config(arguments.config, arguments.overrides)
    from or1.rollout import serve

    serve(config, arguments.host, arguments.port)
    return 0
