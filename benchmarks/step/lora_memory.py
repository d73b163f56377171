"""Peak memory of one update of a model of 135 M parameters: all weights trained, and adapters.

    python -m benchmarks.step.lora_memory          prints MiB above the process without a model, beside `or1 plan`

The shape is that of SmolLM2-135M, with random weights. Each update runs in a process of its own: bf16 weights, fp32
masters, moments and gradient sums, layers checkpointed. The peak is torch's own count on a GPU, else the resident set.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from or1.config import LoraConfig, ModelConfig, OptimConfig
from or1.core.types import TrainSequence
from or1.dist.oom_retry import RowBudget

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
ROW, RANK = 256, 16
"""Tokens of the packed row, and the rank of the adapters on all linear layers."""


def settings(path: str, adapters: bool) -> ModelConfig:
    """Return `[model]` of an update."""
    lora = LoraConfig(rank=RANK) if adapters else None
    return ModelConfig(path=path, dtype="bfloat16", gradient_checkpointing="layer", lora=lora)


def save_model(folder: Path) -> None:
    """Save a model of SHAPE with random bf16 weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, dtype="bfloat16")).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
    model.save_pretrained(folder)


def measure(path: str, adapters: bool) -> float:
    """Run one update in this process. Return its peak in MiB above the process before the model was loaded."""
    # Imported before the measurement: their code is no memory of the update.
    from or1.model.load import load_model
    from or1.train.metrics import UpdateStats
    from or1.train.optim import MasterAdamW
    from or1.train.rank_rows import Policy
    from or1.train.update import update

    if adapters:
        import peft  # noqa: F401

    before = _mib("VmRSS")
    model = load_model(settings(path, adapters), packs=False).train()
    optimizer = MasterAdamW(model, OptimConfig(lr=1e-5))
    optimizer.reserve()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, SHAPE["vocab_size"], ROW).astype(np.int32)
    sequence = TrainSequence(ids[:64], ids[64:], np.zeros(ROW - 64, np.float32), 1.0)
    assert update(Policy(model, RowBudget(ROW)), optimizer, [sequence], 0.0, UpdateStats())
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _mib("VmHWM") - before


def _mib(key: str) -> float:
    """Return a number of /proc/self/status. Not ru_maxrss: a process inherits that peak from its parent."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(key))
    return int(line.split()[1]) / 1024


def measured(path: Path) -> dict[str, float]:
    """Return MiB by the name of the update, each measured in a process of its own."""
    found = {}
    for name in ("full", "adapters"):
        command = [sys.executable, "-m", "benchmarks.step.lora_memory", str(path), name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = float(done.stdout.split()[-1])
    return found


def planned(path: Path) -> dict[str, float]:
    """Return the MiB that `or1 plan` counts for the same updates on this device."""
    from types import SimpleNamespace

    from or1.plan.choices import Workload, choices_of
    from or1.plan.devices import find_device
    from or1.plan.memory import plan_memory
    from or1.plan.shapes import shape_of

    work = Workload(64, ROW - 64, 64, ROW - 64, 1, 1, False, 1)
    device, found = find_device(None, "auto")[0], {}
    for name in ("full", "adapters"):
        sections = SimpleNamespace(
            model=settings(str(path), name == "adapters"), optim=OptimConfig(max_tokens_per_rank=ROW)
        )
        plan = plan_memory(shape_of(str(path)), choices_of(sections, device, 1), device, work)
        found[name] = max(phase.total for phase in plan.phases if phase.name in ("update", "optimizer")) / 2**20
    return found


def main(arguments: list[str]) -> int:
    """Print both peaks, their ratio and the plan's; with a path and a name, the peak of that update alone."""
    if arguments:
        print(measure(arguments[0], arguments[1] == "adapters"))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        found, expected = measured(Path(folder)), planned(Path(folder))
    for name, size in found.items():
        print(f"{name:10} {size:8,.0f} MiB measured, {expected[name]:8,.0f} MiB planned")
    print(f"full / adapters: {found['full'] / found['adapters']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
