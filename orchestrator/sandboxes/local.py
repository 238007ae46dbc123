"""The local sandbox: bubblewrap on this machine. Linux only, as root or as an ordinary user, on asyncio and on trio.

One bwrap per handle, so that each role has a PID namespace of its own: killing its PID 1 (`supervisor.py`) makes the
kernel kill everything in it, daemons too, and when PID 1 is gone the namespace is empty. That is the evidence which
`end` returns. What a handle sees:

    /usr /bin /lib* ...      the host's, read-only; of /etc only what is public
    /app                     (the sandbox's `cwd`) shared by all handles of the sandbox
    /logs/agent              shared as well
    /home/agent /tmp         one per handle
    /tests /solution /logs/verifier     only in trusted handles
    127.0.0.1:PORT           the model gateway, where there is one, and nothing else

There is one user, `agent` (uid 1000; to the host it is whoever runs us, or a uid of nobody's where that is root). All
that may be written is theirs, so agents that ask for `user="root"`, because they were written for containers, get this
user: there is nothing that root could do more.
An agent's own sandbox has to be switched off: there are no user namespaces to be had in this one. Each handle has its
own loopback interface: a server of one role cannot be reached by another one.

    sandbox = LocalSandbox(name="r1", root=Path("runs/r1/sandbox"))
    await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    result = await handle.exec("echo hello > greeting.txt")
    await handle.end()
    await sandbox.download("/app/greeting.txt", Path("greeting.txt"))
    await sandbox.stop()
"""
# A handle and its sandbox are one part in two classes; /tmp is in the sandbox.
# ruff: noqa: SLF001, S108

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs

from orchestrator.sandboxes import Network, SandboxSpec, _bwrap, _limits
from orchestrator.sandboxes._bwrap import GATEWAY, SYSTEM_PATH
from orchestrator.sandboxes._files import Mount, Tree, remove
from orchestrator.sandboxes._gateway import GatewayReach
from orchestrator.sandboxes._limits import Limits
from orchestrator.sandboxes._names import file_name
from orchestrator.sandboxes._namespace import END_SEC, Namespace, pids
from orchestrator.sandboxes._probe import Finding, probe
from orchestrator.sandboxes._process import Channel, Request, run
from states.errors import ConfigError, HandleRevoked, QuietError, SandboxError
from states.ports import ExecResult

__all__ = ["Finding", "GatewayReach", "Limits", "LocalHandle", "LocalSandbox", "make", "probe", "reap", "sweep"]

T = TypeVar("T")

HOME: Final = "/home/agent"
TMP: Final = "/tmp"
SHARED: Final = ("/logs/agent",)
TRUSTED: Final = ("/tests", "/solution", "/logs/verifier")
"""Folders that only trusted handles see."""

OPEN_SEC: Final = 20.0
MARKER: Final = ".rollout-sandbox.json"
"""A file in a sandbox's root that says so: a reaper removes no folder without it."""


def _absolute(path: str | Path) -> Path:
    return Path(path).absolute()


@attrs.define(eq=False)
class LocalHandle:
    """The `SandboxHandle` of a `LocalSandbox`. Made by `LocalSandbox.handle`."""

    name: str
    trusted: bool
    _sandbox: LocalSandbox
    _lock: anyio.Lock = attrs.field(factory=anyio.Lock)
    _phase: Literal["new", "open", "ended"] = "new"
    _namespace: Namespace | None = None
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
            self._sandbox._require_up()
            self._sandbox._make_folders((self._home, self._tmp))
            self._sandbox._admit_to_gateway()
            killed = self._sandbox._killed_for_memory()
            self._namespace = namespace = await Namespace.start(self._view(), self._sandbox.marker)
            try:
                with anyio.fail_after(OPEN_SEC):
                    await namespace.configure(self._sandbox._owner, self._settings)
            except TimeoutError as exc:
                await self._put_down()
                raise SandboxError(f"handle {self.name}: bubblewrap did not come up in {OPEN_SEC:.0f} s") from exc
            except SandboxError as exc:
                await self._put_down()
                limit = self._sandbox.limits.memory_mb
                too_little = limit is not None and limit < _limits.LEAST_MEMORY_MB
                if not too_little and self._sandbox._killed_for_memory() == killed:
                    raise
                raise SandboxError(
                    f"handle {self.name}: bubblewrap could not start: the {limit} MiB of memory that the sandbox may "
                    "have are used up; raise the task's memory_mb"
                ) from exc
            except BaseException:
                await self._put_down()
                raise
            self._phase = "open"

    def _settings(self, pid: int) -> dict[str, Any]:
        """What PID 1 is told, once it is under the limits."""
        return self._sandbox._settings(pid) | {
            "folders": [*self._inside_folders(), HOME, TMP],
            "bound": [inside for _, inside in self._sandbox.binds],
            "trusted": self.trusted,
        }

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
        if self._namespace is None:
            return ()
        with anyio.CancelScope(shield=True):
            evidence = await self._namespace.kill(self.name)
        for channel in self._channels:
            channel.release()
        self._channels.clear()
        self._namespace.close()
        self._namespace = None
        return evidence

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
        """See `SandboxHandle.exec`. `user`: `agent`, or `root`, which means the same; any other is a `SandboxError`."""
        if user not in {None, "agent", "root", "1000", "0"}:
            raise SandboxError(f"there is no user {user} in a local sandbox: its only one is agent, also as root")
        request = Request.of(command, self._env(env), self._cwd(cwd))
        control = self._require_open().control
        return await run(control, request, cap=self._sandbox.output_cap, timeout_sec=timeout_sec)

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> Channel:
        """See `SandboxHandle.spawn`."""
        if isinstance(argv, str):
            raise SandboxError(f"spawn takes a list of arguments, not the string {argv!r}")
        request = Request.of(argv, self._env(env), self._cwd(cwd))
        channel = await Channel.open(self._require_open().control, request)
        self._channels.append(channel)
        return channel

    async def read_file(self, path: str) -> bytes:
        """See `SandboxHandle.read_file`."""
        self._require_open()
        path = posixpath.join(self._sandbox.cwd, path)
        return await _in_thread(lambda: self._tree().read(path))

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `SandboxHandle.write_file`. A link at `path` is replaced, not followed."""
        self._require_open()
        path = posixpath.join(self._sandbox.cwd, path)
        await _in_thread(lambda: self._tree().write(path, data, mode))

    # --- parts ---

    @property
    def _home(self) -> Path:
        return self._folder / "home"

    @property
    def _tmp(self) -> Path:
        return self._folder / "tmp"

    @property
    def _folder(self) -> Path:
        kind = "trusted" if self.trusted else "agent"
        return self._sandbox.root / "handles" / f"{kind}-{file_name(self.name)}"

    def _inside_folders(self) -> tuple[str, ...]:
        own = self._sandbox._shared
        return (*own, *TRUSTED) if self.trusted else own

    def _view(self) -> _bwrap.View:
        sandbox = self._sandbox
        shared = tuple((str(sandbox._backing(at)), at) for at in self._inside_folders())
        reach = sandbox._reach()
        return _bwrap.View(
            writable=(*shared, (str(self._home), HOME), (str(self._tmp), TMP)),
            readable=(
                *((str(Path(host).resolve()), inside) for host, inside in sandbox.binds),
                *(((str(reach.socket), GATEWAY),) if reach else ()),
            ),
            etc=sandbox.root / "etc",
            network=sandbox.network,
            owner=sandbox._owner,
        )

    def _tree(self) -> Tree:
        view, owner = self._view(), self._sandbox._owner
        return Tree(
            self._sandbox.name,
            (
                *(Mount(inside, host, owner=owner) for host, inside in view.writable),
                *(Mount(inside, host, writable=False) for host, inside in view.readable if Path(host).is_dir()),
                Mount("/usr", "/usr", writable=False),
            ),
            confined=self.trusted,
        )

    def _env(self, env: Mapping[str, str] | None) -> dict[str, str]:
        base = {"PATH": SYSTEM_PATH, "HOME": HOME, "USER": "agent", "LOGNAME": "agent", "SHELL": "/bin/sh"}
        return base | {"LANG": "C.UTF-8", "TMPDIR": TMP} | dict(env or {})

    def _cwd(self, cwd: str | None) -> str:
        return posixpath.join(self._sandbox.cwd, cwd or "")

    def _require_open(self) -> Namespace:
        if self._phase == "ended":
            raise HandleRevoked(f"handle {self.name} of sandbox {self._sandbox.name} has ended")
        if self._namespace is None or self._phase == "new":
            raise SandboxError(f"handle {self.name} of sandbox {self._sandbox.name} is not open; await open() first")
        return self._namespace


@attrs.define(eq=False, kw_only=True)
class LocalSandbox:
    """A `Sandbox` on this machine, isolated by bubblewrap. Nothing happens until `start`.

    Attributes:
        name: Chosen by the caller, so that it can be journaled before anything exists.
        root: A folder that holds this sandbox's files; made by `start` (it may exist when empty), removed by `stop`.
        gateway: Where the model gateway is, None without one.
        network: `gateway-only`: a network of its own, with the gateway on loopback and nothing else. `host`: the
            host's network. `none`: not even the gateway.
        limits: What it may use; see `unenforced` for what this machine cannot enforce.
        binds: Folders of the host that every handle sees, read-only: (host path, path in the sandbox).
        cwd: Where tasks work; shared by all handles, and where commands start.
        output_cap: Bytes that `exec` keeps of stdout, and of stderr.
        gateway_url: The gateway's base URL, the same inside and outside; None without one.
    """

    name: str
    root: Path = attrs.field(converter=_absolute)
    gateway: GatewayReach | None = None
    network: Network = "gateway-only"
    limits: Limits = attrs.field(factory=Limits)
    binds: tuple[tuple[Path, str], ...] = ()
    cwd: str = "/app"
    output_cap: int = 1 << 20
    gateway_url: str | None = attrs.field(init=False)
    has_environment: bool = attrs.field(default=False, init=False)
    _phase: Literal["new", "up", "stopped"] = attrs.field(default="new", init=False)
    _handles: dict[tuple[str, bool], LocalHandle] = attrs.field(factory=dict, init=False)
    _lock: anyio.Lock = attrs.field(factory=anyio.Lock, init=False)
    _shared: tuple[str, ...] = attrs.field(init=False)
    _owner: int | None = attrs.field(default=None, init=False)
    _cgroup: _limits.Cgroup = attrs.field(factory=lambda: _limits.Cgroup({}), init=False)
    _fallback: _limits.Fallback = attrs.field(factory=lambda: _limits.Fallback({}, (), ()), init=False)

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot work, before anything exists."""
        self._shared = (self.cwd, *SHARED)
        self.gateway_url = f"http://127.0.0.1:{self.gateway.port}" if self.gateway and self.network != "none" else None
        if self.network not in NETWORKS:
            raise ConfigError(f"network of a local sandbox is {', '.join(NETWORKS)}, not {self.network!r}")
        for what, path in (("cwd", self.cwd), *(("binds", inside) for _, inside in self.binds)):
            if not path.startswith("/") or posixpath.normpath(path) != path or path == "/":
                raise ConfigError(f"{what} of a local sandbox must be a clean absolute path below /, not {path!r}")

    @property
    def shared_loopback(self) -> bool:
        """Whether what one handle serves on loopback another one reaches: a relay to the gateway needs that."""
        return self.network == "host"

    @property
    def unenforced(self) -> tuple[str, ...]:
        """The limits that this machine cannot enforce, as sentences. Known once the sandbox has started."""
        return self._fallback.unenforced

    @property
    def marker(self) -> str:
        """What the command lines of this sandbox's bwraps contain, for the reaper."""
        return f"rollout-sandbox:{self.root}"

    async def start(self) -> Mapping[str, Any]:
        """See `Sandbox.start`. Idempotent."""
        async with self._lock:
            if self._phase == "stopped":
                raise SandboxError(f"sandbox {self.name} was stopped; make a new one")
            if self._phase == "new":
                _bwrap.bwrap_path()
                await self._make()
                self._phase = "up"
        groups = sorted({str(folder) for folder in self._cgroup.folders.values()})
        about = {"kind": "local", "name": self.name, "root": str(self.root), "cwd": self.cwd}
        return {**about, "cgroups": groups}

    async def attach(self, handle: Mapping[str, Any]) -> tuple[str, ...]:
        """See `states.ports.Attachable`. What was started in it died with its orchestrator, or is killed now."""
        async with self._lock:
            if self._phase != "new":
                raise SandboxError(f"sandbox {self.name} was started already: it cannot be attached to another one")
            root = Path(handle["root"])
            if not (root / MARKER).is_file():
                raise SandboxError(f"sandbox {self.name} is gone: there is no {root / MARKER}")
            _bwrap.bwrap_path()
            self.root = root
            await _end_what_is_left(root, self.name)
            evidence = await _in_thread(lambda: _unused(root, self.name))
            await _in_thread(self._take_over)
        return (evidence,)

    def _take_over(self) -> None:
        """Come up on folders that are there: what is made by each process anew is made."""
        self._owner = _bwrap.spare_uid(str(self.root))
        owner = os.geteuid() if self._owner is None else self._owner
        if (found := self._backing(self.cwd).stat().st_uid) != owner:
            raise SandboxError(f"sandbox {self.name} was made for uid {found}; here it would be used as uid {owner}")
        own = {self._backing(at).name for at in (*self._shared, *TRUSTED)}
        self._shared += tuple(f"/{path.name}" for path in self._backing("/").iterdir() if path.name not in own)
        self._limit()
        self._phase = "up"

    def _killed_for_memory(self) -> int:
        return self._cgroup.killed_for_memory() if self.limits.memory_mb is not None else 0

    def _limit(self) -> None:
        self._cgroup = _limits.make_cgroup(_group_name(self.name, self.root), self.limits)
        self._fallback = _limits.fallback(self.limits, self._cgroup, own_uid=self._owner is not None)

    async def _make(self) -> None:
        if _is_occupied(self.root):
            raise SandboxError(f"cannot start sandbox {self.name}: its root {self.root} exists and is not empty")
        self._owner = _bwrap.spare_uid(str(self.root))
        try:
            await _in_thread(self._make_root)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._unmake()
            raise

    def _make_root(self) -> None:
        for host, inside in self.binds:
            if not Path(host).exists():
                raise SandboxError(f"sandbox {self.name} cannot bind {host} at {inside}: it does not exist")
            if self._owner is not None and not Path(host).stat().st_mode & 0o004:
                raise SandboxError(f"sandbox {self.name} cannot bind {host}: only its owner may read it (chmod o+rX)")
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)  # an agent's set-uid file is nobody else's to run
        (self.root / MARKER).write_text(json.dumps({"kind": "local", "name": self.name}))
        self._make_folders([self._backing(at) for at in (*self._shared, *TRUSTED)])
        self._limit()
        etc = self.root / "etc"
        etc.mkdir()
        _bwrap.write_etc(etc, network=self.network)

    def _make_folders(self, folders: Sequence[Path]) -> None:
        """Folders that the sandbox's user owns."""
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            if self._owner is not None:
                os.chown(folder, self._owner, self._owner)

    async def stop(self) -> None:
        """See `Sandbox.stop`. Raises `QuietError` when a handle cannot be ended; its files are kept then."""
        async with self._lock:
            if self._phase == "up":
                for handle in list(self._handles.values()):
                    await handle.end()
                await self._unmake()
            self._phase = "stopped"

    async def leave(self) -> None:
        """See `Keepable.leave`."""
        async with self._lock:
            for handle in list(self._handles.values()):
                await handle.end()
            self._phase = "stopped"

    async def _unmake(self) -> None:
        await self._cgroup.remove()
        await _in_thread(lambda: remove(self.root))

    def handle(self, name: str, *, trusted: bool = False) -> LocalHandle:
        """See `Sandbox.handle`. The same name gives the same handle until it ends; a later one finds its HOME again."""
        handle = self._handles.get((name, trusted))
        if handle is None or handle._phase == "ended":
            handle = self._handles[name, trusted] = LocalHandle(name, trusted, self)
        return handle

    async def upload(self, source: Path, target: str) -> None:
        """See `Sandbox.upload`. Links are copied as links; set-uid bits, devices and FIFOs are left out.

        A target outside all of the sandbox's folders, say `/data/table.csv`, makes `/data` one more folder that is
        shared: handles that are opened from then on see it. Folders of the system cannot be had.
        """
        self._require_up()
        self._make_room(target)
        await _in_thread(lambda: self._tree().copy_in(source, target))

    async def download(self, source: str, target: Path) -> None:
        """See `Sandbox.download`. In a folder, links that could lead out of it are left out, as are devices."""
        self._require_up()
        await _in_thread(lambda: self._tree().copy_out(source, target))

    def _make_room(self, target: str) -> None:
        """Share the folder at the top of `target` too, where no folder of ours has it and the system has none."""
        top = "/" + target.lstrip("/").partition("/")[0]
        taken = (*self._shared, *TRUSTED, HOME, TMP, "/logs", *_bwrap.SYSTEM_FOLDERS)
        if ".." in target.split("/") or any(f"{at}/".startswith(f"{top}/") for at in taken):
            return
        self._make_folders([self._backing(top)])
        self._shared = (*self._shared, top)

    def _tree(self) -> Tree:
        places = (*self._shared, *TRUSTED)
        return Tree(self.name, tuple(Mount(at, str(self._backing(at)), owner=self._owner) for at in places))

    def _backing(self, at: str) -> Path:
        return self.root / "files" / at.strip("/").replace("/", ".")

    def _require_up(self) -> None:
        if self._phase != "up":
            raise SandboxError(f"sandbox {self.name} {'was stopped' if self._phase == 'stopped' else 'is not started'}")

    def _reach(self) -> GatewayReach | None:
        """The gateway, where handles need a relay to it."""
        return self.gateway if self.network == "gateway-only" else None

    def _admit_to_gateway(self) -> None:
        """Where the sandbox's user is not us, the gateway's socket must be open to others; its keys still guard it."""
        reach = self._reach()
        if reach is not None and self._owner is not None:
            reach.admit_all()

    def _settings(self, pid: int) -> dict[str, Any]:
        """Put a new PID 1 under the limits, and say what it has to do itself."""
        try:
            self._cgroup.attach(pid)
        except OSError:  # a group that we may make and not use
            self._fallback = _limits.fallback(self.limits, _limits.Cgroup({}), own_uid=self._owner is not None)
        reach = self._reach()
        return {
            "rlimits": dict(self._fallback.rlimits),
            "cpus": list(self._fallback.cpus),
            "port": reach.port if reach else 0,
            "gateway": GATEWAY,
            "become": _bwrap.UID if self._owner is not None else 0,
            "disk_bytes": (self.limits.disk_mb or 0) << 20,
        }


# --- giving back what a dead orchestrator left ---


OPTIONS: Final[Mapping[str, str]] = {}
NETWORKS: Final = ("gateway-only", "host", "none")
LACKS: Final[frozenset[str]] = frozenset()


def make(spec: SandboxSpec) -> LocalSandbox:
    """The local sandbox that a rollout's config asks for."""
    _limits.check_memory(spec.memory_mb, "local")
    for text in _not_given(spec):
        spec.note(text)
    reach = None
    if spec.gateway_port is not None and spec.gateway_socket is not None:
        reach = GatewayReach(spec.gateway_socket, spec.gateway_port)
    return LocalSandbox(
        name=spec.name,
        cwd=spec.cwd,
        root=Path(tempfile.gettempdir()) / spec.name,
        gateway=reach,
        network=spec.network,
        limits=Limits(cpus=spec.cpus, memory_mb=spec.memory_mb, disk_mb=spec.storage_mb or Limits().disk_mb),
        binds=tuple((Path(bind), bind) for bind in spec.binds),
    )


def _not_given(spec: SandboxSpec) -> Iterator[str]:
    """What is asked for, and a local sandbox has not, as sentences."""
    if spec.image is not None:
        yield (
            f"the image {spec.image} is not run: a local sandbox has this machine's own programs, and runs no image; "
            "give --sandbox docker, or daytona"
        )
    if spec.image_map:
        yield f"the image map's {', '.join(spec.image_map)} stands for nothing: a local sandbox runs no image"
    if spec.gpus:
        yield (
            f"the task asks for {spec.gpus} GPU(s), and agents have none: a local sandbox shows no devices; give "
            "--sandbox docker, whose engine may have some"
        )


async def sweep(_options: Mapping[str, str]) -> tuple[str, ...]:
    """Nothing of a local sandbox outlives its orchestrator but its folder, which is found from its journal alone."""
    raise ConfigError("local sandboxes are found by their rollouts: give the folder of those instead of --sandbox")


async def reopen(handle: Mapping[str, Any]) -> LocalSandbox:
    """A sandbox that was kept, up again for a look inside; `leave` it then. Raises `SandboxError` when it is gone."""
    root = Path(handle["root"])
    if not (root / MARKER).is_file():
        raise SandboxError(f"sandbox {handle['name']} is gone: there is no {root / MARKER}")
    sandbox = LocalSandbox(name=handle["name"], root=root, network="none", cwd=handle["cwd"])
    await _in_thread(sandbox._take_over)
    return sandbox


async def reap(handle: Mapping[str, Any]) -> None:
    """Give back a sandbox whose orchestrator died, by what `start` returned, or would have: `name`, `root`. Idempotent.

    Its processes died with the orchestrator: their PID 1 sees the control socket end. What has none yet, a bubblewrap
    whose parent was killed in the millisecond before it was ready, waits for ever; such ones are found and killed.

    Raises:
        SandboxError: the folder that it names is not a sandbox's.
        QuietError: a process of it could not be killed.
    """
    root = Path(handle["root"])
    await _end_what_is_left(root, str(handle.get("name")))
    if _is_foreign(root):
        raise SandboxError(f"{root} is not a sandbox's folder: it has no {MARKER}; remove it yourself if it is one")
    groups = _limits.find_cgroup(_group_name(handle["name"], root)).folders
    groups = {**groups, **{path: Path(path) for path in handle.get("cgroups", ())}}
    await _limits.Cgroup(groups).remove()
    await _in_thread(lambda: remove(root))


async def _end_what_is_left(root: Path, name: str) -> None:
    marker = f"rollout-sandbox:{root}"
    left: list[int] = []
    with anyio.move_on_after(END_SEC):
        while left := await anyio.to_thread.run_sync(_marked, marker):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await anyio.sleep(0.01)
    if left:
        raise QuietError(f"processes {left} of sandbox {name} are still there after SIGKILL")


def _unused(root: Path, name: str) -> str:
    """Prove that no process sees the sandbox's files: a kernel buries a namespace after its PID 1. Or `QuietError`."""
    wanted = _as_mounted(root / "files")
    deadline = time.monotonic() + END_SEC
    while True:
        looked_at = pids()
        found = [pid for pid in looked_at if wanted in _mounts(pid)]
        if not found:
            return f"none of {len(looked_at)} processes on this machine has the files of sandbox {name} mounted"
        if time.monotonic() > deadline:
            raise QuietError(f"processes {found} still have the files of sandbox {name} mounted")
        time.sleep(0.01)


def _as_mounted(folder: Path) -> bytes:
    """What stands in `mountinfo` of who has something below `folder` bound: its path within its file system."""
    path = os.fsencode(os.path.realpath(folder)) + b"/"
    at, above = b"", b""
    for line in _mounts(os.getpid()).splitlines():
        _, _, _, within, point, *_ = line.split()
        point = _unescaped(point).rstrip(b"/") + b"/"
        if path.startswith(point) and len(point) >= len(at):
            at, above = point, _unescaped(within)
    whole = above.rstrip(b"/") + b"/" + path[len(at) :]
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in whole)


def _unescaped(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


def _mounts(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "mountinfo").read_bytes()
    except OSError:
        return b""  # gone, or another user's, whom our folders are shut to


def _marked(marker: str) -> list[int]:
    """Processes of ours whose command line has `marker` as an argument: bwrap, and PID 1 of its namespaces."""
    wanted, found = marker.encode(), []
    for pid in pids():
        try:
            argv = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in argv and pid != os.getpid():
            found.append(pid)
    return found


# --- small parts ---


def _is_occupied(root: Path) -> bool:
    return root.exists() and any(root.iterdir())


def _is_foreign(root: Path) -> bool:
    return _is_occupied(root) and not (root / MARKER).is_file()


async def _in_thread(work: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(work)


def _group_name(name: str, root: Path) -> str:
    return f"rollout-{file_name(name)}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
