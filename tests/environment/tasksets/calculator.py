"""One sum and a tool that adds, served by a process of verifiers."""

import verifiers.v1 as vf

__all__ = ["ToolTaskset"]


class Calculator(vf.Toolset[vf.SharedToolsetConfig]):
    @vf.tool
    def add(self, a: int, b: int) -> str:
        """Add."""
        return str(a + b)


class ToolTask(vf.Task[vf.TaskData]):
    @vf.reward
    async def used(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages))


class ToolTaskset(vf.Taskset[ToolTask, vf.TasksetConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Calculator(vf.SharedToolsetConfig())]

    def load(self):
        yield ToolTask(vf.TaskData(prompt="3+4"), self.config.task)


if __name__ == "__main__":
    Calculator.run()
