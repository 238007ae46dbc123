"""System calls that Python 3.8 does not have, and a process's place in `/proc`."""

from __future__ import annotations

import ctypes
import os
from typing import Dict, Iterator, Optional, Set, Tuple

NEWNS, NEWNET, NEWPID = 0x00020000, 0x40000000, 0x20000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18

KEPT_CAPABILITIES = frozenset({0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31})
"""What root of an ordinary container has: no SYS_ADMIN, so no mount, and no SYS_PTRACE."""

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    """Leave namespaces for new ones."""
    _checked(_libc.unshare(flags), "unshare")


def enter(path: str, flags: int) -> None:
    """Join the namespace that `path` is."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.setns(fd, flags), path)
    finally:
        os.close(fd)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """As the system call of this name."""
    words = [os.fsencode(word) if word else None for word in (source, target, kind)]
    _checked(_libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), os.fsencode(data) or None), target)


def bind(source: str, target: str, *, read_only: bool = False) -> None:
    """Let `target` show what `source` is."""
    mount(source, target, flags=BIND | REC)
    if read_only:
        mount("", target, flags=REMOUNT | BIND | RDONLY | NOSUID | NODEV)


def no_new_privileges() -> None:
    """From here on no set-uid program, sudo for one, gives anything."""
    _checked(_libc.prctl(38, 1, 0, 0, 0), "prctl")


def undumpable() -> None:
    """Nobody of the same uid may look into this process."""
    _checked(_libc.prctl(4, 0, 0, 0, 0), "prctl")


def drop_capabilities() -> None:
    """Root stays root of files, and of nothing else."""
    number = 0
    while _libc.prctl(23, number, 0, 0, 0) >= 0:
        if number not in KEPT_CAPABILITIES:
            _checked(_libc.prctl(24, number, 0, 0, 0), "prctl")
        number += 1


def loopback_up() -> None:
    """Let 127.0.0.1 work in a new network namespace; there need not be an `ip` program."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, 0x8913, request))[1]  # SIOCGIFFLAGS
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", flags | 1))  # SIOCSIFFLAGS: up


def is_mapped(uid: int) -> bool:
    """Whether this user namespace knows `uid`: without it nobody can become it."""
    with open("/proc/self/uid_map") as lines:
        ranges = [[int(word) for word in line.split()] for line in lines]
    return any(first <= uid < first + count for first, _, count in ranges)


# --- processes ---


def pids() -> Iterator[int]:
    """Every process that is seen from here."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def next_number() -> int:
    """The next process number. They are given in order: two in a row say that nobody else got one in between."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def group_of(pid: int) -> int:
    """The process group of a process; 0 when there is no such process any more."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def stat_of(pid: int) -> Optional[Tuple[str, int, str]]:
    """(state, parent, start) of a process; None when there is none."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    state = words[0].decode()
    if state == "Z" and int(words[17]) > 1:
        state = "S"  # what has ended is its first thread: the others are at work
    return state, int(words[1]), words[19].decode()


def name_of(pid: int) -> str:
    """What a process calls itself, with its number."""
    try:
        with open("/proc/%d/comm" % pid, "rb") as file:
            return "%s[%d]" % (file.read().decode("utf-8", "replace").strip(), pid)
    except OSError:
        return "[%d]" % pid


def namespace_of(pid: int, kind: str = "pid") -> str:
    """The namespace that a process is in; "" when there is no such process any more."""
    try:
        return os.readlink("/proc/%d/ns/%s" % (pid, kind))
    except OSError:
        return ""


def living() -> Dict[int, Tuple[int, str]]:
    """Parent and start of each process that is not dead yet."""
    found = {}
    for pid in pids():
        stat = stat_of(pid)
        if stat is not None and stat[0] not in "ZX":
            found[pid] = (stat[1], stat[2])
    return found


def ancestors(pid: int, seen: Dict[int, Tuple[int, str]]) -> Set[int]:
    """The process itself and those above it."""
    found: Set[int] = set()
    while pid in seen and pid not in found:
        found.add(pid)
        pid = seen[pid][0]
    return found
