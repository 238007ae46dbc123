"""What the host asks for, one call each, as root of the sandbox.

A request is an argument: JSON, or `@` and the path of a file that holds it (environments are nobody else's to read).
The answer is the last line, `rollout: ` and JSON; `attach` talks in frames instead (see `init`). What is asked for
twice is done once, or once more to the same end, so that the host may repeat a call whose answer was lost. So no file
that a call needs is removed by it: a later one names in `forget` what nobody needs any more.

What there is:

    /run/rollout            root's alone: this program, uploads on their way, a folder for each handle
    a handle                mount and PID namespaces of its own: HOME, /tmp and /dev/shm are its own; an agent's shows
                            nothing in /tests, /solution and /logs/verifier, nor in /run/rollout
    the inner network       where nothing outside is to be reached: one network namespace for all handles, with nothing
                            but loopback. The service that runs our calls, which would do anything for anybody on
                            localhost, cannot be reached there
    agent                   uid 52001, without privileges and without a way to them
"""

from __future__ import annotations

import binascii
import io
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Sequence, Set, Tuple

from orchestrator.sandboxes.inside import files, init, system

ROOT = "/run/rollout"
HANDLES = ROOT + "/handles"
IN, OUT = ROOT + "/in", ROOT + "/out"
BINDS = ROOT + "/binds"
NETWORK = ROOT + "/network"
CONFIG = ROOT + "/config.json"
EMPTY = ROOT + "/empty"

HOME, TMP = "/home/agent", "/tmp"
TRUSTED = ("/tests", "/solution", "/logs/verifier")
SHARED = ("/logs/agent",)
AGENT_UID = 52001
INLINE = 262_144
"""Files up to this size travel in an answer."""

READ_LIMIT = 256 << 20
END_SEC = 10.0
OPEN_SEC = 15.0
NAMED = 20
"""So many processes are named in a sentence."""
NAMELESS_SEC = 1.0
"""How long a process without a command line may be there: one that just starts, as a call of ours may, or ends."""

UNWANTED = ("DAYTONA_", "SUDO_", "ROLLOUT_", "LC_CTYPE")
"""Variables that are not the image's: the service's, sudo's, ours, and what Python sets for itself."""

Answer = Dict[str, Any]


class Failed(Exception):
    """What was asked for cannot be done; the sentence is for the host."""

    def __init__(self, text: str, kind: str = "failed") -> None:
        Exception.__init__(self, text)
        self.kind = kind


def main() -> None:
    word = sys.argv[1]
    if os.geteuid() != 0:
        become_root(word)
    try:
        if word.startswith("@"):
            with open(word[1:], encoding="utf-8") as file:
                text = file.read()
        else:
            text = word
        asked = json.loads(text)
        for path in asked.pop("forget", ()):
            if os.path.dirname(path) in (IN, OUT):
                forget(path)
        answer = OPERATIONS[asked["do"]](asked)
    except (Failed, files.Escape, files.Unusable, OSError) as exc:
        answer = explained(exc)
    if answer is not None:
        sys.stdout.write("\nrollout: " + json.dumps(answer) + "\n")
        sys.stdout.flush()


def become_root(word: str) -> None:
    """The image has a user of its own: go on as root, who has to be had without a password."""
    if shutil.which("sudo") is None:
        told = {
            "error": "its image runs as uid %d, and has no sudo to become root with" % os.geteuid(),
            "kind": "failed",
        }
        sys.stdout.write("\nrollout: " + json.dumps(told) + "\n")
        raise SystemExit(0)
    os.environ["ROLLOUT_ENV"] = json.dumps(dict(os.environ))
    sudo = ["sudo", "-n", "--preserve-env=ROLLOUT_ENV"]
    os.execvp("sudo", [*sudo, sys.executable, "-I", "-S", "-c", LAUNCH, sys.path[0], word])  # noqa: S606, S607


def explained(exc: Exception) -> Answer:
    """An error as an answer."""
    if isinstance(exc, Failed):
        return {"error": str(exc), "kind": exc.kind}
    if isinstance(exc, files.Escape):
        return {"error": str(exc), "kind": "escape"}
    if isinstance(exc, OSError):
        return {"error": init.said(exc), "kind": "missing" if isinstance(exc, FileNotFoundError) else "failed"}
    return {"error": str(exc), "kind": "failed"}


LAUNCH = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from orchestrator.sandboxes.inside.keeper import main; main()"
)


def forget(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def config() -> Dict[str, Any]:
    with open(CONFIG, encoding="utf-8") as file:
        found = json.load(file)
    assert isinstance(found, dict)
    return found


# --- the sandbox ---


def start(asked: Dict[str, Any]) -> Answer:
    """Make folders, the agent and the inner network; say what there is.

    Who asked may have gone before the answer, or not have heard it, and asks again: the first call may still be at it.
    """
    caller = int(os.environ.get("SUDO_UID", "0"))
    for folder, mode in ((ROOT, 0o711), (HANDLES, 0o700), (BINDS, 0o755), (EMPTY, 0o555), (IN, 0o700), (OUT, 0o700)):
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, mode)
    lock(ROOT)
    for folder in (IN, OUT):
        os.chown(folder, caller, -1)
    agent = AGENT_UID if asked["agent"] == "agent" and system.is_mapped(AGENT_UID) else 0
    for folder in (HOME, *SHARED, asked["cwd"], *TRUSTED):
        os.makedirs(folder, exist_ok=True)
    for folder in TRUSTED:
        os.chmod(folder, 0o700)
    if agent:
        for folder in (asked["cwd"], *SHARED):
            adopt(folder, agent)
    if asked["inner"]:
        make_network()
    env = json.loads(os.environ.get("ROLLOUT_ENV", "{}")) or dict(os.environ)
    known = system.living()
    settings = {
        "cwd": asked["cwd"],
        "inner": asked["inner"],
        "agent_uid": agent,
        "places": [asked["cwd"], *SHARED, *TRUSTED, HOME, TMP],
        "binds": [],
        "baseline": sorted([pid, begun] for pid, (_, begun) in known.items()),
        "service": sorted(system.ancestors(os.getpid(), known) - {os.getpid()}),
        "env": {name: value for name, value in env.items() if not name.startswith(UNWANTED)},
        "program": program(),
    }
    save(settings)
    return {"python": sys.version.split()[0], "agent_uid": agent, "caller": caller}


def program() -> str:
    """Where this program is: nobody else's calls run it from here, since each host brings one of its own."""
    return sys.path[0]


def save(settings: Dict[str, Any]) -> None:
    draft = CONFIG + ".draft"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(settings, file)
    os.chmod(draft, 0o600)
    os.replace(draft, CONFIG)


def adopt(folder: str, owner: int) -> None:
    """Hand a folder of the image, with all that is in it, to the agent. Only before there is one: see `files`."""
    os.chown(folder, owner, owner)
    for above, folders, names in os.walk(folder):
        for name in folders + names:
            os.chown(os.path.join(above, name), owner, owner, follow_symlinks=False)


def make_network() -> None:
    """The inner network: it lasts as long as `NETWORK` shows it."""
    if is_namespace(NETWORK):  # this call's answer was lost, or the start before was cancelled
        return
    with open(NETWORK, "a"):
        pass
    pid = os.fork()
    if not pid:
        try:
            system.unshare(system.NEWNET)
            system.loopback_up()
            system.mount("/proc/self/ns/net", NETWORK, flags=system.BIND)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise Failed(
            "no network namespace can be made in this sandbox: its runtime must allow that, or give network bridge"
        )


def is_namespace(path: str) -> bool:
    with open("/proc/self/mountinfo") as mounts:
        return any(line.split()[4] == path for line in mounts)


def bind(asked: Dict[str, Any]) -> Answer:
    """A folder of the host was uploaded as a tar, or is in the image: every handle from now on shows it, read-only."""
    settings = config()
    number = len(settings["binds"])
    path = asked["path"]
    known = [entry for entry in settings["binds"] if entry[1] == path]
    if known:
        return {}
    place = path
    if asked.get("archive"):
        place = "%s/%d" % (BINDS, number)
        os.makedirs(place, exist_ok=True)
        files.unpack(asked["archive"], "", place, [place], 0)
        os.chmod(place, 0o755)
    elif not os.path.isdir(path):
        raise Failed("the image has no folder %s, which an agent needs" % path, "missing")
    settings["binds"].append([place, path])
    save(settings)
    return {}


# --- handles ---


def opened(asked: Dict[str, Any]) -> Answer:
    """Make the namespaces of a handle, and its PID 1."""
    settings = config()
    folder = "%s/%s" % (HANDLES, asked["handle"])
    for name, mode in (("", 0o700), ("home", 0o700), ("tmp", 0o1777), ("over", 0o755)):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        os.chmod(os.path.join(folder, name), mode)
    lock(folder)
    if asked["token"] == ended_token(folder):
        raise Failed("the handle has ended", "ended")  # a call that was given up, and comes late
    if pid_one(asked["handle"]) is not None:
        return {}
    forget(folder + "/socket")
    settings.update(trusted=asked["trusted"], folder=folder)
    if not settings["trusted"] and settings["agent_uid"]:
        os.chown(folder + "/home", settings["agent_uid"], settings["agent_uid"])
    ready, told = os.pipe2(os.O_CLOEXEC)
    middle = os.fork()
    if not middle:
        try:
            os.close(ready)
            divide(settings, told)
        except BaseException as exc:
            os.write(told, ("error " + (init.said(exc) if isinstance(exc, OSError) else repr(exc))).encode())
        finally:
            os._exit(0)
    os.close(told)
    os.waitpid(middle, 0)
    said = bytearray()
    while select.select([ready], [], [], OPEN_SEC)[0]:
        data = os.read(ready, 4096)
        if not data:
            break
        said += data
    os.close(ready)
    text = said.decode("utf-8", "replace")
    if not text.endswith("ready"):
        raise Failed("its namespaces cannot be made: %s" % (text.partition("error ")[2] or "PID 1 did not come up"))
    return {}


def divide(settings: Dict[str, Any], told: int) -> None:
    """Leave the sandbox's namespaces; the child is PID 1 of new ones, and nobody's child."""
    os.setsid()
    if settings["inner"]:
        system.enter(NETWORK, system.NEWNET)
    system.unshare(system.NEWNS | system.NEWPID)
    noted, note = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        stat = system.stat_of(pid)
        with open(settings["folder"] + "/pid", "w") as file:
            json.dump([pid, stat[2] if stat else "", system.namespace_of(pid)], file)
        os.write(note, b".")  # it shares our mounts: from here on our /proc may be its own
        return
    os.close(note)
    if os.read(noted, 1) != b".":  # nobody could find us again: the disk is full, say
        os._exit(1)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(settings["folder"] + "/socket")
    listener.listen(64)
    settings["uploads"] = os.open(IN, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    furnish(settings)
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    for number in map(int, os.listdir("/proc/self/fd")):  # whoever called may wait until its pipes are closed
        if number > 2 and number not in (listener.fileno(), settings["uploads"], told):
            close_quietly(number)
    os.chdir("/")
    os.write(told, b"ready")
    os.close(told)
    init.main(listener, settings)


def close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:  # the folder that was just read
        pass


def furnish(settings: Dict[str, Any]) -> None:
    """What a handle sees."""
    folder, trusted = settings["folder"], settings["trusted"]
    system.mount("", "/", flags=system.REC | system.PRIVATE)
    overs = Covers(folder + "/over", settings["agent_uid"] if not trusted else 0)
    system.bind(folder + "/home", HOME)
    for place in (TMP, "/var/tmp", "/dev/shm"):
        if os.path.isdir(place) and not os.path.islink(place):
            system.bind(folder + "/tmp", place)
    if settings["agent_uid"]:
        for name, line in (("passwd", "agent:x:%d:%d::%s:/bin/sh\n"), ("group", "agent:x:%d:\n")):
            add_line(
                folder,
                name,
                line % ((settings["agent_uid"],) * 2 + (HOME,) if name == "passwd" else settings["agent_uid"]),
            )
    for source, target in settings["binds"]:
        overs.reach(target)
        system.bind(source, target, read_only=True)
    if not trusted:
        for place in TRUSTED:
            system.bind(EMPTY, place, read_only=True)
    system.bind(EMPTY, ROOT, read_only=True)
    try:
        system.mount("proc", "/proc", "proc", system.NOSUID | system.NODEV)
    except PermissionError:  # a runtime that hides parts of /proc: what is there shows the whole sandbox, read-only
        pass


def add_line(folder: str, name: str, line: str) -> None:
    """Let `/etc/<name>` of this handle know the agent."""
    try:
        with open("/etc/" + name, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except FileNotFoundError:
        return
    copy = os.path.join(folder, name)
    with open(copy, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text if not text or text.endswith("\n") else text + "\n")
        file.write(line)
    os.chmod(copy, 0o644)
    system.bind(copy, "/etc/" + name)


class Covers:
    """Makes the way to a mount point: a folder on it that the agent may not enter is covered by an empty one."""

    def __init__(self, folder: str, uid: int) -> None:
        self.folder, self.uid, self.count = folder, uid, 0

    def reach(self, target: str) -> None:
        parts = [part for part in target.split("/") if part]
        for number in range(1, len(parts) + 1):
            at = "/" + "/".join(parts[:number])
            if not os.path.isdir(at):
                os.mkdir(at)
                os.chmod(at, 0o755)
            elif self.uid and number < len(parts) and not os.stat(at).st_mode & 0o001:
                self.count += 1
                cover = "%s/%d" % (self.folder, self.count)
                shutil.rmtree(cover, ignore_errors=True)
                os.mkdir(cover)
                os.chmod(cover, 0o755)
                system.bind(cover, at)


def pid_one(handle: str) -> Optional[Tuple[int, str]]:
    """(pid as seen from here, namespace) of a handle's PID 1; None when it is dead or never was."""
    try:
        with open("%s/%s/pid" % (HANDLES, handle)) as file:
            pid, begun, namespace = json.load(file)
    except (OSError, ValueError):
        return None
    stat = system.stat_of(pid)
    return (pid, namespace) if stat is not None and stat[0] not in "ZX" and stat[2] == begun else None


def lock(folder: str) -> None:
    """One call at a time sets up the sandbox, or opens or ends a handle; the lock goes with this process."""
    import fcntl

    fcntl.flock(os.open(folder, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_EX)


def hold(pid: int) -> None:
    """Keep the number of its namespace from being given to the next one while we list: until this process ends."""
    try:
        os.open("/proc/%d/ns/pid" % pid, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # it died meanwhile
        pass


def ended_token(folder: str) -> str:
    try:
        with open(folder + "/ended") as file:
            return file.read()
    except OSError:
        return ""


def ended(asked: Dict[str, Any]) -> Answer:
    """Kill PID 1 of a handle, and with it everything; prove that by listing every process there is."""
    handle, name = asked["handle"], asked["name"]
    settings = config()
    folder = "%s/%s" % (HANDLES, handle)
    evidence = []
    os.makedirs(folder, mode=0o700, exist_ok=True)
    lock(folder)
    with open(folder + "/ended", "w") as file:
        file.write(asked["token"])
    try:
        with open(folder + "/pid") as file:
            _, _, namespace = json.load(file)
    except (OSError, ValueError):
        namespace = ""
    found = pid_one(handle)
    if found is not None:
        hold(found[0])
        os.kill(found[0], signal.SIGKILL)
        until = time.monotonic() + END_SEC
        while pid_one(handle) is not None:
            if time.monotonic() > until:
                raise Failed("PID 1 of its namespace (pid %d there) is still there after SIGKILL" % found[0], "unquiet")
            time.sleep(0.002)
        evidence.append("PID 1 of handle %s's PID namespace (pid %d here) was killed and is gone" % (name, found[0]))
    left = [pid for pid in system.living() if namespace and system.namespace_of(pid) == namespace]
    if left:
        raise Failed("processes %s are still in its PID namespace" % ", ".join(map(system.name_of, left)), "unquiet")
    count = len(list(system.pids()))
    number = namespace.partition("[")[2].rstrip("]")
    if namespace:
        evidence.append("none of %d processes is in PID namespace %s" % (count, number))
    else:
        evidence.append("handle %s has no PID 1 (any more): nothing of it is left" % name)
    if not asked["trusted"]:
        evidence += put_down_strangers(settings)
    forget(folder + "/pid")
    return {"evidence": evidence}


def put_down_strangers(settings: Dict[str, Any]) -> List[str]:
    """End what is in no handle, was not there when the sandbox came up, and is not the service working for us.

    Where handles share the sandbox's network an agent reaches the service that runs our calls, and could have had it
    start something. What the task's own services started is theirs.
    """
    killed = put_down(lambda: strangers(settings, spare_handles=True))
    return ["ended what an agent had started outside of its handle: %s" % killed] if killed else []


def emptied(_asked: Dict[str, Any]) -> Answer:
    """End what was started through any handle, by whomever, and prove it: the image's and the service's are left.

    Whoever had the sandbox before us may be dead with calls on their way. Their program is removed first, so that one
    which comes late finds nothing to run; one that is here already is no call of ours, and ends with the rest.
    """
    settings = config()
    if settings["program"] != program():
        shutil.rmtree(settings["program"], ignore_errors=True)
        if os.path.exists(settings["program"]):
            raise Failed("the program of whoever had it before cannot be removed: %s" % settings["program"], "unquiet")
    killed = put_down(lambda: strangers(settings))
    for folder in (IN, OUT):  # what those calls brought, or were to bring home
        for name in os.listdir(folder):
            forget(os.path.join(folder, name))
    save(dict(settings, program=program()))
    evidence = ["ended what had been started in the sandbox: %s" % killed] if killed else []
    count = len(list(system.pids()))
    evidence.append("none of %d processes there is anybody's but the image's, the service's and ours" % count)
    return {"evidence": evidence, "binds": [path for _, path in settings["binds"]]}


def put_down(find: Callable[[], Set[int]]) -> str:
    """Kill what `find` finds until nothing is left, and name it. Raises `Failed` when that cannot be had or proven.

    A process that starts its like and ends, over and over, is dead when it is read, and its child not listed yet. So
    only a listing in which nothing was found, and while which nothing was started, says that nothing is left.
    """
    killed: Dict[int, str] = {}
    nameless: Dict[int, float] = {}
    until = time.monotonic() + END_SEC
    while True:
        begun = system.next_number()
        found = find()
        if not found and system.next_number() == begun + 1:
            break
        now = time.monotonic()
        waited = {pid: nameless.setdefault(pid, now) for pid in found if not words_of(pid)}
        found -= {pid for pid, since in waited.items() if now < since + NAMELESS_SEC}
        killed.update({pid: system.name_of(pid) for pid in found if pid not in killed})
        kill(found)
        if time.monotonic() > until:
            outlived = "processes %s are still there after SIGKILL" % ", ".join(map(system.name_of, found))
            unproven = "processes are started there all the time: that none of them is an agent's cannot be proven"
            raise Failed(outlived if found else unproven, "unquiet")
        time.sleep(0.01)
    names = [*killed.values()]
    return ", ".join(names[:NAMED]) + (" and %d more" % (len(names) - NAMED) if len(names) > NAMED else "")


def kill(found: Set[int]) -> None:
    """End these, and each group that holds no other process: nobody in that can start one while it is killed."""
    theirs = {system.group_of(pid) for pid in found}
    theirs -= {system.group_of(pid) for pid in system.pids() if pid not in found}
    for pid in [*found, *(-group for group in theirs if group > 1)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def strangers(settings: Dict[str, Any], *, spare_handles: bool = False) -> Set[int]:
    """What is neither the image's nor the service's, nor a call of ours, nor below a handle's PID 1 if that is spared.

    It is below that whose ancestor it is, orphaned or not: also what is in a PID namespace of its own.
    """
    seen = system.living()
    baseline = {pid for pid, begun in settings["baseline"] if pid in seen and seen[pid][1] == begun}
    service = set(settings["service"]) & baseline
    roots = {pid: top_of(pid, seen, service) for pid in seen}
    ours = {roots[pid] for pid in seen if is_keeper(pid)}
    ours |= {roots[pid] for pid in seen if system.ancestors(pid, seen) & (baseline - service)}
    found = {pid for pid in seen if pid not in baseline and pid not in service and roots[pid] not in ours}
    if not spare_handles:
        return found
    spared = {handle[0] for handle in map(pid_one, os.listdir(HANDLES)) if handle is not None}
    return {pid for pid in found if not system.ancestors(pid, seen) & spared}


def top_of(pid: int, seen: Dict[int, Tuple[int, str]], service: Set[int]) -> int:
    """The process that the service, or the sandbox's PID 1, has above this one."""
    while pid in seen and seen[pid][0] in seen and seen[pid][0] not in service and seen[pid][0] != 1:
        pid = seen[pid][0]
    return pid


def is_keeper(pid: int) -> bool:
    """Whether this is a call of ours: running this program from where only we have it, and not in a handle."""
    try:
        if system.namespace_of(pid) != system.namespace_of(os.getpid()):  # PID 1 of a handle was forked off a call
            return False
        caller = int(os.environ.get("SUDO_UID", "0"))  # who it is until it has become root
        if os.stat("/proc/%d" % pid).st_uid not in (0, caller):
            return False
        return program().encode() in words_of(pid)
    except OSError:
        return False


def words_of(pid: int) -> bytes:
    """The command line of a process; nothing when it is gone, is about to start or to end, or does not say."""
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            return file.read().strip(b"\0")
    except OSError:
        return b""


# --- processes ---


def connect(handle: str) -> socket.socket:
    conn = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        conn.connect("%s/%s/socket" % (HANDLES, handle))
    except OSError as exc:
        raise Failed("the handle has ended", "ended") from exc
    return conn


def request(asked: Dict[str, Any]) -> Answer:
    """Hand a request to PID 1 and return its answer."""
    conn = connect(asked["handle"])
    conn.sendall(json.dumps(prepared(asked)).encode() + b"\n")
    said = bytearray()
    while True:
        try:
            data = conn.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            break
        said += data
        if data.endswith(b"\n"):
            answer = json.loads(said.decode())
            assert isinstance(answer, dict)
            return answer
    raise Failed("the handle was ended", "ended")


def prepared(asked: Dict[str, Any]) -> Dict[str, Any]:
    """A request with the environment of the image below its own."""
    if "argv" in asked:
        settings = config()
        agent = asked["user"] == "agent"
        base = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        own = {"HOME": HOME if agent else "/root", "USER": asked["user"], "LOGNAME": asked["user"]}
        own.update(SHELL="/bin/sh", TMPDIR=TMP)
        asked["env"] = dict(base, **dict(settings["env"], **own))
        asked["env"].update(asked.pop("given", {}))
        asked["env"] = {str(name): str(value) for name, value in asked["env"].items()}
    return asked


def attach(asked: Dict[str, Any]) -> Optional[Answer]:
    """Carry frames between PID 1 and our stdin and stdout, until either ends."""
    if asked.get("terminal"):
        import tty

        tty.setraw(0)
    conn = connect(asked["handle"])
    conn.sendall(json.dumps(prepared(asked)).encode() + b"\n")
    sys.stdout.write("\nrollout: {}\n")
    sys.stdout.flush()
    sides: List[Tuple[int, Callable[[bytes], None]]] = [(0, conn.sendall), (conn.fileno(), write_out)]
    poll = select.poll()
    for fd, _ in sides:
        poll.register(fd, select.POLLIN)
    handlers = dict(sides)
    while True:
        for fd, _ in poll.poll():
            try:
                data = os.read(fd, 262_144)
                if not data:
                    return None
                handlers[fd](data)
            except OSError:
                return None


def write_out(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


# --- files ---


def inside(asked: Dict[str, Any]) -> Optional[Sequence[str]]:
    """Go where the paths of this request are, as who asks; returns the places that links may not lead out of."""
    settings = config()
    places = settings["places"]
    if not asked.get("handle"):
        return list(places)
    found = pid_one(asked["handle"])
    if found is None:
        raise Failed("the handle has ended", "ended")
    system.enter("/proc/%d/ns/mnt" % found[0], system.NEWNS)
    if asked["trusted"]:
        return list(places)
    uid = settings["agent_uid"]
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    return None


def aside(work: Callable[[], bytes]) -> bytes:
    """Do it in a child: it goes where we could not come back from. An error of it is ours."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    wrong_told, wrong_tell = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        try:
            data = work()
            with open(tell, "wb") as out:
                out.write(data)
        except (Failed, files.Escape, files.Unusable, OSError) as exc:
            os.write(wrong_tell, json.dumps(explained(exc)).encode())
        finally:
            os._exit(0)
    os.close(tell)
    os.close(wrong_tell)
    with open(told, "rb") as out, open(wrong_told, "rb") as wrong:
        data, said = out.read(), wrong.read()
    os.waitpid(pid, 0)
    if said:
        answer = json.loads(said.decode())
        raise Failed(answer["error"], answer["kind"])
    return data


def read(asked: Dict[str, Any]) -> Answer:
    """A file's bytes, in the answer or, where they are many, as a file to be downloaded."""
    data = aside(lambda: files.read(asked["path"], inside(asked), READ_LIMIT))
    if len(data) <= INLINE:
        return {"data": binascii.b2a_base64(data, newline=False).decode()}
    path = OUT + "/" + asked["id"]
    with open(path, "wb") as file:
        hand_over(file.fileno())
        file.write(data)
    return {"file": path}


def hand_over(fd: int) -> None:
    """Let the service, and nobody else, read it."""
    os.fchmod(fd, 0o600)
    os.fchown(fd, os.stat(OUT).st_uid, -1)


def write(asked: Dict[str, Any]) -> Answer:
    """A file from the request, or from an upload."""
    settings = config()
    source: BinaryIO = (
        open(asked["source"], "rb") if asked.get("source") else io.BytesIO(binascii.a2b_base64(asked["data"]))
    )

    def put() -> bytes:
        places = inside(asked)
        owner = owner_at(asked["path"], settings) if places is not None else -1
        files.write(asked["path"], places, source, asked["mode"], owner)
        return b""

    aside(put)
    return {}


def owner_at(path: str, settings: Dict[str, Any]) -> int:
    """Who owns what we put there: root what agents may not see, the agent the rest."""
    clean = os.path.normpath(path) + "/"
    private = any(clean.startswith(place + "/") for place in TRUSTED)
    return 0 if private else settings["agent_uid"]


def unpack(asked: Dict[str, Any]) -> Answer:
    owner = owner_at(asked["path"], config())
    places = inside(asked)
    assert places is not None
    return {"entries": files.unpack(asked["archive"], asked["name"], asked["path"], places, owner)}


def pack(asked: Dict[str, Any]) -> Answer:
    path = OUT + "/" + asked["id"]
    places = inside(asked)
    assert places is not None
    with open(path, "wb") as out:
        hand_over(out.fileno())
        kind = files.pack(asked["path"], places, out)
    return {"file": path, "kind": kind, "size": os.stat(path).st_size}


OPERATIONS: Dict[str, Callable[[Dict[str, Any]], Optional[Answer]]] = {
    "start": start,
    "bind": bind,
    "open": opened,
    "end": ended,
    "empty": emptied,
    "run": request,
    "kill": request,
    "attach": attach,
    "read": read,
    "write": write,
    "pack": pack,
    "unpack": unpack,
}
