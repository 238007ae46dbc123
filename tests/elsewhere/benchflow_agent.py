"""An agent written for BenchFlow 0.7 and for nothing else: its types, its signatures, its environment's names.

It knows nothing of this project. `build` takes keywords for its constructor, as BenchFlow's own plugins do; the model's
URL and key are read from `sandbox.agent_env`; it asks before it acts, shows its steps, and ends with BenchFlow's enum.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

from benchflow.acp.types import StopReason
from benchflow.agents.protocol import AgentCapabilities, AskUserRequest

TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}


class BenchFlowAgent:
    """Builds sessions."""

    def __init__(self, *, exec_user: str = "root") -> None:
        self._exec_user = exec_user

    def capabilities(self) -> AgentCapabilities:
        return AgentCapabilities(protocol="session-factory", nudges=True, ask_user=True)

    async def connect(self, sandbox: Any, role: str) -> BenchFlowSession:
        env = sandbox.agent_env
        await sandbox.exec("mkdir -p $HOME/.agent", user=self._exec_user, timeout_sec=30)
        return BenchFlowSession(sandbox, env, sandbox.agent_cwd or env["BENCHFLOW_AGENT_CWD"], self._exec_user)


class BenchFlowSession:
    """One conversation."""

    def __init__(self, sandbox: Any, env: dict[str, str], cwd: str, user: str) -> None:
        self._sandbox, self._env, self._cwd, self._user = sandbox, env, cwd, user
        self._ask: Any = None
        self._messages: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self.on_change: Any = None

    async def prompt(self, text: str) -> StopReason:
        self._emit({"type": "user_message", "text": text})
        self._messages.append({"role": "user", "content": text})
        while True:
            reply = await asyncio.to_thread(self._complete)
            self._messages.append(reply)
            if reply.get("content"):
                self._emit({"type": "agent_message", "text": reply["content"]})
            if not reply.get("tool_calls"):
                return StopReason.END_TURN
            for call in reply["tool_calls"]:
                await self._run(call["id"], json.loads(call["function"]["arguments"])["command"])

    async def _run(self, call: str, command: str) -> None:
        step = {"type": "tool_call", "tool_call_id": call, "kind": "execute", "title": command, "content": []}
        if self._ask is not None:
            kinds = {"yes": "allow_once", "no": "reject_once"}
            answer = await self._ask(AskUserRequest(f"May I? {command}", ["no", "yes"], kinds, call))
            assert answer == "yes", answer
        command = f"cd {self._cwd} && {command}"
        done = await self._sandbox.exec(command, user=self._user, timeout_sec=60)
        status = "completed" if done.return_code == 0 else "failed"
        self._emit({**step, "status": status, "content": [{"type": "text", "text": done.stdout + done.stderr}]})
        self._messages.append({"role": "tool", "tool_call_id": call, "content": done.stdout + done.stderr})

    def _complete(self) -> dict[str, Any]:
        body = {"model": self._env["BENCHFLOW_PROVIDER_MODEL"], "messages": self._messages, "tools": [TOOL]}
        request = urllib.request.Request(
            self._env["BENCHFLOW_PROVIDER_BASE_URL"].rstrip("/") + "/chat/completions",
            json.dumps(body).encode(),
            {
                "authorization": f"Bearer {self._env['BENCHFLOW_PROVIDER_API_KEY']}",
                "content-type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["message"]

    async def cancel(self) -> None:
        await self._sandbox.exec("true", user=self._user, timeout_sec=5)

    def on_ask_user(self, handler: Any) -> None:
        self._ask = handler

    @property
    def steps(self) -> list[Any]:
        return list(self._events)

    async def close(self) -> None: ...

    def _emit(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        if self.on_change is not None:
            self.on_change(self)


def build(**kwargs: Any) -> BenchFlowAgent:
    """The entrypoint, `benchflow_agent:build`."""
    return BenchFlowAgent(**kwargs)
