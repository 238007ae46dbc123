"""The relay, on the host: carries what comes out of a sandbox that cannot see this host to the model gateway.

`relay_child.py` listens on the sandbox's loopback; every connection that is made there arrives here as a stream of
frames over a `ByteChannel`, and is joined to a connection to the gateway: to that, and to nothing else. No HTTP is
read, no key is known; keys are the gateway's business, as for everybody.

    relay = GatewayRelay(sandbox, gateway.port)
    await relay.start()
    ...                            # agents call relay.url
    await relay.stop()

Who is on the other side may be an agent that got hold of the child's pipes, so nothing that it says is trusted: frames
are checked, a stream may be ahead of what was taken of it by a window, streams are counted, and whoever does not read
holds up nobody but itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import anyio.lowlevel
import attrs

from orchestrator._tasks import Abandoned, Detached
from orchestrator.gateway import relay_child
from orchestrator.gateway.relay_child import (
    CHUNK,
    CREDIT,
    DATA,
    END,
    NUMBER,
    OPEN,
    RESET,
    STREAMS,
    WINDOW,
    FrameError,
    Frames,
    credit,
    frame,
)
from states.errors import OrchestratorError, SandboxError, said
from states.ports import ByteChannel, Sandbox, SandboxHandle

PROGRAM: Final = Path(relay_child.__file__)
"""The child: one file, for any Python 3 from 3.6 on."""
HANDLE: Final = "gateway-relay"
START_SEC: Final = 60.0
STOP_SEC: Final = 10.0
READY_BYTES: Final = 4096
"""The longest greeting that is listened to."""
BATCH: Final = 65_536
QUEUED: Final = 64
"""Frames that wait for the channel; whoever has another one waits as well."""
STARTS: Final = 2
"""How often the child is started: once more than it may die."""


class _Broken(Exception):
    """What the child says cannot be."""


@attrs.define
class Counts:
    """What was carried: connections, and bytes to the gateway and from it."""

    streams: int = 0
    up: int = 0
    down: int = 0


@attrs.define(eq=False)
class _Stream:
    """A connection in the sandbox, as this side knows it."""

    number: int
    scope: anyio.CancelScope = attrs.field(factory=anyio.CancelScope)
    inbox: bytearray = attrs.field(factory=bytearray)
    ended: bool = False
    ahead: int = 0
    """Bytes that came and were not credited yet."""
    credit: int = WINDOW
    """Bytes that may be sent."""
    _changed: anyio.Event = attrs.field(factory=anyio.Event)

    def changed(self) -> None:
        """Wake whoever waits."""
        self._changed.set()
        self._changed = anyio.Event()

    async def taken(self) -> bytes:
        """What came, as soon as there is any; b"" at its end."""
        while not self.inbox and not self.ended:
            await self._changed.wait()
        data = bytes(self.inbox)
        self.inbox.clear()
        return data

    async def room(self) -> int:
        """How many bytes may be sent, as soon as any may."""
        while self.credit <= 0:
            await self._changed.wait()
        return min(self.credit, CHUNK)


@attrs.define(eq=False)
class _Wire:
    """One life of the child: its frames, and the streams that are open."""

    channel: ByteChannel
    port: int
    counts: Counts
    frames: Frames = attrs.field(factory=Frames)
    streams: dict[int, _Stream] = attrs.field(factory=dict)
    slots: anyio.Semaphore = attrs.field(factory=lambda: anyio.Semaphore(2 * STREAMS))
    """Tasks of streams: those that are open, and as many that are just ending."""

    async def carry(self, greeting: bytes) -> str:
        """Carry until the child ends, or says what cannot be: why it is over. `greeting` came with its first line."""
        send, receive = anyio.create_memory_object_stream[bytes](QUEUED)
        why = "it ended"
        try:
            async with send, receive, anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, receive)
                try:
                    await self._read(greeting, tasks, send)
                finally:
                    tasks.cancel_scope.cancel()
        except* (SandboxError, _Broken, FrameError) as group:
            why = "; ".join(dict.fromkeys(said(error) for error in _leaves(group)))
        return why

    async def _read(self, data: bytes, tasks: anyio.abc.TaskGroup, send: anyio.abc.ObjectSendStream[bytes]) -> None:
        """Hear every frame. Nothing here waits for the child to read: else both sides could wait for each other."""
        while True:
            for kind, number, payload in self.frames.feed(data):
                if kind == OPEN:
                    await self._opened(number, tasks, send)
                elif number in self.streams:
                    self._heard(self.streams[number], kind, payload)
            await anyio.lowlevel.checkpoint()
            data = await self.channel.receive(BATCH)
            if not data:
                return

    async def _write(self, frames: anyio.abc.ObjectReceiveStream[bytes]) -> None:
        """Send frames, several at once where several wait: a channel may be slow for each."""
        async for first in frames:
            batch = bytearray(first)
            with contextlib.suppress(anyio.WouldBlock):
                while len(batch) < BATCH:
                    batch += frames.receive_nowait()  # type: ignore[attr-defined]
            await self.channel.send(bytes(batch))

    async def _opened(self, number: int, tasks: anyio.abc.TaskGroup, send: anyio.abc.ObjectSendStream[bytes]) -> None:
        if number in self.streams or len(self.streams) >= STREAMS:
            raise _Broken(f"it opened stream {number} while {len(self.streams)} are open")
        await self.slots.acquire()
        self.counts.streams += 1
        stream = self.streams[number] = _Stream(number)
        tasks.start_soon(self._join, stream, send)

    def _heard(self, stream: _Stream, kind: int, payload: bytes) -> None:
        if kind == DATA:
            stream.ahead += len(payload)
            if stream.ahead > WINDOW or stream.ended:
                raise _Broken(f"it sent more on stream {stream.number} than it may")
            stream.inbox += payload
        elif kind == CREDIT:
            stream.credit += NUMBER.unpack(payload)[0]
        elif kind == END:
            stream.ended = True
        elif kind == RESET:
            self.streams.pop(stream.number)
            stream.scope.cancel()
        stream.changed()

    async def _join(self, stream: _Stream, send: anyio.abc.ObjectSendStream[bytes]) -> None:
        """Carry one stream to the gateway and back. Where that breaks, the stream is reset."""
        try:
            with stream.scope:
                try:
                    gateway = await anyio.connect_tcp("127.0.0.1", self.port)
                    async with gateway, anyio.create_task_group() as ways:
                        ways.start_soon(self._up, stream, gateway, send)
                        ways.start_soon(self._down, stream, gateway, send)
                except* (OSError, anyio.BrokenResourceError):
                    await send.send(frame(RESET, stream.number))
        finally:
            self.slots.release()
            if self.streams.get(stream.number) is stream:
                del self.streams[stream.number]

    async def _up(
        self, stream: _Stream, gateway: anyio.abc.SocketStream, send: anyio.abc.ObjectSendStream[bytes]
    ) -> None:
        """To the gateway. One that no longer listens may still be answering: then what comes is thrown away."""
        listening = True
        while data := await stream.taken():
            self.counts.up += len(data)
            if listening:
                try:
                    await gateway.send(data)
                except (anyio.BrokenResourceError, OSError):
                    listening = False
            if stream.ahead >= WINDOW // 2:
                granted, stream.ahead = stream.ahead - len(stream.inbox), len(stream.inbox)
                if granted:
                    await send.send(credit(stream.number, granted))
        if listening:
            with contextlib.suppress(anyio.BrokenResourceError, OSError):
                await gateway.send_eof()

    async def _down(
        self, stream: _Stream, gateway: anyio.abc.SocketStream, send: anyio.abc.ObjectSendStream[bytes]
    ) -> None:
        """From the gateway."""
        while True:
            room = await stream.room()
            try:
                data = await gateway.receive(room)
            except anyio.EndOfStream:
                await send.send(frame(END, stream.number))
                return
            self.counts.down += len(data)
            stream.credit -= len(data)
            await send.send(frame(DATA, stream.number, data))


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def _unheard(_said: object) -> None:
    """Nobody listens."""


@attrs.define(eq=False)
class GatewayRelay:
    """The way of one sandbox to the gateway at `port` of this host's loopback.

    Its child runs through a trusted handle of its own, so that no agent's end ends it. A child that ends is started
    once more, on the same port; what was on its way is lost, as with any gateway that goes away.

    Args:
        sandbox: Where agents are; up. Its handles share one loopback interface.
        port: Where the gateway listens.
        note: Is told, as a sentence, when the child ended and what was done about it.
        hindered: Is told the error that keeps calls from coming in: it ended, or cannot be started again.
    """

    _sandbox: Sandbox
    _port: int
    _note: Callable[[str], None] = _unheard
    _hindered: Callable[[OrchestratorError], None] = _unheard
    counts: Counts = attrs.field(factory=Counts, init=False)
    _inside: list[int] = attrs.field(factory=list, init=False)
    _handles: list[SandboxHandle] = attrs.field(factory=list, init=False)
    _serving: list[Detached[None]] = attrs.field(factory=list, init=False)

    @property
    def url(self) -> str:
        """The gateway as the sandbox sees it, without `/v1`. Known once it has started."""
        return f"http://127.0.0.1:{self._inside[0]}"

    async def start(self) -> None:
        """Start the child and carry what comes, until `stop`.

        Raises:
            SandboxError: it does not come up. A sandbox needs Python 3.6 or newer, as `python3`, for it.
        """
        handle = self._sandbox.handle(HANDLE, trusted=True)
        self._handles.append(handle)
        await handle.open()
        channel, port, rest = await self._spawned(handle, 0)
        self._inside.append(port)
        self._serving.append(Detached(self._serve, (handle, channel, rest), name=f"relay:{self._sandbox.name}").start())

    async def stop(self) -> None:
        """End it, and prove the child gone. Idempotent. Raises `QuietError` when that cannot be proven."""
        while self._serving:
            serving = self._serving.pop()
            serving.cancel()
            with anyio.move_on_after(STOP_SEC), contextlib.suppress(Abandoned):
                await serving.wait()
        while self._handles:
            await self._handles[-1].end()
            self._handles.pop()

    async def _spawned(self, handle: SandboxHandle, port: int) -> tuple[ByteChannel, int, bytes]:
        """A child that listens: its channel, its port, and what came after its first line."""
        # As an argument, not as a file: whoever shares the sandbox's disk with us has nothing to put in its place.
        argv = ("python3", "-I", "-S", "-c", _program(), "--stdio", "--port", str(port))
        try:
            with anyio.fail_after(START_SEC):
                channel = await handle.spawn(argv)
                return channel, *await _greeted(channel)
        except (SandboxError, TimeoutError) as error:
            why = said(error) if isinstance(error, SandboxError) else f"it said nothing for {START_SEC:g} s"
            raise SandboxError(
                f"the relay to the model gateway does not start in sandbox {self._sandbox.name}: {why}; it needs "
                "Python 3.6 or newer there, as python3. Without one, give gateway_reach a URL at which the sandbox "
                "finds the gateway, or none, to run unmetered"
            ) from error

    async def _serve(self, handle: SandboxHandle, channel: ByteChannel, rest: bytes) -> None:
        """Carry; when the child ends, say so and start it again, a few times."""
        for left in range(STARTS - 1, -1, -1):
            why = await _Wire(channel, self._port, self.counts).carry(rest)
            await _ended(channel)
            ended = f"the relay to the model gateway in sandbox {self._sandbox.name} ended: {why}{_tail(channel)}"
            self._hindered(SandboxError(ended))
            if not left:
                self._note(f"{ended}; it had been started {STARTS} times and is left alone")
                return
            try:
                channel, _, rest = await self._spawned(handle, self._inside[0])
            except SandboxError as error:
                self._note(f"{ended}; then: {error}")
                self._hindered(error)
                return
            self._note(f"{ended}; it was started again")


@functools.cache
def _program() -> str:
    return PROGRAM.read_text(encoding="utf-8")


async def _greeted(channel: ByteChannel) -> tuple[int, bytes]:
    """The port that the child's first line names, and what came after that line."""
    heard = bytearray()
    while b"\n" not in heard:
        data = await channel.receive(READY_BYTES)
        heard += data
        if not data or len(heard) > READY_BYTES:
            await _ended(channel)
            raise SandboxError(f"it said {bytes(heard[:200])!r}{_tail(channel)}")
    line, _, rest = bytes(heard).partition(b"\n")
    name, _, port = line.strip().partition(b" ")
    if name != b"rollout-relay" or not port.isdigit() or not 0 < int(port) < 65_536:
        raise SandboxError(f"it said {line[:200]!r}")
    return int(port), rest


async def _ended(channel: ByteChannel) -> None:
    """The child is over, whether it knows or not: kill it, and let its last words arrive."""
    with anyio.move_on_after(STOP_SEC), contextlib.suppress(SandboxError):
        await channel.kill()
        await channel.wait()


def _tail(channel: ByteChannel) -> str:
    tail = channel.stderr_tail().strip()
    return f" (its stderr: {tail[-1000:]})" if tail else ""


__all__ = ["HANDLE", "PROGRAM", "Counts", "GatewayRelay"]
