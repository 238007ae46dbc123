"""Runs inside a sandbox of `daytona_server`, as its PID 1: starts processes and opens files for the server.

Requests come over a socket that keeps messages apart, as JSON with file descriptors; each has a status socket of its
own. It stands for the service that runs in a real sandbox, so all that it starts has it as an ancestor.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import socket
import sys
import termios


def start(asked, fds):
    """Start a process in a session of its own; with `tty` its stdin is its controlling terminal."""
    wrong_read, wrong_write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            for fd, number in zip(fds, (0, 1, 2), strict=True):
                os.dup2(fd, number)
            if asked.get("tty"):
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.chdir(asked["cwd"])
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.execvpe(asked["argv"][0], asked["argv"], asked["env"])
        except OSError as exc:
            os.write(wrong_write, f"{exc.strerror}: {exc.filename}".encode())
        finally:
            os._exit(127)
    os.close(wrong_write)
    with open(wrong_read, "rb") as wrong:
        said = wrong.read().decode()
    if said:
        raise OSError(said)
    return pid


def children():
    """Every process with its parent."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
    return found


def kill(pid):
    """The process group, and what still has this process as an ancestor: what detached itself is not found."""
    parents = children()
    tree = [pid]
    for one in tree:
        tree += [child for child, parent in parents.items() if parent == one]
    for one in (-pid, *tree):
        try:
            os.kill(one, signal.SIGKILL)
        except OSError:
            continue


def main():
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    selector = selectors.DefaultSelector()
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    selector.register(control, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    running = {}
    control.send(b"ready")
    while True:
        for key, _ in selector.select():
            if key.fd == woken:
                os.read(woken, 4096)
                reap(running)
            elif not request(control, running):
                return


def reap(running):
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        told = running.pop(pid, None)
        if told is not None:
            with told:
                told.send(f"exit {os.waitstatus_to_exitcode(status)}".encode())


def request(control, running):
    message, fds, _, _ = socket.recv_fds(control, 4 << 20, 8)
    if not message:
        return False
    for fd in fds:
        os.set_inheritable(fd, False)
    asked = json.loads(message)
    status = socket.socket(fileno=fds[0])
    try:
        if asked["do"] == "start":
            pid = start(asked, fds[1:])
            status.send(f"started {pid}".encode())
            running[pid] = status
            return True
        if asked["do"] == "kill":
            kill(asked["pid"])
            status.send(b"done")
        elif asked["do"] == "open":
            if asked["flags"] & os.O_CREAT:
                os.makedirs(os.path.dirname(asked["path"]), 0o755, exist_ok=True)
            fd = os.open(asked["path"], asked["flags"], 0o644)
            socket.send_fds(status, [b"opened"], [fd])
            os.close(fd)
        elif asked["do"] == "call":
            function = {"mkdir": os.makedirs, "chmod": os.chmod, "unlink": os.unlink, "stat": os.stat}[asked["name"]]
            result = function(*asked["args"])
            status.send(json.dumps(list(result) if result else []).encode())
    except OSError as exc:
        status.send(f"error {exc.errno or 0} {exc.strerror or exc}".encode())
    finally:
        for fd in fds[1:]:
            os.close(fd)
    status.close()
    return True


if __name__ == "__main__":
    main()
