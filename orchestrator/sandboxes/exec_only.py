"""A host's own sandbox that can only start, exec, upload and download, as a `Sandbox`: that is all it takes.

    RolloutConfig(sandbox=mine, ...)     # `mine` satisfies `states.ports.ExecSandbox`

What such a sandbox lacks, a process that is talked to and proof that an agent is dead, is made by `exec_child.py`,
which runs inside on the sandbox's Python (3.8 or newer): see there. A channel is a process whose output is asked for
with calls that wait until there is some, by offset, so that a call which got lost is repeated and loses nothing; what
is sent is numbered the same way. All handles of such a sandbox share its disk and its processes; what they do not
share is HOME (`ExecHandle.home`) and TMPDIR, and an agent's handle reads no test files. Nothing keeps an agent's
*commands* from them: they are there only while a verifier runs, when every agent is dead.

Whoever brings the sandbox takes it down: `stop` ends what was started and removes our folder in it, then calls the
object's own `stop`, where it has one.
"""
# A handle and its sandbox are one part in two classes; /tmp is in the sandbox.
# ruff: noqa: SLF001, S108

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import posixpath
import secrets
import shlex
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs

from orchestrator._tasks import foreign
from orchestrator._words import shown
from orchestrator.sandboxes import _files, exec_call, exec_child
from orchestrator.sandboxes._files import Mount, Tree
from states.errors import ExecTimeout, HandleRevoked, PathEscape, QuietError, SandboxError, said
from states.ports import ExecResult, ExecSandbox

SHARED: Final = ("/logs/agent",)
TRUSTED: Final = ("/tests", "/solution", "/logs/verifier")
"""Folders that an agent's handle neither reads nor writes."""

INLINE_BYTES: Final = 48_000
"""The longest request, or piece of a channel, that goes on a command line (in base64, beside our program)."""
PIECE_BYTES: Final = 4 << 20
"""What is sent on a channel beyond that goes by upload, so much at a time."""
OUTPUT_CAP: Final = 1 << 20
POLL_SEC: Final = 25.0
"""How long a call waits inside for something to happen."""
WRITE_SEC: Final = 1.0
"""The same for room in a channel: such a call is not interrupted, so that we always know what has been taken."""
CALL_SEC: Final = 60.0
MOVE_SEC: Final = 900.0
"""For a call that packs or unpacks an archive."""
GRACE_SEC: Final = 30.0
"""What a call may take beyond what it was given, before we give it up."""
TRIES: Final = 3
"""How often a call that may be repeated is made."""
TAKEN_SEC: Final = 60.0
"""How long a write may take until it is known what was taken of it: nobody can interrupt it until then."""
QUIET_SEC: Final = 30.0
"""How long a handle may take to end, tries and all: nobody can interrupt that either, and a deadline is near."""


@attrs.define(eq=False)
class ExecChannel:
    """The `ByteChannel` of a process in an exec-only sandbox. Made by `ExecHandle.spawn`."""

    _handle: ExecHandle
    _id: str
    _sending: anyio.Lock = attrs.field(factory=anyio.Lock)
    _reading: anyio.Lock = attrs.field(factory=anyio.Lock)
    _received: int = 0
    """Bytes of stdin that are inside."""
    _have: int = 0
    """Bytes of stdout that are here."""
    _unread: bytes = b""
    _ended: bool = False
    _closed: bool = False
    _code: int | None = None
    _errors: int = 0
    _stderr: bytes = b""

    async def send(self, data: bytes) -> None:
        """See `ByteChannel.send`. Concurrent senders take turns, a whole `data` each."""
        async with self._sending:
            for at in range(0, len(data), PIECE_BYTES):
                await self._send(data[at : at + PIECE_BYTES])

    async def _send(self, piece: bytes) -> None:
        if self._closed:
            raise SandboxError("cannot write: stdin is closed")
        at, until = self._received, self._received + len(piece)
        async with self._handle._sandbox._carried(piece) as carried:
            while self._received < until:
                try:
                    with anyio.fail_after(TAKEN_SEC, shield=True):
                        answer = await self._ask("write", at=at, wait=WRITE_SEC, sec=WRITE_SEC, **carried)
                except (SandboxError, TimeoutError) as error:
                    self._closed = True  # what was taken is not known, so nothing may follow it
                    raise SandboxError(f"cannot write: the sandbox does not say what it took: {said(error)}") from error
                if answer is None or answer["shut"]:
                    raise SandboxError("cannot write: the process has closed its stdin, or has ended")
                self._received = answer["received"]
                await anyio.lowlevel.checkpoint()

    async def receive(self, max_bytes: int = 262_144) -> bytes:
        """See `ByteChannel.receive`."""
        await anyio.lowlevel.checkpoint()
        async with self._reading:
            while not self._unread and not self._ended:
                answer = await self._ask("read", have=self._have, wait=POLL_SEC, errors=self._errors)
                if answer is None:
                    break
                self._unread = base64.b64decode(answer["data"])
                self._have += len(self._unread)
                self._ended |= answer["end"]
            data, self._unread = self._unread[:max_bytes], self._unread[max_bytes:]
            return data

    async def close_stdin(self) -> None:
        """See `ByteChannel.close_stdin`."""
        async with self._sending:
            if not self._closed:
                self._closed = True
                await self._ask("close", at=self._received)

    async def wait(self) -> int:
        """See `ByteChannel.wait`."""
        while self._code is None:
            answer = await self._ask("wait", wait=POLL_SEC, errors=self._errors)
            if self._code is None:
                self._code = -9 if answer is None else answer["code"]
        return self._code

    async def kill(self) -> None:
        """See `ByteChannel.kill`. Its whole process group goes."""
        if self._code is None:
            await self._ask("kill")

    def stderr_tail(self) -> str:
        """See `ByteChannel.stderr_tail`; as of the last answer."""
        return self._stderr.decode(errors="replace")

    def release(self) -> None:
        """Its handle has ended, and it with that."""
        self._code = -9 if self._code is None else self._code
        self._ended = True

    async def _ask(self, do: str, **asked: Any) -> dict[str, Any] | None:
        """The keeper's answer; None once the handle has ended, and its processes with it."""
        try:
            answer = await self._handle._ask(do, id=self._id, **asked, tries=TRIES)
        except HandleRevoked:
            self.release()
            return None
        if (new := answer.get("errors", 0) - self._errors) > 0:
            self._stderr = (self._stderr + base64.b64decode(answer["stderr"])[-new:])[-exec_child.TAIL_BYTES :]
            self._errors += new
        return answer


@attrs.define(eq=False)
class ExecHandle:
    """The `SandboxHandle` of an `ExecOnlySandbox`. Made by `ExecOnlySandbox.handle`. `home` is its HOME."""

    name: str
    trusted: bool
    _sandbox: ExecOnlySandbox
    _folder: str
    _lock: anyio.Lock = attrs.field(factory=anyio.Lock)
    _phase: Literal["new", "open", "ended"] = "new"
    _tried: bool = False
    _keeper: Any = None
    _channels: list[ExecChannel] = attrs.field(factory=list)
    _environments: dict[str, anyio.Lock] = attrs.field(factory=dict)
    _known: set[str] = attrs.field(factory=set)
    _evidence: tuple[str, ...] = ()

    @property
    def home(self) -> str:
        """Where this handle's HOME is, in the sandbox."""
        return f"{self._folder}/home"

    async def open(self) -> None:
        """See `SandboxHandle.open`."""
        async with self._lock:
            if self._phase == "open":
                return
            if self._phase == "ended":
                raise HandleRevoked(f"handle {self.name} of sandbox {self._sandbox.name} has ended; make a new one")
            self._sandbox._require_up()
            self._tried = True
            answer = await self._sandbox._ask({"do": "open", "folder": self._folder}, f"opening handle {self.name}")
            self._keeper, self._phase = answer["keeper"], "open"

    async def end(self) -> tuple[str, ...]:
        """See `SandboxHandle.end`."""
        with anyio.move_on_after(QUIET_SEC, shield=True):
            async with self._lock:
                if not self._evidence:
                    self._phase = "ended"
                    self._evidence = await self._put_down()
                    for channel in self._channels:
                        channel.release()
        if not self._evidence:
            raise QuietError(
                f"nobody knows whether what handle {self.name} started is dead: "
                f"sandbox {self._sandbox.name} did not answer within {QUIET_SEC:g} s"
            )
        return self._evidence

    async def _put_down(self) -> tuple[str, ...]:
        if not self._tried:
            return (f"handle {self.name} was never opened: nothing was started through it",)
        asked = {"do": "end", "folder": self._folder, "name": self.name, "keeper": self._keeper}
        try:
            answer = await self._sandbox._ask(asked, f"ending handle {self.name}", tries=TRIES)
        except QuietError:
            raise
        except SandboxError as error:
            raise QuietError(f"nobody knows whether what handle {self.name} started is dead: {said(error)}") from error
        return tuple(answer["evidence"])

    # --- use ---

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_sec: float | None = None,
    ) -> ExecResult:
        """See `SandboxHandle.exec`. Where commands do not run as root, `root` is who they run as."""
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        asked = await self._started(argv, env, cwd) | {"user": user, "cap": OUTPUT_CAP, "timeout": timeout_sec}
        try:
            answer = await self._ask("run", **asked, sec=timeout_sec, what=f"running {argv[-1]:.100}")
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(GRACE_SEC, shield=True), contextlib.suppress(SandboxError):
                await self._ask("stop", id=asked["id"])
            raise
        self._require_open()
        out, err = _text(answer["stdout"]), _text(answer["stderr"])
        if answer["outlasted"]:
            raise ExecTimeout(
                f"command outlasted its {timeout_sec} s and was ended: {' '.join(argv):.200}", stdout=out, stderr=err
            )
        truncated = bool(answer["stdout"]["cut"] or answer["stderr"]["cut"])
        return ExecResult(out, err, answer["code"], truncated)

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> ExecChannel:
        """See `SandboxHandle.spawn`."""
        if isinstance(argv, str):
            raise SandboxError(f"spawn takes a list of arguments, not the string {argv!r}")
        asked = await self._started(list(argv), env, cwd)
        channel = ExecChannel(self, asked["id"])
        self._channels.append(channel)
        await self._ask("spawn", **asked, user=None, tries=TRIES, what=f"starting {argv[0]}")
        return channel

    async def read_file(self, path: str) -> bytes:
        """See `SandboxHandle.read_file`."""
        self._require_open()
        asked = {"do": "get", "spare": f"{self._folder}/{secrets.token_hex(8)}", **self._at(path)}
        answer = await self._sandbox._ask(asked, f"reading {path}", tries=TRIES)
        if "data" in answer:
            return base64.b64decode(answer["data"])
        async with self._sandbox._spare(asked["spare"]), self._sandbox._fetched(asked["spare"]) as file:
            return await anyio.Path(file).read_bytes()

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `SandboxHandle.write_file`. A link at `path` is replaced, not followed."""
        self._require_open()
        async with self._sandbox._carried(data) as carried:
            asked = {"do": "put", "mode": mode, **self._at(path), **carried}
            await self._sandbox._ask(asked, f"writing {path}", tries=TRIES)

    # --- parts ---

    def _at(self, path: str) -> dict[str, Any]:
        path = posixpath.join(self._sandbox.cwd, path)
        clean = posixpath.normpath(path)
        if not self.trusted and any(f"{clean}/".startswith(f"{place}/") for place in TRUSTED):
            raise SandboxError(f"no such file or folder in sandbox {self._sandbox.name}: {path}")
        return self._sandbox._place(path) | {"confined": self.trusted}

    async def _started(self, argv: list[str], env: Mapping[str, str] | None, cwd: str | None) -> dict[str, Any]:
        self._require_open()
        return {
            "id": secrets.token_hex(8),
            "argv": argv,
            "environment": await self._environment({"HOME": self.home, "TMPDIR": f"{self._folder}/tmp", **(env or {})}),
            "cwd": posixpath.join(self._sandbox.cwd, cwd or ""),
        }

    async def _environment(self, env: Mapping[str, str]) -> str:
        """The name under which the keeper knows these variables; told once, in a file, since they may hold keys."""
        text = json.dumps(env, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        async with self._environments.setdefault(name, anyio.Lock()):
            if name not in self._known:
                await self._ask("environment", environment=name, env=dict(env), private=True)
                self._known.add(name)
        return name

    async def _ask(
        self,
        do: str,
        *,
        what: str = "",
        tries: int = 1,
        private: bool = False,
        sec: float | None = CALL_SEC,
        **asked: Any,
    ) -> dict[str, Any]:
        self._require_open()
        request = {"do": do, "folder": self._folder, **asked}
        return await self._sandbox._ask(request, what or do, tries=tries, private=private, sec=sec)

    def _require_open(self) -> None:
        if self._phase == "ended":
            raise HandleRevoked(f"handle {self.name} of sandbox {self._sandbox.name} has ended")
        if self._phase == "new":
            raise SandboxError(f"handle {self.name} of sandbox {self._sandbox.name} is not open; await open() first")


@attrs.define(eq=False)
class ExecOnlySandbox:
    """A `Sandbox` over an `ExecSandbox`. Nothing happens until `start`.

    Args:
        within: The host's sandbox.
        name: What we call it; its own `name` by default.
        cwd: Where tasks work; its own by default, or `/app`.
        binds: Folders of this host that agents need at the same paths; brought in once, where they are not there.
    """

    within: ExecSandbox
    name: str = attrs.field(default=attrs.Factory(lambda self: _own_name(self.within), takes_self=True))
    cwd: str = attrs.field(
        default=attrs.Factory(lambda self: getattr(self.within, "cwd", None) or "/app", takes_self=True)
    )
    binds: tuple[str, ...] = ()
    gateway_url: str | None = attrs.field(init=False)
    has_environment: bool = attrs.field(init=False)
    _root: str = attrs.field(factory=lambda: f"/tmp/.rollout-{secrets.token_hex(6)}", init=False)
    _phase: Literal["new", "up", "stopped"] = attrs.field(default="new", init=False)
    _lock: anyio.Lock = attrs.field(factory=anyio.Lock, init=False)
    _handles: dict[tuple[str, bool], ExecHandle] = attrs.field(factory=dict, init=False)
    _touched: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        """Take what the host's object says of itself."""
        self.gateway_url = getattr(self.within, "gateway_url", None)
        self.has_environment = getattr(self.within, "has_environment", True)

    async def start(self) -> Mapping[str, Any]:
        """See `Sandbox.start`. Raises `SandboxError` when the sandbox's Python is not there, or too old."""
        async with self._lock:
            if self._phase == "stopped":
                raise SandboxError(f"sandbox {self.name} was stopped; make a new one")
            if self._phase == "new":
                self._touched = True
                await _translated(f"sandbox {self.name} does not start", self.within.start)
                asked = {"do": "hello", "root": self._root, "cwd": self.cwd, "folders": [*SHARED, *TRUSTED]}
                await self._ask(asked, "starting", tries=TRIES)
                for path in self.binds:
                    await self._bring(path)
                self._phase = "up"
        return {"kind": f"{__name__}:{type(self).__name__}", "name": self.name}

    @staticmethod
    async def reap(_handle: Mapping[str, Any]) -> None:
        """Whoever brought it takes it down; what we had started in it ends with it, channels within minutes."""

    async def stop(self) -> None:
        """See `Sandbox.stop`. Raises what went wrong, such as a `QuietError`, once all of it has been tried.

        Nobody interrupts it: each part is bounded, and a deadline that passes meanwhile would leave the sandbox up.
        """
        async with self._lock:
            if self._touched and self._phase != "stopped":
                with anyio.CancelScope(shield=True):
                    errors = await self._end_all()
                if errors[1:]:  # and only one of them can be the sandbox's own
                    raise QuietError("; ".join(map(str, errors))) from errors[0]
                if errors:
                    raise errors[0]
            self._phase = "stopped"

    async def _end_all(self) -> list[Exception]:
        """End the handles, then the sandbox, where whoever brought it lets us: that ends what did not end before."""
        errors: list[Exception] = []

        async def tried(step: Callable[[], Any]) -> None:
            try:
                await step()
            except (SandboxError, QuietError) as error:
                errors.append(error)

        async with anyio.create_task_group() as ends:
            for handle in self._handles.values():
                ends.start_soon(tried, handle.end)
        if not errors:
            with anyio.move_on_after(GRACE_SEC), contextlib.suppress(SandboxError):
                await self._ask({"do": "bye", "root": self._root}, "stopping")
        await tried(functools.partial(_translated, f"sandbox {self.name} does not stop", self._take_down))
        return errors

    async def _take_down(self) -> None:
        if stop := getattr(self.within, "stop", None):
            with anyio.fail_after(CALL_SEC):
                await stop()

    def handle(self, name: str, *, trusted: bool = False) -> ExecHandle:
        """See `Sandbox.handle`. The same name gives the same handle until it ends."""
        handle = self._handles.get((name, trusted))
        if handle is None or handle._phase == "ended":
            folder = f"{self._root}/{secrets.token_hex(4)}"
            handle = self._handles[name, trusted] = ExecHandle(name, trusted, self, folder)
        return handle

    async def upload(self, source: Path, target: str) -> None:
        """See `Sandbox.upload`. Links are copied as links; set-uid bits, devices and FIFOs are left out."""
        self._require_up()
        await self._take_in(source, target)

    async def _take_in(self, source: Path, target: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder, "archive")
            entry = await anyio.to_thread.run_sync(_packed, source, archive)
            async with self._brought(archive) as file:
                asked = {"do": "unpack", "file": file, "entry": entry, "confined": True, **self._place(target)}
                await self._ask(asked, f"uploading to {target}", sec=MOVE_SEC)

    async def download(self, source: str, target: Path) -> None:
        """See `Sandbox.download`. In a folder, links that could lead out of it are left out, as are devices."""
        self._require_up()
        async with self._spare() as spare:
            asked = {"do": "pack", "spare": spare, "confined": True, **self._place(source)}
            await self._ask(asked, f"downloading {source}", sec=MOVE_SEC)
            async with self._fetched(spare) as archive:
                await anyio.to_thread.run_sync(_unpacked, archive, self.name, source, target)

    async def _bring(self, path: str) -> None:
        """A folder of this host, at the same path: it holds programs, and what is there already is the same."""
        done = await self._exec(f"test -e {shlex.quote(path)}", CALL_SEC, f"looking for {path}")
        if done.return_code == 0:
            return
        try:
            await self._take_in(Path(path), path)
        except SandboxError as error:
            raise SandboxError(
                f"an agent needs {path} of this host at the same place in the sandbox: {error}"
            ) from error

    # --- calls ---

    def _place(self, path: str) -> dict[str, Any]:
        return {"path": path, "name": self.name, "places": [self.cwd, *SHARED, *TRUSTED]}

    async def _ask(
        self,
        asked: Mapping[str, Any],
        what: str,
        *,
        tries: int = 1,
        private: bool = False,
        sec: float | None = CALL_SEC,
    ) -> dict[str, Any]:
        """What our program inside answers. `private` requests travel in a file. Raises what it says went wrong."""
        text = json.dumps(asked)
        async with contextlib.AsyncExitStack() as stack:
            word = text
            if private or len(text) > INLINE_BYTES * 1.5:
                word = "@" + await stack.enter_async_context(self._brought_bytes(text.encode()))
            command = f"python3 -I -S -c {_program(str(asked['do']))} {shlex.quote(word)} {asked.get('folder', '')}"
            for left in range(tries - 1, -1, -1):
                try:
                    answer = self._heard(await self._exec(command, sec, what), what)
                    if "answer" in answer:
                        answer = await self._long(answer["answer"], what)
                    return self._judged(answer, what)
                except _NoAnswer as error:
                    if not left:
                        raise SandboxError(str(error)) from error
        raise AssertionError

    def _heard(self, done: Any, what: str) -> dict[str, Any]:
        """The answer in what a call printed."""
        for line in reversed(str(done.stdout or "").splitlines()):
            if line.startswith("rollout: "):
                with contextlib.suppress(ValueError):
                    answer: dict[str, Any] = json.loads(line.removeprefix("rollout: "))
                    return answer
        tail = (str(done.stderr or "") or str(done.stdout or ""))[-1000:].strip() or "nothing"
        if done.return_code == 127:
            raise SandboxError(
                f"sandbox {self.name}, {what}: it has no python3, and 3.8 or newer is needed; it said: {tail}"
            )
        raise _NoAnswer(f"sandbox {self.name}, {what}: exit code {done.return_code}, and it said: {tail}")

    async def _long(self, path: str, what: str) -> dict[str, Any]:
        """An answer that was left in a file."""
        if not path.startswith(f"{self._root}/"):
            raise SandboxError(f"sandbox {self.name}, {what}: its answer is said to be in {path}, where it is not")
        async with self._spare(path), self._fetched(path) as file:
            answer: dict[str, Any] = json.loads(await anyio.Path(file).read_bytes())
            return answer

    def _judged(self, answer: dict[str, Any], what: str) -> dict[str, Any]:
        """The answer, or the error that it is."""
        if "error" not in answer:
            return answer
        kinds: dict[str, type[Exception]] = {"escape": PathEscape, "ended": HandleRevoked, "unquiet": QuietError}
        raise kinds.get(answer["kind"], SandboxError)(f"sandbox {self.name}, {what}: {answer['error']}")

    async def _exec(self, command: str, sec: float | None, what: str) -> Any:
        limit = None if sec is None else sec + GRACE_SEC
        try:
            with anyio.fail_after(None if limit is None else limit + GRACE_SEC), foreign():
                done: Any = await self.within.exec(command, timeout_sec=limit)
        except Exception as error:
            raise _NoAnswer(f"sandbox {self.name}, {what}: {type(error).__name__}: {said(error)}") from error
        if lacks := [member for member in ("stdout", "stderr", "return_code") if not hasattr(done, member)]:
            wanted = "an object with stdout, stderr and return_code"
            returned = f"exec() returned {shown(done)}, which lacks {', '.join(lacks)}"
            raise SandboxError(f"sandbox {self.name}, {what}: {returned}; it must return {wanted}")
        return done

    # --- files on their way ---

    @contextlib.asynccontextmanager
    async def _carried(self, data: bytes) -> AsyncIterator[dict[str, str]]:
        """Bytes as part of a request: in it, or as a file that is brought in for so long."""
        if len(data) <= INLINE_BYTES:
            yield {"data": base64.b64encode(data).decode()}
        else:
            async with self._brought_bytes(data) as file:
                yield {"file": file}

    @contextlib.asynccontextmanager
    async def _brought_bytes(self, data: bytes) -> AsyncIterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            file = anyio.Path(folder, "file")
            await file.write_bytes(data)
            async with self._brought(Path(file)) as inside:
                yield inside

    @contextlib.asynccontextmanager
    async def _brought(self, file: Path) -> AsyncIterator[str]:
        """A file of ours, brought in for so long."""
        async with self._spare() as inside:
            await anyio.Path(file).chmod(0o644)  # whoever it belongs to then, the folder above it is ours alone
            await _translated(
                f"sandbox {self.name} takes no upload", functools.partial(self.within.upload, file, inside)
            )
            yield inside

    @contextlib.asynccontextmanager
    async def _fetched(self, inside: str) -> AsyncIterator[Path]:
        """A file of the sandbox's, brought home for so long."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "file")
            await _translated(
                f"sandbox {self.name} gives no download", functools.partial(self.within.download, inside, file)
            )
            yield file

    @contextlib.asynccontextmanager
    async def _spare(self, path: str = "") -> AsyncIterator[str]:
        """A path in our folder that is free, and is again afterwards."""
        path = path or f"{self._root}/{secrets.token_hex(8)}"
        try:
            yield path
        finally:
            with anyio.move_on_after(CALL_SEC, shield=True), contextlib.suppress(SandboxError):
                await self._exec(f"rm -f {shlex.quote(path)}", CALL_SEC, "tidying")

    def _require_up(self) -> None:
        if self._phase != "up":
            raise SandboxError(f"sandbox {self.name} {'was stopped' if self._phase == 'stopped' else 'is not started'}")


class _NoAnswer(SandboxError):
    """A call got lost, or was not done: it may be made again, where once or twice is the same."""


def _own_name(within: Any) -> str:
    return str(getattr(within, "name", None) or f"exec-{secrets.token_hex(4)}")


@functools.cache
def _program(do: str) -> str:
    """The program that does it, as one shell word."""
    if do in ("get", "put", "pack", "unpack"):
        walker = Path(_files.__file__).read_text(encoding="utf-8")
        source = f"{_FUTURE}FILES = {walker!r}\n{_source(exec_child.__file__).partition(_FUTURE)[2]}"
    else:
        source = _source(exec_child.__file__ if do in exec_child.CALLS else exec_call.__file__)
    packed = base64.b64encode(zlib.compress(source.encode(), 9)).decode()
    old = "sys.version_info<(3,8) and sys.exit('its python3 is too old: 3.8 or newer is needed')"
    return shlex.quote(f"import binascii,sys,zlib;{old};exec(zlib.decompress(binascii.a2b_base64('{packed}')))")


def _source(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


_FUTURE: Final = "from __future__ import annotations\n"


async def _translated(otherwise: str, call: Callable[[], Any]) -> Any:
    """What a member of the host's object does; whatever it raises is a `SandboxError`."""
    try:
        with foreign():
            return await call()
    except SandboxError:
        raise
    except Exception as error:
        raise SandboxError(f"{otherwise}: {type(error).__name__}: {said(error)}") from error


def _text(kept: Mapping[str, Any]) -> str:
    """Output as the keeper kept it, with a line where it was cut."""
    head, tail = (base64.b64decode(kept[part]).decode(errors="replace") for part in ("head", "tail"))
    if not kept["cut"]:
        return (base64.b64decode(kept["head"]) + base64.b64decode(kept["tail"])).decode(errors="replace")
    return f"{head}\n[... {kept['cut']} bytes of output were cut here ...]\n{tail}"


def _packed(source: Path, archive: Path) -> str:
    """A file, or a folder's content, as a tar; returns the entry's name."""
    try:
        mode = source.stat().st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise SandboxError(f"cannot upload {source}: it is neither a file nor a folder")
        entry = "copy" if stat.S_ISDIR(mode) else source.name
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT, dereference=False) as tar:
            tar.add(source.resolve(), arcname=entry, filter=_ordinary)
    except OSError as error:
        raise SandboxError(f"cannot upload {source}: {error.strerror or error}") from error
    return entry


def _ordinary(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Files, folders and links, without owners and set-uid bits."""
    info.mode &= 0o777
    return cast(tarfile.TarInfo, exec_child.plain(info)) if info.isfile() or info.isdir() or info.issym() else None


def _unpacked(archive: Path, sandbox: str, source: str, target: Path) -> None:
    """An archive from inside, where an agent may have written it: into a new folder, and from there as any copy."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with tarfile.open(archive) as tar:
                modes = _extracted(tar, folder)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise SandboxError(f"what sandbox {sandbox} packed of {source} cannot be unpacked: {error}") from error
        copy = folder / "copy"
        if copy.is_file() and not copy.is_symlink():
            copy = copy.rename(folder / (posixpath.basename(source) or "copy"))
        Tree(sandbox, (Mount("/download", name),)).copy_out(f"/download/{copy.name}", target)
        for path, mode in modes:  # as the last thing: one that may not be written could not have been filled
            place = target.joinpath(*path)
            if place.is_dir() and not place.is_symlink():
                place.chmod(mode)


def _extracted(tar: tarfile.TarFile, folder: Path) -> list[tuple[list[str], int]]:
    """Unpack below `folder/copy`, links after files so that nothing is written through one; the folders' modes."""
    links, modes, room = [], [], exec_child.PACK_BYTES
    for member in tar:
        room -= member.size
        if room < 0:  # said by whoever packed it to be less, or full of holes
            raise SandboxError(f"it holds more than {exec_child.PACK_BYTES >> 30} GiB, which is too much to download")
        top, *path = member.name.split("/")
        if top != "copy" or ".." in path or "" in path:
            raise PathEscape(f"an archive of a sandbox has an entry {member.name!r}")
        place = folder.joinpath(top, *path)
        if member.isdir():
            place.mkdir(mode=0o700)
            modes.append((path, member.mode & 0o777))
        elif member.issym():
            links.append((place, member.linkname))
        elif member.isreg():
            content = tar.extractfile(member)
            assert content is not None
            fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
                os.fchmod(file.fileno(), member.mode & 0o777)
    for place, link in links:
        place.symlink_to(link)
    return modes[::-1]
