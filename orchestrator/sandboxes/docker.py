"""The Docker sandbox: a container of an engine on this machine, spoken to over the engine's API. asyncio only.

The engine makes the container and removes it. All that is between goes over a socket that is bound into the container,
to a PID 1 of ours (`container.py`): commands get ready-made pipes, files are copied between open folders, a handle is
a PID and mount namespace of its own. So a rollout costs the same few engine calls however many steps and files it has,
and a role's end is proven as in the local sandbox: its namespace is gone. What a handle sees:

    the image's own files    with all that was written to them so far
    /app                     (the sandbox's `cwd`) and /logs/agent: the agents' own, shared by all handles
    /home/agent /tmp         one per handle, for agents
    /tests /solution /logs/verifier     only in trusted handles, which are root, as the tests of images expect
    127.0.0.1:PORT           the model gateway, where there is one

Agents are the user `agent`, without capabilities and without a way to get any; one that asks for `user="root"` gets
this user. With the option `user=root` agents are root, with Docker's own capabilities and no more, and still in their
namespace. The image's ENTRYPOINT is started beside: the task's services are nobody's handle, and outlive each.

    sandbox = DockerSandbox(name="r1", image="debian:stable-slim")
    await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    result = await handle.exec("echo hello > greeting.txt")
    await handle.end()
    await sandbox.download("/app/greeting.txt", Path("greeting.txt"))
    await sandbox.stop()
"""
# A handle and its sandbox are one part in two classes.
# ruff: noqa: SLF001

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import posixpath
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import anyio
import anyio.to_thread
import attrs
from aiodocker.exceptions import DockerError

from orchestrator._tasks import Detached, first_of
from orchestrator.install import locked
from orchestrator.sandboxes import Network, SandboxSpec, container
from orchestrator.sandboxes._docker_engine import Engine, EngineError, check_engine
from orchestrator.sandboxes._docker_image import Image, find_image, given_lock, given_tag, inspected
from orchestrator.sandboxes._docker_kit import IDLE, Kit, make_kit
from orchestrator.sandboxes._files import open_source, open_target
from orchestrator.sandboxes._gateway import GatewayReach
from orchestrator.sandboxes._limits import Limits, check_memory
from orchestrator.sandboxes._names import file_name
from orchestrator.sandboxes._pipes import Messages
from orchestrator.sandboxes._process import Channel, Request, Started, run
from states.errors import ConfigError, HandleRevoked, PathEscape, QuietError, SandboxError
from states.ports import ExecResult

__all__ = ["OPTIONS", "DockerHandle", "DockerSandbox", "GatewayReach", "Limits", "make", "reap", "sweep"]

T = TypeVar("T")

OPTIONS: Final[Mapping[str, str]] = {
    "engine": "the engine, as unix:///PATH; by default that of DOCKER_HOST, of the current context, or a usual socket",
    "user": "who agents are: agent (the default, made where the image has none), root, or a user of the image",
}

CREATE_SEC: Final = 120.0
"""How long the engine may take to answer that it made a container: many at once wait for each other."""

UNDO_SEC: Final = 60.0
START_SEC: Final = 60.0
OPEN_SEC: Final = 20.0
END_SEC: Final = 15.0
"""How long the kernel may take to end everything after SIGKILL."""

REMOVE_SEC: Final = 20.0

LABEL: Final = "rollout-orchestrator."
"""What the names of our labels begin with."""

SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NETWORKS: Final[Mapping[str, str]] = {
    "gateway-only": "none",
    "none": "none",
    "bridge": "bridge",
    "host": "host",
}
"""The engine's word for each of ours. Never a network of a rollout's own: an engine has room for about thirty."""

CAPABILITIES: Final = (
    *("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "NET_BIND_SERVICE"),
    *("NET_RAW", "SYS_CHROOT", "MKNOD", "AUDIT_WRITE", "SETFCAP"),
    *("SYS_ADMIN", "SYS_PTRACE"),
)
"""Docker's default, and what PID 1 keeps to itself: to make namespaces, and to see who is in them."""


@attrs.define(eq=False)
class DockerHandle:
    """The `SandboxHandle` of a `DockerSandbox`. Made by `DockerSandbox.handle`."""

    name: str
    trusted: bool
    _sandbox: DockerSandbox
    _lock: anyio.Lock = attrs.field(factory=anyio.Lock)
    _phase: Literal["new", "open", "ended"] = "new"
    _process: Started | None = None
    _control: Messages | None = None
    _channels: list[Channel] = attrs.field(factory=list)
    _evidence: tuple[str, ...] = ()

    # --- life ---

    async def open(self) -> None:
        """See `SandboxHandle.open`."""
        async with self._lock:
            if self._phase == "open":
                return
            if self._phase == "ended":
                raise HandleRevoked(f"handle {self.name} of sandbox {self._sandbox.name} has ended; make a new one")
            try:
                with anyio.fail_after(OPEN_SEC):
                    await self._come_up(self._sandbox._require_up())
            except TimeoutError as exc:
                await self._put_down()
                raise SandboxError(f"handle {self.name} did not come up in {OPEN_SEC:.0f} s") from exc
            except BaseException:
                await self._put_down()
                raise
            self._phase = "open"

    async def _come_up(self, outside: Messages) -> None:
        self._control, theirs = Messages.pair()
        with theirs:
            words = {"do": "handle", "name": self.name, "trusted": self.trusted, "folder": self._folder}
            wanted = Request(("handle",), {}, "/", words)
            with anyio.move_on_after(OPEN_SEC, shield=True):  # a word and its answer: what was begun can be ended
                self._process = await Started.launch(outside, wanted, {"control": theirs.fileno()})
        if self._process is None:
            raise TimeoutError
        answer = await self._control.receive()
        if answer != b"ready":
            why = answer.decode(errors="replace").removeprefix("error ") or "the container ended"
            raise SandboxError(f"handle {self.name} of sandbox {self._sandbox.name} did not come up: {why}")

    async def end(self) -> tuple[str, ...]:
        """See `SandboxHandle.end`."""
        async with self._lock:
            if self._phase == "new":
                self._evidence = (f"handle {self.name} was never opened: nothing was started through it",)
            elif self._phase == "open":
                self._evidence = await self._put_down()
            self._phase = "ended"
            return self._evidence

    async def _put_down(self) -> tuple[str, ...]:
        """Kill everything and give back what we held for it; returns the proof. Raises `QuietError` without one."""
        evidence: tuple[str, ...] = ()
        with anyio.CancelScope(shield=True):
            if self._process is not None:
                evidence = await self._killed(self._process)
        self._let_go()
        return evidence

    async def _killed(self, process: Started) -> tuple[str, ...]:
        process.kill()
        with anyio.move_on_after(END_SEC):
            await process.exit()
        if process.code is None:
            raise QuietError(
                f"handle {self.name}: PID 1 of its namespace is still there {END_SEC:.0f} s after SIGKILL; something "
                "in it hangs in the kernel"
            )
        if not process.reason.startswith(container.PROOF):
            return await self._sandbox._proof_of_death(self.name)
        _, pid, space, looked_at, left = process.reason.split()
        if left != "0":
            raise QuietError(f"handle {self.name}: {left} processes are still in its PID namespace {space}")
        return (
            f"PID 1 of handle {self.name}'s PID namespace (pid {pid} here) was killed and is gone",
            f"none of {looked_at} processes is in PID namespace {space}",
        )

    def _let_go(self) -> None:
        for channel in self._channels:
            channel.release()
        self._channels.clear()
        for end in (self._control, self._process):
            if end is not None:
                end.close()
        self._control = self._process = None

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
        """See `SandboxHandle.exec`. `user`: in a trusted handle any user of the image; an agent has only its own."""
        control = self._require_open()
        request = Request.of(command, self._env(env), self._cwd(cwd), user=self._user(user))
        return await run(control, request, cap=self._sandbox.output_cap, timeout_sec=timeout_sec)

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> Channel:
        """See `SandboxHandle.spawn`."""
        if isinstance(argv, str):
            raise SandboxError(f"spawn takes a list of arguments, not the string {argv!r}")
        request = Request.of(argv, self._env(env), self._cwd(cwd), user="")
        channel = await Channel.open(self._require_open(), request)
        self._channels.append(channel)
        return channel

    async def read_file(self, path: str) -> bytes:
        """See `SandboxHandle.read_file`."""
        return await ask(self._require_open(), "read", path=posixpath.join(self._sandbox.cwd, path))

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `SandboxHandle.write_file`. A link at `path` is replaced, not followed."""
        control = self._require_open()
        with memory_file(data) as fd:
            await ask(control, "write", {"data": fd}, path=posixpath.join(self._sandbox.cwd, path), mode=mode)

    # --- parts ---

    @property
    def _folder(self) -> str:
        return f"{'trusted' if self.trusted else 'agent'}-{file_name(self.name)}"

    def _user(self, user: str | None) -> str:
        """Who is asked for, "" for the handle's own user; an agent's root is the agent."""
        own = {None, "", "root", "0"} if self.trusted else {None, "", "root", "0", "1000", self._sandbox.user}
        return "" if user in own else str(user)

    def _env(self, env: Mapping[str, str] | None) -> dict[str, str]:
        root = self.trusted or self._sandbox.user == "root"
        name, home = ("root", "/root") if root else (self._sandbox.user, container.HOME)
        own = {"HOME": home, "USER": name, "LOGNAME": name, "SHELL": "/bin/sh", "TMPDIR": container.TMP}
        return {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8"} | self._sandbox._image_env | own | dict(env or {})

    def _cwd(self, cwd: str | None) -> str:
        return posixpath.join(self._sandbox.cwd, cwd or "")

    def _require_open(self) -> Messages:
        if self._phase == "ended":
            raise HandleRevoked(f"handle {self.name} of sandbox {self._sandbox.name} has ended")
        if self._control is None or self._phase == "new":
            raise SandboxError(f"handle {self.name} of sandbox {self._sandbox.name} is not open; await open() first")
        return self._control


@attrs.define(eq=False, kw_only=True)
class DockerSandbox:
    """A `Sandbox` in a container of a Docker engine on this machine. Nothing happens until `start`.

    Attributes:
        name: The container's name, chosen by the caller, so that it can be journaled before anything exists.
        image: A prebuilt image, pulled where it is not there.
        build: A folder with a Dockerfile, where there is no `image`; built once for all who want the same.
        image_map: Images that stand for others, which cannot be had here.
        engine: The engine's URL, `unix:///PATH`; None: of DOCKER_HOST, of the current context, or a usual socket.
        user: Who agents are: `agent`, made where the image has none, `root`, or a user of the image.
        gateway: Where the model gateway is, None without one.
        network: `gateway-only`: the gateway on loopback and nothing else. `bridge`: the engine's bridge as well.
            `host`: the host's network. `none`: not even the gateway.
        limits: What it may use; see `unenforced` for what is not kept.
        gpus: Graphics processors; None asks for none.
        binds: Folders of the host that every handle sees, read-only: (host path, path in the sandbox).
        labels: What is written on the container.
        cwd: Where tasks work; shared by all handles, and where commands start.
        root: A folder of the host for the control socket; made by `start`, removed by `stop`.
        output_cap: Bytes that `exec` keeps of stdout, and of stderr.
        note: Is told what is worth knowing: an image that was built or mapped.
        lost: Is told why, when the container or its engine goes away by itself.
        gateway_url: The gateway's base URL as seen from inside; None without one.
        engine_calls: How many requests the engine got so far.
    """

    name: str
    image: str | None = None
    build: Path | None = None
    image_map: Mapping[str, str] = attrs.field(factory=dict)
    engine: str | None = None
    user: str = "agent"
    gateway: GatewayReach | None = None
    network: Network = "gateway-only"
    limits: Limits = attrs.field(factory=Limits)
    gpus: int | None = None
    binds: tuple[tuple[Path, str], ...] = ()
    labels: Mapping[str, str] = attrs.field(factory=dict)
    cwd: str = "/app"
    root: Path = attrs.field()
    output_cap: int = 1 << 20
    note: Callable[[str], None] = lambda _text: None
    lost: Callable[[str], None] = lambda _why: None
    gateway_url: str | None = attrs.field(init=False)
    has_environment: bool = attrs.field(init=False)
    _phase: Literal["new", "up", "stopped"] = attrs.field(default="new", init=False)
    _handles: dict[tuple[str, bool], DockerHandle] = attrs.field(factory=dict, init=False)
    _lock: anyio.Lock = attrs.field(factory=anyio.Lock, init=False)
    _engine: Engine | None = attrs.field(default=None, init=False)
    _control: Messages | None = attrs.field(default=None, init=False)
    _id: str = attrs.field(default="", init=False)
    _pidfd: int = attrs.field(default=-1, init=False)
    """PID 1 of the container: readable once it and all in its namespace are gone."""
    _watch: Detached[None] | None = attrs.field(default=None, init=False)
    _image_env: dict[str, str] = attrs.field(factory=dict, init=False)

    @root.default
    def _default_root(self) -> Path:
        return Path(tempfile.gettempdir()) / self.name

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot work, before anything exists."""
        self.gateway_url = f"http://127.0.0.1:{self.gateway.port}" if self.gateway and self.network != "none" else None
        self.has_environment = self.image is None or self.build is not None
        if self.image is None and self.build is None:
            raise ConfigError(
                "a docker sandbox needs an image: the task brings no environment/Dockerfile and names none; give "
                "--image"
            )
        if self.network not in NETWORKS:
            raise ConfigError(f"network of a docker sandbox is {', '.join(NETWORKS)}, not {self.network!r}")
        for what, path in (("cwd", self.cwd), *(("binds", inside) for _, inside in self.binds)):
            if not path.startswith("/") or posixpath.normpath(path) != path or path == "/":
                raise ConfigError(f"{what} of a docker sandbox must be a clean absolute path below /, not {path!r}")

    @property
    def engine_calls(self) -> int:
        """How many requests the engine got so far."""
        return self._engine.calls if self._engine else 0

    @property
    def unenforced(self) -> tuple[str, ...]:
        """The limits that are not kept to the letter, as sentences."""
        if self.limits.disk_mb is None:
            return ()
        places = ", ".join((*self._shared, container.HOME, container.TMP))
        return (f"disk: only what agents have in {places} is counted, every half second; not what is elsewhere",)

    # --- up and down ---

    async def start(self) -> Mapping[str, Any]:
        """See `Sandbox.start`. Idempotent. Raises `ConfigError` on a loop other than asyncio's."""
        async with self._lock:
            if self._phase == "stopped":
                raise SandboxError(f"sandbox {self.name} was stopped; make a new one")
            if self._phase == "new":
                kit = await anyio.to_thread.run_sync(self._make_root)
                async with self._or_nothing():
                    await self._make(kit)
            engine = self._engine.url if self._engine else ""
        return {
            "kind": "docker",
            "name": self.name,
            "container": self._id,
            "engine": engine,
            "root": str(self.root),
            "cwd": self.cwd,
            "user": self.user,
        }

    async def attach(self, handle: Mapping[str, Any]) -> tuple[str, ...]:
        """Take over the container that a `start` of another process returned: its files, and nothing that ran in it.

        Returns how that is known. Raises `SandboxError` where it is gone, and then it is left as it is.
        """
        async with self._lock:
            if self._phase != "new":
                raise SandboxError(f"sandbox {self.name} was started already: it cannot be attached to another one")
            self._engine = engine = Engine.open(handle.get("engine"))
            self.root = Path(handle["root"])  # which the container has bound
            try:
                evidence = await self._take_over(engine, handle["container"])
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self._leave()
                raise
            self._phase = "up"
        return evidence

    async def _take_over(self, engine: Engine, container_id: str) -> tuple[str, ...]:
        what = f"container {self.name} cannot be had again"
        with engine.says(what) as docker, anyio.fail_after(REMOVE_SEC):
            old = docker.containers.container(container_id)
            found = await old.show()
            if found["State"]["Running"]:  # its PID 1 ends with its orchestrator, if that has not just happened
                with contextlib.suppress(DockerError):
                    await old.kill()
                await old.wait()
            named = (found["Config"]["Labels"] or {}).get(f"{LABEL}image", found["Image"])
            image = Image.of(await docker.images.inspect(named))
        self._image_env = dict(image.env)
        self._id = container_id
        await anyio.to_thread.run_sync(_remove_root, self.root)
        await anyio.to_thread.run_sync(self._make_root)
        await self._bring_up(engine, image)
        return (f"container {self.name} was not running: nothing that was started in it before is alive",)

    @contextlib.asynccontextmanager
    async def _or_nothing(self) -> AsyncIterator[None]:
        """What is begun here comes up, or leaves nothing."""
        try:
            yield
        except BaseException:
            # Why it did not come up is to be heard; what could not be removed `stop` tries again, and says so.
            with anyio.move_on_after(UNDO_SEC, shield=True), contextlib.suppress(SandboxError):
                await self._unmake()
            raise
        self._phase = "up"

    async def _make(self, kit: Kit) -> None:
        self._engine = engine = Engine.open(self.engine)
        image = await find_image(engine, image=self.image, build=self.build, image_map=self.image_map, note=self.note)
        self._image_env = dict(image.env)
        await self._refuse_gpus(engine)
        config = self._config(image, kit)
        try:
            await self._create(engine, config)
        except EngineError as exc:
            if exc.status != 404 or config["Image"] == image.id:
                raise
            await self._make_given(engine, {**config, "Image": image.id}, kit, config["Image"])
            await self._create(engine, config)
        await self._bring_up(engine, image)

    async def _make_given(self, engine: Engine, config: Mapping[str, Any], kit: Kit, tag: str) -> None:
        """Make the image in which the shared folders are the agents', while others that want the same wait.

        The container for that has our name and labels, so that whoever gives us back gives it back.
        """
        waits = f"waiting: {self.cwd} of the image is being made the agents' by another rollout"
        async with locked(given_lock(tag), lambda: self.note(waits)):
            if await inspected(engine, tag):
                return
            work = _doing(kit, f"give_for_good({list(self._shared)!r}, {self.user!r})")
            await self._create(engine, {**config, **work})
            with engine.says(f"the image {tag} cannot be made") as docker:
                made = docker.containers.container(self._id)
                await made.start()
                if (await made.wait())["StatusCode"] != container.GIVEN:
                    raise SandboxError(f"container {self.name} did not come up: {await self._printed()}")
                ours = {"Labels": dict.fromkeys(config["Labels"], "")}  # or the image would say that whose it is, too
                repository, _, name = tag.partition(":")
                await made.commit(repository=repository, tag=name, config=ours)
            await _remove(engine, self._id)
            self._id = ""

    async def _create(self, engine: Engine, config: Mapping[str, Any]) -> None:
        """Have the engine make the container. Who asked and heard no answer knows it by its name."""
        self._id = self.name
        with anyio.move_on_after(CREATE_SEC, shield=True) as bound:
            try:
                with engine.says(f"container {self.name} cannot be made") as docker:
                    self._id = (await docker.containers.create(config, name=self.name)).id
            except EngineError as exc:
                if exc.status:  # it refused: what has that name is not ours
                    self._id = ""
                raise
        if bound.cancelled_caught:
            raise SandboxError(f"container {self.name} cannot be made: no answer from {engine.url} in {CREATE_SEC:g} s")

    async def _bring_up(self, engine: Engine, image: Image) -> None:
        """Start the container, and tell its PID 1 what it is to be."""
        with self._listening() as listener:
            with engine.says(f"container {self.name} cannot be started") as docker:
                await docker.containers.container(self._id).start()
            self._watch = watch = Detached(self._watched, name=f"watch:{self.name}").start()
            try:
                with anyio.fail_after(START_SEC):
                    self._control = await first_of(lambda: _accepted(listener), lambda: self._too_early(watch))
                    with self._gateway_fd() as fds:
                        await self._control.send(marshal.dumps(self._settings(image)), fds)
                    answer, self._pidfd = await _answered(self._control)
            except TimeoutError as exc:
                raise SandboxError(
                    f"container {self.name} did not come up in {START_SEC:.0f} s{await self._log()}"
                ) from exc
        if answer != b"ready":
            why = answer.decode(errors="replace").removeprefix("error ") or "it ended"
            raise SandboxError(f"container {self.name} did not come up: {why}{await self._log()}")

    @contextlib.contextmanager
    def _gateway_fd(self) -> Iterator[list[int]]:
        """The gateway's socket, opened as a path: whoever has that can connect, wherever it is."""
        if self.gateway is None or not self._relays:
            yield []
            return
        fd = os.open(self.gateway.socket, os.O_PATH | os.O_CLOEXEC)
        try:
            yield [fd]
        finally:
            os.close(fd)

    async def _watched(self) -> None:
        """Wait for as long as the container lives, in one request. Its end, or the engine's, is everybody's."""
        assert self._engine is not None
        try:
            with self._engine.says(f"container {self.name}") as docker:
                ended = await docker.containers.container(self._id).wait()
            why = f"container {self.name} ended, with exit code {ended['StatusCode']}{await self._log()}"
        except EngineError as exc:
            why = str(exc)
        if self._control is not None:  # without an engine nobody could end what is in it: PID 1 does, when we hang up
            self._control.hang_up()
        if self._phase == "up":
            self.lost(why)
        raise SandboxError(why)

    async def _too_early(self, watch: Detached[None]) -> Messages:
        """Raise what the watch found, before anybody had connected."""
        await watch.wait()
        raise AssertionError("a watch ends with an error")

    async def _log(self) -> str:
        """The end of what the container printed, for an error."""
        try:
            text = await self._printed()
        except SandboxError as exc:
            return f" ({exc})"
        return f"; its log ends:\n{text}" if text else "; it printed nothing"

    async def _printed(self) -> str:
        assert self._engine is not None
        with self._engine.says("log") as docker:
            lines = await docker.containers.container(self._id).log(stdout=True, stderr=True, tail=20)
        return "".join(lines).strip()

    async def stop(self) -> None:
        """See `Sandbox.stop`. Raises `SandboxError` when the engine does not remove the container."""
        async with self._lock:
            if self._phase == "up" or self._id:  # a start that failed may have left what it could not remove
                await self._unmake()
            self._phase = "stopped"

    async def leave(self) -> None:
        """See `Keepable.leave`. The container is there, ended, for whoever attaches to it next."""
        async with self._lock:
            if self._phase == "up":
                self._keep()
                await self._leave()
            self._phase = "stopped"

    async def detach(self) -> None:
        """See `states.ports.Detachable`. PID 1 ends with us; the engine is asked nothing."""
        async with self._lock:
            if self._phase == "up":
                self._let_go()
                self._hang_up()
                if self._engine is not None:
                    await self._engine.close()
            self._phase = "stopped"

    def _keep(self) -> None:
        """When we hang up, that is as it should be: PID 1 ends with 0, and no sweep takes it for a dead one's."""
        self._require_up().tell(marshal.dumps({"do": "keep"}))

    async def _leave(self) -> None:
        self._let_go()
        self._hang_up()
        engine = self._engine
        if engine is not None:
            try:
                with engine.says(f"container {self.name}") as docker, anyio.move_on_after(REMOVE_SEC):
                    if self._id:
                        await docker.containers.container(self._id).wait()
            finally:
                self._id = ""  # it is nobody's here any more: a stop has nothing to give back
                await engine.close()
        await anyio.to_thread.run_sync(_remove_root, self.root)

    def _let_go(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        for handle in self._handles.values():
            handle._let_go()
            handle._phase = "ended"

    async def _unmake(self) -> None:
        """Close our side, and have the engine kill and remove what there is."""
        self._let_go()
        try:
            if self._id and self._engine is not None:
                if self._engine.closed:  # a stop before this one could not do it
                    self._engine = Engine.open(self._engine.url)
                await (
                    _remove(self._engine, self._id) if self._id != self.name else _remove_ours(self._engine, self._id)
                )
                self._id = ""
        finally:
            self._hang_up()
            if self._engine is not None:
                await self._engine.close()
        await anyio.to_thread.run_sync(_remove_root, self.root)

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    # --- what it is made of ---

    def _make_root(self) -> Kit:
        for host, inside in self.binds:
            if not Path(host).exists():
                raise SandboxError(f"sandbox {self.name} cannot bind {host} at {inside}: it does not exist")
            if self.user != "root" and not Path(host).stat().st_mode & 0o004:
                raise SandboxError(f"sandbox {self.name} cannot bind {host}: only its owner may read it (chmod o+rX)")
        if self.gateway is not None and self._relays:
            self.gateway.admit_all()
        try:
            self.root.mkdir(mode=0o700, parents=True)
        except FileExistsError as exc:
            raise SandboxError(f"cannot start sandbox {self.name}: its folder {self.root} exists") from exc
        return make_kit()

    @property
    def _relays(self) -> bool:
        return self.gateway is not None and self.network in ("gateway-only", "bridge")

    @property
    def _shared(self) -> tuple[str, ...]:
        return (self.cwd, "/logs/agent")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[socket.socket]:
        """The socket that PID 1 connects to, once: it has no name any more afterwards."""
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(f"/proc/self/fd/{folder}/control.sock")  # the name of a socket may not be longer than 108
            listener.listen(1)
            listener.setblocking(False)
            yield listener
        finally:
            listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink("control.sock", dir_fd=folder)
            os.close(folder)

    def _config(self, image: Image, kit: Kit) -> dict[str, Any]:
        """What the engine makes a container from.

        https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerCreate
        """
        read_only = [
            *kit.binds,
            *((Path(host).resolve(), f"{container.BINDS}/{n}") for n, (host, _) in enumerate(self.binds)),
        ]
        mounts = [_bind(host, inside, read_only=True) for host, inside in read_only]
        mounts.append(_bind(self.root, posixpath.dirname(container.SOCKET), read_only=False))
        memory = (self.limits.memory_mb or 0) << 20
        labels = {"sandbox": self.name, "image": image.id, **self.labels}
        return {
            "Image": image.id if self.user == "root" else given_tag(image, self.user, self._shared),
            **_doing(kit, "main()"),
            "Env": ["LD_PRELOAD=", "LD_LIBRARY_PATH="],  # the image's, for its own programs: handles get them
            "User": "0:0",
            "WorkingDir": "/",
            "Hostname": "" if self.network == "host" else "sandbox",
            "Labels": {f"{LABEL}{key}": value for key, value in labels.items()},
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": {
                "NetworkMode": NETWORKS[self.network],
                "Mounts": mounts,
                "CapDrop": ["ALL"],
                "CapAdd": list(CAPABILITIES),
                # AppArmor's and SELinux's defaults for containers forbid the mounts that handles are made of
                "SecurityOpt": ["apparmor=unconfined", "label=disable"],
                "PidsLimit": self.limits.pids or -1,
                "Memory": memory,
                "MemorySwap": memory,
                "NanoCpus": round((self.limits.cpus or 0) * 1e9),
                "DeviceRequests": self._devices(),
                "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}},
            },
        }

    def _devices(self) -> list[dict[str, Any]]:
        return [{"Driver": "nvidia", "Count": self.gpus, "Capabilities": [["gpu"]]}] if self.gpus else []

    async def _refuse_gpus(self, engine: Engine) -> None:
        if not self.gpus:
            return
        with engine.says("what the engine can do") as docker:
            info = await docker.system.info()
        if "nvidia" not in (info.get("Runtimes") or {}):
            raise SandboxError(
                f"the task asks for {self.gpus} GPU(s), and the engine at {engine.url} has none to give: it knows no "
                "runtime `nvidia` (install the NVIDIA container toolkit)"
            )

    def _settings(self, image: Image) -> dict[str, Any]:
        """What PID 1 is told."""
        command = [*image.entrypoint, IDLE]
        env = {"PATH": SYSTEM_PATH, **image.env}
        service = {"argv": command, "env": env, "cwd": image.workdir, "user": image.user}
        return {
            "name": self.name,
            "user": self.user,
            "shared": list(self._shared),
            "binds": [(inside, Path(host).is_dir()) for host, inside in self.binds],
            "port": self.gateway.port if self.gateway is not None and self._relays else 0,
            "service": service if image.entrypoint else None,
            "folders": [*self._shared, container.HOME, container.TMP],
            "bound": [inside for _, inside in self.binds],
            "disk_bytes": (self.limits.disk_mb or 0) << 20,
        }

    # --- use ---

    def handle(self, name: str, *, trusted: bool = False) -> DockerHandle:
        """See `Sandbox.handle`. The same name gives the same handle until it ends; a later one finds its HOME again."""
        handle = self._handles.get((name, trusted))
        if handle is None or handle._phase == "ended":
            handle = self._handles[name, trusted] = DockerHandle(name, trusted, self)
        return handle

    async def upload(self, source: Path, target: str) -> None:
        """See `Sandbox.upload`. Links are copied as links; set-uid bits, devices and FIFOs are left out."""
        control = self._require_up()
        with open_source(source) as fd:
            await ask(control, "take", {"file": fd}, path=target, name=source.name)

    async def download(self, source: str, target: Path) -> None:
        """See `Sandbox.download`. In a folder, links that could lead out of it are left out, as are devices."""
        control = self._require_up()
        owner = os.getuid() or None
        folder = target.is_dir()  # noqa: ASYNC240 - and then that is where a file goes, too
        folder = folder or await ask(control, "look", path=source) == b"folder"
        with open_target(source, target, folder=folder) as (out, name):
            await ask(control, "give", {"file": out}, path=source, name=name, owner=owner)

    def _require_up(self) -> Messages:
        if self._phase != "up" or self._control is None:
            raise SandboxError(f"sandbox {self.name} {'was stopped' if self._phase == 'stopped' else 'is not started'}")
        return self._control

    async def _proof_of_death(self, handle: str) -> tuple[str, ...]:
        """When PID 1 gives no answer any more: it is gone, and the kernel ends all in its namespace before it is.

        Raises `QuietError`.
        """
        with anyio.move_on_after(END_SEC if self._pidfd >= 0 else 0):
            await anyio.wait_readable(self._pidfd)
            return (f"PID 1 of container {self.name} is gone, and with it all that was in it, handle {handle} too",)
        raise QuietError(f"handle {handle}: PID 1 of container {self.name} gives no answer and is still there")


# --- asking PID 1 ---


async def ask(control: Messages, do: str, fds: Mapping[str, int] | None = None, **words: Any) -> bytes:
    """Have something done with files in the container, and return what came of it. Raises what went wrong there."""
    with memory_file(b"") as out:
        started = await Started.launch(
            control, Request((do,), {}, "/", {"do": do, **words}), {"out": out, **(fds or {})}
        )
        try:
            await started.exit()
        finally:
            started.close()
        answer = _content(out)
    if answer[:1] == b"=":
        return answer[1:]
    if answer[:1] == b"/":
        raise PathEscape(answer[1:].decode(errors="replace"))
    raise SandboxError(answer[1:].decode(errors="replace") or f"the container ended while it had to {do} a file")


@contextlib.contextmanager
def memory_file(data: bytes) -> Iterator[int]:
    """A file in memory that can be handed over."""
    fd = os.memfd_create("rollout", os.MFD_CLOEXEC)
    try:
        container.write_all(fd, data)
        yield fd
    finally:
        os.close(fd)


def _content(fd: int) -> bytes:
    size, parts, at = os.fstat(fd).st_size, [], 0
    while at < size:
        parts.append(os.pread(fd, size - at, at))
        at += len(parts[-1])
    return b"".join(parts)


async def _accepted(listener: socket.socket) -> Messages:
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            await anyio.wait_readable(listener)
        else:
            connection.setblocking(False)
            return Messages(connection)


async def _answered(control: Messages) -> tuple[bytes, int]:
    """What PID 1 says when it is up, and a pidfd of its own (-1 where something went wrong)."""
    while True:
        try:
            answer, fds, _, _ = socket.recv_fds(control.sock, 8192, 1)
        except BlockingIOError:
            await anyio.wait_readable(control.sock)
        except OSError:
            return b"", -1
        else:
            return answer, fds[0] if fds else -1


def _doing(kit: Kit, call: str) -> dict[str, Any]:
    command = kit.running(call)
    return {"Entrypoint": [command[0]], "Cmd": list(command[1:])}


def _bind(host: Path, inside: str, *, read_only: bool) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(host), "Target": inside, "ReadOnly": read_only}


# --- what a rollout's config asks for, and what a dead orchestrator left ---


def make(spec: SandboxSpec) -> DockerSandbox:
    """The docker sandbox that a rollout's config asks for. Raises `ConfigError`: no image, or an engine elsewhere."""
    check_engine(spec.options.get("engine"))
    check_memory(spec.memory_mb, "docker")
    reach = None
    if spec.gateway_port is not None and spec.gateway_socket is not None:
        reach = GatewayReach(spec.gateway_socket, spec.gateway_port)
    asked = {"cpus": spec.cpus, "memory_mb": spec.memory_mb, "pids": spec.pids, "disk_mb": spec.storage_mb}
    return DockerSandbox(
        name=spec.name,
        image=spec.image,
        build=spec.build,
        image_map=spec.image_map,
        engine=spec.options.get("engine"),
        user=spec.options.get("user", "agent"),
        gateway=reach,
        network=spec.network,
        limits=Limits(**{name: limit for name, limit in asked.items() if limit is not None}),  # type: ignore[arg-type]
        gpus=spec.gpus,
        binds=tuple((Path(bind), bind) for bind in spec.binds),
        labels=spec.labels,
        cwd=spec.cwd,
        note=spec.note,
        lost=spec.lost,
    )


async def probe() -> str:
    """What a docker sandbox would run on here, in a few words. Raises `SandboxError`, `ConfigError` saying why not."""
    engine = Engine.open()
    try:
        with engine.says("which engine this is") as docker:
            found = await docker.version()
        return f"engine {found['Version']} at {engine.url}"
    finally:
        await engine.close()


async def reopen(handle: Mapping[str, Any]) -> DockerSandbox:
    """A sandbox that was kept, up again for a look inside; `leave` it then. Raises `SandboxError` when it is gone."""
    sandbox = DockerSandbox(
        name=handle["name"],
        image=handle["container"],
        user=handle["user"],
        network="none",
        limits=Limits(disk_mb=None),
        cwd=handle["cwd"],
        root=Path(handle["root"]),
    )
    await sandbox.attach(handle)
    return sandbox


async def reap(handle: Mapping[str, Any]) -> None:
    """Give back a sandbox whose orchestrator died, by what `start` returned, or would have: `name`. Idempotent.

    Raises:
        SandboxError: The engine does not answer, or what has that name is not ours.
    """
    engine = Engine.open(handle.get("engine"))
    try:
        await _remove_ours(engine, handle["name"], handle.get("container"))
    finally:
        await engine.close()
    if root := handle.get("root"):
        await anyio.to_thread.run_sync(_remove_root, Path(root))


async def sweep(options: Mapping[str, str]) -> tuple[str, ...]:
    """Remove the containers that orchestrators of this machine left: by their labels, a sentence each."""
    from orchestrator.owners import give_back_each, left_behind

    engine = Engine.open(options.get("engine"))

    async def remove(one: Any, labels: Mapping[str, str]) -> str:
        if await _is_kept(engine, one.id):
            return ""
        roots = {bound["Destination"]: bound["Source"] for bound in one["Mounts"]}
        about = {"name": labels["sandbox"], "container": one.id, "engine": engine.url}
        await reap({**about, "root": roots.get(posixpath.dirname(container.SOCKET))})
        return f"removed container {labels['sandbox']} of process {labels['owner-pid']}, which is gone"

    try:
        with engine.says("what containers there are") as docker:
            found = await docker.containers.list(all=True, filters={"label": [f"{LABEL}sandbox"]})
        known = [(one, {key.removeprefix(LABEL): value for key, value in one["Labels"].items()}) for one in found]
        return await give_back_each(
            (left_behind(labels), functools.partial(remove, one, labels)) for one, labels in known
        )
    finally:
        await engine.close()


async def _is_kept(engine: Engine, container_id: str) -> bool:
    """Whether somebody wants to look into it: its PID 1 was told so before its orchestrator went."""
    with engine.says(f"container {container_id[:12]}") as docker:
        state = (await docker.containers.container(container_id).show())["State"]
    return bool(state["Status"] == "exited" and state["ExitCode"] == 0)


async def _remove_ours(engine: Engine, name: str, container_id: str | None = None) -> None:
    """The same as `_remove`, of what may not be ours: known by its name, which anybody may give."""
    try:
        with engine.says(f"container {name}") as docker:
            found = await docker.containers.container(container_id or name).show()
    except EngineError as exc:
        if exc.status != 404:
            raise
        return
    if (found["Config"]["Labels"] or {}).get(f"{LABEL}sandbox") != name:
        raise SandboxError(f"container {name} is not one of ours: it has not our label; remove it yourself")
    await _remove(engine, found["Id"])


async def _remove(engine: Engine, container_id: str) -> None:
    """Kill and remove a container and its anonymous volumes; one that is gone is fine.

    One that is just ending by itself can be neither killed nor removed (409), nor can one that somebody removes: that
    is waited for.
    """
    what = f"container {container_id[:12]} cannot be removed"
    try:
        for condition in ("not-running", "removed"):
            try:
                with engine.says(what) as docker:
                    await docker.containers.container(container_id).delete(force=True, v=True)
                return
            except EngineError as exc:
                if exc.status != 409:
                    raise
            with anyio.fail_after(REMOVE_SEC), engine.says(what) as docker:
                await docker.containers.container(container_id).wait(condition=condition)
    except EngineError as exc:
        if exc.status != 404:
            raise
    except TimeoutError as exc:
        raise SandboxError(f"{what}: it is still there after {REMOVE_SEC:.0f} s") from exc


def _remove_root(root: Path) -> None:
    """Remove the folder of a control socket, which holds nothing else."""
    with contextlib.suppress(FileNotFoundError):
        (root / "control.sock").unlink()
    with contextlib.suppress(FileNotFoundError):
        root.rmdir()
