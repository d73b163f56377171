"""Runs a function of an importable module in N gloo ranks, or alone, each a fresh process with torch already loaded."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from or1.core import faults

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["or1.trainer", "or1.commands.train"])


_AT_START = dict(os.environ)


def _start_server() -> None:
    """Start the process that forks ranks, once, with the environment that the test run began with.

    The server stays until the test run ends, since loading torch takes seconds.
    """
    now = dict(os.environ)
    os.environ.clear()
    os.environ.update(_AT_START)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(now)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _main(pipe: Connection, variables: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(variables)
    # Loaded before the variables were set.
    importlib.reload(faults)
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
    pipe.send((True, result))


@contextlib.contextmanager
def started(function: Callable[..., Any], size: int, *arguments: Any, **variables: str) -> Iterator[list]:
    """Yield the processes and pipes of `size` ranks that run `function(*arguments)`; kill all afterwards."""
    _start_server()
    port, ranks = free_port(), []
    try:
        for rank in range(size):
            ours, theirs = FORKS.Pipe(duplex=False)
            call = (theirs, environment(rank, size, port) | variables, function, arguments)
            process = FORKS.Process(target=_main, args=call)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        yield ranks
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 100, **variables: str) -> list:
    """Return the result of `function(*arguments)` on each rank.

    Raises AssertionError with the traceback of a failed rank.
    """
    with started(function, size, *arguments, **variables) as ranks:
        deadline, results = time.monotonic() + timeout, {}
        while len(results) < size:
            left = [pipe for r, (_, pipe) in enumerate(ranks) if r not in results]
            ready = wait(left, timeout=max(deadline - time.monotonic(), 0))
            assert ready, f"ranks {sorted(set(range(size)) - set(results))} not done after {timeout} s"
            for r, (process, pipe) in enumerate(ranks):
                if pipe in ready and r not in results:
                    try:
                        fine, result = pipe.recv()
                    except EOFError:
                        process.join()
                        fine, result = False, f"ended with exit code {process.exitcode}"
                    assert fine, f"rank {r}:\n{result}"
                    results[r] = result
        for process, _ in ranks:
            process.join(20)
        return [results[r] for r in range(size)]


def or1_command(arguments: list[str], log: str) -> int:
    """Run `or1 ARGUMENTS` in this process, with the output in `log`.RANK, and return the exit code."""
    from or1.cli import main

    _write_to(f"{log}.{os.environ['RANK']}", f"{log}.{os.environ['RANK']}")
    code = main(arguments)
    sys.stdout.flush()
    return code


def _write_to(out: str, err: str) -> None:
    """Redirect the output of this process into files."""
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "ab", buffering=0) as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def start_or1(arguments: Sequence[str], folder: Path, log: Path) -> BaseProcess:
    """Start `or1 ARGUMENTS` in `folder`, in a process with torch already loaded that writes log.out and log.err."""
    _start_server()
    process = FORKS.Process(target=_or1, args=([*arguments], str(folder), f"{log}.out", f"{log}.err"))
    process.start()
    return process


def _or1(arguments: list[str], folder: str, out: str, err: str) -> None:
    from or1.cli import main

    os.chdir(folder)
    _write_to(out, err)
    code = main(arguments)
    sys.stdout.flush()
    sys.exit(code)


def exit_codes(ranks: list, timeout: float) -> list[int]:
    """Exit codes of ranks that `started` runs `or1_command` in, when all have ended within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    for process, _ in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    alive = [rank for rank, (process, _) in enumerate(ranks) if process.exitcode is None]
    assert not alive, f"ranks {alive} still run after {timeout} s"
    codes = []
    for process, pipe in ranks:
        code = process.exitcode
        if code == 0 and pipe.poll():
            fine, result = pipe.recv()
            code = result if fine else 1
        codes.append(code)
    return codes


def or1_ranks(size: int, arguments: list[str], log: Path, timeout: float = 150, **variables: str) -> list[int]:
    """Run `or1 ARGUMENTS` in `size` ranks and return their exit codes."""
    with started(or1_command, size, arguments, str(log), **variables) as ranks:
        return exit_codes(ranks, timeout)
