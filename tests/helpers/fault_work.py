"""What the ranks of the checkpoint tests do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from or1.config import DistConfig
from or1.core.errors import DiskError
from or1.dist.world import join, split_evenly
from or1.rollout.vllm.push import FilePush
from or1.run.checkpoint import Checkpoint, committed_steps, load_latest
from or1.run.checkpoint_writer import save_checkpoint


def write_shards(folder: Path, size: int) -> None:
    """Write a checkpoint of rows 0 to 6 and a scalar; each rank writes its rows."""
    with join(DistConfig(timeout_s=30), torch.device("cpu")) as world:
        whole = torch.arange(21.0).reshape(7, 3)
        mine = split_evenly(7, size)[world.rank]
        tensors = {"master.w": whole[mine.start : mine.stop], "step.w": torch.tensor(5.0)}
        save_checkpoint(folder, Checkpoint(5, {"x": 1}, tensors, {"master.w": 7}), 2, world)


def save_shards(folder: Path, size: int) -> tuple[str, list[int]]:
    """Write shards; return the text of the error, if any, and the committed steps."""
    try:
        write_shards(folder, size)
    except DiskError as error:
        return str(error), committed_steps(folder)
    return "", committed_steps(folder)


def read_shards(folder: Path) -> tuple:
    """Step, this rank's rows, the scalar and the warnings of the newest checkpoint that verifies."""
    with join(DistConfig(timeout_s=30), torch.device("cpu")) as world:
        checkpoint, warnings = load_latest(folder, world)
        return checkpoint.step, checkpoint.tensors["master.w"].tolist(), checkpoint.tensors["step.w"].item(), warnings


def read_shards_of_own_folder(parent: Path) -> tuple:
    """Read shards from the folder named by this rank's number."""
    return read_shards(parent / os.environ["RANK"])


def hold_pushed_weights(told: Path) -> None:
    """Push a file of weights, write into `told` where it is, and live on."""
    push = FilePush()
    push.path.write_bytes(b"weights")
    told.with_suffix(".partial").write_text(str(push.path))
    told.with_suffix(".partial").replace(told)
    time.sleep(600)
