"""`python -m or1.tune.child`: run candidates for the process at the other end of a socket; see `or1.tune.process`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

from or1.core.processes import die_with
from or1.core.text import visible

_MOST_TEXT = 300
# A GPU's context is lost after such an error.
_BROKEN = ("cuda error", "accelerator error", "cublas_status", "illegal memory", "launch failure")


class Bench(Protocol):
    """What times and checks the candidates of one group."""

    def prepare(self) -> None:
        """Make inputs and exact results."""
        ...

    def check(self, options: Mapping[str, Any]) -> float:
        """Run once, and return the largest error against fp64 in units of the error of plain torch."""
        ...

    def seconds(self, options: Mapping[str, Any]) -> float:
        """Return the seconds of one run."""
        ...


def serve(wire: Connection, make: Callable[[], Mapping[str, Bench]]) -> None:
    """Answer requests until the other end closes the connection."""
    benches: Mapping[str, Bench] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        bench = benches[request["group"]]
        if request["do"] == "prepare":
            bench.prepare()
            return {}
        if request["do"] == "check":
            return {"error": bench.check(request["options"])}
        return {"seconds": bench.seconds(request["options"])}

    try:
        benches = make()
        wire.send_bytes(b"{}")
    except Exception as error:  # noqa: BLE001
        wire.send_bytes(json.dumps(_failure(error)).encode())
        return
    while True:
        try:
            request = json.loads(wire.recv_bytes())
        except EOFError:
            return
        try:
            reply = answer(request)
        # Whatever a candidate raises is a reason to leave it out.
        except Exception as error:  # noqa: BLE001
            reply = _failure(error)
        wire.send_bytes(json.dumps(reply).encode())


def _failure(error: Exception) -> dict[str, Any]:
    text = f"{type(error).__name__}: {error}"
    lines = text.strip().splitlines()
    if "out of memory" in text.lower():
        return {"why": visible(f"out of memory: {lines[0]}"[:_MOST_TEXT])}
    return {"why": visible(lines[0][:_MOST_TEXT]), "broken": any(sign in text.lower() for sign in _BROKEN)}


def main(descriptor: str, parent: str, benches: str, case: str) -> None:
    """Serve on an open socket. benches: module:function; case: JSON for that function."""
    die_with(int(parent))
    module, _, function = benches.partition(":")
    with Connection(int(descriptor)) as wire:
        serve(wire, lambda: getattr(importlib.import_module(module), function)(json.loads(case)))


if __name__ == "__main__":
    main(*sys.argv[1:])
