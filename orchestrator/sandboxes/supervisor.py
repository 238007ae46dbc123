"""PID 1 of a sandbox handle: starts commands on request, reaps what dies, relays the model gateway.

Runs *inside* the sandbox, once per handle, by an interpreter that is bound read-only. It proxies no bytes of stdin or
stdout: the host sends ready-made pipes over a socket (SCM_RIGHTS) and each command gets them as its own. Only stderr
of spawned processes passes through here, into a ring of 64 KiB in memory shared with the host (`write_tail`), so that
it is drained whatever the host is doing.

Everything about one command goes over a socket of its own, the status socket: `started`, `error ERRNO TEXT`,
`exit CODE [REASON]` to the host; anything from the host, its end included, kills the command's process group.
When the control socket ends, the host is dead, and so is everything here: PID 1 exits.

It must start fast: every import counts (`socket`, `signal` and `json` cost 7 ms each, most of it for `enum`), which is
why their C halves are used. It is not hardened against its host, and the host trusts nothing that it says: an agent
runs under the same uid. PID 1 cannot be signalled from its own namespace and this one is not dumpable, so it cannot be
traced either.
"""

# Imports cost: pathlib and contextlib are 10 ms of start. marshal is read from the host only.
# ruff: noqa: D102, D103, PTH112, PTH116, PTH123, PTH208, S302, SIM105, SLF001

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import _thread
import marshal
import os
import resource
import select
import stat
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

TAIL_BYTES = 65_536
"""How much of a process's stderr is kept."""

MESSAGE_BYTES = 65_536
"""The largest request that fits a message; a larger one comes in a file of its own."""

RELAYED = 200
"""How many connections to the gateway are open at once."""

HOST_GONE = 3
"""The exit code of a PID 1 whose host went away without a word."""

CHUNK = 65_536
FILE_BYTES = 512
"""What a file costs besides its blocks, so that a million empty ones are something."""

DISK_TICK_SEC = 0.5
DISK_LOOK_SEC = 30.0


def write_tail(fd: int, total: int, data: bytes) -> int:
    """Append `data` to the ring in `fd` (8 bytes of count, then the ring) and return the new count."""
    data = data[-TAIL_BYTES:]
    at = total % TAIL_BYTES
    room = TAIL_BYTES - at
    os.pwrite(fd, data[:room], 8 + at)
    if data[room:]:
        os.pwrite(fd, data[room:], 8)
    total += len(data)
    os.pwrite(fd, total.to_bytes(8, "little"), 0)
    return total


def read_tail(fd: int) -> bytes:
    """What the ring in `fd` holds, oldest byte first."""
    total = int.from_bytes(os.pread(fd, 8, 0), "little")
    if total <= TAIL_BYTES:
        return os.pread(fd, total, 8)
    at = total % TAIL_BYTES
    return os.pread(fd, TAIL_BYTES - at, 8 + at) + os.pread(fd, at, 8)


class Command:
    """A command that runs: its status socket, and where its stderr goes when that passes through here."""

    __slots__ = ("errors", "pid", "status", "tail", "total")

    def __init__(self, status: _socket.socket, tail: int) -> None:
        self.status, self.tail = status, tail
        self.pid = self.errors = -1
        self.total = 0

    def say(self, text: str) -> None:
        try:
            self.status.send(text.encode(errors="replace")[:4096])
        except OSError:
            pass  # the host has lost interest, which is its right

    def drain(self) -> bool:
        """Take what stderr has now; False at its end."""
        while True:
            try:
                data = os.read(self.errors, CHUNK)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.total = write_tail(self.tail, self.total, data)

    def kill(self) -> None:
        for kill in (os.killpg, os.kill):  # the first fails as long as it has no group of its own yet
            try:
                kill(self.pid, 9)
            except ProcessLookupError:
                continue
            return


class Supervisor:
    """The loop of PID 1."""

    def __init__(self, control: _socket.socket, settings: dict[str, Any]) -> None:
        self.control = control
        self.settings = settings
        self.commands: dict[int, Command] = {}
        self.verdict = ""
        self.poll = select.poll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        _signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.watch(self.woken, self.reap)
        self.watch(control.fileno(), self.request)

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        self.handlers[fd] = handler
        self.poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.poll.unregister(fd)

    def run(self) -> NoReturn:
        while True:
            for fd, _ in self.poll.poll():
                handler = self.handlers.get(fd)
                if handler is not None:
                    handler()

    def gone(self) -> NoReturn:
        """The host is gone; so is every process here."""
        os._exit(HOST_GONE)

    def heard(self, _asked: dict[str, Any]) -> bool:
        """Whether that was a word that wants no answer."""
        return False

    def request(self) -> None:
        """One request: a marshalled dict, with the fds that it names."""
        message, fds = receive(self.control)
        if not message:
            self.gone()
        asked = marshal.loads(message)
        if self.heard(asked):
            return
        given = dict(zip(asked["fds"], fds, strict=True))
        if "body" in given:
            asked |= marshal.loads(read_all(given["body"]))
        command = Command(_socket.socket(fileno=given.pop("status")), given.pop("tail", -1))
        try:
            self.start(command, asked, given)
        except OSError as exc:
            command.say(f"error {exc.errno} {exc.strerror}: {exc.filename or asked['argv'][0]}")
            if command.errors >= 0:
                os.close(command.errors)
                command.errors = -1
            self.forget(command)
        else:
            command.say("started")
        finally:
            for fd in given.values():
                os.close(fd)

    def start(self, command: Command, asked: dict[str, Any], given: dict[str, int]) -> None:
        """Start it in a session of its own, with the pipes that came along."""
        errors = given.get("stderr", -1)
        if command.tail >= 0:
            command.errors, errors = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(command.errors, False)
            given["stderr"] = errors
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_DUP2, given.get("stdin", self.null), 0),
            (os.POSIX_SPAWN_DUP2, given["stdout"], 1),
            (os.POSIX_SPAWN_DUP2, errors, 2),
        ]
        if "script" in given:
            actions.append((os.POSIX_SPAWN_DUP2, given["script"], 3))
        os.chdir(asked["cwd"])
        argv, env = asked["argv"], asked["env"]
        command.pid = os.posix_spawn(
            find(argv[0], env.get("PATH", "")),
            argv,
            env,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=(_signal.SIGPIPE, _signal.SIGXFSZ),
        )
        self.commands[command.pid] = command
        self.watch(command.status.fileno(), lambda: self.told(command))
        if command.errors >= 0:
            self.watch(command.errors, lambda: self.drained(command))

    def told(self, command: Command) -> None:
        """The host wants it dead, or has lost interest, which is the same."""
        try:
            message = command.status.recv(16, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionError:
            message = b""
        command.kill()
        if not message:
            self.unwatch(command.status.fileno())

    def drained(self, command: Command) -> None:
        if not command.drain():
            self.close_errors(command)

    def close_errors(self, command: Command) -> None:
        self.unwatch(command.errors)
        os.close(command.errors)
        command.errors = -1
        if command.pid < 0:
            os.close(command.tail)

    def reap(self) -> None:
        """Everything that died: commands are reported, orphans only buried."""
        try:
            os.read(self.woken, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            command = self.commands.pop(pid, None)
            if command is not None:
                self.report(command, os.waitstatus_to_exitcode(status))

    def report(self, command: Command, code: int) -> None:
        if command.errors >= 0 and not command.drain():
            self.close_errors(command)
        if self.verdict and command.tail >= 0:
            command.total = write_tail(command.tail, command.total, f"\n[sandbox] {self.verdict}\n".encode())
        command.say(f"exit {code} {self.verdict}")
        self.forget(command)

    def forget(self, command: Command) -> None:
        """It has ended or never began. A daemon of it may still hold its stderr, which is drained on."""
        command.pid = -1
        self.unwatch(command.status.fileno())
        command.status.close()
        if command.errors < 0 and command.tail >= 0:
            os.close(command.tail)

    # --- limits that the kernel does not keep for us ---

    def keep_disk(self) -> None:
        """A thread: when the folders hold more than they may, end every process here and say why."""
        limit, folders = self.settings["disk_bytes"], self.settings["folders"]
        bound = frozenset(self.settings["bound"])
        used = disk_usage(folders, bound)
        if self.settings["trusted"]:  # what an agent left must not end the verifier, only what that adds
            limit += used
        while True:
            if used > limit:
                self.verdict = f"disk limit of {limit >> 20} MiB exceeded; everything in this handle was ended"
                try:
                    os.kill(-1, 9)
                except ProcessLookupError:
                    pass
            wait_for_growth(folders[0], (limit - used) // 2)
            used = disk_usage(folders, bound)


def wait_for_growth(folder: str, size: int) -> None:
    """Return when the filesystem has lost `size` bytes, or now and then: looking at every file costs more than this."""
    began, free = time.monotonic(), free_bytes(folder)
    while True:
        time.sleep(DISK_TICK_SEC)
        if free - free_bytes(folder) >= size or time.monotonic() - began > DISK_LOOK_SEC:
            return


def free_bytes(folder: str) -> int:
    """Free bytes where `folder` is, a file that could still be made counted as `FILE_BYTES`."""
    found = os.statvfs(folder)
    return found.f_bfree * found.f_frsize + found.f_ffree * FILE_BYTES


def disk_usage(folders: list[str], bound: frozenset[str] = frozenset()) -> int:
    """Bytes on disk below `folders`, and in files that were deleted while a process holds them open.

    What is `bound` there read-only is the host's, and not counted.
    """
    seen: set[tuple[int, int]] = set()
    total = 0
    for info in (*entries(folders, bound), *held_open()):
        if (info.st_dev, info.st_ino) not in seen:
            seen.add((info.st_dev, info.st_ino))
            total += info.st_blocks * 512 + FILE_BYTES
    return total


def entries(folders: list[str], bound: frozenset[str]) -> Iterator[os.stat_result]:
    """The status of everything below; what is nested too deep to be named counts as everything there is."""
    todo = list(folders)
    while todo:
        try:
            with os.scandir(todo.pop()) as found:
                for entry in found:
                    if entry.path in bound:
                        continue
                    info = entry.stat(follow_symlinks=False)
                    yield info
                    if stat.S_ISDIR(info.st_mode):
                        todo.append(entry.path)
        except OSError as exc:
            if exc.errno == 36:  # ENAMETOOLONG: a place to hide in
                yield os.stat_result((0, 0, 0, 0, 0, 0, 0, 0, 0, 0), {"st_blocks": 1 << 62})


def held_open() -> Iterator[os.stat_result]:
    """The status of deleted files that some process here still has open."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                info = os.stat(f"/proc/{pid}/fd/{fd}")
                if stat.S_ISREG(info.st_mode) and not info.st_nlink:
                    yield info
        except OSError:
            continue


# --- the gateway ---


def relay(listener: _socket.socket, gateway: str) -> NoReturn:
    """A thread: each connection to our loopback port goes to the gateway's unix socket, two threads a connection."""
    places = [_thread.allocate_lock() for _ in range(RELAYED)]
    while True:
        place = next((lock for lock in places if lock.acquire(blocking=False)), None)
        if place is None:
            time.sleep(0.01)  # as many as we have files for; the next ones wait in the kernel's queue
            continue
        try:
            fd, _ = listener._accept()  # type: ignore[attr-defined]  # accept() of the C half
        except OSError:
            place.release()
            time.sleep(0.01)
            continue
        client = _socket.socket(fileno=fd)
        try:
            _thread.start_new_thread(connect, (client, gateway, place))
        except RuntimeError:  # no thread to be had: the limit on processes is reached
            client.close()
            place.release()


def connect(client: _socket.socket, gateway: str, place: Any) -> None:
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    done = _thread.allocate_lock()
    done.acquire()
    try:
        client.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        server.connect(gateway)
        _thread.start_new_thread(answer, (server, client, done))
        pump(client, server)
        done.acquire()
    except (OSError, RuntimeError):
        pass  # the gateway is not there, or no thread is to be had: the client sees a closed connection
    finally:
        server.close()
        client.close()
        place.release()


def answer(server: _socket.socket, client: _socket.socket, done: Any) -> None:
    pump(server, client)
    done.release()


def pump(source: _socket.socket, sink: _socket.socket) -> None:
    """Copy until the end of `source`, then end only that direction: half-closed connections stay half open."""
    try:
        while data := source.recv(CHUNK):
            sink.sendall(data)
        sink.shutdown(_socket.SHUT_WR)
    except OSError:
        for side in (source, sink):
            try:
                side.shutdown(_socket.SHUT_RDWR)
            except OSError:
                pass


# --- small parts ---


def receive(sock: _socket.socket) -> tuple[bytes, list[int]]:
    """One message and the file descriptors that came with it."""
    message, extra, _, _ = sock.recvmsg(MESSAGE_BYTES + 4096, _socket.CMSG_SPACE(4 * 8), _socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for _level, _kind, data in extra:
        fds += [int.from_bytes(data[at : at + 4], sys.byteorder) for at in range(0, len(data), 4)]
    return message, fds


def read_all(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    data = b""
    while len(data) < size:
        data += os.pread(fd, size - len(data), len(data))
    return data


def find(name: str, path: str) -> str:
    """The program that `name` means with this PATH."""
    if "/" in name:
        return name
    for folder in path.split(":"):
        candidate = f"{folder or '.'}/{name}"
        if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
            return candidate
    raise FileNotFoundError(2, "no such program on PATH", name)


def guard(become: int) -> None:
    """Make this process untraceable, deaf to Ctrl-C, and the first to go when the machine runs out of memory.

    `become`: the uid to become for good, where we started as root of the namespace; 0 where we did not.
    """
    import ctypes

    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("500")
    if become:
        with open("/proc/sys/user/max_user_namespaces", "w") as most:
            most.write("0")
        os.setgroups([])
        os.setresgid(become, become, become)
        os.setresuid(become, become, become)
    prctl = ctypes.CDLL(None).prctl
    prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE = 0
    prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG = SIGKILL, which a change of uid resets
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    os.umask(0o022)


def main() -> NoReturn:
    """Run as PID 1; `sys.argv[1]` is the number of the control socket."""
    control = _socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    import ctypes  # noqa: F401 - what `guard` needs, loaded while we are put under our limits

    message, _ = receive(control)
    if not message:
        os._exit(0)
    settings = marshal.loads(message)
    guard(settings["become"])
    for name, value in settings["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if settings["cpus"]:
        os.sched_setaffinity(0, settings["cpus"])
    supervisor = Supervisor(control, settings)
    _thread.stack_size(262_144)
    if settings["port"]:
        listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        listener.bind(("127.0.0.1", settings["port"]))
        listener.listen(128)
        _thread.start_new_thread(relay, (listener, settings["gateway"]))
    if settings["disk_bytes"]:
        _thread.start_new_thread(supervisor.keep_disk, ())
    control.send(b"ready")
    supervisor.run()
