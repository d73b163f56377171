"""Error of `or1 plan` against real updates: python -m benchmarks.plan_check OUT_DIR

Runs updates of a random Qwen2 of medium size. On a GPU, compares the plan's update and optimizer phases with
torch.cuda.max_memory_allocated. On a CPU, which counts no peaks, compares with the summed bytes of the tensors. Writes
OUT_DIR/plan_check.json and prints a table. Exits with 1 if a number is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks.plan.tensor_bytes import row_loss, saved_bytes, storage_bytes
from or1.config import DistConfig, ModelConfig, OptimConfig
from or1.core.types import TrainSequence
from or1.model.forward import hidden_states
from or1.model.load import load_model
from or1.model.rows import Microbatch, pack_indexed
from or1.plan.choices import Choices, Workload, choices_of
from or1.plan.devices import Device, find_device
from or1.plan.memory import MemoryPlan, gradient_bytes, optimizer_bytes, plan_memory, weight_bytes
from or1.plan.shapes import ModelShape, shape_of
from or1.train.optim import MasterAdamW

TOLERANCE = 0.10
_PROMPT = 64


@dataclass(frozen=True)
class Size:
    """Model, and its batch: `rows` packed rows of `tokens` tokens, four documents each."""

    model: Qwen2Config
    tokens: int
    rows: int = 3


def sizes(on_gpu: bool) -> Size:
    """Return a size that is large enough for meaningful GPU numbers, or small enough for two CPU cores."""
    if on_gpu:
        return Size(_qwen2(2048, 8192, 16, (16, 4), vocab=151_936), tokens=32_768)
    return Size(_qwen2(128, 512, 3, (4, 1), vocab=2000), tokens=512, rows=2)


def _qwen2(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], vocab: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        vocab_size=vocab,
        max_position_embeddings=65_536,
        tie_word_embeddings=False,
    )


@dataclass(frozen=True)
class Case:
    """A planned and a measured quantity of one setting, in bytes."""

    setting: str
    quantity: str
    planned: int
    measured: int

    @property
    def error(self) -> float:
        """Relative error, (planned - measured) / measured."""
        return self.planned / self.measured - 1


def settings() -> Iterator[tuple[str, dict[str, object], dict[str, object]]]:
    """Yield name, `[model]` options and `[optim]` options of every case."""
    modes = ModelConfig.model_fields["gradient_checkpointing"]
    yield "no checkpointing", {"gradient_checkpointing": False}, {}
    yield "checkpointed layers", {"gradient_checkpointing": True}, {}
    if modes.annotation is not bool:
        yield "layer inputs in host memory", {"gradient_checkpointing": "offload"}, {}
    if "weights" in OptimConfig.model_fields:
        lean = {"weights": "stochastic", "grad_dtype": "bfloat16"}
        yield "stochastic rounding, bf16 gradients", {"gradient_checkpointing": True}, lean


def main() -> int:
    """Run every case and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args().out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    device, _ = find_device(None, "cuda" if on_gpu else "cpu")
    size = sizes(on_gpu)
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(size.model, dtype=torch.bfloat16).save_pretrained(folder)
        for name, model_options, optim_options in settings():
            model_config = ModelConfig(path=folder, device="cuda" if on_gpu else "cpu", **model_options)
            optim_config = OptimConfig(max_tokens_per_rank=size.tokens, **optim_options)
            choices = choices_of(
                SimpleNamespace(model=model_config, optim=optim_config, dist=DistConfig()), device, gpus=1
            )
            run = _on_gpu if on_gpu else _on_cpu
            planned = _Planned(shape_of(folder), choices, device, size)
            model = load_model(model_config).train()
            cases += run(name, model, MasterAdamW(model, optim_config), planned)
            del model
            gc.collect()
    _report(cases, out_dir, torch.cuda.get_device_name() if on_gpu else "cpu")
    return int(any(abs(case.error) > TOLERANCE for case in cases))


@dataclass(frozen=True)
class _Planned:
    shape: ModelShape
    choices: Choices
    device: Device
    size: Size

    def rows(self) -> list[Microbatch]:
        """Return full packed rows on the device."""
        rng, length = np.random.default_rng(0), self.size.tokens // 4
        ids = rng.integers(0, self.size.model.vocab_size, (4 * self.size.rows, length + 1)).astype(np.int32)
        response = length + 1 - _PROMPT
        sequences = [
            TrainSequence(i[:_PROMPT], i[_PROMPT:], np.full(response, -1.0, np.float32), 1.0 - 2 * (n % 2))
            for n, i in enumerate(ids)
        ]
        device = "cuda" if self.device.is_gpu else "cpu"
        return [batch for _, batch in pack_indexed(sequences, self.size.tokens, device)]

    def memory(self) -> MemoryPlan:
        """Return the plan for exactly these rows."""
        length = self.size.tokens // 4
        work = Workload(
            max_prompt=_PROMPT,
            max_response=length,
            mean_prompt=_PROMPT,
            mean_response=length - _PROMPT,
            sequences=4 * self.size.rows,
            updates=1,
            old_logp_pass=False,
            generated_together=1,
        )
        trained = self.size.tokens - 4 * (_PROMPT - 1)
        return plan_memory(self.shape, self.choices, self.device, work, trained)


def _on_gpu(name: str, model: PreTrainedModel, optimizer: MasterAdamW, planned: _Planned) -> Iterator[Case]:
    """Yield the peaks of the second update. The first creates the optimizer's state and loads libraries."""
    phases = {phase.name: phase.total for phase in planned.memory().phases}
    for number in range(2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loss = _gradients(model, planned.rows())
        peaks = {"update": torch.cuda.max_memory_allocated()}
        torch.cuda.reset_peak_memory_stats()
        optimizer.step_if_finite(loss)
        peaks["optimizer"] = torch.cuda.max_memory_allocated()
        if number == 1:
            yield from (Case(name, f"peak of the {phase} phase", phases[phase], peak) for phase, peak in peaks.items())


def _on_cpu(name: str, model: PreTrainedModel, optimizer: MasterAdamW, planned: _Planned) -> Iterator[Case]:
    """Yield the bytes of persistent tensors, and of the tensors that one row saves for backward."""
    from or1.plan.activations import activations
    from or1.plan.head import head_buffers

    shape, choices, rows = planned.shape, planned.choices, planned.rows()
    trained = len(rows[0].rows_N)
    saved = saved_bytes(model, rows[0])
    loss = _gradients(model, rows)
    sums = optimizer.gradients().values() if hasattr(optimizer, "gradients") else [p.grad for p in model.parameters()]
    gradients = storage_bytes(sums)
    optimizer.step_if_finite(loss)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    state = [t for t in optimizer.state_tensors().values() if t.untyped_storage().data_ptr() not in weights]
    head = head_buffers(shape, choices, planned.device, trained).kept - trained * shape.hidden * choices.weight
    yield Case(name, "weights", weight_bytes(shape, choices), storage_bytes(model.parameters()))
    yield Case(name, "gradients", gradient_bytes(shape, choices), gradients)
    yield Case(name, "optimizer", optimizer_bytes(shape, choices), storage_bytes(state))
    yield Case(name, "saved activations", activations(shape, choices, planned.size.tokens).saved, saved.layers)
    yield Case(name, "kept by the head", head, saved.head)


def _gradients(model: PreTrainedModel, rows: list[Microbatch]) -> torch.Tensor:
    """Run forward and backward of every row, as or1.train.update does. Return the loss."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    trained = sum(len(batch.rows_N) for batch in rows)
    for batch in rows:
        loss = row_loss(model, hidden_states(model, batch), batch, trained)
        loss.backward()
        total += loss.detach()
    return total


def _report(cases: list[Case], out_dir: Path, device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "quantity", "planned MiB", "measured MiB", "off by", title=f"or1 plan against {device}")
    for case in cases:
        table.add_row(
            case.setting,
            case.quantity,
            f"{case.planned / 2**20:,.2f}",
            f"{case.measured / 2**20:,.2f}",
            f"{case.error:+.1%}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    rows = [vars(case) | {"error": case.error} for case in cases]
    record = {"device": device, "torch": torch.__version__, "tolerance": TOLERANCE, "cases": rows}
    path = out_dir / "plan_check.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    worst = max(cases, key=lambda case: abs(case.error))
    print(f"worst: {worst.error:+.1%} ({worst.setting}, {worst.quantity}); limit {TOLERANCE:.0%}; written to {path}")


if __name__ == "__main__":
    sys.exit(main())
