"""PID 1 of a handle: starts what the host asks for, holds its pipes, and survives any connection to the host.

One request a connection, a line of JSON. A *command* is run to its end; its output is cut in the middle and kept until
it has been fetched, so a fetch that got lost is repeated and nothing runs twice. A *channel* is a process whose stdin
and stdout the host holds. Its bytes are numbered in both directions: what was sent twice is dropped, what was not
acknowledged is sent again, so the line to the host may break and be replaced. Nobody gets more than `WINDOW` bytes
ahead of the reader: that is the back-pressure which sessions and terminals lack.

Frames are lines of ASCII, since sessions carry lines of text only (they add a newline, and lose NUL bytes):

    to the host     o OFFSET BASE64      stdout            i TOTAL       stdin that the process has taken
                    z TOTAL              end of stdout     b             nobody reads its stdin any more
                    e BASE64             more of stderr    x CODE BASE64 exit code and the last of stderr
    from the host   d OFFSET BASE64      stdin             a TOTAL       stdout that has arrived
                    c TOTAL              end of stdin      k             kill it
"""

from __future__ import annotations

import binascii
import errno
import json
import os
import selectors
import signal
import socket
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from orchestrator.sandboxes.inside import system

WINDOW = 1 << 20
"""How far either side may be ahead of the other, in bytes."""

CHUNK = 48 * 1024
"""Bytes in one frame."""

TAIL_BYTES = 65_536
STDERR_EVERY_SEC = 0.25
KEPT_SEC = 300.0
"""How long the result of a command that nobody fetches is kept."""


def exit_code(status: int) -> int:
    """As `os.waitstatus_to_exitcode` of Python 3.9."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def encoded(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


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

    def report(self) -> Dict[str, Any]:
        """Head and tail in base64, and how many bytes are missing between them."""
        tail = self.tail[-(self.cap - self.cap // 2) :] if self.total > self.cap else self.tail
        cut = self.total - len(self.head) - len(tail)
        return {"head": encoded(bytes(self.head)), "tail": encoded(bytes(tail)), "cut": cut}


class Process:
    """A process of this handle, and what its pipes hold."""

    def __init__(self, init: Init, asked: Dict[str, Any]) -> None:
        self.init, self.code = init, None  # type: Init, Optional[int]
        self.ended_at = 0.0
        self.pid, self.stdin, self.stdout, self.stderr = start(init.settings, asked)
        for fd in (self.stdin, self.stdout, self.stderr):
            if fd >= 0:
                os.set_blocking(fd, False)

    def kill(self) -> None:
        if self.code is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def died(self, code: int) -> None:
        self.code, self.ended_at = code, time.monotonic()


class Command(Process):
    """Runs to its end; its output is kept."""

    def __init__(self, init: Init, asked: Dict[str, Any]) -> None:
        super().__init__(init, asked)
        self.out, self.err = Kept(asked["cap"]), Kept(asked["cap"])
        limit = asked.get("timeout")
        self.deadline = time.monotonic() + limit if limit is not None else None
        self.outlasted = False
        self.waiting: List[Client] = []
        init.watch(self.stdout, selectors.EVENT_READ, lambda: self.read("stdout", self.out))
        init.watch(self.stderr, selectors.EVENT_READ, lambda: self.read("stderr", self.err))

    def read(self, name: str, kept: Kept) -> bool:
        """Take what is there; False when there is nothing more for now."""
        fd = getattr(self, name)
        data = take(fd) if fd >= 0 else None
        if data is None:
            return False
        if not data:
            self.drop(name)
            return False
        kept.add(data)
        return True

    def drop(self, name: str) -> None:
        fd = getattr(self, name)
        if fd >= 0:
            self.init.unwatch(fd)
            os.close(fd)
            setattr(self, name, -1)

    def died(self, code: int) -> None:
        """What it left in the background may still hold its pipes: nobody waits for that."""
        super().died(code)
        for name, kept in (("stdout", self.out), ("stderr", self.err)):
            for _ in range(64):
                if not self.read(name, kept):
                    break
            self.drop(name)
        for client in self.waiting:
            client.answer(self.report())
        self.waiting.clear()

    def tick(self, now: float) -> Optional[float]:
        """When to look again."""
        if self.code is not None or self.deadline is None:
            return None
        if now >= self.deadline:
            self.outlasted, self.deadline = True, None
            self.kill()
        return self.deadline

    def report(self) -> Dict[str, Any]:
        return {
            "code": self.code,
            "outlasted": self.outlasted,
            "stdout": self.out.report(),
            "stderr": self.err.report(),
        }


class Channel(Process):
    """A process whose stdin and stdout the host holds."""

    def __init__(self, init: Init, asked: Dict[str, Any]) -> None:
        super().__init__(init, asked)
        self.client = None  # type: Optional[Client]
        self.out, self.out_from, self.sent, self.out_ended = bytearray(), 0, 0, False
        self.into, self.taken, self.received, self.close_at = bytearray(), 0, 0, -1
        self.told, self.broken = 0, False
        self.tail, self.fresh, self.next_stderr = bytearray(), bytearray(), 0.0
        init.watch(self.stderr, selectors.EVENT_READ, self.read_stderr)
        self.listen()

    # --- to the host ---

    def listen(self) -> None:
        """Read on while the host is not too far behind."""
        if self.stdout >= 0:
            ready = len(self.out) < WINDOW
            self.init.watch(self.stdout, selectors.EVENT_READ if ready else 0, self.read_stdout)

    def read_stdout(self) -> None:
        data = take(self.stdout)
        if data is None:
            return
        if data:
            self.out += data
        else:
            self.init.unwatch(self.stdout)
            os.close(self.stdout)
            self.stdout, self.out_ended = -1, True
        self.push()
        self.listen()

    def read_stderr(self) -> None:
        data = take(self.stderr)
        if data is None:
            return
        if not data:
            self.init.unwatch(self.stderr)
            os.close(self.stderr)
            self.stderr = -1
            return
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        self.fresh = (self.fresh + data)[-TAIL_BYTES:]

    def push(self) -> None:
        """Say what the client has not been told, as far as its line takes it."""
        client = self.client
        if client is None:
            return
        while client.room() and self.sent < self.out_from + len(self.out):
            at = self.sent - self.out_from
            data = bytes(self.out[at : at + CHUNK])
            self.sent += len(data)
            client.say("o %d %s" % (self.sent - len(data), encoded(data)))
        if self.out_ended and self.sent == self.out_from + len(self.out) and not client.told_end:
            client.told_end = True
            client.say("z %d" % self.sent)
        if self.taken - self.told >= WINDOW // 4 or (self.taken > self.told and not self.into):
            self.told = self.taken
            client.say("i %d" % self.taken)
        if self.broken and not client.told_broken:
            client.told_broken = True
            client.say("b")
        if self.code is not None and not client.told_exit:
            client.told_exit = True
            client.say("x %d %s" % (self.code, encoded(bytes(self.tail))))

    def tick(self, now: float) -> Optional[float]:
        """More of stderr now and then: a flood of it must not be in the way."""
        if self.client is None or not self.fresh or self.code is not None:
            return None
        if now < self.next_stderr:
            return self.next_stderr
        self.next_stderr = now + STDERR_EVERY_SEC
        self.client.say("e %s" % encoded(bytes(self.fresh)))
        self.fresh.clear()
        return None

    # --- from the host ---

    def attach(self, client: Client, have: int) -> None:
        """Talk to this client from now on, which has the first `have` bytes of stdout."""
        if self.client is not None:
            self.client.close()
        self.client = client
        self.acknowledge(have)
        self.sent, self.told = have, self.taken
        client.say("i %d" % self.taken)
        self.fresh = bytearray(self.tail)
        self.push()

    def heard(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "d":
            number, _, data = rest.partition(" ")
            self.feed(int(number), binascii.a2b_base64(data))
        elif word == "a":
            self.acknowledge(int(rest))
            self.push()
            self.listen()
        elif word == "c":
            self.close_at = int(rest)
            self.write()
        elif word == "k":
            self.kill()

    def acknowledge(self, total: int) -> None:
        if total > self.out_from:
            del self.out[: total - self.out_from]
            self.out_from = total

    def feed(self, number: int, data: bytes) -> None:
        """Stdin from `number` on; what came before is a repetition, and a gap is waited for."""
        fresh = data[self.received - number :] if number <= self.received else b""
        self.received += len(fresh)
        self.into += fresh
        self.write()

    def write(self) -> None:
        if self.stdin >= 0 and self.into:
            try:
                count = os.write(self.stdin, memoryview(self.into)[:65536])
            except BlockingIOError:
                count = 0
            except OSError:
                self.broken = True
                self.close_stdin()
                self.push()
                return
            del self.into[:count]
            self.taken += count
        if self.stdin >= 0:
            if not self.into and 0 <= self.close_at <= self.taken:
                self.close_stdin()
            else:
                self.init.watch(self.stdin, selectors.EVENT_WRITE if self.into else 0, self.write)
        self.push()

    def close_stdin(self) -> None:
        self.init.unwatch(self.stdin)
        os.close(self.stdin)
        self.stdin = -1
        self.into.clear()

    def died(self, code: int) -> None:
        super().died(code)
        for _ in range(64):
            if self.stderr < 0:
                break
            before = len(self.fresh), bytes(self.tail[-64:])
            self.read_stderr()
            if before == (len(self.fresh), bytes(self.tail[-64:])):
                break
        self.push()


class Client:
    """A connection of the host, by way of a keeper: one request, and for a channel its frames."""

    def __init__(self, init: Init, conn: socket.socket) -> None:
        self.init, self.conn = init, conn
        self.heard, self.unsent = bytearray(), bytearray()
        self.channel = None  # type: Optional[Channel]
        self.told_end = self.told_broken = self.told_exit = False
        self.until = 0.0
        conn.setblocking(False)
        init.watch(conn.fileno(), selectors.EVENT_READ, self.turn)

    def turn(self) -> None:
        self.flush()
        if self.channel is not None and self.channel.client is self:
            self.channel.push()
        try:
            data = self.conn.recv(262_144)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self.heard += data
        while self.conn.fileno() >= 0:
            line, newline, rest = self.heard.partition(b"\n")
            if not newline:
                return
            self.heard = rest
            if self.channel is None:
                self.init.request(self, json.loads(line.decode()))
            else:
                self.channel.heard(line.decode("ascii", "replace"))

    def room(self) -> bool:
        return len(self.unsent) < 4 * CHUNK

    def answer(self, reply: Dict[str, Any]) -> None:
        self.until = 0.0
        self.say(json.dumps(reply))

    def say(self, line: str) -> None:
        self.unsent += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        if self.conn.fileno() < 0:
            return
        while self.unsent:
            try:
                del self.unsent[: self.conn.send(self.unsent)]
            except BlockingIOError:
                break
            except OSError:
                self.close()
                return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.unsent else 0)
        self.init.watch(self.conn.fileno(), events, self.turn)

    def close(self) -> None:
        if self.conn.fileno() >= 0:
            self.init.unwatch(self.conn.fileno())
            self.conn.close()
        if self.channel is not None and self.channel.client is self:
            self.channel.client = None
        self.init.clients.discard(self)


class Init:
    """The loop of PID 1."""

    def __init__(self, listener: socket.socket, settings: Dict[str, Any]) -> None:
        self.settings = settings
        self.selector = selectors.DefaultSelector()
        self.watched: Dict[int, int] = {}
        self.processes: Dict[str, Process] = {}
        self.clients: set[Client] = set()
        self.listener = listener
        listener.setblocking(False)
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.watch(listener.fileno(), selectors.EVENT_READ, self.accept)
        self.watch(woken, selectors.EVENT_READ, lambda: self.reap(woken))

    def watch(self, fd: int, events: int, handler: Callable[[], Any]) -> None:
        known = self.watched.get(fd, 0)
        if known == events:
            return
        if known and events:
            self.selector.modify(fd, events, handler)
        elif events:
            self.selector.register(fd, events, handler)
        else:
            self.selector.unregister(fd)
        self.watched[fd] = events

    def unwatch(self, fd: int) -> None:
        self.watch(fd, 0, lambda: None)
        self.watched.pop(fd, None)

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select(self.patience()):
                if self.watched.get(key.fd):
                    key.data()

    def patience(self) -> Optional[float]:
        """Seconds until a clock of somebody's runs out."""
        now = time.monotonic()
        times = []
        for number, process in list(self.processes.items()):
            if isinstance(process, (Command, Channel)):
                times.append(process.tick(now))
            if isinstance(process, Command) and process.code is not None and now - process.ended_at > KEPT_SEC:
                del self.processes[number]
        for client in list(self.clients):
            if client.until and now >= client.until:
                client.answer({"running": True})
            elif client.until:
                times.append(client.until)
        due = [when for when in times if when is not None]
        return max(0.0, min(due) - now) if due else None

    def accept(self) -> None:
        try:
            conn, _ = self.listener.accept()
        except OSError:
            return
        self.clients.add(Client(self, conn))

    def request(self, client: Client, asked: Dict[str, Any]) -> None:
        try:
            getattr(self, "do_" + asked["do"])(client, asked)
        except OSError as exc:
            client.answer({"error": said(exc), "errno": exc.errno})

    def do_run(self, client: Client, asked: Dict[str, Any]) -> None:
        """Run a command, unless that has been done, and wait for it a while."""
        command = self.processes.get(asked["id"])
        if command is None:
            command = self.processes[asked["id"]] = Command(self, asked)
        assert isinstance(command, Command)
        if command.code is not None:
            client.answer(command.report())
        else:
            client.until = time.monotonic() + asked["wait"]
            command.waiting.append(client)

    def do_kill(self, client: Client, asked: Dict[str, Any]) -> None:
        process = self.processes.get(asked["id"])
        if process is not None:
            process.kill()
        client.answer({})

    def do_attach(self, client: Client, asked: Dict[str, Any]) -> None:
        channel = self.processes.get(asked["id"])
        if channel is None:
            channel = self.processes[asked["id"]] = Channel(self, asked)
        assert isinstance(channel, Channel)
        client.channel = channel
        client.say("+")
        channel.attach(client, asked["have"])

    def reap(self, woken: int) -> None:
        """Everything that died: our own are told of, orphans only buried."""
        try:
            os.read(woken, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for process in self.processes.values():
                if process.pid == pid and process.code is None:
                    process.died(exit_code(status))


def take(fd: int) -> Optional[bytes]:
    """What a pipe has now: b"" at its end, None when there is nothing."""
    try:
        return os.read(fd, 65_536)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def said(exc: OSError) -> str:
    text = os.strerror(exc.errno) if exc.errno else str(exc)
    return "%s: %s" % (text, exc.filename) if exc.filename else text


# --- starting ---


def start(settings: Dict[str, Any], asked: Dict[str, Any]) -> Tuple[int, int, int, int]:
    """(pid, our end of stdin or -1, of stdout, of stderr) of a new process; `OSError` says what is not there."""
    pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(4)]
    (in_read, in_write), (out_read, out_write), (err_read, err_write), (wrong_read, wrong_write) = pipes
    pid = os.fork()
    if not pid:
        try:
            child(settings, asked, (in_read if asked["stdin"] else -1, out_write, err_write))
        except BaseException as exc:
            number = exc.errno if isinstance(exc, OSError) else None
            text = said(exc) if isinstance(exc, OSError) else repr(exc)
            os.write(wrong_write, json.dumps([number or errno.EINVAL, text]).encode())
        finally:
            os._exit(127)
    for fd in (in_read, out_write, err_write, wrong_write):
        os.close(fd)
    wrong = b""
    while True:
        more = os.read(wrong_read, 65_536)
        if not more:
            break
        wrong += more
    os.close(wrong_read)
    if wrong or not asked["stdin"]:
        os.close(in_write)
        in_write = -1
    if wrong:
        os.close(out_read)
        os.close(err_read)
        number, text = json.loads(wrong.decode())
        raise OSError(number, text)
    return pid, in_write, out_read, err_read


def child(settings: Dict[str, Any], asked: Dict[str, Any], fds: Tuple[int, int, int]) -> None:
    os.setsid()
    stdin, stdout, stderr = fds
    if stdin < 0:
        stdin = os.open("/dev/null", os.O_RDONLY)
    script = asked.get("script")
    for fd, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
        os.dup2(fd, number)
    if script is not None:
        os.dup2(os.open(script, os.O_RDONLY, dir_fd=settings["uploads"]), 3)
        os.fchmod(3, 0o644)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.umask(0o022)
    become(settings, asked["user"])
    os.chdir(asked["cwd"])
    os.execvpe(asked["argv"][0], asked["argv"], asked["env"])  # noqa: S606 - what a sandbox is for


def become(settings: Dict[str, Any], user: str) -> None:
    """Be the agent, who can become nobody else, or root without what root could leave with."""
    system.drop_capabilities()
    if user == "agent":
        uid = settings["agent_uid"]
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        system.no_new_privileges()
    elif not settings["trusted"]:
        raise PermissionError(errno.EPERM, "only a trusted handle is root")


def main(listener: socket.socket, settings: Dict[str, Any]) -> None:
    """Be PID 1 of the namespace that was just made."""
    system.undumpable()
    Init(listener, settings).run()
