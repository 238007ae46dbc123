"""The one child process in which LiteLLM runs: started by the first call that needs it, started again if it dies.

It has an environment of its own, a private folder with its socket, and a key. It is a lease: `Leases` is told before it
starts, what its process is, and when it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import attrs

from orchestrator.gateway.litellm_child import SOCKET
from orchestrator.gateway.upstream import require_litellm
from states.errors import OrchestratorError

KIND = "process"
START_SEC = 120.0
STOP_SEC = 5.0
_STDERR_TAIL = 4000
_HERE = str(Path(__file__).resolve().parents[2])
"""Where `orchestrator` is imported from, so that the child finds it too."""

_SETTINGS = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it downloads its price list at import
    "LITELLM_MODE": "PRODUCTION",  # else it loads a .env file
    "PYTHONUNBUFFERED": "1",
}
_INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


class LeaseBook(Protocol):
    """Who writes down what we hold; a `states.ports.Leases` is one."""

    def intend(self, kind: str, name: str) -> None:
        """We are about to take it."""

    def hold(self, kind: str, name: str, handle: Mapping[str, Any]) -> None:
        """We have it; `handle` finds it again."""

    def returned(self, kind: str, name: str) -> None:
        """It was given back."""


@attrs.frozen(eq=False)
class _Running:
    """A child that answered."""

    name: str
    process: asyncio.subprocess.Process
    client: aiohttp.ClientSession
    key: str = attrs.field(repr=False)
    folder: contextlib.ExitStack

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


class LitellmProcess:
    """Starts, restarts and ends the child.

    Args:
        leases: Is told of the process; nobody by default.
        env: Variables that it gets besides a few harmless ones, such as `AWS_REGION` for Bedrock.
    """

    def __init__(self, *, leases: LeaseBook | None = None, env: Mapping[str, str] | None = None) -> None:
        self._leases, self._env = leases, dict(env or {})
        self._running: _Running | None = None
        self._lock: asyncio.Lock | None = None

    @property
    def pid(self) -> int | None:
        """The process that runs now; None while there is none."""
        return self._running.process.pid if self._running and self._running.alive else None

    async def client(self) -> tuple[aiohttp.ClientSession, str]:
        """A client of a child that is alive, and its key.

        Raises:
            MissingExtra: litellm is not installed.
            OrchestratorError: it does not start; the message has the tail of its stderr.
        """
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            if self._running and not self._running.alive:
                await self.stop()
            if self._running is None:
                require_litellm()
                self._running = await self._start()
            return self._running.client, self._running.key

    async def look(self) -> None:
        """Learn of the child's death after it hung up: its exit is known a moment later than its closed socket."""
        if self._running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._running.process.wait()

    async def stop(self) -> None:
        """End the child and remove its folder. Idempotent."""
        running, self._running = self._running, None
        if running:
            await running.client.close()
            await _end(running.process)
            running.folder.close()
            if self._leases:
                self._leases.returned(KIND, running.name)

    async def _start(self) -> _Running:
        name, key = f"litellm-{secrets.token_hex(4)}", secrets.token_urlsafe(32)
        if self._leases:
            self._leases.intend(KIND, name)
        with contextlib.ExitStack() as stack:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="rollout-litellm-", ignore_cleanup_errors=True))
            )  # mode 0700
            process = await self._spawn(folder, key)
            if self._leases:
                self._leases.hold(KIND, name, {"pid": process.pid, "folder": str(folder)})
            try:
                await _ready(process, folder / "stderr")
            except BaseException:
                await _end(process)
                if self._leases:
                    self._leases.returned(KIND, name)
                raise
            timeout = aiohttp.ClientTimeout(total=None)
            place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, place)
            connector = aiohttp.UnixConnector(f"/proc/self/fd/{place}/{SOCKET}", limit=0)
            client = aiohttp.ClientSession(connector=connector, timeout=timeout)
            return _Running(name, process, client, key, stack.pop_all())

    async def _spawn(self, folder: Path, key: str) -> asyncio.subprocess.Process:
        """Start it in a session of its own, so that a Ctrl-C meant for us does not end it."""
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        env = {**inherited, "HOME": str(folder), "PYTHONPATH": _HERE, **self._env, **_SETTINGS}
        with (folder / "stderr").open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "orchestrator.gateway.litellm_child", str(folder),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=stderr,
                env=env, cwd=folder, start_new_session=True,
            )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(f"{key}\n".encode())
        return process


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-_STDERR_TAIL:]


async def _ready(process: asyncio.subprocess.Process, stderr: Path) -> None:
    """Wait for its one word."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_SEC):
            line = await process.stdout.readline()
    except TimeoutError as error:
        raise OrchestratorError(f"litellm did not start within {START_SEC:g} s") from error
    if line != b"ready\n":
        tail = _tail(stderr)
        raise OrchestratorError(f"litellm does not start, exit code {await process.wait()}: {tail}")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Close its stdin, at which it ends by itself; kill it if it does not."""
    if process.stdin:
        process.stdin.close()
    try:
        async with asyncio.timeout(STOP_SEC):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
