"""The command line: verbs, errors, and what is loaded before the arguments are known to be good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from or1.cli import VERBS, main
from or1.core import errors
from or1.core.errors import Or1Error

HEAVY = ("torch", "transformers", "pyarrow", "matplotlib", "safetensors", "or1_kernels", "rich", "numpy")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["ckpt", "ls", "--help"], 0),
        (["nonsense"], 2),
        (["train", "x.toml", "--nproc", "0"], 2),
        (["train", "x.toml", "--set", "seed", "1"], 2),
        (["train", "no-such.toml"], 2),
        (["eval", "no-such.toml"], 2),
        (["filter", "no-such.toml"], 2),
        (["serve", "no-such.toml"], 2),
        (["doctor", "no-such.toml"], 2),
        (["plan", "no-such.toml"], 2),
    ],
    ids=str,
)
def test_help_and_mistakes_are_answered_without_heavy_libraries(arguments: list[str], code: int) -> None:
    probe = (
        "import sys\nfrom or1.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", probe, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_a_verb_is_a_module_of_commands(root: Path) -> None:
    for name, verb in VERBS.items():
        assert verb.command.__name__ == f"or1.commands.{name}"
        assert (root / "or1" / "commands" / f"{name}.py").is_file()


OWN = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Or1Error) and e is not Or1Error]


@pytest.mark.parametrize("error", OWN, ids=lambda error: error.__name__)
def test_an_error_of_or1_is_one_line_and_its_exit_code(
    error: type[Or1Error], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised = error.__new__(error)
    ValueError.__init__(raised, "what, limit and remedy")

    def fails(_: object) -> int:
        raise raised

    monkeypatch.setattr("or1.commands.report.run", fails)
    assert main(["report", "run"]) == error.exit_code
    assert capsys.readouterr().err == "or1: what, limit and remedy\n"


@pytest.mark.parametrize("error", [ValueError("of a library"), KeyError("x"), RuntimeError("x"), OSError("no file")])
def test_any_other_error_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> int:
        raise error

    monkeypatch.setattr("or1.commands.report.run", fails)
    with pytest.raises(type(error)):
        main(["report", "run"])


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("or1.commands.report.run", stopped)
    assert main(["report", "run"]) == 130
    assert "interrupted" in capsys.readouterr().err
