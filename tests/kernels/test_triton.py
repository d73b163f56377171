"""The Triton passes without a GPU: their numbers under the interpreter, and compilation ahead of time.

Under the interpreter the whole head runs (test_head, test_extremes with impl="triton"), in a process of its own: the
switch must be set before triton is imported.
"""

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarks.lib import interpreter

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90a": ("cuda", 90, 32),
    "sm_100a": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def run_interpreted(*groups: list[str], every: int = 1) -> list[str]:
    """pytest in a child for each group of files, at once, with the interpreter on; fails the test unless all pass.

    every  run one in so many cases of each test (tests/kernels/conftest.py)
    """
    if why := interpreter.why_not():
        pytest.skip(why)
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "OR1_TEST_EVERY": str(every),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    outputs = []
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, *(str(HERE / name) for name in group)],
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=HERE.parents[1],
                )
            )
            for group in groups
        ]
        for child in children:
            outputs.append(child.communicate(timeout=600)[0])
            assert child.returncode == 0 and "passed" in outputs[-1], outputs[-1][-4000:]
    return outputs


@pytest.mark.slow
def test_interpreter_runs_both_passes():
    assert "skipped" not in run_interpreted(["test_triton_rows.py"], every=3)[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_interpreter_runs_the_policy_loss_inside_the_kernel():
    assert "skipped" not in run_interpreted(["test_triton_policy.py", "test_triton_far.py"], every=3)[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_interpreter_runs_the_whole_head():
    run_interpreted(["test_head.py"], ["test_extremes.py", "test_options.py", "test_frozen_head.py"], every=3)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_interpreter_runs_every_case():
    rows = ["test_triton_rows.py", "test_triton_policy.py", "test_triton_far.py"]
    run_interpreted(["test_head.py", "test_frozen_head.py"], [*rows, "test_extremes.py", "test_options.py"])


def test_explicit_triton_on_a_cpu_says_why_not():
    from or1_kernels import linear_logprob_entropy

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        linear_logprob_entropy(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64), impl="triton")


def compiled(kernel, out, capped, target):
    """Compile one pass as the launcher does at full vocabulary: BLOCK columns, NUM_WARPS warps, aligned pointers."""
    from triton.backends.compiler import GPUTarget

    from benchmarks.head.instructions import compile_pass
    from or1_kernels.rows import triton_kernel

    fn = getattr(triton_kernel, kernel)
    return compile_pass(fn, GPUTarget(*TARGETS[target]), {"CAPPED": capped}, out or "*fp32")


def spilled_bytes(binary, folder: Path) -> int:
    """Return the bytes of registers that the assembler spills to memory."""
    if "amdgcn" in binary.asm:
        counts = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", binary.asm["amdgcn"])
        assert counts
        return sum(map(int, counts))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    local, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("LOCAL", "STACK"))
    return local + stack


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize(
    ("kernel", "out"), [("row_sums_kernel", None), ("row_grads_kernel", "*fp32"), ("row_grads_kernel", "*bf16")]
)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_ahead_of_time_without_a_spill(target, kernel, out, capped, tmp_path):
    binary = compiled(kernel, out, capped, target)
    assert ("hsaco" if target == "gfx942" else "cubin") in binary.asm
    assert spilled_bytes(binary, tmp_path) == 0


def test_the_in_place_pass_fences_each_blocks_loads_from_its_stores():
    ptx = compiled("row_grads_kernel", "*bf16", False, "sm_90a").asm["ptx"]
    body = ptx[ptx.index("ld.global.v4") if "ld.global.v4" in ptx else ptx.index("ld.global") :]
    loop = body[: body.index("st.global")]
    assert "bar.sync" in loop or "barrier.sync" in loop
