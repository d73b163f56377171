"""Runs a function of an importable module in N gloo ranks, or alone, each a fresh process with torch already loaded."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["or1.trainer", "or1.launch"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def _main(pipe: Connection, variables: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
    pipe.send((True, result))


@contextlib.contextmanager
def started(function: Callable[..., Any], size: int, *arguments: Any, **variables: str) -> Iterator[list]:
    """The processes and pipes of `size` ranks that run `function(*arguments)`; all are dead afterwards."""
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
    """What `function(*arguments)` returned on each rank. Raises AssertionError with the traceback of one that failed."""
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


sys.modules.setdefault("ranks", sys.modules[__name__])
