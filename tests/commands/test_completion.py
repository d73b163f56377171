"""`or1 completion`: the script in a real shell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from or1.cli import VERBS, main
from or1.commands.completion import SHELLS


def test_without_the_package_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 70
    assert "pip install 'or1[completion]'" in capsys.readouterr().err


@pytest.mark.integrations
@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_every_verb_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*VERBS, "dry-run", "restarts", "worst"):
        assert word in script
    if shell == "bash" and (bash := shutil.which("bash")):
        asked = "COMP_WORDS=(or1 {}); COMP_CWORD={}; _shtab_or1 or1 {} or1; echo ${{COMPREPLY[@]}}"
        for words, last, expected in (("re", 1, "report reward replay"), ("show runs --w", 3, "--worst")):
            ask = f"{script}\n{asked.format(words, last, words.split()[-1])}"
            done = subprocess.run([bash, "-c", ask], capture_output=True, text=True, timeout=30)
            assert sorted(done.stdout.split()) == sorted(expected.split()), done.stderr


@pytest.mark.integrations
def test_a_config_is_completed_as_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    (tmp_path / "mine.toml").write_text("")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = "COMP_WORDS=(or1 train mi); COMP_CWORD=2; _shtab_or1 or1 mi train; echo ${COMPREPLY[@]}"
    done = subprocess.run([bash, "-c", f"{script}\n{ask}"], capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.stdout.split() == ["mine.toml"], done.stderr
