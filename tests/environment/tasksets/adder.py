"""Additions of examples/tiny-adder in one turn."""

import json
from pathlib import Path

import verifiers.v1 as vf

__all__ = ["AdderTaskset"]


class AdderData(vf.TaskData):
    answer: str


class AdderTask(vf.Task[AdderData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(f"{self.data.answer}}}" in trace.last_reply)

    @vf.reward(weight=0.5)
    async def brief(self, trace: vf.Trace) -> float:
        return 1 - min(trace.num_output_tokens, 40) / 40


class AdderConfig(vf.TasksetConfig):
    path: str
    tasks: int


class AdderTaskset(vf.Taskset[AdderTask, AdderConfig]):
    def load(self):
        for line in Path(self.config.path).read_text(encoding="utf-8").splitlines()[: self.config.tasks]:
            row = json.loads(line)
            yield AdderTask(AdderData(prompt=row["question"], answer=row["answer"]), self.config.task)
