"""kill -9 of an orchestrator whose sandbox is at a Daytona service: it is given back by journal, or by label."""

from __future__ import annotations

import os
import uuid

import anyio
import pytest
from test_resume import STATES, dies_in

from orchestrator.journal import JournalSink
from orchestrator.recovery import reap
from orchestrator.sandboxes import sweep

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox, pytest.mark.daytona]

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
