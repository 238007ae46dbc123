"""Files of a sandbox, seen from the host: every path is walked, one component at a time, before it is trusted.

An agent may plant any link, FIFO or sparse file, and may swap them while we look. So nothing is opened by a whole
path: each component is opened below the one before it, links are read and walked by us, and a link that leads out of
where it may lead is a `PathEscape`. Files are opened so that a FIFO or a device never blocks, and written by renaming.

All of it blocks; callers run it in a worker thread. A container runs this very file, alone and started in a moment, so
that it imports neither `typing` nor anything that is not in Python. Each import counts there, see supervisor.py:
`contextlib` and `collections` would be a fifth of its start.
"""

# ruff: noqa: PTH101, SIM105

from __future__ import annotations

import errno
import os
import posixpath
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import contextmanager
    from pathlib import Path
else:

    def contextmanager(function: Callable[..., Iterator[object]]) -> Callable[..., object]:
        """As in `contextlib`, for a function that never swallows what is raised in its block."""
        return lambda *args, **named: _Steps(function(*args, **named))

    class _Steps:
        """The two steps of such a function: to where it yields, and on from there."""

        __slots__ = ("steps",)

        def __init__(self, steps: Iterator[object]) -> None:
            self.steps = steps

        def __enter__(self) -> object:
            return next(self.steps)

        def __exit__(self, _kind: object, exc: BaseException | None, _trace: object) -> None:
            if exc is None:
                next(self.steps, None)
                return
            try:
                self.steps.throw(exc)
            except BaseException as raised:
                if raised is not exc:
                    raise


if TYPE_CHECKING or __name__ != "_files":
    from states.errors import PathEscape, SandboxError
else:  # in a container, where nothing of ours is but this folder

    class SandboxError(Exception):
        """As in `states.errors`; the host is told by its name."""

    class PathEscape(SandboxError):
        """As in `states.errors`; the host is told by its name."""


__all__ = ["Mount", "PathEscape", "SandboxError", "Tree", "copy_folder", "open_source", "open_target", "remove"]

READ_LIMIT = 256 << 20
"""Largest file that `read_file` takes into memory, in bytes."""

MAX_LINKS = 40
MAX_DEPTH = 100
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Mount:
    """A folder of the host and the path at which the sandbox has it. `owner`: the uid that files get; None: ours."""

    __slots__ = ("at", "host", "owner", "writable")

    def __init__(self, at: str, host: str, *, writable: bool = True, owner: int | None = None) -> None:
        self.at, self.host, self.writable, self.owner = at, host, writable, owner


class Tree:
    """The folders of a sandbox.

    `confined`: a link may lead anywhere within the folder it stands in, and not into another one. An agent's own
    handle is not confined: its links may lead to whatever it sees anyway.
    """

    __slots__ = ("confined", "mounts", "name")

    def __init__(self, name: str, mounts: tuple[Mount, ...], *, confined: bool = True) -> None:
        self.name, self.mounts, self.confined = name, mounts, confined

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises `SandboxError` naming the path when there is no such file."""
        with self._walk(path) as spot, spot.open() as fd:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise SandboxError(f"not a regular file in sandbox {self.name}: {path}")
            if info.st_size > READ_LIMIT:
                raise SandboxError(f"{path} in sandbox {self.name} has {info.st_size} bytes: download it instead")
            taken = bytearray()
            while len(taken) <= info.st_size and (data := os.read(fd, 1 << 20)):
                taken += data
            return bytes(taken)

    def write(self, path: str, data: bytes, mode: int) -> None:
        """Write a file, making its folders; what is there, a link too, is replaced and never written through."""
        with self._walk(path, make=True) as spot:
            spot.require_writable()
            _write(spot.fd, spot.name, data, mode, spot.mount.owner)

    def copy_in(self, source: Path, target: str) -> None:
        """Copy a file or a folder's content in, replacing what is in the way."""
        with open_source(source) as origin:
            self.take_in(origin, source.name, target)

    def take_in(self, origin: int, name: str, target: str) -> None:
        """The same for a file or folder that is open; `name` is what a file is called where `target` is a folder."""
        try:
            if stat.S_ISDIR(os.fstat(origin).st_mode):
                with self._walk(posixpath.join(target, "."), make=True) as spot:
                    spot.require_writable()
                    _Copy(lambda *_: True, spot.mount.owner).folder(origin, spot.fd)
            else:
                with self._walk(self._file_target(name, target), make=True) as spot:
                    spot.require_writable()
                    _Copy(lambda *_: True, spot.mount.owner).file(origin, spot.fd, spot.name)
        except OSError as exc:
            raise SandboxError(f"cannot upload {name} to {target} in sandbox {self.name}: {exc}") from exc

    def copy_out(self, source: str, target: Path) -> None:
        """Copy a file or a folder's content out. Links that could lead out of it are left out, as are devices."""
        with open_target(source, target, folder=self.is_folder(source)) as (out, name):
            self.give_out(source, out, name)

    def is_folder(self, source: str) -> bool:
        """Whether it is a folder. Raises `SandboxError` where it is neither that nor a file."""
        with self._walk(source) as spot, spot.open() as origin:
            return self._is_folder(source, origin)

    def _is_folder(self, source: str, origin: int) -> bool:
        mode = os.fstat(origin).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise SandboxError(f"not a file or folder in sandbox {self.name}: {source}")
        return stat.S_ISDIR(mode)

    def give_out(self, source: str, out: int, name: str, owner: int | None = None) -> None:
        """Copy a file, or a folder's content, into the open folder `out`. `name`: what a file is called there.

        Where `name` is empty, a file keeps its own; where it is not, a folder was not expected.
        """
        try:
            with self._walk(source) as spot, spot.open() as origin:
                copy = _Copy(_stays_inside, owner)
                if not self._is_folder(source, origin):
                    copy.file(origin, out, name or posixpath.basename(source))
                elif name:
                    raise SandboxError(f"{source} in sandbox {self.name} was swapped for another while we looked")
                else:
                    copy.folder(origin, out)
        except OSError as exc:
            raise SandboxError(f"cannot download {source} of sandbox {self.name}: {exc}") from exc

    def _file_target(self, name: str, target: str) -> str:
        """A file goes to `target`; under its own name where that is a folder already."""
        try:
            with self._walk(target) as spot, spot.open() as fd:
                folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        except SandboxError as exc:
            if isinstance(exc, PathEscape):
                raise
            folder = target.endswith("/")
        return posixpath.join(target, name) if folder else target

    @contextmanager
    def _walk(self, path: str, *, make: bool = False) -> Iterator[_Spot]:
        if not path.startswith("/"):
            raise SandboxError(f"a path in a sandbox is absolute, this one is not: {path}")
        if "\0" in path:
            raise SandboxError(f"a path cannot hold a NUL character: {path!r}")
        walk = _Walk(self, path, make=make)
        try:
            yield walk.go()
        except FileNotFoundError as exc:
            raise SandboxError(f"no such file or folder in sandbox {self.name}: {path}") from exc
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise PathEscape(f"{path} in sandbox {self.name} was swapped for a link while we looked") from exc
            raise SandboxError(f"cannot use {path} in sandbox {self.name}: {exc.strerror}") from exc
        finally:
            walk.close()


class _Spot:
    """Where a path ends: a name in an open folder ("." is that folder itself)."""

    __slots__ = ("fd", "mount", "name", "path")

    def __init__(self, path: str, fd: int, name: str, mount: Mount) -> None:
        self.path, self.fd, self.name, self.mount = path, fd, name, mount

    @contextmanager
    def open(self) -> Iterator[int]:
        """Open it for reading, whatever it is; never blocks and follows no link."""
        with _opened(self.name, _FILE, dir_fd=self.fd) as fd:
            yield fd

    def require_writable(self) -> None:
        """Raises `SandboxError` for a folder of the system."""
        if not self.mount.writable:
            raise SandboxError(f"{self.path} is read-only in a sandbox")


class _Walk:
    """One walk along a path. `here` is where it stands: (name, its mount, its open folder) from the root on.

    `fence`, once a link was followed, is the folder that it may not lead out of.
    """

    __slots__ = ("fence", "here", "links", "make", "path", "tree")

    def __init__(self, tree: Tree, path: str, *, make: bool) -> None:
        self.tree, self.path, self.make = tree, path, make
        self.here: list[tuple[str, Mount | None, int]] = []
        self.links = 0
        self.fence: Mount | None = None

    def go(self) -> _Spot:
        todo = _parts(self.path)
        last_is_folder = self.path.endswith(("/", "/."))
        while todo:
            part = todo.pop()
            if part == ".":
                continue
            if part == "..":
                self._up()
                continue
            at = "/" + "/".join([*(name for name, _, _ in self.here), part])
            if self._enter_mount(at, part):
                continue
            mount, folder = self._standing(at)
            final = not todo and not last_is_folder
            found = self._look(part, folder, mount, final=final)
            if stat.S_ISLNK(found) and not (final and self.make):
                self._follow(part, folder, mount, todo)
            elif final:
                return _Spot(at, folder, part, mount)
            else:
                self.here.append((part, mount, os.open(part, _DIR, dir_fd=folder)))
        mount, folder = self._standing("/" + "/".join(name for name, _, _ in self.here))
        return _Spot(self.path, folder, ".", mount)

    def close(self) -> None:
        while self.here:
            self._up()

    def _up(self) -> None:
        if not self.here:
            raise PathEscape(f"the path {self.path} leads out of sandbox {self.tree.name}")
        _, _, fd = self.here.pop()
        if fd >= 0:
            os.close(fd)

    def _enter_mount(self, at: str, part: str) -> bool:
        """Whether `at` is the root of a mount, or lies on the way to one."""
        for mount in self.tree.mounts:
            if mount.at == at:
                self.here.append((part, mount, os.open(mount.host, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
                return True
        inside = bool(self.here) and self.here[-1][1] is not None
        if not inside and any(mount.at.startswith(at + "/") for mount in self.tree.mounts):
            self.here.append((part, None, -1))
            return True
        return False

    def _standing(self, at: str) -> tuple[Mount, int]:
        _, mount, fd = self.here[-1] if self.here else ("", None, -1)
        if (mount is None and self.links) or (self.fence is not None and mount is not self.fence):
            raise PathEscape(f"{self.path} in sandbox {self.tree.name} is a link that leads to {at}")
        if mount is None:
            places = ", ".join(mount.at for mount in self.tree.mounts if mount.writable)
            raise SandboxError(f"no such file or folder here in sandbox {self.tree.name}: {at} (there is {places})")
        return mount, fd

    def _look(self, part: str, folder: int, mount: Mount, *, final: bool) -> int:
        """The mode of `part`; a folder that is missing is made where we write."""
        try:
            return os.lstat(part, dir_fd=folder).st_mode
        except FileNotFoundError:
            if not self.make:
                raise
        if final:
            return 0
        try:
            os.mkdir(part, 0o755, dir_fd=folder)
            _give(mount.owner, part, folder)
        except FileExistsError:
            pass
        return os.lstat(part, dir_fd=folder).st_mode

    def _follow(self, part: str, folder: int, mount: Mount, todo: list[str]) -> None:
        """Walk the link ourselves: its target's parts come next."""
        self.links += 1
        if self.links > MAX_LINKS:
            raise PathEscape(f"{self.path} in sandbox {self.tree.name} goes through too many links")
        target = os.readlink(part, dir_fd=folder)
        if target.startswith("/"):
            self.close()
        todo += _parts(target)
        if self.tree.confined and self.fence is None:
            self.fence = mount


def _parts(path: str) -> list[str]:
    """The names in a path, the last one first."""
    return [part for part in path.split("/") if part][::-1]


# --- copying ---


@contextmanager
def open_source(source: Path) -> Iterator[int]:
    """Open what is to be copied in. Raises `SandboxError` naming it where it is neither a file nor a folder."""
    try:
        origin = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise SandboxError(f"cannot upload {source}: {exc.strerror}") from exc
    try:
        mode = os.fstat(origin).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise SandboxError(f"cannot upload {source}: it is neither a file nor a folder")
        yield origin
    finally:
        os.close(origin)


@contextmanager
def open_target(source: str, target: Path, *, folder: bool) -> Iterator[tuple[int, str]]:
    """Where `source` goes on this host: an open folder, and the name of a file in it ("" for a folder's content)."""
    place = target / posixpath.basename(source) if not folder and target.is_dir() else target
    home = place if folder else place.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        out = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise SandboxError(f"cannot download {source} to {target}: {exc.strerror}") from exc
    try:
        yield out, "" if folder else place.name
    finally:
        os.close(out)


def _give(owner: int | None, name: str, folder: int) -> None:
    """Hand what we made to the sandbox's user, where that is not us."""
    if owner is not None:
        os.chown(name, owner, owner, dir_fd=folder, follow_symlinks=False)


@contextmanager
def _opened(path: str | Path, flags: int, *, dir_fd: int | None = None) -> Iterator[int]:
    fd = os.open(path, flags, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _readable(name: str, flags: int, folder: int) -> Iterator[int]:
    """Open an entry for reading, also one whose permissions its owner took away."""
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except PermissionError:
        with _opened(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder) as handle:
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IMODE(os.fstat(handle).st_mode) & 0o777 | 0o500)
        fd = os.open(name, flags, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _replacing(folder: int, name: str, mode: int, owner: int | None) -> Iterator[int]:
    """A new file that takes the place of `name` once it is complete."""
    draft = f".{os.urandom(8).hex()}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        yield fd
        _give(owner, draft, folder)
        os.fchmod(fd, mode & 0o777)  # never set-uid: its owner may be root
        os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        try:
            os.unlink(draft, dir_fd=folder)
        except FileNotFoundError:
            pass
        raise
    finally:
        os.close(fd)


def _write(folder: int, name: str, data: bytes, mode: int, owner: int | None) -> None:
    with _replacing(folder, name, mode, owner) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]


def _stays_inside(target: str, depth: int) -> bool:
    """Whether a link, `depth` folders down, cannot lead out of the copy: `../` only in front, and not too often."""
    parts = [part for part in target.split("/") if part not in {"", "."}]
    climbs = 0
    while climbs < len(parts) and parts[climbs] == "..":
        climbs += 1
    return not target.startswith("/") and climbs <= depth and ".." not in parts[climbs:]


class _Copy:
    """Copies between two open folders, replacing what is in the way. `links` says which links come along, as links."""

    __slots__ = ("links", "owner")

    def __init__(self, links: Callable[[str, int], bool], owner: int | None = None) -> None:
        self.links, self.owner = links, owner

    def folder(self, origin: int, out: int, depth: int = 0) -> None:
        """The content of a folder. Devices, sockets and FIFOs are left out."""
        if depth > MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"folders are nested deeper than {MAX_DEPTH}")
        for name in os.listdir(origin):
            mode = os.lstat(name, dir_fd=origin).st_mode
            if stat.S_ISLNK(mode):
                self.link(os.readlink(name, dir_fd=origin), out, name, depth)
            elif stat.S_ISDIR(mode):
                with _readable(name, _DIR, origin) as inner, self.subfolder(name, out) as copy:
                    self.folder(inner, copy, depth + 1)
                    os.fchmod(copy, mode & 0o777)
            elif stat.S_ISREG(mode):
                with _readable(name, _FILE, origin) as file:
                    self.file(file, out, name, mode)

    def link(self, target: str, out: int, name: str, depth: int) -> None:
        """A link, as it is; never followed."""
        if self.links(target, depth):
            draft = f".{os.urandom(8).hex()}"
            os.symlink(target, draft, dir_fd=out)
            _give(self.owner, draft, out)
            os.replace(draft, name, src_dir_fd=out, dst_dir_fd=out)

    def file(self, origin: int, out: int, name: str, mode: int | None = None) -> None:
        """An open file, its holes as holes: a sparse terabyte costs what it holds."""
        info = os.fstat(origin)
        with _replacing(out, name, info.st_mode if mode is None else mode, self.owner) as copy:
            at = 0
            while at < info.st_size:
                try:
                    at = os.lseek(origin, at, os.SEEK_DATA)
                except OSError:  # only a hole is left
                    break
                end = min(os.lseek(origin, at, os.SEEK_HOLE), info.st_size)
                os.lseek(copy, at, os.SEEK_SET)
                while at < end and (sent := os.sendfile(copy, origin, at, min(end - at, 1 << 24))):
                    at += sent
            os.ftruncate(copy, info.st_size)

    @contextmanager
    def subfolder(self, name: str, parent: int) -> Iterator[int]:
        """The folder `name`, made if there is none; a link or file of that name gives way."""
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                os.unlink(name, dir_fd=parent)
                os.mkdir(name, 0o700, dir_fd=parent)
        _give(self.owner, name, parent)
        with _opened(name, _DIR, dir_fd=parent) as fd:
            yield fd


def copy_folder(origin: int, out: int, owner: int | None) -> None:
    """The content of one open folder into another one, links as they are."""
    _Copy(lambda *_: True, owner).folder(origin, out)


def remove(root: Path) -> None:
    """Remove a folder, whatever an agent made of it: unreadable folders, and nests too deep to have a path.

    Folders inside folders are moved up to `root` first, so that no step goes deeper than one.
    """
    try:
        top = os.open(root, _DIR)
    except FileNotFoundError:
        return
    try:
        number = 0
        while names := os.listdir(top):  # noqa: PTH208 - of an open folder
            for name in names:
                if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
                    os.unlink(name, dir_fd=top)
                    continue
                os.chmod(name, 0o700, dir_fd=top)
                with _opened(name, _DIR, dir_fd=top) as folder:
                    number = _empty(folder, top, number)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    root.rmdir()


def _empty(folder: int, top: int, number: int) -> int:
    for name in os.listdir(folder):
        if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
            os.chmod(name, 0o700, dir_fd=folder)
            number += 1
            os.rename(name, f".up-{number}-{os.urandom(4).hex()}", src_dir_fd=folder, dst_dir_fd=top)
        else:
            os.unlink(name, dir_fd=folder)
    return number
