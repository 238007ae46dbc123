"""Control from a second terminal: interrupt, cancel, pause and resume a rollout that another process drives.

The process that drives it opens a unix socket in the rollout's folder, and whoever may write there may ask:

    async with serve(rollout):                       # where it is driven: `rollout run` does, an embedder may
        await rollout.run()

    with ask(Path("runs/1b2c3d"), "cancel") as (answer, states):   # elsewhere on this machine: `rollout cancel`
        print(answer.said, *states)                                # waits until the rollout is closed

A request is one line of JSON, `{"ask": "cancel"}`; so is the answer, a `Said`. After it come the states that the
rollout passes, a line each, until either side leaves. What was asked is journaled as `by: terminal`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, get_args

import anyio
import attrs
import msgspec
from anyio.abc import TaskGroup

from orchestrator._tasks import Abandoned, Bell, Detached, first_of
from orchestrator.journal import encode, read_journal
from orchestrator.owners import is_alive, owner_of
from orchestrator.rollout import Rollout
from states.errors import ConfigError
from states.journal import Folded, Transition, fold

Ask = Literal["interrupt", "cancel", "pause", "resume"]
"""What can be asked."""

SOCKET = "control.sock"
BY = "terminal"
REQUEST_BYTES = 1024
REQUEST_SEC = 5.0
"""How long who connects may take to say what they want, and to take what they are told."""
ANSWER_SEC = 30.0
CLIENTS = 16
"""So many are heard at a time; the others wait."""


@attrs.frozen
class Said:
    """The answer: where the rollout stands, whether what was asked changes anything, and both in a sentence."""

    state: str
    changed: bool
    said: str


# --- the side that drives -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serve(rollout: Rollout) -> AsyncIterator[None]:
    """Hear what others ask of `rollout`, until the block is left.

    Only processes of our own user, and root's, are heard.

    Raises:
        ConfigError: the rollout has no folder, or no socket can be made in it; says why.
    """
    folder = rollout.folder
    if folder is None:
        raise ConfigError(f"rollout {rollout.id} keeps nothing on disk (out=None): there is no place for its control")
    with _listening(folder) as listener:
        server = _Server(rollout, listener)
        rollout.listeners.append(server.moved)
        hearing = Detached(server.run, name=f"control:{rollout.id}").start()
        try:
            yield
        finally:
            rollout.listeners.remove(server.moved)
            server.finish()
            with anyio.CancelScope(shield=True), contextlib.suppress(Abandoned):
                with anyio.move_on_after(REQUEST_SEC):
                    await hearing.wait()
                hearing.cancel()
                await hearing.wait()


@contextlib.contextmanager
def _listening(folder: Path) -> Iterator[socket.socket]:
    """A socket in `folder`, gone when the block is left."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        try:
            place = stack.enter_context(_opened(folder))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(SOCKET, dir_fd=place)  # of a process that was killed: who drives now is us alone
            os.fchmod(listener.fileno(), 0o600)  # before it is bound: its file is never anybody else's to use
            listener.bind(f"/proc/self/fd/{place}/{SOCKET}")
            listener.listen(CLIENTS)
        except OSError as error:
            raise ConfigError(f"{folder / SOCKET} cannot be made: {error.strerror or error}") from error
        made = os.stat(SOCKET, dir_fd=place).st_ino
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if os.stat(SOCKET, dir_fd=place).st_ino == made:
                    os.unlink(SOCKET, dir_fd=place)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The folder as a descriptor: by /proc/self/fd, its sockets have a short name however long the path is."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@attrs.define(eq=False)
class _Server:
    """Hears one rollout's callers."""

    rollout: Rollout
    listener: socket.socket
    _limit: anyio.Semaphore = attrs.field(factory=lambda: anyio.Semaphore(CLIENTS), init=False)
    _passed: list[str] = attrs.field(factory=list, init=False)
    """The states that were reached since we listen."""
    _bell: Bell = attrs.field(factory=Bell, init=False)
    _finished: anyio.Event = attrs.field(factory=anyio.Event, init=False)

    def moved(self, moved: Transition) -> None:
        """The rollout moved: tell those who watch."""
        if moved.source != moved.dest:
            self._passed.append(moved.dest)
            self._bell.ring()

    def finish(self) -> None:
        """Nobody drives it here any more: who watches is told the rest, and left."""
        self._finished.set()
        self._bell.ring()

    async def run(self) -> None:
        """Take callers until it is finished."""
        async with anyio.create_task_group() as callers, anyio.create_task_group() as door:
            door.start_soon(self._take, callers)
            await self._finished.wait()
            door.cancel_scope.cancel()

    async def _take(self, callers: TaskGroup) -> None:
        while True:
            await self._limit.acquire()
            callers.start_soon(self._hear, await self._accepted())

    async def _accepted(self) -> socket.socket:
        while True:
            await anyio.wait_readable(self.listener)
            try:
                connection, _ = self.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError:  # no descriptor is left: it will be tried again, but not at once
                await anyio.sleep(1)
                continue
            connection.setblocking(False)
            return connection

    async def _hear(self, connection: socket.socket) -> None:
        with connection:
            try:
                if _is_ours(connection):
                    await self._answer(connection)
            except (OSError, TimeoutError, anyio.ClosedResourceError, anyio.BusyResourceError):
                pass  # whoever asked has left, or is too slow: what was asked is done all the same
            finally:
                self._limit.release()

    async def _answer(self, connection: socket.socket) -> None:
        with anyio.fail_after(REQUEST_SEC):
            asked = _read_request(await _line(connection))
        if asked is None:
            expected = ", ".join(get_args(Ask))
            refusal = Said(self.rollout.state, changed=False, said=f"not understood; ask for one of {expected}")
            await _send(connection, encode(refusal))
            return
        known = len(self._passed)
        await _send(connection, encode(carry_out(self.rollout, asked)))
        while (passed := await self._more(connection, known)) > known:
            for state in self._passed[known:passed]:
                await _send(connection, encode({"state": state}))
            known = passed

    async def _more(self, connection: socket.socket, known: int) -> int:
        """Wait until more states were reached than the `known` ones: how many; no more, when either side leaves."""

        def passed() -> int | None:
            now = len(self._passed)
            return now if now > known or self._finished.is_set() else None

        async def moved() -> int:
            return await self._bell.until(passed)

        async def left() -> int:
            await anyio.wait_readable(connection)
            return known

        return await first_of(moved, left)


def _is_ours(connection: socket.socket) -> bool:
    """Whether the peer's user is ours, or root. The socket's mode says so too; this is what the kernel says."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


def _read_request(line: bytes) -> Ask | None:
    try:
        asked: Ask = msgspec.json.decode(line, type=dict[str, Ask])["ask"]
    except (msgspec.MsgspecError, KeyError):
        return None
    return asked


async def _line(connection: socket.socket) -> bytes:
    """The bytes up to a newline; what is longer than a request can be is cut, and so not understood."""
    data = b""
    while b"\n" not in data and len(data) <= REQUEST_BYTES:
        await anyio.wait_readable(connection)
        more = connection.recv(REQUEST_BYTES)
        if not more:
            break
        data += more
    return data[:REQUEST_BYTES].partition(b"\n")[0]


async def _send(connection: socket.socket, line: bytes) -> None:
    data = line + b"\n"
    with anyio.fail_after(REQUEST_SEC):
        while data:
            await anyio.wait_writable(connection)
            data = data[connection.send(data) :]


def carry_out(rollout: Rollout, asked: Ask, by: str = BY) -> Said:
    """Do what is asked, which is legal in every state, and say what that changes."""
    where = rollout.state
    match asked:
        case "cancel":
            changed = rollout.cancel(by)
            ending = rollout.facts.ending
            if changed:
                said = "cancelled: what it holds is given back, then it is closed"
            elif ending in (None, "cancelled"):
                said = "it is being cancelled already: nothing changes"
            else:
                said = f"it is {ending} already, and gives back what it holds: nothing changes"
        case "interrupt":
            changed = rollout.interrupt(by)
            said = "the turn in flight is cancelled; the rollout goes on" if changed else "no turn is in flight"
        case "pause":
            holder = rollout.held
            changed = rollout.pause(by)
            if changed:
                said = "it is held before its next turn; `rollout resume` lets it go on"
            elif holder is not None:
                said = f"{holder} holds it already: nothing changes"
            else:
                said = "no turn can follow any more: there is nothing to hold"
        case _:  # resume
            changed = rollout.resume(by)
            said = "it goes on" if changed else "nobody holds it: it is not paused"
    return Said(where, changed, said)


# --- the side that asks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def ask(folder: Path, what: Ask) -> Iterator[tuple[Said, Iterator[str]]]:
    """Ask whoever drives the rollout in `folder`. The answer, and the states that the rollout passes from there.

    The states are waited for, and end when it is closed, or driven no further.

    Raises:
        ConfigError: there is no such rollout, it is closed, nobody drives it here, or it is another user's; says
            which, and which command helps.

    >>> with ask(Path("runs/1b2c3d"), "pause") as (answer, _):  # doctest: +SKIP
    ...     print(answer.said)
    it is held before its next turn; `rollout resume` lets it go on
    """
    _look(folder)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.settimeout(ANSWER_SEC)
        try:
            place = stack.enter_context(_opened(folder))
            connection.connect(f"/proc/self/fd/{place}/{SOCKET}")
            connection.sendall(encode({"ask": what}) + b"\n")
            first = connection.recv(REQUEST_BYTES, socket.MSG_PEEK)
        except PermissionError as error:
            owner = folder.stat().st_uid
            raise ConfigError(f"rollout {folder.name} belongs to user {owner}: only they may ask it") from error
        except TimeoutError as error:
            raise ConfigError(f"rollout {folder.name} does not answer within {ANSWER_SEC:g} s") from error
        except (FileNotFoundError, ConnectionError) as error:
            raise _nobody(folder) from error
        except OSError as error:
            raise ConfigError(f"{folder / SOCKET} cannot be used: {error.strerror or error}") from error
        if not first:  # it went while we asked
            raise _nobody(folder)
        connection.settimeout(None)
        answers = stack.enter_context(connection.makefile("rb"))
        line = answers.readline()
        try:
            said = msgspec.json.decode(line, type=Said)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{folder / SOCKET} answers {line[:80]!r}, which is no rollout's answer") from error
        yield said, _states(answers)


def _states(answers: IO[bytes]) -> Iterator[str]:
    with contextlib.suppress(ConnectionError):
        for line in answers:
            yield msgspec.json.decode(line, type=dict[str, str])["state"]


def is_driven(folder: Path) -> bool:
    """Whether somebody hears what is asked of the rollout in `folder`."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.settimeout(ANSWER_SEC)
        try:
            with _opened(folder) as place:
                connection.connect(f"/proc/self/fd/{place}/{SOCKET}")
        except OSError:
            return False
        return True


def _look(folder: Path) -> tuple[Folded, Mapping[str, Any]]:
    """Where its journal says that it stands, and who drives it. Raises `ConfigError` when it cannot be asked here."""
    if not (folder / "journal.jsonl").is_file():
        raise ConfigError(f"{folder} holds no rollout: there is no journal.jsonl in it")
    records = read_journal(folder)
    folded, owner = fold(records), owner_of(records)
    if folded.position.closed:
        raise ConfigError(f"rollout {folder.name} is over: {folded.position.state}")
    if owner.get("host") != socket.gethostname():
        raise ConfigError(f"rollout {folder.name} is driven on {owner.get('host')!r}: ask it there")
    return folded, owner


def _nobody(folder: Path) -> ConfigError:
    """Why nobody heard us, and what to do about it."""
    folded, owner = _look(folder)
    how = f"it was stopped by {folded.stopped}" if folded.stopped else f"process {owner.get('pid')}, which did, is dead"
    if folded.stopped or not is_alive(owner):
        help_is = f"`rollout resume {folder}` goes on with it, `rollout reap {folder}` closes it"
        return ConfigError(f"nobody drives rollout {folder.name}: {how}; {help_is}")
    return ConfigError(
        f"process {owner['pid']}, which drives rollout {folder.name}, hears nobody: a program that embeds rollouts "
        "opens their control with orchestrator.control.serve"
    )
