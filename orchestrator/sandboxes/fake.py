r"""A sandbox in memory: what a rollout sees of a sandbox, without processes, so that tests cost microseconds.

It ships because those who embed the orchestrator test against it too. Files are real (private to a handle or shared,
as in any sandbox), commands and processes are Python callables of yours, and every operation can be made to fail or
to hang. It runs on asyncio and on trio, under trio's `MockClock` as well.

    async def echo(process: FakeProcess) -> int:
        async for line in process.lines():
            await process.send(line)
        return 0

    sandbox = FakeSandbox(on_exec=lambda call: ExecResult("hello\n", "", 0), on_spawn=echo)
    await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    assert (await handle.exec("echo hello")).stdout == "hello\n"
    channel = await handle.spawn(["my-agent", "--acp"])
    await channel.send(b"ping\n")
    assert await channel.receive() == b"ping\n"
    assert await handle.end() == ("fake: nothing of solver is left",)
"""
# A handle and its sandbox are one part in two classes, a process and its channel the two ends of one pipe; /tmp is in
# the sandbox.
# ruff: noqa: SLF001, S108

from __future__ import annotations

import inspect
import posixpath
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import anyio
import attrs

from orchestrator.sandboxes import SandboxSpec
from states.errors import ConfigError, ExecTimeout, HandleRevoked, PathEscape, SandboxError
from states.ports import ExecResult

HANG: Final = "hang"
"""A fault: the operation never returns (it can be cancelled)."""

Fault = BaseException | str
"""What an operation does instead of working: raise this error, or `HANG`."""

PRIVATE: Final = ("/home/agent", "/tmp")
"""Folders that each handle has for itself."""

TRUSTED: Final = ("/tests", "/solution", "/logs/verifier")
"""Folders that only trusted handles see."""

TAIL_BYTES: Final = 65_536
BUFFER_BYTES: Final = 262_144


@attrs.frozen
class Call:
    """One command that was run through a handle."""

    handle: str
    trusted: bool
    command: str | tuple[str, ...]
    user: str | None
    cwd: str
    env: Mapping[str, str]


OnExec = Callable[[Call], "ExecResult | Awaitable[ExecResult]"]
OnSpawn = Callable[["FakeProcess"], "Awaitable[int | None]"]


@attrs.define(eq=False)
class _Pipe:
    """Bytes on their way from one side to the other; the writer waits while `BUFFER_BYTES` are unread."""

    data: bytearray = attrs.field(factory=bytearray)
    closed: bool = False
    _changed: anyio.Event | None = None

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    async def put(self, data: bytes) -> bool:
        """Hand over all of `data`; False when the other side is gone."""
        view = memoryview(data)
        while view:
            while len(self.data) >= BUFFER_BYTES and not self.closed:
                await self._change()
            if self.closed:
                return False
            room = BUFFER_BYTES - len(self.data)
            self.data += view[:room]
            view = view[room:]
            self._wake()
        return not self.closed

    async def get(self, max_bytes: int) -> bytes:
        """What is there, at most `max_bytes`; b"" at the end."""
        while not self.data and not self.closed:
            await self._change()
        taken = bytes(self.data[:max_bytes])
        del self.data[:max_bytes]
        self._wake()
        return taken

    def close(self) -> None:
        self.closed = True
        self._wake()


@attrs.define(eq=False)
class FakeProcess:
    """A spawned process as its script sees it: it reads its stdin with `receive`, writes its stdout with `send`.

    What the script returns is the exit code (None is 0); what it raises is exit code 1 and a traceback on stderr.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    handle: FakeHandle
    _stdin: _Pipe = attrs.field(factory=_Pipe)
    _stdout: _Pipe = attrs.field(factory=_Pipe)
    _stderr: bytearray = attrs.field(factory=bytearray)

    async def receive(self, max_bytes: int = BUFFER_BYTES) -> bytes:
        """The next bytes of stdin; b"" once it is closed."""
        return await self._stdin.get(max_bytes)

    async def send(self, data: bytes) -> None:
        """Write to stdout, waiting while nobody reads it."""
        await self._stdout.put(data)

    def stderr(self, data: bytes) -> None:
        """Write to stderr; the last 64 KiB are kept."""
        self._stderr += data
        del self._stderr[:-TAIL_BYTES]

    async def lines(self) -> AsyncIterator[bytes]:
        """The lines of stdin, newline included, until it is closed."""
        held = bytearray()
        while data := await self.receive():
            held += data
            *whole, rest = held.split(b"\n")
            held = bytearray(rest)
            for line in whole:
                yield bytes(line) + b"\n"
        if held:
            yield bytes(held)


@attrs.define(eq=False)
class FakeChannel:
    """The `ByteChannel` of a scripted process."""

    _process: FakeProcess
    _script: OnSpawn
    _scope: anyio.CancelScope = attrs.field(factory=anyio.CancelScope)
    _ended: anyio.Event = attrs.field(factory=anyio.Event)
    _code: int = -9

    async def _run(self) -> None:
        """The script, in a task of its own: nothing that it does reaches our host's tasks."""
        try:
            with self._scope:
                self._code = await self._script(self._process) or 0
        except Exception:
            self._process.stderr(traceback.format_exc().encode())
            self._code = 1
        finally:
            self._process._stdin.close()
            self._process._stdout.close()
            self._ended.set()

    async def send(self, data: bytes) -> None:
        """See `ByteChannel.send`."""
        if not await self._process._stdin.put(data):
            raise SandboxError(f"cannot write to {self._process.argv[0]}: its stdin is closed")

    async def receive(self, max_bytes: int = BUFFER_BYTES) -> bytes:
        """See `ByteChannel.receive`."""
        return await self._process._stdout.get(max_bytes)

    async def close_stdin(self) -> None:
        """See `ByteChannel.close_stdin`."""
        self._process._stdin.close()

    async def wait(self) -> int:
        """See `ByteChannel.wait`."""
        await self._ended.wait()
        return self._code

    async def kill(self) -> None:
        """See `ByteChannel.kill`."""
        self._scope.cancel()
        await self._ended.wait()

    def stderr_tail(self) -> str:
        """See `ByteChannel.stderr_tail`."""
        return self._process._stderr.decode(errors="replace")


def _in_background(task: Callable[[], Awaitable[None]]) -> object:
    """Run `task` beside everything else, owned by nobody's task group: what a process is to its starter."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        started: object = trio.lowlevel.spawn_system_task(task)
        return started
    import asyncio

    return asyncio.ensure_future(task())


@attrs.define(eq=False)
class FakeHandle:
    """The `SandboxHandle` of a `FakeSandbox`."""

    name: str
    trusted: bool
    _sandbox: FakeSandbox
    _channels: list[tuple[FakeChannel, object]] = attrs.field(factory=list)
    _phase: str = "new"

    async def open(self) -> None:
        """See `SandboxHandle.open`."""
        await self._sandbox._fault("open")
        if self._phase == "ended":
            raise HandleRevoked(f"handle {self.name} of sandbox {self._sandbox.name} has ended; make a new one")
        self._sandbox._require_up()
        self._phase = "open"

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_sec: float | None = None,
    ) -> ExecResult:
        """Ask `on_exec`; without one, every command succeeds and prints nothing."""
        self._require_open()
        call = Call(
            handle=self.name,
            trusted=self.trusted,
            command=command if isinstance(command, str) else tuple(command),
            user=user,
            cwd=cwd or self._sandbox.cwd,
            env=dict(env or {}),
        )
        self._sandbox.calls.append(call)
        with anyio.move_on_after(timeout_sec):
            await self._sandbox._fault("exec")
            if self._sandbox.on_exec is None:
                return ExecResult("", "", 0)
            answer = self._sandbox.on_exec(call)
            return await answer if inspect.isawaitable(answer) else answer
        raise ExecTimeout(f"command outlasted its {timeout_sec} s in sandbox {self._sandbox.name}: {command!r:.200}")

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> FakeChannel:
        """Start `on_spawn` as a process."""
        self._require_open()
        await self._sandbox._fault("spawn")
        if self._sandbox.on_spawn is None:
            raise SandboxError(f"cannot start {argv[0]}: this FakeSandbox was made without on_spawn")
        process = FakeProcess(tuple(argv), dict(env or {}), cwd or self._sandbox.cwd, self)
        channel = FakeChannel(process, self._sandbox.on_spawn)
        self._channels.append((channel, _in_background(channel._run)))
        return channel

    async def read_file(self, path: str) -> bytes:
        """See `SandboxHandle.read_file`."""
        self._require_open()
        await self._sandbox._fault("read_file")
        key = self._key(path)
        if key not in self._sandbox.files:
            raise SandboxError(f"no such file in sandbox {self._sandbox.name}: {path}")
        return self._sandbox.files[key]

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `SandboxHandle.write_file`."""
        self._require_open()
        await self._sandbox._fault("write_file")
        key = self._key(path)
        self._sandbox.files[key], self._sandbox.modes[key] = bytes(data), mode & 0o777

    async def end(self) -> tuple[str, ...]:
        """See `SandboxHandle.end`."""
        await self._sandbox._fault("end")
        self._phase = "ended"
        for channel, _task in self._channels:
            await channel.kill()
        self._channels.clear()
        return (f"fake: nothing of {self.name} is left",)

    def _require_open(self) -> None:
        self._sandbox._require_up()
        if self._phase == "ended":
            raise HandleRevoked(f"handle {self.name} of sandbox {self._sandbox.name} has ended")
        if self._phase == "new":
            raise SandboxError(f"handle {self.name} of sandbox {self._sandbox.name} is not open; await open() first")

    def _key(self, path: str) -> str:
        """The key of a path in `files`: HOME and `/tmp` are one per handle, some folders are for trusted ones only."""
        absolute = posixpath.join(self._sandbox.cwd, path)
        clean = _clean(absolute)
        if not self.trusted and _within(clean, TRUSTED):
            raise SandboxError(f"no such file in sandbox {self._sandbox.name}: {path}")
        return f"{self.name}:{clean}" if _within(clean, PRIVATE) else clean


@attrs.define(eq=False, kw_only=True)
class FakeSandbox:
    """A `Sandbox` in memory.

    Attributes:
        files: Every file by its absolute path; those of HOME and `/tmp` as `<handle>:<path>`.
        modes: Their permissions, where not 0o644.
        on_exec: Answers commands; may be async. None: every command succeeds and prints nothing.
        on_spawn: Plays a spawned process. None: nothing can be spawned.
        faults: By operation (`start attach stop open exec spawn read_file write_file end upload download`): an error to
            raise, or `HANG`. `{"end": QuietError("...")}` is an agent whose end cannot be proven.
        calls: Every command that was run, in order.
    """

    name: str = "fake"
    cwd: str = "/app"
    gateway_url: str | None = None
    has_environment: bool = False
    files: dict[str, bytes] = attrs.field(factory=dict)
    modes: dict[str, int] = attrs.field(factory=dict)
    on_exec: OnExec | None = None
    on_spawn: OnSpawn | None = None
    faults: dict[str, Fault] = attrs.field(factory=dict)
    calls: list[Call] = attrs.field(factory=list)
    _handles: list[FakeHandle] = attrs.field(factory=list, init=False)
    _phase: str = attrs.field(default="new", init=False)

    async def start(self) -> Mapping[str, Any]:
        """See `Sandbox.start`."""
        await self._fault("start")
        if self._phase == "stopped":
            raise SandboxError(f"sandbox {self.name} was stopped; make a new one")
        self._phase = "up"
        return {"kind": "fake", "name": self.name}

    async def attach(self, handle: Mapping[str, Any]) -> tuple[str, ...]:
        """See `states.ports.Attachable`: this object itself, if it is up. It dies with its process."""
        await self._fault("attach")
        if handle.get("name") != self.name or self._phase != "up":
            raise SandboxError(f"fake sandbox {handle.get('name')} was gone with its process")
        return tuple([sentence for each in self._handles for sentence in await each.end()])

    async def stop(self) -> None:
        """See `Sandbox.stop`."""
        await self._fault("stop")
        for handle in self._handles:
            await handle.end()
        self._handles.clear()
        self.files.clear()
        self._phase = "stopped"

    def die(self) -> None:
        """From now on everything fails with `SandboxError`, and what was spawned is gone, as when a host goes down."""
        self._phase = "dead"
        for handle in self._handles:
            for channel, _task in handle._channels:
                channel._scope.cancel()

    def handle(self, name: str, *, trusted: bool = False) -> FakeHandle:
        """See `Sandbox.handle`."""
        handle = FakeHandle(name, trusted, self)
        self._handles.append(handle)
        return handle

    async def upload(self, source: Path, target: str) -> None:
        """See `Sandbox.upload`. Links are left out."""
        await self._fault("upload")
        self._require_up()
        self._take_in(source, target)

    async def download(self, source: str, target: Path) -> None:
        """See `Sandbox.download`."""
        await self._fault("download")
        self._require_up()
        self._give_out(_clean(source), target)

    def _take_in(self, source: Path, target: str) -> None:
        if not source.exists():
            raise SandboxError(f"cannot upload {source}: there is no such file or folder")
        place = _clean(target)
        whole = [source] if source.is_file() else sorted(source.rglob("*"))
        for path in whole:
            if path.is_file() and (path == source or not path.is_symlink()):
                key = posixpath.normpath(posixpath.join(place, path.relative_to(source).as_posix()))
                self.files[key], self.modes[key] = path.read_bytes(), path.stat().st_mode & 0o777

    def _give_out(self, source: str, target: Path) -> None:
        inside = [path for path in self.files if path.startswith(source.rstrip("/") + "/")]
        if source not in self.files and not inside:
            raise SandboxError(f"no such file or folder in sandbox {self.name}: {source}")
        for path in inside or [source]:
            out = target / posixpath.relpath(path, source) if inside else target
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(self.files[path])
            out.chmod(self.modes.get(path, 0o644))

    def _require_up(self) -> None:
        if self._phase != "up":
            said = {"new": "has not been started", "stopped": "was stopped", "dead": "died"}[self._phase]
            raise SandboxError(f"sandbox {self.name} {said}")

    async def _fault(self, operation: str) -> None:
        fault = self.faults.get(operation)
        if isinstance(fault, BaseException):
            raise fault
        if fault == HANG:
            await anyio.sleep_forever()


def _clean(path: str) -> str:
    """An absolute path without `.` and `..`; one that climbs out of the root is refused."""
    if not path.startswith("/"):
        raise SandboxError(f"a path in a sandbox is absolute, this one is not: {path}")
    depth = 0
    for part in path.split("/"):
        depth += {"": 0, ".": 0, "..": -1}.get(part, 1)
        if depth < 0:
            raise PathEscape(f"the path {path} leads out of the sandbox")
    return posixpath.normpath(path)


def _within(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


OPTIONS: Final[Mapping[str, str]] = {}
LACKS: Final = frozenset({"processes", "large"})


def make(spec: SandboxSpec) -> FakeSandbox:
    """The fake sandbox that a rollout's config asks for: it sees what this process sees, so the gateway too."""
    url = f"http://127.0.0.1:{spec.gateway_port}" if spec.gateway_port else None
    return FakeSandbox(name=spec.name, gateway_url=url)


async def reap(_handle: Mapping[str, Any]) -> None:
    """A fake sandbox dies with its process."""


async def sweep(_options: Mapping[str, str]) -> tuple[str, ...]:
    """There is nothing that could be left."""
    raise ConfigError("a fake sandbox dies with its process: there is nothing to sweep")
