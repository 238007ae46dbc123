"""Real agents behind a session factory: each solves the demo task in the local sandbox, metered at the gateway."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

import anyio
import pytest
from requirements import missing

import orchestrator.agents.factories.mini_swe_agent as mini
import orchestrator.tasks
from orchestrator.capture import read_trajectory
from orchestrator.config import Role, RolloutConfig, Scene, Turn
from orchestrator.gateway.scripted import Always, Fail, Say, ScriptedUpstream, Shell, ShellScript, Steps
from orchestrator.gateway.upstream import Upstream
from orchestrator.rollout import Rollout
from states.errors import HandleRevoked
from states.events import Usage

pytestmark = [pytest.mark.anyio, pytest.mark.agents, pytest.mark.sandbox]

DEMO = Path(orchestrator.tasks.__file__).parent / "demo"
SOLVE = "s=0; while read -r n; do s=$((s + n)); done < /app/numbers.txt; echo $s > /app/answer.txt"
APIS = {"pydantic-ai": "openai-chat", "mini-swe-agent": "openai-chat", "omnigent": "openai-responses"}
CALLS = {"pydantic-ai": [SOLVE], "mini-swe-agent": [SOLVE, f"echo {mini.SUBMIT}"], "omnigent": [SOLVE]}
EXTRAS = {"pydantic-ai": "pydantic_ai", "mini-swe-agent": "minisweagent"}


def require_extra(agent):
    """Skip where an agent's extra is not installed, fail where `ROLLOUT_REQUIRE` asks for agents. Imports nothing."""
    if agent in EXTRAS and importlib.util.find_spec(EXTRAS[agent]) is None:
        missing("agents", f"the extra {agent} is not installed")


@pytest.fixture
def play(play):
    """The rollout of `conftest.py`, once the agent's extra is there."""

    async def checked(agent, script, **settings):
        require_extra(agent)
        return await play(agent, script, **settings)

    return checked


def steps_of(folder, kind):
    """The steps of that type, from the trajectory on disk."""
    segments = read_trajectory(folder / "trajectory.jsonl")
    return [step.data for segment in segments for step in segment.steps if step.data["type"] == kind]


def assert_closed(result, state, reward):
    """It ended so; where it did not, the result says why."""
    assert (result.state, result.reward) == (state, reward), (result.verdict, result.errors, result.notes)


# --- each of them, and its twins -----------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", APIS)
async def test_a_session_factory_agent_solves_the_demo_task_and_its_usage_is_the_providers_count(play, agent):
    """Reward 1.0, whole and from a session; tokens and cost equal the provider's own count; no key in an artifact."""
    played = await play(agent, ShellScript(SOLVE))
    result = played.result
    assert_closed(result, "closed/rewarded", 1.0)
    assert (result.ended_by, result.trajectory_source, result.usage.tracking) == ("end_turn", "session", "metered")
    assert {call.api for call in played.calls} == {APIS[agent]}
    assert played.total == played.provider
    assert played.total.input_tokens > 0
    calls = steps_of(played.folder, "tool_call")
    assert [call["raw_input"]["command"] for call in calls] == CALLS[agent]
    assert {call["status"] for call in calls} == {"completed"}
    for path in played.folder.rglob("*"):
        assert path.is_dir() or b"provider-key-that" not in path.read_bytes(), path


@pytest.mark.parametrize("agent", APIS)
async def test_a_wrong_answer_of_a_session_factory_agent_gets_nothing(play, agent):
    """The twin: the same agent, another number in the file. Reward 0.0, and it is a verified one."""
    played = await play(agent, ShellScript("echo 1 > /app/answer.txt"))
    assert_closed(played.result, "closed/rewarded", 0.0)
    assert played.total == played.provider


@pytest.mark.parametrize("agent", APIS)
async def test_a_model_that_answers_401_voids_the_rollout_of_a_session_factory_agent(play, agent):
    """The twin: every call fails. No reward, and the provider owns that."""
    played = await play(agent, Always(Fail(401, "wrong key")))
    assert_closed(played.result, "closed/void", None)
    assert played.result.verdict.owner == "provider"
    assert played.result.trajectory_source == "partial_session"
    assert played.total.calls == played.total.failed_calls == len(played.calls) > 0


@pytest.mark.parametrize("agent", APIS)
async def test_without_usage_tracking_the_reward_stays_and_usage_says_untracked(tmp_path, require_agent, agent):
    """`usage_tracking=off`: no gateway; the agent calls the provider that the role's own env names."""
    require_extra(agent)
    await require_agent(agent)
    async with ScriptedUpstream(ShellScript(SOLVE), api_key="key-of-the-user") as provider:
        result = await Rollout(
            RolloutConfig(
                agent=agent,
                model="scripted",
                task=DEMO,
                out=tmp_path,
                network="host",
                usage_tracking="off",
                env={"OPENAI_BASE_URL": f"{provider.url}/v1", "OPENAI_API_KEY": "key-of-the-user"},
            )
        ).run()
    assert_closed(result, "closed/rewarded", 1.0)
    assert result.usage.tracking == "untracked"
    assert result.usage.total == Usage()
    assert result.trajectory_source == "session"
    assert provider.usage.input_tokens > 0
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"key-of-the-user" not in path.read_bytes(), path


# --- approvals of pydantic-ai --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "reward"), [("approve", 1.0), ("deny", 0.0)])
async def test_an_approval_of_pydantic_ai_is_asked_and_its_answer_decides(play, verdict, reward):
    """The command waits for the answer: approved it runs, denied the model is told so. Both are in the trajectory."""
    asked = []

    def answer(request):
        asked.append(request)
        return verdict

    script = ShellScript(SOLVE)
    played = await play("pydantic-ai", script, on_ask_user=answer, env={"ROLLOUT_APPROVALS": "ask"})
    assert [(request.kind, request.options) for request in asked] == [("approval", ("approve", "deny"))]
    assert SOLVE in asked[0].prompt
    assert_closed(played.result, "closed/rewarded", reward)
    (question,) = steps_of(played.folder, "question")
    assert (question["by"], question["answer"]) == ("handler", verdict)
    (call,) = steps_of(played.folder, "tool_call")
    assert call["status"] == ("completed" if verdict == "approve" else "failed")


# --- the thread of mini-swe-agent ----------------------------------------------------------------------------------


def threads_in(module):
    """The threads whose stack goes through that module."""
    found = []
    for thread, top in sys._current_frames().items():
        if module.__file__ in [frame.f_code.co_filename for frame, _ in traceback.walk_stack(top)]:
            found.append(thread)
    return found


async def until(condition, seconds=30):
    """Wait for what a thread or a process brings about, which cannot set an event of ours."""
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.02)


async def test_mini_swe_agent_cancelled_in_mid_command_settles_and_its_thread_ends(tmp_path):
    """The operator cancels while a command runs: the command is ended, the turn settles, no thread is left."""
    require_extra("mini-swe-agent")
    async with ScriptedUpstream(ShellScript("sleep 600; " + SOLVE)) as provider:
        upstream = Upstream("scripted", provider.url, ("openai-chat",), api_key="secret")
        rollout = Rollout(RolloutConfig(agent="mini-swe-agent", task=DEMO, out=tmp_path, upstream=upstream))
        trajectory = tmp_path / rollout.id / "trajectory.jsonl"

        async def cancel():
            await until(lambda: trajectory.exists() and '"in_progress"' in trajectory.read_text())
            assert len(threads_in(mini)) == 1
            rollout.cancel("operator", "seen enough")

        async with anyio.create_task_group() as group:
            group.start_soon(cancel)
            result = await rollout.run()
        assert len(provider.calls) == 1
    assert_closed(result, "closed/cancelled", None)
    assert result.trajectory_source == "session"
    (call,) = steps_of(tmp_path / rollout.id, "tool_call")
    assert call["status"] == "failed"
    await until(lambda: not threads_in(mini))


async def test_a_thread_of_mini_swe_agent_that_was_left_behind_finds_its_handle_revoked(play, monkeypatch):
    """The adversarial case: it hears no cancel and, when its command is ended, tries another. It gets nothing."""
    tried = []
    execute = mini._Turn.execute

    def stubborn(turn, action, cwd=""):
        for command in (action["command"], "echo 55 > /app/answer.txt"):
            try:
                return execute(turn, {**action, "command": command}, cwd)
            except BaseException as error:  # whatever ends it: it goes on
                tried.append(error)
        raise tried[-1]

    async def deaf(_session):
        return None

    monkeypatch.setattr(mini.MiniSession, "cancel", deaf)
    monkeypatch.setattr(mini._Turn, "end", lambda _turn: None)
    monkeypatch.setattr(mini._Turn, "execute", stubborn)
    played = await play("mini-swe-agent", ShellScript("sleep 600"), turn_sec=3, deadlines={"cancelling": 0.5})
    await until(lambda: not threads_in(mini))
    assert len(tried) == 2
    assert isinstance(tried[1], HandleRevoked)
    assert_closed(played.result, "closed/rewarded", 0.0)
    assert (played.result.ended_by, played.result.trajectory_source) == ("deadline", "partial_session")
    assert len(played.calls) == 1


# --- omnigent's conversation ---------------------------------------------------------------------------------------


async def test_omnigent_goes_on_with_its_conversation_in_a_second_turn(tmp_path, require_agent):
    """Each `-p` would be a new conversation: the second turn resumes the first, and its model sees both prompts."""
    await require_agent("omnigent")
    turns = (Turn("agent", "Look around."), Turn("agent", "Write the sum."))
    scene = Scene((Role("agent", "omnigent"),), turns)
    async with ScriptedUpstream(Steps(Shell(SOLVE), Say("Done."))) as provider:
        upstream = Upstream("scripted", provider.url, ("openai-responses",), api_key="secret")
        result = await Rollout(RolloutConfig(scene=scene, task=DEMO, out=tmp_path, upstream=upstream)).run()
    assert_closed(result, "closed/rewarded", 1.0)
    assert result.turns == 2
    assert result.usage.total == provider.usage
    users = [entry["content"] for entry in provider.calls[-1].request["input"] if entry.get("role") == "user"]
    assert users == ["Look around.", "Write the sum."]


async def test_omnigent_cancelled_in_mid_command_settles(tmp_path, require_agent):
    """The operator cancels while its shell runs: interrupted on its server, its CLI ended, everything of it is gone."""
    await require_agent("omnigent")
    async with ScriptedUpstream(ShellScript("sleep 600; " + SOLVE)) as provider:
        upstream = Upstream("scripted", provider.url, ("openai-responses",), api_key="secret")
        rollout = Rollout(RolloutConfig(agent="omnigent", task=DEMO, out=tmp_path, upstream=upstream))

        async def cancel():
            await until(lambda: provider.calls, 120)
            rollout.cancel("operator", "seen enough")

        async with anyio.create_task_group() as group:
            group.start_soon(cancel)
            result = await rollout.run()
        assert len(provider.calls) == 1
    assert_closed(result, "closed/cancelled", None)
    assert result.trajectory_source == "session"
    (call,) = steps_of(tmp_path / rollout.id, "tool_call")
    assert call["raw_input"]["command"].startswith("sleep 600")
