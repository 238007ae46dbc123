"""A user played by a model: alone against a scripted provider, and as the director of whole rollouts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import anyio
import pytest
from aiohttp import web
from harness import FakeVerifier, trace

from orchestrator import Budgets, DirectorRole, Role, Rollout, RolloutConfig, Scene, Turn
from orchestrator.agents.model_user import ModelUser
from orchestrator.capture import read_trajectory
from orchestrator.config import ConfigError
from orchestrator.directors import model_user
from orchestrator.gateway.scripted import Always, Cut, Fail, Hang, Refuse, Say, ScriptedUpstream, ShellScript
from orchestrator.gateway.upstream import Upstream
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.show import story_of, tell
from states.errors import AgentError, ConnectError, ProviderError
from states.ports import ExecResult, Session

pytestmark = pytest.mark.anyio

APIS = ("openai-chat", "openai-responses", "anthropic-messages")
KEY = "provider-key-that-no-artifact-holds"
PERSONA = "You are impatient and want the answer in red."


@pytest.fixture
def anyio_backend():
    """Gateway and model-user are asyncio only."""
    return "asyncio"


async def talking(provider: ScriptedUpstream, api: str = "openai-chat", key: str = KEY):
    """A conversation with this provider."""
    env = {"ROLLOUT_BASE_URL": provider.url, "ROLLOUT_API_KEY": key, "ROLLOUT_MODEL": "m", "ROLLOUT_API": api}
    session = await ModelUser().connect(None, "user", agent_env=env)
    assert isinstance(session, Session)
    return session


# --- alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
async def test_a_prompt_is_one_call_and_the_conversation_is_kept(api):
    """In each wire format, with the key where that format has it; steps are what was said."""
    script = lambda conversation: Say(f"{conversation.prompts}: {conversation.user}")  # noqa: E731
    async with ScriptedUpstream(script, apis=[api], api_key=KEY) as provider:
        session = await talking(provider, api)
        assert [await session.prompt("Hello."), await session.prompt("And?")] == ["end_turn", "end_turn"]
        assert [step["text"] for step in session.steps] == ["Hello.", "1: Hello.", "And?", "2: And?"]
        assert [call.api for call in provider.calls] == [api, api]


@pytest.mark.parametrize("api", APIS)
async def test_a_refusal_is_a_stop_reason_with_its_words(api):
    async with ScriptedUpstream(Always(Refuse("Never.")), apis=[api]) as provider:
        session = await talking(provider, api)
        assert await session.prompt("Hello.") == "refusal"


@pytest.mark.parametrize("api", APIS)
async def test_a_call_that_the_provider_asks_to_repeat_is_repeated(api):
    """Twice; a failure that stays is the provider's, with its status and words."""
    replies = iter([Fail(429, "slow down", retry_after=0), Fail(503, "busy", retry_after=0), Say("Well.")])
    async with ScriptedUpstream(lambda _: next(replies), apis=[api]) as provider:
        session = await talking(provider, api)
        assert await session.prompt("Hello.") == "end_turn"
        assert session.steps[-1]["text"] == "Well."
        provider.script = Always(Fail(503, "still busy", retry_after=0))
        with pytest.raises(ProviderError, match=r"HTTP 503: .*still busy") as caught:
            await session.prompt("Hello?")
        assert (caught.value.status, len(provider.calls)) == (503, 6)
        provider.script = Always(Fail(401, "who are you"))
        with pytest.raises(ProviderError, match="HTTP 401"):
            await session.prompt("Hello?")
        assert len(provider.calls) == 7


async def test_a_provider_that_is_not_there_or_hangs_up_is_a_provider_error(monkeypatch):
    monkeypatch.setattr("orchestrator.agents.model_user.WAIT_SEC", 0)
    async with ScriptedUpstream(Always(Cut("never"))) as provider:
        session = await talking(provider)
        with pytest.raises((ProviderError, AgentError)):
            await session.prompt("Hello.")
    with pytest.raises(ProviderError, match="the model cannot be reached"):
        await session.prompt("Hello.")


@pytest.mark.parametrize("body", ["[]", "nonsense", "{}", '{"choices": []}', '{"choices": [{"message": 3}]}'])
async def test_an_answer_that_cannot_be_read_says_so(body):
    """Whatever a server answers, it is a sentence."""

    async def answer(_request):
        return web.Response(text=body, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    env = {"ROLLOUT_BASE_URL": f"http://127.0.0.1:{runner.addresses[0][1]}", "ROLLOUT_MODEL": "m"}
    session = await ModelUser().connect(None, "user", agent_env=env)
    try:
        with pytest.raises(AgentError, match="the model's answer"):
            await session.prompt("Hello.")
    finally:
        await runner.cleanup()


async def test_a_cancel_ends_the_wait_for_the_model():
    async with ScriptedUpstream(Always(Hang())) as provider:
        session = await talking(provider)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                stops = []

                async def prompt():
                    stops.append(await session.prompt("Hello."))

                group.start_soon(prompt)
                while not provider.waiting:  # noqa: ASYNC110 - a poll, not a pause: the call ends it
                    await anyio.sleep(0.01)
                await session.cancel()
        assert stops == ["cancelled"]


async def test_without_an_endpoint_it_says_what_is_missing():
    with pytest.raises(ConnectError, match=r"the role user \(model-user\) needs a model endpoint"):
        await ModelUser().connect(None, "user", agent_env={"ROLLOUT_MODEL": "m"})


def test_without_asyncio_it_says_so():
    async def connect():
        with pytest.raises(ConnectError, match="needs asyncio"):
            await ModelUser().connect(None, "user", agent_env={})

    anyio.run(connect, backend="trio")


def test_a_user_is_a_role_with_a_brief_that_no_repr_shows():
    user = model_user("openai/m", persona=PERSONA, facts={"order_id": "BF-1042"}, limit=4, turn_sec=9)
    assert isinstance(user, DirectorRole)
    assert (user.role, user.limit) == (Role("user", "model-user", "openai/m", turn_sec=9), 4)
    assert "- order id: BF-1042" in user.brief
    assert PERSONA in user.brief
    assert "BF-1042" not in repr(user)
    assert "What you alone know" not in model_user("m", persona="").brief


# --- as a director -------------------------------------------------------------------------------------------


def script(conversation):
    """The model of everybody: a user who wants two things, and a worker who runs a command and says so."""
    if "You play the user" in conversation.system + conversation.user or not conversation.tools:
        wants = ["Make it red.", "Now tell me the order id that I gave you: BF-1042.", "Thanks.\nDONE"]
        return Say(wants[min(conversation.prompts, len(wants)) - 1])
    return ShellScript("make it", f"I did: {conversation.user[:20]}")(conversation)


async def directed(tmp_path: Path, apis=APIS, **config):
    """A rollout of `minimal` under a model-played user, one provider for both; its result and that provider."""
    async with ScriptedUpstream(script, apis=apis, api_key=KEY) as provider:
        upstream = Upstream("scripted", provider.url, apis, api_key=KEY)
        base = {
            "prompt": "Serve the user.",
            "scene": Scene((Role("agent", "minimal"),)),
            "director": model_user("", persona=PERSONA, facts={"order_id": "BF-1042"}),
            "sandbox": FakeSandbox(on_exec=lambda _: ExecResult("made it\n", "", 0)),
            "verifier": FakeVerifier(),
            "upstream": upstream,
            "out": tmp_path,
            "new_id": lambda: "r1",
        }
        rollout = Rollout(RolloutConfig(**{**base, **config}))
        with anyio.fail_after(60):
            result = await rollout.run()
        return rollout, result, provider


def llm(folder: Path) -> list:
    """The model calls of a rollout."""
    return [json.loads(line) for line in (folder / "llm.jsonl").read_text().splitlines()]


async def test_a_model_plays_the_user(tmp_path, snapshot):
    """It leads until it is satisfied; its calls come through the gateway with a key of its own role."""
    rollout, result, provider = await directed(tmp_path)
    assert (result.state, result.reward, result.turns) == ("closed/rewarded", 1.0, 2)
    told = read_trajectory(result.folder)
    assert [segment.steps[0].data["text"] for segment in told] == [
        "Make it red.",
        "Now tell me the order id that I gave you: BF-1042.",
    ]
    assert re.sub(r', "usage": \{[^}]*\}|"usage": \{[^}]*\},? ?', "", trace(rollout)) == snapshot
    roles = [line["role"] for line in llm(result.folder)]
    assert roles == ["user", "agent", "agent", "user", "agent", "agent", "user"]
    assert result.usage.total == provider.usage
    assert {role: used.calls for role, used in result.usage.by_role.items()} == {"user": 3, "agent": 4}
    assert read_trajectory(result.folder / "director.jsonl")[0].sealed["usage"]["calls"] == 1


async def test_no_artifact_holds_the_providers_key_or_a_rollouts_own(tmp_path):
    """Whatever is in the folder of a rollout with a director."""
    rollout, result, _ = await directed(tmp_path)
    keys = set(rollout._world.models.meter._keys.values())
    assert len(keys) == 2
    for path in result.folder.rglob("*"):
        text = path.read_bytes() if path.is_file() else b""
        assert KEY.encode() not in text, path
        assert not [key for key in keys if key.encode() in text], path


async def test_show_tells_what_the_user_said_and_what_it_spent(tmp_path):
    """Before the turn that it decided; the scene by role has it, too."""
    _, result, _ = await directed(tmp_path)
    text = re.sub(r"[\d,]+ tokens", "N tokens", tell(story_of(result.folder)))
    assert "role      user: model-user (session-factory, scripted)" in text
    assert "  user: directs, asked 3 times; 3 model calls, N tokens" in text
    assert "Before turn 1  user: N tokens\n  < Make it red.\n\nTurn 1  agent: end_turn; 3 steps" in text
    assert "\n\nBefore turn 3  user: N tokens\n  < Thanks. DONE\n" in text
    assert [one["number"] for one in story_of(result.folder).to_json()["asked"]] == [1, 2, 3]


@pytest.mark.parametrize("api", APIS)
async def test_the_user_speaks_the_format_of_its_model(tmp_path, api):
    """Whichever that is, without a translation: the worker here needs none."""
    scene = Scene.single("scripted", name="agent")
    _, result, provider = await directed(
        tmp_path, apis=(api,), scene=scene, director=model_user("", persona="x", limit=2)
    )
    assert result.state == "closed/rewarded", result.verdict
    assert {call.api for call in provider.calls} == {api}


async def test_a_user_whose_model_fails_is_the_providers_failure(tmp_path):
    """Nothing is graded, and the verdict says whose model it was."""
    rollout, result, _ = await directed(
        tmp_path, upstream=Upstream("m", "http://127.0.0.1:9", APIS), scene=Scene((Role("agent", "noop"),))
    )
    assert (result.state, result.verdict.owner) == ("closed/failed", "provider")
    assert "the model of the director user failed" in result.verdict.reason
    assert rollout.result().reward is None


async def test_a_user_whose_budget_is_spent_ends_the_plan(tmp_path):
    """Nobody has failed, and the work is verified."""
    user = model_user("", persona=PERSONA, budgets=Budgets(tokens=10))
    rollout, result, _ = await directed(tmp_path, director=user)
    assert (result.state, result.reward, result.turns) == ("closed/rewarded", 1.0, 1), result.verdict
    why = next(record.event.why for record in rollout.journal if getattr(record, "dest", "") == "verifying")
    assert "user" in why
    assert "tokens" in why
    assert result.usage.by_role["user"].calls == 1


async def test_without_the_gateway_the_user_says_so_or_brings_an_endpoint(tmp_path):
    """usage_tracking off: a sentence; or an upstream or an endpoint of its own, called directly."""
    with pytest.raises(
        ConfigError, match="calls a model through the gateway, but usage_tracking is off; to go without"
    ):
        await directed(tmp_path, usage_tracking="off", upstream=None, scene=Scene((Role("agent", "noop"),)))
    _, result, provider = await directed(tmp_path, usage_tracking="off")
    assert (result.state, result.usage.tracking) == ("closed/rewarded", "untracked")
    assert {call.key for call in provider.calls} == {KEY}
    async with ScriptedUpstream(script) as own:
        env = {"OPENAI_BASE_URL": own.url, "OPENAI_API_KEY": "my-own-key"}
        user = model_user("mine", persona=PERSONA, env=env)
        config = {"scene": Scene((Role("agent", "noop"),)), "upstream": None, "new_id": lambda: "r2"}
        _, result, _ = await directed(tmp_path, usage_tracking="off", director=user, **config)
        assert result.state == "closed/rewarded", result.verdict
        assert {call.request["model"] for call in own.calls} == {"mine"}


async def test_the_workers_alone_say_whether_nothing_was_done(tmp_path):
    """A director that calls a model does not put an agent without one under the zero-activity guard."""
    scene = Scene((Role("agent", "noop"),), (Turn("agent"),))
    rollout, result, _ = await directed(tmp_path, scene=scene)
    assert not rollout._world.rules.metered
    assert result.state == "closed/rewarded"
