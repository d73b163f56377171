"""Launcher of `or1 train --nproc N`: N ranks on this machine, like torchrun --standalone --nproc-per-node N.

It uses torchrun's process management but not its rendezvous of machines. Therefore or1's exit codes are preserved, a
SIGTERM leaves time to finish the step, and further signals are forwarded too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from or1.core.processes import die_with

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAUNCHER = "OR1_LAUNCHER"


def end_with_launcher() -> None:
    """End this process as soon as its launcher ends. No-op in a process that `run_ranks` did not start.

    Otherwise ranks that have not met yet would wait for the launcher's store, up to `dist.timeout_s`.
    """
    # Removed from the environment, because children of a rank inherit it and have another parent.
    if launcher := os.environ.pop(_LAUNCHER, None):
        die_with(int(launcher))


def run_ranks(nproc: int, arguments: Sequence[str]) -> int:
    """Run `or1 ARGUMENTS` in `nproc` processes. Return 0, or the exit code of the rank that failed first.

    If one rank fails, the others get SIGTERM, and SIGKILL after 30 s.
    """
    from or1.dist.world import open_store

    # The launcher hosts the store, so that the remaining ranks can still exchange messages after one has ended.
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
    # Read before start_processes, which installs its own handlers for these signals.
    former = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGQUIT)}
    with tempfile.TemporaryDirectory(prefix="or1_ranks_", ignore_cleanup_errors=True) as logs:
        return _run(nproc, arguments, variables=shared, logs=logs, former=former)


def _run(
    nproc: int, arguments: Sequence[str], *, variables: dict[str, str], logs: str, former: Mapping[signal.Signals, Any]
) -> int:
    """Start the ranks and wait for them.

    variables  environment variables of every rank
    logs       folder for torch's own files
    former     signal handlers to restore at the end
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    ranks = start_processes(
        name="or1",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(nproc), ("-m", "or1", *arguments)),
        envs={rank: variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)},
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )

    # Each rank is a session of its own, which signals of the terminal do not reach, so they are forwarded. Signals
    # ignored by the caller, as SIGHUP under nohup, stay ignored.
    for number, handler in former.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN)
        elif number in _SIGNALS:
            signal.signal(number, lambda received, _: _pass_on(received, ranks.pids().values()))
    try:
        result = ranks.wait(period=0.1)
    finally:
        for number, handler in former.items():
            # None: the handler was not installed from Python and cannot be restored.
            if handler is not None:
                signal.signal(number, handler)
    if result is None or not result.is_failed():
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def _gloo_on_loopback() -> dict[str, str]:
    """Return the variable that restricts gloo to the loopback interface, unless the user has set it.

    By default gloo listens on the address of the host's name. NCCL is not restricted: its connections need a secret
    that the ranks exchange through the store, and a server on another node may take part in a broadcast.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", names[0])} if names else {}


def _pass_on(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        # A rank may already have ended; the others still need the signal.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
