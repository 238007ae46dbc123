"""PID 1 of a container sandbox: a namespace for each handle, files in and out, the way to the model gateway.

Runs *inside* the container, from an interpreter that is bound beside the image's own files (`_docker_kit.py`), so that
images need no Python, and speaks over the one socket that the host left it. Everything goes through that socket: the
engine is asked nothing between the container's start and its end.

    PID 1, here                  root, CAP_SYS_ADMIN; reads nothing but the host's words
     |- PID 1 of handle solver-1   a PID, mount and IPC namespace of its own; `supervisor.Supervisor`, as in the local
     |   `- what the agent runs    sandbox; no capability, no way to get one, seccomp
     |- PID 1 of handle verifier-1 the same, with Docker's own capabilities and the test files
     |- the relay                  this container's 127.0.0.1:PORT -> the gateway's unix socket
     `- the image's ENTRYPOINT     and whatever it starts: the task's own services, which no handle's end touches

Killing PID 1 of a handle makes the kernel kill all that is in its namespace; it can be waited for only once that is
empty. That is the proof which `SandboxHandle.end` returns. It holds against an agent that is root in its namespace.

What its capabilities would open for all (Docker's seccomp profile allows `mount`, `unshare` and the like to containers
that have CAP_SYS_ADMIN) is closed again for everything but this process: see `confine`.
"""

# It must start fast, see supervisor.py.
# marshal is read from the host only.
# ruff: noqa: D102, D103, PTH101, PTH102, PTH103, PTH110, PTH112, PTH116, PTH123, PTH208, S103, S302

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import _thread
import ctypes
import marshal
import os
import resource
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING or __name__ != "container":
    from orchestrator.sandboxes import _files, supervisor
else:
    import _files
    import supervisor
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

HOME = "/home/agent"
TMP = "/tmp"  # noqa: S108 - in the container
PLACE = "/run/rollout"
"""Where everything of ours is."""

PRIVATE = f"{PLACE}/private"
"""For PID 1 alone: the host's socket, and what handles have of their own."""

SOCKET = f"{PRIVATE}/host/control.sock"
BINDS = f"{PLACE}/binds"
"""Where the engine binds the host's folders; each handle finds them at their own paths."""

TRUSTED = ("/tests", "/solution", "/logs/verifier")
"""Folders that only trusted handles see."""

HELD_BACK = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
"""What Docker hides of `/proc`, and what it makes read-only: so is the `/proc` of each handle."""

CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
"""Docker's default: what root in an ordinary container may do, and root here too."""

NEWNS, NEWIPC, NEWPID = 0x0002_0000, 0x0800_0000, 0x2000_0000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
PLAIN = MS_NOSUID | MS_NODEV

PROOF = "proof:"
"""What the end of a handle is said with: pid, namespace, processes looked at, processes found in it."""

GIVEN = 3
"""What `give_for_good` exits with; 0 would say that somebody wants to look into the container."""

CONTROL = 3
"""The file descriptor of a handle's control socket."""

_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *args: Any) -> None:
    """A call of the C library; raises `OSError`."""
    if getattr(_libc, function)(*args) < 0:
        number = ctypes.get_errno()
        what = next((arg.decode() for arg in args if isinstance(arg, bytes) and arg.startswith(b"/")), "")
        raise OSError(number, f"{function}: {os.strerror(number)}", what)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    arguments = [text.encode() or None for text in (source, target, kind)]
    call("mount", *arguments, ctypes.c_ulong(flags), data.encode() or None)


def bind(source: str, target: str) -> None:
    mount(source, target, flags=MS_BIND | MS_REC)


# --- what a process loses for good ---

NATIVE = {
    # machine: (AUDIT_ARCH, clone, the others in the order of CLOSED)
    "x86_64": (0xC000003E, 56, (165, 166, 272, 308, 321, 298, 300, 179, 170, 171, 103, 212, 312)),
    "aarch64": (0xC00000B7, 220, (40, 39, 97, 268, 280, 241, 262, 60, 161, 162, 116, 18, 272)),
}
I386 = (0x40000003, 120, (21, 52, 310, 346, 357, 336, 338, 131, 74, 121, 103, 253, 349, 22))
CLOSED = (
    *("mount", "umount2", "unshare", "setns", "bpf", "perf_event_open", "fanotify_init", "quotactl"),
    *("sethostname", "setdomainname", "syslog", "lookup_dcookie", "kcmp"),
)
CLOSED_EVERYWHERE = (428, 429, 430, 431, 432, 433, 438, 440, 442, 443, 467)
"""open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_getfd, process_madvise, mount_setattr, quotactl_fd,
open_tree_attr."""

CLONE3 = 435
CLONE_NEW = 0x7E02_0000
ALLOW, EPERM, ENOSYS = 0x7FFF_0000, 0x0005_0001, 0x0005_0026


def filter_program(machine: str) -> bytes:
    """What seccomp runs on each system call: Docker's default, as far as CAP_SYS_ADMIN made it wider. b"": unknown.

    `clone` may make no namespace; `clone3`, whose flags cannot be looked at, is answered as if it were not there, which
    every C library takes for an older kernel. A call of another architecture's table gets the same answer, but for
    32-bit x86, whose table is known.
    """
    if machine not in NATIVE:
        return b""
    tables = [NATIVE[machine], *([I386] if machine == "x86_64" else [])]
    program: list[tuple[int, Any, int, int]] = [_load(4)]
    for arch, clone, closed in tables:
        checks = [
            _load(0),
            *([_jump(0x35, 0x4000_0000, "ENOSYS")] if arch == 0xC000003E else []),  # x32
            *(_jump(0x15, number, "EPERM") for number in (*closed, *CLOSED_EVERYWHERE)),
            _jump(0x15, CLONE3, "ENOSYS"),
            (0x15, 0, 2, clone),
            _load(16),
            _jump(0x45, CLONE_NEW, "EPERM"),
            (0x06, 0, 0, ALLOW),
        ]
        program += [(0x15, 0, len(checks), arch), *checks]
    ends = {"ENOSYS": len(program), "EPERM": len(program) + 1}
    program += [(0x06, 0, 0, ENOSYS), (0x06, 0, 0, EPERM)]
    code = bytearray()
    for at, (op, true, false, value) in enumerate(program):
        goes = ends[true] - at - 1 if isinstance(true, str) else true
        code += op.to_bytes(2, sys.byteorder) + bytes((goes, false)) + value.to_bytes(4, sys.byteorder)
    return bytes(code)


def _load(offset: int) -> tuple[int, int, int, int]:
    return (0x20, 0, 0, offset)


def _jump(op: int, value: int, label: str) -> tuple[int, Any, int, int]:
    return (op, label, 0, value)


def confine(uid: int, gid: int, groups: tuple[int, ...] = (), *, privileges: bool) -> None:
    """Become a user for good. `privileges`: set-uid programs work, root has Docker's capabilities; else neither."""
    kept = CAPABILITIES if privileges else ()
    program = filter_program(os.uname().machine)
    if program:
        code = ctypes.create_string_buffer(program)
        head = (len(program) // 8).to_bytes(8, sys.byteorder) + ctypes.addressof(code).to_bytes(8, sys.byteorder)
        call("prctl", 22, 2, ctypes.create_string_buffer(head, 16), 0, 0)  # PR_SET_SECCOMP, as long as we may
    for number in range(64):
        if number not in kept:
            _libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP; those that this kernel does not know fail
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if uid == 0:
        bits = sum(1 << number for number in kept)
        halves = b"".join(part.to_bytes(4, sys.byteorder) for part in (bits & 0xFFFF_FFFF, bits & 0xFFFF_FFFF, 0))
        header = (0x2008_0522).to_bytes(4, sys.byteorder) + bytes(4)
        call("capset", ctypes.create_string_buffer(header), ctypes.create_string_buffer(halves + bytes(12)))
    if not privileges:
        call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: not to be traced, which a change of uid allows again


# --- PID 1 of the container ---


class Container(supervisor.Supervisor):
    """The loop of the container's PID 1. A request has a word `do` that says which method starts what is asked for."""

    def __init__(self, control: _socket.socket, settings: dict[str, Any]) -> None:
        super().__init__(control, settings)
        self.own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.spaces: dict[int, int] = {}
        self.leaving = supervisor.HOST_GONE

    def gone(self) -> NoReturn:
        os._exit(self.leaving)

    def heard(self, asked: dict[str, Any]) -> bool:
        """What is here is to be found again: when the host goes, that is as it should be."""
        if asked.get("do") != "keep":
            return False
        self.leaving = 0
        return True

    def start(self, command: supervisor.Command, asked: dict[str, Any], given: dict[str, int]) -> None:
        """A handle or a piece of work on files, as a process that can be waited for and killed."""
        if asked["do"] == "handle":
            self.open_handle(command, asked, given)
        else:
            command.pid = work(self, lambda: copy(self.settings, asked, given), given["out"])
        self.commands[command.pid] = command
        self.watch(command.status.fileno(), lambda: self.told(command))

    def open_handle(self, command: supervisor.Command, asked: dict[str, Any], given: dict[str, int]) -> None:
        call("unshare", NEWPID)
        try:
            command.pid = os.fork()
        finally:
            if command.pid:  # we, and not the child: our next children are to be in our own again
                call("setns", self.own, NEWPID)
        if command.pid:
            self.spaces[command.pid] = os.stat(f"/proc/{command.pid}/ns/pid").st_ino
            return
        try:
            handle_main(self, asked, given["control"])
        except BaseException as exc:
            print(f"handle {asked['name']}: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)  # noqa: T201 - the container's log
            os.write(CONTROL, f"error {exc}".encode()[:4096])
        finally:
            os._exit(1)

    def report(self, command: supervisor.Command, code: int) -> None:
        """For a handle, with the proof: who is still in its namespace, once its PID 1 could be waited for."""
        space = self.spaces.pop(command.pid, 0)
        if space:
            looked_at, left = members(space)
            command.say(f"exit {code} {PROOF} {command.pid} {space} {looked_at} {left}")
            self.forget(command)
        else:
            super().report(command, code)


def members(space: int) -> tuple[int, int]:
    """How many processes this container has, and how many of them are in that PID namespace."""
    looked_at = left = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            left += os.stat(f"/proc/{pid}/ns/pid").st_ino == space
            looked_at += 1
        except OSError:
            continue
    return looked_at, left


def work(parent: supervisor.Supervisor, does: Callable[[], bytes], out: int) -> int:
    """Do it in a process of its own, and write to `out` what came of it: one byte, `=` or who is to blame, the rest."""
    pid = os.fork()
    if pid:
        return pid
    answer = b"!it ended early"
    try:
        os.setsid()
        parent.control.close()
        answer = b"=" + does()
    except _files.PathEscape as exc:
        answer = b"/" + str(exc).encode(errors="surrogateescape")
    except (_files.SandboxError, OSError) as exc:
        answer = b"!" + str(exc).encode(errors="surrogateescape")
    finally:
        try:
            write_all(out, answer)
        finally:
            os._exit(0)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def copy(settings: dict[str, Any], asked: dict[str, Any], given: dict[str, int]) -> bytes:
    """Files of the whole container, in or out, with what root needs for that and no more."""
    confine(0, 0, privileges=True)
    if asked["do"] == "take":
        make_top(asked["path"], settings["agent"])
    tree = _files.Tree(settings["name"], places(settings, trusted=True))
    if asked["do"] == "look":
        return b"folder" if tree.is_folder(asked["path"]) else b"file"
    if asked["do"] == "take":
        tree.take_in(given["file"], asked["name"], asked["path"])
    else:
        tree.give_out(asked["path"], given["file"], asked["name"], asked["owner"])
    return b""


def make_top(path: str, agent: dict[str, int]) -> None:
    """The folder at the top of a path that the image has not: it is the agents'."""
    parts = path.split("/")
    if (
        path.startswith("/")
        and len(parts) > 2
        and ".." not in parts
        and parts[1]
        and not os.path.lexists(f"/{parts[1]}")
    ):
        os.mkdir(f"/{parts[1]}", 0o755)
        os.chown(f"/{parts[1]}", agent["uid"], agent["gid"])


def places(settings: dict[str, Any], *, trusted: bool) -> tuple[_files.Mount, ...]:
    """The folders at the top of the container, and those in which files change hands, as places of their own."""
    agent = settings["agent"]
    shared = [_files.Mount(at, at, owner=agent["uid"] or None) for at in settings["shared"]]
    ours = [_files.Mount(at, at, writable=trusted) for at in TRUSTED]
    own = [_files.Mount(at, at, owner=None if trusted else agent["uid"] or None) for at in (HOME, TMP)]
    taken = {place.at for place in (*shared, *ours, *own)} | {"/proc", "/sys", "/dev"}
    rest = []
    for path in (f"/{name}" for name in os.listdir("/")):
        info = os.lstat(path)
        if path not in taken and stat.S_ISDIR(info.st_mode):
            rest.append(_files.Mount(path, path, owner=info.st_uid or None))
    return (*shared, *ours, *own, *rest)


# --- a handle ---


class Handle(supervisor.Supervisor):
    """The loop of a handle's PID 1: commands as in the local sandbox, and files, by the handle's user."""

    def start(self, command: supervisor.Command, asked: dict[str, Any], given: dict[str, int]) -> None:
        if "do" in asked:
            command.pid = work(self, lambda: self.files(asked, given), given["out"])
        elif asked["user"]:
            command.pid = self.start_as(asked, given)
        else:
            super().start(command, asked, given)
            return
        self.commands[command.pid] = command
        self.watch(command.status.fileno(), lambda: self.told(command))

    def start_as(self, asked: dict[str, Any], given: dict[str, int]) -> int:
        """Start a command as another user of the image, for a handle that is root."""
        if not self.settings["trusted"]:
            raise PermissionError(1, f"an agent's commands run as {self.settings['user']}, not as", asked["user"])
        uid, gid, _ = user_of(asked["user"])
        os.chdir(asked["cwd"])
        program = supervisor.find(asked["argv"][0], asked["env"].get("PATH", ""))
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            wanted = (given.get("stdin", self.null), given["stdout"], given["stderr"], given.get("script", -1))
            for target, fd in enumerate(os.dup(fd) if fd >= 0 else -1 for fd in wanted):
                if fd >= 0:
                    os.dup2(fd, target)
            os.setgroups(())
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            os.execve(program, asked["argv"], asked["env"])  # noqa: S606 - no shell of ours
        finally:
            os._exit(126)

    def files(self, asked: dict[str, Any], given: dict[str, int]) -> bytes:
        trusted = self.settings["trusted"]
        tree = _files.Tree(self.settings["name"], places(self.settings, trusted=trusted), confined=trusted)
        if asked["do"] == "read":
            return tree.read(asked["path"])
        tree.write(asked["path"], supervisor.read_all(given["data"]), asked["mode"])
        return b""


def handle_main(container: Container, asked: dict[str, Any], control: int) -> NoReturn:
    """Become PID 1 of a handle: its own view, its own user, and nothing left of what the container's PID 1 holds."""
    os.setsid()
    settings = container.settings | asked
    agent = settings["agent"]
    os.dup2(control, CONTROL, inheritable=False)
    os.closerange(CONTROL + 1, 1 << 20)
    view(settings)
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("500")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o022)
    if settings["trusted"]:
        confine(0, 0, privileges=True)
    else:
        confine(agent["uid"], agent["gid"], privileges=agent["uid"] == 0)
    os.chdir("/")
    handle = Handle(_socket.socket(fileno=CONTROL), settings)
    _thread.stack_size(262_144)
    if settings["disk_bytes"]:
        _thread.start_new_thread(handle.keep_disk, ())
    handle.control.send(b"ready")
    handle.run()


def view(settings: dict[str, Any]) -> None:
    """The handle's own mounts: HOME and /tmp, /proc of its processes, the host's folders; and what it may not see."""
    agent, trusted = settings["agent"], settings["trusted"]
    call("unshare", NEWNS | NEWIPC)
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    bind(own_folder(settings, "tmp", 0o1777), TMP)
    if agent["uid"] and not trusted:
        bind(own_folder(settings, "home", 0o700), HOME)
    mount("tmpfs", "/dev/shm", "tmpfs", PLAIN, "size=64m,mode=1777")  # noqa: S108 - in the container
    mount("proc", "/proc", "proc", PLAIN | MS_NOEXEC)
    for path in filter(os.path.lexists, HELD_BACK):
        if os.path.isdir(path):
            cover(path)
        else:
            bind("/dev/null", path)
    for path in filter(os.path.lexists, READ_ONLY):
        bind(path, path)
        mount("", path, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | PLAIN | MS_NOEXEC)
    for number, (path, is_folder) in enumerate(settings["binds"]):
        make_way(path, is_folder=is_folder, agent=0 if trusted else agent["uid"])
        bind(f"{BINDS}/{number}", path)
    for path in () if trusted else TRUSTED:
        cover(path)
    cover(PRIVATE)


def cover(path: str) -> None:
    """Hide a folder, for good: who cannot unmount cannot look below."""
    mount("tmpfs", path, "tmpfs", MS_RDONLY | PLAIN, "size=4k,mode=0")


def own_folder(settings: dict[str, Any], name: str, mode: int) -> str:
    """What a handle has of its own, found again by a later one of the same name; a new /tmp begins as the image's."""
    agent, trusted = settings["agent"], settings["trusted"]
    folder = f"{PRIVATE}/handles/{settings['folder']}/{name}"
    try:
        os.makedirs(folder)
    except FileExistsError:
        return folder
    if name == "tmp":
        entries = os.open(TMP, os.O_RDONLY | os.O_DIRECTORY)
        target = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        _files.copy_folder(entries, target, None if trusted else agent["uid"])
        os.close(entries)
        os.close(target)
    os.chmod(folder, mode)
    if not trusted:
        os.chown(folder, agent["uid"], agent["gid"])
    return folder


def make_way(path: str, *, is_folder: bool, agent: int) -> None:
    """A place to bind at, which the agent may reach: a folder on the way that is closed to it is covered."""
    at = ""
    for part in path.strip("/").split("/")[:-1]:
        at += f"/{part}"
        if not os.path.isdir(at):
            os.mkdir(at, 0o755)
        elif agent and os.stat(at).st_uid != agent and not os.stat(at).st_mode & 0o001:
            mount("tmpfs", at, "tmpfs", PLAIN, "size=1m,mode=755")
    if is_folder:
        os.makedirs(path, exist_ok=True)
    elif not os.path.exists(path):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


# --- coming up ---


def prepare(settings: dict[str, Any]) -> None:
    """The folders, and the user that agents are."""
    os.chmod(PRIVATE, 0o700)
    for folder in TRUSTED:
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o700)
    os.makedirs(HOME, exist_ok=True)
    if not os.path.isdir(TMP):
        os.mkdir(TMP)
        os.chmod(TMP, 0o1777)
    os.makedirs(f"{PRIVATE}/handles", exist_ok=True)
    settings["agent"] = give(settings["shared"], settings["user"])


def give(folders: list[str], name: str) -> dict[str, int]:
    """Make folders the agents', and return who these are. What an image already has so costs a look at it."""
    agent = agent_of(name)
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
        if agent["uid"]:
            hand_over(folder, agent["uid"], agent["gid"])
    return agent


def give_for_good(folders: list[str], name: str) -> NoReturn:
    """The same as PID 1 of a container that an image is made of: a file that changes hands is copied, once here."""
    try:
        give(folders, name)
    except OSError as exc:
        print(exc, flush=True)  # noqa: T201 - the container's log
        os._exit(1)
    os._exit(GIVEN)


def agent_of(name: str) -> dict[str, int]:
    """The uid and gid of the agents' user. `agent` is made where the image has none, from uid 1000 on, and no other."""
    known = users()
    if name in known:
        uid, gid, _ = known[name]
        return {"uid": uid, "gid": gid}
    if name != "agent":
        others = ", ".join(other for other, (uid, _, _) in known.items() if uid == 0 or uid >= 1000)
        raise OSError(f"the image has no user {name!r}; give user=agent, who is made, or one that it has: {others}")
    taken = {uid for uid, _, _ in known.values()}
    uid = next(number for number in range(1000, 65_000) if number not in taken)
    add_line("/etc/passwd", f"{name}:x:{uid}:{uid}:{name}:{HOME}:/bin/sh", "root:x:0:0:root:/root:/bin/sh")
    add_line("/etc/group", f"{name}:x:{uid}:", "root:x:0:")
    return {"uid": uid, "gid": uid}


def add_line(path: str, line: str, first: str) -> None:
    """Add a line to a file of the image, which may not be there, or may not end in a newline."""
    try:
        with open(path, errors="surrogateescape") as file:
            text = file.read()
    except FileNotFoundError:
        text = first
    with open(path, "w", errors="surrogateescape") as file:
        file.write(f"{text}{'' if text.endswith(chr(10)) else chr(10)}{line}\n")


def users() -> dict[str, tuple[int, int, str]]:
    """uid, gid and home of each user of the image."""
    found = {"root": (0, 0, "/root")}
    os.makedirs("/etc", exist_ok=True)
    try:
        with open("/etc/passwd", errors="replace") as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        return found
    for line in lines:
        parts = line.split(":")
        if len(parts) == 7 and parts[2].isdigit() and parts[3].isdigit():
            found[parts[0]] = (int(parts[2]), int(parts[3]), parts[5])
    return found


def hand_over(folder: str, uid: int, gid: int) -> None:
    """Give a folder and all that is in it to the agents; what is theirs already costs nothing."""
    if os.lstat(folder).st_uid != uid:
        os.chown(folder, uid, gid)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                hand_over(entry.path, uid, gid)
            elif entry.stat(follow_symlinks=False).st_uid != uid:
                os.chown(entry.path, uid, gid, follow_symlinks=False)


def fork(does: Callable[[], Any], container: Container) -> None:
    """A process of ours, or the image's, that no handle's end touches."""
    if os.fork():
        return
    try:
        container.control.close()
        does()
    except BaseException as exc:
        print(f"{does.__name__}: {exc}", file=sys.stderr, flush=True)  # noqa: T201 - the container's log
    finally:
        os._exit(1)


def start_relay(container: Container, gateway: int) -> None:
    """Carry what connects to our loopback port to the gateway's socket, which the host has opened for us."""
    port = container.settings["port"]
    listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)

    def relay() -> None:
        confine(65_534, 65_534, privileges=False)
        _thread.stack_size(262_144)
        os.chdir("/")
        supervisor.relay(listener, f"/proc/self/fd/{gateway}")

    fork(relay, container)
    listener.close()


def start_service(container: Container) -> None:
    """The image's ENTRYPOINT, as its USER, with a command that waits for ever: it starts the task's services."""
    service = container.settings["service"]

    def entrypoint() -> None:
        user, _, group = service["user"].partition(":")
        uid, gid, _ = user_of(user or "0")
        os.dup2(container.null, 0)
        os.setsid()
        os.chdir(service["cwd"])
        confine(uid, int(group) if group.isdigit() else gid, privileges=True)
        os.execvpe(service["argv"][0], service["argv"], service["env"])  # noqa: S606 - the image says what to run

    fork(entrypoint, container)


def user_of(name: str) -> tuple[int, int, str]:
    """uid, gid and home of a user, by name or number. Raises `LookupError`."""
    known = users()
    if name in known:
        return known[name]
    if name.isdigit():
        return next((found for found in known.values() if found[0] == int(name)), (int(name), int(name), "/"))
    raise FileNotFoundError(2, "the image has no user", name)


def main() -> NoReturn:
    """Run as PID 1 of a container, with the host's socket where it was bound."""
    call("prctl", 4, 0, 0, 0, 0)
    os.umask(0o022)
    _signal.signal(_signal.SIGTERM, lambda *_: os._exit(143))  # PID 1 has to say so, or the engine waits for 10 s
    control = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    control.connect(SOCKET)
    message, given = supervisor.receive(control)
    if not message:
        os._exit(supervisor.HOST_GONE)
    settings = marshal.loads(message)
    container = Container(control, settings)
    try:
        prepare(settings)
        if settings["port"]:
            start_relay(container, given[0])
            os.close(given[0])
        if settings["service"]:
            start_service(container)
    except OSError as exc:
        control.send(f"error {exc}".encode()[:4096])
        os._exit(1)
    try:
        ourselves = os.pidfd_open(1)  # by which the host knows when we are gone, whoever ends us
    except OSError:  # an engine whose seccomp profile is older than that call
        control.send(b"ready")
    else:
        control.sendmsg([b"ready"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, ourselves.to_bytes(4, sys.byteorder))])
        os.close(ourselves)
    container.run()
