"""Whole rollouts in a Daytona sandbox: the same agents, metered through the relay, as in the local one."""

from __future__ import annotations

import shutil
import subprocess

import attrs
import pytest
from requirements import missing
from same_journal import comparable, said_and_done
from test_real_acp_agents import DEMO, SOLVE, assert_closed, assert_keys_stay_out, assert_metered

from orchestrator import Rollout, RolloutConfig, Scene, Turn
from orchestrator.capture import read_trajectory
from orchestrator.gateway.scripted import Hang, Say, ScriptedUpstream, Shell, ShellScript, Steps
from orchestrator.gateway.upstream import Upstream
from orchestrator.recovery import reap, resume

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox, pytest.mark.daytona]

AGENTS = [
    "minimal-acp",
    "minimal",
    *(pytest.param(name, marks=pytest.mark.agents) for name in ("codex-acp", "pydantic-ai", "omnigent")),
]
THERE = {"sandbox": "daytona"}


@pytest.fixture
async def loopback(daytona_service):
    """The service on loopback: these tests break it."""
    if daytona_service.server is None:
        pytest.skip("breaks the service")
    return daytona_service.server


@pytest.mark.parametrize("channel", ["session", "pty"])
@pytest.mark.parametrize("agent", AGENTS)
async def test_a_rollout_in_daytona_is_the_one_in_the_local_sandbox(play, daytona_service, agent, channel):
    """Reward 1.0, the provider's own count, and the same journal but for ids, times, ports, leases and uploads."""
    here = await play(agent, ShellScript(SOLVE))
    there = await play(agent, ShellScript(SOLVE), **THERE, sandbox_options={"channel": channel})
    for played in (here, there):
        assert_closed(played, "closed/rewarded", 1.0)
        assert_metered(played)
        assert_keys_stay_out(played)
    uploads = [line for line in comparable(there.folder) if '"text": "uploading ' in line]
    assert len(uploads) == len([note for note in there.result.notes if note.startswith("uploading ")])
    assert [line for line in comparable(there.folder) if line not in uploads] == comparable(here.folder)
    assert said_and_done(there.folder) == said_and_done(here.folder)
    assert await daytona_service.left() == []


async def test_a_metered_rollout_goes_on_over_a_new_relay_in_the_same_sandbox(loopback, tmp_path):
    """Stopped after its first turn: the second one is counted too, and nothing is brought in once more."""
    async with ScriptedUpstream(ShellScript(SOLVE), apis=["openai-chat"]) as model:
        scene = attrs.evolve(Scene.single("minimal-acp", model="m"), turns=(Turn("agent"), Turn("agent", "Again.")))
        config = RolloutConfig(
            task=DEMO,
            scene=scene,
            out=tmp_path,
            upstream=Upstream("scripted", model.url, ["openai-chat"]),
            usage_tracking="required",
            **THERE,
        )
        rollout = Rollout(config)
        rollout.listeners.append(lambda moved: moved.dest == "capturing/whole" and rollout.stop("SIGINT"))
        await rollout.run()
        await rollout.detach()
        first = rollout.result().usage.total
        assert first.calls == model.usage.calls > 0
        result = await (await resume(rollout.folder, config)).run()
        assert (result.state, result.reward, result.turns) == ("closed/rewarded", 1.0, 2), result.errors
        assert result.usage.total == model.usage
    assert model.usage.calls > first.calls
    assert len(loopback.created) == 1
    uploads = [note for note in result.notes if note.startswith("uploading ")]
    assert len(uploads) == len({*uploads}) > 0
    assert loopback.boxes == {}


async def test_what_a_timed_out_agent_left_running_earns_nothing(play, loopback):
    """It detached a process that writes the right answer once the tests begin; that is dead before they do."""
    late = (
        f"(setsid sh -c 'while [ ! -e /app/go ]; do sleep 0.02; done; {SOLVE}' </dev/null >/dev/null 2>&1 &); echo on"
    )
    alive = []

    async def look(moved):
        if moved.dest in ("cancelling", "verifying"):
            (box,) = loopback.boxes.values()
            _, said = await loopback._run(box, "grep -als 'app/go' /proc/[0-9]*/cmdline | grep -v self | wc -l", "/")
            alive.append(int(said))
            if moved.dest == "verifying":
                (box.root / "app/go").touch()

    played = await play("minimal", Steps(Shell(late), Hang()), **THERE, turn_sec=2, hooks=(look,))
    assert_closed(played, "closed/rewarded", 0.0)
    assert played.result.ended_by == "deadline"
    assert alive[0] > alive[1]


@pytest.mark.parametrize("state", ["executing", "capturing/whole", "quiescing", "verifying"])
async def test_a_sandbox_that_vanishes_is_the_sandboxes_failure_and_what_was_said_is_kept(play, loopback, state):
    """No reward, the owner named, the turn sealed with what there was, whoever finds out first."""

    async def vanish(moved):
        if moved.dest == state:
            for box_id in list(loopback.boxes):
                await loopback.vanish(box_id)

    played = await play("minimal-acp", Steps(Say("words")), **THERE, hooks=(vanish,))
    assert_closed(played, "closed/failed", None)
    assert played.result.verdict.owner == "sandbox", played.result.verdict
    (segment,) = read_trajectory(played.folder / "trajectory.jsonl")
    assert segment.sealed is not None


@pytest.mark.parametrize(
    ("break_it", "settings", "said"),
    [
        (lambda server: setattr(server, "key", "changed"), {}, "refused the key in DAYTONA_API_KEY"),
        (lambda server: None, {"image": "example.org/none:1"}, "failed to pull example.org/none:1"),
        (
            lambda server: server.fault("POST", "/sandbox", status=403, message="Total CPU limit exceeded", times=9),
            {},
            "Total CPU limit exceeded",
        ),
    ],
    ids=["wrong key", "no such image", "quota"],
)
async def test_what_the_service_refuses_is_a_verdict_with_its_words(play, loopback, break_it, settings, said):
    """Owner sandbox, no reward, and no agent was started."""
    break_it(loopback)
    played = await play("minimal", ShellScript(SOLVE), **THERE, **settings)
    assert_closed(played, "closed/failed", None)
    assert played.result.verdict.owner == "sandbox"
    assert said in played.result.verdict.reason
    assert played.calls == ()


async def test_a_dockerfile_that_fails_is_the_sandboxes_failure_with_the_end_of_its_log(play, loopback, tmp_path):
    """As the service says it; no agent was started."""
    task = tmp_path / "task"
    shutil.copytree(DEMO, task)
    lines = ("FROM debian:stable-slim", "RUN echo these are the last words; exit 7")
    (task / "environment/Dockerfile").write_text("\n".join(lines))
    played = await play("minimal", ShellScript(SOLVE), **THERE, task=task)
    assert_closed(played, "closed/failed", None)
    assert played.result.verdict.owner == "sandbox"
    assert "\nthese are the last words\n" in played.result.errors[0]["message"], played.result.errors[0]["message"]
    assert played.calls == ()
    assert loopback.boxes == {}


async def test_a_service_that_goes_away_in_mid_turn_is_the_sandboxes_failure(play, loopback, monkeypatch):
    """Nothing is proven, nothing is graded, all that was said is kept; what is left goes when the service is back."""
    monkeypatch.setattr("orchestrator.sandboxes._daytona_service.FIRST_DELAY_SEC", 0.01)

    def go_away(moved):
        if moved.dest == "executing":
            for method in ("GET", "POST", "DELETE"):
                loopback.fault(method, ".*", drop="before", times=1_000_000)

    script = Steps(Say("words"), Shell("echo more"))
    played = await play("minimal", script, **THERE, hooks=(go_away,))
    assert_closed(played, "closed/failed", None)
    assert played.result.verdict.owner == "sandbox", played.result.verdict
    (segment,) = read_trajectory(played.folder / "trajectory.jsonl")
    assert segment.sealed is not None
    assert any(lease.startswith("sandbox rollout-") for lease in played.result.leaked)
    loopback.faults.clear()
    assert not (await reap(played.folder)).leaked
    assert loopback.boxes == {}


@pytest.fixture
def small(loopback):
    """The service, with a disk in memory of 64 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(loopback.folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        missing("daytona", "a disk in memory cannot be mounted: that takes root")
    yield loopback
    subprocess.run(["umount", "-l", str(loopback.folder)], check=True)


async def test_a_disk_that_is_full_is_the_sandboxes_failure(play, small):
    """An agent that fills it cannot be verified; what it did is on record."""
    assert small.folder.is_mount()
    played = await play("minimal", Steps(Shell("cat /dev/zero > /app/all; echo full"), Say("done")), **THERE)
    assert_closed(played, "closed/failed", None)
    assert played.result.verdict.owner == "sandbox", played.result.verdict
    assert any("No space left on device" in error["message"] for error in played.result.errors), played.result.errors
    assert played.result.tool_calls == 1
