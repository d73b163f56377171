"""Memory, imports and prints of user reward functions: limits, logs, and the resources of a worker."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from or1.core.errors import RewardFunctionError, ScorerError
from or1.core.types import Prompt, Status
from or1.reward import capacity, output, pool
from or1.reward.capacity import WORKER_MIB, WORKERS_PER_CORE, check_workers
from or1.reward.output import LOG_NAME, OutputLog
from or1.reward.scorers import CustomScorer, MathScorer
from tests.helpers.orders import response, results, scores

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, subreapers and pidfds")
pytestmark = [needs_linux, pytest.mark.timeout(120)]


def test_memory_has_a_limit_and_the_next_response_has_room_again(obeying) -> None:
    found = scores(obeying(memory_bytes=300 << 20), "memory 200", "memory 150", "memory 151", "plain 2")
    assert [s.status.value for s in found] == ["ok", "crash", "ok", "ok"]
    assert "MemoryError" in found[1].cause and "reward.memory_mib = 300" in found[1].cause


def test_the_default_memory_holds_a_function_that_imports_torch(tmp_path: Path) -> None:
    from or1.config import RewardConfig
    from or1.reward import make_scorer

    path = tmp_path / "own.py"
    path.write_text("import torch\ndef reward(completions):\n    return torch.ones(1000, 1000).mean().reshape(1)\n")
    with make_scorer(RewardConfig(kind=f"{path}:reward", workers=1, timeout_s=30)) as scorer:
        assert results(scorer, "x") == [1.0]


MODULES = {
    "import sys\nsys.exit(3)": "SystemExit: 3 ({file}:2, in <module>)",
    "raise KeyboardInterrupt": "KeyboardInterrupt ({file}:1, in <module>)",
    "raise ValueError(chr(0xD800))": "ValueError: ",
    "import os\nos._exit(0)": "{file}:reward cannot be loaded: its process ended early (exited with code 0)",
    "import os\nos.kill(os.getpid(), 11)": "{file}:reward cannot be loaded: its process ended early (killed by",
    "x = bytearray(1 << 40)": "MemoryError ({file}:1, in <module>); reward.memory_mib = 4096 is the limit",
}


@pytest.mark.parametrize("source", MODULES)
def test_a_module_that_cannot_be_imported_is_the_users_and_named(source: str, tmp_path: Path, capfd) -> None:
    path = tmp_path / "own.py"
    path.write_text(source)
    with pytest.raises(RewardFunctionError) as caught:
        CustomScorer(f"{path}:reward", workers=1, timeout_s=5, memory_bytes=4096 << 20)
    assert MODULES[source].format(file=path) in str(caught.value) and str(path) in str(caught.value)
    assert str(caught.value).isascii() and "Traceback" not in capfd.readouterr().err


def test_a_module_that_forks_while_it_is_imported_is_loaded_once(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("import os\nos.fork()\ndef reward(completions):\n    return [2.0]\n")
    with CustomScorer(f"{path}:reward", workers=1, timeout_s=5) as scorer:
        assert results(scorer, *"abcdef") == [2.0] * 6


@pytest.mark.slow
def test_the_time_to_load_a_function_anew_is_not_charged_to_a_response(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pool, "GRACE_S", 0.5)
    path = tmp_path / "own.py"
    path.write_text(
        "import os, time\ntime.sleep(1.5)\ndef reward(completions):\n"
        "    return [2.0] if completions[0] != 'exit' else os._exit(1)\n"
    )
    with CustomScorer(f"{path}:reward", workers=1, timeout_s=0.2) as scorer:
        assert results(scorer, "a", "exit", "b") == [2.0, "crash", 2.0]


def test_prints_of_several_workers_are_whole_lines_of_one_log(obeying, tmp_path: Path, capfd) -> None:
    log = tmp_path / LOG_NAME
    scorer = obeying(workers=2, log=log)
    assert not log.exists(), "nothing was printed"
    names = [f"r{i}" for i in range(8)]
    assert results(scorer, *(f"print {name} 200" for name in names)) == [200] * 8
    scorer.close()
    wanted = [f"{name} line {i} \\ud800" for name in names for i in range(200)] + ["unfinished"] * 8
    assert sorted(log.read_text().splitlines()) == sorted(wanted)
    assert capfd.readouterr() == ("", "")


def test_the_log_has_a_limit_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / LOG_NAME
    for _ in range(3):  # several workers and restarts
        log = OutputLog(str(path), limit=10_000)
        write = log.open()
        for i in range(300):
            os.write(write, f"{i} \x1b[2J {'x' * 20}\n".encode())
            log.drain()
        os.write(write, b"rest without an end")
        os.close(write)
        log.close()
    text = path.read_text()
    assert 9_900 <= path.stat().st_size <= 10_000
    assert text.count("later output is lost") == 1 and text.endswith("is lost ---\n")
    assert text.startswith("0 <U+001B>[2J ") and "rest without" not in text


def test_a_flood_of_prints_neither_fills_the_disk_nor_blocks(obeying, tmp_path: Path) -> None:
    log = tmp_path / LOG_NAME
    assert results(obeying(log=log, timeout_s=30.0), "print-bytes 40000000", "plain 2") == [40_000_000, 2]
    assert output.LIMIT_BYTES - 1000 < log.stat().st_size <= output.LIMIT_BYTES


def test_a_log_that_cannot_be_written_costs_no_reward(obeying, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / LOG_NAME).symlink_to(tmp_path / "elsewhere")
    for log in (tmp_path / "no folder" / LOG_NAME, tmp_path / LOG_NAME, tmp_path):
        assert results(obeying(log=log), "print a 100") == [100]
    assert (tmp_path / "elsewhere").read_text() == "", "a link is not followed"


ENVIRONMENT = """
import json, os

def tell(job):
    with open(job["golds"][0], "w") as file:
        json.dump(dict(os.environ), file)
    return True
"""


def test_the_maths_verifier_gets_no_tokens_and_own_functions_keep_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tells.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    told = tmp_path / "told.json"
    with MathScorer(workers=1, timeout_s=5, grader="tells:tell") as scorer:
        prompt = Prompt("t:1", "t", "?", np.array([1], np.int32), (str(told),))
        assert scorer.submit(prompt, response(r"\boxed{x}")).result(60).status is Status.OK
    found = json.loads(told.read_text())
    assert "geheim" not in told.read_text()
    assert found["LC_ALL"] == "C.UTF-8" and found["PATH"] == os.environ["PATH"] and found["OMP_NUM_THREADS"] == "1"

    path = tmp_path / "own.py"
    path.write_text("import os\ndef reward(completions):\n    return [float('HF_TOKEN' in os.environ)]\n")
    with CustomScorer(f"{path}:reward", workers=1, timeout_s=5) as scorer:
        assert results(scorer, "x") == [1.0]


def test_too_many_workers_are_refused_with_a_number_that_fits(monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    check_workers(2, cores=1, free_mib=2 * WORKER_MIB)
    check_workers(1, cores=1, free_mib=0)
    check_workers(64, cores=2, free_mib=None)
    fits = 2 * WORKERS_PER_CORE
    with pytest.raises(ScorerError, match=rf"reward.workers = 1000: too many for 2 cores.* at most {fits}$"):
        check_workers(1000, cores=2, free_mib=1 << 30)
    fits = 960 // WORKER_MIB
    with pytest.raises(ScorerError, match=rf"{32 * WORKER_MIB:,} MiB, and 960 MiB are free; .* at most {fits}$"):
        check_workers(32, cores=2, free_mib=960)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ScorerError, match=r"in each of 4 ranks: too many .* at most 16"):
        check_workers(17, cores=2)


def test_the_memory_of_a_container_counts_without_its_cache_of_files(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{100 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{95 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\nactive_file {30 << 20}\ninactive_file {15 << 20}\n")
    assert capacity._free_mib(tmp_path) == 50
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity._free_mib(tmp_path) != 50
