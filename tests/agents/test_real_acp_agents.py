"""Real agents over ACP: each solves the demo task in the local sandbox, its model calls metered at the gateway."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import pytest
from requirements import missing

import orchestrator.tasks
from orchestrator.capture import read_trajectory
from orchestrator.config import RolloutConfig
from orchestrator.gateway.scripted import Always, Fail, Hang, Say, ScriptedUpstream, Shell, ShellScript, Steps, Use
from orchestrator.gateway.server import Gateway
from orchestrator.install import ADAPTERS
from orchestrator.registry import AgentConfig
from orchestrator.rollout import Rollout

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox]

DEMO = Path(orchestrator.tasks.__file__).parent / "demo"
AGENTS = {
    "codex-acp": "openai-responses",
    "claude-agent-acp": "anthropic-messages",
    "opencode": "openai-chat",
    "fast-agent": "openai-chat",
    "deepagents": "openai-chat",
    "minimal-acp": "openai-chat",  # needs no installation, so this one runs everywhere
}
EVERY_AGENT = ["minimal-acp", *(pytest.param(name, marks=pytest.mark.agents) for name in list(AGENTS)[:-1])]
SOLVE = "s=0; while read -r n; do s=$((s + n)); done < /app/numbers.txt; echo $s > /app/answer.txt"
NO_RETRIES = {"CLAUDE_CODE_MAX_RETRIES": "0"}


def steps_of(played, kind):
    """The steps of that type, from the trajectory on disk."""
    segments = read_trajectory(played.folder / "trajectory.jsonl")
    return [step.data for segment in segments for step in segment.steps if step.data["type"] == kind]


def assert_closed(played, state, reward):
    """It ended so; where it did not, the result says why."""
    result = played.result
    assert (result.state, result.reward) == (state, reward), (result.verdict, result.errors, result.notes)


def assert_metered(played):
    """The rollout's own count is the provider's count: calls, tokens, cached tokens and cost."""
    assert played.result.usage.tracking == "metered"
    assert played.total == played.provider
    assert played.total.input_tokens > 0


def assert_keys_stay_out(played):
    """The provider's key came to the provider, and is in no artifact."""
    assert {call.key for call in played.calls} == {"provider-key-that-no-sandbox-sees"}
    for path in played.folder.rglob("*"):
        assert path.is_dir() or b"provider-key-that" not in path.read_bytes(), path


@pytest.mark.parametrize("agent", EVERY_AGENT)
async def test_a_real_agent_solves_the_demo_task_and_its_usage_is_the_providers_count(play, agent):
    """Reward 1.0, whole and from ACP; tokens and cost equal what the provider reported; it spoke its own format."""
    played = await play(agent, ShellScript(SOLVE))
    assert_closed(played, "closed/rewarded", 1.0)
    assert (played.result.ended_by, played.result.trajectory_source) == ("end_turn", "acp")
    assert played.result.tool_calls == 1
    assert {call.api for call in played.calls} == {AGENTS[agent]}
    assert_metered(played)
    assert_keys_stay_out(played)
    assert "Done." in "".join(step["text"] for step in steps_of(played, "agent_message"))


@pytest.mark.parametrize("agent", EVERY_AGENT)
async def test_a_wrong_answer_of_a_real_agent_gets_nothing(play, agent):
    """The twin: the same agent, the same words, another number in the file. Reward 0.0, and it is a verified one."""
    played = await play(agent, ShellScript("echo 1 > /app/answer.txt"))
    assert_closed(played, "closed/rewarded", 0.0)
    assert_metered(played)


@pytest.mark.parametrize("agent", EVERY_AGENT)
async def test_a_model_that_refuses_the_key_voids_the_rollout_and_its_provider_owns_that(play, agent):
    """The twin: every call answers 401. No reward, whatever the agent says of its turn; the provider is to blame."""
    played = await play(agent, Always(Fail(401, "wrong key")), env=NO_RETRIES)
    assert_closed(played, "closed/void", None)
    assert played.result.verdict.owner == "provider"
    assert played.total.calls == played.total.failed_calls == len(played.calls) > 0


@pytest.fixture
async def brisk_gateway():
    """A gateway that reads a call to its end for a moment only, once its client is gone."""
    with tempfile.TemporaryDirectory(prefix="gateway-") as folder:
        gateway = Gateway(socket_path=Path(folder) / "socket", drain_sec=0.1)
        await gateway.start()
        yield gateway
        await gateway.stop()


@pytest.mark.parametrize("agent", EVERY_AGENT)
async def test_a_real_agent_that_is_interrupted_settles_and_its_work_is_graded(play, brisk_gateway, agent):
    """Cancelled while it waits for its model, it answers at once: the turn is whole, and what it did counts."""
    met = []

    def interrupt(_conversation):
        met[0].interrupt()
        return Hang()

    played = await play(agent, Steps(Shell(SOLVE), interrupt, Say("Done.")), meet=met.append, gateway=brisk_gateway)
    assert_closed(played, "closed/rewarded", 1.0)
    assert (played.result.ended_by, played.result.trajectory_source) == ("interrupted", "acp")
    assert [call.status for call in played.calls] == [200] * len(played.calls)


async def test_an_agent_whose_command_never_ends_is_cancelled_at_the_deadline_and_graded(play):
    """The command runs on; at the turn's deadline the agent is cancelled, settles, and its work stands."""
    played = await play("minimal-acp", ShellScript(f"{SOLVE}; sleep 600"), turn_sec=5)
    assert_closed(played, "closed/rewarded", 1.0)
    assert (played.result.ended_by, played.result.trajectory_source) == ("deadline", "acp")
    assert_metered(played)


async def test_an_agent_may_lie_in_a_folder_that_its_manifest_binds_below_tmp_too(play, tmp_path):
    """`binds` shows a folder of this machine to the agent, also below /tmp, where a sandbox has one of its own."""
    tmp_path.chmod(0o755)
    program = shutil.copy(ADAPTERS / "minimal_acp.py", tmp_path)
    agent = AgentConfig("mine", "acp", launch=("${python}", program), api=("openai-chat",), binds=(str(tmp_path),))
    played = await play(agent, ShellScript(SOLVE))
    assert_closed(played, "closed/rewarded", 1.0)


OWN_CREDENTIALS = {
    "claude-agent-acp": {"ANTHROPIC_BASE_URL": "{url}", "ANTHROPIC_API_KEY": "{key}", "ANTHROPIC_MODEL": "scripted"},
    "deepagents": {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "{key}"},
    "fast-agent": {"GENERIC_BASE_URL": "{url}/v1", "GENERIC_API_KEY": "{key}"},
    "minimal-acp": {"ROLLOUT_BASE_URL": "{url}", "ROLLOUT_API_KEY": "{key}"},
}


@pytest.mark.parametrize(
    "agent", [pytest.param(name, marks=[] if name == "minimal-acp" else pytest.mark.agents) for name in OWN_CREDENTIALS]
)
async def test_with_usage_tracking_off_an_agent_calls_its_model_by_itself_and_the_reward_stays(
    require_agent, agent, tmp_path
):
    """No gateway: the credentials are those of the role's env, usage is untracked, and they are in no artifact."""
    await require_agent(agent)
    async with ScriptedUpstream(ShellScript(SOLVE), api_key="sk-the-users-own-key-1234") as provider:
        env = {
            k: v.format(url=provider.url, key="sk-the-users-own-key-1234") for k, v in OWN_CREDENTIALS[agent].items()
        }
        config = RolloutConfig(
            task=DEMO, agent=agent, model="scripted", env=env, network="host", usage_tracking="off", out=tmp_path
        )
        result = await Rollout(config).run()
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors)
    assert (result.usage.tracking, result.usage.reason) == ("untracked", "usage_tracking is off")
    assert {call.key for call in provider.calls} == {"sk-the-users-own-key-1234"}
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"sk-the-users-own" not in path.read_bytes(), path


# --- questions -----------------------------------------------------------------------------------------------

QUESTION = {
    "question": "Which file takes the sum?",
    "header": "File",
    "multiSelect": False,
    "options": [
        {"label": "/app/result.txt", "description": "the first that was offered"},
        {"label": "/app/answer.txt", "description": "what the task says"},
    ],
}


def write_where_told(conversation):
    """Write the sum into the file that the answer names: the script knows it from nowhere else."""
    chosen = [path for path in ("/app/result.txt", "/app/answer.txt") if path in conversation.results[0]]
    return ShellScript(SOLVE.replace("/app/answer.txt", chosen[-1])).steps[0](conversation)


@pytest.mark.agents
@pytest.mark.parametrize(("permission", "reward"), [("allow", 1.0), ("reject", 0.0)])
async def test_claude_asks_and_what_is_answered_decides_what_it_does(play, permission, reward):
    """AskUserQuestion arrives as an elicitation, Bash as a permission; the answers reach the model, and decide."""
    asked = []

    def answer(request):
        asked.append(request)
        if request.kind == "elicitation":
            return "/app/answer.txt" if request.options else None  # its form also takes free text, if one likes
        kinds = dict(zip(request.option_kinds, request.options, strict=True))
        return kinds[f"{permission}_once"]

    script = Steps(Use("AskUserQuestion", {"questions": [QUESTION]}), write_where_told, Say("Done."))
    played = await play("claude-agent-acp", script, on_ask_user=answer)
    assert [request.kind for request in asked] == ["elicitation", "elicitation", "permission"]
    assert asked[0].options == ("/app/result.txt", "/app/answer.txt")
    assert_closed(played, "closed/rewarded", reward)
    assert [step["by"] for step in steps_of(played, "question")] == ["handler"] * 3
    assert_metered(played)


# --- through LiteLLM -----------------------------------------------------------------------------------------

OTHERS = [
    ("codex-acp", "openai-chat"),
    ("codex-acp", "anthropic-messages"),
    ("claude-agent-acp", "openai-chat"),
    ("claude-agent-acp", "openai-responses"),
    ("fast-agent", "anthropic-messages"),
    ("fast-agent", "openai-responses"),
]


def require_litellm():
    """Skip where the extra is not installed; fail when `ROLLOUT_REQUIRE` asks for agents. Never imports it."""
    if importlib.util.find_spec("litellm") is None:
        missing("agents", "the litellm extra is not installed")


@pytest.mark.agents
@pytest.mark.litellm
@pytest.mark.parametrize(("agent", "api"), OTHERS)
async def test_a_real_agent_solves_it_with_a_model_that_speaks_another_format(play, agent, api):
    """The provider speaks only `api`, the agent does not: LiteLLM translates, the counts are the provider's."""
    require_litellm()
    played = await play(agent, ShellScript(SOLVE), apis=(api,))
    assert_closed(played, "closed/rewarded", 1.0)
    assert {(call.api, call.status) for call in played.calls} == {(api, 200)}
    assert_metered(played)
    assert_keys_stay_out(played)
