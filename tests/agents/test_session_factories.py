"""The adapters of real in-process agents, against a scripted provider and a sandbox in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading

import anyio
import attrs
import pytest
from aiohttp import web
from requirements import missing

from orchestrator.agents.factories import common, mini_swe_agent, omnigent, pydantic_ai
from orchestrator.gateway.scripted import Always, Fail, Hang, Refuse, Say, ScriptedUpstream, Shell, ShellScript, Steps
from orchestrator.registry import default_registry
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.transports.gate import GatedHandle
from states.errors import (
    AgentError,
    ConnectError,
    ExecTimeout,
    HandleRevoked,
    MissingExtra,
    ProviderError,
    SandboxError,
)
from states.ports import AgentCapabilities, ExecResult, Session

pytestmark = pytest.mark.anyio

EXTRAS = {"pydantic-ai": "pydantic_ai", "mini-swe-agent": "minisweagent"}
BUILDS = {"pydantic-ai": pydantic_ai.build, "mini-swe-agent": mini_swe_agent.build}
both = pytest.mark.parametrize("agent", BUILDS)


def require_extra(agent):
    """Skip where an agent's extra is not installed, fail where `ROLLOUT_REQUIRE` asks for agents. Imports nothing."""
    if importlib.util.find_spec(EXTRAS[agent]) is None:
        missing("agents", f"the extra {agent} is not installed")


@attrs.define(eq=False)
class Desk:
    """A session of `agent`, the provider that it calls, and the sandbox in memory that it works in."""

    session: Session
    provider: ScriptedUpstream
    gate: GatedHandle
    commands: list

    @property
    def last_request(self):
        return self.provider.calls[-1].request["messages"]

    def steps(self, kind):
        return [step for step in self.session.steps if step["type"] == kind]


@pytest.fixture
async def sit(monkeypatch):
    """To be awaited, `sit(agent, script, on_exec=None, **env)`: a `Desk`. The process's own environment misleads."""
    for name, value in {
        "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
        "OPENAI_API_KEY": "key-of-the-host",
        "OPENAI_ORG_ID": "organisation-of-the-host",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    async with contextlib.AsyncExitStack() as stack:

        async def sit(agent, script, on_exec=None, **env):
            require_extra(agent)
            provider = await stack.enter_async_context(ScriptedUpstream(script, api_key="key-of-the-role"))
            commands = []

            async def run(call):
                if call.command.startswith("uname"):
                    return ExecResult("Linux\nbox\n6.1\n#1\nx86_64\n", "", 0)
                commands.append(call.command)
                if mini_swe_agent.SUBMIT in call.command:
                    return ExecResult(f"{mini_swe_agent.SUBMIT}\n", "", 0)
                answer = on_exec(call) if on_exec else ExecResult("printed", "", 0)
                return await answer if hasattr(answer, "__await__") else answer

            sandbox = FakeSandbox(on_exec=run)
            await sandbox.start()
            handle = sandbox.handle("coder")
            await handle.open()
            gate = GatedHandle("/app", handle)
            gate.open()
            agent_env = {"ROLLOUT_BASE_URL": provider.url, "ROLLOUT_API_KEY": "key-of-the-role", "ROLLOUT_MODEL": "m"}
            session = await BUILDS[agent]().connect(gate, "coder", agent_env=agent_env | env)
            stack.push_async_callback(session.close)
            return Desk(session, provider, gate, commands)

        yield sit


class Stuck:
    """A command that never ends; `began` is set when it runs."""

    def __init__(self):
        self.began = anyio.Event()

    async def __call__(self, _call):
        self.began.set()
        await anyio.sleep_forever()


async def cancelled_when(desk, ready):
    """What a prompt returns that is cancelled once `ready()` has returned."""
    stops = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:

            async def prompt():
                stops.append(await desk.session.prompt("go"))

            group.start_soon(prompt)
            await ready()
            await desk.session.cancel()
    return stops[0]


# --- both ----------------------------------------------------------------------------------------------------------


@both
async def test_a_session_shows_its_steps_as_they_come_and_calls_only_what_its_role_was_given(sit, agent):
    """Prompt, call, result, words, each told at once; URL, key, proxy of the process's own environment are not used."""
    desk = await sit(agent, Steps(Shell("make"), Say("It is made.")))
    seen = []
    desk.session.on_change = lambda session: seen.append(
        (threading.current_thread() is threading.main_thread(), session.steps[-1].get("status"))
    )
    assert await desk.session.prompt("make it") == "end_turn"
    assert isinstance(desk.session, Session)
    assert all(on_loop for on_loop, _ in seen)
    statuses = [status for _, status in seen]
    assert statuses.index("in_progress") < statuses.index("completed")
    assert desk.session.steps[0] == {"type": "user_message", "text": "make it"}
    call = desk.steps("tool_call")[0]
    assert (call["kind"], call["title"], call["raw_input"], call["status"]) == (
        "execute", "make", {"command": "make"}, "completed",
    )  # fmt: skip
    assert call["content"] == [{"type": "content", "content": {"type": "text", "text": "printed\n(exit code 0)"}}]
    assert desk.commands[0] == "make"
    assert {call.key for call in desk.provider.calls} == {"key-of-the-role"}


@both
async def test_a_second_prompt_goes_on_from_the_first(sit, agent):
    """The provider sees one conversation: both prompts, and an answer to every tool call."""
    desk = await sit(agent, Steps(Shell("make"), Say("made")))
    assert [await desk.session.prompt(text) for text in ("first words", "second words")] == ["end_turn", "end_turn"]
    users = [message["content"] for message in desk.last_request if message["role"] == "user"]
    assert ["first words" in users[0], "second words" in users[-1]] == [True, True]
    called = [call["id"] for message in desk.last_request for call in message.get("tool_calls") or ()]
    answered = [message["tool_call_id"] for message in desk.last_request if message["role"] == "tool"]
    assert called == answered
    assert [message["role"] for message in desk.last_request].count("system") == 1


@both
async def test_a_provider_that_refuses_the_key_is_a_provider_error_with_its_status(sit, agent):
    """401 is not tried again; the next prompt of the session works."""
    desk = await sit(agent, Always(Fail(401, "wrong key")))
    with pytest.raises(ProviderError, match=r"401.*wrong key") as raised:
        await desk.session.prompt("go")
    assert raised.value.status == 401
    assert len(desk.provider.calls) == 1
    desk.provider.script = ShellScript("make")
    assert await desk.session.prompt("again") == "end_turn"


@both
async def test_a_provider_that_is_not_there_is_a_provider_error_without_a_status(sit, agent):
    """Nothing listens: that is said, with the error that it was."""
    desk = await sit(agent, ShellScript("make"))
    await desk.provider.stop()
    with pytest.raises(ProviderError) as raised:
        await desk.session.prompt("go")
    assert raised.value.status is None


@both
async def test_a_refusal_of_the_model_ends_the_turn_as_one_and_its_words_are_kept(sit, agent):
    """The stop reason is `refusal`; what the model said instead is the last step."""
    desk = await sit(agent, Always(Refuse("I would rather not.")))
    assert await desk.session.prompt("go") == "refusal"
    assert desk.session.steps[-1] == {"type": "agent_message", "text": "I would rather not."}


@both
async def test_a_cancel_in_mid_command_ends_the_command_and_the_turn(sit, agent):
    """`cancelled`, the call failed, and the session is good for another prompt."""
    stuck = Stuck()
    desk = await sit(agent, ShellScript("make"), stuck)
    assert await cancelled_when(desk, stuck.began.wait) == "cancelled"
    assert [call["status"] for call in desk.steps("tool_call")] == ["failed"]
    desk.provider.script = Always(Refuse())
    assert await desk.session.prompt("go on") == "refusal"


@both
async def test_a_cancel_while_the_model_thinks_hangs_up_on_it(sit, agent):
    """A provider that never answers does not hold a cancelled turn."""
    desk = await sit(agent, Always(Hang()))

    async def asked():
        while not desk.provider.waiting:  # noqa: ASYNC110 - a counter of the provider's
            await anyio.sleep(0.01)

    assert await cancelled_when(desk, asked) == "cancelled"


@both
async def test_closing_a_session_ends_its_turn(sit, agent):
    """`close` while a command runs: the prompt returns."""
    stuck = Stuck()
    desk = await sit(agent, ShellScript("make"), stuck)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(desk.session.prompt, "go")
            await stuck.began.wait()
            await desk.session.close()


@both
async def test_a_command_that_outlasts_its_limit_is_the_models_to_deal_with(sit, agent):
    """What it had printed and that it was ended reach the model; the turn goes on."""

    def slow(call):
        raise ExecTimeout("it outlasted its limit", stdout="half of it")

    desk = await sit(agent, ShellScript("make"), slow)
    assert await desk.session.prompt("go") == "end_turn"
    told = next(message["content"] for message in desk.last_request if message["role"] == "tool")
    assert "half of it" in told
    assert "it outlasted its limit" in told


@both
async def test_a_sandbox_that_fails_ends_the_turn_with_its_own_error(sit, agent):
    """The model is not told that its sandbox is gone: whoever owns it is."""

    def broken(_call):
        raise SandboxError("the disk is gone")

    desk = await sit(agent, ShellScript("make"), broken)
    with pytest.raises(SandboxError, match="the disk is gone"):
        await desk.session.prompt("go")
    assert desk.steps("tool_call")[0]["status"] == "failed"


@both
async def test_a_revoked_handle_ends_the_turn(sit, agent):
    """`HandleRevoked` where a command is wanted, and none is run."""
    desk = await sit(agent, ShellScript("make"))
    await desk.gate.revoke()
    with pytest.raises(HandleRevoked):
        await desk.session.prompt("go")
    assert desk.commands == []


@both
@pytest.mark.parametrize(
    ("env", "missing"),
    [({}, "needs a model"), ({"ROLLOUT_MODEL": "m"}, "needs a model endpoint")],
    ids=["no model", "no endpoint"],
)
async def test_without_a_model_to_call_a_session_does_not_come_up(agent, env, missing, monkeypatch):
    """A `ConnectError` that names what could be set, and no second try; the process's own variables do not count."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-host")
    with pytest.raises(ConnectError, match=missing) as raised:
        await BUILDS[agent]().connect(None, "coder", agent_env=env)
    assert not raised.value.retryable


@both
async def test_an_extra_that_is_not_installed_is_named(agent, monkeypatch):
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, EXTRAS[agent], None)
    mini_swe_agent._library.cache_clear()
    env = {"ROLLOUT_MODEL": "m", "ROLLOUT_BASE_URL": "http://127.0.0.1:9"}
    with pytest.raises(MissingExtra, match=rf"pip install 'rollout-orchestrator\[{agent}\]'"):
        await BUILDS[agent]().connect(None, "coder", agent_env=env)


@pytest.mark.parametrize(
    ("env", "base_url", "key"),
    [
        (
            {"ROLLOUT_BASE_URL": "http://a:1", "ROLLOUT_API_KEY": "k", "OPENAI_BASE_URL": "http://b"},
            "http://a:1/v1",
            "k",
        ),
        ({"BENCHFLOW_PROVIDER_BASE_URL": "http://a/v1/", "BENCHFLOW_PROVIDER_API_KEY": "k"}, "http://a/v1", "k"),
        ({"OPENAI_BASE_URL": "https://c/v1", "ROLLOUT_API_KEY": "of another family"}, "https://c/v1", ""),
    ],
    ids=["ours first", "BenchFlow's", "a key belongs to its URL"],
)
def test_an_endpoint_is_read_from_one_family_of_variables(env, base_url, key):
    """URL and key go together, /v1 is there once, and the key is not in its repr."""
    endpoint = common.Endpoint.of({"ROLLOUT_MODEL": "m", **env}, "an agent")
    assert (endpoint.base_url, endpoint.model, endpoint.api_key) == (base_url, "m", key)
    assert "api_key" not in repr(endpoint)


def test_a_long_output_is_shown_without_its_middle():
    """Both ends are there, and how much is not."""
    shown = common.observation(ExecResult("a" * 30_000 + "z", "", 0))
    assert len(shown) < 20_100
    assert shown.startswith("aaa")
    assert "... 10001 characters left out ..." in shown
    assert shown.endswith("z\n(exit code 0)")


def test_the_manifests_of_all_three_resolve():
    """They ship, they pass the registry's checks, and what they build says what it can do."""
    registry = default_registry()
    for name, build in {**BUILDS, "omnigent": omnigent.build}.items():
        assert registry.get(name).protocol == "session-factory"
        assert build().capabilities() == AgentCapabilities(ask_user=name == "pydantic-ai")


# --- what no script of a well-behaved provider says ----------------------------------------------------------------


@pytest.fixture
async def raw():
    """To be awaited, `raw(*bodies)`: the URL of a provider that answers with these, one a call; bytes are a stream."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*bodies):
            left = list(bodies)

            async def answer(_request):
                body = left.pop(0)
                if isinstance(body, bytes):
                    return web.Response(body=body, content_type="text/event-stream")
                return web.Response(text=body if isinstance(body, str) else json.dumps(body))

            app = web.Application()
            app.router.add_post("/v1/chat/completions", answer)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return f"http://127.0.0.1:{runner.addresses[0][1]}"

        yield start


def reply(**message):
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}]}


def bash_call(arguments, call_id="a"):
    return {"id": call_id, "index": 0, "type": "function", "function": {"name": "bash", "arguments": arguments}}


def stream(*deltas, finish="stop"):
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunks = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    chunks.append({"index": 0, "delta": {}, "finish_reason": finish})
    lines = [json.dumps({**head, "choices": [chunk]}) for chunk in chunks]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


async def test_mini_swe_agent_keeps_thoughts_and_calls_that_are_no_json(sit, raw):
    """The thought is a step, the broken call one as the model wrote it; the agent is told what was wrong with it."""
    submit = json.dumps({"command": f"echo {mini_swe_agent.SUBMIT}"})
    first = reply(reasoning_content="hm", content="I call.", tool_calls=[bash_call("{", "broken")])
    url = await raw(first, reply(content="", tool_calls=[bash_call(submit)]))
    desk = await sit("mini-swe-agent", Always(Hang()), ROLLOUT_BASE_URL=url)
    assert await desk.session.prompt("go") == "end_turn"
    assert [(step["type"], step.get("text") or step.get("raw_input")) for step in desk.session.steps] == [
        ("user_message", "go"),
        ("agent_thought", "hm"),
        ("agent_message", "I call."),
        ("tool_call", {"INVALID_JSON": "{"}),
        ("tool_call", json.loads(submit)),
    ]


@pytest.mark.parametrize(("body", "why"), [("no json", "is no JSON"), ({"choices": []}, "holds no message")])
async def test_mini_swe_agent_takes_no_answer_that_is_none(sit, raw, body, why):
    """200 with rubbish is the provider's failure, and is not tried again."""
    desk = await sit("mini-swe-agent", Always(Hang()), ROLLOUT_BASE_URL=await raw(body))
    with pytest.raises(ProviderError, match=why) as raised:
        await desk.session.prompt("go")
    assert raised.value.status == 200


async def test_pydantic_ai_streams_thoughts_and_words_as_they_grow(sit, raw):
    """Each piece is told as it comes; together they are one thought and one message."""
    pieces = [{"reasoning_content": "h"}, {"reasoning_content": "m"}, {"content": "It is "}, {"content": "done."}]
    desk = await sit("pydantic-ai", Always(Hang()), ROLLOUT_BASE_URL=await raw(stream(*pieces)))
    seen = []
    desk.session.on_change = lambda session: seen.append(session.steps[-1]["text"])
    assert await desk.session.prompt("go") == "end_turn"
    assert seen == ["go", "h", "hm", "It is ", "It is done."]
    assert [step["type"] for step in desk.session.steps] == ["user_message", "agent_thought", "agent_message"]


async def test_pydantic_ai_tells_the_model_of_a_call_that_is_no_json(sit, raw):
    """The call is a step that failed, with what the model is told; nothing is run."""
    broken = stream({"tool_calls": [bash_call("[1")]}, finish="tool_calls")
    url = await raw(broken, stream({"content": "Sorry."}))
    desk = await sit("pydantic-ai", Always(Hang()), ROLLOUT_BASE_URL=url)
    assert await desk.session.prompt("go") == "end_turn"
    (call,) = desk.steps("tool_call")
    assert (call["status"], call["raw_input"]) == ("failed", {"INVALID_JSON": "[1"})
    assert "JSON" in call["content"][0]["content"]["text"]
    assert desk.commands == []


async def test_pydantic_ai_says_when_the_model_had_no_room_left(sit, raw):
    """An answer that was cut off ends the turn as `max_tokens`."""
    desk = await sit(
        "pydantic-ai", Always(Hang()), ROLLOUT_BASE_URL=await raw(stream({"content": "It"}, finish="length"))
    )
    assert await desk.session.prompt("go") == "max_tokens"


# --- pydantic-ai ---------------------------------------------------------------------------------------------------


async def test_pydantic_ai_asks_before_a_command_where_approvals_are_on(sit):
    """A plain handler and an async one; the call is pending meanwhile."""
    desk = await sit("pydantic-ai", ShellScript("rm -r build"), ROLLOUT_APPROVALS="ask")
    asked = []

    async def approve(request):
        asked.append((request.kind, request.option_kinds, desk.steps("tool_call")[-1]["status"]))
        return "approve"

    desk.session.on_ask_user(approve)
    assert await desk.session.prompt("clean up") == "end_turn"
    assert asked == [("approval", ("allow_once", "reject_once"), "pending")]
    assert desk.commands == ["rm -r build"]
    assert [call["status"] for call in desk.steps("tool_call")] == ["completed"]
    desk.session.on_ask_user(lambda _request: "deny")
    assert await desk.session.prompt("once more") == "end_turn"
    assert desk.commands == ["rm -r build"]
    assert [call["status"] for call in desk.steps("tool_call")] == ["completed", "failed"]


async def test_pydantic_ai_with_approvals_and_nobody_to_ask_runs_nothing(sit):
    """Cleared with None: no command is approved, and the model is told."""
    desk = await sit("pydantic-ai", ShellScript("rm -r build"), ROLLOUT_APPROVALS="ask")
    desk.session.on_ask_user(lambda _request: "approve")
    desk.session.on_ask_user(None)
    assert await desk.session.prompt("clean up") == "end_turn"
    assert desk.commands == []
    assert "denied" in next(message["content"] for message in desk.last_request if message["role"] == "tool")


async def test_pydantic_ai_cancelled_while_it_asks_is_good_for_another_prompt(sit):
    """The call that was never answered does not stay in the conversation."""
    desk = await sit("pydantic-ai", ShellScript("make"), ROLLOUT_APPROVALS="ask")
    asked = anyio.Event()

    async def never(_request):
        asked.set()
        await anyio.sleep_forever()

    desk.session.on_ask_user(never)
    assert await cancelled_when(desk, asked.wait) == "cancelled"
    desk.session.on_ask_user(lambda _request: "approve")
    assert await desk.session.prompt("again") == "end_turn"
    assert desk.commands == ["make"]


def test_pydantic_ai_says_that_it_needs_asyncio():
    """On trio no session comes up, and no second try is made."""

    async def connect():
        await pydantic_ai.build().connect(None, "r", {"ROLLOUT_MODEL": "m", "ROLLOUT_BASE_URL": "http://127.0.0.1:9"})

    with pytest.raises(ConnectError, match="asyncio") as raised:
        anyio.run(connect, backend="trio")
    assert not raised.value.retryable


# --- mini-swe-agent ------------------------------------------------------------------------------------------------

QUIET_IMPORT = """
import logging, os, sys
import anyio
from orchestrator.agents.factories import mini_swe_agent
before = dict(os.environ), list(logging.root.handlers)
library = mini_swe_agent._library()
assert library.DefaultAgent.__module__ == "minisweagent.agents.default"
assert (dict(os.environ), list(logging.root.handlers)) == before
assert not logging.getLogger("minisweagent").handlers
assert not [name for name in sys.modules if name.split(".")[0] in ("minisweagent", "litellm")]
"""


@pytest.mark.parametrize("host", ["", "import minisweagent; assert minisweagent.global_config_dir\n"])
def test_importing_mini_swe_agent_leaves_no_trace_in_the_process(tmp_path, host):
    """No output, no file in HOME, no variable, no log handler; a host that imports it afterwards gets the real one."""
    require_extra("mini-swe-agent")
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "MSWEA_SILENT_STARTUP": "1" if host else ""}
    run = [sys.executable, "-c", QUIET_IMPORT + host]
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert bool(list(tmp_path.iterdir())) == bool(host)


def test_a_host_that_has_imported_mini_swe_agent_keeps_it(tmp_path):
    """Its modules are used then, and stay where they are."""
    require_extra("mini-swe-agent")
    code = """
import minisweagent, sys
from orchestrator.agents.factories import mini_swe_agent
library = mini_swe_agent._library()
assert sys.modules["minisweagent"] is minisweagent
assert sys.modules["minisweagent.agents.default"].DefaultAgent is library.DefaultAgent
"""
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "MSWEA_SILENT_STARTUP": "1"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


async def test_mini_swe_agent_tries_a_busy_provider_again(sit, monkeypatch):
    """503 twice, then an answer: the turn goes on."""
    monkeypatch.setattr(mini_swe_agent, "RETRY_PAUSES", (0.0, 0.0))
    busy = iter([Fail(503), Fail(429)])
    solve = ShellScript("make")
    desk = await sit("mini-swe-agent", lambda conversation: next(busy, None) or solve(conversation))
    assert await desk.session.prompt("go") == "end_turn"
    assert [call.status for call in desk.provider.calls] == [503, 429, 200, 200]


async def test_mini_swe_agent_gives_up_on_a_model_that_calls_no_tool(sit):
    """Its own rule: three replies without a command. What the model said is kept."""
    desk = await sit("mini-swe-agent", Always(Say("I would think about it.")))
    with pytest.raises(AgentError, match="RepeatedFormatError"):
        await desk.session.prompt("go")
    assert [step["text"] for step in desk.steps("agent_message")] == ["I would think about it."] * 3


async def test_mini_swe_agent_left_behind_in_a_command_ends_when_that_is_revoked(sit):
    """Its prompt is cancelled from outside and its handle revoked: the thread runs no further command."""
    stuck = Stuck()
    desk = await sit("mini-swe-agent", ShellScript("make"), stuck)
    async with anyio.create_task_group() as group:
        group.start_soon(desk.session.prompt, "go")
        await stuck.began.wait()
        group.cancel_scope.cancel()
    await desk.gate.revoke()
    assert desk.commands == ["make"]
    assert desk.steps("tool_call")[0]["status"] == "failed"


def test_mini_swe_agent_runs_on_trio(tmp_path):
    """The whole turn, and a cancel in mid-command, on trio; the provider is a process of its own."""
    require_extra("mini-swe-agent")
    serve = [sys.executable, "-m", "orchestrator.gateway.scripted", "--command", "make"]
    stuck = []

    async def run(call):
        if stuck and call.command == "make":
            await stuck[0](call)
        if mini_swe_agent.SUBMIT in call.command:
            return ExecResult(f"{mini_swe_agent.SUBMIT}\n", "", 0)
        return ExecResult("", "", 0)

    async def play(url):
        sandbox = FakeSandbox(on_exec=run)
        await sandbox.start()
        handle = sandbox.handle("coder")
        await handle.open()
        session = await mini_swe_agent.build().connect(handle, "coder", {"ROLLOUT_MODEL": "m", "ROLLOUT_BASE_URL": url})
        assert await session.prompt("go") == "end_turn"
        stuck.append(Stuck())
        desk = Desk(session, None, None, [])
        assert await cancelled_when(desk, stuck[0].began.wait) == "cancelled"
        await session.close()

    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as provider:
        try:
            anyio.run(play, provider.stdout.readline().strip(), backend="trio")
        finally:
            provider.terminate()
