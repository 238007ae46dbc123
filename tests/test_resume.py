"""A rollout that was stopped, or whose process was killed, goes on: the same plan in the same sandbox and folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import anyio
import attrs
import pytest
from harness import TRANSPORTS, build, on
from test_kernel import WAITS
from test_ways_out import hooked

from orchestrator import AgentConfig, Rollout, RolloutConfig, Scene, Turn
from orchestrator.capture import read_trajectory
from orchestrator.directors import CHECK
from orchestrator.gateway.llm_log import expand
from orchestrator.gateway.scripted import ScriptedUpstream, ShellScript
from orchestrator.gateway.upstream import Upstream
from orchestrator.journal import JournalWriter, read_journal, read_lines
from orchestrator.recovery import reap, resume, take
from orchestrator.result import driven_sec
from orchestrator.tasks import DEMO_COMMAND, demo_task
from states import events as ev
from states.errors import ConfigError, JournalError, QuietError, SandboxError
from states.journal import Note, Transition, fold

SUM = "s=0; while read -r n; do s=$((s + n)); done < numbers.txt"
TWICE = (Turn("agent", "One."), Turn("agent", "Two."))


def events(folder):
    """The events in its journal."""
    return [record.event for record in read_journal(folder) if isinstance(record, Transition)]


def names(folder):
    """Their names."""
    return [event.name for event in events(folder)]


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Both transports."""
    return request.param


# --- kill -9 in each state, in the local sandbox -----------------------------------------------------------------


def director(story):
    """A turn, a check, a turn; by nothing but the story."""
    if len(story.turns) == 1 and not story.checks:
        return CHECK
    return Turn("agent") if len(story.turns) < 2 else None


WORK = f"{SUM}; echo $s > answer.txt"


def config_of(transport: str, out: Path, name: str, state: str) -> RolloutConfig:
    """The config of a rollout that passes `state`, the same in whichever process."""
    turn = [{"say": "working"}, {"shell": WORK}, {"wait_cancel": 60}]
    if state == "capturing/partial":
        turn[-1:] = [{"ignore_cancel": True}, {"hang": True}]
    agent = AgentConfig(
        "worker",
        "session-factory",
        session_factory="orchestrator.agents.scripted:from_env",
        env={"ROLLOUT_SCRIPT": json.dumps({"turns": [turn]})},
        calls_model=False,
    )
    if transport == "acp":
        script = {"${home}/script.json": json.dumps({"turns": [turn]})}
        agent = AgentConfig(
            "worker",
            "acp",
            launch=("${python}", "${agents}/scripted_acp.py", "${home}/script.json"),
            files=script,
            calls_model=False,
        )
    return RolloutConfig(
        task=demo_task(), scene=Scene.single(agent), director=director, out=out, new_id=lambda: name,
        turn_sec=0.5, deadlines={"cancelling": 1.0},
    )  # fmt: skip


CHILD = """
import json, os, sys, anyio, attrs
from pathlib import Path
sys.path.insert(0, sys.argv[5])
from test_resume import config_of
from orchestrator import Rollout
from orchestrator.world import LiveWorld
transport, out, name, state = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]

def die(*_):
    os.kill(os.getpid(), 9)

def hook(moved):
    if moved.dest == "capturing/whole" and state == "paused":
        rollout.pause("terminal")
    if moved.dest.replace("session/factory", "session").replace("session/acp", "session") == state:
        die()

if state == "provisioning":
    LiveWorld.install = die
where = json.loads(sys.argv[6]) if sys.argv[6:] else {}
rollout = Rollout(attrs.evolve(config_of(transport, out, name, state), hooks=(hook,), **where))
anyio.run(rollout.run)
"""
STATES = (
    "provisioning", "disconnected", "connecting", "session", "executing", "cancelling", "capturing/whole",
    "capturing/partial", "paused", "checking", "quiescing", "verifying", "releasing",
)  # fmt: skip


def dies_in(state: str, transport: str, out: Path, name: str, **where) -> list[str]:
    """The command of an orchestrator that is killed when it has come to `state`; `where` is its sandbox."""
    tests = str(Path(__file__).parent)
    return [sys.executable, "-c", CHILD, transport, str(out), name, state, tests, json.dumps(where)]


def killed_in(state: str, transport: str, out: Path, **where) -> Path:
    """The folder of a rollout whose orchestrator was killed when it had come to `state`."""
    name = f"resumed-{uuid.uuid4().hex[:8]}"
    argv = dies_in(state, transport, out, name, **where)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    return out / name


async def went_on(folder: Path, config: RolloutConfig, **how):
    """Resume it here, and run it to its end."""
    rollout = await resume(folder, config, **how)
    return await rollout.run()


@pytest.mark.sandbox
@pytest.mark.parametrize("state", STATES)
def test_a_rollout_killed_in_any_state_goes_on_and_is_rewarded(state, transport, tmp_path):
    """By the same plan in the same sandbox: two turns, a check, the reward; one capture a prompt; nothing is left."""
    folder = killed_in(state, transport, tmp_path)
    before = names(folder)
    result = anyio.run(went_on, folder, config_of(transport, tmp_path, folder.name, state))
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), result
    found = names(folder)
    assert found[: len(before) + 1] == [*before, "Recovered"]
    assert found.count("Prompted") == found.count("Captured") == result.turns == 2
    assert found.count("Provisioned") == 1
    assert fold(read_journal(folder)).position.state == "closed/rewarded"
    segments = read_trajectory(folder)
    assert [(segment.number, segment.sealed is not None) for segment in segments] == [(1, True), (2, True)]
    assert not result.leaked
    header = json.loads((folder / "journal.jsonl").read_text().splitlines()[0])
    assert not (Path(header["info"]["scratch"]) / f"rollout-{folder.name}").exists()
    assert json.loads((folder / "result.json").read_text())["reward"] == 1.0


@pytest.mark.sandbox
def test_killed_again_and_again_it_still_goes_on(tmp_path):
    """Each time a Recovered line, with who it was; what was sealed stays sealed."""
    folder = killed_in("executing", "session-factory", tmp_path)
    code = CHILD.replace("rollout = Rollout(", "from orchestrator.recovery import resume\nconfig = (").replace(
        "anyio.run(rollout.run)", "anyio.run(lambda: go(config))"
    )
    code = code.replace("rollout.pause", "None and rollout.pause")
    go = "\nasync def go(config):\n    rollout = await resume(out / name, config)\n    await rollout.run()\n"
    code = code.replace("if state ==", go + "if state ==", 1)
    argv = [
        sys.executable,
        "-c",
        code,
        "session-factory",
        str(tmp_path),
        folder.name,
        "quiescing",
        str(Path(__file__).parent),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    result = anyio.run(went_on, folder, config_of("session-factory", tmp_path, folder.name, "executing"))
    assert (result.state, result.reward, result.turns) == ("closed/rewarded", 1.0, 2)
    taken = [event for event in events(folder) if isinstance(event, ev.Recovered)]
    assert [event.incarnation for event in taken] == [2, 3]
    assert taken[0].owner["pid"] != taken[1].owner["pid"] == os.getpid()


@pytest.mark.sandbox
def test_a_sandbox_that_is_gone_fails_the_rollout_and_not_whoever_resumes_it(tmp_path):
    """Owner sandbox, reward None, and the turn that was open is captured."""
    folder = killed_in("executing", "session-factory", tmp_path)
    header = json.loads((folder / "journal.jsonl").read_text().splitlines()[0])
    shutil.rmtree(Path(header["info"]["scratch"]) / f"rollout-{folder.name}")
    result = anyio.run(went_on, folder, config_of("session-factory", tmp_path, folder.name, "executing"))
    assert (result.state, result.reward, result.verdict.owner) == ("closed/failed", None, "sandbox")
    assert "is gone" in result.verdict.reason
    found = names(folder)
    assert found.count("Prompted") == found.count("Captured") == 1
    assert not result.leaked


# --- stopped, and gone on with in the same process ----------------------------------------------------------------


def stopped(stand, state="executing", by="SIGINT"):
    """A rollout that is stopped when it comes to `state`."""
    return hooked(stand, on(state, lambda: stand.rollout.stop(by)))


async def left(stand):
    """Run it until it has stopped, and let go of it; its folder."""
    with anyio.fail_after(30):
        await stand.rollout.run()
    assert not stand.rollout.closed
    await stand.rollout.detach()
    return stand.rollout.folder


def again(stand, **changes):
    """The config with which it began, made again."""
    return attrs.evolve(stand.rollout.config, hooks=(), **changes)


TURNS = {"turns": [[{"say": "working"}, {"wait_cancel": True}]]}


@pytest.mark.anyio
async def test_a_stopped_rollout_goes_on_with_its_next_turn(transport, tmp_path):
    """The turn that was interrupted counts as taken, which is noted; numbers go on."""
    stand = stopped(build(transport, WAITS, turns=TWICE, out=tmp_path))
    folder = await left(stand)
    assert fold(read_journal(folder)).stopped == "SIGINT"
    stand.agents["agent"].script = {"turns": [[{"say": "done"}]]}
    stand.sandbox.on_spawn = build(transport, {"turns": [[{"say": "done"}]]}).sandbox.on_spawn
    rollout = await resume(folder, again(stand))
    assert fold(read_journal(folder)).stopped == ""
    result = await rollout.run()
    assert (result.state, result.turns) == ("closed/rewarded", 2)
    assert [event.text for event in events(folder) if isinstance(event, ev.Prompted)] == ["One.", "Two."]
    assert [segment.number for segment in read_trajectory(folder)] == [1, 2]
    assert any("counts as taken" in record.text for record in read_journal(folder) if isinstance(record, Note))


@pytest.mark.anyio
async def test_a_turn_that_was_cut_off_is_asked_again_when_that_is_wanted(transport, tmp_path):
    """Once more the same prompt, then the plan goes on where it was: nothing is skipped."""
    stand = stopped(build(transport, WAITS, turns=TWICE, out=tmp_path))
    folder = await left(stand)
    stand.agents["agent"].script = {"turns": [[{"say": "done"}]]}
    stand.sandbox.on_spawn = build(transport, {"turns": [[{"say": "done"}]]}).sandbox.on_spawn
    result = await (await resume(folder, again(stand), ask_again=True)).run()
    assert (result.state, result.turns) == ("closed/rewarded", 3)
    assert [event.text for event in events(folder) if isinstance(event, ev.Prompted)] == ["One.", "One.", "Two."]


async def stopped_twice(stand):
    """Stopped in its turn, asked again, and stopped before that prompt was sent; its folder."""
    folder = await left(stopped(stand))
    rollout = await resume(folder, again(stand), ask_again=True)
    rollout.stop("SIGTERM")
    await rollout.run()
    await rollout.detach()
    stand.agents["agent"].script = {"turns": [[{"say": "done"}]]}
    stand.sandbox.on_spawn = build("acp", {"turns": [[{"say": "done"}]]}).sandbox.on_spawn
    return folder


@pytest.mark.anyio
@pytest.mark.parametrize("ask_again", [True, False])
async def test_a_turn_that_is_asked_again_already_is_not_asked_again_once_more(transport, tmp_path, ask_again):
    """Whatever the second resume wants: its prompt is due, and behind it the plan goes on where it was."""
    stand = build(transport, WAITS, turns=TWICE, out=tmp_path)
    folder = await stopped_twice(stand)
    result = await (await resume(folder, again(stand), ask_again=ask_again)).run()
    assert [event.text for event in events(folder) if isinstance(event, ev.Prompted)] == ["One.", "One.", "Two."]
    assert (result.state, result.turns) == ("closed/rewarded", 3)
    assert not any("counts as taken" in note for note in result.notes)


@pytest.mark.anyio
async def test_a_director_sees_a_turn_that_was_asked_again_once(transport, tmp_path):
    """It counts turns to know what is next: what was cut off is not one of them, but has its number."""
    seen = []

    def lead(story):
        taken = len(story.turns)
        seen.append((taken, story.coming, [turn.said for turn in story.turns]))
        return Turn("agent", ("One.", "Two.")[taken]) if taken < 2 else None

    stand = build(transport, WAITS, director=lead, out=tmp_path)
    folder = await stopped_twice(stand)
    result = await (await resume(folder, again(stand), ask_again=True)).run()
    assert [event.text for event in events(folder) if isinstance(event, ev.Prompted)] == ["One.", "One.", "Two."]
    assert seen == [(0, 1, []), (1, 2, [""]), (1, 3, ["done"]), (2, 4, ["done", "done"])]
    assert result.state == "closed/rewarded"


@pytest.mark.anyio
async def test_a_turn_that_was_checked_is_not_asked_again(transport, tmp_path):
    """It was cut off and counted as taken, and what came of it was looked at: the next turn follows from that."""

    def lead(story):
        if len(story.turns) == 1 and not story.checks:
            return CHECK
        return Turn("agent", ("One.", "Two.")[len(story.turns)]) if len(story.turns) < 2 else None

    stand = build(transport, WAITS, director=lead, out=tmp_path)
    folder = await left(stopped(stand))
    rollout = await resume(folder, again(stand))
    rollout.listeners.append(on("checking", lambda: rollout.stop("SIGTERM")))
    await rollout.run()
    await rollout.detach()
    stand.agents["agent"].script = {"turns": [[{"say": "done"}]]}
    stand.sandbox.on_spawn = build(transport, {"turns": [[{"say": "done"}]]}).sandbox.on_spawn
    await (await resume(folder, again(stand), ask_again=True)).run()
    assert [event.text for event in events(folder) if isinstance(event, ev.Prompted)] == ["One.", "Two."]


@pytest.mark.anyio
async def test_a_resumed_rollout_is_told_when_its_sandbox_goes_away(transport, tmp_path):
    """Whoever watches the sandbox tells the rollout that goes on, as it told the one that was stopped."""
    stand = stopped(build(transport, WAITS, turns=TWICE, out=tmp_path))
    rollout = await resume(await left(stand), again(stand))
    rollout.listeners.append(on("executing", lambda: rollout._world._spec().lost("the host is down")))
    with anyio.fail_after(20):
        result = await rollout.run()
    assert (result.state, result.verdict.owner) == ("closed/failed", "sandbox")
    assert "the host is down" in result.verdict.reason


@pytest.mark.anyio
async def test_a_prompt_that_was_not_journaled_leaves_nothing_of_its_segment(transport, tmp_path, monkeypatch):
    """The disk was full between the two: whoever goes on opens the turn of that number anew, and it reads as one."""
    stand = build(transport, out=tmp_path)
    rollout = stand.rollout
    moved = JournalWriter.moved

    def full(journal, source, event, *rest):
        if isinstance(event, ev.Prompted):
            raise JournalError("no space left on device")
        return moved(journal, source, event, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(JournalWriter, "moved", full)
        await rollout.run()
    assert rollout.state.startswith("session/")
    await rollout.detach()
    result = await (await resume(rollout.folder, again(stand))).run()
    assert (result.state, result.turns) == ("closed/rewarded", 1)
    (segment,) = read_trajectory(rollout.folder)
    assert [step.data.get("text") for step in segment.steps if "text" in step.data] == ["Do it.", "well", "done"]
    assert segment.sealed["steps"] == len(segment.steps) == 4


@pytest.mark.anyio
async def test_a_turn_that_ended_by_itself_is_not_asked_again(transport, tmp_path):
    """Stopped between turns, there is nothing to repeat."""
    stand = stopped(build(transport, turns=TWICE, out=tmp_path), "capturing/whole")
    folder = await left(stand)
    result = await (await resume(folder, again(stand), ask_again=True)).run()
    assert [event.text for event in events(folder) if isinstance(event, ev.Prompted)] == ["One.", "Two."]
    assert result.state == "closed/rewarded"


@pytest.mark.anyio
async def test_time_in_which_it_was_paused_or_dead_is_not_driven(tmp_path):
    """Read off the journal's own clock: a pause of a hundred seconds and a gap of a thousand do not count."""
    ticking = [0.0]

    def clock():
        ticking[0] += 1.0
        return ticking[0]

    stand = build("acp", turns=TWICE, out=tmp_path, clock=clock, timeout=5000.0)
    rollout = stand.rollout

    def act(moved):
        if moved.dest == "capturing/whole" and moved.source == "executing":
            rollout.pause()
        if moved.dest == "paused":
            ticking[0] += 100
            rollout.resume()
        if moved.event.name == "Resumed":
            rollout.stop()

    hooked(stand, act)
    folder = await left(stand)
    ticking[0] += 1000
    going = await resume(folder, again(stand))
    left_over = going._world.time_left()
    (wall,) = going.result().budgets
    await going.detach()
    taken = take(folder)
    whole = taken.records[-1].time - taken.records[0].time
    assert whole > 1100
    assert wall.spent <= driven_sec(taken.records) < whole - 1100
    assert (wall.kind, wall.overshoot) == ("wall_sec", 0)
    assert 5000 - 100 < left_over < 5000
    result = await reap_here(taken, folder)
    assert result.state == "closed/failed"


async def reap_here(taken, folder):
    taken.sink.close()
    return await reap(folder)


@pytest.mark.anyio
async def test_a_pause_is_over_when_its_process_is_gone(transport, tmp_path):
    """Whoever takes it over goes on: who held it is not there any more."""
    stand = build(transport, turns=TWICE, out=tmp_path)
    hooked(stand, on("capturing/whole", stand.rollout.pause))
    rollout = stand.rollout
    while rollout.state != "paused":
        await rollout.step()
    await rollout.detach()
    going = await resume(rollout.folder, again(stand))
    assert going.held is None
    result = await going.run()
    assert (result.state, result.turns) == ("closed/rewarded", 2)


@pytest.mark.anyio
@pytest.mark.parametrize("error", [SandboxError("no host"), QuietError("pid 7 lives")])
async def test_a_sandbox_that_cannot_be_attached_to_is_the_sandboxes_failure(transport, tmp_path, error):
    """As the table says: nothing is graded, and the verdict names it."""
    stand = stopped(build(transport, WAITS, out=tmp_path))
    folder = await left(stand)
    stand.sandbox.faults["attach"] = error
    result = await (await resume(folder, again(stand))).run()
    assert (result.state, result.verdict.owner) == ("closed/failed", "sandbox")
    assert str(error) in result.verdict.reason


@pytest.mark.anyio
async def test_a_sandbox_without_attach_is_said(tmp_path):
    """What a rollout cannot have again it does not go on without."""

    class Bare:
        def __init__(self, real):
            self._real = real

        def __getattr__(self, name):
            if name == "attach":
                raise AttributeError(name)
            return getattr(self._real, name)

    stand = stopped(build("session-factory", WAITS, out=tmp_path))
    bare = Bare(stand.sandbox)
    stand = stopped(build("session-factory", WAITS, out=tmp_path / "bare", sandbox=bare))
    folder = await left(stand)
    result = await (await resume(folder, again(stand))).run()
    assert (result.state, result.verdict.owner) == ("closed/failed", "sandbox")
    assert "Bare has no attach" in result.verdict.reason


@pytest.mark.anyio
async def test_an_error_of_ours_on_the_way_leaves_it_to_be_resumed(tmp_path):
    """What is raised comes out, and the journal is free again."""
    stand = stopped(build("acp", WAITS, out=tmp_path))
    folder = await left(stand)
    stand.sandbox.faults["attach"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        await resume(folder, again(stand))
    stand.sandbox.faults.clear()
    assert (await (await resume(folder, again(stand))).run()).state == "closed/rewarded"
    assert [event.incarnation for event in events(folder) if isinstance(event, ev.Recovered)] == [2, 3]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_what_is_driven_here_or_elsewhere_cannot_be_taken_over(tmp_path):
    """The journal has one writer; a second one is told whose it is."""
    stand = build("acp", out=tmp_path)
    with pytest.raises(ConfigError, match=rf"driven by process {os.getpid()}, which is alive: `rollout cancel"):
        await resume(stand.rollout.folder, again(stand))
    await stand.rollout.run()


@pytest.mark.anyio
async def test_what_is_over_is_not_resumed(tmp_path):
    stand = build("acp", out=tmp_path)
    await stand.rollout.run()
    with pytest.raises(ConfigError, match="is over: closed/rewarded"):
        await resume(stand.rollout.folder, again(stand))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "Do something else."}, r'prompt \(was "Do it.", is "Do something else."\)'),
        ({"timeout": 5.0}, r"budgets \(was \[\], is .*wall_sec"),
        ({"max_connects": 7}, "max_connects"),
        ({"network": "none"}, "network"),
        ({"env": {"MORE": "1"}}, r'roles \(agent: env \(was \["AGENT"\], is \["AGENT","MORE"\]\)\)'),
        ({"prompt": "Do it at length. " * 20}, r"prompt$"),
        ({"policy": "deny"}, "policy"),
    ],
)
async def test_other_inputs_are_refused_by_name(tmp_path, changes, said):
    """Nothing has happened: no line is written, and with the same inputs it goes on."""
    stand = stopped(build("acp", WAITS, out=tmp_path))
    folder = await left(stand)
    journal = (folder / "journal.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=f"was begun with other inputs, and cannot go on with these: .*{said}"):
        await resume(folder, again(stand, **changes))
    assert (folder / "journal.jsonl").read_bytes() == journal
    assert (await (await resume(folder, again(stand))).run()).state == "closed/rewarded"


@pytest.mark.anyio
async def test_values_of_variables_hooks_and_clocks_may_be_others(tmp_path):
    """A rotated key is the same rollout: the identity holds inputs alone, and no value of a variable."""
    stand = stopped(build("acp", WAITS, out=tmp_path, env={"TOKEN": "first-secret-value"}))
    folder = await left(stand)
    assert "first-secret-value" not in (folder / "journal.jsonl").read_text()
    config = again(stand, env={"TOKEN": "another-secret-value"}, clock=lambda: 5.0)
    assert (await (await resume(folder, config)).run()).state == "closed/rewarded"


@pytest.mark.anyio
async def test_a_task_that_was_changed_meanwhile_is_refused(tmp_path):
    """Its digest is in the first line of the journal."""
    task = tmp_path / "task"
    shutil.copytree(demo_task(), task)
    stand = stopped(build("acp", WAITS, out=tmp_path / "runs", task=task))
    folder = await left(stand)
    (task / "instruction.md").write_text("Something else.\n")
    with pytest.raises(ConfigError, match="cannot go on with these: task_digest"):
        await resume(folder, again(stand))
    await reap(folder)


@pytest.mark.anyio
async def test_what_was_stopped_and_is_given_up_is_cancelled_by_its_operator(transport, tmp_path):
    """Reaped, it is not a failure of the harness."""
    folder = await left(stopped(build(transport, WAITS, out=tmp_path), by="SIGTERM"))
    result = await reap(folder)
    assert (result.state, result.verdict.owner) == ("closed/cancelled", "operator")
    assert [(e.by, e.why) for e in events(folder) if isinstance(e, ev.Cancelled)] == [
        ("operator", "it was stopped by SIGTERM, and not resumed")
    ]


# --- usage goes on ----------------------------------------------------------------------------------------------


@pytest.mark.sandbox
def test_usage_goes_on_and_is_the_upstreams_own_count(tmp_path):
    """Over the stop: tokens, calls and their numbers, in the result, by role, and in llm.jsonl, which still expands."""

    async def main():
        async with ScriptedUpstream(ShellScript(DEMO_COMMAND), apis=["openai-chat"]) as model:
            config = RolloutConfig(
                task=demo_task(),
                scene=attrs.evolve(Scene.single("minimal", model="m"), turns=(Turn("agent"), Turn("agent", "Again."))),
                out=tmp_path,
                upstream=Upstream("scripted", model.url, ["openai-chat"]),
                usage_tracking="required",
            )
            stops = on("capturing/whole", lambda: rollout.stop("SIGINT"))
            rollout = Rollout(attrs.evolve(config, hooks=(stops,)))
            await rollout.run()
            await rollout.detach()
            first = rollout.result().usage.total
            assert first.calls == model.usage.calls > 0
            result = await (await resume(rollout.folder, config)).run()
            return first, result, model.usage

    first, result, counted = anyio.run(main)
    assert (result.state, result.turns) == ("closed/rewarded", 2)
    assert result.usage.total == counted
    assert counted.calls > first.calls
    assert result.usage.by_role["agent"] == counted
    lines = [json.loads(line) for line in read_lines(result.folder / "llm.jsonl")]
    assert [line["call"] for line in lines] == list(range(1, counted.calls + 1))
    assert all(message["role"] for line in expand(lines) for message in line["request"]["messages"])
