"""One bwrap and the PID namespace in it: how it comes up, and how it is proven to be gone."""

from __future__ import annotations

import contextlib
import errno
import json
import marshal
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs

from orchestrator.sandboxes import _bwrap
from orchestrator.sandboxes._pipes import Messages, Reader, Writer, make_pipe
from states.errors import QuietError, SandboxError

END_SEC: Final = 15.0
"""How long the kernel may take to end everything after SIGKILL."""

BURIAL_SEC: Final = 2.0

_TURN: Final[anyio.lowlevel.RunVar[anyio.Lock]] = anyio.lowlevel.RunVar("bubblewrap_turn")
"""One start at a time in each event loop."""


@attrs.define(eq=False)
class Namespace:
    """A running bwrap: its process, PID 1 of the namespace in it, and the control socket to that."""

    program: str
    bwrap: subprocess.Popen[bytes]
    control: Messages
    _errors: Reader
    _info: Reader
    _maps: Writer
    pid: int = 0
    _pidfd: int = -1
    _held: int = -1
    """The namespace itself, held open: the kernel gives the number of one that nobody holds to the next one."""
    _said: bytearray = attrs.field(factory=bytearray)

    @classmethod
    async def start(cls, view: _bwrap.View, marker: str) -> Self:
        """Start bwrap. Raises `SandboxError` when there is none to run.

        Starting a process holds the loop up for some milliseconds, so that a hundred of them take turns with it.
        """
        try:
            turn = _TURN.get()
        except LookupError:
            _TURN.set(turn := anyio.Lock())
        async with turn:
            return cls._start(view, marker)

    @classmethod
    def _start(cls, view: _bwrap.View, marker: str) -> Self:
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:

            def pipe(side: str) -> tuple[int, int]:
                mine, other = make_pipe(ours=side)
                ours.callback(os.close, mine)
                theirs.callback(os.close, other)
                return mine, other

            (errors, errors_fd), (info, info_fd), (maps, maps_fd) = pipe("read"), pipe("read"), pipe("write")
            control, control_theirs = Messages.pair()
            ours.callback(control.close)
            theirs.callback(control_theirs.close)
            fds = _bwrap.Fds(info=info_fd, maps=maps_fd, control=control_theirs.fileno())
            argv = _bwrap.arguments(view, fds, marker)
            bwrap = _popen(argv, errors_fd, attrs.astuple(fds))
            ours.pop_all()
            return cls(argv[0], bwrap, control, Reader(errors), Reader(info), Writer(maps))

    async def configure(self, owner: int | None, settings: Callable[[int], dict[str, Any]]) -> None:
        """Learn its PID 1, let `settings` put that under the limits, and only then let it run anything.

        It starts up meanwhile, and waits to be told: what the kernel takes to place it costs nothing.
        """
        try:
            await self._learn()
            if owner is not None:
                await anyio.to_thread.run_sync(_bwrap.write_maps, self.pid, owner)
                await self._maps.write(b"x")
            told = await anyio.to_thread.run_sync(settings, self.pid)
            await self.control.send(marshal.dumps(told), [])
            ready = await self.control.receive()
        except (ValueError, LookupError, OSError, SandboxError):
            ready = b""
        self._maps.close()
        if ready != b"ready":
            self.bwrap.kill()
            await _exited(self.bwrap)
            words = self._errors.take(65_536).decode(errors="replace").strip()
            raise SandboxError(
                f"bubblewrap could not start: {words or 'it said nothing'}; {_bwrap.why_not(words, self.program)}"
            )

    async def _learn(self) -> None:
        """Read from bwrap who PID 1 is. Raises `ValueError` or `LookupError` when it ended without having one."""
        while data := await self._info.read():
            self._said += data
        found = json.loads(self._said)
        self._pidfd = os.pidfd_open(found["child-pid"])
        self.pid = found["child-pid"]
        self._held = os.open(f"/proc/{self.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    async def kill(self, name: str) -> tuple[str, ...]:
        """Kill PID 1 and with it everything, and prove it; `name` is for the sentences. Raises `QuietError`."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(END_SEC) as deadline:
            if not self.pid:  # we were cancelled before bwrap had said: without its word there is no proof
                with contextlib.suppress(ValueError, LookupError, OSError):
                    await self._learn()
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                await anyio.wait_readable(self._pidfd)
            self._maps.close()  # bwrap may wait for it
            with anyio.move_on_after(BURIAL_SEC):
                await _exited(self.bwrap)  # by itself: it buries PID 1
            self.bwrap.kill()
            await _exited(self.bwrap)
        if deadline.cancelled_caught:
            raise QuietError(
                f"handle {name}: PID 1 of its namespace (pid {self.pid} here) is still there {END_SEC:.0f} s after "
                "SIGKILL; something in it hangs in the kernel"
            )
        evidence = f"PID 1 of handle {name}'s PID namespace (pid {self.pid} here) was killed and is gone"
        if self._held < 0:  # it was gone before we could hold its namespace
            return (evidence,)
        inode = os.fstat(self._held).st_ino
        looked_at, left = await anyio.to_thread.run_sync(_members, inode, self.pid)
        if left:
            raise QuietError(f"handle {name}: processes {left} are still in its PID namespace")
        return (evidence, f"none of {looked_at} processes is in PID namespace {inode}")

    def close(self) -> None:
        """Give back the file descriptors. Idempotent."""
        for end in (self.control, self._errors, self._info, self._maps):
            end.close()
        held, self._pidfd, self._held = (self._pidfd, self._held), -1, -1
        for fd in held:
            if fd >= 0:
                os.close(fd)


def pids() -> list[int]:
    """Every process that this machine shows us."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - ten times as fast


def _members(inode: int, dead: int) -> tuple[int, list[int]]:
    """How many processes were looked at, and which of them, but for the `dead` one, are in that PID namespace."""
    looked_at, found = 0, []
    for pid in pids():
        try:
            looked_at += 1
            if os.stat(f"/proc/{pid}/ns/pid").st_ino == inode and pid != dead:  # noqa: PTH116 - ten times as fast
                found.append(pid)
        except OSError:
            continue  # gone meanwhile, or another user's, which ours cannot be
    return looked_at, found


def _popen(argv: Sequence[str], errors: int, keep: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Start bwrap from the thread that runs the loop: `--die-with-parent` means the death of that thread.

    In a session of its own: a Ctrl-C on our terminal is ours to judge, and must not reach it.
    """
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=keep,
            cwd="/",
            env={},
            start_new_session=True,
        )
    except OSError as exc:
        hint = "; raise `ulimit -n`" if exc.errno == errno.EMFILE else ""
        raise SandboxError(f"cannot run {argv[0]}: {exc.strerror}{hint}") from exc


async def _exited(process: subprocess.Popen[bytes]) -> None:
    """Wait for a child of ours without a thread, and reap it."""
    if process.poll() is not None:
        return
    pidfd = os.pidfd_open(process.pid)
    try:
        while process.poll() is None:
            await anyio.wait_readable(pidfd)
    finally:
        os.close(pidfd)
