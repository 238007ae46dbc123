"""Base images for tests, made on this machine: no registry is asked.

`DEBIAN` is a Debian root by debootstrap, kept as a tar in the cache. `BARE` is a busybox and a `flock`: no Python, no C
library of the image's own. `python tests/docker_images.py` makes both.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import attrs

from orchestrator.install import cache_root
from states.errors import ConfigError, SandboxError

DEBIAN = "rollout-tests/debian:bookworm"
BARE = "rollout-tests/bare:1"
SUITE = "bookworm"
PACKAGES = "python3,ca-certificates"


class NoEngine(Exception):
    """There is no engine, or nothing to make an image from. The message says what to do."""


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self.path)


def ask(method: str, path: str, body: object = None, *, at: str | None = None) -> tuple[int, bytes]:
    """One request to the engine, without a client: what tests look at, and what they make bare."""
    connection = _Connection(at or engine_path())
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    kind = "application/json" if isinstance(body, dict) else "application/x-tar"
    try:
        connection.request(method, path, body=data, headers={"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def engine_path() -> str:
    """The socket of the engine that answers. Raises `NoEngine`."""
    try:
        from orchestrator.sandboxes._docker_engine import engine_url
    except ImportError as error:
        raise NoEngine(f"the docker extra is not installed: {error}") from error
    try:
        return engine_url().removeprefix("unix://")
    except (ConfigError, SandboxError) as error:
        raise NoEngine(str(error)) from error


def require_engine() -> None:
    """Raises `NoEngine` unless one answers."""
    try:
        status, said = ask("GET", "/_ping")
    except OSError as error:
        raise NoEngine(f"no Docker engine answers at {engine_path()}: {error}") from error
    if status != 200:
        raise NoEngine(f"the Docker engine at {engine_path()} says {status}: {said[:200]!r}")


def make(name: str, at: str | None = None) -> str:
    """The image `DEBIAN` or `BARE`, imported into the engine where it is not there yet. Raises `NoEngine`."""
    if at is None:
        require_engine()
    with _locked(name):
        if ask("GET", f"/images/{name}/json", at=at)[0] == 200:
            return name
        source = _debian() if name == DEBIAN else _bare()
        repo, _, tag = name.rpartition(":")
        with source:
            status, said = ask("POST", f"/images/create?fromSrc=-&repo={quote(repo)}&tag={tag}", source, at=at)
        if status != 200 or b'"error"' in said:
            raise NoEngine(f"the engine takes no image {name}: {said[-300:]!r}")
    return name


@contextmanager
def _locked(name: str) -> Iterator[None]:
    place = cache_root() / "test-images"
    place.mkdir(parents=True, exist_ok=True)
    with (place / f"{name.replace('/', '-')}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _debian() -> io.BufferedIOBase:
    """A Debian root as a tar, made once."""
    kept = cache_root() / "test-images" / f"{SUITE}-{PACKAGES.replace(',', '-')}.tar"
    if not kept.is_file():
        if shutil.which("debootstrap") is None or os.geteuid() != 0:
            raise NoEngine("the base image is made by debootstrap, as root: apt-get install debootstrap")
        with tempfile.TemporaryDirectory() as folder:
            root, draft = Path(folder, "root"), kept.with_suffix(".draft")
            command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NoEngine(f"debootstrap failed: {done.stdout[-500:]} {done.stderr[-500:]}")
            shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
            shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
            subprocess.run(["tar", "-C", str(root), "-cf", str(draft), "."], check=True)
            draft.rename(kept)
    return kept.open("rb")


def _bare() -> io.BytesIO:
    """Busybox under all its names, and `flock`, which Debian's has not, with the libraries that it wants."""
    busybox, flock = shutil.which("busybox"), shutil.which("flock")
    if busybox is None or flock is None or b"statically" not in _said("file", "-L", busybox):
        raise NoEngine("the bare image is made from a static busybox: apt-get install busybox-static")
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for folder in ("bin", "usr", "etc", "root", "tmp"):
            _entry(tar, folder, tarfile.DIRTYPE, mode=0o1777 if folder == "tmp" else 0o755)
        _entry(tar, "usr/bin", tarfile.SYMTYPE, link="../bin")
        tar.add(busybox, "bin/busybox", recursive=False, filter=_dereferenced)
        for name in _said(busybox, "--list").decode().split():
            if name != "busybox":
                _entry(tar, f"bin/{name}", tarfile.SYMTYPE, link="busybox")
        for path in {flock, *_libraries(flock)}:
            where = "bin/flock" if path == flock else path.lstrip("/")
            data = Path(path).read_bytes()
            _entry(tar, where, tarfile.REGTYPE, data=data, mode=0o755)
    made.seek(0)
    return made


def _libraries(program: str) -> list[str]:
    return [word for word in _said("ldd", program).decode().split() if word.startswith("/")]


def _entry(
    tar: tarfile.TarFile, name: str, kind: bytes, *, data: bytes = b"", link: str = "", mode: int = 0o755
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.size = kind, link, mode, len(data)
    tar.addfile(info, io.BytesIO(data))


def _dereferenced(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mode, info.uid, info.gid = 0o755, 0, 0
    return info


def _said(*command: str) -> bytes:
    return subprocess.run(command, capture_output=True, check=False).stdout


# --- an engine of a test's own -------------------------------------------------------------------------------


@attrs.define(eq=False)
class Dockerd:
    """A dockerd that may be killed, or whose disk may be filled, without harm to anybody. Needs root."""

    home: Path
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, home: Path, megabytes: int | None) -> Dockerd:
        """Start one below `home`, on a disk in memory where a size is given. Raises `OSError`."""
        if os.geteuid() != 0 or shutil.which("dockerd") is None:
            raise OSError("dockerd, as root, is what it takes")
        if megabytes:
            (home / "data").mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(home / "data")]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                raise OSError("a disk in memory cannot be mounted")
        engine = cls(home)
        try:
            engine.start_again()
        except OSError:
            engine.stop()
            raise
        return engine

    @property
    def url(self) -> str:
        """As DOCKER_HOST says it."""
        return f"unix://{self.home}/docker.sock"

    def start_again(self) -> None:
        """Start it on the data that is there, and wait until it answers. Raises `OSError`."""
        for stale in (self.home / "pid", self.home / "docker.sock", self.home / "exec/containerd/containerd.pid"):
            stale.unlink(missing_ok=True)
        # in a network of its own: without a bridge it would remove that of the engine beside it
        command = [
            "unshare",
            "--net",
            "dockerd",
            "--data-root",
            f"{self.home}/data",
            "--exec-root",
            f"{self.home}/exec",
            "-H",
            self.url,
        ]
        command += ["--pidfile", f"{self.home}/pid", "--bridge=none", "--iptables=false"]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if ask("GET", "/_ping", at=f"{self.home}/docker.sock")[0] == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise OSError((self.home / "log").read_text()[-500:])

    def load(self, name: str) -> None:
        """Bring an image in."""
        make(name, at=f"{self.home}/docker.sock")

    def containers(self) -> list[dict]:
        """All that it has."""
        return json.loads(ask("GET", "/containers/json?all=1", at=f"{self.home}/docker.sock")[1])

    def kill(self) -> None:
        """As if it had crashed, with the containerd that it started."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        pid = self.home / "exec/containerd/containerd.pid"
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), 9)

    def stop(self) -> None:
        """End it and what it has. Idempotent."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([mount for mount in mounts if mount.startswith(f"{self.home}/")]):
            subprocess.run(["umount", "-l", mount], check=False)


if __name__ == "__main__":
    for image in (DEBIAN, BARE):
        sys.stdout.write(f"{make(image)}\n")
