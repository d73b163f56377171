"""Grades programs as a plain user for tests that run as root: one JSON line in, one JSON line out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

PLAIN_USER = 64321
"""An id that no account has, and no sandbox uses."""


def serve() -> None:
    """Answer orders until standard input ends."""
    from tests.helpers import sandboxes

    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "together" in order:
                found: list[Any] = [None] * len(order["together"])

                def one(index: int, order: Any = order, found: list[Any] = found) -> None:
                    found[index] = sandboxes.output(order["together"][index], order["kind"])

                threads = [threading.Thread(target=one, args=(i,)) for i in range(len(found))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                answer: Any = found
            elif "truth" in order:
                score = sandboxes.score(order["program"], order["truth"], order["kind"], **order["changes"])
                answer = [score.reward, score.status.value]
            elif "program" in order:
                answer = sandboxes.output(order["program"], order["kind"])
            else:
                answer = sandboxes.find_sandbox(order["choice"])
        except Exception as error:  # noqa: BLE001  the process boundary: the test shows what it was
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _python(identity: dict[str, Any], environment: dict[str, str]) -> str:
    """Return an interpreter that the user can run: root's own may lie where nobody else can look. Raises OSError."""
    version = f"python3.{sys.version_info.minor}"
    for path in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            subprocess.run(
                [path, "-c", "from tests.helpers import plain_user, sandboxes"],
                env=environment,
                cwd="/",
                check=True,
                capture_output=True,
                **identity,
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return path
    raise OSError(f"a plain user finds no {version} that can import or1's requirements")


class Grader:
    """A process that grades. user: whom it runs as; None is the present one.

    Raises OSError if that user cannot run Python or read this checkout.
    """

    def __init__(self, user: int | None):
        self._folder = Path(tempfile.mkdtemp(prefix="or1-plain-"))
        self._folder.chmod(0o755)
        # A checkout may lie where only its owner can look.
        import or1

        shutil.copytree(Path(or1.__file__).parent, self._folder / "or1", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(
            Path(__file__).parent, self._folder / "tests" / "helpers", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copy(Path(__file__).parents[1] / "__init__.py", self._folder / "tests")
        paths = [str(self._folder), *(p for p in sys.path if "site-packages" in p)]
        identity: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": "/",
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_TOKEN": "hf_geheim",
        }
        self._process = subprocess.Popen(
            [_python(identity, environment), "-B", "-c", "from tests.helpers import plain_user; plain_user.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            start_new_session=True,
            env=environment,
            **identity,
        )
        self.pid = self._process.pid

    def ask(self, **order: Any) -> Any:
        """Return the answer to one order. Raises AssertionError if the grader died or failed."""
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        assert line, f"the grader has ended with code {self._process.wait()}"
        answer = json.loads(line)
        assert not (isinstance(answer, dict) and "error" in answer), answer["error"]
        return answer

    def close(self) -> None:
        """End the process and remove its copy."""
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)
