"""Files, walked one component at a time: an agent may have planted a link, a FIFO or a terabyte of nothing anywhere.

A path that is *confined* may follow links within the folder that it starts in, and never out of it. An agent's own
reads and writes are not confined: they are done as the agent, who sees all that a link of theirs could lead to.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
import tarfile
from collections import deque
from typing import BinaryIO, Deque, List, Optional, Sequence, Tuple

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
MAX_LINKS = 40
MAX_DEPTH = 100

PACK_LIMIT = 8 << 30
"""What one download may hold, in bytes."""


class Escape(Exception):
    """A link leads out of where it may lead."""


class Unusable(Exception):
    """A path is not what it has to be."""


class Spot:
    """Where a path ends: a name in an open folder ("." is that folder itself)."""

    def __init__(self, folder: int, name: str) -> None:
        self.folder, self.name = folder, name

    def open(self) -> int:
        return os.open(self.name, FILE, dir_fd=self.folder)

    def close(self) -> None:
        os.close(self.folder)


class Walk:
    """One walk. `fence` is the folder that links may not lead out of, None for an agent's own paths."""

    def __init__(self, path: str, fence: Optional[str], *, make: bool, owner: int) -> None:
        self.path, self.fence, self.make, self.owner = path, fence, make, owner
        self.stack: List[Tuple[str, int]] = [("", os.open("/", FOLDER))]
        self.links = 0

    def go(self) -> Spot:
        try:
            return self._go()
        finally:
            for _, fd in self.stack:
                os.close(fd)

    def _go(self) -> Spot:
        todo = deque(part for part in self.path.split("/") if part)
        as_folder = self.path.endswith(("/", "/."))
        while todo:
            part = todo.popleft()
            if part == ".":
                continue
            if part == "..":
                self._up()
                continue
            self._fenced(part)
            folder = self.stack[-1][1]
            final = not todo and not as_folder
            mode = self._look(part, folder, final=final)
            if stat.S_ISLNK(mode) and not (final and self.make):
                self._follow(part, folder, todo)
            elif final:
                return Spot(os.dup(folder), part)
            else:
                self.stack.append((part, os.open(part, FOLDER, dir_fd=folder)))
        if self.links:
            self._fenced("")
        return Spot(os.dup(self.stack[-1][1]), ".")

    def _up(self) -> None:
        if len(self.stack) == 1:
            raise Escape("%s leads out of the sandbox" % self.path)
        os.close(self.stack.pop()[1])

    def _fenced(self, part: str) -> None:
        """Once a link was followed: is this still inside, or on the way there?"""
        at = posixpath.join("/", *[name for name, _ in self.stack], part).rstrip("/") or "/"
        if self.links and self.fence is not None and at != self.fence:
            inside = at.startswith(self.fence + "/")
            on_the_way = bool(part) and self.fence.startswith(at.rstrip("/") + "/")
            if not inside and not on_the_way:
                raise Escape("%s is a link that leads to %s" % (self.path, at))

    def _look(self, part: str, folder: int, *, final: bool) -> int:
        try:
            return os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            if not self.make:
                raise
        if final:
            return 0
        try:
            os.mkdir(part, 0o755, dir_fd=folder)
            give(part, folder, self.owner)
        except FileExistsError:
            pass
        return os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode

    def _follow(self, part: str, folder: int, todo: Deque[str]) -> None:
        self.links += 1
        if self.links > MAX_LINKS:
            raise Escape("%s goes through too many links" % self.path)
        target = os.readlink(part, dir_fd=folder)
        if target.startswith("/"):
            while len(self.stack) > 1:
                os.close(self.stack.pop()[1])
        todo.extendleft(reversed([name for name in target.split("/") if name]))


def walk(path: str, places: Optional[Sequence[str]], *, make: bool = False, owner: int = -1) -> Spot:
    """Go to `path`. `places`: the folders that links may not lead out of; None where the path is an agent's own."""
    if not path.startswith("/") or "\0" in path:
        raise Unusable("not an absolute path: %r" % path)
    fence = None
    if places is not None:
        clean = posixpath.normpath(path)
        holding = [place for place in places if (clean + "/").startswith(place + "/")]
        fence = max(holding, key=len) if holding else "/" + clean.lstrip("/").partition("/")[0]
    try:
        return Walk(path, fence, make=make, owner=owner).go()
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise Escape("%s was swapped for a link while we looked" % path) from exc
        raise


def give(name: str, folder: int, owner: int) -> None:
    """Hand what we made to its owner, where that is not us."""
    if owner >= 0:
        os.chown(name, owner, owner, dir_fd=folder, follow_symlinks=False)


# --- one file ---


def read(path: str, places: Optional[Sequence[str]], limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes."""
    spot = walk(path, places)
    try:
        fd = spot.open()
    finally:
        spot.close()
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise Unusable("not a regular file: %s" % path)
        if info.st_size > limit:
            raise Unusable("%s has %d bytes: download it instead" % (path, info.st_size))
        return file.read(limit)


def write(path: str, places: Optional[Sequence[str]], source: BinaryIO, mode: int, owner: int) -> None:
    """Write a file, making its folders; what is there, a link too, is replaced and never written through."""
    spot = walk(path, places, make=True, owner=owner)
    try:
        put(spot.folder, spot.name, source, mode, owner)
    finally:
        spot.close()


def put(folder: int, name: str, source: BinaryIO, mode: int, owner: int) -> None:
    """A new file that takes the place of `name` once it is complete."""
    draft = ".%s" % os.urandom(8).hex()
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with open(fd, "wb") as file:
            while True:
                data = source.read(1 << 20)
                if not data:
                    break
                file.write(data)
            file.flush()
            give(draft, folder, owner)
            os.fchmod(fd, mode & 0o777)
        os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        try:
            os.unlink(draft, dir_fd=folder)
        except OSError:
            pass
        raise


# --- many, as an archive ---


def pack(path: str, places: Sequence[str], out: BinaryIO) -> str:
    """Write a file or a folder's content to `out` as a tar; returns which it was.

    Links that could lead out of the copy are left out, as are devices, sockets and FIFOs.
    """
    spot = walk(path, places)
    try:
        fd = spot.open()
    finally:
        spot.close()
    try:
        mode = os.fstat(fd).st_mode
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            packer = Packer(tar, path)
            if stat.S_ISDIR(mode):
                packer.folder(fd, "", 0)
                return "folder"
            if stat.S_ISREG(mode):
                packer.file(fd, "file")
                return "file"
    finally:
        os.close(fd)
    raise Unusable("not a file or folder: %s" % path)


class Packer:
    """Fills one archive."""

    def __init__(self, tar: tarfile.TarFile, path: str) -> None:
        self.tar, self.path, self.total = tar, path, 0

    def folder(self, fd: int, prefix: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise Unusable("%s is nested deeper than %d folders" % (self.path, MAX_DEPTH))
        for name in sorted(os.listdir(fd)):
            mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                self.link(os.readlink(name, dir_fd=fd), prefix + name, depth)
            elif stat.S_ISDIR(mode):
                info = tarfile.TarInfo(prefix + name)
                info.type, info.mode = tarfile.DIRTYPE, mode & 0o777
                self.tar.addfile(info)
                inner = os.open(name, FOLDER, dir_fd=fd)
                try:
                    self.folder(inner, prefix + name + "/", depth + 1)
                finally:
                    os.close(inner)
            elif stat.S_ISREG(mode):
                inner = os.open(name, FILE, dir_fd=fd)
                try:
                    self.file(inner, prefix + name)
                finally:
                    os.close(inner)

    def file(self, fd: int, name: str) -> None:
        status = os.fstat(fd)
        self.total += status.st_size
        if self.total > PACK_LIMIT:
            raise Unusable("%s holds more than %d GiB, which is too much to download" % (self.path, PACK_LIMIT >> 30))
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = status.st_size, status.st_mode & 0o777, status.st_mtime
        with open(os.dup(fd), "rb") as file:
            self.tar.addfile(info, Padded(file))  # type: ignore[arg-type]  # all that it does is read

    def link(self, target: str, name: str, depth: int) -> None:
        if stays_inside(target, depth):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            self.tar.addfile(info)


class Padded:
    """A file that is as long as it was, also when it shrinks while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int) -> bytes:
        return self.file.read(size).ljust(size, b"\0")


def stays_inside(target: str, depth: int) -> bool:
    """Whether a link, `depth` folders down, cannot lead out of the copy: `../` only in front, and not too often."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    climbs = 0
    while climbs < len(parts) and parts[climbs] == "..":
        climbs += 1
    return not target.startswith("/") and climbs <= depth and ".." not in parts[climbs:]


def unpack(archive: str, name: str, path: str, places: Sequence[str], owner: int) -> int:
    """Unpack our own archive at `path`: a folder's content, or where it holds the one file `name`, that file.

    The archive is trusted; the tree is not. Returns how many entries there were.
    """
    with tarfile.open(archive) as tar:
        if name:
            member = tar.next()
            assert member is not None
            if is_folder(path, places):
                path = posixpath.join(path, name)
            source = tar.extractfile(member)
            assert source is not None
            write(path, places, source, member.mode, owner)  # type: ignore[arg-type]  # all that it does is read
            return 1
        spot = walk(path.rstrip("/") + "/.", places, make=True, owner=owner)
        try:
            return Unpacker(tar, owner).run(spot.folder)
        finally:
            spot.close()


def is_folder(path: str, places: Sequence[str]) -> bool:
    try:
        spot = walk(path, places)
    except OSError:
        return path.endswith("/")
    try:
        return stat.S_ISDIR(os.stat(spot.name, dir_fd=spot.folder, follow_symlinks=False).st_mode)
    finally:
        spot.close()


class Unpacker:
    """Empties one archive into an open folder, no link being followed."""

    def __init__(self, tar: tarfile.TarFile, owner: int) -> None:
        self.tar, self.owner = tar, owner
        self.modes: List[Tuple[str, int]] = []

    def run(self, top: int) -> int:
        count = 0
        for member in self.tar:
            count += 1
            *above, name = member.name.split("/")
            folder = self.descend(top, above)
            try:
                self.entry(member, name, folder)
            finally:
                os.close(folder)
        for path, mode in reversed(self.modes):
            folder = self.descend(top, path.split("/"))
            os.fchmod(folder, mode)
            os.close(folder)
        return count

    def entry(self, member: tarfile.TarInfo, name: str, folder: int) -> None:
        if member.isdir():
            os.close(self.child(folder, name))
            self.modes.append((member.name, member.mode & 0o777))
        elif member.issym():
            draft = ".%s" % os.urandom(8).hex()
            os.symlink(member.linkname, draft, dir_fd=folder)
            give(draft, folder, self.owner)
            os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
        else:
            source = self.tar.extractfile(member)
            assert source is not None
            put(folder, name, source, member.mode, self.owner)  # type: ignore[arg-type]  # all that it does is read

    def descend(self, top: int, parts: Sequence[str]) -> int:
        fd = os.dup(top)
        for part in parts:
            below = self.child(fd, part)
            os.close(fd)
            fd = below
        return fd

    def child(self, folder: int, name: str) -> int:
        """The folder `name`, made if there is none; a link or file of that name gives way."""
        try:
            os.mkdir(name, 0o755, dir_fd=folder)
            give(name, folder, self.owner)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=folder)
                os.mkdir(name, 0o755, dir_fd=folder)
                give(name, folder, self.owner)
        return os.open(name, FOLDER, dir_fd=folder)
