"""Signals, locales and streams that a command finds where it is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from or1.cli import main
from or1.config.load import load_config
from or1.core.errors import ConfigError
from tests.helpers.small_run import ROOT

IGNORING = """
import signal, sys
from or1.dist import local_ranks
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_IGN)
import torch.distributed.elastic.multiprocessing as elastic
class Ranks:
    def pids(self): return {}
    def wait(self, period):
        hup, quit, term = map(signal.getsignal, (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM))
        print(hup, quit, callable(term))
        return None
def start(**options):
    # What torch's own does.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: sys.exit(9))
    print(options["logs_specs"].root_log_dir)
    return Ranks()
elastic.start_processes = start
assert local_ranks.run_ranks(2, []) == 0
print(signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM))
"""


def test_what_nohup_ignores_stays_ignored_and_torch_leaves_no_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IGNORING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logs, during, after = done.stdout.splitlines()
    ignored = str(signal.SIG_IGN)
    assert during == f"{ignored} {ignored} True" and after == f"{ignored} {signal.SIG_DFL}"
    assert logs.startswith(str(tmp_path)) and not list(tmp_path.iterdir())


def test_a_path_that_the_locale_cannot_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9")
    with pytest.raises(ConfigError, match="set LANG to a UTF-8 locale"):
        load_config(ROOT / "examples/quickstart.toml", [f"run_dir={place}"], files=False)
    os.makedirs(place)
    Path(place, "config.resolved.json").write_text("{}")
    assert main(["eval", place]) == 2
    assert "PYTHONUTF8=1" in capsys.readouterr().err


TALKING = """
import sys
from or1.core.terminal import guard_terminal
guard_terminal()
from or1.report.console import default_console
console = default_console()
for _ in range(1000):
    console.print("x" * 100)
print("plain", flush=True)
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("where", [">&-", "| head -1", "> /dev/full"])
def test_standard_output_that_is_gone_does_not_end_a_command(where: str) -> None:
    script = 'set -o pipefail; "$@" ' + where
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-c", TALKING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert done.stderr.endswith("done\n")
    if where != ">&-":
        assert done.stderr.count("standard output can no longer be written") == 1
