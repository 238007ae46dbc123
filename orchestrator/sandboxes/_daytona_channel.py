"""The stdin and stdout of a process in a Daytona sandbox, over a session or a terminal of the service.

The process belongs to PID 1 of its handle, which numbers every byte (`inside/init.py`); a *line* only carries frames,
and may break. A session's log is read again from its first byte and what we had is skipped; a terminal, whose output
is lost with it, is replaced by a new one, and so is a session that died; what the other side has not had is sent
again. So both kinds carry the same bytes once, and the choice is one of speed: a session costs a round trip of tens of
milliseconds, a terminal less than one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import anyio
import anyio.lowlevel
import attrs

from orchestrator.sandboxes._daytona_service import Box, Gone, judged, sdk
from orchestrator.sandboxes.inside.init import CHUNK, TAIL_BYTES, WINDOW
from states.errors import HandleRevoked, SandboxError, said

FRAMES_AT_ONCE: Final = 4
"""Frames in one message, that is 192 KiB."""

TERMINAL_BYTES: Final = 32 * 1024
"""The service closes a terminal whose client sends more than 64 KiB at once, without a word."""

ROTATE_BYTES: Final = 64 << 20
"""A session's log grows without end, and is read from its beginning: after this many bytes a new one is begun."""

LINES: Final = 5
"""How many lines in a row may break without carrying a byte."""

QUEUED: Final = 64
"""Messages of the service that wait to be looked at; beyond that it is held up."""

CLOSE_SEC: Final = 5.0
CONNECT_SEC: Final = 60.0


class Broken(Exception):
    """The line has broken; what it carried is safe."""


class Line(Protocol):
    """Carries frames between us and PID 1 of a handle."""

    async def open(self, command: str) -> None:
        """Start the keeper that talks to PID 1."""

    async def follow(self, heard: Callable[[str], Awaitable[None]]) -> None:
        """Hand over text as it comes, until the keeper has ended. Raises `Broken`, `SandboxError`."""

    async def send(self, text: str) -> None:
        """Send text that ends with a newline. Raises `Broken`."""

    async def close(self) -> None:
        """Give it back; bounded."""


async def pumped(
    read: Callable[[asyncio.Queue[str]], Awaitable[None]],
    heard: Callable[[str], Awaitable[None]],
    queue: asyncio.Queue[str] | None = None,
) -> None:
    """Hand over what `read` brings, until it ends: callbacks of the SDK may not raise, so they only fill a queue."""
    queue = queue or asyncio.Queue(QUEUED)
    reading = asyncio.ensure_future(read(queue))
    try:
        while True:
            text = asyncio.ensure_future(queue.get())
            try:
                await asyncio.wait({text, reading}, return_when=asyncio.FIRST_COMPLETED)
                if not text.done():
                    await reading
                    return
                await heard(text.result())
            finally:
                text.cancel()
    finally:
        reading.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([reading])


@attrs.define(eq=False)
class SessionLine:
    """A process session: input by POST, output as a log that can be read again from its beginning."""

    box: Box
    session: str
    command: str = ""
    seen: int = 0

    async def open(self, command: str) -> None:
        """See `Line.open`."""
        daytona, process = sdk(), self.box.remote.process

        async def create() -> None:
            with contextlib.suppress(daytona.DaytonaConflictError):  # it exists: an answer was lost
                await process.create_session(self.session, request_timeout=30)

        await self.box.steadily("opening a session", create)
        request = daytona.SessionExecuteRequest(command=command, run_async=True, suppress_input_echo=True)
        reply = await self.box.steadily(
            "starting in a session", lambda: process.execute_session_command(self.session, request, timeout=30)
        )
        self.command = reply.cmd_id

    async def follow(self, heard: Callable[[str], Awaitable[None]]) -> None:
        """See `Line.follow`. A log that stops early is read again; what was seen is skipped."""
        await pumped(self._read, heard)

    async def _read(self, queue: asyncio.Queue[str]) -> None:
        idle = 0
        while True:
            before = self.seen
            try:
                await self._read_log(queue)
                return
            except sdk().DaytonaError as exc:
                idle = idle + 1 if self.seen == before else 0
                error = self.box.translated("reading a session's log", exc)
                if isinstance(error, Gone) or idle >= LINES:
                    raise error from exc
                await self.box.service.sleep(0.05 * idle)

    async def _read_log(self, queue: asyncio.Queue[str]) -> None:
        at = 0

        async def take(text: str) -> None:
            nonlocal at
            text = text.replace("\1", "").replace("\2", "")  # halves of a label where the log was cut off
            fresh = text[max(0, self.seen - at) :]
            at += len(text)
            if fresh:
                self.seen = at
                await queue.put(fresh)

        async def ignore(_text: str) -> None:
            """A shell's complaints."""

        await self.box.remote.process.get_session_command_logs_async(self.session, self.command, take, ignore)

    async def send(self, text: str) -> None:
        """See `Line.send`. Repeated after a failure: frames are numbered, so one that came twice is dropped."""
        post = self.box.remote.process.send_session_command_input
        try:
            await self.box.steadily("sending", lambda: post(self.session, self.command, text, request_timeout=30))
        except Gone:
            raise
        except SandboxError as exc:
            raise Broken(str(exc)) from exc

    async def close(self) -> None:
        """See `Line.close`."""
        with anyio.move_on_after(CLOSE_SEC, shield=True), contextlib.suppress(sdk().DaytonaError):
            await self.box.remote.process.delete_session(self.session, request_timeout=CLOSE_SEC)


@attrs.define(eq=False)
class TerminalLine:
    """A terminal, made raw by the keeper. Fast, and gone when its websocket is."""

    box: Box
    session: str
    handle: Any = None
    texts: asyncio.Queue[str] = attrs.field(factory=lambda: asyncio.Queue(QUEUED))

    async def open(self, command: str) -> None:
        """See `Line.open`. The command is typed; its echo is skipped, like all that comes before the keeper speaks."""

        async def show(data: bytes) -> None:
            await self.texts.put(data.decode("ascii", "replace"))

        async def connect() -> Any:
            self.session = f"{self.session}x"  # a terminal whose answer was lost holds its name
            return await self.box.remote.process.create_pty_session(self.session, show, cwd="/")

        self.handle = await self.box.steadily("opening a terminal", connect)
        await self._input(f"exec {command}\n".encode())

    async def follow(self, heard: Callable[[str], Awaitable[None]]) -> None:
        """See `Line.follow`. Watches the terminal itself: it may close without a callback."""
        await pumped(self._watch, heard, self.texts)

    async def _watch(self, _queue: asyncio.Queue[str]) -> None:
        await self.handle.wait()
        if self.handle.exit_code is None:
            raise Broken(f"the terminal was closed: {self.handle.error or 'no reason given'}")

    async def send(self, text: str) -> None:
        """See `Line.send`."""
        await self._input(text.encode())

    async def _input(self, data: bytes) -> None:
        for at in range(0, len(data), TERMINAL_BYTES):
            try:
                await self.handle.send_input(data[at : at + TERMINAL_BYTES])
            except sdk().DaytonaError as exc:
                raise Broken(str(exc)) from exc

    async def close(self) -> None:
        """See `Line.close`. Each step is bounded: a kill over a dead websocket waits for ever."""
        if self.handle is None:
            return
        with anyio.move_on_after(CLOSE_SEC, shield=True), contextlib.suppress(sdk().DaytonaError):
            await self.box.remote.process.kill_pty_session(self.session, request_timeout=CLOSE_SEC)
        with anyio.move_on_after(CLOSE_SEC, shield=True):
            await self.handle.disconnect()


LINE_KINDS: Final[Mapping[str, Callable[[Box, str], Line]]] = {"session": SessionLine, "pty": TerminalLine}


@attrs.define(eq=False)
class Channel:
    """The `ByteChannel` of a process in a Daytona sandbox."""

    box: Box
    handle: str
    kind: str
    what: str
    """What is started where, for errors."""
    id: str = attrs.field(factory=lambda: secrets.token_hex(8))
    _line: Line | None = None
    _task: asyncio.Task[None] | None = None
    _sending: anyio.Lock = attrs.field(factory=anyio.Lock)
    _posting: anyio.Lock = attrs.field(factory=anyio.Lock)
    _rings: list[anyio.Event] = attrs.field(factory=lambda: [anyio.Event()])
    _rest: str = ""
    _lines: int = 0
    _spoke: bool = False
    _refusal: SandboxError | None = None
    _broken: SandboxError | None = None
    # stdout
    _out: bytearray = attrs.field(factory=bytearray)
    _have: int = 0
    _read: int = 0
    _acknowledged: int = 0
    _end: int | None = None
    # stdin
    _unsent: deque[tuple[int, bytes]] = attrs.field(factory=deque)
    _sent: int = 0
    _taken: int = 0
    _closed: bool = False
    _deaf: bool = False
    # its end
    _code: int | None = None
    _stderr: bytearray = attrs.field(factory=bytearray)

    async def start(self, asked: Mapping[str, Any]) -> None:
        """Start the process. Raises `SandboxError` saying why it does not start."""
        self._task = asyncio.get_running_loop().create_task(self._carry(asked))
        try:
            with anyio.fail_after(CONNECT_SEC):
                await self._until(lambda: self._spoke or self._refusal or self._broken)
        except TimeoutError as exc:
            await self._stop()
            raise SandboxError(f"sandbox {self.box.name}: no answer from its channel in {CONNECT_SEC:g} s") from exc
        except BaseException:
            await self._stop()
            raise
        if problem := self._refusal or self._broken:
            await self._stop()
            raise problem

    # --- the contract ---

    async def send(self, data: bytes) -> None:
        """See `ByteChannel.send`. Concurrent senders take turns, a whole `data` each."""
        async with self._sending:
            for at in range(0, len(data), CHUNK * FRAMES_AT_ONCE):
                await self._send(data[at : at + CHUNK * FRAMES_AT_ONCE])

    async def _send(self, data: bytes) -> None:
        await self._until(lambda: self._sent - self._taken < WINDOW or self._is_shut())
        self._require_stdin()
        for at in range(0, len(data), CHUNK):
            chunk = data[at : at + CHUNK]
            self._unsent.append((self._sent, chunk))
            self._sent += len(chunk)
        await self._post([_data(*entry) for entry in self._unsent if entry[0] >= self._sent - len(data)])
        # Having handed it over is not enough: a reader that does not read is not to be run ahead of.
        await self._until(lambda: self._sent - self._taken < WINDOW or self._is_shut())

    async def receive(self, max_bytes: int = 262_144) -> bytes:
        """See `ByteChannel.receive`. Raises `SandboxError` when the line to the sandbox is gone for good."""
        await self._until(lambda: self._out or self._have == self._end or self._broken)
        if not self._out and self._broken is not None and self._end is None:
            raise self._broken
        data = bytes(self._out[:max_bytes])
        del self._out[: len(data)]
        self._read += len(data)
        if self._read - self._acknowledged >= WINDOW // 4:
            self._acknowledged = self._read
            await self._post([f"a {self._read}"])
        return data

    async def close_stdin(self) -> None:
        """See `ByteChannel.close_stdin`."""
        async with self._sending:
            if not self._closed:
                self._closed = True
                await self._post([f"c {self._sent}"])

    async def wait(self) -> int:
        """See `ByteChannel.wait`. Raises `SandboxError` when it can never be known."""
        await self._until(lambda: self._code is not None or self._broken)
        if self._code is None:
            assert self._broken is not None
            raise self._broken
        return self._code

    async def kill(self) -> None:
        """See `ByteChannel.kill`."""
        if self._code is None and self._broken is None:
            with contextlib.suppress(HandleRevoked):
                asked = {"do": "kill", "handle": self.handle, "id": self.id}
                await self.box.ask("killing a process", asked)

    def stderr_tail(self) -> str:
        """See `ByteChannel.stderr_tail`."""
        return self._stderr.decode(errors="replace")

    async def release(self) -> None:
        """Its handle has ended, so it is dead: what has arrived can still be read."""
        if self._code is None:
            self._code = -9
        self._end = self._have
        self._deaf = True
        self._ring()
        await self._stop()

    # --- waiting ---

    def _ring(self) -> None:
        self._rings.pop().set()
        self._rings.append(anyio.Event())

    async def _until(self, changed: Callable[[], Any]) -> None:
        await anyio.lowlevel.checkpoint()
        while not changed():
            await self._rings[0].wait()

    def _is_shut(self) -> bool:
        return self._closed or self._deaf or self._code is not None or self._broken is not None

    def _require_stdin(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._closed:
            raise SandboxError("cannot write: stdin is closed")
        if self._deaf or self._code is not None:
            raise SandboxError("cannot write: the process has closed its stdin, or has ended")

    # --- the line ---

    def _attach(self) -> dict[str, Any]:
        asked = {"do": "attach", "handle": self.handle, "id": self.id, "have": self._have}
        return asked | ({"terminal": True} if self.kind == "pty" else {})

    async def _carry(self, asked: Mapping[str, Any]) -> None:
        """Keep a line to the process until all of it has come, replacing those that break.

        What is to be started is asked for until PID 1 has answered: it starts it once.
        """
        failures = 0
        while not self._is_over():
            before = self._have, self._taken, self._code
            why: Exception | None = None
            try:
                request = await self.box.request({**self._attach(), **asked}, private=bool(asked))
                await self._one_line(request)
            except HandleRevoked as exc:
                self._refusal = exc
                self._code, self._end = -9 if self._code is None else self._code, self._have
            except SandboxError as exc:
                self._broken = exc
            except Exception as exc:  # it broke, or carried what is no frame: who waits here must hear of an end
                why = exc
            asked = {} if self._spoke else asked
            failures = failures + 1 if before == (self._have, self._taken, self._code) else 0
            if failures >= LINES and self._broken is None:
                all_of_them = f"sandbox {self.box.name}: its {self.kind} lines break one after another"
                self._broken = SandboxError(f"{all_of_them}: {said(why)}" if why else all_of_them)
            self._ring()
            if self._refusal or self._broken:
                return
            if failures:
                await self.box.service.sleep(0.1 * 2**failures)

    def _is_over(self) -> bool:
        return self._code is not None and self._have == self._end

    async def _one_line(self, request: str) -> None:
        self._lines += 1
        line = LINE_KINDS[self.kind](self.box, f"{self.id}-{self._lines}")
        self._rest, self._spoke, greeted = "", False, False
        carried = 0

        async def heard(text: str) -> None:
            nonlocal greeted, carried
            carried += len(text)
            *lines, self._rest = (self._rest + text).split("\n")
            for one in lines:
                word = one.rstrip("\r")
                if not greeted:
                    greeted = self._greeted(word)
                elif not self._spoke:
                    await self._hello(word, line)
                else:
                    self._frame(word)
            self._ring()
            if self._is_over() or (carried > ROTATE_BYTES and self.kind == "session"):
                raise Broken("it has carried all that it should")

        try:
            await line.open(self.box.launch(request))
            await line.follow(heard)
        finally:
            self._line = None
            self.box.unneeded.update([request[1:]] if request.startswith("@") else [])
            await line.close()

    def _greeted(self, word: str) -> bool:
        """Whether the keeper has begun to speak: what a shell says before that is none of ours."""
        if not word.startswith("rollout: "):
            return False
        judged("starting a process", self.box.name, json.loads(word.removeprefix("rollout: ")), "")
        return True

    async def _hello(self, word: str, line: Line) -> None:
        """PID 1 has answered: it is attached, or says why the process does not start."""
        if word != "+":
            answer = json.loads(word)
            self._refusal = SandboxError(f"sandbox {self.box.name} cannot start {self.what}: {answer['error']}")
            raise Broken("there is no such process")
        self._spoke, self._line = True, line
        frames = [_data(*entry) for entry in self._unsent]
        if self._closed:
            frames.append(f"c {self._sent}")
        if frames:
            await self._post(frames)

    def _frame(self, word: str) -> None:
        kind, _, rest = word.partition(" ")
        if kind == "o":
            number, _, data = rest.partition(" ")
            fresh = base64.b64decode(data)[max(0, self._have - int(number)) :]
            self._out += fresh
            self._have += len(fresh)
        elif kind == "i":
            self._taken = int(rest)
            while self._unsent and self._unsent[0][0] + len(self._unsent[0][1]) <= self._taken:
                self._unsent.popleft()
        elif kind == "z":
            self._end = int(rest)
        elif kind == "b":
            self._deaf = True
        elif kind == "e":
            self._stderr = (self._stderr + base64.b64decode(rest))[-TAIL_BYTES:]
        elif kind == "x":
            code, _, tail = rest.partition(" ")
            self._stderr, self._code = bytearray(base64.b64decode(tail)), int(code)

    async def _post(self, frames: Sequence[str]) -> None:
        """Send frames; what a line cannot take, the next one gets: see `_hello`."""
        async with self._posting:
            line = self._line
            if line is not None:
                try:
                    await line.send("".join(f"{frame}\n" for frame in frames))
                except Broken:
                    self._line = None
                    await line.close()  # which ends its `follow`, and so brings the next one

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([self._task])


def _data(number: int, chunk: bytes) -> str:
    return f"d {number} {base64.b64encode(chunk).decode()}"
