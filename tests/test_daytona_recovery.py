"""kill -9 of an orchestrator whose sandbox is at a Daytona service: it is given back by journal, or by label."""

from __future__ import annotations

import os
import sys
import uuid

import anyio
import pytest

from orchestrator.recovery import reap
from orchestrator.sandboxes import sweep

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox, pytest.mark.daytona]

CHILD = """
import json, os, sys
from pathlib import Path
import anyio
from orchestrator import Rollout, RolloutConfig
from orchestrator.tasks.authoring import demo_task

state, out, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
detached = "setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo started"
turn = [{"say": "working"}, {"shell": detached}, {"shell": "sleep 1000"}]

def die(moved):
    if moved.dest == state:
        os.kill(os.getpid(), 9)

config = RolloutConfig(
    task=demo_task(), agent="scripted", env={"ROLLOUT_SCRIPT": json.dumps({"turns": [turn]})}, sandbox="daytona",
    sandbox_options={"snapshot": "prepared"}, out=out, new_id=lambda: name, hooks=(die,), turn_sec=1,
)
anyio.run(Rollout(config).run)
"""
STATES = (
    "disconnected",
    "connecting",
    "session/factory",
    "executing",
    "cancelling",
    "capturing/partial",
    "quiescing",
    "verifying",
    "releasing",
)


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
    """The command of an orchestrator that dies as it enters `state`."""
    return [sys.executable, "-c", CHILD, state, str(out), name]


@pytest.mark.parametrize("how", ["its journal", "its label"])
@pytest.mark.parametrize("state", STATES)
async def test_a_killed_orchestrator_leaves_a_sandbox_that_is_given_back(server, daytona_service, tmp_path, state, how):
    """In each state, with or without the journal; a second time there is nothing to do."""
    name = f"killed-{uuid.uuid4().hex[:8]}"
    done = await anyio.run_process(child(state, tmp_path, name), check=False)
    assert done.returncode == -9, done.stderr.decode()
    assert await daytona_service.left() == [f"rollout-{name}"]
    if how == "its label":
        (said,) = await sweep("daytona", {})
        assert said.startswith(f"sandbox rollout-{name} was deleted")
    result = await reap(tmp_path / name)
    assert result.state == ("closed/rewarded" if state == "releasing" else "closed/failed")
    assert server.boxes == {}
    assert await sweep("daytona", {}) == ()


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
