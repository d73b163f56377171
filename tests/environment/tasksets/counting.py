"""Two turns: the environment answers the first reply with a question of its own. A reply is worth its sevens."""

import asyncio

import verifiers.v1 as vf

__all__ = ["CountTaskset", "TwoTurnEnv"]


class CountConfig(vf.TasksetConfig):
    fault: str = ""


class CountTask(vf.Task[vf.TaskData]):
    @vf.reward
    async def sevens(self, trace: vf.Trace) -> float:
        return sum((message.content or "").count("7") for message in trace.assistant_messages) / 16


class CountTaskset(vf.Taskset[CountTask, CountConfig]):
    def load(self):
        for i in range(40):
            yield CountTask(vf.TaskData(prompt=f"{i}+{i}"), self.config.task)


class TwoTurnConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig(sampling={"max_tokens": 12})


class TwoTurnEnv(vf.Env[TwoTurnConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as chat:
            first = await chat.turn()
            if task.data.idx % 2 and self.taskset.config.fault == "raise":
                raise RuntimeError("a fault of the environment")
            if task.data.idx % 2 and self.taskset.config.fault == "hang":
                await asyncio.sleep(1000)
            if not first.terminated:
                await chat.turn(f"{len(first.last_reply)}+1")
