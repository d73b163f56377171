"""`or1 train --nproc N`: N ranks on this machine, as torchrun --standalone --nproc-per-node N -m or1 train starts them.

It uses the part of torchrun that starts and watches processes, and not its rendezvous of machines: so or1's exit codes
survive, a SIGTERM leaves time to finish the step, and a second one is passed on too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from or1.core.processes import die_with

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAUNCHER = "OR1_LAUNCHER"


def end_with_launcher() -> None:
    """In a rank that `run_ranks` started: end this process as soon as the launcher is gone.

    Ranks that have not met yet would wait for the launcher's store, up to `dist.timeout_s`.
    """
    # What a rank starts inherits its variables and has another parent.
    if launcher := os.environ.pop(_LAUNCHER, None):
        die_with(int(launcher))


def run_ranks(nproc: int, arguments: Sequence[str]) -> int:
    """Run `or1 ARGUMENTS` in `nproc` processes; returns 0, or the exit code of the rank that failed first.

    When one fails, the others are told (SIGTERM) and, should they not end within 30 s, killed.
    """
    from or1.dist.world import open_store

    # This process holds the store, so that the ranks can still tell each other what happened when one is gone.
    store = open_store("127.0.0.1")
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        _LAUNCHER: str(os.getpid()),
        **_gloo_on_loopback(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc))),
    }
    # Before start_processes, which sets handlers of its own for these.
    former = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGQUIT)}
    with tempfile.TemporaryDirectory(prefix="or1_ranks_", ignore_cleanup_errors=True) as logs:
        return _run(nproc, arguments, (shared, logs), former)


def _run(nproc: int, arguments: Sequence[str], surroundings: tuple[dict[str, str], str], former: dict[int, Any]) -> int:
    """Start the ranks and wait for them; `surroundings` are their variables, and a folder for torch's own files."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    shared, logs = surroundings
    ranks = start_processes(
        name="or1",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(nproc), ("-m", "or1", *arguments)),
        envs={rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)},
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )

    # The ranks are sessions of their own, which a terminal's signals do not reach; under nohup they are not to.
    for number, handler in former.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN)
        elif number in _SIGNALS:
            signal.signal(number, lambda received, _: _pass_on(received, ranks.pids().values()))
    try:
        result = ranks.wait(period=0.1)
    finally:
        for number, handler in former.items():
            # None is a handler that Python did not set.
            if handler is not None:
                signal.signal(number, handler)
    if result is None or not result.is_failed():
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def _gloo_on_loopback() -> dict[str, str]:
    """Return the variable that keeps gloo's ports off the network; what the user has set stays.

    By itself gloo listens on the address of the host's name. NCCL stays as it is: its ports ask for a secret that ranks
    hand each other through the store, and a server on another node may take part in a broadcast.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", names[0])} if names else {}


def _pass_on(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        # One that has ended needs no signal, and the others still do.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
