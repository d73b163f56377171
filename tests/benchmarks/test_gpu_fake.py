"""The rehearsal on fake CUDA tensors: its backward engine against torch's, and all of it with a CUDA build of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.fake import engine
from or1.model.memory import tiled_forward
from or1_kernels import linear_policy_loss


class Double(torch.autograd.Function):
    """A Function with an argument that is no tensor, and an output that no gradient reaches."""

    @staticmethod
    def forward(ctx, factor, x):
        ctx.factor = factor
        return x * factor, x + 1

    @staticmethod
    def backward(ctx, dy, unused):
        assert unused is not None, "torch fills in zeros"
        return None, dy * ctx.factor


def network(x: Tensor, layer: nn.Linear, mlp: nn.Module, weight: Tensor) -> Tensor:
    hidden = checkpoint(lambda t: layer(t).tanh() + t, x, use_reentrant=False)
    hidden = hidden + tiled_forward(mlp, hidden, 4, tuple(mlp.parameters()))
    hidden, _ = Double.apply(2.0, hidden)
    # A bias that is broadcast, a value that is used twice, and a type that changes on the way.
    hidden = (hidden * hidden[:1].detach() + layer.bias).double().float()
    targets, ones = torch.arange(len(x)) % len(weight), torch.ones(len(x))
    return linear_policy_loss(hidden, weight, targets, ones, token_weight=ones / 7, entropy_coef=0.01)[0]


def test_the_engine_computes_the_gradients_of_torchs_own() -> None:
    torch.manual_seed(0)
    layer, weight = nn.Linear(8, 8), torch.randn(17, 8, requires_grad=True)
    mlp = nn.Sequential(nn.Linear(8, 5), nn.SiLU(), nn.Linear(5, 8))
    x = torch.randn(13, 8, requires_grad=True)
    leaves = [x, weight, *layer.parameters(), *mlp.parameters()]
    network(x, layer, mlp, weight).backward()
    want = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    with engine.installed():
        network(x, layer, mlp, weight).backward()
        got = [leaf.grad for leaf in leaves]
        # A second pass adds to the first, as torch's does.
        network(x, layer, mlp, weight).backward()
        grads = torch.autograd.grad(network(x, layer, mlp, weight), leaves)
    for leaf, a, b, c in zip(leaves, got, want, grads, strict=True):
        torch.testing.assert_close(b, c)
        torch.testing.assert_close(leaf.grad, 2 * b)
        assert a is leaf.grad
    assert torch.autograd.backward is not engine.backward


def test_the_engine_runs_hooks_of_leaves_and_leaves_others_alone() -> None:
    leaf, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    seen = []
    leaf.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    engine.backward((leaf * 3 + other.detach()).sum())
    assert torch.equal(seen[0], torch.full((3,), 3.0)) and other.grad is None
    assert engine.grad((leaf * 2).sum(), (leaf, other))[1] is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_a_cpu_build_of_torch_is_one_line_and_a_code_of_its_own(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--fake"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 4 and "CPU build" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cuda_paths_run_on_fake_tensors(root: Path, tmp_path: Path) -> None:
    """Run it in an environment with torch 2.11 for CUDA, which is large. OR1_CUDA_PYTHON names one that is there."""
    python = os.environ.get("OR1_CUDA_PYTHON") or make_environment(tmp_path / "venv")
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    command = [python, "-m", "benchmarks.gpu", str(tmp_path), "--fake"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads((tmp_path / "fake.json").read_text())["rows"]
    names = " ".join(row["check"] for row in rows)
    for word in ("fast", "lean", "main_grad", "scores", "optimizer offload", "checkpointing layer", "stochastic"):
        assert word in names
    assert all(row["ok"] and row["launches"] > 0 for row in rows)


def make_environment(folder: Path) -> str:
    """Make an environment with torch 2.11 for CUDA and return its python; skip where the index cannot be reached."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    wanted = ("torch==2.11.0", "transformers==5.17.0", "numpy", "pydantic>=2.9,<3", "pyarrow", "rich")
    done = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True, timeout=850)
    if done.returncode != 0:
        pytest.skip(f"torch 2.11 cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return python
