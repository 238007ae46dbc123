"""kill -9 of an orchestrator whose sandbox is at a Daytona service: it goes on, or is given back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import anyio
import attrs
import pytest
from test_resume import STATES, config_of, dies_in, events, names, went_on

from orchestrator.journal import JournalSink
from orchestrator.recovery import reap, take
from orchestrator.sandboxes import sweep
from states import events as ev

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox, pytest.mark.daytona]

ROOT = Path(__file__).parents[1]
THERE = {"sandbox": "daytona", "sandbox_options": {"snapshot": "prepared"}, "turn_sec": 2.0}
KILLED_IN = ("session/acp", *(state.replace("session", "session/factory") for state in STATES))


@pytest.fixture
def anyio_backend():
    """Its SDK is asyncio only."""
    return "asyncio"


@pytest.fixture
async def server(daytona_service):
    """The service on loopback."""
    if daytona_service.server is None:
        pytest.skip("kills what it started")
    return daytona_service.server


def child(state, out, name):
    """The command of an orchestrator that dies as it enters `state`, a leaf of the machine."""
    transport = "acp" if state == "session/acp" else "session-factory"
    return dies_in("session" if state.startswith("session/") else state, transport, out, name, **THERE)


@pytest.mark.parametrize("state", KILLED_IN)
async def test_a_killed_orchestrator_leaves_a_sandbox_that_is_given_back(server, daytona_service, tmp_path, state):
    """In each state, by its journal; afterwards there is nothing to do."""
    name = f"killed-{uuid.uuid4().hex[:8]}"
    done = await anyio.run_process(child(state, tmp_path, name), check=False)
    assert done.returncode == -9, done.stderr.decode()
    assert await daytona_service.left() == [f"rollout-{name}"]
    result = await reap(tmp_path / name)
    assert result.state == ("closed/rewarded" if state == "releasing" else "closed/failed")
    assert not result.leaked
    assert server.boxes == {}
    assert await sweep("daytona", {}) == ()


async def test_a_stop_of_the_command_line_leaves_no_connection_open_and_can_be_closed(
    server, daytona_service, tmp_path
):
    """After ^C nobody complains of an unclosed session on stderr, and what was stopped is reaped."""
    script = json.dumps({"turns": [[{"say": "working"}, {"wait_cancel": 60}]]})
    argv = [sys.executable, "-m", "orchestrator", "run", "demo", "--agent", "scripted", "--sandbox", "daytona"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default::ResourceWarning"}
    said = ""
    async with await anyio.open_process(
        [*argv, "--sandbox-option=snapshot=prepared", "--env", f"ROLLOUT_SCRIPT={script}"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.DEVNULL,
    ) as process:
        async for data in process.stderr:
            fresh = "-> executing" not in said and "-> executing" in said + data.decode()
            said += data.decode()
            if fresh:
                process.send_signal(signal.SIGINT)
        assert await process.wait() == 5, said
    assert "SIGINT: stopping" in said
    assert not [word for word in ("Unclosed", "ResourceWarning", "Traceback") if word in said], said
    (folder,) = (tmp_path / "runs").iterdir()
    assert await daytona_service.left() == [f"rollout-{folder.name}"]
    assert (await reap(folder)).state == "closed/cancelled"
    assert server.boxes == {}


@pytest.mark.parametrize("state", ["provisioning", "session/acp", "executing", "checking", "verifying", "releasing"])
async def test_a_killed_rollout_goes_on_in_its_sandbox_and_is_rewarded(server, tmp_path, state):
    """With the files as they were, once all that was at work there is gone; one sandbox in all, and none afterwards."""
    name = f"resumed-{uuid.uuid4().hex[:8]}"
    done = await anyio.run_process(child(state, tmp_path, name), check=False)
    assert done.returncode == -9, done.stderr.decode()
    folder, before = tmp_path / name, names(tmp_path / name)
    transport = "acp" if state == "session/acp" else "session-factory"
    config = attrs.evolve(config_of(transport, tmp_path, name, state), **THERE)
    result = await went_on(folder, config)
    assert (result.state, result.reward, result.leaked) == ("closed/rewarded", 1.0, ()), result.errors
    found = names(folder)
    assert found[: len(before) + 1] == [*before, "Recovered"]
    assert found.count("Prompted") == found.count("Captured") == result.turns == 2
    assert len(server.created) == (2 if state == "provisioning" else 1)
    assert server.boxes == {}


async def test_what_a_killed_orchestrators_agents_had_started_is_proven_gone_first(server, tmp_path):
    """An agent that lived on is killed before anything else happens there, and the journal has the proof."""
    name, alive = f"resumed-{uuid.uuid4().hex[:8]}", []
    done = await anyio.run_process(child("session/acp", tmp_path, name), check=False)
    assert done.returncode == -9, done.stderr.decode()
    (box,) = server.boxes.values()

    async def is_alive():
        return (await server._run(box, "grep -q '[s]cripted_acp' /proc/[0-9]*/cmdline", "/"))[0] == 0

    async def look(moved):
        alive.append((moved.dest, await is_alive()))

    assert await is_alive()
    config = attrs.evolve(config_of("acp", tmp_path, name, "session/acp"), **THERE, hooks=(look,))
    result = await went_on(tmp_path / name, config)
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), result.errors
    assert alive[:3] == [("quiescing", False), ("disconnected", False), ("connecting", False)]
    proof = next(event.evidence for event in events(tmp_path / name) if isinstance(event, ev.Quiet))
    assert any("ended what had been started in the sandbox: " in sentence for sentence in proof)
    assert any(sentence.startswith("none of ") for sentence in proof)


async def test_what_another_process_goes_on_with_is_no_dead_ones(server, tmp_path):
    """Its labels name who was killed; no sweep takes it from who resumed it, nor while that is still on its way."""
    name, swept = f"resumed-{uuid.uuid4().hex[:8]}", []
    done = await anyio.run_process(child("executing", tmp_path, name), check=False)
    assert done.returncode == -9, done.stderr.decode()

    async def look(moved):
        if moved.dest in ("executing", "verifying"):
            swept.extend([moved.dest, *await sweep("daytona", {})])

    taken = take(tmp_path / name)
    assert await sweep("daytona", {}) == ()
    taken.sink.close()
    config = config_of("session-factory", tmp_path, name, "executing")
    result = await went_on(tmp_path / name, attrs.evolve(config, **THERE, hooks=(look,)))
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), result.errors
    assert swept == ["executing", "verifying"]
    assert server.boxes == {}


async def test_a_sandbox_that_is_gone_fails_the_rollout_and_not_whoever_resumes_it(server, tmp_path):
    """Owner sandbox, no reward, and the turn that was open is captured."""
    name = f"resumed-{uuid.uuid4().hex[:8]}"
    done = await anyio.run_process(child("executing", tmp_path, name), check=False)
    assert done.returncode == -9, done.stderr.decode()
    (box_id,) = server.boxes
    await server.vanish(box_id)
    config = config_of("session-factory", tmp_path, name, "executing")
    result = await went_on(tmp_path / name, attrs.evolve(config, **THERE))
    assert (result.state, result.reward, result.verdict.owner) == ("closed/failed", None, "sandbox")
    assert f"sandbox rollout-{name} is gone" in result.verdict.reason
    assert names(tmp_path / name).count("Captured") == 1
    assert not result.leaked


async def test_what_was_killed_is_found_without_its_journal(server, tmp_path):
    """By its labels, unless somebody alive holds the rollout by now; its journal can be closed afterwards."""
    name = f"killed-{uuid.uuid4().hex[:8]}"
    done = await anyio.run_process(child("executing", tmp_path, name), check=False)
    assert done.returncode == -9, done.stderr.decode()
    sink = JournalSink(tmp_path / name / "journal.jsonl")
    assert sink.claim() == "ours"
    assert await sweep("daytona", {}) == ()
    sink.close()
    (said,) = await sweep("daytona", {})
    assert said.startswith(f"sandbox rollout-{name} was deleted")
    assert server.boxes == {}
    assert (await reap(tmp_path / name)).state == "closed/failed"


async def test_a_sandbox_whose_orchestrator_is_killed_while_it_is_made_is_found_by_its_intended_name(server, tmp_path):
    """The journal has the intention only: what the service made of it is deleted."""
    answered = anyio.Event()
    fault = server.fault("POST", "/sandbox", wait=answered)
    process = await anyio.open_process(child("never", tmp_path, "killed-early"), stdout=None, stderr=None)
    async with process:
        with anyio.fail_after(120):
            while fault.times or not server.boxes:  # noqa: ASYNC110 - another process gets there
                await anyio.sleep(0.05)
        os.kill(process.pid, 9)
        await process.wait()
    answered.set()
    assert len(server.boxes) == 1
    result = await reap(tmp_path / "killed-early")
    assert result.state == "closed/failed"
    assert server.boxes == {}
