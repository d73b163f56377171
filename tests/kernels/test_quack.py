"""The GEMM 1 of the real QuACK: names, signatures, and compilation ahead of time. Nothing here runs on a GPU."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("quack", reason="needs the extra quack")
pytestmark = pytest.mark.integrations

# Compiles the epilogue for a GPU that is not there. The number of clusters that a GPU holds is only asked for a launch.
_COMPILE = """
import sys, torch
from quack.cache.async_compile import _pin_dsl_arch
from quack.gemm_runtime import host
from or1_kernels.engine import exp_gemm, quack_gemm
host.get_max_active_clusters = lambda *_, **__: 1
_pin_dsl_arch(sys.argv[1])
major, vocab = int(sys.argv[2]), int(sys.argv[3])
hidden, weight = (torch.empty(n, 128, dtype=torch.bfloat16) for n in (256, vocab))
rows = exp_gemm.ExpRows(hidden, torch.zeros(256, dtype=torch.int64), torch.ones(256), torch.ones(256))
e = torch.empty(256, vocab, dtype=torch.bfloat16)
config = quack_gemm.config(major, vocab)
operands, out = quack_gemm.arguments(rows, e, config.tile_n)
plan = quack_gemm.exp_epilogue.plan(hidden, weight.mT, out={"D": e}, config=config, **operands)
names = set(plan.gemm_plan.arg_template)
assert {"rate", "shift", "targets", "sums", "moments", "own"} <= names, names
assert callable(plan.gemm_plan.compiled_fn)
print("compiled", config.tile_m, config.tile_n)
"""


@pytest.fixture
def blind(monkeypatch):
    """Hide GPUs and name the architecture, as QuACK's own compile workers do."""
    monkeypatch.setenv("QUACK_ARCH", "90")


def test_the_names_that_the_epilogue_uses_exist(blind):
    from quack.epilogue.frontend import EpiMod

    from or1_kernels.engine import quack_gemm

    mod = quack_gemm.exp_epilogue
    assert isinstance(mod, EpiMod) and mod.operand_names == ("rate", "shift")
    assert set(mod.sinks) == {"sums", "moments", "own"} and [op.name for op in mod.extra_ops] == ["targets"]
    given = inspect.signature(EpiMod.__call__).parameters
    assert {"A", "B", "out", "config", "tuned", "operands"} <= set(given)
    for major in quack_gemm.MAJORS:
        for vocab in (151_936, 152_064, 128_256, 32_000):
            tile = quack_gemm.config(major, vocab).tile_n
            sink = mod.sinks["sums"].sink_alloc_shape((4096,), vocab, 128, tile)
            assert vocab % tile == 0 and sink == (4096, vocab // tile)


def test_unfit_weights_are_named(blind):
    from or1_kernels.engine.quack_gemm import QuackGemm

    gemm = QuackGemm()
    assert gemm.why_not(torch.empty(152_064, 64, device="meta")) is None
    assert "50257 x 64" in gemm.why_not(torch.empty(50_257, 64, device="meta"))
    assert "multiple of 8" in gemm.why_not(torch.empty(256, 60, device="meta"))
    assert "contiguous" in gemm.why_not(torch.empty(256, 64, device="meta").T)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("vocab", [152_064, 151_936, 32_000])
@pytest.mark.parametrize(("target", "major"), [("sm_90a", 9), ("sm_100a", 10)])
def test_the_epilogue_compiles_without_a_gpu(tmp_path, target, major, vocab):
    settings = {"QUACK_ARCH": str(major * 10), "CUTE_DSL_ARCH": target, "QUACK_CACHE_ENABLED": "0"}
    settings |= {"TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    env = os.environ | settings | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", _COMPILE, target, str(major), str(vocab)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stdout.startswith("compiled"), done.stderr[-3000:]
