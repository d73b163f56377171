"""The chat loop of verifiers as a harness inside the trainer's process, which needs neither `uv` nor a sandbox."""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import httpx
import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

HARNESS = "or1_chat"
"""verifiers finds a harness by the name of a top-level module; `register` gives this module that name."""

__all__ = ["ChatHarness"]


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Chat with tools until a reply without a tool call, as verifiers' harness "null" does in a process of its own."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        """Run one segment of the conversation."""
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            # The endpoint is on this machine and speaks plain HTTP; loading certificates for each episode is slow.
            http = await stack.enter_async_context(httpx.AsyncClient(verify=False, timeout=None))
            client = AsyncOpenAI(base_url=endpoint, api_key=secret, timeout=None, max_retries=0, http_client=http)
            tools, owners, connections = await connect_mcp({"mcpServers": servers}, stack)
            while True:
                request: dict[str, Any] = {"model": ctx.model, "messages": messages}
                # An empty list of tools is an error of the protocol.
                completion = await client.chat.completions.create(**request, **({"tools": tools} if tools else {}))
                message = completion.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                if not message.tool_calls:
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in message.tool_calls:
                    content = await _result(connections, owners, call.function.name, call.function.arguments)
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


async def _result(connections: Any, owners: dict[str, tuple[str, str]], name: str, arguments: str) -> Any:
    """Return what a tool replied. A call that is wrong gets the reason, so that the model can learn from the reason."""
    try:
        values = json.loads(arguments or "{}")
    except json.JSONDecodeError as error:
        return f"error: invalid JSON in tool arguments ({error})"
    if not isinstance(values, dict):
        return f"error: tool arguments must be a JSON object, got {type(values).__name__}"
    if name not in owners:
        return f"error: unknown tool {name!r}"
    return await call_mcp(connections, owners, name, values)


def register() -> None:
    """Let verifiers find this module as the harness `HARNESS`."""
    sys.modules.setdefault(HARNESS, sys.modules[__name__])
