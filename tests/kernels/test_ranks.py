"""Two gloo ranks: the vocabulary in two halves, and LMHead under FSDP2 with and without tied embeddings."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [
        sys.executable,
        "-m",
        "tests.helpers.kernel_ranks",
        "vocab_parallel,vocab_parallel_extremes,fsdp,fsdp_tied",
    ]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(o[-3000:] for o in outputs)
