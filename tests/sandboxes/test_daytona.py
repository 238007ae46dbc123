"""The Daytona sandbox where the service fails, and what the conformance suite does not see of it."""

from __future__ import annotations

import ast
import email.utils
import importlib
import itertools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest
from requirements import missing, module

import orchestrator.sandboxes.inside
from orchestrator import Rollout, RolloutConfig
from orchestrator.owners import owner
from orchestrator.sandboxes import SandboxSpec, check_sandbox, make_sandbox, reopen, sweep
from orchestrator.sandboxes import _daytona_channel as channel_module
from orchestrator.sandboxes import _daytona_service as service_module
from orchestrator.sandboxes.inside import keeper
from states.errors import ConfigError, HandleRevoked, QuietError, SandboxError

module("daytona", "daytona")

daytona_module = importlib.import_module("orchestrator.sandboxes.daytona")
pytestmark = [pytest.mark.anyio, pytest.mark.sandbox, pytest.mark.daytona]

INSIDE = Path(orchestrator.sandboxes.inside.__file__).parent
LINE = b"0123456789abcdef" * 65_536 + b"\n"
EXECUTE = "/process/execute"


@pytest.fixture
def anyio_backend():
    """Its SDK is asyncio only."""
    return "asyncio"


@pytest.fixture
def sleeps(monkeypatch):
    """What was waited for between two tries; nothing is, here."""
    waited, connect = [], service_module.Service.connect

    async def connected(*settings):
        service = await connect(*settings)
        service.sleep = slept
        return service

    async def slept(seconds):
        waited.append(seconds)

    monkeypatch.setattr(service_module.Service, "connect", connected)
    return waited


@pytest.fixture
async def loopback(daytona_service, sleeps):
    """The service on loopback: these tests break it."""
    if daytona_service.server is None:
        pytest.skip("breaks the service")
    return daytona_service


@pytest.fixture
async def up(loopback):
    """To be awaited, `up(**spec)`: a sandbox that has started, with the handle `solver` open; stopped afterwards."""
    made = []

    async def start(**spec):
        sandbox = loopback.sandbox(f"box-{len(made)}", **spec)
        made.append(sandbox)
        await sandbox.start()
        handle = sandbox.handle("solver")
        await handle.open()
        return sandbox, handle

    yield start
    for sandbox in made:
        await sandbox.stop()
    assert await loopback.left() == []


async def output(handle, command):
    """What a command printed; it succeeded."""
    result = await handle.exec(command, timeout_sec=60)
    assert result.return_code == 0, result
    return result.stdout


async def echoed(channel, data):
    """What comes back of `data`, sent to a process that echoes."""
    back = bytearray()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send, data)
        while len(back) < len(data):
            back += await channel.receive()
    return bytes(back)


# --- what it is made from --------------------------------------------------------------------------------------


async def test_what_is_created_ends_by_itself_and_says_whose_it_is(loopback, up):
    """A time to live from the rollout's own, never stopped as idle, deleted when stopped, closed, labelled."""
    await up(ttl_sec=601.0, labels={"rollout": "r1"})
    (body,) = loopback.server.created
    assert (body["ttlMinutes"], body["autoStopInterval"], body["autoDeleteInterval"]) == (11, 0, 0)
    assert body["networkBlockAll"] is True
    assert body["labels"] == {
        "rollout": "r1",
        "made-by": "rollout-orchestrator",
        "rollout-sandbox": "box-0",
        "code-toolbox-language": "python",
    }
    await loopback.server.pass_time(minutes=10)
    assert await loopback.left() == ["box-0"]
    await loopback.server.pass_time(minutes=11)
    assert await loopback.left() == []


async def test_the_callers_labels_are_not_written_into(loopback):
    """The SDK writes into the labels that it is given: each creation gets its own."""
    labels = {"rollout": "r1"}
    sandbox = loopback.sandbox("box", labels=labels)
    await sandbox.start()
    await sandbox.stop()
    assert labels == {"rollout": "r1"}


async def test_an_image_comes_with_resources_in_whole_units(loopback, up):
    """Cores and gigabytes, rounded up; what stands for the image is a note."""
    image = {"image": "example.org/base:1", "image_map": {"example.org/base:1": "debian:12"}}
    await up(**image, cpus=1.5, memory_mb=1500, storage_mb=10_240, pids=100)
    (body,) = loopback.server.created
    assert (body["cpu"], body["memory"], body["disk"]) == (2, 2, 10)
    assert body["buildInfo"]["dockerfileContent"].startswith("FROM debian:12")
    assert loopback.notes[0] == "the image debian:12 stands for example.org/base:1 (image map)"
    assert "no limit on processes" in loopback.notes[1]


async def test_a_snapshot_is_taken_as_it_is(loopback, up):
    """By its name; limits that it cannot keep are a note; it has the task's environment."""
    sandbox, _ = await up(options={"snapshot": "prepared"}, cpus=2)
    assert loopback.server.created[0]["snapshot"] == "prepared"
    assert sandbox.has_environment
    assert "a snapshot has its own resources" in loopback.notes[0]


async def test_a_dockerfile_is_built_with_its_files_and_an_image_may_stand_for_its_base(loopback, up, tmp_path):
    """COPY brings files from beside it, RUN runs, ENV is there, and FROM is mapped."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/table.csv").write_text("1,2\n")
    lines = [
        "ARG BASE=example.org/base:1",
        "FROM ${BASE} AS built",
        "ENV WHO=me",
        "WORKDIR /app",
        "COPY data data",
        "RUN wc -l < data/table.csv > lines",
    ]
    (tmp_path / "Dockerfile").write_text("\n".join(lines))
    sandbox, handle = await up(build=tmp_path, image_map={"example.org/base:1": "debian:12"})
    assert await output(handle, "cat data/table.csv lines; echo $WHO") == "1,2\n1\nme\n"
    assert sandbox.has_environment
    assert "the image debian:12 stands for example.org/base:1 (image map)" in loopback.notes
    assert (tmp_path / "Dockerfile").read_text().startswith("ARG BASE=example.org/base:1\nFROM ${BASE}")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("FROM example.org/none:1", "failed to pull example.org/none:1"),
        (
            "FROM debian:12\nRUN echo why; exit 3",
            "the build's log ended:\npulling debian:12\nRUN echo why; exit 3\nwhy\n",
        ),
    ],
    ids=["no such base", "a command that fails"],
)
async def test_an_image_that_cannot_be_built_is_what_the_service_said(loopback, tmp_path, lines, said):
    """A SandboxError with its words, and nothing is left."""
    (tmp_path / "Dockerfile").write_text(lines)
    sandbox = loopback.sandbox(build=tmp_path)
    with pytest.raises(SandboxError, match=re.escape(said)):
        await sandbox.start()
    await sandbox.stop()
    assert await loopback.left() == []


async def test_agents_come_in_as_one_upload_at_their_own_path_and_cannot_be_changed(loopback, up, tmp_path):
    """Also below a folder that the agent may not enter; its size is a note; several handles see it."""
    place = tmp_path / "deep/er/agent"
    (place / "bin").mkdir(parents=True)
    (place / "bin/run").write_text("#!/bin/sh\necho running\n")
    (place / "bin/run").chmod(0o755)
    sandbox, handle = await up(binds=(str(place), str(place / "bin")))
    assert await output(handle, f"{place}/bin/run") == "running\n"
    assert (await handle.exec(f"echo bad > {place}/bin/run")).return_code != 0
    other = sandbox.handle("other")
    await other.open()
    assert await output(other, f"{place}/bin/run") == "running\n"
    assert loopback.notes == [f"uploading {place} to sandbox box-0: 1 MB"]


async def test_agents_that_the_image_should_have_are_looked_for(loopback, tmp_path):
    """One that is missing there is said before an agent is started."""
    sandbox = loopback.sandbox(binds=(str(tmp_path / "agent"),), options={"agents": "present"})
    with pytest.raises(SandboxError, match=r"has no folder .*agent, which an agent needs"):
        await sandbox.start()
    await sandbox.stop()


async def test_of_an_interpreter_its_own_packages_stay_here(tmp_path):
    """Agents have environments of their own; a virtual environment is taken whole."""
    for name in ("bin", "lib/python3.12/site-packages", "lib/python3.12/test", "lib/python3.12/json"):
        (tmp_path / name).mkdir(parents=True)
    unneeded = daytona_module._unneeded
    assert sorted(unneeded(tmp_path)) == ["lib/python3.12/site-packages", "lib/python3.12/test"]
    (tmp_path / "pyvenv.cfg").touch()
    assert unneeded(tmp_path) == []


# --- the service fails -----------------------------------------------------------------------------------------


async def test_a_wrong_key_is_said_as_one(loopback, monkeypatch):
    """It names the variable, not the key; nothing was asked for, so there is nothing to give back."""
    monkeypatch.setenv("DAYTONA_API_KEY", "another-key")
    sandbox = loopback.sandbox()
    with pytest.raises(SandboxError, match=r"refused the key in DAYTONA_API_KEY.*Invalid credentials") as raised:
        await sandbox.start()
    assert "another-key" not in str(raised.value)
    await sandbox.stop()


async def test_a_service_that_is_not_there_is_said_to_be_away_and_owes_nothing(loopback, sleeps, monkeypatch):
    """After a second try, before anything is asked for: so no lease of it is kept, to be reaped in vain."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DAYTONA_API_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}/api")
        config = RolloutConfig(prompt="go", agent="scripted", verifier=None, out=None, sandbox="daytona")
        result = await Rollout(config).run()
    assert (result.state, result.verdict.owner, result.leaked) == ("closed/failed", "sandbox", ())
    assert "Daytona cannot be reached, before making sandbox" in result.verdict.reason
    assert len(sleeps) == service_module.REACH_TRIES - 1


async def test_a_start_that_failed_is_gone_on_with(loopback, monkeypatch):
    """Over one connection, with one sandbox: whether it failed before, in or after the making of that."""
    connect, made = service_module.Service.connect, []

    async def connected(*settings):
        made.append(await connect(*settings))
        return made[-1]

    monkeypatch.setattr(service_module.Service, "connect", connected)
    sandbox = loopback.sandbox()
    for method, path in (("GET", "/sandbox"), ("POST", "/sandbox"), ("POST", "/files/bulk-upload")):
        loopback.server.fault(method, path, status=403, message=f"not {path} now")
        with pytest.raises(SandboxError, match=f"not {path} now"):
            await sandbox.start()
    await sandbox.start()
    assert len(loopback.server.created) == 1
    await sandbox.stop()
    assert [service.closed for service in made] == [True]
    assert loopback.server.boxes == {}


async def test_a_refusal_for_now_is_waited_out_for_as_long_as_the_service_asks(loopback, sleeps, up):
    """429 with Retry-After: so many seconds, and one sandbox."""
    loopback.server.fault("POST", "/sandbox", status=429, headers={"Retry-After": "3"}, times=2)
    await up()
    assert sleeps[:2] == [3.0, 3.0]
    assert len(loopback.server.created) == 1


async def test_a_refusal_for_good_is_not_repeated(loopback, sleeps):
    """A quota that is used up: what the service said, after one try."""
    loopback.server.fault("POST", "/sandbox", status=403, message="Total CPU limit exceeded. Maximum allowed: 4.")
    sandbox = loopback.sandbox()
    with pytest.raises(SandboxError, match=r"\(403\).*Total CPU limit exceeded"):
        await sandbox.start()
    await sandbox.stop()
    assert sleeps == []
    assert loopback.server.created == []


@pytest.mark.parametrize("drop", ["before", "after"])
async def test_a_creation_whose_answer_was_lost_makes_one_sandbox(loopback, up, drop):
    """It is found again by its label, or made."""
    loopback.server.fault("POST", "/sandbox", drop=drop)
    await up()
    assert len(loopback.server.created) == 1
    assert await loopback.left() == ["box-0"]


async def test_a_service_that_stays_away_is_given_up_and_named(loopback, sleeps):
    """Each wait is longer than the one before; then it is an error with its cause."""
    loopback.server.fault("POST", "/sandbox", status=502, message="no healthy upstream", times=99)
    sandbox = loopback.sandbox()
    with pytest.raises(SandboxError, match=r"\(502\).*no healthy upstream"):
        await sandbox.start()
    assert len(sleeps) == service_module.TRIES - 1
    assert all(later > earlier for earlier, later in itertools.pairwise(sleeps))
    await sandbox.stop()


LOST = [{"status": 502}, {"drop": "before"}, {"drop": "after"}]
"""What becomes of one call to the keeper: it was not heard, or its answer was not."""


@attrs.frozen
class Asking:
    """What an operation of the keeper is asked for with, the answer to its next call being lost."""

    service: Any
    up: Any
    tmp_path: Path
    what: Mapping[str, Any]

    def lose(self, path=EXECUTE, **which):
        self.service.server.fault("POST", path, **self.what, **which)

    async def start(self):
        self.lose()
        _, handle = await self.up()
        assert await output(handle, "pwd") == "/app\n"

    async def bind(self):
        (self.tmp_path / "file").write_text("shown")
        self.lose(skip=1)
        _, handle = await self.up(binds=(str(self.tmp_path),))
        assert await output(handle, f"cat {self.tmp_path}/file") == "shown"

    async def open(self):
        sandbox, _ = await self.up()
        self.lose()
        handle = sandbox.handle("other")
        await handle.open()
        assert await output(handle, "echo here") == "here\n"

    async def end(self):
        _, handle = await self.up()
        self.lose()
        assert await handle.end()

    async def empty(self):
        sandbox, handle = await self.up()
        await output(handle, f"{HOLDS}; {WAITS}")
        second = self.service.sandbox("second")
        self.lose()
        await second.attach(await sandbox.start())
        again = second.handle("again")
        await again.open()
        assert await output(again, "flock -n held true; echo free") == "free\n"
        await second.stop()

    async def run(self):
        _, handle = await self.up()
        for env in (None, {"NAME": "value"}):
            self.lose()
            assert (await handle.exec("echo ran$NAME >> log; cat log; rm log", env=env)).stdout.startswith("ran")
        self.lose()
        assert (await handle.exec(": " + "x" * daytona_module.LONG_COMMAND + "\necho long")).stdout == "long\n"
        assert (await handle.exec("cat log")).return_code != 0

    async def kill(self):
        _, handle = await self.up()
        process = await handle.spawn(["sleep", "1000"])
        self.lose()
        await process.kill()
        assert await process.wait() == -9

    async def attach(self):
        _, handle = await self.up()
        self.lose("/exec")
        process = await handle.spawn(["sh", "-c", "echo ran$NAME >> log; cat log; cat"], env={"NAME": "once"})
        assert await process.receive() == b"ranonce\n"
        assert await echoed(process, b"more\n") == b"more\n"

    async def read(self):
        _, handle = await self.up()
        for size in (1, keeper.INLINE + 1):
            await output(handle, f"head -c {size} /dev/zero > file")
            self.lose()
            assert await handle.read_file("file") == bytes(size)

    async def write(self):
        _, handle = await self.up()
        self.lose()
        await handle.write_file("file", b"written")
        assert await output(handle, "cat file") == "written"

    async def unpack(self):
        sandbox, handle = await self.up()
        (self.tmp_path / "file").write_text("brought in")
        self.lose()
        await sandbox.upload(self.tmp_path, "/app/folder")
        assert await output(handle, "cat folder/file") == "brought in"

    async def pack(self):
        sandbox, handle = await self.up()
        await output(handle, "echo to be had > file")
        self.lose()
        await sandbox.download("/app/file", self.tmp_path / "file")
        assert (self.tmp_path / "file").read_text() == "to be had\n"


@pytest.mark.parametrize("what", LOST, ids=str)
@pytest.mark.parametrize("operation", sorted(keeper.OPERATIONS))
async def test_what_is_asked_of_the_keeper_is_done_although_the_answer_is_lost(loopback, up, tmp_path, operation, what):
    """Each of its operations: it is asked for again, with what was uploaded for it, and a command runs once."""
    await getattr(Asking(loopback, up, tmp_path, what), operation)()
    assert not any(fault.times for fault in loopback.server.faults)


async def test_what_was_uploaded_for_a_call_is_gone_with_the_next_one(loopback, up, tmp_path):
    """Environments are nobody's to find, disks are small. What a call that is given up may still need goes too."""
    sandbox, handle = await up()
    (box,) = loopback.server.boxes.values()
    (tmp_path / "file").write_bytes(LINE)

    async def there():
        await output(handle, "true")
        return (await loopback.server._run(box, f"ls {keeper.IN} {keeper.OUT}", "/"))[1].split()

    nothing = await there()
    await handle.exec("true", env={"API_KEY": "secret"})
    await handle.exec(": " + "x" * daytona_module.LONG_COMMAND)
    await (await handle.spawn(["true"], env={"API_KEY": "secret"})).wait()
    await handle.write_file("file", b"data")
    await sandbox.upload(tmp_path / "file", "/app/file")
    await sandbox.download("/app/file", tmp_path / "back")
    await handle.read_file("/app/file")
    loopback.server.fault("POST", EXECUTE, status=502, times=service_module.TRIES)
    with pytest.raises(SandboxError):
        await handle.exec("true", env={"API_KEY": "secret"})
    assert await there() == nothing


@pytest.mark.parametrize("drop", ["before", "after"])
async def test_files_arrive_although_an_answer_is_lost(loopback, up, tmp_path, drop):
    """Up and down: uploads replace, so they are repeated."""
    sandbox, handle = await up()
    loopback.server.fault("POST", "/files/bulk-upload", drop=drop)
    loopback.server.fault("POST", "/files/bulk-download", drop="before")
    (tmp_path / "file").write_bytes(LINE)
    await sandbox.upload(tmp_path / "file", "/app/file")
    await sandbox.download("/app/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == LINE
    assert await output(handle, "wc -c < file") == f"{len(LINE)}\n"


@pytest.mark.parametrize("code", [1008, 1009, 1011])
@pytest.mark.parametrize("channel", ["session", "pty"])
async def test_a_websocket_that_is_closed_loses_no_byte_and_doubles_none(loopback, up, channel, code):
    """In the middle of a megabyte: a session's log is read again from where we were, a terminal is replaced."""
    _, handle = await up(channel=channel)
    path = "/logs" if channel == "session" else "/create-connect"
    fault = loopback.server.fault("GET", path, close=code, after_bytes=200_000)
    process = await handle.spawn(["cat"])
    assert await echoed(process, LINE) == LINE
    assert fault.times == 0
    await process.close_stdin()
    assert await process.wait() == 0


@pytest.mark.parametrize("what", [{"status": 502}, {"drop": "before"}, {"drop": "after"}], ids=str)
async def test_input_whose_answer_was_lost_arrives_once(loopback, up, what):
    """Every byte is numbered: what came twice is dropped, so it may be sent again."""
    _, handle = await up()
    process = await handle.spawn(["cat"])
    loopback.server.fault("POST", "/input", **what)
    assert await echoed(process, b"one line\n") == b"one line\n"
    assert await echoed(process, b"another\n") == b"another\n"
    await process.close_stdin()
    assert (await process.receive(), await process.wait()) == (b"", 0)


@pytest.mark.parametrize("channel", ["session", "pty"])
async def test_a_line_whose_session_is_killed_is_replaced(loopback, up, channel):
    """Somebody else deletes the session or the terminal: the process lives, and goes on talking."""
    sandbox, handle = await up(channel=channel)
    process = await handle.spawn(["cat"])
    assert await echoed(process, b"before\n") == b"before\n"
    (box,) = loopback.server.boxes.values()
    for session in list(box.sessions.values()):
        for command in session.commands.values():
            await command.process.kill()
    for terminal in list(box.terminals.values()):
        await terminal.kill()
    assert await echoed(process, b"after\n") == b"after\n"
    assert sandbox.channel == channel


@pytest.mark.parametrize("channel", ["session", "pty"])
async def test_a_sandbox_that_vanishes_is_said_to_be_gone(loopback, channel):
    """By a command, by a channel and by a file; what it ended is proven by that, and stopping it is nothing."""
    sandbox = loopback.sandbox(channel=channel)
    found = await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    process = await handle.spawn(["cat"])
    await loopback.server.vanish(found["id"])
    with pytest.raises(SandboxError, match="sandbox box is gone"):
        await handle.exec("true")
    with pytest.raises(SandboxError, match="sandbox box is gone"):
        await process.receive()
    with pytest.raises(SandboxError, match="sandbox box is gone"):
        await handle.read_file("/app/x")
    assert await handle.end() == ("handle solver: its sandbox is gone, with everything in it",)
    await sandbox.stop()


async def test_whoever_asked_for_it_is_told_that_the_sandbox_is_gone(loopback, up):
    """By whatever finds out, here by a channel, which only listens."""
    told = []
    _, handle = await up(lost=told.append)
    process = await handle.spawn(["cat"])
    (box_id,) = loopback.server.boxes
    await loopback.server.vanish(box_id)
    with pytest.raises(SandboxError, match="sandbox box-0 is gone"):
        await process.receive()
    assert told
    assert told[0].startswith("sandbox box-0 is gone")


async def test_an_end_that_the_service_does_not_answer_is_not_proven_and_not_waited_for(loopback, up, monkeypatch):
    """Nobody is held up beyond what a proof may take; asked again once it answers, there is one."""
    _, handle = await up()
    monkeypatch.setattr(daytona_module, "PROOF_SEC", 1.0)
    answers = anyio.Event()
    loopback.server.fault("POST", EXECUTE, wait=answers, times=9)
    with pytest.raises(QuietError, match="Daytona gave no answer for 1 s"):
        await handle.end()
    loopback.server.faults.clear()
    answers.set()
    monkeypatch.setattr(daytona_module, "PROOF_SEC", 60.0)
    assert (await handle.end())[0].startswith("handle solver has no PID 1 (any more)")  # the call itself was done


async def test_what_is_no_frame_breaks_its_line_and_not_its_channel(loopback, up, monkeypatch):
    """An agent may have the service write into a session's log: the line is replaced. Where all break, that is said."""
    _, handle = await up()
    process = await handle.spawn(["cat"])
    (box,) = loopback.server.boxes.values()
    for session in box.sessions.values():
        for command in session.commands.values():
            command.add(b"\1\1\1o nonsense !\n")
    with anyio.fail_after(60):
        assert await echoed(process, b"still here\n") == b"still here\n"

    def never(*_):
        raise ZeroDivisionError("no such frame")

    monkeypatch.setattr(channel_module.Channel, "_frame", never)
    await process.send(b"more\n")
    with anyio.fail_after(60), pytest.raises(SandboxError, match="lines break one after another: no such frame"):
        await process.receive()


@pytest.fixture
def small(loopback):
    """The service, with a disk in memory of 64 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(loopback.server.folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        missing("daytona", "a disk in memory cannot be mounted: that takes root")
    yield loopback
    subprocess.run(["umount", "-l", str(loopback.server.folder)], check=True)


async def test_a_handle_that_cannot_be_found_again_does_not_come_up(small, up):
    """On a full disk nobody could note its PID 1, and so nobody end it. With room again it comes up, and ends."""
    sandbox, handle = await up()
    assert small.server.folder.is_mount()
    await handle.exec("cat /dev/zero > /app/all")
    late = sandbox.handle("late")
    with pytest.raises(SandboxError, match="No space left on device"):
        await late.open()
    assert (await handle.exec("rm /app/all")).return_code == 0
    assert await late.end() == ("handle late has no PID 1 (any more): nothing of it is left",)
    again = sandbox.handle("late")
    await again.open()
    assert await output(again, "echo here") == "here\n"
    assert "was killed and is gone" in (await again.end())[0]


@pytest.mark.parametrize("channel", ["session", "pty"])
async def test_a_line_that_breaks_before_a_process_was_started_starts_it_all_the_same(loopback, up, channel):
    """What is asked for is asked for until it was heard."""
    _, handle = await up(channel=channel)
    path = "/logs" if channel == "session" else "/create-connect"
    fault = loopback.server.fault("GET", path, close=1011, after_bytes=1)
    process = await handle.spawn(["cat"])
    assert fault.times == 0
    assert await echoed(process, b"hello\n") == b"hello\n"


async def test_a_creation_that_is_cancelled_leaves_nothing(loopback):
    """While the service still works on it: it is deleted as soon as the service knows of it."""
    release = anyio.Event()
    fault = loopback.server.fault("POST", "/sandbox", wait=release)
    sandbox = loopback.sandbox()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sandbox.start)
        while fault.times:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    await sandbox.stop()
    release.set()
    assert await loopback.left() == []


async def test_a_sandbox_without_a_python_is_said_to_have_none(loopback):
    """What its shell said is quoted."""
    sandbox = loopback.sandbox(options={"python": "no-such-python"})
    with pytest.raises(SandboxError, match=r"its Python did not do its work.*no-such-python"):
        await sandbox.start()
    await sandbox.stop()


# --- what calls say and cost -----------------------------------------------------------------------------------


async def test_an_environment_is_on_no_command_line(loopback, up):
    """Neither of a command nor of a process: it goes in a file that is nobody else's."""
    _, handle = await up()
    secret = {"API_KEY": "not-to-be-seen"}
    assert (await handle.exec("echo $API_KEY", env=secret)).stdout == "not-to-be-seen\n"
    process = await handle.spawn(["sh", "-c", "echo $API_KEY"], env=secret)
    assert await process.receive() == b"not-to-be-seen\n"
    assert not [command for command in loopback.server.commands if "not-to-be-seen" in command]
    assert len(loopback.server.commands) > 3


async def test_calls_do_not_grow_with_files(loopback, up, tmp_path):
    """Three hundred files cost what three do."""
    sandbox, _ = await up()

    async def cost(count):
        source = tmp_path / str(count)
        source.mkdir()
        for number in range(count):
            (source / f"file-{number}").write_text(str(number))
        before = len(loopback.server.calls)
        await sandbox.upload(source, f"/app/{count}")
        await sandbox.download(f"/app/{count}", tmp_path / f"back-{count}")
        assert len(list((tmp_path / f"back-{count}").iterdir())) == count
        return len(loopback.server.calls) - before

    assert await cost(3) == await cost(300)


async def test_a_long_command_is_waited_for_in_pieces(loopback, up, monkeypatch):
    """No request of ours outlasts a proxy's patience: the same command is asked after again."""
    monkeypatch.setattr(daytona_module, "WAIT_SEC", 0.2)
    _, handle = await up()
    before = len(loopback.server.calls)
    assert (
        await output(handle, "while [ ! -e go ]; do n=$((n+1)); [ $n -lt 60 ] || touch go; sleep 0.02; done; echo done")
        == "done\n"
    )
    assert len(loopback.server.calls) - before > 2


# --- who is where ----------------------------------------------------------------------------------------------


async def test_an_agent_has_no_privilege_and_no_way_to_one(up):
    """It is nobody of the image's, its namespace's PID 1 is out of its reach, and so is what we keep there."""
    _, handle = await up()
    assert await output(handle, "id -un; id -u") == "agent\n52001\n"
    assert await output(handle, "grep -cE '^Cap(Prm|Eff):[[:space:]]*0+$' /proc/self/status") == "2\n"
    assert await output(handle, "grep NoNewPrivs /proc/self/status | tr -dc 0-9") == "1"
    for command in (
        "kill -9 1",
        "ls /proc/1/root/",
        "touch /run/rollout/x",
        "mkdir /tests/x",
        "touch /usr/x",
        "mount -t tmpfs x /app",
    ):
        assert (await handle.exec(command)).return_code != 0, command
    shown = await output(handle, "ls -A /run/rollout /tests /solution /logs/verifier | grep -v :")
    assert shown.strip() == ""


async def test_an_agent_that_is_root_is_a_containers_root(up):
    """By the option: it may install things, and may neither mount nor see the tests."""
    sandbox, handle = await up(options={"user": "root"})
    assert await output(handle, "id -u; chown 7 /etc/hosts && echo may") == "0\nmay\n"
    ours = sandbox.handle("verifier", trusted=True)
    await ours.open()
    await ours.write_file("/tests/secret", b"secret")
    for command in ("mount -t tmpfs x /app", "umount /tests", "cat /tests/secret", "kill -9 1", "nsenter -t 1 -a true"):
        await handle.exec(command)
        assert (await handle.exec("cat /tests/secret")).return_code != 0, command
    assert await output(ours, "cat /tests/secret") == "secret"


@pytest.mark.parametrize("hidden", ["setsid", "unshare --pid --fork", "unshare --pid --fork --mount-proc"])
async def test_what_an_agent_started_outside_of_its_handle_is_ended_and_the_tasks_services_are_not(
    loopback, up, hidden
):
    """It may have asked the service's own daemon, which does anything for anybody in the sandbox's network."""
    loopback.server.services.append("exec 9>/app/service; flock 9; while :; do sleep 1000; done")
    sandbox, handle = await up(network="bridge")
    other = sandbox.handle("other")
    await other.open()
    process = await other.spawn(["cat"])
    (box,) = loopback.server.boxes.values()
    await loopback.server._run(
        box, f"({hidden} sh -c 'exec 9>/app/stranger; flock 9; exec sleep 1000' >/dev/null 2>&1 &)", "/"
    )
    await output(handle, "while flock -n stranger true; do sleep 0.01; done")
    assert (await handle.exec("flock -n service true")).return_code != 0
    evidence = await handle.end()
    assert any("outside of its handle" in sentence for sentence in evidence), evidence
    code, _ = await loopback.server._run(box, "flock -n /app/stranger true", "/")
    assert code == 0
    code, _ = await loopback.server._run(box, "flock -n /app/service true", "/")
    assert code != 0
    assert await echoed(process, b"still here\n") == b"still here\n"


async def started_outside(loopback, handle, code):
    """Have the service's daemon start a program in Python, as an agent may; it holds `/app/stranger` while it lives."""
    (box,) = loopback.server.boxes.values()
    await output(handle, f"cat > stranger.py <<'END'\n{code}\nEND")
    started = "(setsid sh -c 'exec 9>stranger; flock 9; exec python3 stranger.py' >/dev/null 2>&1 &)"
    assert (await loopback.server._run(box, started, "/app"))[0] == 0
    await output(handle, "while [ ! -e begun ]; do sleep 0.01; done")
    return box


HOPS = """
import os, time
open("begun", "w").close()
while True:
    if os.fork():
        os._exit(0)
"""
"""Always another process, which the one before has just started."""

HOPS_WHEN_TOLD = """
import os
told, done = os.open("told", os.O_RDWR), os.open("done", os.O_RDWR)
open("begun", "w").close()
while os.read(told, 1):
    mine = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == mine:
        pass
    os.write(done, b".")
"""

BETWEEN = """
def hopping():
    found = list(listed())
    os.write(told, b".")
    assert select.select([done], [], [], 10)[0]
    os.read(done, 1)
    return iter(found)

import os, select
from orchestrator.sandboxes.inside import keeper, system
listed, system.pids, keeper.END_SEC = system.pids, hopping, 0.2
told, done = os.open("/app/told", os.O_RDWR), os.open("/app/done", os.O_RDWR)
"""
"""Between the listing of the processes and the reading of each, it hops."""


async def test_what_is_another_process_whenever_it_is_looked_at_is_not_said_to_be_gone(loopback, up, monkeypatch):
    """Each listing shows one that is dead when it is read, and not its child; once it is slower it is ended."""
    _, handle = await up(network="bridge")
    await output(handle, "mkfifo told done")
    box = await started_outside(loopback, handle, HOPS_WHEN_TOLD)
    launch, begins = service_module.Box.launch, "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    with monkeypatch.context() as patched:
        patched.setattr(
            service_module.Box, "launch", lambda *asked: launch(*asked).replace(begins, f"{begins}\n{BETWEEN}\n", 1)
        )
        with pytest.raises(QuietError, match=r"processes are started there all the time"):
            await handle.end()
    assert (await loopback.server._run(box, "flock -n stranger true", "/app"))[0] != 0
    evidence = await handle.end()
    assert "outside of its handle" in evidence[-1]
    assert (await loopback.server._run(box, "flock -n stranger true", "/app"))[0] == 0


async def test_what_starts_itself_anew_all_the_time_is_ended(loopback, up):
    """Its group is killed, in which none but its like are: no process of that can be started meanwhile."""
    _, handle = await up(network="bridge")
    box = await started_outside(loopback, handle, HOPS)
    evidence = await handle.end()
    assert "outside of its handle: python3[" in evidence[-1]
    assert (await loopback.server._run(box, "flock -n stranger true", "/app"))[0] == 0


async def test_a_process_whose_first_thread_has_ended_is_there(loopback, up):
    """It is shown as a zombie while its other threads work on."""
    _, handle = await up(network="bridge")
    ends = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
    code = "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
    code += f"open('begun', 'w').close()\nctypes.CDLL(None).syscall({ends}, 0)"
    box = await started_outside(loopback, handle, code)
    await loopback.server._run(box, "while ! grep -q 'State:.Z' /proc/[0-9]*/status; do sleep 0.01; done", "/")
    evidence = await handle.end()
    assert "outside of its handle: python3[" in evidence[-1]
    assert (await loopback.server._run(box, "flock -n stranger true", "/app"))[0] == 0


SERVE = "import http.server as h; h.HTTPServer(('127.0.0.1', 8123), h.BaseHTTPRequestHandler).serve_forever()"
ASK = "import socket; socket.create_connection(('127.0.0.1', 8123), 5)"


@pytest.mark.parametrize(("network", "reached"), [("gateway-only", False), ("none", False), ("bridge", True)])
async def test_the_sandboxes_own_network_is_reached_only_where_that_was_asked_for(loopback, up, network, reached):
    """Where the service's daemon listens. Handles share a loopback either way: the relay's port is there."""
    loopback.server.services.append(f'python3 -c "{SERVE}"')
    sandbox, handle = await up(network=network)
    assert loopback.server.created[0]["networkBlockAll"] is not reached
    command = f'for n in 1 2 3 4 5 6 7 8 9; do python3 -c "{ASK}" && exit; sleep 0.2; done; exit 1'
    assert ((await handle.exec(command if reached else f'python3 -c "{ASK}"')).return_code == 0) is reached
    if not reached:
        ours = sandbox.handle("relay", trusted=True)
        await ours.open()
        await ours.spawn(["python3", "-c", SERVE])
        assert (await handle.exec(command)).return_code == 0


async def test_a_process_of_a_trusted_handle_outlives_the_agents(up):
    """A relay, say: agents come and go."""
    sandbox, handle = await up()
    ours = sandbox.handle("relay", trusted=True)
    await ours.open()
    process = await ours.spawn(["cat"])
    await handle.end()
    assert await echoed(process, b"still here\n") == b"still here\n"
    with pytest.raises(HandleRevoked):
        await handle.exec("true")


# --- giving back -----------------------------------------------------------------------------------------------


def dead():
    """The number of a process that is dead."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return str(process.pid)


async def test_a_sweep_deletes_what_dead_orchestrators_of_this_host_left_and_nothing_else(loopback):
    """A living owner's, a namesake's, another host's and anybody else's are left alone, unless a host is named."""
    ours = {f"owner-{name}": str(value) for name, value in owner().items()}
    theirs = {**ours, "owner-host": "elsewhere", "owner-pid": "1"}
    mine = {
        "dead": {**ours, "owner-pid": dead()},
        "reborn": {**ours, "owner-started": "1"},
        "alive": ours,
        "elsewhere": theirs,
        "namesake": {**ours, "owner-started": "1", "owner-boot": "another"},
    }
    made = {name: loopback.sandbox(name, labels=labels) for name, labels in mine.items()}
    for sandbox in made.values():
        await sandbox.start()
    (stranger,) = [box for box in loopback.server.boxes.values() if box.dto["name"] == "alive"]
    loopback.server.page = 1  # so that a cursor is followed
    said = await sweep("daytona", {})
    here, numbers = socket.gethostname(), {name: mine[name]["owner-pid"] for name in ("dead", "reborn")}
    assert sorted(said) == sorted(
        f"sandbox {name} was deleted: process {number} of {here}, which made it, is dead"
        for name, number in numbers.items()
    )
    assert sorted(await loopback.left()) == ["alive", "elsewhere", "namesake"]
    assert await sweep("daytona", {}) == ()
    await sweep("daytona", {"owner": "elsewhere"})
    assert sorted(await loopback.left()) == ["alive", "namesake"]
    await sweep("daytona", {"owner": here})
    assert await loopback.left() == ["alive"]
    stranger.dto["labels"] = {}
    assert await sweep("daytona", {"owner": "elsewhere"}) == ()
    for sandbox in made.values():
        await sandbox.stop()
    assert loopback.server.boxes == {}


async def test_a_sandbox_that_cannot_be_deleted_keeps_no_other_one_from_it(loopback):
    """All are seen to, then what could not be had is said, beside what could."""
    ours = {f"owner-{name}": str(value) for name, value in owner().items()}
    made = [loopback.sandbox(name, labels={**ours, "owner-started": "1"}) for name in ("one", "two", "three")]
    for sandbox in made:
        await sandbox.start()
    fault = loopback.server.fault("DELETE", "/sandbox/[^/]+", status=403, message="one is locked")
    with pytest.raises(SandboxError, match=r"two was deleted.*\n.*three was deleted.*\n.*one is locked"):
        await sweep("daytona", {})
    assert await loopback.left() == ["one"]
    assert fault.times == 0
    assert len(await sweep("daytona", {})) == 1
    for sandbox in made:
        await sandbox.stop()


# --- taken over, and kept --------------------------------------------------------------------------------------

HOLDS = "(setsid sh -c 'exec 9>/app/held; flock 9; echo held > /app/held.now; exec sleep 1000' >/dev/null 2>&1 &)"
WAITS = "while [ ! -s /app/held.now ]; do sleep 0.01; done"


async def went_away(loopback, name="first", **spec):
    """What a sandbox was found by that its orchestrator left at work, and the orchestrator's own, which nobody uses."""
    first = loopback.sandbox(name, **spec)
    found = await first.start()
    handle = first.handle("solver-1")
    await handle.open()
    await output(handle, f"echo work > work; echo mine > ~/mine; echo scratch > /tmp/scratch; {HOLDS}; {WAITS}")
    await handle.spawn(["cat"])
    return first, found


@pytest.mark.parametrize("channel", ["session", "pty"])
async def test_a_sandbox_of_a_dead_orchestrator_is_taken_over_with_its_files_and_nothing_alive(loopback, channel):
    """What was started is named and gone, also in a trusted handle; the files of each handle are there."""
    first, found = await went_away(loopback, channel=channel)
    ours = first.handle("relay", trusted=True)
    await ours.open()
    await ours.spawn(["sleep", "1000"])
    second = loopback.sandbox("second", channel=channel)
    evidence = await second.attach(found)
    assert re.match(r"ended what had been started in the sandbox: .*sleep\[\d+\]", evidence[0])
    assert re.fullmatch(r"none of \d+ processes there is anybody's but the image's, .*", evidence[1])
    again = second.handle("solver-1")
    await again.open()
    assert await output(again, "flock -n held true; cat work ~/mine /tmp/scratch") == "work\nmine\nscratch\n"
    process = await again.spawn(["cat"])
    assert await echoed(process, b"hello\n") == b"hello\n"
    with pytest.raises(SandboxError, match="started already"):
        await second.attach(found)
    await second.stop()
    assert await loopback.left() == []
    await first.stop()


async def test_calls_of_a_dead_orchestrator_that_come_late_do_nothing(loopback):
    """One that was at work is ended with the rest, and what is still on its way finds no program to run."""
    first, found = await went_away(loopback)
    box = first._box
    second = loopback.sandbox("second")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(refused, first.handle("solver-1").exec("sleep 1000"))
        while not any('"run"' in command and "sleep 1000" in command for command in loopback.server.commands):
            await anyio.lowlevel.checkpoint()
        await second.attach(found)
    with pytest.raises(SandboxError, match=r"(?s)its Python did not do its work.*No module named"):
        await box.ask("opening a handle", {"do": "open", "handle": "agent-late", "trusted": False, "token": "late"})
    await second.stop()
    await first.stop()


async def refused(call):
    """It ends with an error of the sandbox's."""
    with pytest.raises(SandboxError):
        await call


async def test_the_tasks_services_and_the_network_outlive_a_change_of_orchestrators(loopback):
    """What the image had started is nobody's handle; what an agent had the service's daemon start is gone."""
    loopback.server.services.append("exec 9>/app/service; flock 9; while :; do sleep 1000; done")
    first, found = await went_away(loopback, network="bridge")
    (box,) = loopback.server.boxes.values()
    stranger = "(setsid sh -c 'exec 9>/app/stranger; flock 9; exec sleep 1000' >/dev/null 2>&1 &)"
    await loopback.server._run(box, f"{stranger}; while flock -n /app/stranger true; do sleep 0.01; done", "/")
    second = loopback.sandbox("second", network="bridge")
    await second.attach(found)
    again = second.handle("solver-2")
    await again.open()
    assert (await again.exec("flock -n service true")).return_code != 0
    assert (await again.exec("flock -n stranger true && flock -n held true")).return_code == 0
    for sandbox in (second, first):
        await sandbox.stop()


async def test_a_sandbox_that_is_taken_over_lives_as_long_as_a_new_one_from_then_on(loopback):
    """And what its agents need is brought in where it is not there, and only there."""
    first, found = await went_away(loopback, ttl_sec=600.0)
    (box,) = loopback.server.boxes.values()
    second = loopback.sandbox("second", ttl_sec=7200.0, binds=(str(INSIDE),))
    await second.attach(found)
    assert box.dto["ttlMinutes"] == 120
    third = loopback.sandbox("third", ttl_sec=None, binds=(str(INSIDE),))
    loopback.notes.clear()
    await third.attach(found)
    assert box.dto["ttlMinutes"] == 120
    assert loopback.notes == []
    handle = third.handle("solver-1")
    await handle.open()
    assert (await handle.read_file(str(INSIDE / "keeper.py"))) == (INSIDE / "keeper.py").read_bytes()
    for sandbox in (third, second, first):
        await sandbox.stop()


@pytest.mark.parametrize("how", ["vanished", "stopped"])
async def test_a_sandbox_that_is_gone_cannot_be_taken_over(loopback, how):
    """It says so, and holds nothing of what it asked."""
    first, found = await went_away(loopback)
    if how == "vanished":
        await loopback.server.vanish(found["id"])
    else:
        loopback.server.boxes[found["id"]].dto["state"] = "stopped"
    second = loopback.sandbox("second")
    with pytest.raises(SandboxError, match="sandbox first is gone"):
        await second.attach(found)
    for sandbox in (second, first):
        await sandbox.stop()


async def test_what_outlives_its_end_is_not_taken_over(loopback, monkeypatch):
    """Without the proof nobody goes on there; the sandbox is as it was, for whoever gives it back."""
    first, found = await went_away(loopback)
    launch = service_module.Box.launch
    slow = "from orchestrator.sandboxes.inside import keeper; keeper.END_SEC = -1.0; keeper.os.kill = print; import"

    def launched(box, request):
        return launch(box, request).replace("import sys; sys.path.insert(0, sys.argv.pop(1)); from", prepare, 1)

    prepare = f"import sys; sys.path.insert(0, sys.argv.pop(1)); {slow} sys; from"
    monkeypatch.setattr(service_module.Box, "launch", launched)
    second = loopback.sandbox("second")
    with pytest.raises(QuietError, match="are still there after SIGKILL"):
        await second.attach(found)
    monkeypatch.undo()
    await first.stop()


async def test_what_is_kept_stays_until_it_is_given_back_by_name(loopback):
    """Nothing runs in it, no sweep takes it, its time to live is as it was; reopened, it is kept again."""
    first, found = await went_away(loopback, ttl_sec=600.0, labels={"owner-host": socket.gethostname()})
    handle = first.handle("solver-1")
    await first.leave()
    await first.leave()
    assert (await handle.end())[0].startswith("ended what had been started")
    with pytest.raises(SandboxError, match="was stopped"):
        await first.upload(INSIDE, "/app/late")
    (box,) = loopback.server.boxes.values()
    assert (await loopback.server._run(box, "flock -n /app/held true", "/"))[0] == 0
    for _ in range(2):
        assert await sweep("daytona", {"owner": socket.gethostname()}) == ()
        sandbox = await reopen(found)
        look = sandbox.handle("look", trusted=True)
        await look.open()
        assert await output(look, "cat work; pwd") == "work\n/app\n"
        await sandbox.leave()
    assert box.dto["ttlMinutes"] == 10
    await first.stop()
    assert await loopback.left() == ["first"]
    await daytona_module.reap(found)
    assert await loopback.left() == []
    with pytest.raises(SandboxError, match="sandbox first is gone"):
        await reopen(found)


async def test_a_sandbox_that_is_detached_stays_and_is_given_back_by_whoever_has_it(loopback):
    """Its connections are closed, with whatever went over them; what it runs is there for who attaches to it."""
    sandbox = loopback.sandbox()
    await sandbox.detach()
    await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    process = await handle.spawn(["cat"])
    service = sandbox._service
    for _ in range(2):
        await sandbox.detach()
    assert service.closed
    assert await process.wait() == -9
    with pytest.raises(SandboxError, match="was detached"):
        await sandbox.start()
    assert await loopback.left() == ["box"]
    for _ in range(2):
        await sandbox.stop()
    assert await loopback.left() == []


async def test_a_sandbox_that_cannot_be_given_back_says_so_and_lets_its_channels_go(loopback):
    """Its time to live is what remains; who waits for a process is not left waiting."""
    sandbox = loopback.sandbox()
    await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    process = await handle.spawn(["cat"])
    fault = loopback.server.fault("DELETE", "/sandbox/[^/]+", status=503, message="not now", times=99)
    with pytest.raises(SandboxError, match="not now"):
        await sandbox.stop()
    assert await process.wait() == -9
    with pytest.raises(QuietError, match="cannot be proven"):
        await handle.end()
    fault.times = 0
    await daytona_module.reap({"kind": "daytona", "name": sandbox.name})
    assert await loopback.left() == []


# --- before anything exists ------------------------------------------------------------------------------------


def test_options_that_cannot_be_are_mistakes(monkeypatch):
    """Named, with what there is."""
    monkeypatch.setenv("DAYTONA_API_KEY", "key")
    with pytest.raises(ConfigError, match="no option 'color'"):
        check_sandbox("daytona", {"color": "red"})
    for options, said in (({"channel": "ssh"}, "channel is session or pty"), ({"user": "me"}, "agent or root")):
        with pytest.raises(ConfigError, match=said):
            make_sandbox(SandboxSpec("daytona", "r1", options=options))
    with pytest.raises(ConfigError, match="clean absolute path"):
        make_sandbox(SandboxSpec("daytona", "r1", cwd="/"))
    monkeypatch.delenv("DAYTONA_API_KEY")
    with pytest.raises(ConfigError, match="set DAYTONA_API_KEY"):
        make_sandbox(SandboxSpec("daytona", "r1"))


def test_trio_is_told_that_the_sdk_knows_asyncio_only(monkeypatch):
    """A mistake of the config, not a crash in the SDK."""
    monkeypatch.setenv("DAYTONA_API_KEY", "key")
    with pytest.raises(ConfigError, match="needs asyncio"):
        anyio.run(make_sandbox(SandboxSpec("daytona", "r1")).start, backend="trio")


def test_naming_the_kind_imports_no_sdk():
    """It costs seconds: only `start` pays them."""
    code = "import sys; from orchestrator.sandboxes import check_sandbox as check; check('daytona', {})"
    code += "; print('daytona' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("path", sorted(INSIDE.glob("*.py")), ids=lambda path: path.name)
def test_what_runs_inside_is_python_3_8_and_needs_nothing_else(path):
    """Its grammar, and what it imports."""
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign <= {"orchestrator.sandboxes.inside"}


def test_a_time_that_the_service_asks_for_is_bounded():
    """Seconds or a date: a day is not slept through; without one, with rubbish or the past we wait on our own terms."""
    error = service_module.sdk().DaytonaError
    assert service_module.delay_after(error("x", 429, {"retry-after": "7"}), 0) == 7.0
    assert service_module.delay_after(error("x", 429, {"Retry-After": "86400"}), 0) == service_module.MOST_DELAY_SEC
    for rubbish in ("soon", "nan", "-1", "Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 99 Nov 2094 08:49:37 GMT"):
        assert 0 < service_module.delay_after(error("x", 429, {"Retry-After": rubbish}), 0) < 1
    for seconds in (20, 86_400):
        at = email.utils.formatdate(time.time() + seconds, usegmt=True)
        most = min(seconds, service_module.MOST_DELAY_SEC)
        assert most - 5 <= service_module.delay_after(error("x", 429, {"Retry-After": at}), 0) <= most
