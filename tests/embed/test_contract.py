"""The embedding contract: whoever hosts rollouts keeps their process, their loop and their settings."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import attrs
import pytest

from orchestrator import AgentConfig, ConfigError, Registry, Rollout, RolloutConfig, run_sync
from orchestrator.agents.scripted import ScriptedAgent
from orchestrator.capture import read_trajectory
from orchestrator.journal import MemorySink, read_journal
from orchestrator.sandboxes.fake import FakeSandbox
from states.journal import Transition, fold
from states.ports import ExecResult


def speaker(env):
    """A session factory: an agent that says the word of its environment."""
    return ScriptedAgent({"turns": [[{"say": env["WORD"]}]]})


def speaking(word: str, out: Path | None = None, **settings) -> RolloutConfig:
    """A rollout of the agent called `speaker`, which is another one in each registry."""
    agent = AgentConfig("speaker", "session-factory", session_factory=f"{__name__}:speaker", calls_model=False)
    registry = Registry()
    registry.register(attrs.evolve(agent, env={"WORD": word}))
    parts = {"sandbox": FakeSandbox(), "verifier": None, "prompt": "Speak.", **settings}
    return RolloutConfig(agent="speaker", registry=registry, out=out, **parts)


def word_of(folder: Path) -> str:
    """What the agent of a rollout said."""
    steps = [step.data for segment in read_trajectory(folder) for step in segment.steps]
    return "".join(step["text"] for step in steps if step["type"] == "agent_message")


# --- one process, several hosts ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_two_orchestrators_with_different_settings_share_a_loop(tmp_path):
    """The same agent name, other agents, other limits, other folders: neither knows of the other."""
    made = [Rollout(speaking(word, tmp_path / word, max_connects=n)) for n, word in enumerate(("one", "two"), start=1)]
    async with anyio.create_task_group() as tasks:
        for rollout in made:
            tasks.start_soon(rollout.run)
    assert [word_of(rollout.result().folder) for rollout in made] == ["one", "two"]
    assert [rollout.config.max_connects for rollout in made] == [1, 2]


def test_two_loops_of_two_threads_each_run_their_own(tmp_path):
    """Nothing of a rollout belongs to the process: a loop in another thread is another world."""
    results = {}

    def host(word):
        results[word] = run_sync(speaking(word, tmp_path / word))

    threads = [threading.Thread(target=host, args=(word,)) for word in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {word: (result.state, word_of(result.folder)) for word, result in results.items()} == {
        "left": ("closed/unverified", "left"),
        "right": ("closed/unverified", "right"),
    }


@pytest.mark.anyio
async def test_five_hundred_rollouts_in_a_hosts_loop_all_end_as_they_should():
    """One is as good as another, however many there are; what they cost the loop is a row of `make bench`."""
    made = [Rollout(speaking(str(number))) for number in range(500)]
    async with anyio.create_task_group() as tasks:
        for rollout in made:
            tasks.start_soon(rollout.run)
    assert {rollout.state for rollout in made} == {"closed/unverified"}
    assert len({rollout.id for rollout in made}) == 500


def test_a_program_that_logs_at_info_hears_nothing_of_a_rollout(caplog):
    """The journal tells what moves; a host's log is the host's, whatever level it has."""
    with caplog.at_level(logging.INFO):
        assert run_sync(speaking("hello")).state == "closed/unverified"
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.anyio
async def test_a_rollout_runs_in_a_loop_that_runs_already(tmp_path):
    """As in a notebook, where the loop is the host's: `await` is all there is to it."""
    result = await Rollout(speaking("hello", tmp_path)).run()
    assert (result.state, word_of(result.folder)) == ("closed/unverified", "hello")


@pytest.mark.anyio
async def test_run_sync_in_a_running_loop_says_what_to_do_instead():
    """One sentence, and nothing was started."""
    with pytest.raises(ConfigError, match=r"await Rollout\(config\)\.run\(\)"):
        run_sync(speaking("never"))


@pytest.mark.parametrize("backend", ["curio", "trio"])
def test_a_backend_that_is_not_there_is_a_sentence(backend, monkeypatch):
    """Nobody has to know whose LookupError it would be."""
    monkeypatch.setitem(sys.modules, "trio", None)
    with pytest.raises(ConfigError, match=f"no backend '{backend}' here: there is asyncio"):
        run_sync(speaking("never"), backend=backend)


# --- every part is the host's, or left out -----------------------------------------------------------------------


@pytest.mark.anyio
async def test_every_part_can_be_brought():
    """Sandbox, verifier, journal, clock, ids and hooks are the host's, and nothing touches a disk."""

    class Scoring:
        async def verify(self):
            return {"reward": 0.25}

        async def check(self):
            return await self.verify()

    sink, moved, ticks = MemorySink(), [], iter(range(1, 1000))

    async def told(transition):
        moved.append(transition.dest)

    config = speaking(
        "mine",
        sandbox=FakeSandbox(name="theirs", on_exec=lambda _call: ExecResult("", "", 0)),
        verifier=Scoring(),
        journal=sink,
        clock=lambda: next(ticks),
        new_id=lambda: "their-id",
        hooks=(told, lambda transition: moved.append(transition.source)),
    )
    result = await Rollout(config).run()
    assert (result.rollout, result.reward, result.folder) == ("their-id", 0.25, None)
    assert moved[-2:] == ["closed/rewarded", "releasing"]
    times = [json.loads(line)["time"] for line in sink.lines if b'"time"' in line]
    assert times == sorted(times)
    assert all(1 <= time < 1000 for time in times)


@pytest.mark.anyio
async def test_what_was_said_and_done_can_be_read_at_any_time_where_nothing_is_on_disk():
    """Also in the middle of a turn, from a hook; and it is what a folder would hold."""
    seen = []

    def told(moved):
        seen.append((moved.dest, [[step["type"] for step in turn.steps] for turn in rollout.story.turns]))

    rollout = Rollout(speaking("mine", hooks=(told,)))
    await rollout.run()
    (turn,) = rollout.story.turns
    assert (turn.role, turn.prompt, turn.said, turn.ended_by) == ("agent", "Speak.", "mine", "end_turn")
    assert dict(seen)["connecting"] == []
    assert dict(seen)["capturing/whole"] == dict(seen)["closed/unverified"] == [["user_message", "agent_message"]]


@pytest.mark.anyio
async def test_the_story_is_the_same_in_memory_and_on_disk(tmp_path):
    """Where it is kept changes nothing of it."""
    told = []
    for out in (None, tmp_path):
        rollout = Rollout(speaking("same", out))
        await rollout.run()
        told.append([(turn.role, turn.prompt, turn.ended_by, list(turn.steps)) for turn in rollout.story.turns])
    assert told[0] == told[1]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_what_needs_asyncio_says_so_under_trio(tmp_path):
    """The gateway is a configuration error there, before a sandbox is up: bring your own model endpoint."""
    from orchestrator.gateway.upstream import Upstream

    upstream = Upstream("m", "http://127.0.0.1:9", ["openai-chat"])
    result = await Rollout(
        RolloutConfig(prompt="Go.", agent="minimal", sandbox=FakeSandbox(), upstream=upstream, out=tmp_path)
    ).run()
    assert (result.state, result.reward) == ("closed/failed", None)
    assert "asyncio" in result.verdict.reason


# --- a host that goes away ---------------------------------------------------------------------------------------

HOST = """
import asyncio, json, sys, threading
from pathlib import Path
from orchestrator import Rollout, RolloutConfig
from orchestrator.tasks import demo_task

how, out = sys.argv[1], Path(sys.argv[2])
script = {"turns": [[{"say": "working"}, {"shell": "setsid sleep 1000 & echo started"}, {"shell": "sleep 1000"}]]}

async def main():
    busy = asyncio.Event()
    seen = []

    def told(moved):
        seen.append(moved.dest)
        if seen.count("executing") == 2:
            busy.set()

    tasks = []
    for agent in ("scripted", "scripted-acp"):
        config = RolloutConfig(task=demo_task(), agent=agent, env={"ROLLOUT_SCRIPT": json.dumps(script)},
                               out=out, hooks=(told,), new_id=lambda name=agent: name)
        tasks.append(asyncio.create_task(Rollout(config).run()))
    await busy.wait()
    if how == "stops":
        asyncio.get_running_loop().stop()
        await asyncio.sleep(1000)

if how == "ends":
    asyncio.run(main())
else:
    loop = asyncio.new_event_loop()
    kept = loop.create_task(main())
    loop.run_forever()
    print("left", flush=True)
    import os
    os._exit(0)
"""


def hosted(how: str, out: Path) -> list[Path]:
    """The folders of two rollouts, one a transport, whose host went away in this manner while both executed."""
    done = subprocess.run(
        [sys.executable, "-c", HOST, how, str(out)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [out / "scripted", out / "scripted-acp"]


def processes_of(folder: Path) -> list[str]:
    """The command lines that name the rollout's sandbox."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:
            continue
        if f"rollout-{folder.name}" in line and entry.name != str(os.getpid()):
            found.append(line)
    return found


@pytest.mark.sandbox
def test_a_host_whose_asyncio_run_ends_gets_its_rollouts_captured_and_given_back(tmp_path):
    """`asyncio.run` cancels what is alive: sealed, released, closed, before it returns."""
    for folder in hosted("ends", tmp_path):
        records = read_journal(folder)
        names = [record.event.name for record in records if isinstance(record, Transition)]
        assert fold(records).position.state == "closed/cancelled"
        assert names.count("Prompted") == names.count("Captured") == 1
        assert [r.source for r in records if isinstance(r, Transition) and r.cause == "deadline"] == []
        assert not fold(records).leases
        assert (folder / "result.json").exists()
        assert processes_of(folder) == []


@pytest.mark.sandbox
def test_after_a_loop_that_just_stopped_the_reaper_does_it_from_the_journals(tmp_path):
    """A loop that is stopped cancels nothing; the turn in flight gets its one capture, the sandbox is given back."""
    folders = hosted("stops", tmp_path)
    assert [fold(read_journal(folder)).position.state for folder in folders] == ["executing", "executing"]
    command = [sys.executable, "-m", "orchestrator", "reap", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        records = read_journal(folder)
        names = [record.event.name for record in records if isinstance(record, Transition)]
        assert fold(records).position.closed
        assert names.count("Prompted") == names.count("Captured") == 1
        assert not fold(records).leases
        assert processes_of(folder) == []
