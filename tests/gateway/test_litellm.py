"""Calls whose wire format is not the provider's, through LiteLLM's process: the table, its death and its end."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest

from orchestrator.budgets import Budgets, Limits
from orchestrator.gateway import upstream as upstream_module
from orchestrator.gateway.formats import FORMATS
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.scripted import Always, Fail, Hang, Say, ScriptedUpstream, ShellScript
from orchestrator.gateway.server import Gateway
from orchestrator.gateway.upstream import Upstream
from states.errors import MissingExtra, OrchestratorError
from states.events import Usage

pytestmark = pytest.mark.litellm

PRICES = Prices(3e-6, 15e-6, 3e-7, 3.75e-6)
KEY = "sk-provider-secret-0123456789"
COMMAND = "echo 42 > /app/answer.txt"
WORDS = "Everything is done, as far as I can tell from here; have a look."
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
CELLS = [(client, upstream, stream) for client in FORMATS for upstream in FORMATS for stream in (False, True)]
NAMES = [f"{client}-over-{upstream}-{'streamed' if stream else 'plain'}" for client, upstream, stream in CELLS]
every_cell = pytest.mark.parametrize(("client", "speaks", "stream"), CELLS, ids=NAMES)


class Leases:
    """Remembers what it is told, as the journal would."""

    def __init__(self):
        self.told = []

    def intend(self, kind, name):
        self.told.append(("intend", kind, name))

    def hold(self, kind, name, handle):
        self.told.append(("hold", kind, name, handle["pid"]))

    def returned(self, kind, name):
        self.told.append(("returned", kind, name))


class Stage:
    """One gateway with one LiteLLM process on one event loop, for all tests of this module: it starts slowly."""

    def __init__(self):
        self.runner, self.leases = asyncio.Runner(), Leases()
        self.gateway = Gateway(leases=self.leases, drain_sec=10.0)

    def run(self, coroutine):
        return self.runner.run(coroutine)

    async def post(self, api, body, key):
        header = {"Authorization": f"Bearer {key}"}
        async with (
            aiohttp.ClientSession() as client,
            client.post(self.gateway.url + FORMATS[api].path, json=body, headers=header) as answer,
        ):
            return answer.status, await answer.read(), answer.headers


@pytest.fixture(scope="module")
def stage():
    found = Stage()
    found.run(found.gateway.start())
    yield found
    found.run(found.gateway.stop())
    found.runner.close()


class Cell:
    """A provider that speaks one format, and a meter for it."""

    def __init__(self, stage, speaks, script):
        self.stage, self.speaks, self.lines = stage, speaks, []
        self.provider = ScriptedUpstream(script, apis=[speaks], prices=PRICES, api_key=KEY)

    async def __aenter__(self):
        await self.provider.start()
        upstream = Upstream("scripted", self.provider.url, [self.speaks], KEY, prices=PRICES)
        self.meter = self.stage.gateway.open("r1", upstream=upstream, sink=self.lines.append)
        return self

    async def __aexit__(self, *_):
        self.meter.close()
        await self.provider.stop()


def alive(pid):
    return Path(f"/proc/{pid}").exists()


def request(api, *, stream=False, text="solve it"):
    """A first request with one shell tool."""
    body = {"model": "alias", "stream": stream}
    if api == "openai-responses":
        tool = {"type": "function", "name": "bash", "parameters": SCHEMA}
        return body | {"input": [{"role": "user", "content": text}], "tools": [tool]}
    function = {"type": "function", "function": {"name": "bash", "parameters": SCHEMA}}
    chat = api == "openai-chat"
    tool = function if chat else {"name": "bash", "input_schema": SCHEMA}
    body |= {"messages": [{"role": "user", "content": text}], "tools": [tool]}
    return body if chat else body | {"max_tokens": 1000}


@every_cell
def test_text_tool_call_and_tool_result_cross_every_pair_of_formats(stage, client, speaks, stream):
    """Real SDKs hold a whole conversation; tokens and cost are exactly what the provider counted."""
    talk = pytest.importorskip("sdk_clients").TALKS[client]

    async def scenario():
        async with Cell(stage, speaks, ShellScript(COMMAND, WORDS)) as cell:
            said = await talk(stage.gateway.url, cell.meter.key, stream=stream)
            assert said == ({"command": COMMAND}, WORDS)
            used = await cell.meter.settle()
            assert used == cell.provider.usage
            assert used.calls == 2
            assert used.cost > 0
            assert used.cache_read_input_tokens > 0
            assert {line["via"] for line in cell.lines} == {"passthrough" if client == speaks else "litellm"}
            assert [call.api for call in cell.provider.calls] == [speaks] * 2
            assert [call.request["model"] for call in cell.provider.calls] == ["scripted"] * 2
            assert WORDS in json.dumps(cell.lines[-1]["response"])
            assert KEY not in json.dumps(cell.lines)
            assert cell.meter.key not in json.dumps(cell.lines)

    stage.run(scenario())


@every_cell
def test_a_429_stays_a_429_with_its_words_and_its_retry_after(stage, client, speaks, stream):
    """Agents back off by status and header: translation must not eat them, nor try again by itself."""

    async def scenario():
        async with Cell(stage, speaks, Always(Fail(429, "slow down", retry_after=3))) as cell:
            status, raw, headers = await stage.post(client, request(client, stream=stream), cell.meter.key)
            assert (status, headers["Retry-After"]) == (429, "3")
            said = json.loads(raw)
            assert (said["error"]["type"], said["error"]["message"]) == ("rate_limit_error", "slow down")
            assert await cell.meter.settle() == cell.provider.usage == Usage(calls=1, failed_calls=1)
            assert cell.meter.provider_failure() == "HTTP 429 from scripted: slow down"

    stage.run(scenario())


@every_cell
def test_a_budget_holds_for_translated_calls_too(stage, client, speaks, stream):
    """The provider is asked for no more than what is left, in its own word; then nobody is asked."""

    async def scenario():
        async with Cell(stage, speaks, Always(Say(" ".join(map(str, range(9_000)))))) as cell:
            upstream = Upstream("scripted", cell.provider.url, [speaks], KEY, prices=PRICES)
            limits = Limits(Budgets(tokens=900))
            cell.meter = stage.gateway.open("r2", upstream=upstream, sink=cell.lines.append, limits=limits)
            key = cell.meter.key_for("agent")
            assert (await stage.post(client, request(client, stream=stream), key))[0] == 200
            used = await cell.meter.settle()
            assert [FORMATS[speaks].output_limit(call.request) for call in cell.provider.calls] == [900]
            assert used == cell.provider.usage
            assert used.tokens - 900 == used.input_tokens
            status, raw, _ = await stage.post(client, request(client, stream=stream), key)
            assert status == FORMATS[client].refusal
            assert "budget of 900 tokens is spent" in json.loads(raw)["error"]["message"]
            assert await cell.meter.settle() == used
            assert [line["via"] for line in cell.lines][1:] == ["refused"]

    stage.run(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_client_that_hangs_up_on_a_translated_call_loses_no_usage(stage, stream):
    """Whether the provider is still thinking or in mid-stream: what it counted is counted."""

    async def scenario():
        script = Always(Say(WORDS, delay=0 if stream else 0.2, pause=0.02))
        async with Cell(stage, "anthropic-messages", script) as cell:
            asking = asyncio.create_task(
                stage.post("openai-chat", request("openai-chat", stream=stream), cell.meter.key)
            )
            while not cell.provider.calls:  # noqa: ASYNC110 - a list is what the provider offers
                await asyncio.sleep(0.001)
            asking.cancel()
            await asyncio.wait([asking])
            assert await cell.meter.settle() == cell.provider.usage
            assert cell.lines[0]["hung_up"]

    stage.run(scenario())


def test_what_only_one_provider_understands_is_left_out_of_a_translation(stage):
    """Codex offers tools of its own kinds, Claude Code sends its own fields: they stay out, the rest goes through."""

    async def scenario():
        codex = request("openai-responses", stream=True) | {
            "instructions": "You are a coding agent.", "include": ["reasoning.encrypted_content"], "store": False,
            "parallel_tool_calls": False, "prompt_cache_key": "x", "reasoning": {"effort": "medium", "summary": "auto"},
            "tool_choice": "auto", "text": {"verbosity": "low"},
        }  # fmt: skip
        codex["tools"] += [
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
            {"type": "web_search"},
        ]
        codex["input"].insert(0, {"type": "reasoning", "summary": [], "encrypted_content": "x"})
        claude = request("anthropic-messages", stream=True) | {
            "system": [{"type": "text", "text": "You are Claude.", "cache_control": {"type": "ephemeral"}}],
            "metadata": {"user_id": "u"}, "thinking": {"type": "enabled", "budget_tokens": 1024}, "temperature": 1,
            "context_management": {"edits": []},
        }  # fmt: skip
        claude["tools"].append({"type": "web_search_20250305", "name": "web_search"})
        for client, body in (("openai-responses", codex), ("anthropic-messages", claude)):
            for speaks in FORMATS:
                if speaks != client:
                    async with Cell(stage, speaks, ShellScript(COMMAND)) as cell:
                        status, raw, _ = await stage.post(client, body, cell.meter.key)
                        assert (status, b"42" in raw) == (200, True), (client, speaks, raw[:2000])
                        assert await cell.meter.settle() == cell.provider.usage

    stage.run(scenario())


def test_a_provider_that_only_litellm_can_reach_is_metered_by_what_litellm_reports(stage):
    """Without a wire format of its own, the reply's usage counts; the user's prices apply."""

    async def scenario():
        async with ScriptedUpstream(
            ShellScript(COMMAND, WORDS), apis=["anthropic-messages"], prices=PRICES
        ) as provider:
            route = Upstream("x", provider.url, api_key=KEY, litellm_model="anthropic/scripted", prices=PRICES)
            for client in FORMATS:
                for stream in (False, True):
                    before, lines = provider.usage, []
                    meter = stage.gateway.open("r9", upstream=route, sink=lines.append)
                    status, _, _ = await stage.post(client, request(client, stream=stream), meter.key)
                    assert status == 200
                    used, reported = await meter.settle(), provider.usage - before
                    assert used == reported, (client, stream, lines[0]["response"])
                    meter.close()

    stage.run(scenario())


def test_the_process_is_a_lease_and_this_process_never_imports_litellm(stage):
    """Intended before it starts, held with its pid; our own interpreter stays free of it."""

    async def scenario():
        async with Cell(stage, "openai-chat", Always(Say(WORDS))) as cell:
            await stage.post("anthropic-messages", request("anthropic-messages"), cell.meter.key)
        assert [entry[0] for entry in stage.leases.told[:2]] == ["intend", "hold"]
        assert stage.leases.told[-1][3] == stage.gateway.litellm.pid
        assert "litellm" not in sys.modules

    stage.run(scenario())


def test_when_it_dies_the_call_says_so_and_the_next_one_has_a_new_process(stage):
    """A dead translator is our failure, not the provider's; it is forgotten once a call succeeds."""

    async def scenario():
        async with Cell(stage, "openai-chat", Always(Hang())) as cell:
            body = request("anthropic-messages")
            asking = asyncio.create_task(stage.post("anthropic-messages", body, cell.meter.key))
            while not cell.provider.waiting:  # noqa: ASYNC110 - a counter is what the provider offers
                await asyncio.sleep(0.001)
            old = stage.gateway.litellm.pid
            os.kill(old, signal.SIGKILL)
            status, raw, _ = await asking
            assert (status, b"litellm broke off" in raw) == (502, True)
            assert "litellm broke off" in str(cell.meter.error)
            assert cell.meter.provider_failure() is None
            cell.provider.script = Always(Say(WORDS))
            assert (await stage.post("anthropic-messages", body, cell.meter.key))[0] == 200
            assert cell.meter.error is None
            assert stage.gateway.litellm.pid != old

    stage.run(scenario())


def test_the_process_is_gone_after_stop(tmp_path, monkeypatch):
    """Its lease is returned, its pid is free, its folder removed: also one with a path too long for a socket's name."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    async def scenario():
        leases = Leases()
        gateway = Gateway(leases=leases)
        await gateway.start()
        await gateway.litellm.client()
        pid = gateway.litellm.pid
        assert alive(pid)
        await gateway.stop()
        assert not alive(pid)
        assert [entry[0] for entry in leases.told] == ["intend", "hold", "returned"]
        assert list(deep.iterdir()) == []

    asyncio.run(scenario())


def test_without_the_extra_the_call_is_501_and_names_it(monkeypatch):
    """The agent gets an error in its own format, its owner a MissingExtra; `Upstream.check` says it beforehand."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        upstream_module.importlib.util, "find_spec", lambda name: None if name == "litellm" else find(name)
    )
    upstream = Upstream("m", "http://127.0.0.1:9", ["openai-chat"])
    upstream.check(["openai-chat", "openai-responses"])
    with pytest.raises(MissingExtra, match=r"rollout-orchestrator\[litellm\]"):
        upstream.check(["anthropic-messages"])

    async def scenario():
        async with Gateway() as gateway:
            meter = gateway.open("r1", upstream=upstream, sink=[].append)
            url, header = gateway.url + "/v1/messages", {"x-api-key": meter.key}
            body = request("anthropic-messages")
            async with aiohttp.ClientSession() as client, client.post(url, json=body, headers=header) as answer:
                assert answer.status == 501
                assert "rollout-orchestrator[litellm]" in (await answer.json())["error"]["message"]
            assert isinstance(meter.error, MissingExtra)
            assert meter.provider_failure() is None

    asyncio.run(scenario())


def test_a_stop_while_it_starts_leaves_nothing_behind():
    """The call that wanted it is given up, the half started process ended, its lease returned."""

    async def scenario():
        leases = Leases()
        gateway = Gateway(leases=leases)
        await gateway.start()
        meter = gateway.open("r1", upstream=Upstream("m", "http://127.0.0.1:9", ["openai-chat"]), sink=[].append)
        stage = SimpleNamespace(gateway=gateway)
        asking = asyncio.create_task(Stage.post(stage, "anthropic-messages", request("anthropic-messages"), meter.key))
        while len(leases.told) < 2:  # noqa: ASYNC110 - a list is what the journal offers
            await asyncio.sleep(0.001)
        await gateway.stop()
        with pytest.raises(aiohttp.ClientError):
            await asking
        assert [entry[0] for entry in leases.told] == ["intend", "hold", "returned"]
        assert not alive(leases.told[1][3])

    asyncio.run(scenario())


def test_translated_calls_of_concurrent_rollouts_do_not_mix(stage):
    """One process serves all; every leg finds its own call."""

    async def scenario():
        async with (
            Cell(stage, "openai-chat", Always(Say("from a"))) as a,
            Cell(stage, "openai-responses", Always(Say("from b"))) as b,
        ):
            asks = [
                stage.post("anthropic-messages", request("anthropic-messages", stream=bool(i % 2)), cell.meter.key)
                for i in range(6)
                for cell in (a, b)
            ]
            for at, (status, raw, _) in enumerate(await asyncio.gather(*asks)):
                assert status == 200
                assert (b"from a" in raw, b"from b" in raw) == (at % 2 == 0, at % 2 == 1)
            for cell in (a, b):
                assert await cell.meter.settle() == cell.provider.usage
                assert cell.meter.usage().calls == 6

    stage.run(scenario())


def test_the_process_ends_when_its_parent_is_killed(tmp_path):
    """`kill -9` leaves no orphan: the end of its stdin is enough."""
    program = (
        "import asyncio, os, time\n"
        "from orchestrator.gateway.server import Gateway\n"
        "async def main():\n"
        "    gateway = Gateway()\n"
        "    await gateway.start()\n"
        "    client, _ = await gateway.litellm.client()\n"
        "    print(gateway.litellm.pid, os.path.realpath(os.path.dirname(client.connector.path)), flush=True)\n"
        "    time.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        pid, folder = parent.stdout.readline().decode().split()
        child = os.pidfd_open(int(pid))
        assert Path(folder, "s").is_socket()
        parent.kill()
    ended, _, _ = select.select([child], [], [], 10)
    os.close(child)
    assert ended
    assert not Path(folder).exists()


def test_a_litellm_that_does_not_start_says_why():
    """The tail of its stderr stands in the error."""

    async def scenario():
        async with Gateway(litellm_env={"PYTHONHOME": "/nowhere"}) as gateway:
            with pytest.raises(OrchestratorError, match="litellm does not start, exit code"):
                await gateway.litellm.client()

    asyncio.run(scenario())
