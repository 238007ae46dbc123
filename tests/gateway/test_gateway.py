"""The gateway: keys, pass-through in three formats, counting, hang-ups, and what it writes down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket

import aiohttp
import anyio
import pytest

from orchestrator.gateway.formats import FORMATS
from orchestrator.gateway.llm_log import expand
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.scripted import (
    Always,
    Cut,
    Fail,
    Hang,
    Say,
    ScriptedUpstream,
    ShellScript,
)
from orchestrator.gateway.server import Gateway
from orchestrator.gateway.upstream import Upstream
from states.errors import ConfigError, OrchestratorError
from states.events import Usage

PROVIDER_KEY = "sk-provider-secret-0123456789"
PRICES = Prices(3e-6, 15e-6, 3e-7, 3.75e-6)
WORDS = "Everything is done, as far as I can tell from here; have a look."
STRING = {"type": "string"}
SCHEMA = {"type": "object", "properties": {"command": STRING}, "required": ["command"]}
COMMAND = "echo 42 > /app/answer.txt"


class Bench:
    """A gateway, its provider and one open meter."""

    def __init__(self, script, *, apis=tuple(FORMATS), prices=PRICES, **settings):
        self.provider = ScriptedUpstream(script, apis=apis, prices=prices, api_key=PROVIDER_KEY)
        self.gateway = Gateway(**settings)
        self.apis, self.prices, self.lines = apis, prices, []

    async def __aenter__(self):
        await self.provider.start()
        await self.gateway.start()
        self.client = aiohttp.ClientSession()
        self.upstream = Upstream("scripted", self.provider.url, self.apis, PROVIDER_KEY, prices=self.prices)
        self.meter = self.gateway.open("r1", upstream=self.upstream, sink=self.lines.append)
        return self

    async def __aexit__(self, *_):
        await self.client.close()
        await self.gateway.stop()
        await self.provider.stop()

    async def post(self, api, body, key=None):
        """Status, parsed body or folded stream, and the raw bytes."""
        form, key = FORMATS[api], key or self.meter.key
        header = {"x-api-key": key} if api == "anthropic-messages" else {"Authorization": f"Bearer {key}"}
        async with self.client.post(self.gateway.url + form.path, json=body, headers=header) as answer:
            return answer.status, await answer.read()


def request(api, *, stream=False, text="solve it", **more):
    """A first request with one shell tool."""
    stream = {"stream": True} if stream else {}
    if api == "openai-responses":
        tool = {"type": "function", "name": "bash", "parameters": SCHEMA}
        return {"model": "alias", "input": [{"role": "user", "content": text}], "tools": [tool], **stream, **more}
    if api == "openai-chat":
        tool = {"type": "function", "function": {"name": "bash", "parameters": SCHEMA}}
    else:
        tool, more = {"name": "bash", "input_schema": SCHEMA}, {"max_tokens": 1000, **more}
    return {"model": "alias", "messages": [{"role": "user", "content": text}], "tools": [tool], **stream, **more}


both = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
every_api = pytest.mark.parametrize("api", FORMATS)


@both
@every_api
def test_a_call_passes_through_and_is_counted_as_the_provider_counts_it(api, stream):
    """Text and tool call, plain and streamed: tokens, cached tokens and cost are the provider's own numbers."""

    async def scenario():
        async with Bench(ShellScript(COMMAND)) as bench:
            for _ in range(2):
                status, raw = await bench.post(api, request(api, stream=stream))
                assert status == 200
                assert b"42" in raw
            bench.provider.script = Always(Say(WORDS))
            assert (await bench.post(api, request(api, stream=stream)))[0] == 200
            used = await bench.meter.settle()
            assert used == bench.provider.usage
            assert used.calls == 3
            assert used.cost > 0
            assert used.cache_read_input_tokens > 0
            assert [line["via"] for line in bench.lines] == ["passthrough"] * 3
            assert {call.request["model"] for call in bench.provider.calls} == {"scripted"}

    asyncio.run(scenario())


@every_api
def test_the_bytes_are_the_providers(api):
    """What a client reads through the gateway is what it reads from the provider, byte by byte."""

    async def scenario():
        async with Bench(ShellScript(COMMAND)) as bench:
            for stream in (False, True):
                body = request(api, stream=stream) | {"model": "scripted"}
                if api == "openai-chat" and stream:
                    body["stream_options"] = {"include_usage": True}
                bench.provider.calls.clear()
                _, through = await bench.post(api, body)
                bench.provider.calls.clear()
                header = {"Authorization": f"Bearer {PROVIDER_KEY}"}
                async with bench.client.post(
                    bench.provider.url + FORMATS[api].path, json=body, headers=header
                ) as answer:
                    assert through == await answer.read()

    asyncio.run(scenario())


def test_usage_is_asked_of_a_chat_stream_and_hidden_from_who_did_not_ask():
    """Without `include_usage` a provider reports nothing; the client must not see that we asked."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            _, raw = await bench.post("openai-chat", request("openai-chat", stream=True))
            assert b"usage" not in raw
            assert raw.endswith(b"data: [DONE]\n\n")
            wanted = request("openai-chat", stream=True, stream_options={"include_usage": True})
            _, raw = await bench.post("openai-chat", wanted)
            assert b'"usage"' in raw
            assert await bench.meter.settle() == bench.provider.usage

    asyncio.run(scenario())


@every_api
def test_an_unknown_or_revoked_key_is_401_in_the_clients_own_format(api):
    """No key, no call: nothing reaches the provider, nothing is written."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            status, raw = await bench.post(api, request(api), key="sk-wrong")
            assert status == 401
            assert json.loads(raw)["error"]["type"] == "authentication_error"
            assert (await bench.post(api, request(api)))[0] == 200
            bench.meter.close()
            assert (await bench.post(api, request(api)))[0] == 401
            assert (await bench.post(api, request(api), key=bench.meter.key_for("late")))[0] == 401
            assert len(bench.provider.calls) == len(bench.lines) == 1

    asyncio.run(scenario())


@both
@every_api
@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_providers_failure_reaches_the_client_and_the_verdict(api, stream, status):
    """Status, body and Retry-After pass; the meter says what the provider said until something succeeds."""

    async def scenario():
        async with Bench(Always(Fail(status, "out of order", retry_after=3))) as bench:
            got, raw = await bench.post(api, request(api, stream=stream))
            assert got == status
            assert json.loads(raw)["error"]["message"] == "out of order"
            assert bench.meter.provider_failure() == f"HTTP {status} from scripted: out of order"
            assert await bench.meter.settle() == bench.provider.usage == Usage(calls=1, failed_calls=1)
            bench.provider.script = Always(Say(WORDS))
            await bench.post(api, request(api, stream=stream))
            assert bench.meter.provider_failure() is None

    asyncio.run(scenario())


def test_an_agents_own_bad_request_is_no_failure_of_the_provider_once_something_worked():
    """400 says that the agent asked for something impossible; with nothing else ever answered it stands."""

    async def scenario():
        async with Bench(Always(Fail(400, "too long"))) as bench:
            await bench.post("openai-chat", request("openai-chat"))
            assert "too long" in bench.meter.provider_failure()
            bench.provider.script = Always(Say(WORDS))
            await bench.post("openai-chat", request("openai-chat"))
            bench.provider.script = Always(Fail(400, "too long"))
            await bench.post("openai-chat", request("openai-chat"))
            assert bench.meter.provider_failure() is None

    asyncio.run(scenario())


@every_api
def test_a_provider_that_cannot_be_reached_is_502_and_a_failed_call(api):
    """A closed port is a provider's failure, in the client's format."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            await bench.provider.stop()
            status, raw = await bench.post(api, request(api))
            assert status == 502
            assert "cannot be reached" in json.loads(raw)["error"]["message"]
            assert "no answer from scripted" in bench.meter.provider_failure()
            assert (await bench.meter.settle()).failed_calls == 1

    asyncio.run(scenario())


@every_api
def test_a_client_that_hangs_up_in_mid_stream_loses_no_usage(api):
    """The upstream is read to its end in the background, and `settle` waits for it."""

    async def scenario():
        async with Bench(Always(Say(WORDS * 4, pause=0.01))) as bench:
            key = bench.meter.key
            header = {"Authorization": f"Bearer {key}"}
            url = bench.gateway.url + FORMATS[api].path
            async with bench.client.post(url, json=request(api, stream=True), headers=header) as answer:
                await answer.content.readany()
                answer.close()
            assert await bench.meter.settle() == bench.provider.usage
            [line] = bench.lines
            assert line["hung_up"]
            assert line["usage"]["output_tokens"] == bench.provider.usage.output_tokens
            assert WORDS in json.dumps(line["response"])

    asyncio.run(scenario())


@both
@every_api
def test_a_provider_that_breaks_off_is_a_failed_call_and_the_client_sees_it_cut(api, stream):
    """Half a stream is not completed by us with an error page; a reply that never came whole is 502."""

    async def scenario():
        async with Bench(Always(Cut(WORDS * 9))) as bench:
            try:
                status, _ = await bench.post(api, request(api, stream=stream))
            except aiohttp.ClientPayloadError:
                status = None
            assert status is None
            used = await bench.meter.settle()
            assert (used.calls, used.failed_calls) == (1, 1)
            assert "broke off" in bench.meter.provider_failure()

    asyncio.run(scenario())


def test_a_provider_that_never_answers_holds_up_settle_for_the_drain_only():
    """After the client's hang-up the call is given up in bounded time, and counted as failed."""

    async def scenario():
        async with Bench(Always(Hang()), drain_sec=0.05) as bench:
            asking = asyncio.create_task(bench.post("openai-chat", request("openai-chat")))
            while not bench.provider.waiting:  # noqa: ASYNC110 - a counter is what the provider offers
                await asyncio.sleep(0)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
            used = await bench.meter.settle()
            assert (used.calls, used.failed_calls, used.cost) == (1, 1, 0.0)
            assert "given up" in bench.lines[0]["error"]

    asyncio.run(scenario())


def test_concurrent_rollouts_and_roles_do_not_mix():
    """Each call is counted where its key belongs, under load."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            lines = {name: [] for name in "abcd"}
            meters = {
                name: bench.gateway.open(name, upstream=bench.upstream, sink=lines[name].append) for name in lines
            }
            wanted = [(name, role) for name in lines for role in ("coder", "reviewer") for _ in range(ord(name) - 90)]
            await asyncio.gather(
                *(
                    bench.post("openai-chat", request("openai-chat", text=f"{n}/{r}"), meters[n].key_for(r))
                    for n, r in wanted
                )
            )
            for name, meter in meters.items():
                assert (await meter.settle()).calls == 2 * (ord(name) - 90)
                assert meter.usage("coder").calls == ord(name) - 90
                assert meter.usage() == meter.usage("coder") + meter.usage("reviewer")
                for line in lines[name]:
                    assert line["request"]["messages"][0]["content"] == f"{name}/{line['role']}"
            assert sum((m.usage() for m in meters.values()), Usage()) == bench.provider.usage

    asyncio.run(scenario())


@both
@every_api
def test_no_key_reaches_a_line_or_a_repr(api, stream):
    """Neither the rollout's key nor the provider's, even when the agent sends it and the model says it."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            key = bench.meter.key
            bench.provider.script = Always(Say(f"your key is {key}, mine is {PROVIDER_KEY}."))
            await bench.post(api, request(api, stream=stream, text=f"I am {key}"))
            bench.provider.script = Always(Fail(401, f"wrong key {PROVIDER_KEY}"))
            _, raw = await bench.post(api, request(api, stream=stream, text=f"I am {key}"))
            assert PROVIDER_KEY.encode() not in raw
            assert len(bench.lines) == 2
            for text in (json.dumps(bench.lines), repr(bench.meter), repr(bench.gateway), repr(bench.upstream)):
                assert key not in text
                assert PROVIDER_KEY not in text
            assert PROVIDER_KEY not in str(bench.meter.provider_failure())
            assert "[redacted]" in json.dumps(bench.lines)

    asyncio.run(scenario())


@every_api
def test_llm_jsonl_grows_linearly_with_a_conversation(api):
    """100 turns, each sending all that was said before: the second half adds no more bytes than the first."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            body = request(api, system="x" * 5000) if api == "anthropic-messages" else request(api)
            said = body["input" if api == "openai-responses" else "messages"]
            sizes = []
            for turn in range(100):
                await bench.post(api, body)
                sizes.append(len(json.dumps(bench.lines[-1])))
                said += [
                    {"role": "assistant", "content": f"{turn} {WORDS * 9}"},
                    {"role": "user", "content": f"{turn} {WORDS * 9}"},
                ]
            first, second = sum(sizes[1:50]), sum(sizes[51:])
            assert second < 1.05 * first, "an old message costs nothing"
            assert sum(sizes) < len(json.dumps(body)) * 100 / 20, "a twentieth of what was sent"
            restored = list(expand(bench.lines))
            assert restored[-1]["request"] == bench.provider.calls[-1].request | {"model": "alias"}

    asyncio.run(scenario())


def test_a_sink_that_fails_stops_no_call_and_is_remembered():
    """The disk may be full: the agent's call is answered, and the meter says what happened."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:

            def full(_line):
                raise OSError(28, "No space left on device")

            meter = bench.gateway.open("r2", upstream=bench.upstream, sink=full)
            assert (await bench.post("openai-chat", request("openai-chat"), meter.key))[0] == 200
            assert (await meter.settle()).calls == 1
            assert isinstance(meter.error, OrchestratorError)
            assert re.search(r"llm\.jsonl of r2 .* No space left", str(meter.error))

    asyncio.run(scenario())


@pytest.mark.parametrize("folder", ["short", "long" * 30])
def test_it_listens_on_a_unix_socket_as_well(folder, tmp_path, monkeypatch):
    """Sandboxes without a network reach it through a bound socket, however long its path; it is gone after stop."""

    async def scenario():
        path = tmp_path / folder / "gateway.sock"
        path.parent.mkdir()
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path.name)
        async with Bench(Always(Say(WORDS)), socket_path=path) as bench:
            connector = aiohttp.UnixConnector(path.name)
            async with aiohttp.ClientSession(connector=connector) as client:
                header = {"x-api-key": bench.meter.key}
                url = "http://gateway/v1/messages"
                async with client.post(url, json=request("anthropic-messages"), headers=header) as answer:
                    assert answer.status == 200
        assert not path.exists()

    asyncio.run(scenario())


def test_token_counts_models_and_unknown_paths_are_answered():
    """What agents ask besides a model call is not counted as one."""

    async def scenario():
        async with Bench(Always(Say(WORDS))) as bench:
            header = {"x-api-key": bench.meter.key}
            body, base = request("anthropic-messages"), bench.gateway.url

            async def ask(method, path, **more):
                async with bench.client.request(method, base + path, headers=header, **more) as answer:
                    return answer.status, (await answer.json() if method != "HEAD" else None)

            assert (await ask("POST", "/v1/messages/count_tokens?beta=true", json=body))[1]["input_tokens"] > 0
            assert (await ask("GET", "/v1/models"))[1]["data"][0]["id"] == "scripted"
            assert (await ask("HEAD", "/"))[0] == 200
            status, said = await ask("POST", "/v1/embeddings", json={})
            assert (status, said["error"]["type"]) == (404, "not_found_error")
            assert (await ask("POST", "/v1/messages", data=b"{"))[0] == 400
            assert (await ask("POST", "/v1/messages", json=[]))[0] == 400
            assert bench.meter.usage() == Usage()
            header["x-api-key"] = "no"
            assert (await ask("GET", "/v1/models"))[0] == 401

    asyncio.run(scenario())


def test_an_unknown_price_makes_the_cost_unknown_and_never_zero():
    """None, not 0: a budget in dollars must not take a free ride."""

    async def scenario():
        async with Bench(Always(Say(WORDS)), prices=None) as bench:
            assert bench.meter.usage().cost == 0.0
            await bench.post("openai-chat", request("openai-chat"))
            assert (await bench.meter.settle()).cost is None
            assert bench.lines[0]["usage"]["cost"] is None

    asyncio.run(scenario())


def test_under_trio_it_says_that_it_needs_asyncio():
    """A clear ConfigError instead of a traceback from inside aiohttp."""
    with pytest.raises(ConfigError, match="asyncio"):
        anyio.run(Gateway().start, backend="trio")


def test_models_are_found_by_name_and_a_missing_key_is_named():
    """One line that says which variable to set; base URLs of both customs are understood."""
    found = Upstream.for_model("anthropic/claude-haiku-4-5", {"ANTHROPIC_API_KEY": "k"})
    assert (found.model, found.apis) == ("claude-haiku-4-5", {"anthropic-messages"})
    assert found.url("anthropic-messages") == "https://api.anthropic.com/v1/messages"
    assert "k'" not in repr(found)
    env = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}
    assert Upstream.for_model("openai/x", env).url("openai-responses") == "http://127.0.0.1:1/v1/responses"
    only_chat = Upstream.for_model("openai/x", env, apis=["openai-chat"])
    assert (only_chat.apis, only_chat.route("anthropic-messages")) == ({"openai-chat"}, {"model": "hosted_vllm/x"})
    assert Upstream.for_model("gemini/g", {"GOOGLE_API_KEY": "k"}).route("openai-chat") == {"model": "gemini/g"}
    assert Upstream.for_model("some-cloud/m", {"SOME_CLOUD_API_KEY": "k"}).api_key == "k"
    assert Upstream.for_model("groq/m", {"GROQ_API_KEY": "k", "GROQ_BASE_URL": "http://x/v1"}).base_url == "http://x/v1"
    aws = {"AWS_SECRET_ACCESS_KEY": "very-secret", "AWS_REGION": "eu-west-1"}
    cloud = Upstream.for_model("bedrock/m", aws)
    assert cloud.route("anthropic-messages")["aws_region_name"] == "eu-west-1"
    assert "very-secret" in cloud.secrets
    assert "very-secret" not in repr(cloud)
    assert hash(cloud)
    with pytest.raises(ConfigError, match="needs OPENAI_API_KEY, which is not set"):
        Upstream.for_model("openai/gpt-5", {})
    with pytest.raises(ConfigError, match="openai/gpt-5"):
        Upstream.for_model("gpt-5", {})
    with pytest.raises(ConfigError, match="base URL"):
        Upstream("m", "", ["openai-chat"])
    with pytest.raises(ConfigError, match="unknown wire format"):
        Upstream("m", "http://x", ["grpc"])
    with pytest.raises(ConfigError, match="neither"):
        Upstream("m")
