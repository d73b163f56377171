"""What a response, a data file, a server or a model folder says never steers the terminal."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from or1 import cli
from or1.commands import doctor
from or1.commands.ckpt import list_checkpoints
from or1.commands.doctor import Line
from or1.commands.exit import fail
from or1.core.terminal import tell_traceback
from or1.core.text import visible
from or1.dist import watchdog
from or1.dist.watchdog import Watchdog
from or1.eval.accuracy import Estimate, EvalResult
from or1.report.progress import Bar
from or1.report.tables import print_evaluation
from tests.helpers.small_run import arguments

# ESC with a CSI, an OSC that sets the title, an eight-bit CSI, a carriage return, a backspace, and bidi controls.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\rfine\x08\u202e\u2066\u061c\u200f"
SEEN = "<U+001B>[2J<U+001B>]0;owned<U+0007><U+009B>31m<U+000D>fine<U+0008><U+202E><U+2066><U+061C><U+200F>"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def console() -> Console:
    return Console(file=io.StringIO(), width=400, force_terminal=False)


def test_every_control_character_is_spelt_out() -> None:
    assert visible(HOSTILE) == SEEN and visible("two\nlines\t") == "two\nlines\t"


def test_an_error_is_shown_without_its_escapes_and_with_its_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail(ValueError(f"first {HOSTILE}\nsecond"), 70) == 70
    assert capsys.readouterr().err == f"or1: first {SEEN}\nsecond\n"
    monkeypatch.setenv("RANK", "1")
    assert fail(f"first {HOSTILE}\nsecond", 70) == 70
    assert capsys.readouterr().err == f"or1: rank 1: first {SEEN}\n"
    assert fail(ValueError(), 70) == 70, "an error without a text"
    assert capsys.readouterr().err == "or1: rank 1: \n"


@pytest.mark.parametrize("row", [{HOSTILE: "1+1"}, {"question": "1+1", "answer": "2", "id": HOSTILE}])
def test_names_of_a_data_file_do_not_steer_the_terminal(
    row: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "train.jsonl"
    # Named twice, an id is quoted by the message about it.
    data.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    cli.main(arguments(tmp_path / "run", "--dry-run", data__train=data))
    said = capsys.readouterr()
    assert not STEERS.search(said.err + said.out)


@pytest.mark.parametrize(
    "action",
    [
        "raise KeyError(text)",
        "threading.Thread(target=exec, args=('raise KeyError(text)', globals())).start()",
        "logging.getLogger('some.library').error('it said %s', text)",
        "logging.getLogger('some.library').error('cause', exc_info=KeyError(text))",
        "warnings.warn(text)",
    ],
)
def test_what_libraries_print_is_shown_without_escapes(action: str) -> None:
    program = f"""
import logging, sys, threading, warnings
from or1 import cli
from or1.commands import report
class Raw(str):
    __repr__ = str.__str__
text = Raw({HOSTILE!r})
def action(_):
    {action}
    return 0
report.run = action
sys.argv = ["or1", "report", "x"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert SEEN in done.stderr and not STEERS.search(done.stderr), done.stderr
    assert done.returncode == (1 if action.startswith("raise") else 0)
    if "raise" in action:
        assert "Traceback (most recent call last)" in done.stderr


def test_hooks_are_set_in_a_process_of_or1s_own_only(tmp_path: Path) -> None:
    before = sys.excepthook
    assert cli.main(["report", str(tmp_path)]) == 70
    assert sys.excepthook is before


def test_a_rank_passes_on_what_another_said_without_its_escapes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: None)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
    guard = Watchdog(watchdog.World(), 1.0)
    guard._give_up(f"rank 1 failed: ValueError: {HOSTILE}")
    tell_traceback(RuntimeError(HOSTILE))
    said = capsys.readouterr().err
    assert said.count(SEEN) == 2 and not STEERS.search(said)


def result(name: str) -> EvalResult:
    estimate = Estimate(0.5, 0.1)
    return EvalResult(name, 2, 2, estimate, {1: estimate, 2: estimate}, estimate, 10.0, 0.0, {})


def test_tables_show_names_as_they_are(tmp_path: Path) -> None:
    # "[/b]" closes what was never opened: read as markup, such a name would end the command in a traceback.
    name = f"[/b]{HOSTILE}"
    shown = console()
    print_evaluation([result(name)], {name: [result(name), result(name)]}, [name], shown)
    with Bar(shown) as bar:
        bar.message(name)
        bar.progress(name)(2, 2)
    text = shown.file.getvalue()
    assert text.count(f"[/b]{SEEN}") == 7 and not STEERS.search(text)

    live = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None, _environ={})
    with Bar(live) as bar:
        bar.progress(name)(1, 2)
    assert f"[/b]{SEEN}" in live.file.getvalue() and "owned\x07" not in live.file.getvalue()

    manifest = tmp_path / "checkpoints" / "step_1" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"format": name}))
    shown = console()
    list_checkpoints(tmp_path, shown)
    assert f"[/b]{SEEN}" in shown.file.getvalue()


def test_doctor_shows_an_engines_words_without_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("Engine of [/b]\x1b[2J", [Line("engine", "problem", HOSTILE)])]
    monkeypatch.setattr(doctor, "_sections", lambda config: found)
    shown = console()
    assert not doctor.diagnose(None, shown)
    assert SEEN in shown.file.getvalue() and not STEERS.search(shown.file.getvalue())


def test_one_place_writes_to_standard_error(root: Path) -> None:
    found = []
    for path in sorted((root / "or1").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if text.startswith("traceback.print_") or (text.startswith("print(") and "file=sys.stderr" in text):
                found.append(f"{path.name}:{node.lineno}")
    # A reward worker that crashes has a process, and a traceback, of its own.
    others = [place for place in found if not place.startswith(("terminal.py", "child.py"))]
    assert not others, f"{others}: use or1.core.terminal.tell"
