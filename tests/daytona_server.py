"""A Daytona API on loopback, against which the real `daytona` package runs: control plane and toolbox on one server.

Each sandbox is a folder and a set of namespaces (bubblewrap) with a small daemon as PID 1, so that what a call starts
is a real process, and destroying the sandbox kills all of it. Request bodies are validated against the models of the
SDK's own clients. What a real sandbox does to a stream, this one does too: sessions carry lines of text, label each of
them, lose NUL bytes and add a newline at the end; the log is replayed from its first byte; a terminal takes messages
of at most 64 KiB, and drops a client that reads too slowly.

    async with DaytonaServer(tmp_path) as server:
        server.fault("POST", "/sandbox", status=429, headers={"Retry-After": "3"})
        daytona = AsyncDaytona(DaytonaConfig(api_key=server.key, api_url=server.url))
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import io
import json
import os
import posixpath
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import termios
import time
import uuid
from pathlib import Path
from urllib.parse import quote

import attrs
from aiohttp import WSCloseCode, WSMsgType, web

from orchestrator.sandboxes._bwrap import bwrap_path, interpreter
from orchestrator.tasks import demo_task

STDOUT, STDERR = b"\x01\x01\x01", b"\x02\x02\x02"
PTY_LIMIT = 64 * 1024
CHUNK = 16 * 1024
IMAGES = frozenset({"debian:stable-slim", "debian:12", "python:3.12-slim", "ubuntu:24.04"})
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/bin"


FAULT = contextvars.ContextVar("fault", default=None)
"""The fault that a request ran into."""


class Refused(Exception):
    """An answer that is an error, as the service words it."""

    def __init__(self, status, message, code=None, headers=None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}

    def response(self, path):
        body = {"statusCode": self.status, "message": str(self), "code": self.code, "path": path}
        return web.json_response(
            {**body, "source": "DAYTONA_DAEMON" if self.code else "DAYTONA_API"},
            status=self.status,
            headers=self.headers,
        )


@attrs.define
class Fault:
    """What happens to the next `times` requests that match, instead of an answer or before or after it."""

    method: str
    path: str
    status: int | None = None
    message: str = "the fault that a test asked for"
    headers: dict = attrs.Factory(dict)
    drop: str = ""
    """`before` or `after` the request was carried out: the connection ends without an answer."""
    close: int | None = None
    """A websocket is closed with this code once `after_bytes` went to the client."""
    after_bytes: int = 0
    wait: asyncio.Event | None = None
    """The answer waits for this."""
    times: int = 1
    skip: int = 0


# --- a sandbox --------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Running:
    """A process in a sandbox."""

    box: Box
    pid: int
    exit: asyncio.Future

    async def wait(self):
        """Its exit code; whoever stops waiting takes it from nobody else."""
        return await asyncio.shield(self.exit)

    async def kill(self):
        with contextlib.suppress(Refused, OSError):
            _, status = await self.box.ask({"do": "kill", "pid": self.pid})
            status.close()


@attrs.define(eq=False)
class Session:
    """A shell that runs commands; deleting it kills what they started."""

    id: str
    commands: dict = attrs.Factory(dict)


@attrs.define(eq=False)
class SessionCommand:
    """One command of a session, with its log."""

    id: str
    command: str
    echo: bool
    process: Running
    stdin: int
    log: bytearray = attrs.Factory(bytearray)
    done: bool = False
    grown: asyncio.Event = attrs.Factory(asyncio.Event)

    def add(self, data):
        self.log += data
        self.wake()

    def wake(self):
        self.grown.set()
        self.grown = asyncio.Event()


@attrs.define(eq=False)
class Box:
    """One sandbox: what the API says of it, its folder, and its PID 1."""

    dto: dict
    folder: Path
    env: dict = attrs.Factory(dict)
    workdir: str = "/root"
    log: list = attrs.Factory(list)
    sessions: dict = attrs.Factory(dict)
    terminals: dict = attrs.Factory(dict)
    process: subprocess.Popen | None = None
    control: socket.socket | None = None
    tasks: set = attrs.Factory(set)

    @property
    def root(self):
        return self.folder / "root"

    async def boot(self):
        """Make the namespaces. Its root is its own, its programs are the host's."""
        root = self.root
        for name in (
            "app",
            "etc",
            "home",
            "logs",
            "opt/bin",
            "proc",
            "dev",
            "root",
            "run",
            "tmp",
            "usr",
            "var/tmp",
            "srv",
        ):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "tmp").chmod(0o1777)
        (root / "root").chmod(0o700)
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
        (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        python, prefixes = interpreter()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        argv = [bwrap_path(), "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
        if os.geteuid() != 0:
            argv += ["--unshare-user", "--uid", "0", "--gid", "0"]
        argv += [
            "--cap-add",
            "ALL",
            "--new-session",
            "--clearenv",
            "--bind",
            str(root),
            "/",
            "--ro-bind",
            "/usr",
            "/usr",
        ]
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            place = Path("/", name)
            if place.is_symlink():
                argv += ["--symlink", str(place.readlink()), str(place)]
            elif place.exists():
                argv += ["--ro-bind", str(place), str(place)]
        for prefix in prefixes:
            argv += (
                ["--ro-bind", prefix, f"/opt/host-python{prefix}"]
                if prefix.startswith("/root")
                else ["--ro-bind", prefix, prefix]
            )
        if not Path("/usr/bin/python3").exists():
            (root / "opt/bin/python3").symlink_to(python)
        for name in ("alternatives", "ssl", "ld.so.cache", "nsswitch.conf"):
            argv += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        daemon = Path(__file__).with_name("daytona_daemon.py")
        argv += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", str(daemon), "/opt/daytona.py"]
        shell = shutil.which("python3", path=PATH) or python
        argv += ["--chdir", "/", "--as-pid-1", "--", shell, "-I", "/opt/daytona.py", str(theirs.fileno())]
        self.process = subprocess.Popen(
            argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self.control = ours
        if await asyncio.get_running_loop().sock_recv(ours, 100) != b"ready":
            raise RuntimeError("the sandbox's daemon did not come up")
        self.dto["state"] = "started"

    async def ask(self, asked, fds=()):
        """A request to PID 1; its answer, and the socket on which more may come."""
        if self.control is None:
            raise Refused(502, "the sandbox is not running")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                socket.send_fds(self.control, [json.dumps(asked).encode()], [theirs.fileno(), *fds])
            message = await asyncio.get_running_loop().sock_recv(ours, 65536) if asked["do"] != "open" else None
            if message == b"":
                raise Refused(502, "the sandbox has gone")
            if message is not None and message.startswith(b"error"):
                _, number, text = message.decode().split(" ", 2)
                raise OSError(int(number), text)
        except BaseException:
            ours.close()
            raise
        return message, ours

    async def start(self, argv, fds, *, cwd=None, env=None, tty=False):
        """Start a process; its exit code is a future."""
        asked = {"do": "start", "argv": argv, "cwd": cwd or self.workdir, "tty": tty}
        asked["env"] = {"PATH": PATH, "HOME": "/root", "DAYTONA_SANDBOX_ID": self.dto["id"], **self.env, **(env or {})}
        message, status = await self.ask(asked, fds)
        running = Running(self, int(message.split()[1]), asyncio.get_running_loop().create_future())
        self.spawn(self._bury(status, running))
        return running

    async def _bury(self, status, running):
        with status:
            said = await asyncio.get_running_loop().sock_recv(status, 100)
        running.exit.set_result(int(said.split()[1]) if said else -9)

    def spawn(self, coroutine):
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def open(self, path, flags):
        """Open a file as the sandbox sees it."""
        _, status = await self.ask({"do": "open", "path": posixpath.join(self.workdir, path), "flags": flags})
        with status:
            await readable(status)
            message, fds, _, _ = socket.recv_fds(status, 4096, 1)
        if not fds:
            _, number, text = message.decode().split(" ", 2)
            raise OSError(int(number), text)
        return fds[0]

    async def call(self, name, *args):
        message, status = await self.ask({"do": "call", "name": name, "args": list(args)})
        status.close()
        return json.loads(message)

    async def destroy(self):
        """Kill everything, and forget the files."""
        self.dto["state"] = "destroyed"
        control, self.control = self.control, None
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        if control is not None:  # whoever waits for an answer on it has seen its end now
            control.close()
        if self.tasks:  # they see their processes die
            _, left = await asyncio.wait(self.tasks, timeout=5)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)


async def readable(sock):
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def read_fd(fd, size=65536):
    """The next bytes of a pipe; b"" at its end."""
    while True:
        try:
            return os.read(fd, size)
        except BlockingIOError:
            await readable(fd)
        except OSError:
            return b""


async def write_fd(fd, data):
    view = memoryview(data)
    loop = asyncio.get_running_loop()
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_writer(fd, lambda ready=ready: ready.done() or ready.set_result(None))
            try:
                await ready
            finally:
                loop.remove_writer(fd)


def xml(text):
    return web.Response(text=f'<?xml version="1.0"?>{text}', content_type="application/xml")


def pipe(ours):
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read if ours == "read" else write, False)
    return read, write


# --- the server -------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class DaytonaServer:
    """The service. `calls` is every request that came, as `POST /sandbox`."""

    folder: Path
    key: str = "dtn_test_key"
    images: set = attrs.field(factory=lambda: set(IMAGES))
    services: list = attrs.Factory(list)
    """Shell commands that a sandbox runs from its start on, as an image's entrypoint does."""
    commands: list = attrs.Factory(list)
    """Every command line that came, to be executed or typed."""
    snapshots: dict = attrs.field(factory=lambda: {"prepared": demo_task() / "environment"})
    """By name, what is in `/app`."""
    boxes: dict = attrs.Factory(dict)
    faults: list = attrs.Factory(list)
    calls: list = attrs.Factory(list)
    created: list = attrs.Factory(list)
    """The bodies with which sandboxes were created."""
    stored: dict = attrs.Factory(dict)
    parts: dict = attrs.Factory(dict)
    removals: list = attrs.Factory(list)
    page: int = 100
    url: str = ""
    _runner: web.AppRunner | None = None

    async def __aenter__(self):
        app = web.Application(client_max_size=1 << 32, middlewares=[self._middleware])
        route = app.router.add_route
        route("POST", "/api/sandbox", self.create)
        route("GET", "/api/sandbox", self.list)
        route("GET", "/api/object-storage/push-access", self.push_access)
        route("*", "/storage/{path:.*}", self.storage)
        route("GET", "/api/sandbox/{box}", self.get)
        route("DELETE", "/api/sandbox/{box}", self.delete)
        route("POST", "/api/sandbox/{box}/{verb:start|stop}", self.start_or_stop)
        route("PUT", "/api/sandbox/{box}/labels", self.labels)
        route("POST", "/api/sandbox/{box}/{what:autostop|autodelete|ttl}/{minutes}", self.interval)
        route("GET", "/api/sandbox/{box}/build-logs-url", self.build_logs_url)
        route("GET", "/api/build-logs/{box}", self.build_logs)
        tool = "/toolbox/{box}"
        route("POST", f"{tool}/process/execute", self.execute)
        route("POST", f"{tool}/process/session", self.session_create)
        route("GET", f"{tool}/process/session", self.session_list)
        route("DELETE", f"{tool}/process/session/{{sid}}", self.session_delete)
        route("POST", f"{tool}/process/session/{{sid}}/exec", self.session_exec)
        route("GET", f"{tool}/process/session/{{sid}}/command/{{cid}}", self.session_command)
        route("POST", f"{tool}/process/session/{{sid}}/command/{{cid}}/input", self.session_input)
        route("GET", f"{tool}/process/session/{{sid}}/command/{{cid}}/logs", self.session_logs)
        route("GET", f"{tool}/process/pty/create-connect", self.terminal)
        route("DELETE", f"{tool}/process/pty/{{sid}}", self.terminal_delete)
        route("POST", f"{tool}/files/bulk-upload", self.upload)
        route("POST", f"{tool}/files/bulk-download", self.download)
        route("GET", f"{tool}/files/info", self.file_info)
        route("POST", f"{tool}/files/folder", self.make_folder)
        route("POST", f"{tool}/files/permissions", self.permissions)
        route("DELETE", f"{tool}/files", self.delete_file)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/api"
        return self

    async def __aexit__(self, *_):
        for box_id in list(self.boxes):
            await self.vanish(box_id)
        await self._runner.cleanup()
        await asyncio.gather(*self.removals)

    # --- faults ---

    def fault(self, method, path, **what):
        """Arm a fault for requests whose path ends with the regular expression `path`."""
        fault = Fault(method, path, **what)
        self.faults.append(fault)
        return fault

    def _armed(self, request):
        for fault in self.faults:
            if fault.times > 0 and fault.method == request.method and re.search(f"{fault.path}$", request.path):
                if fault.skip > 0:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                return fault
        return None

    async def vanish(self, box_id):
        """The sandbox is gone, as when its host dies."""
        box = self.boxes.pop(box_id)
        await box.destroy()
        self.removals.append(asyncio.ensure_future(asyncio.to_thread(shutil.rmtree, box.folder, ignore_errors=True)))

    @web.middleware
    async def _middleware(self, request, handler):
        self.calls.append(f"{request.method} {request.path.removeprefix('/api')}")
        if (
            not request.path.startswith(("/storage", "/api/build-logs/"))
            and request.headers.get("Authorization") != f"Bearer {self.key}"
        ):
            return Refused(401, "Invalid credentials").response(request.path)
        fault = self._armed(request)
        FAULT.set(fault)
        try:
            if fault is not None and fault.status is not None:
                raise Refused(fault.status, fault.message, headers=fault.headers)
            if fault is not None and fault.drop == "before":
                request.transport.abort()
                return web.Response()
            response = await handler(request)
            if fault is not None and fault.wait is not None:
                await fault.wait.wait()
            if fault is not None and fault.drop == "after":
                request.transport.abort()
            return response
        except Refused as exc:
            return exc.response(request.path)

    @staticmethod
    async def _body(request, model):
        """The body, as the SDK's model of it: unknown fields and wrong types are a 400."""
        try:
            body = model.from_dict(await request.json())
            if body.additional_properties:
                raise ValueError(f"unknown fields {sorted(body.additional_properties)}")
            return body
        except ValueError as exc:
            raise Refused(400, f"invalid {model.__name__}: {exc}") from exc

    def _box(self, request):
        wanted = request.match_info["box"]
        for box in self.boxes.values():
            if wanted in (box.dto["id"], box.dto["name"]):
                return box
        raise Refused(404, f"Sandbox with ID or name {wanted} not found")

    # --- control plane ---

    async def create(self, request):
        from daytona_api_client_async import CreateSandbox

        body = await self._body(request, CreateSandbox)
        self.created.append(await request.json())
        if body.name and any(box.dto["name"] == body.name for box in self.boxes.values()):
            raise Refused(409, f"Sandbox with name {body.name} already exists")
        if body.snapshot and body.snapshot not in self.snapshots:
            raise Refused(404, f"Snapshot {body.snapshot} not found")
        box_id = str(uuid.uuid4())
        dto = {
            "id": box_id,
            "organizationId": "org",
            "name": body.name or box_id,
            "snapshot": body.snapshot,
            "user": body.user or "root",
            "env": body.env or {},
            "labels": body.labels or {},
            "public": bool(body.public),
            "networkBlockAll": bool(body.network_block_all),
            "kvm": False,
            "target": body.target or "local",
            "cpu": body.cpu or 1,
            "gpu": body.gpu or 0,
            "memory": body.memory or 1,
            "disk": body.disk or 3,
            "state": "creating",
            "autoStopInterval": 15 if body.auto_stop_interval is None else body.auto_stop_interval,
            "autoDeleteInterval": -1 if body.auto_delete_interval is None else body.auto_delete_interval,
            "ttlMinutes": body.ttl_minutes,
            "createdAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "toolboxProxyUrl": self.url.removesuffix("/api") + "/toolbox",
        }
        box = self.boxes[box_id] = Box(dto, self.folder / box_id, env=dict(body.env or {}))
        if body.build_info is not None:
            box.dto["state"] = "pending_build"
            box.spawn(self._build(box, body.build_info))
            return web.json_response(self._dto(box))
        try:
            await self._boot(box)
        except BaseException:
            if box_id in self.boxes:  # nobody has deleted it meanwhile
                await self.vanish(box_id)
            raise
        if body.snapshot:
            shutil.copytree(self.snapshots[body.snapshot], box.root / "app", dirs_exist_ok=True)
        return web.json_response(self._dto(box))

    async def _build(self, box, info):
        """Build it from a Dockerfile, and bring it up, while its maker asks after it and reads the log."""
        lines = info.dockerfile_content.splitlines()
        image = next((line.split()[1] for line in lines if line.upper().startswith("FROM ")), "")
        box.log.append(f"pulling {image}")
        if image not in self.images:
            box.log.append(f"manifest for {image} not found")
            box.dto |= {"state": "build_failed", "errorReason": f"failed to pull {image}: manifest unknown"}
            return
        await self._boot(box)
        box.dto["state"] = "building_snapshot"
        context = box.folder / "context"
        context.mkdir()
        for digest in info.context_hashes or ():
            with tarfile.open(fileobj=io.BytesIO(self.stored[digest])) as tar:
                tar.extractall(context, filter="data")
        box.workdir = "/"
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if not await self._step(box, word.upper(), rest.strip(), context):
                return
        box.dto["state"] = "started"

    async def _boot(self, box):
        await box.boot()
        null = os.open("/dev/null", os.O_RDWR)
        for command in self.services:
            await box.start(["sh", "-c", command], [null] * 3, cwd="/")
        os.close(null)

    async def _step(self, box, word, rest, context):
        """One line of a Dockerfile; False when it failed."""
        if word == "WORKDIR":
            box.workdir = posixpath.join(box.workdir, rest)
            await box.call("mkdir", box.workdir, 0o755, True)
        elif word == "ENV":
            box.env.update(pair.split("=", 1) for pair in shlex.split(rest))
        elif word in ("COPY", "ADD"):
            *sources, target = [part for part in shlex.split(rest) if not part.startswith("--")]
            into = target.endswith("/") or target in (".", "./") or len(sources) > 1
            for source in sources:
                place = box.root / posixpath.join(box.workdir, target).lstrip("/")
                origin = context / source
                if origin.is_dir():
                    shutil.copytree(origin, place, dirs_exist_ok=True)
                else:
                    place = place / origin.name if into else place
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(origin, place)
        elif word == "RUN":
            code, said = await self._run(box, rest, None)
            box.log += [f"RUN {rest}", *said.splitlines()]
            if code:
                reason = f"The command '/bin/sh -c {rest}' returned a non-zero code: {code}"
                box.log.append(reason)
                box.dto |= {"state": "build_failed", "errorReason": reason}
                return False
        return True

    def _dto(self, box):
        from daytona_api_client_async import Sandbox

        return {key: value for key, value in Sandbox.from_dict(box.dto).to_dict().items() if value is not None}

    async def list(self, request):
        wanted = json.loads(request.query.get("labels") or "{}")
        found = [
            box
            for box in self.boxes.values()
            if box.dto["state"] != "destroyed" and wanted.items() <= box.dto["labels"].items()
        ]
        begin = int(request.query.get("cursor") or 0)
        limit = min(int(request.query.get("limit") or self.page), self.page)
        following = str(begin + limit) if begin + limit < len(found) else None
        return web.json_response(
            {"items": [self._dto(box) for box in found[begin : begin + limit]], "nextCursor": following}
        )

    async def get(self, request):
        return web.json_response(self._dto(self._box(request)))

    async def delete(self, request):
        box = self._box(request)
        await self.vanish(box.dto["id"])
        return web.json_response(self._dto(box))

    async def start_or_stop(self, request):
        box = self._box(request)
        box.dto["state"] = "started" if request.match_info["verb"] == "start" else "stopped"
        return web.json_response(self._dto(box))

    async def labels(self, request):
        from daytona_api_client_async import SandboxLabels

        box = self._box(request)
        box.dto["labels"] = (await self._body(request, SandboxLabels)).labels
        return web.json_response({"labels": box.dto["labels"]})

    async def interval(self, request):
        box = self._box(request)
        name = {"autostop": "autoStopInterval", "autodelete": "autoDeleteInterval", "ttl": "ttlMinutes"}
        box.dto[name[request.match_info["what"]]] = int(request.match_info["minutes"])
        return web.json_response(self._dto(box))

    async def pass_time(self, minutes):
        """Let wall-clock time pass: what its time to live does not cover is destroyed."""
        for box in list(self.boxes.values()):
            if box.dto["ttlMinutes"] and minutes >= box.dto["ttlMinutes"]:
                await self.vanish(box.dto["id"])

    async def build_logs_url(self, request):
        box = self._box(request)
        return web.json_response({"url": f"{self.url}/build-logs/{box.dto['id']}"})

    async def build_logs(self, request):
        box = self._box(request)
        while box.dto["state"] in ("pending_build", "building_snapshot"):
            await asyncio.sleep(0.02)
        return web.Response(text="\n".join(box.log))

    async def push_access(self, _request):
        keys = {"accessKey": "key", "secret": "secret", "sessionToken": "token"}
        place = {"storageUrl": self.url.removesuffix("/api") + "/storage", "organizationId": "org", "bucket": "builds"}
        return web.json_response({**keys, **place, "region": "us"})

    async def storage(self, request):
        """Enough of S3 for build contexts, in parts or whole: `<bucket>/<organization>/<hash>/context.tar`."""
        digest, query = request.match_info["path"].split("/")[-2], request.query
        headers = {"ETag": '"1"', "Last-Modified": "Mon, 02 Nov 2026 00:00:00 GMT"}
        if request.method == "HEAD":
            return web.Response(status=200 if digest in self.stored else 404, headers=headers)
        if request.method == "POST" and "uploads" in query:
            names = "".join(f"<{name}>x</{name}>" for name in ("Bucket", "Key", "UploadId"))
            return xml(f"<InitiateMultipartUploadResult>{names}</InitiateMultipartUploadResult>")
        if request.method == "PUT":
            parts = self.parts.setdefault(digest, {})
            parts[int(query.get("partNumber", 1))] = await request.read()
        if request.method == "POST" or "partNumber" not in query:
            parts = self.parts.pop(digest)
            self.stored[digest] = b"".join(parts[number] for number in sorted(parts))
            names = "".join(f"<{name}>x</{name}>" for name in ("Location", "Bucket", "Key", "ETag"))
            return xml(f"<CompleteMultipartUploadResult>{names}</CompleteMultipartUploadResult>")
        return web.Response(headers=headers)

    # --- exec ---

    async def execute(self, request):
        from daytona_toolbox_api_client_async import ExecuteRequest

        box, body = self._box(request), await self._body(request, ExecuteRequest)
        self.commands.append(body.command)
        if not body.command.strip():
            raise Refused(400, "command cannot be empty or whitespace-only")
        try:
            async with asyncio.timeout(body.timeout or None):
                code, said = await self._run(box, body.command, body.cwd, body.envs)
        except TimeoutError:
            raise Refused(408, "command execution timeout", "PROCESS_EXECUTION_TIMEOUT") from None
        except OSError as exc:
            code, said = -1, str(exc)
        return web.json_response({"exitCode": code, "result": said})

    async def _run(self, box, command, cwd, env=None):
        """Run a shell command. Its output is waited for to its end, whoever holds it."""
        read, write = pipe("read")
        script = os.memfd_create("script")
        os.write(script, command.encode())
        os.lseek(script, 0, os.SEEK_SET)
        running = None
        try:
            running = await box.start(["sh"], [script, write, write], cwd=cwd, env=env)
        finally:
            os.close(write)
            os.close(script)
        said = bytearray()
        try:
            while data := await read_fd(read):
                said += data
            return await running.wait(), said.decode(errors="replace")
        except asyncio.CancelledError:
            await running.kill()
            raise
        finally:
            os.close(read)

    # --- sessions ---

    def _session(self, request):
        box = self._box(request)
        found = box.sessions.get(request.match_info["sid"])
        if found is None:
            raise Refused(404, "session not found", "NOT_FOUND")
        return box, found

    def _command(self, request):
        box, session = self._session(request)
        found = session.commands.get(request.match_info["cid"])
        if found is None:
            raise Refused(404, "command not found", "NOT_FOUND")
        return box, found

    async def session_create(self, request):
        from daytona_toolbox_api_client_async import CreateSessionRequest

        box, body = self._box(request), await self._body(request, CreateSessionRequest)
        if body.session_id in box.sessions:
            raise Refused(409, "session already exists")
        box.sessions[body.session_id] = Session(body.session_id)
        return web.Response(status=201)

    async def session_list(self, request):
        found = self._box(request).sessions.values()
        return web.json_response([{"sessionId": one.id, "commands": []} for one in found])

    async def session_delete(self, request):
        box, session = self._session(request)
        for command in session.commands.values():
            if not command.process.exit.done():
                await command.process.kill()
        del box.sessions[session.id]
        return web.Response(status=204)

    async def session_exec(self, request):
        from daytona_toolbox_api_client_async import SessionExecuteRequest

        body = await self._body(request, SessionExecuteRequest)
        self.commands.append(body.command)
        box, session = self._session(request)
        if not body.run_async:
            raise Refused(400, "this server runs session commands with runAsync only")
        stdin, into = pipe("write")
        pipes = [pipe("read"), pipe("read")]
        fds = [stdin, pipes[0][1], pipes[1][1]]
        try:
            process = await box.start(["sh", "-c", body.command], fds)
        finally:
            for fd in fds:
                os.close(fd)
        command = SessionCommand(str(uuid.uuid4()), body.command, not body.suppress_input_echo, process, into)
        session.commands[command.id] = command
        box.spawn(self._follow(box, command, pipes))
        return web.json_response({"cmdId": command.id}, status=202)

    async def _follow(self, box, command, pipes):
        labels = [
            box.spawn(self._label(command, *pair)) for pair in zip((p[0] for p in pipes), (STDOUT, STDERR), strict=True)
        ]
        await command.process.wait()
        with contextlib.suppress(OSError):
            os.close(command.stdin)
        await asyncio.gather(*labels)
        command.done = True
        command.wake()

    @staticmethod
    async def _label(command, fd, prefix):
        """Line by line into the log, as a shell's `read` and `printf` do it."""
        rest = b""
        try:
            while data := await read_fd(fd):
                *lines, rest = (rest + data).split(b"\n")
                if lines:
                    command.add(b"".join(prefix + line.replace(b"\0", b"") + b"\n" for line in lines))
            if rest:
                command.add(prefix + rest.replace(b"\0", b"") + b"\n")
        finally:
            os.close(fd)

    async def session_command(self, request):
        _, command = self._command(request)
        exited = {"exitCode": command.process.exit.result()} if command.done else {}
        return web.json_response({"id": command.id, "command": command.command, **exited})

    async def session_input(self, request):
        from daytona_toolbox_api_client_async import SessionSendInputRequest

        body = await self._body(request, SessionSendInputRequest)
        _, command = self._command(request)
        if command.process.exit.done():
            raise Refused(410, "command has already completed", "COMMAND_ALREADY_COMPLETED")
        data = body.data.encode()
        data += b"" if data.endswith(b"\n") else b"\n"
        try:
            await write_fd(command.stdin, data)
        except OSError as exc:
            raise Refused(500, f"failed to write to input pipe: {exc}") from exc
        if command.echo:
            command.add(STDOUT + data)
        return web.Response(status=204)

    async def session_logs(self, request):
        _, command = self._command(request)
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        fault, at = FAULT.get(), 0
        with contextlib.suppress(ConnectionError):
            while True:
                grown = command.grown
                while at < len(command.log):
                    data = bytes(command.log[at : at + CHUNK])
                    await ws.send_bytes(data)
                    at += len(data)
                    if fault is not None and fault.close and at >= fault.after_bytes:
                        await ws.close(code=fault.close, message=b"a test closed it")
                        return ws
                if command.done:
                    break
                if ws.closed or await self._client_left(ws, grown):
                    return ws
            await ws.close()
        return ws

    @staticmethod
    async def _client_left(ws, grown):
        """Wait for more; True when the client has gone."""
        waits = [asyncio.ensure_future(grown.wait()), asyncio.ensure_future(ws.receive())]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return waits[1] in done
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    # --- terminals ---

    async def terminal(self, request):
        box, session_id = self._box(request), request.query["id"]
        if session_id in box.terminals:
            raise Refused(409, f"PTY session with ID '{session_id}' already exists")
        master, slave = os.openpty()
        os.set_blocking(master, False)
        termios.tcsetwinsize(slave, (int(request.query["rows"]), int(request.query["cols"])))
        try:
            process = await box.start(["sh", "-i"], [slave] * 3, cwd=request.query.get("cwd"), tty=True)
        finally:
            os.close(slave)
        box.terminals[session_id] = process
        ws = web.WebSocketResponse(max_msg_size=0, protocols=("X-Daytona-Pty-Exit-Control",))
        await ws.prepare(request)
        await ws.send_json({"type": "control", "status": "connected"})
        outward = box.spawn(self._show(ws, master, process, FAULT.get()))
        try:
            await self._type(ws, master)
        finally:
            outward.cancel()
            await asyncio.gather(outward, return_exceptions=True)
            if not process.exit.done():
                box.terminals.pop(session_id, None)
                await process.kill()
            box.terminals.pop(session_id, None)
            os.close(master)
        return ws

    @staticmethod
    async def _type(ws, master):
        async for message in ws:
            if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT):
                continue
            data = message.data if isinstance(message.data, bytes) else message.data.encode()
            if len(data) > PTY_LIMIT:
                await ws.close(code=WSCloseCode.MESSAGE_TOO_BIG)
                return
            with contextlib.suppress(OSError):
                await write_fd(master, data)

    @staticmethod
    async def _show(ws, master, process, fault):
        shown = 0
        while data := await read_fd(master, 32 * 1024):
            shown += len(data)
            try:
                async with asyncio.timeout(10):
                    await ws.send_bytes(data)
            except (TimeoutError, ConnectionError):
                await ws.close(code=WSCloseCode.POLICY_VIOLATION, message=b"slow consumer")
                return
            if fault is not None and fault.close and shown >= fault.after_bytes:
                await ws.close(code=fault.close, message=b"a test closed it")
                return
        code = await process.wait()
        code = 128 - code if code < 0 else code
        with contextlib.suppress(ConnectionError):
            await ws.send_json({"type": "control", "status": "exited", "exitCode": code})
            await ws.close(code=1000 if code == 0 else 1011, message=json.dumps({"exitCode": code}).encode())

    async def terminal_delete(self, request):
        box = self._box(request)
        process = box.terminals.pop(request.match_info["sid"], None)
        if process is None:
            raise Refused(404, "PTY session not found")
        await process.kill()
        return web.json_response({"message": "PTY session deleted"})

    # --- files ---

    async def upload(self, request):
        box = self._box(request)
        reader, places, wrong, files = await request.multipart(), {}, [], []
        while (part := await reader.next()) is not None:
            match = re.fullmatch(r"files\[(\d+)\]\.(path|file)", part.name or "")
            if match is None:
                raise Refused(400, f"unexpected part {part.name}")
            if match[2] == "path":
                places[match[1]] = (await part.text()).strip()
                continue
            place = places[match[1]]
            try:
                fd = await box.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            except OSError as exc:
                wrong.append(f"{place}: create: {exc.strerror}")
                await part.read()
                continue
            with open(fd, "wb") as file:
                while data := await part.read_chunk(1 << 20):
                    file.write(data)
            files.append({"path": place})
        if wrong:
            return web.json_response({"errors": wrong, "files": files}, status=400)
        return web.json_response({"files": files})

    async def download(self, request):
        from daytona_toolbox_api_client_async import FilesDownloadRequest

        box, body = self._box(request), await self._body(request, FilesDownloadRequest)
        boundary = "DAYTONA-FILE-BOUNDARY"
        response = web.StreamResponse(headers={"Content-Type": f"multipart/form-data; boundary={boundary}"})
        await response.prepare(request)
        for path in body.paths:
            await self._part(response, boundary, box, path)
        await response.write(f"--{boundary}--\r\n".encode())
        await response.write_eof()
        return response

    @staticmethod
    async def _part(response, boundary, box, path):
        """One file, or why there is none."""

        async def head(name, kind):
            named = f"filename=\"{path}\"; filename*=utf-8''{quote(path, safe='')}"
            lines = [
                f"--{boundary}",
                f'Content-Disposition: form-data; name="{name}"; {named}',
                f"Content-Type: {kind}",
            ]
            await response.write("\r\n".join([*lines, "", ""]).encode())

        try:
            fd = await box.open(path, os.O_RDONLY)
        except OSError as exc:
            status, code = (404, "FILE_NOT_FOUND") if exc.errno == errno.ENOENT else (403, "FILE_ACCESS_DENIED")
            said = {
                "statusCode": status,
                "code": code,
                "message": f"{exc.strerror}: {path}",
                "source": "DAYTONA_DAEMON",
            }
            await head("error", "application/json")
            await response.write(json.dumps(said).encode() + b"\r\n")
            return
        await head("file", "application/octet-stream")
        with open(fd, "rb") as file:
            while data := file.read(1 << 18):
                await response.write(data)
        await response.write(b"\r\n")

    async def file_info(self, request):
        path = request.query["path"]
        try:
            mode, *rest = await self._box(request).call("stat", path)
        except OSError as exc:
            raise Refused(404, f"{exc.strerror}: {path}", "FILE_NOT_FOUND") from exc
        kind = {"name": posixpath.basename(path), "isDir": mode & 0o170000 == 0o040000, "size": rest[5]}
        who = {"owner": str(rest[3]), "group": str(rest[4]), "modTime": str(rest[7])}
        return web.json_response({**kind, **who, "mode": oct(mode), "permissions": f"{mode & 0o777:04o}"})

    async def make_folder(self, request):
        await self._box(request).call("mkdir", request.query["path"], int(request.query["mode"], 8), True)
        return web.Response(status=201)

    async def permissions(self, request):
        await self._box(request).call("chmod", request.query["path"], int(request.query["mode"], 8))
        return web.Response()

    async def delete_file(self, request):
        await self._box(request).call("unlink", request.query["path"])
        return web.Response(status=204)


async def serve_forever(folder):
    """`python daytona_server.py FOLDER`: say URL and key, and serve until stdin ends."""
    async with DaytonaServer(Path(folder)) as server:
        sys.stdout.write(json.dumps({"url": server.url, "key": server.key}) + "\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(serve_forever(sys.argv[1]))
