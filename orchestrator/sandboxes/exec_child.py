"""What runs inside a sandbox that can only exec: one call a request, and for each handle a keeper that outlives them.

The host hands this program, as text, to the sandbox's own Python (3.8 or newer, the standard library only), once for
each thing that it wants done. A request is an argument: JSON, or `@` and the path of a file that holds it. The answer
is the last line of stdout: `rollout: ` and JSON, where an error has `error` and `kind`.

`open` leaves a *keeper* behind, which `exec_call.py` reaches by a socket in the handle's private folder. It starts
what the handle starts, holds its pipes, and numbers the bytes of each *channel* in both directions: what was sent twice
is dropped, what was not acknowledged is sent again, so a call that got lost loses nothing. Neither side may be ahead of
the other by more than `WINDOW`: that is the back-pressure which an exec lacks.

The keeper adopts whatever its children leave behind (it is their *subreaper*), daemons too. So all that was started
through a handle is below its keeper, and it is dead once the keeper, which then starts nothing more, has no child left.
Only the kernel can say that of it, and only to itself: `waitpid` fails with ECHILD. A list of processes proves nothing,
since one that forks and exits in a loop is never where the list says. So `end` tells the keeper to kill and to bury
until that is so; the keeper says it is by taking another name, which nobody else can give it. A keeper that somebody
else ended proves nothing, and is said to.
"""

# Nothing of ours is there, and imports cost: most calls are over in the time that pathlib takes.

from __future__ import annotations

import base64
import errno
import json
import os
import select
import signal
import socket
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

FILES = globals().get("FILES", "")
"""The source of `_files.py`, which the host puts before this program."""

WINDOW = 1 << 20
READ_BYTES = 262_144
"""Bytes of a channel, or of a file, in one answer."""
TAIL_BYTES = 65_536
PACK_BYTES = 8 << 30
"""What one download may hold."""
LONG_COMMAND = 100_000
"""A shell command beyond this is run from a file: one argument may not be longer than 128 KiB."""

FALLBACK = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
KEEPER = b"rollout-keeper"
"""What a keeper is called: nobody but itself can change that."""
QUIET = b"quiet "
"""What it is called once it has no child left, and how many it has buried until then."""
WALL = 0x4000_0000
"""`__WALL`: children of every kind."""
LOST_SEC = 300.0
"""A channel after which nobody has asked for so long is ended: its host is dead."""
END_SEC = 20.0
OPEN_SEC = 15.0


class Failed(Exception):
    """What was asked for cannot be done; the sentence is for the host."""

    def __init__(self, text: str, kind: str = "failed") -> None:
        super().__init__(text)
        self.kind = kind


def main(word: str) -> None:
    """Do what was asked, and print the answer."""
    try:
        if word.startswith("@"):
            with open(word[1:], encoding="utf-8") as file:
                word = file.read()
        asked = json.loads(word)
        answer = CALLS[asked["do"]](asked)
    except Failed as error:
        answer = {"error": str(error), "kind": error.kind}
    except OSError as error:
        answer = {"error": said(error), "kind": "failed"}
    except Exception as error:
        if type(error).__name__ not in ("SandboxError", "PathEscape"):
            raise
        answer = {"error": str(error), "kind": "escape" if type(error).__name__ == "PathEscape" else "failed"}
    sys.stdout.write(f"\nrollout: {json.dumps(answer)}\n")
    sys.stdout.flush()


def said(error: OSError) -> str:
    text = os.strerror(error.errno) if error.errno else str(error)
    return f"{text}: {error.filename}" if error.filename else text


def encoded(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


def given(asked: dict[str, Any]) -> bytes:
    """The bytes that came with a request, in it or as a file."""
    if "file" not in asked:
        return base64.b64decode(asked["data"])
    with open(asked["file"], "rb") as file:
        return file.read()


# --- what is done at once, without a keeper ----------------------------------------------------------------------


def hello(asked: dict[str, Any]) -> dict[str, Any]:
    """Make our folder, where nobody else's is, and the folders of the task."""
    try:
        import ctypes  # noqa: F401
    except ImportError as error:
        raise Failed(
            "its python3 has no ctypes, without which nobody could prove that an agent is dead (on Debian install "
            "python3, not python3-minimal)"
        ) from error
    os.makedirs(asked["root"], mode=0o700, exist_ok=True)
    info = os.lstat(asked["root"])
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise Failed(f"somebody else has made {asked['root']}")
    os.makedirs(asked["cwd"], exist_ok=True)
    for folder in asked["folders"]:
        try:
            os.makedirs(folder, exist_ok=True)
        except PermissionError:  # whoever wants to use it will be told
            pass
    return {"python": sys.version.split()[0], "uid": os.geteuid()}


def bye(asked: dict[str, Any]) -> dict[str, Any]:
    import shutil

    shutil.rmtree(asked["root"], ignore_errors=True)
    return {}


def opened(asked: dict[str, Any]) -> dict[str, Any]:
    """The keeper of a handle, started if there is none: its pid and when that began."""
    import fcntl

    folder = asked["folder"]
    for name in ("", "/home", "/tmp"):  # noqa: S108 - in a folder of ours
        os.makedirs(folder + name, mode=0o700, exist_ok=True)
    with open(f"{folder}/lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = keeper_of(folder)
        if found is None:
            launch(folder)
            found = keeper_of(folder)
    if found is None:
        raise Failed("its keeper did not come up")
    return {"keeper": found}


def keeper_of(folder: str) -> list[Any] | None:
    """[pid, start] of the keeper that left its mark here, if it lives."""
    try:
        with open(f"{folder}/keeper", encoding="ascii") as file:
            pid, started = json.load(file)
    except (OSError, ValueError):
        return None
    return [pid, started] if is_alive(pid, started) else None


def launch(folder: str) -> None:
    """Leave a keeper behind that belongs to nobody's session, and wait until it listens."""
    ready, tell = os.pipe()
    if not os.fork():
        try:
            os.setsid()
            null = os.open("/dev/null", os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            os.chdir("/")
            keep(folder, tell)
        finally:
            os._exit(1)
    os.close(tell)
    if not select.select([ready], [], [], OPEN_SEC)[0] or os.read(ready, 1) != b"k":
        raise Failed("its keeper did not come up")
    os.close(ready)


def end(asked: dict[str, Any]) -> dict[str, Any]:
    """Have the keeper end all that is below it, then kill the keeper: the evidence, as sentences."""
    name, folder = asked["name"], asked["folder"]
    pid, started = asked["keeper"] or keeper_of(folder) or (0, "")
    if not pid:
        return {"evidence": [f"handle {name} has no keeper: nothing was started through it"]}
    until = time.monotonic() + END_SEC
    keeper = f"the keeper of handle {name} (pid {pid})"
    while True:
        called = name_of(pid)  # before we know that it lives: whoever has its pid afterwards is somebody else
        if not is_alive(pid, started):
            raise Failed(f"{keeper} was ended by somebody else: what it kept is lost", "unquiet")
        if called.startswith(QUIET):
            break
        if time.monotonic() > until:
            some = f"{sorted(below(pid))[:9]} among them"
            raise Failed(f"handle {name} has processes after {END_SEC:g} s of SIGKILL, {some}", "unquiet")
        os.kill(pid, signal.SIGTERM)  # again each time: one that comes just before it waits does not wake it
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    while is_alive(pid, started):
        if time.monotonic() > until:
            raise Failed(f"{keeper} is still there after SIGKILL", "unquiet")
        time.sleep(0.002)
    return {
        "evidence": [
            f"{int(called[len(QUIET) :])} processes of handle {name} were killed",
            f"{keeper}, which adopts what they leave and starts nothing more, had no child left",
        ]
    }


def processes() -> dict[int, tuple[str, int, str]]:
    """(state, parent, start) of every process that is seen from here."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (entry := stat_of(int(name))) is not None:
            found[int(name)] = entry
    return found


def stat_of(pid: int) -> tuple[str, int, str] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return words[0].decode(), int(words[1]), words[19].decode()


def is_kept(pid: int) -> bool:
    """Whether a process is below a keeper, or gone: no call of the host's ever is."""
    while pid > 1:
        found = stat_of(pid)
        if found is None or name_of(pid) == KEEPER:
            return True
        pid = found[1]
    return False


def name_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().rstrip(b"\n")
    except OSError:
        return b""


def is_alive(pid: int, started: str) -> bool:
    found = stat_of(pid)
    return found is not None and found[2] == started and found[0] not in "ZX"


def below(top: int) -> set[int]:
    """The processes that are alive and have `top` above them."""
    seen = processes()
    children: dict[int, list[int]] = {}
    for pid, (_, parent, _) in seen.items():
        children.setdefault(parent, []).append(pid)
    found, todo = set(), [top]
    while todo:
        more = [pid for pid in children.get(todo.pop(), ()) if pid not in found]
        found.update(more)
        todo += more
    return {pid for pid in found if seen[pid][0] not in "ZX"}


# --- files -------------------------------------------------------------------------------------------------------


def files() -> Any:
    """`_files.py` as a module."""
    import types

    module = types.ModuleType("_files")
    sys.modules["_files"] = module
    exec(compile(FILES, "_files.py", "exec"), module.__dict__)  # noqa: S102 - our own text
    return module


def tree(asked: dict[str, Any], *, make: bool = False) -> Any:
    """The folders that this request may use: each at the top of the disk, and those that are fences of their own."""
    module, path = files(), asked["path"]
    top = "/" + path.lstrip("/").partition("/")[0]
    if make and ".." not in path.split("/") and top != "/":
        os.makedirs(top, exist_ok=True)
    places = {f"/{name}" for name in os.listdir("/") if os.path.isdir(f"/{name}")} | set(asked["places"])
    mounts = tuple(module.Mount(place, place) for place in sorted(places) if os.path.isdir(place))
    return module.Tree(asked["name"], mounts, confined=asked["confined"])


def get(asked: dict[str, Any]) -> dict[str, Any]:
    """A file's bytes; where they are many, the file that holds them, to be downloaded."""
    data = tree(asked).read(asked["path"])
    if len(data) <= READ_BYTES:
        return {"data": encoded(data)}
    with open(asked["spare"], "wb") as file:
        file.write(data)
    return {"file": asked["spare"]}


def put(asked: dict[str, Any]) -> dict[str, Any]:
    tree(asked, make=True).write(asked["path"], given(asked), asked["mode"])
    return {}


def pack(asked: dict[str, Any]) -> dict[str, Any]:
    """A file, or a folder's content, as a tar: copied first by whoever follows no link out of it."""
    import tarfile

    total = 0

    def readable(info: Any) -> Any:
        """An entry as it is, of a copy that we may read whatever its mode."""
        nonlocal total
        total += info.size
        if total > PACK_BYTES:
            raise Failed(f"{asked['path']} holds more than {PACK_BYTES >> 30} GiB, which is too much to download")
        if not info.issym():
            os.chmod(f"{folder}/{info.name}", info.mode | 0o500)
        return plain(info)

    with staging(asked["spare"]) as (folder, path_of):
        tree(asked).copy_out(asked["path"], path_of(f"{folder}/copy"))
        with tarfile.open(asked["spare"], "w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(f"{folder}/copy", arcname="copy", filter=readable)
    return {"file": asked["spare"]}


def unpack(asked: dict[str, Any]) -> dict[str, Any]:
    """A tar of the host's, copied to where it belongs by whoever writes through no link."""
    import tarfile

    with staging(asked["file"]) as (folder, path_of), tarfile.open(asked["file"]) as archive:
        members = archive.getmembers()
        for member in members:
            member.uid, member.gid, member.uname, member.gname = os.geteuid(), os.getegid(), "", ""
        archive.extractall(folder, members)  # noqa: S202 - the host's own
        tree(asked, make=True).copy_in(path_of(f"{folder}/{asked['entry']}"), asked["path"])
    return {}


def plain(info: Any) -> Any:
    """An entry of an archive without its owner."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


class staging:  # noqa: N801 - used as a function
    """A folder beside `path` for as long as it is needed."""

    def __init__(self, path: str) -> None:
        self.folder = path + ".d"

    def __enter__(self) -> tuple[str, Callable[[str], Any]]:
        import pathlib

        os.mkdir(self.folder, 0o700)
        return self.folder, pathlib.Path

    def __exit__(self, *_: object) -> None:
        import shutil

        for top, inner, _names in os.walk(self.folder):
            for one in inner:  # a copy keeps modes, also of folders that cannot be emptied
                if not os.path.islink(f"{top}/{one}"):
                    os.chmod(f"{top}/{one}", 0o700)
        shutil.rmtree(self.folder, ignore_errors=True)


CALLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "hello": hello,
    "bye": bye,
    "open": opened,
    "end": end,
    "get": get,
    "put": put,
    "pack": pack,
    "unpack": unpack,
}


# --- the keeper --------------------------------------------------------------------------------------------------


def keep(folder: str, tell: int) -> None:
    """Be the keeper of a handle: adopt what is left behind, and answer until we are killed."""
    undumpable()
    if prctl(36, 1) or prctl(15, KEEPER):  # PR_SET_CHILD_SUBREAPER, PR_SET_NAME
        os._exit(1)
    path = f"{folder}/socket"
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(128)
    mine = stat_of(os.getpid())
    assert mine is not None
    with open(f"{folder}/keeper", "w", encoding="ascii") as file:
        json.dump([os.getpid(), mine[2]], file)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it is heard
    os.write(tell, b"k")
    inherited = {listener.fileno(), 0, 1, 2}
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - inherited:
        try:
            os.close(fd)  # the lock among them: had we not held it until now, whoever waits for it would start another
        except OSError:
            pass  # it was the listing's own
    Keeper(folder, listener).run()


def prctl(option: int, value: Any) -> int:
    import ctypes

    done: int = ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    return done


def undumpable() -> None:
    """Whoever runs as the same user cannot look into us, or make us do something."""
    prctl(4, 0)  # PR_SET_DUMPABLE


class Kept:
    """Output, cut in the middle beyond `cap` bytes."""

    def __init__(self, cap: int) -> None:
        self.cap, self.total = cap, 0
        self.head, self.tail = bytearray(), bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self.cap // 2 - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        self.tail += data
        if len(self.tail) > 2 * self.cap:
            del self.tail[: -self.cap]

    def report(self) -> dict[str, Any]:
        tail = self.tail[-(self.cap - self.cap // 2) :] if self.total > self.cap else self.tail
        return {"head": encoded(self.head), "tail": encoded(tail), "cut": self.total - len(self.head) - len(tail)}


class Process:
    """A process of this handle. `ended` is a pipe that says so once `code` is known."""

    def __init__(self, popen: Any) -> None:
        self.popen, self.code = popen, None  # type: Any, int | None
        self.ended, self.tell = os.pipe()

    def kill(self) -> None:
        """It and its process group."""
        if self.code is None:
            try:
                os.killpg(self.popen.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def died(self, code: int) -> None:
        """Once the code is known the pipe may be closed by whoever waited, so it is told first."""
        os.write(self.tell, b"x")
        self.code = self.popen.returncode = code

    def close(self) -> None:
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass
        os.close(self.ended)
        os.close(self.tell)


class Keeper:
    """Starts, keeps and buries. A thread a connection, and one a channel."""

    def __init__(self, folder: str, listener: socket.socket) -> None:
        import threading

        self.threading = threading
        self.folder, self.listener = folder, listener
        self.lock, self.spawning, self.born = threading.Lock(), threading.Lock(), threading.Event()
        self.processes: dict[int, Process] = {}
        self.runs: dict[str, Process] = {}
        self.channels: dict[str, Channel] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.ending = False

    def run(self) -> None:
        """Bury until we are told to end."""
        try:
            signal.signal(signal.SIGTERM, told)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # first: threads and children inherit it
            self.aside(self.listen)
            while True:
                try:
                    self.bury(*os.waitpid(-1, 0))
                except ChildProcessError:
                    self.born.wait(1.0)
                    self.born.clear()
        except Ending:
            self.end()

    def listen(self) -> None:
        while True:
            conn, _ = self.listener.accept()
            self.aside(self.serve, conn)

    def aside(self, work: Callable[..., Any], *args: Any) -> None:
        self.threading.Thread(target=work, args=args, daemon=True).start()

    def bury(self, pid: int, status: int) -> None:
        """One that died: our own are told, those that were adopted only buried."""
        with self.lock:
            process = self.processes.pop(pid, None)
        if process is not None:
            process.died(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))

    def end(self) -> None:
        """Kill and bury until no child is left, which says that nothing is, and say so; then wait to be killed."""
        with self.lock:  # what is being started is a child now, and nothing else will be
            self.ending = True
        buried = 0
        try:
            while True:
                kill_children()
                for _ in range(1000):  # and then to those that were born meanwhile
                    pid, status = os.waitpid(-1, os.WNOHANG | WALL)
                    if not pid:
                        time.sleep(0.001)
                        break
                    self.bury(pid, status)
                    buried += 1
        except ChildProcessError:
            prctl(15, b"%s%d" % (QUIET, buried))
        while True:
            signal.pause()

    def serve(self, conn: socket.socket) -> None:
        """One request. What an agent asks is not heard: another handle's keeper would start it out of its own sight."""
        peer = struct.unpack("3i", conn.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        with conn:
            if is_kept(peer):
                return
            heard = bytearray()
            while not heard.endswith(b"\n"):
                data = conn.recv(1 << 20)
                if not data:
                    return
                heard += data
            asked = json.loads(heard.decode())
            try:
                answer = self.answer(asked, conn)
            except Failed as error:
                answer = {"error": str(error), "kind": error.kind}
            except OSError as error:
                answer = {"error": said(error), "kind": "failed"}
            except Exception as error:  # no answer would mean that we are gone; a NUL in an argument is a ValueError
                answer = {"error": f"{type(error).__name__}: {error}", "kind": "failed"}
            try:
                conn.sendall(json.dumps(answer).encode() + b"\n")
            except OSError:
                pass  # who asked is gone

    def answer(self, asked: dict[str, Any], conn: socket.socket) -> dict[str, Any]:
        do = asked["do"]
        if do == "environment":
            self.environments[asked["environment"]] = {**FALLBACK, **os.environ, **asked["env"]}
            return {}
        if do == "stop":
            process = self.runs.get(asked["id"])
            if process is not None:
                process.kill()
            return {}
        if do == "run":
            return self.to_its_end(asked, conn)
        if do == "spawn":
            with self.spawning:  # a call that got lost may still be under way when it is made again
                if asked["id"] not in self.channels:
                    self.channels[asked["id"]] = channel = Channel(self.start(asked, stdin=True))
                    self.aside(channel.carry)
            return {}
        channel = self.channels[asked["id"]]
        channel.asked_at = time.monotonic()
        answer: dict[str, Any] = getattr(channel, f"do_{do}")(asked)
        return answer

    def start(self, asked: dict[str, Any], *, stdin: bool = False) -> Process:
        """Start it in a session of its own. An `OSError` names what is not there."""
        import subprocess

        argv, env = asked["argv"], self.environments[asked["environment"]]
        script = None
        if (
            argv[:2] == ["/bin/sh", "-c"]
            and len(argv) == 3
            and len(argv[2].encode(errors="surrogateescape")) > LONG_COMMAND
        ):
            script = open(f"{self.folder}/script-{os.urandom(8).hex()}", "w+b")  # noqa: SIM115 - a process reads it
            os.unlink(script.name)
            script.write(argv[2].encode(errors="surrogateescape"))
            script.seek(0)
            argv = ["/bin/sh", f"/proc/self/fd/{script.fileno()}"]
        become = self.user(asked["user"])
        with self.lock:
            if self.ending:
                raise Failed("its keeper is ending", "ended")
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
                cwd=asked["cwd"],
                bufsize=0,
                start_new_session=True,
                pass_fds=(script.fileno(),) if script else (),
                preexec_fn=become,  # noqa: PLW1509 - it only becomes somebody
            )
            process = self.processes[popen.pid] = Process(popen)
        self.born.set()
        if script:
            script.close()
        for pipe in (popen.stdin, popen.stdout, popen.stderr):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
        return process

    def user(self, name: str | None) -> Callable[[], None] | None:
        """How to become somebody; None for who we are. Where we are not root, root is who we are."""
        if name is None or (name in ("root", "0") and os.geteuid() != 0):
            return None
        import pwd

        try:
            found = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        except KeyError as error:
            raise Failed(f"there is no user {name} in this sandbox") from error
        if found.pw_uid == os.geteuid():
            return None
        if os.geteuid() != 0:
            raise Failed(f"commands run as uid {os.geteuid()} in this sandbox, and cannot become user {name}")

        def become() -> None:
            os.setgroups([])
            os.setgid(found.pw_gid)
            os.setuid(found.pw_uid)

        return become

    def to_its_end(self, asked: dict[str, Any], conn: socket.socket) -> dict[str, Any]:
        """Run a command. When who asked hangs up it is killed; what it leaves in the background is not waited for."""
        process = self.runs[asked["id"]] = self.start(asked)
        out, err = Kept(asked["cap"]), Kept(asked["cap"])
        kept = {process.popen.stdout.fileno(): out, process.popen.stderr.fileno(): err}
        poll, outlasted = select.poll(), False
        for fd in (*kept, process.ended, conn.fileno()):
            poll.register(fd, select.POLLIN)
        deadline = time.monotonic() + asked["timeout"] if asked["timeout"] is not None else None
        while process.code is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if left == 0.0:
                outlasted, deadline = True, None
                process.kill()
                continue
            for fd, _ in poll.poll(left if left is None else left * 1000 + 1):
                if fd == conn.fileno():
                    process.kill()
                    poll.unregister(fd)
                elif fd in kept and not taken(fd, kept[fd]):
                    poll.unregister(fd)
        for fd, one in kept.items():
            for _ in range(64):  # what a pipe holds; somebody in the background may go on writing
                if not taken(fd, one, again=False):
                    break
        del self.runs[asked["id"]]
        process.close()
        return {"code": process.code, "outlasted": outlasted, "stdout": out.report(), "stderr": err.report()}


class Ending(Exception):
    """We were told to end."""


def told(*_: object) -> None:
    """Leave the main thread's loop, wherever it is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise Ending


def kill_children() -> None:
    """Kill our children, and the group of each, which dies at one stroke. Those below them are our children next.

    None of their pids can be somebody else's by now, since it is we who bury them.
    """
    for pid in children():
        try:
            os.kill(pid, signal.SIGKILL)  # first, since one that forks and exits in a loop is soon elsewhere
            group = os.getpgid(pid)
            if group != os.getpgrp():
                os.killpg(group, signal.SIGKILL)
        except PermissionError:
            pass  # it runs as somebody else now, and whoever waits for us will say that it lives


def children() -> Iterator[int]:
    """Our children, the dead ones too: each as soon as it is known."""
    try:
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/children", "rb") as file:
                yield from map(int, file.read().split())
    except OSError:  # this kernel has no such file, or that thread is over
        me = os.getpid()
        yield from (pid for pid, (_, parent, _) in processes().items() if parent == me)


def taken(fd: int, kept: Kept, *, again: bool = True) -> bool:
    """Keep what a pipe has now; whether to ask it again."""
    try:
        data = os.read(fd, 65_536)
    except BlockingIOError:
        return again
    except OSError:
        return False
    kept.add(data)
    return bool(data)


class Channel:
    """A process whose stdin and stdout the host holds. One thread carries; calls wait for what it does."""

    def __init__(self, process: Process) -> None:
        import threading

        self.process, self.changed = process, threading.Condition()
        self.open: set[int] = set()
        self.stdin = self.stdout = self.stderr = -1
        self.code: int | None = None
        self.out, self.out_from, self.out_ended = bytearray(), 0, False
        self.into, self.received, self.close_at, self.shut = bytearray(), 0, -1, False
        self.errors, self.errors_total = bytearray(), 0
        self.asked_at = time.monotonic()  # when a call last came, however soon it was answered
        self.woken, self.wake = os.pipe()
        os.set_blocking(self.wake, False)

    # --- calls ---

    def do_read(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Stdout from byte `have` on, as soon as there is any; what is before that is forgotten."""
        until = time.monotonic() + asked["wait"]
        with self.changed:
            if asked["have"] > self.out_from:
                del self.out[: asked["have"] - self.out_from]
                self.out_from = asked["have"]
                self.rouse()
            while not self.out and not self.out_ended and self.waited(until):
                pass
            data = bytes(self.out[:READ_BYTES])
            return {"data": encoded(data), "end": self.out_ended and len(data) == len(self.out), **self.news(asked)}

    def do_wait(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Its exit code, or null where it has none in time."""
        until = time.monotonic() + asked["wait"]
        with self.changed:
            while self.code is None and self.waited(until):
                pass
            return {"code": self.code, **self.news(asked)}

    def do_write(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Take stdin that begins at byte `at`, as far as there is room in time: how many bytes came so far."""
        data, until = given(asked), time.monotonic() + asked["wait"]
        with self.changed:
            if self.received < asked["at"]:
                raise Failed(f"bytes {self.received} to {asked['at']} of its stdin never came")
            while not self.shut:
                rest = data[self.received - asked["at"] :][: WINDOW - len(self.into)]
                self.into += rest
                self.received += len(rest)
                self.rouse()
                if self.received >= asked["at"] + len(data) or not self.waited(until):
                    break
            return {"received": self.received, "shut": self.shut}

    def do_close(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Nothing follows byte `at` of stdin."""
        with self.changed:
            self.close_at = asked["at"]
            self.rouse()
        return {}

    def do_kill(self, _asked: dict[str, Any]) -> dict[str, Any]:
        self.process.kill()
        return {}

    def waited(self, until: float) -> bool:
        """Wait for a change; False once time is up."""
        left = until - time.monotonic()
        return left > 0 and (self.changed.wait(left) or True)

    def news(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What stderr has said beyond the bytes that the host knows of."""
        fresh = min(self.errors_total - asked["errors"], len(self.errors))
        return {"errors": self.errors_total, "stderr": encoded(self.errors[len(self.errors) - fresh :])}

    def rouse(self) -> None:
        """Let the thread look again."""
        try:
            os.write(self.wake, b"x")
        except BlockingIOError:
            pass

    # --- the thread ---

    def carry(self) -> None:
        """Until both outputs are over and the process is dead, and stdin is shut."""
        popen = self.process.popen
        stdin, stdout, stderr = (pipe.fileno() for pipe in (popen.stdin, popen.stdout, popen.stderr))
        handlers = {
            stdin: self.write,
            stdout: self.read_stdout,
            stderr: self.read_stderr,
            self.process.ended: self.died,
            self.woken: self.awake,
        }
        self.open = {stdout, stderr, self.process.ended}
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        while self.open:
            poll = select.poll()
            for fd, events in self.interests():
                poll.register(fd, events)
            for fd, _ in poll.poll(min(10.0, LOST_SEC / 2) * 1000):
                with self.changed:
                    handlers[fd]()
                    self.changed.notify_all()
            if time.monotonic() - self.asked_at > LOST_SEC:
                self.process.kill()
        with self.changed:
            self.close_stdin()
            self.changed.notify_all()
        self.process.close()

    def interests(self) -> Iterator[tuple[int, int]]:
        with self.changed:
            yield self.woken, select.POLLIN
            for fd in self.open:
                if fd != self.stdout or len(self.out) < WINDOW:
                    yield fd, select.POLLIN
            if not self.shut and (self.into or self.close_at >= 0):
                yield self.stdin, select.POLLOUT

    def awake(self) -> None:
        os.read(self.woken, 4096)

    def read_stdout(self) -> None:
        data = pipe_data(self.stdout)
        if data:
            self.out += data
        elif data is not None:
            self.out_ended = True
            self.open.discard(self.stdout)

    def read_stderr(self) -> None:
        data = pipe_data(self.stderr)
        if data:
            self.errors_total += len(data)
            self.errors = (self.errors + data)[-TAIL_BYTES:]
        elif data is not None:
            self.open.discard(self.stderr)

    def died(self) -> None:
        """Its last words, then its code."""
        if self.process.code is None:
            return  # it will be in a moment
        for _ in range(64):
            before = self.errors_total
            if self.stderr in self.open:
                self.read_stderr()
            if self.errors_total == before:
                break
        self.code = self.process.code
        self.open.discard(self.process.ended)

    def write(self) -> None:
        try:
            del self.into[: os.write(self.stdin, self.into[:65_536])]
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            self.close_stdin()
        if not self.into and 0 <= self.close_at <= self.received:
            self.close_stdin()

    def close_stdin(self) -> None:
        if not self.shut:
            self.shut = True
            self.into.clear()
            self.process.popen.stdin.close()


def pipe_data(fd: int) -> bytes | None:
    """What a pipe has: b"" at its end, None when there is nothing."""
    try:
        return os.read(fd, 65_536)
    except BlockingIOError:
        return None
    except OSError:
        return b""


if __name__ == "__main__":
    main(sys.argv[1])
