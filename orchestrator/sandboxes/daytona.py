"""Daytona: a sandbox at a service, on the real `daytona` SDK. asyncio only; the extra is `daytona-sdk`.

The key comes from `DAYTONA_API_KEY`, the service's address from `DAYTONA_API_URL`; neither is ever written down. A
sandbox is made from the option `snapshot`, else from the rollout's image, else from the task's Dockerfile, else from
the service's default snapshot. It ends by itself: `ttl_minutes` is always set, from the rollout's own deadlines, and
anew by whoever attaches to it to go on with the rollout.

All that is done in it is done by a program of ours (`inside/`), which needs a Python of at least 3.8 there, and root,
directly or by `sudo` without a password. It gives each handle namespaces of its own, so that ending a handle ends all
that it started, whatever that did to hide, and proves it by listing. An agent is uid 52001 there and sees the image's
own file system, with a HOME and a `/tmp` of its own, and nothing in `/tests`, `/solution` and `/logs/verifier`; trusted
handles are root. With the network `gateway-only` or `none` the service blocks traffic to the outside, and handles share
one loopback that is not the sandbox's own: a server that the image starts cannot be reached by them, nor can the
service's own daemon. With `bridge` or `host` they are in the sandbox's network.

The host has no address there: the gateway is reached by a relay over a channel of a trusted handle.

    sandbox = make(SandboxSpec("daytona", "r1", options={"channel": "pty"}))
    await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    print((await handle.exec("uname -a")).stdout)
    await sandbox.stop()
"""
# A handle and its sandbox are one part in two classes.
# ruff: noqa: SLF001

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import importlib.util
import math
import os
import posixpath
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import anyio.to_thread
import attrs

from orchestrator.sandboxes import SandboxSpec, _archives
from orchestrator.sandboxes._daytona_channel import LINE_KINDS, Channel
from orchestrator.sandboxes._daytona_service import (
    KEPT,
    LABEL,
    MADE_BY,
    Box,
    Gone,
    Service,
    inside_files,
    shell_words,
)
from orchestrator.sandboxes._image_map import map_bases, mapped
from orchestrator.sandboxes._names import file_name
from orchestrator.sandboxes.inside import keeper
from states.errors import ConfigError, ExecTimeout, HandleRevoked, QuietError, SandboxError
from states.ports import ExecResult

if importlib.util.find_spec("daytona") is None:
    raise ModuleNotFoundError("the daytona package is not installed", name="daytona")

OPTIONS: Final[Mapping[str, str]] = {
    "snapshot": "a snapshot that has the task's environment; its resources are its own",
    "channel": "what carries an agent's stdin and stdout: session (the default) or pty, which is faster",
    "agents": "how agents get in: upload (the default), or present where the image has them at the same paths",
    "user": "who agents are: agent (the default, without privileges), or root of the sandbox",
    "python": "the Python in the sandbox, python3 by default",
    "target": "the region of the service",
    "owner": "for `rollout reap`: the host whose orchestrators are all dead but those that are seen here to live",
}

DEFAULT_URL: Final = "https://app.daytona.io/api"
DEFAULT_TTL_SEC: Final = 6 * 3600.0
OUTPUT_CAP: Final = 1 << 20
LONG_COMMAND: Final = 100_000
"""A shell command beyond this many characters goes in as a file: one argument may not be longer than 128 KiB."""

WAIT_SEC: Final = 40.0
"""How long one call waits for a command: proxies cut requests that take minutes."""

CLOSED: Final = ("gateway-only", "none")
"""Networks without a way out; `bridge` and `host` are the same here: the sandbox's own."""

PROOF_SEC: Final = 25.0
"""How long the proof of a handle's end may take, all repetitions included."""

STOP_SEC: Final = 60.0
KILL_SEC: Final = 10.0
MB: Final = 1 << 20


def make(spec: SandboxSpec) -> DaytonaSandbox:
    """The Daytona sandbox that a rollout's config asks for. Raises `ConfigError`: no key, or a wrong option."""
    options = spec.options
    for name, known in (
        ("channel", tuple(LINE_KINDS)),
        ("agents", ("upload", "present")),
        ("user", ("agent", "root")),
    ):
        if options.get(name, known[0]) not in known:
            raise ConfigError(f"sandbox daytona: {name} is {' or '.join(known)}, not {options[name]!r}")
    if not spec.cwd.startswith("/") or posixpath.normpath(spec.cwd) != spec.cwd or spec.cwd == "/":
        raise ConfigError(f"cwd of a Daytona sandbox must be a clean absolute path below /, not {spec.cwd!r}")
    return DaytonaSandbox(spec, *access())


def access() -> tuple[str, str]:
    """(key, address) of the service. Raises `ConfigError` without a key."""
    key = os.environ.get("DAYTONA_API_KEY", "")
    if not key:
        raise ConfigError("sandbox daytona: set DAYTONA_API_KEY to a key of the service")
    return key, os.environ.get("DAYTONA_API_URL") or DEFAULT_URL


# --- a handle ---


@attrs.define(eq=False)
class DaytonaHandle:
    """The `SandboxHandle` of a `DaytonaSandbox`. Made by `DaytonaSandbox.handle`."""

    name: str
    trusted: bool
    _sandbox: DaytonaSandbox
    _lock: anyio.Lock = attrs.field(factory=anyio.Lock)
    _phase: Literal["new", "open", "ended"] = "new"
    _begun: bool = False
    _token: str = attrs.field(factory=lambda: secrets.token_hex(8))
    _channels: list[Channel] = attrs.field(factory=list)
    _evidence: tuple[str, ...] = ()

    @property
    def _id(self) -> str:
        """Its folder's name in the sandbox, two names never the same."""
        return f"{'trusted' if self.trusted else 'agent'}-{file_name(self.name)}"

    # --- life ---

    async def open(self) -> None:
        """See `SandboxHandle.open`."""
        async with self._lock:
            if self._phase == "open":
                return
            if self._phase == "ended":
                raise HandleRevoked(f"handle {self.name} of sandbox {self._sandbox.name} has ended; make a new one")
            box = self._sandbox._require_up()
            self._begun = True
            await box.ask(f"opening handle {self.name}", self._asked("open"))
            self._phase = "open"

    async def end(self) -> tuple[str, ...]:
        """See `SandboxHandle.end`."""
        async with self._lock:
            if not self._evidence:  # its sandbox may have ended it, and that may have failed
                with anyio.CancelScope(shield=True):
                    if not self._begun:
                        self._evidence = (f"handle {self.name} was never opened: nothing was started through it",)
                    else:
                        self._evidence = await self._put_down()
                    await self.let_go()
            return self._evidence

    async def let_go(self, evidence: tuple[str, ...] = ()) -> None:
        """It has ended, or its sandbox has: what arrived over its channels can still be read."""
        self._phase = "ended"
        self._evidence = self._evidence or evidence
        for channel in self._channels:
            await channel.release()
        self._channels.clear()

    async def _put_down(self) -> tuple[str, ...]:
        """Kill everything and return the proof. Raises `QuietError` without one, the sandbox's own end being one."""
        box, gone = self._sandbox._box, f"handle {self.name}: its sandbox is gone, with everything in it"
        if box is None:
            return (gone,)
        unproven = f"handle {self.name}: that its processes are dead cannot be proven"
        try:
            with anyio.fail_after(PROOF_SEC):
                answer = await box.ask(f"ending handle {self.name}", {**self._asked("end"), "name": self.name})
        except Gone:
            return (gone,)
        except SandboxError as exc:
            raise QuietError(f"{unproven}: {exc}") from exc
        except TimeoutError as exc:
            raise QuietError(f"{unproven}: Daytona gave no answer for {PROOF_SEC:g} s") from exc
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
        """See `SandboxHandle.exec`.

        `user`: an agent is always the agent, also as root; a trusted handle is root unless `agent` is asked for.
        """
        box = self._require_open()
        argv, number = shell_words(command), secrets.token_hex(12)
        asked = self._start_of(argv, cwd, env, user) | {"do": "run", "id": number, "cap": self._sandbox.output_cap}
        asked |= {"stdin": False, "timeout": timeout_sec, "wait": WAIT_SEC}
        brought = []
        if isinstance(command, str) and len(command) > LONG_COMMAND:
            brought = [await box.bring(command.encode(errors="surrogateescape"))]
            asked |= {"argv": ["/bin/sh", "/proc/self/fd/3"], "script": posixpath.basename(brought[0])}
        what = f"running {argv[0]} in {asked['cwd']}"
        try:
            answer = await box.ask(what, asked, private=bool(env), brought=brought)
            while answer.get("running"):
                again = {"do": "run", "handle": self._id, "id": number, "wait": WAIT_SEC}
                answer = await box.ask(what, again)
        except asyncio.CancelledError:
            await self._kill(box, number)
            raise
        return _result(answer, command, timeout_sec)

    async def _kill(self, box: Box, number: str) -> None:
        """Nobody waits for this command any more."""
        with anyio.move_on_after(KILL_SEC, shield=True), contextlib.suppress(SandboxError):
            await box.ask("killing a command", {"do": "kill", "handle": self._id, "id": number})

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> Channel:
        """See `SandboxHandle.spawn`."""
        if isinstance(argv, str):
            raise SandboxError(f"spawn takes a list of arguments, not the string {argv!r}")
        box = self._require_open()
        asked = self._start_of(argv, cwd, env, None) | {"stdin": True}
        channel = Channel(box, self._id, self._sandbox.channel, f"{asked['argv'][0]} in {asked['cwd']}")
        await channel.start(asked)
        self._channels.append(channel)
        return channel

    async def read_file(self, path: str) -> bytes:
        """See `SandboxHandle.read_file`."""
        box, number = self._require_open(), secrets.token_hex(12)
        answer = await box.ask(f"reading {path}", self._asked("read") | {"path": self._path(path), "id": number})
        if "data" in answer:
            return base64.b64decode(answer["data"])
        data: bytes = await self._sandbox._fetched(answer["file"], Path.read_bytes)
        return data

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `SandboxHandle.write_file`. A link at `path` is replaced, not followed."""
        box = self._require_open()
        source = await box.bring(bytes(data))
        asked = self._asked("write") | {"path": self._path(path), "source": source, "mode": mode & 0o777}
        await box.ask(f"writing {path}", asked, brought=[source])

    # --- parts ---

    def _asked(self, do: str) -> dict[str, Any]:
        return {"do": do, "handle": self._id, "trusted": self.trusted, "token": self._token}

    def _start_of(
        self, argv: Sequence[str], cwd: str | None, env: Mapping[str, str] | None, user: str | None
    ) -> dict[str, Any]:
        """The request for a process."""
        if user not in {None, "agent", "root", "0", str(keeper.AGENT_UID)}:
            raise SandboxError(f"there is no user {user} in a Daytona sandbox: agents are agent, we are root")
        agent = not self.trusted or user in {"agent", str(keeper.AGENT_UID)}
        asked = self._asked("attach") | {"argv": [str(word) for word in argv], "user": "agent" if agent else "root"}
        return asked | {"cwd": self._path(cwd or ""), "given": dict(env or {})}

    def _path(self, path: str) -> str:
        return posixpath.join(self._sandbox.cwd, path)

    def _require_open(self) -> Box:
        box = self._sandbox._require_up()
        if self._phase == "ended":
            raise HandleRevoked(f"handle {self.name} of sandbox {self._sandbox.name} has ended")
        if self._phase == "new":
            raise SandboxError(f"handle {self.name} of sandbox {self._sandbox.name} is not open; await open() first")
        return box


def _result(answer: Mapping[str, Any], command: str | Sequence[str], timeout_sec: float | None) -> ExecResult:
    """What a command did, from what PID 1 of its handle kept."""
    out, err = (_text(answer[name]) for name in ("stdout", "stderr"))
    if answer["outlasted"]:
        shown = command if isinstance(command, str) else " ".join(command)
        said = f"command outlasted its {timeout_sec} s and was ended: {shown:.200}"
        raise ExecTimeout(said, stdout=out, stderr=err)
    cut = any(answer[name]["cut"] for name in ("stdout", "stderr"))
    return ExecResult(out, err, answer["code"], truncated=cut)


def _text(kept: Mapping[str, Any]) -> str:
    head, tail = (base64.b64decode(kept[name]) for name in ("head", "tail"))
    if not kept["cut"]:
        return (head + tail).decode(errors="replace")
    note = f"\n[... {kept['cut']} bytes of output were cut here ...]\n"
    return head.decode(errors="replace") + note + tail.decode(errors="replace")


# --- the sandbox ---


@attrs.define(eq=False)
class DaytonaSandbox:
    """A `Sandbox` at the Daytona service. Made by `make`; nothing exists until `start`."""

    spec: SandboxSpec
    _key: str = attrs.field(repr=False)
    api_url: str = attrs.field(repr=False)
    output_cap: int = OUTPUT_CAP
    gateway_url: str | None = None
    has_environment: bool = attrs.field(init=False)
    _phase: Literal["new", "up", "detached", "stopped"] = attrs.field(default="new", init=False)
    _lock: anyio.Lock = attrs.field(factory=anyio.Lock, init=False)
    _service: Service | None = attrs.field(default=None, init=False)
    _creating: asyncio.Task[Box] | None = attrs.field(default=None, init=False)
    _box: Box | None = attrs.field(default=None, init=False)
    _build_log: list[str] = attrs.field(factory=list, init=False)
    _handles: dict[tuple[str, bool], DaytonaHandle] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        """It has the task's environment where it runs an image made for it."""
        self.has_environment = bool(self.spec.options.get("snapshot") or self.spec.image or self.spec.build)

    @property
    def name(self) -> str:
        """See `Sandbox.name`."""
        return self.spec.name

    @property
    def cwd(self) -> str:
        """See `Sandbox.cwd`."""
        return self.spec.cwd

    @property
    def channel(self) -> str:
        """What carries bytes: `session` or `pty`."""
        return self.spec.options.get("channel", "session")

    # --- life ---

    async def start(self) -> Mapping[str, Any]:
        """See `Sandbox.start`. Idempotent. Raises `SandboxError` with what the service said; `ConfigError` on trio."""
        async with self._lock:
            if self._phase in {"detached", "stopped"}:
                raise SandboxError(f"sandbox {self.name} was {self._phase}; make a new one")
            if self._phase == "new":
                self._box = await self._made()
                await self._furnish(self._box)
                self._phase = "up"
            assert self._box is not None
        about = {"kind": "daytona", "name": self.name, "id": self._box.remote.id, "api_url": self.api_url}
        return {**about, "cwd": self.cwd, "python": self._box.python}

    async def _made(self) -> Box:
        """A sandbox at the service. A start that failed is gone on with, over the connection that it had."""
        if self._service is None:
            self._service = await Service.connect(self._key, self.api_url, self.spec.options.get("target"))
        if self._creating is None or _has_failed(self._creating):
            await self._service.reach(self.name)
            # In a task of its own: a creation that is cancelled half-way leaves a sandbox that nobody knows.
            self._creating = asyncio.get_running_loop().create_task(self._create(self._service))
        return await asyncio.shield(self._creating)

    async def attach(self, handle: Mapping[str, Any]) -> tuple[str, ...]:
        """See `states.ports.Attachable`. The sandbox lives on from now for as long as a new one would."""
        async with self._lock:
            if self._phase != "new" or self._service is not None:
                raise SandboxError(f"sandbox {self.name} was started already: it cannot be attached to another one")
            self.api_url = handle["api_url"]
            service = await Service.connect(self._key, self.api_url, None)
            try:
                box = self._set_up(await service.get(handle["id"], handle["name"]))
                evidence = await self._take_over(box)
            except BaseException:
                await service.close()
                raise
            self._service, self._box, self._phase = service, box, "up"
        return evidence

    async def _take_over(self, box: Box) -> tuple[str, ...]:
        """End what whoever had it before had started, with a program of ours, and bring what our agents need."""
        await box.upload(inside_files(box.library))
        found = await _emptied(box)
        if self.spec.ttl_sec is not None:
            await box.steadily("setting its time to live", lambda: box.remote.set_ttl(_minutes(self.spec)))
        for path in _outermost(self.spec.binds):
            if path not in found["binds"]:
                await self._bring(box, path)
        return tuple(found["evidence"])

    def _set_up(self, box: Box) -> Box:
        box.python = self.spec.options.get("python", "python3")
        box.lost = self.spec.lost
        return box

    async def _create(self, service: Service) -> Box:
        recipe = await anyio.to_thread.run_sync(_Recipe.of, self.spec)
        try:
            box = await service.create(self.name, recipe.params, self._build_log.append)
        except SandboxError as exc:
            tail = "\n".join("\n".join(self._build_log).splitlines()[-20:])
            raise SandboxError(f"{exc}\nthe build's log ended:\n{tail}" if tail else str(exc)) from exc
        finally:
            recipe.close()
        for note in dict.fromkeys(recipe.notes):
            self.spec.note(note)
        return self._set_up(box)

    async def _furnish(self, box: Box) -> None:
        """Bring our own program in, and the agents."""
        await box.upload(inside_files(box.library))
        agent = self.spec.options.get("user", "agent")
        asked = {"do": "start", "cwd": self.cwd, "inner": self.spec.network in CLOSED, "agent": agent}
        found = await box.ask("setting it up", asked)
        if agent == "agent" and not found["agent_uid"]:
            self.spec.note(f"sandbox {self.name} knows one user only: agents are root of it, without privileges")
        for path in _outermost(self.spec.binds):
            await self._bring(box, path)

    async def _bring(self, box: Box, path: str) -> None:
        """Show a folder of this host in every handle, at its own path."""
        if self.spec.options.get("agents") == "present":
            await box.ask(f"looking for {path}", {"do": "bind", "path": path})
            return
        with tempfile.TemporaryDirectory(prefix="rollout-upload-") as scratch:
            archive = Path(scratch, "folder.tar")
            left_here = _unneeded(Path(path))
            if await anyio.to_thread.run_sync(lambda: _archives.pack(Path(path), archive, without=left_here)):
                raise SandboxError(f"sandbox {self.name} cannot show {path}: it is a file, not a folder")
            size = archive.stat().st_size  # noqa: ASYNC240 - one call
            self.spec.note(f"uploading {path} to sandbox {self.name}: {math.ceil(size / MB)} MB")
            there = await box.bring(archive)
        asked = {"do": "bind", "path": path, "archive": there}
        await box.ask(f"unpacking {path}", asked, sec=600, brought=[there])

    async def stop(self) -> None:
        """See `Sandbox.stop`. Bounded; what the service does not give back by then is its time to live's."""
        async with self._lock:
            if self._phase == "detached":
                await reap({"name": self.name, "api_url": self.api_url})
            elif self._service is not None and self._phase != "stopped":
                with anyio.CancelScope(shield=True):
                    await self._give_back(self._service)
            self._phase = "stopped"

    async def _give_back(self, service: Service) -> None:
        """Delete it, let go of what was said over its channels, and of the service."""
        try:
            with anyio.fail_after(STOP_SEC):
                if self._box is None and self._creating is not None:
                    await self._end_creation(service, self._creating)
                if self._box is not None:
                    await service.delete(self._box.remote, self.name)
            self._box = None
        except TimeoutError as exc:
            raise SandboxError(f"sandbox {self.name} was not given back within {STOP_SEC:g} s") from exc
        finally:
            await self._let_go(service)

    async def leave(self) -> None:
        """See `Keepable.leave`. It stays up, with nothing of ours in it, for its time to live; no sweep takes it."""
        async with self._lock:
            if self._phase == "up" and self._service is not None and self._box is not None:
                remote, evidence = self._box.remote, ()
                try:
                    labels = {**remote.labels, KEPT: "yes"}
                    await self._box.steadily("marking it as kept", lambda: remote.set_labels(labels))
                    evidence = tuple((await _emptied(self._box))["evidence"])
                finally:
                    with anyio.CancelScope(shield=True):
                        await self._let_go(self._service, evidence)
            self._phase = "stopped"

    async def detach(self) -> None:
        """See `states.ports.Detachable`. The service is asked for nothing but the end of our channels' sessions."""
        async with self._lock:
            if self._service is not None and self._phase != "stopped":
                with anyio.CancelScope(shield=True):
                    if self._creating is not None:
                        self._creating.cancel()
                        await asyncio.gather(self._creating, return_exceptions=True)
                    await self._let_go(self._service)
                self._service, self._phase = None, "detached"

    async def _let_go(self, service: Service, evidence: tuple[str, ...] = ()) -> None:
        self._phase = "stopped"
        for handle in self._handles.values():
            await handle.let_go(evidence)
        await service.close()

    async def _end_creation(self, service: Service, creating: asyncio.Task[Box]) -> None:
        """A creation whose end nobody awaited: delete what it makes as soon as the service knows of it."""
        while not creating.done():
            for found in await service.find({LABEL: self.name}):
                await service.delete(found, self.name)
                creating.cancel()
            await asyncio.wait([creating], timeout=0.25)
        if not creating.cancelled() and creating.exception() is None:
            self._box = creating.result()
        else:
            for found in await service.find({LABEL: self.name}):
                await service.delete(found, self.name)

    # --- use ---

    def handle(self, name: str, *, trusted: bool = False) -> DaytonaHandle:
        """See `Sandbox.handle`. The same name gives the same handle until it ends; a later one finds its HOME again."""
        handle = self._handles.get((name, trusted))
        if handle is None or handle._phase == "ended":
            handle = self._handles[name, trusted] = DaytonaHandle(name, trusted, self)
        return handle

    async def upload(self, source: Path, target: str) -> None:
        """See `Sandbox.upload`. Two calls, however many files. Links are copied as links, devices left out."""
        box = self._require_up()
        with tempfile.TemporaryDirectory(prefix="rollout-upload-") as scratch:
            archive = Path(scratch, "files.tar")
            name = await anyio.to_thread.run_sync(_archives.pack, source, archive)
            there = await box.bring(archive)
        asked = {"do": "unpack", "archive": there, "name": name, "path": posixpath.join(self.cwd, target)}
        await box.ask(f"uploading {source} to {target}", asked, sec=600, brought=[there])

    async def download(self, source: str, target: Path) -> None:
        """See `Sandbox.download`. In a folder, links that could lead out of it are left out, as are devices."""
        box, path = self._require_up(), posixpath.join(self.cwd, source)
        asked = {"do": "pack", "path": path, "id": secrets.token_hex(12)}
        answer = await box.ask(f"downloading {source}", asked, sec=600)
        name = posixpath.basename(path.rstrip("/")) if answer["kind"] == "file" else ""
        await self._fetched(answer["file"], lambda archive: _archives.unpack(archive, target, name=name))

    async def _fetched(self, path: str, use: Any) -> Any:
        """Bring one file home, which is not needed there any more, and use it in a thread."""
        box = self._require_up()
        with tempfile.TemporaryDirectory(prefix="rollout-download-") as scratch:
            here = Path(scratch, "file")
            try:
                await box.download(path, here)
            finally:
                box.unneeded.add(path)
            return await anyio.to_thread.run_sync(use, here)

    def _require_up(self) -> Box:
        if self._phase != "up" or self._box is None:
            raise SandboxError(f"sandbox {self.name} {'is not started' if self._phase == 'new' else 'was stopped'}")
        return self._box


async def _emptied(box: Box) -> Any:
    """End everything in it that was started through a handle. Raises `QuietError` when something outlives that."""
    return await box.ask("ending what was started in it", {"do": "empty"})


def _has_failed(creating: asyncio.Task[Box]) -> bool:
    return creating.done() and (creating.cancelled() or creating.exception() is not None)


def _minutes(spec: SandboxSpec) -> int:
    """Its time to live, as the service counts."""
    return max(1, math.ceil((spec.ttl_sec or DEFAULT_TTL_SEC) / 60))


def _unneeded(folder: Path) -> list[str]:
    """What stays here of an interpreter: agents have environments of their own, so not the packages of this one."""
    if (folder / "pyvenv.cfg").exists() or not (folder / "bin").is_dir():
        return []
    found = [path for name in ("site-packages", "test", "config-*") for path in folder.glob(f"lib/python3.*/{name}")]
    return [path.relative_to(folder).as_posix() for path in found]


def _outermost(binds: Sequence[str]) -> list[str]:
    """The folders among `binds` that no other one holds."""
    return [path for path in binds if not any(path.startswith(f"{other}/") for other in binds)]


# --- what it is made from ---


@attrs.define(eq=False)
class _Recipe:
    """The parameters of a creation, and what is to be said about them."""

    spec: SandboxSpec
    notes: list[str] = attrs.field(factory=list)
    image: Any = None
    _folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def of(cls, spec: SandboxSpec) -> _Recipe:
        """Read what has to be read. Blocks. Raises `SandboxError` for a Dockerfile that the SDK cannot make use of."""
        from orchestrator.sandboxes._daytona_service import sdk

        recipe = cls(spec)
        if spec.options.get("snapshot"):
            if spec.cpus or spec.memory_mb or spec.storage_mb or spec.gpus:
                recipe.notes.append("a snapshot has its own resources: the limits that were asked for are not set")
        elif spec.image:
            recipe.image = mapped(spec.image, spec.image_map, recipe.notes.append)
        elif spec.build:
            try:
                recipe.image = sdk().Image.from_dockerfile(recipe._dockerfile(spec.build))
            except (sdk().DaytonaError, OSError) as exc:
                raise SandboxError(f"the Dockerfile in {spec.build} cannot be used: {exc}") from exc
        elif spec.cpus or spec.memory_mb or spec.storage_mb or spec.gpus:
            recipe.notes.append(
                "the default snapshot has its own resources: the limits that were asked for are not set"
            )
        if spec.pids:
            recipe.notes.append("Daytona has no limit on processes: the one that was asked for is not set")
        return recipe

    def _dockerfile(self, build: Path) -> str:
        """The Dockerfile, or a copy of its folder in which images are replaced."""
        text = (build / "Dockerfile").read_text(encoding="utf-8", errors="surrogateescape")
        changed, _ = map_bases(text, self.spec.image_map, self.notes.append, build / "Dockerfile")
        if changed == text:
            return str(build / "Dockerfile")
        self._folder = tempfile.TemporaryDirectory(prefix="rollout-build-")
        place = Path(self._folder.name, "build")
        shutil.copytree(build, place, symlinks=True, copy_function=_linked)
        (place / "Dockerfile").unlink()
        (place / "Dockerfile").write_text(changed, encoding="utf-8", errors="surrogateescape")
        return str(place / "Dockerfile")

    def params(self) -> Any:
        """The parameters, made anew: the SDK writes into the labels."""
        from orchestrator.sandboxes._daytona_service import sdk

        daytona, spec = sdk(), self.spec
        common: dict[str, Any] = {
            "name": spec.name,
            "labels": {**spec.labels, **MADE_BY, LABEL: spec.name},
            "ttl_minutes": _minutes(spec),
            "auto_stop_interval": 0,  # an agent that thinks is not idle
            "ephemeral": True,  # what is stopped is deleted
            "network_block_all": spec.network in CLOSED,
        }
        if self.image is None:
            return daytona.CreateSandboxFromSnapshotParams(snapshot=spec.options.get("snapshot"), **common)
        resources = daytona.Resources(
            cpu=_whole(spec.cpus), memory=_gib(spec.memory_mb), disk=_gib(spec.storage_mb), gpu=spec.gpus
        )
        return daytona.CreateSandboxFromImageParams(image=self.image, resources=resources, **common)

    def close(self) -> None:
        """Give its folder back."""
        if self._folder is not None:
            self._folder.cleanup()


def _linked(source: str, target: str) -> str:
    """The same file, where the file system allows that: a build's folder may be large."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def _whole(number: float | None) -> int | None:
    return None if number is None else math.ceil(number)


def _gib(megabytes: int | None) -> int | None:
    return None if megabytes is None else math.ceil(megabytes / 1024)


# --- what was kept, and giving back what a dead orchestrator left ---


async def reopen(handle: Mapping[str, Any]) -> DaytonaSandbox:
    """A sandbox that was kept, for a look inside; `leave` it then. Raises `SandboxError` when it is gone."""
    options = {"python": handle["python"]}
    sandbox = make(SandboxSpec("daytona", handle["name"], cwd=handle["cwd"], options=options))
    await sandbox.attach(handle)
    return sandbox


async def reap(handle: Mapping[str, Any]) -> None:
    """Give back a sandbox whose orchestrator died, by what `start` returned, or would have: its `name`. Idempotent.

    Raises:
        ConfigError: There is no key.
        SandboxError: The service does not give it back; says why.
    """
    key, url = access()
    service = await Service.connect(key, handle.get("api_url") or url, None)
    try:
        for found in await service.find({LABEL: handle["name"], **MADE_BY}):
            await service.delete(found, handle["name"])
    finally:
        await service.close()


async def sweep(options: Mapping[str, str]) -> tuple[str, ...]:
    """Delete what dead orchestrators of this host left; where the option `owner` names one, all of it but the living.

    What somebody living has is left alone, whoever made it, and so is what was kept, and all that we did not make.
    """
    from orchestrator.owners import give_back_each, left_behind

    service = await Service.connect(*access(), options.get("target"))
    owner = options.get("owner") or socket.gethostname()

    async def delete(found: Any) -> str:
        name, pid = found.labels.get(LABEL, found.id), found.labels.get("owner-pid", "?")
        await service.delete(found, name)
        return f"sandbox {name} was deleted: process {pid} of {owner}, which made it, is dead"

    try:
        known = [found for found in await service.find({**MADE_BY, "owner-host": owner}) if KEPT not in found.labels]
        return await give_back_each(
            (left_behind(found.labels, unknown=bool(options.get("owner"))), functools.partial(delete, found))
            for found in known
        )
    finally:
        await service.close()
