"""Pipe ends that a task can wait on, on asyncio and on trio, without a thread, a task or a loop of their own.

A pipe end belongs to whoever reads or writes it; nothing happens in the background, so back-pressure is the kernel's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from states.errors import SandboxError

READ_BYTES: Final = 262_144
PIPE_BYTES: Final = 1 << 20


def wake_and_close(fd: int) -> None:
    """Close `fd`; a task that waits for it is woken with `ClosedResourceError`."""
    anyio.notify_closing(fd)
    os.close(fd)


def make_pipe(*, ours: str, large: bool = False) -> tuple[int, int]:
    """(our end, their end) of a pipe; `ours` is `read` or `write`, and never blocks."""
    read, write = os.pipe2(os.O_CLOEXEC)
    if large:
        with contextlib.suppress(OSError):  # the user's quota of pipe memory is used up: smaller ones work too
            fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    mine, theirs = (read, write) if ours == "read" else (write, read)
    os.set_blocking(mine, False)
    return mine, theirs


@attrs.define(eq=False)
class Reader:
    """The reading end of a pipe."""

    fd: int

    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        """What is there, as soon as there is anything; b"" at the end, and after `close`."""
        await anyio.lowlevel.checkpoint()
        while self.fd >= 0:
            try:
                data = os.read(self.fd, max_bytes)
            except BlockingIOError:
                pass
            else:
                if not data:
                    self.close()
                return data
            try:
                await anyio.wait_readable(self.fd)
            except anyio.ClosedResourceError:
                break
        return b""

    def take(self, max_bytes: int) -> bytes:
        """What is there now, at most `max_bytes`, without waiting."""
        taken = bytearray()
        while self.fd >= 0 and len(taken) < max_bytes:
            try:
                data = os.read(self.fd, max_bytes - len(taken))
            except BlockingIOError:
                break
            if not data:
                break
            taken += data
        return bytes(taken)

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            wake_and_close(fd)


@attrs.define(eq=False)
class Writer:
    """The writing end of a pipe."""

    fd: int

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting while the reader is slow. Raises `SandboxError` once nobody reads."""
        await anyio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            if self.fd < 0:
                raise SandboxError("cannot write: stdin is closed")
            try:
                view = view[os.write(self.fd, view) :]
                continue
            except BlockingIOError:
                pass
            except BrokenPipeError as exc:
                self.close()
                raise SandboxError("cannot write: the process has closed its stdin, or has ended") from exc
            try:
                await anyio.wait_writable(self.fd)
            except anyio.ClosedResourceError:
                continue

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            wake_and_close(fd)


@attrs.define(eq=False)
class Messages:
    """Our end of a socket that keeps messages apart."""

    sock: socket.socket
    _sending: anyio.Lock = attrs.field(factory=anyio.Lock)

    @classmethod
    def pair(cls) -> tuple[Messages, socket.socket]:
        """Ours, and the one to give away."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        return cls(ours), theirs

    async def receive(self) -> bytes:
        """The next message; b"" when the other side is gone, and after `close`."""
        while self.sock.fileno() >= 0:
            try:
                return self.sock.recv(8192)
            except BlockingIOError:
                pass
            except OSError:
                break
            try:
                await anyio.wait_readable(self.sock)
            except anyio.ClosedResourceError:
                break
        return b""

    async def send(self, message: bytes, fds: list[int]) -> None:
        """Send a message with file descriptors. Raises `OSError` when the other side is gone."""
        async with self._sending:  # one task at a time may wait for a socket
            while True:
                try:
                    socket.send_fds(self.sock, [message], fds)
                except BlockingIOError:
                    await anyio.wait_writable(self.sock)
                else:
                    return

    def tell(self, message: bytes) -> None:
        """Send a short message; nothing happens when the other side is gone."""
        try:
            self.sock.send(message)
        except OSError:
            return

    def hang_up(self) -> None:
        """Let the other side see our end, and ours its: what waits here is woken."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Idempotent."""
        if self.sock.fileno() >= 0:
            anyio.notify_closing(self.sock)
            self.sock.close()


@attrs.define(eq=False)
class Capped:
    """Output of a command, cut in the middle beyond `cap` bytes."""

    cap: int
    total: int = 0
    _head: bytearray = attrs.field(factory=bytearray)
    _tail: bytearray = attrs.field(factory=bytearray)

    def add(self, data: bytes) -> None:
        """Keep what belongs to the first or the last half of the cap."""
        self.total += len(data)
        half = self.cap // 2
        room = half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self.cap:
            del self._tail[: -(self.cap - half)]

    @property
    def truncated(self) -> bool:
        """Whether something is missing in the middle."""
        return self.total > self.cap

    def text(self) -> str:
        """All of it, decoded with replacement; a line in its middle says how much was cut."""
        if not self.truncated:
            return (self._head + self._tail).decode(errors="replace")
        tail = self._tail[-(self.cap - self.cap // 2) :]
        cut = self.total - len(self._head) - len(tail)
        note = f"\n[... {cut} bytes of output were cut here ...]\n"
        return self._head.decode(errors="replace") + note + tail.decode(errors="replace")
