"""kill -9 of the orchestrator in each state: the rollout is taken over from its journal alone and closed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from pathlib import Path

import anyio
import pytest

from orchestrator.capture import read_trajectory
from orchestrator.journal import read_journal
from orchestrator.recovery import reap
from states.errors import ConfigError
from states.events import Usage
from states.journal import Transition, fold

pytestmark = pytest.mark.sandbox

CHILD = """
import json, os, sys
from pathlib import Path
import anyio
from orchestrator import Rollout, RolloutConfig
from orchestrator.tasks.authoring import demo_task

state, out = sys.argv[1], Path(sys.argv[2])
turn = [{"say": "working"}, {"shell": "setsid sleep 1000 & echo started"}, {"say": "waiting"}, {"shell": "sleep 1000"}]

def die(moved):
    if moved.dest == state:
        os.kill(os.getpid(), 9)

config = RolloutConfig(
    task=demo_task(), agent=sys.argv[3], env={"ROLLOUT_SCRIPT": json.dumps({"turns": [turn]})},
    out=out, new_id=lambda: sys.argv[4], hooks=(die,), turn_sec=1,
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


def killed_in(state: str, out: Path, agent: str = "scripted") -> Path:
    """The folder of a rollout whose orchestrator was killed as it entered `state`."""
    name = f"killed-{uuid.uuid4().hex[:8]}"
    argv = [sys.executable, "-c", CHILD, state, str(out), agent, name]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    return out / name


def sandbox_root(folder: Path) -> Path:
    """Where its sandbox was."""
    header = json.loads((folder / "journal.jsonl").read_text().splitlines()[0])
    return Path(header["info"]["scratch"]) / f"rollout-{folder.name}"


@pytest.mark.parametrize("state", STATES)
def test_a_killed_rollout_is_captured_given_back_and_closed(state, tmp_path):
    """Each prompt has its one capture, nothing is held, no process is left, and a reward that was given stands."""
    folder = killed_in(state, tmp_path)
    result = anyio.run(reap, folder)
    records = read_journal(folder)
    names = [record.event.name for record in records if isinstance(record, Transition)]
    assert (
        fold(records).position.state == result.state == ("closed/rewarded" if state == "releasing" else "closed/failed")
    )
    assert result.reward == (0.0 if state == "releasing" else None)
    assert names.count("Prompted") == names.count("Captured")
    assert names.count("Recovered") == 1
    assert not result.leaked
    assert not sandbox_root(folder).exists()
    assert json.loads((folder / "result.json").read_text())["state"] == result.state


def test_every_step_that_was_read_before_a_kill_is_on_disk(tmp_path):
    """Killed once the turn was cancelled, its four steps are there, sealed by the one who took over."""
    folder = killed_in("cancelling", tmp_path)
    before = [step.data["type"] for step in read_trajectory(folder)[0].steps]
    result = anyio.run(reap, folder)
    segment = read_trajectory(folder)[0]
    assert before == ["user_message", "agent_message", "tool_call", "agent_message", "tool_call"]
    assert [step.data["type"] for step in segment.steps] == before
    assert segment.sealed == {**segment.sealed, "steps": 5, "complete": False}
    assert result.trajectory_source == "partial_session"


def test_the_model_calls_of_the_open_turn_are_counted_from_what_was_written(tmp_path):
    """A turn that was killed has used what its calls used: those that failed are calls too, a torn line is not."""
    folder = killed_in("executing", tmp_path)
    used = {"input_tokens": 7, "output_tokens": 5, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 0}
    calls = [
        {"call": 1, "status": 200, "error": None, "usage": {**used, "cost": 0.25}},
        {"call": 2, "status": 429, "error": "slow down", "usage": None},
        {"call": 3, "status": 200, "error": None, "usage": {**used, "cost": 0.5}},
    ]
    (folder / "llm.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls) + '{"call": 4, "sta')
    total = anyio.run(reap, folder).usage.total
    assert total == Usage(3, 1, 14, 10, 4, 0, 0.75)


def test_the_calls_of_the_dead_are_of_whom_their_lines_say_and_refused_ones_of_nobody(tmp_path):
    """By role and turn; what was refused was never called."""
    folder = killed_in("executing", tmp_path)
    used = {"input_tokens": 7, "output_tokens": 5, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    line = {"status": 200, "error": None, "usage": {**used, "cost": 0.25}, "via": "passthrough"}
    refused = {"role": "agent", "turn": 1, "status": 400, "error": "spent", "usage": None, "via": "refused"}
    calls = [{"role": "agent", "turn": 1, **line}, {"role": "user", "turn": 0, **line}, refused]
    (folder / "llm.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls))
    usage = anyio.run(reap, folder).usage
    assert usage.total == Usage(2, 0, 14, 10, 0, 0, 0.5)
    assert [(share.role, share.turn, share.usage.calls) for share in usage.by_turn] == [("agent", 1, 1), ("user", 0, 1)]


def test_the_socket_of_the_dead_process_goes(tmp_path):
    """Nobody listens at it any more, so nobody may find it."""
    folder = killed_in("executing", tmp_path)
    (folder / "control.sock").touch()
    anyio.run(reap, folder)
    assert not (folder / "control.sock").exists()


def test_reaping_twice_changes_nothing(tmp_path):
    """The second one finds a closed rollout that holds nothing."""
    folder = killed_in("executing", tmp_path)
    first = anyio.run(reap, folder)
    journal = (folder / "journal.jsonl").read_bytes()
    assert anyio.run(reap, folder).state == first.state
    assert (folder / "journal.jsonl").read_bytes() == journal


def test_a_reaper_that_is_killed_is_followed_by_another(tmp_path):
    """Killed twice: the second incarnation closes what the first could not."""
    folder = killed_in("executing", tmp_path)
    code = f"""
import os, anyio, orchestrator.recovery as r
from pathlib import Path
real = r.ReaperWorld.recovered_segment
r.ReaperWorld.recovered_segment = lambda self, number: os.kill(os.getpid(), 9)
anyio.run(r.reap, Path({str(folder)!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    result = anyio.run(reap, folder)
    moves = [record for record in read_journal(folder) if isinstance(record, Transition)]
    assert [move.event.incarnation for move in moves if move.event.name == "Recovered"] == [2, 3]
    assert [move.event.name for move in moves].count("Captured") == 1
    assert result.state == "closed/failed"


def test_a_rollout_whose_orchestrator_is_alive_is_left_alone(tmp_path):
    """One clear sentence that names the process."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, "nowhere", str(tmp_path), "scripted", "alive"])
    try:
        journal = tmp_path / "alive" / "journal.jsonl"
        deadline = time.monotonic() + 20
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
            assert time.monotonic() < deadline
        with pytest.raises(ConfigError, match=f"driven by process {child.pid}, which is alive"):
            anyio.run(reap, tmp_path / "alive")
    finally:
        child.kill()
        child.wait()
    anyio.run(reap, tmp_path / "alive")
