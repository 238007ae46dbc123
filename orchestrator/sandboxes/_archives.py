"""Folders on their way into a sandbox and out of it, as one file: the number of calls does not grow with the files.

What comes out of a sandbox is not trusted: an entry that would be written outside of the target is refused, and links
never lead out of it. All of it blocks; callers run it in a worker thread.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Collection
from pathlib import Path

from states.errors import PathEscape, SandboxError


def pack(source: Path, archive: Path, *, without: Collection[str] = ()) -> str:
    """Write a file, or a folder's content, to a new archive; returns the file's name, "" for a folder.

    `without`: folders in it that stay here, by their paths in it. Links are kept as links, whatever they lead to;
    devices, FIFOs and sockets are left out, and set-uid bits.

    Raises:
        SandboxError: There is no such file or folder; names it.
    """
    try:
        mode = source.stat().st_mode
    except OSError as exc:
        raise SandboxError(f"cannot upload {source}: {exc.strerror}") from exc
    try:
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            if stat.S_ISREG(mode):
                with source.open("rb") as file:
                    _add(tar, "file", mode, os.fstat(file.fileno()).st_size, file)
                return source.name
            if not stat.S_ISDIR(mode):
                raise SandboxError(f"cannot upload {source}: it is neither a file nor a folder")
            _add_folder(tar, source, "", frozenset(without))
    except OSError as exc:
        raise SandboxError(f"cannot upload {source}: {exc}") from exc
    return ""


def _add_folder(tar: tarfile.TarFile, folder: Path, prefix: str, without: frozenset[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name, info = prefix + entry.name, entry.stat(follow_symlinks=False)
            if entry.is_symlink():
                member = tarfile.TarInfo(name)
                member.type, member.linkname = tarfile.SYMTYPE, os.readlink(entry.path)  # noqa: PTH115 - of an entry
                tar.addfile(member)
            elif name in without:
                continue
            elif entry.is_dir():
                member = tarfile.TarInfo(name)
                member.type, member.mode = tarfile.DIRTYPE, info.st_mode & 0o777
                tar.addfile(member)
                _add_folder(tar, Path(entry.path), f"{name}/", without)
            elif stat.S_ISREG(info.st_mode):
                with Path(entry.path).open("rb") as file:
                    _add(tar, name, info.st_mode, os.fstat(file.fileno()).st_size, file)


def _add(tar: tarfile.TarFile, name: str, mode: int, size: int, file: object) -> None:
    member = tarfile.TarInfo(name)
    member.mode, member.size = mode & 0o777, size
    tar.addfile(member, file)  # type: ignore[arg-type]  # all that it does is read


def unpack(archive: Path, target: Path, *, name: str) -> None:
    """Unpack what a sandbox packed: the file `name` to `target`, into it where it is a folder; or a folder's content.

    Raises:
        PathEscape: An entry, or a link, leads out of `target`.
        SandboxError: It cannot be written, or is no archive.
    """
    try:
        with tarfile.open(archive) as tar:
            if name:
                _file(tar, target / name if target.is_dir() else target)
            else:
                target.mkdir(parents=True, exist_ok=True)
                _folder(tar, target)
    except tarfile.FilterError as exc:
        raise PathEscape(f"what came out of the sandbox leads out of {target}: {exc}") from exc
    except (OSError, tarfile.TarError) as exc:
        raise SandboxError(f"cannot write {target}: {exc}") from exc


def _file(tar: tarfile.TarFile, place: Path) -> None:
    member = tar.next()
    source = tar.extractfile(member) if member is not None else None
    if member is None or source is None:
        raise SandboxError(f"cannot write {place}: the sandbox sent no file")
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as out:
        while data := source.read(1 << 20):
            out.write(data)
    place.chmod(member.mode & 0o777)


def _folder(tar: tarfile.TarFile, target: Path) -> None:
    modes: list[tuple[Path, int]] = []
    for member in tar:
        clean = tarfile.data_filter(member, str(target))
        tar.extract(clean, target, filter="data")
        if not member.issym():
            modes.append((target / member.name, member.mode & 0o777))
    for place, mode in reversed(modes):  # what is in a folder comes after it, and may be shut off by its mode
        place.chmod(mode)
