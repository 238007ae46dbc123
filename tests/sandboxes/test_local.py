"""The local sandbox against real bubblewrap: what the conformance suite does not ask of every sandbox."""
# Tests look at small files while nothing else runs.
# ruff: noqa: ASYNC240, PTH115, PTH208

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from orchestrator.sandboxes import _bwrap, _limits
from orchestrator.sandboxes.local import MARKER, GatewayReach, Limits, LocalSandbox, _group_name, reap
from states.errors import ConfigError, HandleRevoked, SandboxError
from states.ports import Sandbox, SandboxHandle

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox]

PYTHON = _bwrap.interpreter()[0]


def static_check(tmp_path) -> tuple[Sandbox, SandboxHandle]:
    """The type checker compares the local sandbox with the Protocols."""
    sandbox = LocalSandbox(name="x", root=tmp_path)
    return sandbox, sandbox.handle("x")


@pytest.fixture
async def box(tmp_path):
    """Makes sandboxes that are up, and stops them."""
    made = []

    async def make(**settings):
        made.append(LocalSandbox(name=f"box{len(made)}", root=tmp_path / f"box{len(made)}", **settings))
        await made[-1].start()
        return made[-1]

    yield make
    for sandbox in made:
        await sandbox.stop()


async def opened(sandbox, name="solver", **settings):
    handle = sandbox.handle(name, **settings)
    await handle.open()
    return handle


# --- isolation ---


@pytest.mark.parametrize("uid", ["a spare uid", "our own uid"])
async def test_agent_has_no_capability_and_cannot_get_one(box, monkeypatch, uid):
    """No capability in any set that matters, no new privileges, no user namespace, no mount."""
    if uid == "our own uid":
        monkeypatch.setattr(_bwrap, "spare_uid", lambda seed: None)
    handle = await opened(await box())
    status = (await handle.exec("cat /proc/self/status")).stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == int(fields["CapAmb"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    assert fields["Uid"].split() == ["1000"] * 4
    assert fields["Groups"].split() in ([], ["1000"])
    for command in ("unshare -U true", "unshare -n true", "mount -t tmpfs x /tmp", "chroot / true"):
        assert (await handle.exec(command)).return_code != 0, command


@pytest.mark.parametrize("uid", ["a spare uid", "our own uid"])
async def test_agent_cannot_write_outside_its_folders(box, monkeypatch, uid):
    """System, configuration and kernel settings are read-only: core_pattern is the classic way out."""
    if uid == "our own uid":
        monkeypatch.setattr(_bwrap, "spare_uid", lambda seed: None)
    handle = await opened(await box())
    for path in ("/usr/x", "/etc/x", "/etc/passwd", "/x", "/run/x", "/dev/x", "/proc/sys/kernel/core_pattern"):
        result = await handle.exec(f"cat /proc/sys/kernel/core_pattern > {path}")
        assert result.return_code != 0, path
    writable = "find /proc/sys -maxdepth 3 -type f -writable 2>/dev/null | head -5"
    assert (await handle.exec(f"for f in $({writable}); do cat $f > $f && echo $f; done 2>/dev/null")).stdout == ""


async def test_agent_sees_nothing_private_of_the_host(box, tmp_path):
    """Neither shadow, nor homes, nor the host's environment, nor its processes, nor the sandbox's own backing."""
    handle = await opened(await box())
    for path in ("/etc/shadow", "/etc/ssh", "/etc/ssl/private", str(Path.home() / ".bashrc"), str(tmp_path), "/sys"):
        assert (await handle.exec(["ls", path])).return_code != 0, path
    env = (await handle.exec("env")).stdout
    assert {line.partition("=")[0] for line in env.splitlines()} <= {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", "PWD", "SHLVL", "_", "OLDPWD")
    }
    seen = (await handle.exec("ls /proc | grep -c '^[0-9]'")).stdout
    assert int(seen) <= 5


async def test_agent_cannot_hurt_its_supervisor(box):
    """PID 1 can be neither signalled nor looked into; after `kill -9 -1` the handle works on."""
    handle = await opened(await box())
    for signal_name in ("KILL", "STOP", "INT", "TERM", "SEGV"):
        await handle.exec(f"kill -{signal_name} 1")
    for file in ("environ", "fd", "mem", "maps"):
        assert (await handle.exec(f"ls /proc/1/{file}/ || head -c 10 /proc/1/{file}")).return_code != 0
    result = await handle.exec("kill -9 -1; echo survived")
    assert result.return_code in (0, -9)
    assert (await handle.exec("echo works")).stdout == "works\n"


async def test_files_are_nobody_elses_on_the_host(box, tmp_path):
    """The root is closed to others, set-uid bits do not come home, and where we are root agents' files are not."""
    sandbox = await box()
    handle = await opened(sandbox)
    await handle.exec("cp /bin/sh shell && chmod 4755 shell")
    assert stat.S_IMODE(sandbox.root.stat().st_mode) == 0o700
    owner = (sandbox.root / "files/app/shell").stat().st_uid
    assert (owner != 0) if os.geteuid() == 0 else (owner == os.geteuid())
    await sandbox.download("/app", tmp_path / "home")
    assert stat.S_IMODE((tmp_path / "home/shell").stat().st_mode) == 0o755


async def test_trusted_handle_has_a_path_of_its_own(box):
    """A shim that an agent plants anywhere it can is not what a trusted handle runs."""
    sandbox = await box()
    agent, ours = await opened(sandbox), await opened(sandbox, "verifier", trusted=True)
    await agent.exec("for d in /app $HOME /tmp $HOME/bin; do mkdir -p $d; printf '#!/bin/sh\\necho shim' > $d/ls; done")
    await agent.exec("chmod 755 /app/ls $HOME/ls /tmp/ls $HOME/bin/ls")
    assert "shim" not in (await ours.exec("ls /; command -v ls")).stdout
    assert (await ours.exec("echo $PATH")).stdout.strip() == _bwrap.SYSTEM_PATH


async def test_binds_are_read_only_and_at_their_place(box, tmp_path):
    """Agents' installs are seen by every handle, and cannot be changed."""
    (tmp_path / "install/bin").mkdir(parents=True)
    (tmp_path / "install/bin/tool").write_text("#!/bin/sh\necho tool\n")
    (tmp_path / "install/bin/tool").chmod(0o755)
    sandbox = await box(binds=((tmp_path / "install", "/opt/agents/one"),))
    handle = await opened(sandbox)
    assert (await handle.exec("/opt/agents/one/bin/tool")).stdout == "tool\n"
    assert (await handle.exec("touch /opt/agents/one/x")).return_code != 0
    assert await handle.read_file("/opt/agents/one/bin/tool") == b"#!/bin/sh\necho tool\n"
    with pytest.raises(SandboxError, match="read-only"):
        await handle.write_file("/opt/agents/one/x", b"")


# --- network ---


@pytest.fixture
def gateway(tmp_path):
    """A gateway that answers each request, read to its end, with its length in 64 parts."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "gw.sock"))
    server.listen(64)

    def answer(client):
        with client:
            total = 0
            while data := client.recv(65536):
                total += len(data)
            for _ in range(64):
                client.sendall(f"{total:08d}".encode())

    def serve():
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield GatewayReach(tmp_path / "gw.sock", _free_port()), other.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


ASK = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5) as s:
    s.sendall(b"x" * int(sys.argv[2]))
    s.shutdown(socket.SHUT_WR)
    back = b""
    while data := s.recv(65536):
        back += data
print(back[:8].decode(), len(back))
"""


async def test_gateway_is_reached_through_the_relay(box, gateway):
    """Requests that end by half-closing are answered in full, many at once, also after `kill -9 -1`."""
    reach, _ = gateway
    sandbox = await box(gateway=reach)
    handle = await opened(sandbox)
    assert sandbox.gateway_url == f"http://127.0.0.1:{reach.port}"
    seen = []

    async def ask(size):
        result = await handle.exec([PYTHON, "-I", "-c", ASK, str(reach.port), str(size)], timeout_sec=60)
        seen.append((result.stdout, size))

    async with anyio.create_task_group() as tasks:
        for size in (0, 1, 100_000, 3_000_000, 7, 8):
            tasks.start_soon(ask, size)
    await handle.exec("kill -9 -1")
    await ask(99)
    assert len(seen) == 7
    assert all(stdout == f"{size:08d} 512\n" for stdout, size in seen)


async def test_nothing_but_the_gateway_is_reachable(box, gateway):
    """Services of the host, its abstract sockets, names and other interfaces are not there."""
    reach, host_port = gateway
    handle = await opened(await box(gateway=reach))
    connect = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    for host, port in (("127.0.0.1", host_port), ("localhost", host_port), ("192.0.2.1", 80), ("example.com", 80)):
        result = await handle.exec([PYTHON, "-I", "-c", connect, host, str(port)])
        assert result.return_code == 1, (host, result)
    interfaces = (await handle.exec("cat /proc/net/dev")).stdout
    assert [line.split(":")[0].strip() for line in interfaces.splitlines() if ":" in line] == ["lo"]


async def test_gateway_that_is_down_closes_the_connection(box, tmp_path):
    """A socket nobody listens on is a closed connection inside, not a hang; no socket at all is an error at open."""
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "dead.sock"))
    dead.close()
    reach = GatewayReach(tmp_path / "dead.sock", _free_port())
    handle = await opened(await box(gateway=reach))
    result = await handle.exec([PYTHON, "-I", "-c", ASK, str(reach.port), "0"], timeout_sec=30)
    assert result.return_code in (0, 1)
    (tmp_path / "dead.sock").unlink()
    with pytest.raises(SandboxError, match=r"dead\.sock"):
        await opened(await box(gateway=reach))


async def test_host_network_and_no_network(box, gateway):
    """`host` sees the host's services; `none` has no gateway."""
    reach, host_port = gateway
    connect = "import socket,sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 2)"
    sandbox = await box(gateway=reach, network="host")
    handle = await opened(sandbox)
    assert (await handle.exec([PYTHON, "-I", "-c", connect, str(host_port)])).return_code == 0
    sandbox = await box(gateway=reach, network="none")
    assert sandbox.gateway_url is None
    handle = await opened(sandbox)
    assert (await handle.exec([PYTHON, "-I", "-c", connect, str(reach.port)])).return_code == 1


# --- limits ---

BOMB = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"


def _enforced(sandbox, what):
    if any(text.startswith(what) for text in sandbox.unenforced):
        pytest.skip(f"this machine cannot enforce it: {sandbox.unenforced}")


async def test_fork_bomb_ends_in_a_verdict(box):
    """It stops at the limit, a command beside it fails with an error that says why, and its end is proven."""
    sandbox = await box(limits=Limits(pids=40, cpus=0.5))
    _enforced(sandbox, "pids")
    handle = await opened(sandbox)
    channel = await handle.spawn([PYTHON, "-I", "-S", "-c", BOMB])
    refused = None
    with anyio.fail_after(30):
        while refused is None:
            try:
                await handle.exec("true", timeout_sec=10)
            except SandboxError as error:
                refused = error
    assert "limit on processes" in str(refused)
    assert "is gone" in (await handle.end())[0]
    assert await channel.wait() == -9
    other = await opened(sandbox, "next")
    assert (await other.exec("echo usable")).stdout == "usable\n"


async def test_memory_limit_ends_the_eater(box):
    """A process that wants more than there is dies or is refused; the handle works on."""
    sandbox = await box(limits=Limits(memory_mb=96))
    handle = await opened(sandbox)
    result = await handle.exec([PYTHON, "-I", "-S", "-c", "x = bytearray(400 << 20); print(len(x))"], timeout_sec=60)
    assert result.return_code != 0
    assert (await handle.exec("echo usable")).stdout == "usable\n"
    assert (sandbox._killed_for_memory() > 0) == ("memory" in sandbox._cgroup.folders), (
        "what the kernel killed is known"
    )


async def test_memory_that_is_too_little_for_bubblewrap_is_said(box, monkeypatch):
    """Not that it said nothing: what it had of memory, and what to raise."""
    monkeypatch.setattr(_limits, "make_cgroup", lambda *_: _limits.Cgroup({}))  # whose kernel kills when it likes
    sandbox = await box(limits=Limits(memory_mb=1))
    with pytest.raises(SandboxError, match=r"could not start: the 1 MiB of memory .* are used up; raise .*memory_mb"):
        await sandbox.handle("solver").open()


async def test_one_large_file_is_refused(box):
    """A writer of 10 GB is stopped at the limit of a file."""
    sandbox = await box(limits=Limits(disk_mb=8))
    handle = await opened(sandbox)
    result = await handle.exec("exec head -c 10000000000 /dev/zero > /app/big", timeout_sec=60)
    assert result.return_code != 0
    assert (sandbox.root / "files/app/big").stat().st_size <= 8 << 20


@pytest.mark.parametrize(
    "script",
    [
        "dd if=/dev/zero of=$n bs=1M count=2",
        "exec 7>x; dd if=/dev/zero of=/dev/fd/7 bs=1M count=2; rm x; sleep 1000 & true",
    ],
)
async def test_many_files_end_in_a_verdict(box, script):
    """What a file's limit does not catch is measured, deleted files that are held open too: everything is ended."""
    sandbox = await box(limits=Limits(disk_mb=8))
    handle = await opened(sandbox)
    channel = await handle.spawn(["sh", "-c", f"for n in 1 2 3 4 5 6 7 8; do {script}; done 2>/dev/null; sleep 1000"])
    with anyio.fail_after(60):
        assert await channel.wait() == -9
    assert "disk limit of 8 MiB exceeded" in channel.stderr_tail()


async def test_shared_memory_is_bounded(box):
    """`/dev/shm` is memory, so it is small."""
    handle = await opened(await box())
    result = await handle.exec("head -c 200000000 /dev/zero > /dev/shm/x; rm -f /dev/shm/x")
    assert "No space" in result.stderr


async def test_control_groups_are_given_back(box):
    """Where groups can be made, the sandbox's processes are in them, and `stop` removes them."""
    sandbox = await box(limits=Limits(pids=100, memory_mb=256, cpus=1))
    folders = set(sandbox._cgroup.folders.values())
    handle = await opened(sandbox)
    for folder in folders:
        assert len((folder / "cgroup.procs").read_text().split()) >= 1
    await handle.end()
    await sandbox.stop()
    assert not [folder for folder in folders if folder.exists()]


async def test_control_group_that_cannot_be_used_is_said(box, monkeypatch):
    """A group may be made and still refuse processes: limits of each process take over, and that is said."""

    def refuse(self, pid):
        raise PermissionError(13, "no")

    monkeypatch.setattr(_limits.Cgroup, "attach", refuse)
    sandbox = await box(limits=Limits(memory_mb=64, cpus=1))
    handle = await opened(sandbox)
    assert {text.partition(":")[0] for text in sandbox.unenforced} >= {"memory", "cpus"}
    result = await handle.exec([PYTHON, "-I", "-S", "-c", "x = bytearray(200 << 20)"])
    assert "MemoryError" in result.stderr


# --- life ---


async def test_handle_of_a_name_is_one_until_it_ends(box):
    """The same name is the same handle; after its end a new one, which finds its HOME and not the processes."""
    sandbox = await box()
    handle = await opened(sandbox)
    assert sandbox.handle("solver") is handle
    assert sandbox.handle("solver", trusted=True) is not handle
    await handle.write_file("/home/agent/state", b"kept")
    await handle.end()
    with pytest.raises(HandleRevoked):
        await handle.exec("true")
    with pytest.raises(HandleRevoked):
        await handle.open()
    again = await opened(sandbox)
    assert await again.read_file("/home/agent/state") == b"kept"


async def test_names_of_handles_are_no_paths(box, tmp_path):
    """A name with slashes and dots stays below the root, and two such names stay apart."""
    sandbox = await box()
    one, two = await opened(sandbox, "../../evil"), await opened(sandbox, "../..-evil")
    await one.write_file("/tmp/x", b"1")
    with pytest.raises(SandboxError):
        await two.read_file("/tmp/x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box0"]


async def test_death_of_a_namespace_is_an_error_not_a_hang(box):
    """When PID 1 is killed from outside, commands fail, processes are gone and the end is still proven."""
    handle = await opened(await box())
    channel = await handle.spawn(["cat"])
    os.kill(handle._namespace.pid, signal.SIGKILL)
    assert await channel.receive() == b""
    assert await channel.wait() == -9
    with pytest.raises(SandboxError):
        await handle.exec("true", timeout_sec=30)
    with pytest.raises(SandboxError):
        await handle.spawn(["cat"])
    assert "is gone" in (await handle.end())[0]


async def test_ctrl_c_does_not_reach_the_sandbox(box):
    """A signal to our process group, which is what a terminal sends, ends nothing in there: that is ours to decide."""
    handle = await opened(await box())
    assert os.getpgid(handle._namespace.bwrap.pid) != os.getpgid(0)
    assert os.getsid(handle._namespace.pid) != os.getsid(0)


def _open_fds():
    """What each of our file descriptors is, but for the one that lists them."""
    gc.collect()
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:
            continue
    return found


async def test_nothing_leaks(box):
    """Whole lives, with what was left open, give back every file descriptor and leave no child."""
    sandbox = await box()
    await (await opened(sandbox, "warm")).end()
    before = _open_fds()
    for number in range(5):
        handle = await opened(sandbox, f"role{number}")
        channels = [await handle.spawn(["sh", "-c", "echo out; echo err >&2; cat"]) for _ in range(3)]
        with pytest.raises(SandboxError):
            await handle.spawn(["no-such-program"])
        await handle.exec("sleep 1000 & true")
        await channels[0].receive()
        await handle.end()
        assert channels[0].stderr_tail() == "err\n"
        assert await channels[1].receive() in (b"out\n", b"")
    assert _open_fds() - before == set()


async def test_unread_output_survives_the_end(box):
    """What a process wrote before its handle ended can still be read."""
    handle = await opened(await box())
    channel = await handle.spawn(["sh", "-c", "echo said; echo done > /app/done; sleep 1000"])
    await handle.exec("while [ ! -s /app/done ]; do sleep 0.01; done")
    await handle.end()
    assert (await channel.receive(), await channel.receive()) == (b"said\n", b"")


async def test_stop_removes_whatever_an_agent_made(box):
    """Closed folders, a nest deeper than any path, and links to the host: all gone, and only that."""
    sandbox = await box()
    handle = await opened(sandbox)
    deep = "import os\nfor _ in range(3000):\n    os.mkdir('d'); os.chdir('d')\n"
    assert (await handle.exec([PYTHON, "-I", "-S", "-c", deep])).return_code == 0
    await handle.exec("mkdir -p closed/in; echo x > closed/in/y; chmod 000 closed/in closed; ln -s /etc etc; mkfifo p")
    await sandbox.stop()
    assert not sandbox.root.exists()
    assert Path("/etc/passwd").exists()


async def test_many_sandboxes_come_up_at_once(box):
    """Twelve handles of four sandboxes, opened together, each work alone."""
    sandboxes = [await box() for _ in range(4)]
    answers = []

    async def one(sandbox, number):
        handle = await opened(sandbox, f"role{number}")
        answers.append((await handle.exec(f"echo {sandbox.name} {number}; ls /tmp | wc -l")).stdout)

    async with anyio.create_task_group() as tasks:
        for sandbox in sandboxes:
            for number in range(3):
                tasks.start_soon(one, sandbox, number)
    assert sorted(answers) == sorted(f"box{s} {n}\n0\n" for s in range(4) for n in range(3))


# --- mistakes ---


async def test_mistakes_are_said_before_anything_starts(tmp_path):
    """Settings that cannot work are ConfigErrors; a root that holds something, a bind that is missing are refused."""
    for settings in ({"network": "wifi"}, {"cwd": "app"}, {"cwd": "/"}, {"binds": ((tmp_path, "opt"),)}):
        with pytest.raises(ConfigError):
            LocalSandbox(name="x", root=tmp_path / "x", **settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/data").write_text("precious")
    with pytest.raises(SandboxError, match="not empty"):
        await LocalSandbox(name="x", root=tmp_path / "mine").start()
    assert (tmp_path / "mine/data").read_text() == "precious"
    with pytest.raises(SandboxError, match="no-such-install"):
        await LocalSandbox(name="x", root=tmp_path / "x", binds=((tmp_path / "no-such-install", "/opt/x"),)).start()
    assert not (tmp_path / "x").exists()
    sandbox = LocalSandbox(name="x", root=tmp_path / "x")
    with pytest.raises(SandboxError, match="not started"):
        await sandbox.handle("solver").open()


async def test_spawn_takes_no_string(box):
    """A string would be a list of letters."""
    handle = await opened(await box())
    with pytest.raises(SandboxError, match="list of arguments"):
        await handle.spawn("cat")


async def test_bubblewrap_that_cannot_run_says_what_to_do(box, tmp_path, monkeypatch):
    """Its own words and the setting to change; never a run without isolation; nothing is left."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    sandbox = await box()
    monkeypatch.setattr(_bwrap, "bwrap_path", lambda: str(fake))
    with pytest.raises(SandboxError, match=r"No permissions.*sysctl -w user\.max_user_namespaces") as caught:
        await opened(sandbox)
    assert "rollout doctor" in str(caught.value)
    monkeypatch.setattr(_bwrap, "bwrap_path", lambda: str(tmp_path / "gone"))
    with pytest.raises(SandboxError, match="gone"):
        await opened(sandbox, "other")


# --- after kill -9 ---

ORCHESTRATOR = """
import json, sys
from pathlib import Path
import anyio
from orchestrator.sandboxes.local import LocalSandbox

async def main():
    sandbox = LocalSandbox(name="doomed", root=Path(sys.argv[1]))
    found = await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    daemon = "exec 9>/app/lock; flock 9; echo up > /app/up; exec sleep 100000"
    await handle.exec(f"(setsid sh -c '{daemon}' >/dev/null 2>&1 &)")
    await handle.exec("while [ ! -s /app/up ]; do sleep 0.01; done")
    print(json.dumps(found), flush=True)
    await anyio.sleep_forever()

anyio.run(main, backend=sys.argv[2])
"""


@pytest.fixture
def doomed(tmp_path, anyio_backend_name):
    """An orchestrator of its own process, with a daemon in its sandbox, and what `start` returned."""
    process = subprocess.Popen(
        [sys.executable, "-c", ORCHESTRATOR, str(tmp_path / "doomed"), anyio_backend_name],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    yield process, json.loads(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()


def _wait_for_lock(path):
    with path.open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


async def test_kill_9_of_the_orchestrator_kills_everything_and_the_reaper_cleans_up(doomed, tmp_path):
    """The daemon dies without anybody's help; folder and control groups go with `reap`, which may run twice."""
    process, found = doomed
    process.kill()
    with anyio.fail_after(30):
        await anyio.to_thread.run_sync(_wait_for_lock, tmp_path / "doomed/files/app/lock", abandon_on_cancel=True)
    await reap(found)
    await reap(found)
    assert not (tmp_path / "doomed").exists()
    assert _limits.find_cgroup(_group_name("doomed", tmp_path / "doomed")).folders == {}
    assert not [folder for folder in found["cgroups"] if Path(folder).exists()]


async def test_reaper_ends_what_is_still_alive(doomed, tmp_path):
    """Also when the orchestrator merely hangs, its sandbox's processes are found by the marker and killed."""
    process, found = doomed
    process.send_signal(signal.SIGSTOP)
    lock = tmp_path / "doomed/files/app/lock"
    with lock.open("r+b") as held:
        await reap(found)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not lock.exists()


async def test_reaper_removes_no_folder_that_is_not_a_sandbox(tmp_path):
    """Without the marker file, nothing is touched."""
    (tmp_path / "data").write_text("precious")
    with pytest.raises(SandboxError, match=MARKER):
        await reap({"kind": "local", "name": "x", "root": str(tmp_path)})
    assert (tmp_path / "data").exists()


def test_limits_without_being_asked():
    """A sandbox of a task without limits still stops a fork bomb and a disk filler."""
    assert _limits.Limits() == Limits(cpus=None, memory_mb=None, pids=4096, disk_mb=10_240)


async def test_task_may_bring_files_to_a_folder_of_its_own(box, tmp_path):
    """An upload outside the sandbox's folders shares the folder at its top; the system's cannot be had."""
    (tmp_path / "table.csv").write_text("a,b\n")
    sandbox = await box()
    await sandbox.upload(tmp_path / "table.csv", "/data/deep/table.csv")
    handle = await opened(sandbox)
    assert (await handle.exec("cat /data/deep/table.csv && echo more >> /data/deep/table.csv")).stdout == "a,b\n"
    assert await handle.read_file("/data/deep/table.csv") == b"a,b\nmore\n"
    for target in ("/usr/share/x", "/etc/x", "/home/agent/x", "/tmp/x", "/x/../etc/x", "/logs/other"):
        with pytest.raises(SandboxError):
            await sandbox.upload(tmp_path / "table.csv", target)


async def test_verifier_is_not_ended_for_what_an_agent_left(box):
    """The disk limit of a trusted handle counts what is added since it was opened."""
    sandbox = await box(limits=Limits(disk_mb=4))
    agent = await opened(sandbox)
    channel = await agent.spawn(["sh", "-c", "for n in 1 2 3; do head -c 3000000 /dev/zero > $n; done; sleep 1000"])
    assert await channel.wait() == -9
    ours = await opened(sandbox, "verifier", trusted=True)
    assert (await ours.exec("head -c 1000000 /dev/zero > x; sleep 1.5; echo verified")).stdout == "verified\n"
    with pytest.raises(SandboxError, match="disk limit"):
        await ours.exec("for n in 1 2 3; do head -c 3000000 /dev/zero > v$n; done; sleep 1000", timeout_sec=60)


# --- as an ordinary user ---

ORDINARY = """
import os, sys
os.setgroups([]); os.setresgid(54321, 54321, 54321); os.setresuid(54321, 54321, 54321)
sys.path[:0] = sys.argv[2].split(os.pathsep)
from pathlib import Path
import anyio
from orchestrator.conformance import SANDBOX_CLAUSES, run_clauses
from orchestrator.sandboxes.local import LocalSandbox, Limits

async def main():
    count = iter(range(1000))
    make = lambda: LocalSandbox(name="x", root=Path(sys.argv[1], str(next(count))), limits=Limits(pids=50))
    clauses = [clause for clause in SANDBOX_CLAUSES if clause.name in sys.argv[3].split(",")]
    for outcome in await run_clauses(clauses, make):
        print(outcome)

anyio.run(main, backend=sys.argv[4])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="this process is an ordinary user's already")
async def test_it_works_for_an_ordinary_user_too(anyio_backend_name):
    """A few clauses by a process that gave root away: other uid, no control groups, no spare uid."""
    python = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    if not Path(python).exists():
        pytest.skip(f"needs {python}, which any user may run")
    names = "output_and_exit_code_come_back,ending_a_handle_ends_all_that_it_started,agents_cannot_reach_the_tests"
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 54321, 54321)
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        argv = [python, "-I", "-c", ORDINARY, folder, paths, names, anyio_backend_name]
        done = await anyio.to_thread.run_sync(lambda: subprocess.run(argv, capture_output=True, text=True, check=False))
    if "Permission denied" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"the packages of this environment are not for every user: {done.stderr[-200:]}")
    assert (done.stderr, sorted(done.stdout.splitlines())) == (
        "",
        [f"pass  {name}" for name in sorted(names.split(","))],
    )
