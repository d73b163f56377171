"""Background writing of checkpoints: the state is copied at once, a thread writes the files.

Every rank writes its shard and a small JSON file about the shard into one hidden folder. Rank 0 waits for all of
them, writes the manifest and renames the folder. The threads synchronise through that folder, because collectives
belong to the training thread. The folder must be on a file system that all ranks share.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from or1.core import faults
from or1.core.errors import CheckpointError, DiskError
from or1.core.files import commit_folder, file_entry, fsync, sealed, write_whole
from or1.dist.world import SINGLE, World, split_evenly
from or1.run.checkpoint import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    committed_steps,
    partial_folder,
    remove_step,
    step_folder,
    verify_checkpoint,
)
from or1.run.keeping import Keeping

_POLL_S = 0.01
_REMEDIES = {
    errno.EDQUOT: "the quota is used up: make room within it, or lower checkpoint.keep",
    errno.EFBIG: "this process may not write files of that size: raise the limit (ulimit -f)",
}


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: Keeping | int, world: World = SINGLE) -> Path:
    """Commit `folder/step_N` and remove older steps that `keep` spares; a number keeps the newest. Return the path.

    Collective; blocks until the commit.
    """
    writer = CheckpointWriter(folder, keep, world)
    writer.save(checkpoint)
    writer.wait()
    return step_folder(folder, checkpoint.step)


class CheckpointWriter:
    """Commits checkpoints of a run in a background thread, one at a time.

    mark  called on the main rank with the step of every committed checkpoint

    Every method is collective. Each raises DiskError on every rank if an earlier checkpoint could not be written; the
    next `save` then starts over. On a full disk, older checkpoints are removed to make room. The newest checkpoint that
    verifies is always kept.
    """

    def __init__(
        self, folder: Path, keep: Keeping | int, world: World = SINGLE, mark: Callable[[int], None] = lambda step: None
    ):
        keep = Keeping(keep) if isinstance(keep, int) else keep
        self._folder, self._keep, self._world, self._mark = folder, keep, world, mark
        self._job: _Job | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy the state and start to write the copy. Blocks until the previous checkpoint is committed."""
        self.wait()
        self._make_partial(partial_folder(self._folder, checkpoint.step))
        # Copied, because the next update changes these tensors in place.
        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in checkpoint.tensors.items()}
        copied = Checkpoint(checkpoint.step, json.loads(json.dumps(checkpoint.state)), tensors, checkpoint.rows)
        self._job = _Job(self._folder, copied, keep=self._keep, world=self._world, mark=self._mark)

    def _make_partial(self, path: Path) -> None:
        problem = ""
        if self._world.is_main:
            shutil.rmtree(path, ignore_errors=True)
            try:
                path.mkdir(parents=True)
            except OSError as error:
                problem = f"{path} could not be made ({error}); make room there, or choose another run_dir"
        if message := self._world.gather(problem.encode())[0].decode():
            raise DiskError(message)

    def poll(self) -> None:
        """Check the checkpoint in progress without blocking. Raises DiskError if it failed."""
        if self._job is None:
            return
        # Liveness is read before the error. In the other order, an error set between the two reads would look like a
        # commit.
        job = self._job
        alive = self._world.any(job.is_alive())
        if self._world.any(job.error is not None):
            self._fail()
        elif not alive:
            self._job = None

    def wait(self) -> None:
        """Block until the checkpoint in progress is committed."""
        while self._job is not None:
            self.poll()
            time.sleep(_POLL_S if self._job is not None else 0)

    def close(self) -> None:
        """Remove the files of a failed save. A save in progress continues until the process ends."""
        if self._job is not None and self._job.error is not None and self._world.is_main:
            self._job.join()
            shutil.rmtree(self._job.partial, ignore_errors=True)

    def _fail(self) -> None:
        job, self._job = self._job, None
        if job is None:
            return
        job.abandoned.set()
        job.join()
        messages = [m.decode() for m in self._world.gather(str(job.error or "").encode())]
        if self._world.is_main:
            shutil.rmtree(job.partial, ignore_errors=True)
        raise DiskError(next(m for m in messages if m))


class _Job(threading.Thread):
    """Thread that writes one checkpoint. `error` is set when this rank's part failed."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, *, keep: Keeping, world: World, mark: Callable[[int], None]
    ):
        super().__init__(name="or1-checkpoint", daemon=True)
        self.folder, self.checkpoint, self.keep, self.world = folder, checkpoint, keep, world
        self.partial, self.mark = partial_folder(folder, checkpoint.step), mark
        self.abandoned = threading.Event()
        self.error: str | None = None
        self.start()

    def run(self) -> None:
        """Write this rank's shard; on rank 0 also the manifest, then commit."""
        try:
            self._with_room(self._write_shard)
            if self.world.is_main and (shards := self._await_shards()) is not None:
                self._with_room(partial(self._write_manifest, shards))
                self._commit()
        except OSError as error:
            self.error = self._describe(error)
        finally:
            # Set for any exception, so that no rank mistakes the end of this thread for a commit.
            if (cause := sys.exception()) is not None:
                self.error = (
                    f"checkpoint {step_folder(self.folder, self.checkpoint.step)} could not be written on rank "
                    f"{self.world.rank} ({type(cause).__name__}: {cause}). The checkpoints before it are untouched"
                )

    def _with_room(self, write: Callable[[], None]) -> None:
        """Call `write`; on a full disk or quota, remove the oldest spare checkpoint and retry."""
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._spare_one():
                    raise

    def _spare_one(self) -> bool:
        """Remove the oldest checkpoint unless it is the newest that verifies. Return True if one was removed.

        Several ranks may call this at once; a checkpoint that another rank removed first is skipped.
        """
        older = [step for step in committed_steps(self.folder) if step < self.checkpoint.step]
        kept = next((step for step in reversed(older) if _verifies(step_folder(self.folder, step))), None)
        # If none verifies, none is removed: the user has to decide. Neither is one that the settings keep for good.
        spare = [step for step in older if not self.keep.for_good(self.folder, step)]
        if kept is None or not spare or spare[0] >= kept:
            return False
        with contextlib.suppress(FileNotFoundError):
            remove_step(self.folder, spare[0])
        return True

    def _write_shard(self) -> None:
        rank, tensors, rows = self.world.rank, self.checkpoint.tensors, self.checkpoint.rows
        # Tensors that are equal on every rank are written by the main rank only.
        # So are sharded ones of the other copies of the model (dist.shard_ranks).
        sharded = rows if self.world.in_first_replica else {}
        mine = {name: t for name, t in tensors.items() if self.world.is_main or name in sharded}
        path = self.partial / f"shard_{rank}.safetensors"
        faults.hit("ckpt.before_shard", self.checkpoint.step)
        try:
            save_file(mine, path)
        except SafetensorError as error:
            # safetensors raises its own error for a full disk, with the errno in the text.
            raise _as_os_error(error, path) from error
        fsync(path)
        faults.hit("ckpt.after_shard", self.checkpoint.step)
        about = {"file": path.name, "entry": file_entry(path), "tensors": sorted(mine)}
        write_whole(self.partial / f"shard_{rank}.json", json.dumps(about))

    def _await_shards(self) -> list[dict[str, Any]] | None:
        """Wait for the shards of all ranks and return what their JSON files contain; None if the save is abandoned."""
        paths = [self.partial / f"shard_{rank}.json" for rank in range(self.world.size)]
        while not all(path.is_file() for path in paths):
            if self.abandoned.wait(_POLL_S):
                return None
        shards = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for path in paths:
            path.unlink()
        return shards

    def _write_manifest(self, shards: list[dict[str, Any]]) -> None:
        faults.hit("ckpt.before_manifest", self.checkpoint.step)
        write_whole(self.partial / MANIFEST, json.dumps(sealed(self._manifest(shards)), indent=1))

    def _commit(self) -> None:
        step, final = self.checkpoint.step, step_folder(self.folder, self.checkpoint.step)
        faults.hit("ckpt.before_rename", step)
        commit_folder(self.partial, final)
        faults.hit("ckpt.after_rename", step)
        self.mark(step)
        # Later steps exist if the run fell back to an older checkpoint. They do not verify, so they are not counted.
        for old in self.keep.spare(self.folder, [s for s in committed_steps(self.folder) if s <= step]):
            remove_step(self.folder, old)

    def _manifest(self, shards: list[dict[str, Any]]) -> dict[str, Any]:
        tensors: dict[str, dict[str, Any]] = {}
        for name in self.checkpoint.tensors:
            holders = [shard["file"] for shard in shards if name in shard["tensors"]]
            if name not in self.checkpoint.rows:
                tensors[name] = {"parts": [[holders[0]]]}
                continue
            ranges = split_evenly(self.checkpoint.rows[name], self.world.shard_size)
            parts = [[file, r.start, len(r)] for file, r in zip(holders, ranges, strict=True)]
            tensors[name] = {"parts": parts, "rows": self.checkpoint.rows[name]}
        return {
            "format": FORMAT,
            "step": self.checkpoint.step,
            "world_size": self.world.size,
            "files": {shard["file"]: shard["entry"] for shard in shards},
            "tensors": tensors,
            "state": self.checkpoint.state,
        }

    def _describe(self, error: OSError) -> str:
        needed = sum(t.nbytes for t in self.checkpoint.tensors.values())
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        remedy = _REMEDIES.get(error.errno or 0, "make room, or lower checkpoint.keep")
        rest = (
            "The newest checkpoint before it is kept"
            if committed_steps(self.folder)
            else "There is no older checkpoint: the training so far is lost unless a later one is written"
        )
        return (
            f"checkpoint {step_folder(self.folder, self.checkpoint.step)} could not be written ({error}): it takes "
            f"{needed:,} bytes on rank {self.world.rank}, and {free:,} are free; {remedy}. {rest}"
        )


def _verifies(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    found = re.search(r"os error ([0-9]{1,4})\b", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), str(path))
