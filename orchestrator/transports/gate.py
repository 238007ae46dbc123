"""The sandbox handle that an in-process agent holds: open during its turns, revoked for good when its session ends.

Code in our own process cannot be killed, so what it holds is taken away instead: a call through a closed gate raises
`HandleRevoked`, and revoking ends the commands which are still running on its behalf.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, TypeVar

import anyio
import attrs

from states.errors import HandleRevoked
from states.ports import ExecResult, SandboxHandle

T = TypeVar("T")


@attrs.define(eq=False)
class GatedHandle:
    """What `Agent.connect(sandbox, role)` gets as `sandbox`: `exec`, `read_file`, `write_file` of one role.

    Commands run in the task's folder with the role's environment. An agent that kept the handle past its session
    finds it revoked. `agent_env` (where its model is, and as whom to call it) and `agent_cwd` are here for agents that
    were written for BenchFlow, which hands them over on the sandbox; others name `agent_env` in their `connect`.
    """

    cwd: str
    _handle: SandboxHandle
    _env: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    agent_env: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    _gate: Literal["closed", "open", "revoked"] = "closed"
    _running: dict[anyio.CancelScope, anyio.Event] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def agent_cwd(self) -> str:
        """The task's folder."""
        return self.cwd

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_sec: float | None = None,
    ) -> ExecResult:
        """Run a command to its end; see `SandboxHandle.exec`. Raises `HandleRevoked` outside a turn."""
        full = {**self._env, **(env or {})}
        return await self._passing(
            lambda: self._handle.exec(command, user=user, cwd=cwd or self.cwd, env=full, timeout_sec=timeout_sec)
        )

    async def read_file(self, path: str) -> bytes:
        """The bytes of a file in the sandbox."""
        return await self._passing(lambda: self._handle.read_file(path))

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file in the sandbox."""
        await self._passing(lambda: self._handle.write_file(path, data, mode=mode))

    async def _passing(self, call: Callable[[], Awaitable[T]]) -> T:
        """Let a call through, so that revoking ends it."""
        if self._gate != "open":
            when = "its session is over" if self._gate == "revoked" else "no turn is open"
            raise HandleRevoked(f"this sandbox handle is {self._gate}: {when}")
        scope, ended = anyio.CancelScope(), anyio.Event()
        self._running[scope] = ended
        try:
            with scope:
                return await call()
        finally:
            del self._running[scope]
            ended.set()
        raise HandleRevoked("the call was ended: the session that made it is over")

    def open(self) -> None:
        """Let calls pass, unless it was revoked."""
        if self._gate == "closed":
            self._gate = "open"

    def close(self) -> None:
        """Refuse new calls until it is opened again; those that run may end."""
        if self._gate == "open":
            self._gate = "closed"

    async def revoke(self) -> str:
        """Refuse every call for good and end those that run. Returns the evidence."""
        self._gate = "revoked"
        running = list(self._running.items())
        for scope, _ in running:
            scope.cancel()
        for _, ended in running:
            await ended.wait()
        return f"sandbox handle revoked, {len(running)} running command(s) ended"
