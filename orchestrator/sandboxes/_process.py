"""Commands in a sandbox handle, from the host's side: requests to its supervisor, and the pipes of each command."""

from __future__ import annotations

import contextlib
import marshal
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Self

import anyio
import attrs

from orchestrator.sandboxes._pipes import PIPE_BYTES, READ_BYTES, Capped, Messages, Reader, Writer, make_pipe
from orchestrator.sandboxes.supervisor import MESSAGE_BYTES, TAIL_BYTES, read_tail
from states.errors import ExecTimeout, SandboxError
from states.ports import ExecResult

LONG_COMMAND: Final = 100_000
"""A shell command beyond this many bytes goes in as a file: one argument may not be longer than 128 KiB."""

KILL_WAIT_SEC: Final = 5.0


@attrs.frozen
class Request:
    """What to run."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    more: Mapping[str, Any] = attrs.field(factory=dict)
    """Further words for a supervisor that knows them."""

    @classmethod
    def of(cls, command: str | Sequence[str], env: Mapping[str, str], cwd: str, **more: Any) -> Self:
        """A string goes through `/bin/sh -c`, unless it is too long for that: see `script`."""
        return cls(("/bin/sh", "-c", command) if isinstance(command, str) else tuple(command), env, cwd, more)

    @property
    def script(self) -> bytes | None:
        """The shell command, where it is too long to be an argument."""
        if self.argv[:2] != ("/bin/sh", "-c") or len(self.argv) != 3:
            return None
        text = self.argv[2].encode(errors="surrogateescape")
        return text if len(text) > LONG_COMMAND else None


@attrs.define(eq=False)
class Started:
    """A command that runs, by its status socket. Whoever drops it (`close`) kills the command's process group."""

    _status: Messages
    _waiting: anyio.Lock = attrs.field(factory=anyio.Lock)
    code: int | None = None
    reason: str = ""

    @classmethod
    async def launch(cls, control: Messages, request: Request, fds: Mapping[str, int]) -> Self:
        """Ask for it and wait until it runs. Raises `SandboxError` saying why it does not."""
        status, theirs = Messages.pair()
        try:
            with theirs, _request_files(request) as (body, extra):
                named = {"status": theirs.fileno(), **fds, **extra}
                message = marshal.dumps({"fds": list(named), **body})
                await control.send(message, list(named.values()))
            answer = (await status.receive()).decode(errors="replace")
        except OSError as exc:
            status.close()
            raise SandboxError(f"cannot start {request.argv[0]}: the sandbox is gone ({exc.strerror})") from exc
        except BaseException:
            status.close()
            raise
        if answer != "started":
            status.close()
            raise SandboxError(f"cannot start {request.argv[0]} in {request.cwd}: {_complaint(answer)}")
        return cls(status)

    async def exit(self) -> int:
        """The exit code, once there is one; -9 where the whole handle was ended."""
        async with self._waiting:
            if self.code is None:
                word, _, rest = (await self._status.receive()).decode(errors="replace").partition(" ")
                code, _, self.reason = rest.partition(" ")
                self.code = int(code) if word == "exit" and code.lstrip("-").isdigit() else -9
                self.reason = self.reason.strip() or ("" if word == "exit" else "the handle was ended")
                self._status.close()
        return self.code

    def kill(self) -> None:
        """Kill the process group. Idempotent."""
        if self.code is None:
            self._status.tell(b"kill")

    def close(self) -> None:
        """Let go of it. Idempotent."""
        self._status.close()


@contextlib.contextmanager
def _request_files(request: Request) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """The request as a message, and what does not fit into one as files in memory."""
    body: dict[str, Any] = {"argv": list(request.argv), "env": dict(request.env), "cwd": request.cwd, **request.more}
    files: dict[str, int] = {}
    try:
        script = request.script
        if script is not None:
            files["script"] = _memory_file(script)
            body["argv"] = ["/bin/sh", "/proc/self/fd/3"]
        packed = marshal.dumps(body)
        if len(packed) > MESSAGE_BYTES:
            files["body"] = _memory_file(packed)
            body = {"argv": body["argv"][:1]}
        yield body, files
    finally:
        for fd in files.values():
            os.close(fd)


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("request", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _complaint(answer: str) -> str:
    word, _, rest = answer.partition(" ")
    number, _, text = rest.partition(" ")
    if word != "error":
        return "the sandbox ended"
    hint = " (its limit on processes is reached)" if number == "11" else ""
    return f"{text or number}{hint}"


async def run(control: Messages, request: Request, *, cap: int, timeout_sec: float | None) -> ExecResult:
    """Run a command to its end. What it left running in the background runs on, and is not waited for."""
    out, err = Capped(cap), Capped(cap)
    out_fd, out_theirs = make_pipe(ours="read")
    err_fd, err_theirs = make_pipe(ours="read")
    readers = ((Reader(out_fd), out), (Reader(err_fd), err))
    started: Started | None = None
    try:
        try:
            started = await Started.launch(control, request, {"stdout": out_theirs, "stderr": err_theirs})
        finally:
            os.close(out_theirs)
            os.close(err_theirs)
        with anyio.move_on_after(timeout_sec) as deadline:
            await _collect(started, readers)
        outlasted = deadline.cancelled_caught and started.code is None
        if outlasted:
            started.kill()
            with anyio.move_on_after(KILL_WAIT_SEC, shield=True):
                await started.exit()
        for reader, kept in readers:
            kept.add(reader.take(PIPE_BYTES))
    finally:
        for reader, _ in readers:
            reader.close()
        if started is not None:
            started.close()
    if outlasted:
        shown = " ".join(request.argv)
        raise ExecTimeout(
            f"command outlasted its {timeout_sec} s and was ended: {shown:.200}", stdout=out.text(), stderr=err.text()
        )
    if started.reason:
        raise SandboxError(f"command was ended by the sandbox: {started.reason}")
    return ExecResult(out.text(), err.text(), started.code or 0, out.truncated or err.truncated)


async def _collect(started: Started, readers: Sequence[tuple[Reader, Capped]]) -> None:
    async with anyio.create_task_group() as tasks:
        for reader, kept in readers:
            tasks.start_soon(_keep, reader, kept)
        await started.exit()
        tasks.cancel_scope.cancel()


async def _keep(reader: Reader, kept: Capped) -> None:
    while data := await reader.read():
        kept.add(data)


@attrs.define(eq=False)
class Channel:
    """The `ByteChannel` of a process in a local sandbox: its pipes, held directly."""

    _started: Started
    _stdin: Writer
    _stdout: Reader
    _tail: int
    _sending: anyio.Lock = attrs.field(factory=anyio.Lock)
    _rest: bytes = b""
    _stderr: bytes | None = None

    @classmethod
    async def open(cls, control: Messages, request: Request) -> Self:
        """Start it. Raises `SandboxError`."""
        stdin, stdin_theirs = make_pipe(ours="write")
        stdout, stdout_theirs = make_pipe(ours="read", large=True)
        tail = os.memfd_create("stderr", os.MFD_CLOEXEC)
        try:
            os.ftruncate(tail, 8 + TAIL_BYTES)
            fds = {"stdin": stdin_theirs, "stdout": stdout_theirs, "tail": tail}
            started = await Started.launch(control, request, fds)
        except BaseException:
            for fd in (stdin, stdout, tail):
                os.close(fd)
            raise
        finally:
            os.close(stdin_theirs)
            os.close(stdout_theirs)
        return cls(started, Writer(stdin), Reader(stdout), tail)

    async def send(self, data: bytes) -> None:
        """See `ByteChannel.send`. Concurrent senders take turns, a whole `data` each."""
        async with self._sending:
            await self._stdin.write(data)

    async def receive(self, max_bytes: int = READ_BYTES) -> bytes:
        """See `ByteChannel.receive`."""
        if data := await self._stdout.read(max_bytes):
            return data
        data, self._rest = self._rest[:max_bytes], self._rest[max_bytes:]
        return data

    async def close_stdin(self) -> None:
        """See `ByteChannel.close_stdin`."""
        self._stdin.close()

    async def wait(self) -> int:
        """See `ByteChannel.wait`."""
        return await self._started.exit()

    async def kill(self) -> None:
        """See `ByteChannel.kill`. Its whole process group goes."""
        self._started.kill()

    def stderr_tail(self) -> str:
        """See `ByteChannel.stderr_tail`."""
        tail = read_tail(self._tail) if self._stderr is None else self._stderr
        return tail.decode(errors="replace")

    def release(self) -> None:
        """Its process is dead: keep what is unread of its output, give back the file descriptors. Idempotent."""
        if self._stderr is None:
            self._stderr = read_tail(self._tail)
            os.close(self._tail)
        self._rest += self._stdout.take(PIPE_BYTES)
        self._stdout.close()
        self._stdin.close()
        if self._started.code is None:
            self._started.code = -9
        self._started.close()
