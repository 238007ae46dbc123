"""A sandbox that can only exec does what a sandbox has to do, but for what one disk and one namespace cannot."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import shlex
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import anyio
import attrs
import pytest
from exec_boxes import Box

import orchestrator
from orchestrator import Rollout, RolloutConfig
from orchestrator.conformance import CLAUSE_SEC, SANDBOX_CLAUSES, ClauseError
from orchestrator.gateway.scripted import ScriptedUpstream, ShellScript
from orchestrator.gateway.upstream import Upstream
from orchestrator.sandboxes import SandboxSpec, _files, exec_call, exec_child, exec_only, make_sandbox
from orchestrator.sandboxes.exec_only import ExecOnlySandbox
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.sandboxes.local import LocalSandbox
from orchestrator.tasks import DEMO_COMMAND, demo_task
from states.errors import HandleRevoked, QuietError, SandboxError
from states.ports import ExecResult

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox]

CANNOT = {
    "home_and_tmp_are_private": "`/tmp` is one for all: there is one disk, and no namespace to be had",
    "processes_have_private_homes": "the same, for commands; HOME and TMPDIR are each handle's own",
    "what_a_dead_owner_left_is_reaped": "whoever brought it takes it down: it is found by nothing but that object",
    "agents_cannot_reach_the_tests": "commands see the whole disk; the tests are there only while no agent lives",
}
"""Clauses that do not hold, and why not."""


@pytest.fixture
def make(tmp_path):
    """Makes sandboxes over hosts of their own."""
    made = []

    def make():
        made.append(Box(LocalSandbox(name=f"box-{len(made)}", root=tmp_path / str(len(made)))))
        return ExecOnlySandbox(made[-1])

    return make


CLAUSES = [clause for clause in SANDBOX_CLAUSES if clause.name not in CANNOT]
SLOW = "a_channel_carries_a_line_of_64_mib"
"""It does, in half a minute: each 256 KiB are a call."""


@pytest.mark.parametrize(
    "clause", [pytest.param(one, marks=[pytest.mark.slow] * (one.name == SLOW)) for one in CLAUSES], ids=str
)
async def test_exec_only_sandbox_conforms(clause, make, tmp_path):
    """The clause holds, with what its host can do and nothing else; nothing is left behind."""
    with anyio.fail_after(CLAUSE_SEC):
        await clause.check(make)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("clause", [clause for clause in SANDBOX_CLAUSES if clause.name in CANNOT], ids=str)
async def test_what_it_cannot_do_is_said_of_it_rightly(clause, make):
    """Else the list of exceptions would outlive its reasons."""
    with pytest.raises(ClauseError):
        await clause.check(make)


@pytest.fixture
def box(tmp_path):
    """A host's sandbox, to be handed over as it is."""
    programs = [Path(sys.base_prefix), Path(orchestrator.__file__).parent / "agents"]  # its image has them
    binds = tuple((path, str(path)) for path in programs if not path.is_relative_to("/usr"))
    return Box(LocalSandbox(name="box", root=tmp_path / "box", network="host", binds=binds), has_environment=False)


async def test_an_acp_agent_solves_the_demo_task_in_it(box, tmp_path):
    """The object goes into the config as it is; journal, trajectory and reward are those of any sandbox."""
    result = await Rollout(RolloutConfig(task=demo_task(), agent="scripted-acp", sandbox=box, out=tmp_path)).run()
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors, result.notes)
    assert result.trajectory_source == "acp"
    assert result.tool_calls > 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("agent", ["minimal-acp", "minimal"])
async def test_model_calls_come_back_over_the_same_execs_and_are_counted(box, tmp_path, agent):
    """An agent in it calls its model by a relay that speaks through a channel of its own; one here calls directly."""
    async with ScriptedUpstream(
        ShellScript(DEMO_COMMAND), apis=["openai-chat"], api_key="key-of-the-provider"
    ) as model:
        upstream = Upstream("scripted", model.url, ["openai-chat"], api_key="key-of-the-provider")
        config = RolloutConfig(
            task=demo_task(), agent=agent, upstream=upstream, sandbox=box, out=tmp_path, usage_tracking="required"
        )
        result = await Rollout(config).run()
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors, result.notes)
    assert result.usage.total.tokens == model.usage.tokens > 0


# --- what it is made of ------------------------------------------------------------------------------------------


def test_what_can_only_exec_is_known_by_what_it_has(box):
    """It is wrapped where it is given, made or named; what has handles is a sandbox already."""
    wrapped = make_sandbox(SandboxSpec(box, "r1", cwd="/work"))
    assert isinstance(wrapped, ExecOnlySandbox)
    assert (wrapped.name, wrapped.cwd, wrapped.gateway_url, wrapped.has_environment) == ("r1", "/work", None, False)
    assert isinstance(make_sandbox(SandboxSpec(lambda _spec: box, "r1")), ExecOnlySandbox)
    assert isinstance(make_sandbox(SandboxSpec(FakeSandbox(), "r1")), FakeSandbox)


@pytest.mark.parametrize("module", [exec_child, exec_call, _files])
def test_what_runs_inside_is_for_any_python_from_3_8_on(module):
    """It parses as Python 3.8, and imports what has been in the standard library since."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= set(sys.stdlib_module_names) - {"tomllib", "graphlib", "zoneinfo"}


def test_an_older_python_says_so():
    """Rather than fail at a comma that it does not know."""
    code = f"import sys; sys.version_info = (3, 7, 9); {shlex.split(exec_only._program('hello'))[0]}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "its python3 is too old: 3.8 or newer is needed\n")


@contextlib.asynccontextmanager
async def opened(box, *names):
    """Handles of a sandbox over `box`, open."""
    sandbox = ExecOnlySandbox(box)
    await sandbox.start()
    try:
        handles = [sandbox.handle(name) for name in names]
        for handle in handles:
            await handle.open()
        yield handles
    finally:
        await sandbox.stop()
    assert not box.inner.root.exists(), "it was not taken down"


async def test_handles_have_a_home_and_a_folder_for_what_is_temporary_each(box):
    """They say where, and their commands see it; a transport writes an agent's files there."""
    async with opened(box, "one", "two") as (one, two):
        seen = [(await handle.exec('printf %s "$HOME $TMPDIR"')).stdout.split() for handle in (one, two)]
        assert [home for home, _ in seen] == [one.home, two.home]
        assert len({place for both in seen for place in both}) == 4


async def test_a_variable_is_never_on_a_command_line(box):
    """It may be a key, and command lines are everybody's to read."""
    async with opened(box, "one") as (one,):
        secret = {"KEY": "sk-nobodys-business"}
        assert (await one.exec('printf %s "$KEY"', env=secret)).stdout == "sk-nobodys-business"
        channel = await one.spawn(["sh", "-c", 'printf %s "$KEY"'], env=secret)
        assert await channel.receive() == b"sk-nobodys-business"
        assert await channel.wait() == 0
    assert not [command for command in box.commands if "sk-nobodys" in command]


@attrs.define(eq=False, slots=False)
class Forgetful(Box):
    """Every third call of a channel is lost: it is never made, or it is made and its answer never arrives."""

    lost: int = 0

    async def exec(self, command, *, timeout_sec=None):
        frail = any(f'"do": "{do}"' in command for do in ("read", "write", "wait", "close", "spawn"))
        self.lost += frail
        if frail and self.lost % 3 == 0:
            if self.lost % 2:
                await super().exec(command, timeout_sec=timeout_sec)
            raise RuntimeError("the connection was reset")
        return await super().exec(command, timeout_sec=timeout_sec)


async def test_a_channel_survives_calls_that_get_lost(box):
    """Bytes are numbered, both ways: each arrives once, in order, whether call or answer was lost."""
    forgetful = Forgetful(box.inner)
    async with opened(forgetful, "one") as (one,):
        channel = await one.spawn(["cat"])
        sent, back = b"".join(b"%d\n" % number for number in range(30_000)), bytearray()

        async def send():
            for at in range(0, len(sent), 30_000):
                await channel.send(sent[at : at + 30_000])
            await channel.close_stdin()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            while data := await channel.receive():
                back += data
        assert bytes(back) == sent
        assert await channel.wait() == 0
    assert forgetful.lost > 9


@attrs.define(eq=False, slots=False)
class Hanging(Box):
    """One whose calls hang from some moment on, whatever time they are given."""

    hangs: bool = False

    async def exec(self, command, *, timeout_sec=None):
        if self.hangs:
            await anyio.sleep_forever()
        return await super().exec(command, timeout_sec=timeout_sec)


async def test_a_host_that_hangs_does_not_hold_up_the_end_of_a_handle(box, monkeypatch):
    """Nobody may interrupt it, so it ends by itself: not proven quiet, and by our own clock."""
    monkeypatch.setattr(exec_only, "QUIET_SEC", 0.1)
    hanging = Hanging(box.inner)
    async with opened(hanging, "one") as (one,):
        hanging.hangs = True
        with anyio.fail_after(20), pytest.raises(QuietError, match=r"did not answer within 0\.1 s"):
            await one.end()
        hanging.hangs = False
        monkeypatch.undo()
        assert "killed" in (await one.end())[0]  # whoever asks again later may hear more


async def test_after_a_write_of_which_nobody_knows_what_arrived_nothing_follows(box, monkeypatch):
    """It would arrive in the middle of the other."""
    monkeypatch.setattr(exec_only, "TAKEN_SEC", 0.1)
    hanging = Hanging(box.inner)
    async with opened(hanging, "one") as (one,):
        channel = await one.spawn(["cat"])
        hanging.hangs = True
        with anyio.fail_after(20), pytest.raises(SandboxError, match="does not say what it took"):
            await channel.send(b"first\n")
        hanging.hangs = False
        with pytest.raises(SandboxError, match="cannot write: stdin is closed"):
            await channel.send(b"second\n")


async def test_what_cannot_be_started_is_an_error_and_not_the_end_of_the_handle(box):
    """A NUL in an argument, which no kernel takes: the next command runs."""
    async with opened(box, "one") as (one,):
        with pytest.raises(SandboxError, match="null byte") as caught:
            await one.exec(["printf", "a\0b"])
        assert not isinstance(caught.value, HandleRevoked)
        assert (await one.exec("echo on")).stdout == "on\n"


KEEPERS = 'for p in /proc/[0-9]*; do if [ "$(cat $p/comm)" = rollout-keeper ]; then echo ${p#/proc/}; fi; done'


async def end_the_keeper_of(handle):
    """By what runs in it, beside something that lives on."""
    with contextlib.suppress(SandboxError):
        await handle.exec(f"setsid sleep 100000 & {KEEPERS} | xargs kill -9")


async def test_who_ends_their_own_keeper_proves_nothing_and_is_not_graded(box):
    """Then nobody can tell what was theirs: the handle cannot be proven quiet, and stopping the sandbox says so."""
    sandbox = ExecOnlySandbox(box)
    await sandbox.start()
    one = sandbox.handle("one")
    await one.open()
    await end_the_keeper_of(one)
    for end in (one.end, sandbox.stop):
        with pytest.raises(QuietError, match="was ended by somebody else"):
            await end()


@attrs.define(eq=False, slots=False)
class Unstoppable(Box):
    """One that fails once it is down."""

    async def stop(self):
        await super().stop()
        raise RuntimeError("the meter is still running")


async def test_a_sandbox_is_taken_down_also_when_a_handle_of_it_cannot_be_proven_quiet(box):
    """That ends whoever lives in it; all that went wrong is said, and the other handles have ended as well."""
    sandbox = ExecOnlySandbox(Unstoppable(box.inner))
    await sandbox.start()
    one, two = sandbox.handle("one"), sandbox.handle("two")
    await one.open()
    await end_the_keeper_of(one)
    await two.open()
    with pytest.raises(QuietError, match=r"ended by somebody else.*; .*does not stop: .*the meter is still running"):
        await sandbox.stop()
    assert not box.inner.root.exists()
    assert "had no child left" in (await two.end())[1]


@attrs.define(eq=False, slots=False)
class Late(Box):
    """One for which time is up once a handle is to end."""

    deadline: anyio.CancelScope = attrs.field(factory=anyio.CancelScope)

    async def exec(self, command, *, timeout_sec=None):
        if '"do": "end"' in command:
            self.deadline.cancel()
        return await super().exec(command, timeout_sec=timeout_sec)


async def test_a_deadline_that_passes_while_a_handle_ends_does_not_leave_the_sandbox_up(box):
    """It would run on where nobody knows of it any more."""
    late = Late(box.inner)
    with late.deadline:
        async with opened(late, "one"):
            pass
    assert late.deadline.cancel_called
    assert not box.inner.root.exists()


async def test_an_agent_is_not_heard_by_the_keeper_of_another_handle(box):
    """It would start what the agent's own keeper never sees, and that would outlive the agent."""
    ask = (
        "import json, socket, sys; conn = socket.socket(socket.AF_UNIX); conn.connect(sys.argv[1]);"
        'conn.sendall(json.dumps({"do": "environment", "environment": "e", "env": {}}).encode() + b"\\n");'
        "print(conn.recv(100))"
    )
    async with opened(box, "agent", "other") as (agent, other):
        done = await agent.exec(["python3", "-c", ask, f"{other._folder}/socket"])
        assert done.stdout in ("", "b''\n"), "it was answered"
        ours = await box.exec(f"python3 -c {shlex.quote(ask)} {other._folder}/socket")
        assert ours.stdout == "b'{}\\n'\n"  # so it was not the question


async def test_a_daemon_without_an_environment_is_ended_too(box):
    """Nothing that a process does to itself takes it out of what its keeper adopts."""
    daemon = "setsid env -i sh -c 'exec 9>/app/lock; flock 9; echo held > /app/held; exec sleep 100000'"
    async with opened(box, "agent", "other") as (agent, other):
        await agent.exec(f"({daemon} </dev/null >/dev/null 2>&1 &) ; while [ ! -s held ]; do sleep 0.01; done")
        assert (await other.exec("flock -n /app/lock true")).return_code == 1
        evidence = await agent.end()
        assert (await other.exec("flock -n /app/lock true")).return_code == 0
        assert "killed" in evidence[0]


HOPPER = """
import fcntl, os
lock = open("/app/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
open("/app/hopping", "w").write("yes")
while True:
    os.fork() and os._exit(0)
    os.setsid()
"""


async def test_a_process_that_forks_and_exits_in_a_loop_is_ended_too(box):
    """In a crowd it is never where a list of processes says that it is: the kernel is asked whether a child is left."""
    async with opened(box, "agent", "other") as (agent, other):
        await other.exec("for i in $(seq 300); do sleep 100000 & done >/dev/null 2>&1")
        await agent.write_file("/app/hopper.py", HOPPER.encode())
        await agent.exec("(setsid python3 hopper.py </dev/null >/dev/null 2>&1 &); until [ -s hopping ]; do :; done")
        assert (await other.exec("flock -n /app/lock true")).return_code == 1
        evidence = await agent.end()
        assert (await other.exec("flock -n /app/lock true")).return_code == 0
        assert "had no child left" in evidence[1]


def test_a_keeper_that_does_not_say_that_it_is_quiet_is_not_taken_for_it(tmp_path, monkeypatch):
    """It is given a while, such as for a process that is not to be killed; then the handle is not proven quiet."""
    monkeypatch.setattr(exec_child, "END_SEC", 0.2)
    with subprocess.Popen(["sh", "-c", "trap '' TERM; echo; exec sleep 100000"], stdout=subprocess.PIPE) as deaf:
        assert deaf.stdout.read(1) == b"\n"
        keeper = [deaf.pid, exec_child.stat_of(deaf.pid)[2]]
        with pytest.raises(exec_child.Failed, match="has processes after") as caught:
            exec_child.end({"name": "one", "folder": str(tmp_path), "keeper": keeper})
        deaf.kill()
    assert caught.value.kind == "unquiet"


def test_a_keeper_that_ends_starts_nothing_more():
    """Else whoever asks between the proof and its death would start what nobody ends."""
    keeper = exec_child.Keeper("/nowhere", None)
    keeper.answer({"do": "environment", "environment": "e", "env": {}}, None)
    keeper.ending = True
    asked = {"id": "c", "argv": ["true"], "environment": "e", "cwd": "/", "user": None, "cap": 10, "timeout": None}
    for do in ("run", "spawn"):
        with pytest.raises(exec_child.Failed, match="is ending") as caught:
            keeper.answer({"do": do, **asked}, None)
        assert caught.value.kind == "ended"


def test_children_are_found_by_any_kernel(monkeypatch):
    """Where it lists none for a thread, among all processes."""
    with subprocess.Popen(["sleep", "100000"]) as child:
        listed = set(exec_child.children())
        monkeypatch.setattr(exec_child.os, "listdir", lambda path, real=os.listdir: real(path.replace("/task", "/no")))
        assert child.pid in listed & set(exec_child.children())
        child.kill()


async def test_a_sandbox_without_python_says_what_it_lacks():
    """At its start, before any agent."""

    class NoPython:
        async def start(self):
            return None

        async def exec(self, command, *, timeout_sec=None):
            return ExecResult("", "sh: 1: python3: not found\n", 127)

        upload = download = start

    with pytest.raises(SandboxError, match=r"it has no python3, and 3\.8 or newer is needed"):
        await make_sandbox(SandboxSpec(NoPython(), "r1")).start()


async def test_what_a_host_raises_is_the_sandboxes_failure_with_its_cause():
    """Whatever its class is."""

    class Broken:
        async def start(self):
            raise KeyError("quota")

        exec = upload = download = start

    with pytest.raises(SandboxError, match="does not start: KeyError: 'quota'") as caught:
        await make_sandbox(SandboxSpec(Broken(), "r1")).start()
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_channel_that_nobody_asks_after_is_ended(monkeypatch):
    """Its host is dead; so its agent is, in minutes."""
    monkeypatch.setattr(exec_child, "LOST_SEC", 0.2)
    with subprocess.Popen(
        ["sleep", "100000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    ) as popen:
        process = exec_child.Process(popen)
        burying = threading.Thread(target=lambda: process.died(popen.wait()))
        burying.start()
        exec_child.Channel(process).carry()
        burying.join()
        assert process.code == -9


class Kept:
    """A keeper in this process, with one channel over a process that has said something."""

    def __init__(self, popen):
        self.keeper = exec_child.Keeper("/nowhere", None)
        self.channel = self.keeper.channels["c"] = exec_child.Channel(exec_child.Process(popen))
        self.channel.out += b"said"

    def ask(self, do, **asked):
        return self.keeper.answer({"do": do, "id": "c", "wait": 0.0, "errors": 0, **asked}, None)


@pytest.mark.parametrize(
    ("do", "asked"), [("read", {"have": 0}), ("wait", {}), ("write", {"at": 0, "data": "eA=="}), ("close", {"at": 0})]
)
def test_whoever_asks_is_alive_also_when_the_answer_is_there_at_once(do, asked):
    """An agent that never stops talking is not ended for it: none of its host's calls has to wait."""
    with subprocess.Popen(["true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as popen:
        kept = Kept(popen)
        kept.channel.asked_at = 0.0
        kept.ask(do, **asked)
        assert kept.channel.asked_at > 0.0
        kept.channel.process.close()


def test_a_start_that_is_asked_for_twice_at_once_happens_once(monkeypatch):
    """The first call got lost for us, and is still under way inside."""
    begun, go_on, started = threading.Event(), threading.Event(), []

    def start(_self, asked, *, stdin):
        started.append(asked["id"])
        begun.set()
        go_on.wait(30)
        return exec_child.Process(None)

    monkeypatch.setattr(exec_child.Keeper, "start", start)
    monkeypatch.setattr(exec_child.Channel, "carry", lambda _self: None)
    keeper = exec_child.Keeper("/nowhere", None)
    calls = [threading.Thread(target=keeper.answer, args=({"do": "spawn", "id": "c"}, None)) for _ in range(2)]
    calls[0].start()
    begun.wait(30)
    calls[1].start()
    calls[1].join(0.2)  # it waits for the first; where it does not, it has started the same once more by now
    go_on.set()
    for call in calls:
        call.join()
    assert started == ["c"]


def test_an_archive_of_a_sandbox_cannot_fill_this_disk(tmp_path, monkeypatch):
    """Whoever packed it inside may have been the agent's own program: what it holds is counted here too."""
    monkeypatch.setattr(exec_child, "PACK_BYTES", 1000)
    with tarfile.open(tmp_path / "archive", "w") as archive:
        for name in ("copy/a", "copy/b"):
            info = tarfile.TarInfo(name)
            info.size = 600
            archive.addfile(info, io.BytesIO(bytes(600)))
    (tmp_path / "copy").mkdir()
    with tarfile.open(tmp_path / "archive") as archive, pytest.raises(SandboxError, match="too much to download"):
        exec_only._extracted(archive, tmp_path)
    assert not (tmp_path / "copy" / "b").exists()
