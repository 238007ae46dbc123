"""A model provider that follows a script: for the demo, the tests, the bench, and for trying an agent without a model.

It speaks OpenAI chat completions, OpenAI responses and Anthropic messages, plain and streamed, on loopback. What it
answers is decided by a script (see `script.py`), which sees the conversation and picks one of the tools that the
request offers; it never touches a sandbox. It counts what it reports, so that another count can be compared with it.

    async with ScriptedUpstream(ShellScript("echo 42 > /app/answer.txt")) as upstream:
        upstream.url           # http://127.0.0.1:PORT; OpenAI clients want upstream.url + "/v1"
        upstream.usage         # what it reported, a `states.events.Usage`
        upstream.script = Always(Fail(401))

Out of process: `python -m orchestrator.gateway.scripted --port 8080 --command 'echo 42 > /app/answer.txt'`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, Self

import attrs
from aiohttp import web

from orchestrator.gateway.dialects import DIALECTS, Counts, pieces
from orchestrator.gateway.formats import FORMATS, Api
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.script import (
    Always,
    Call,
    Conversation,
    Cut,
    Fail,
    Hang,
    Refuse,
    Reply,
    Say,
    Script,
    Shell,
    ShellScript,
    Steps,
    Tool,
    Use,
)
from states.events import Usage

__all__ = [
    "Always", "Call", "Conversation", "Cut", "Fail", "Hang", "Prices", "Refuse", "Reply", "Say", "Script",
    "ScriptedCall", "ScriptedUpstream", "Shell", "ShellScript", "Steps", "Tool", "Use",
]  # fmt: skip


@attrs.frozen
class ScriptedCall:
    """One model call as the provider saw it. `key` is the API key that came with it."""

    number: int
    api: Api
    streamed: bool
    status: int
    usage: Usage
    request: dict[str, Any]
    reply: Reply
    key: str = attrs.field(default="", repr=False)


class ScriptedUpstream:
    """A provider that speaks `apis` on 127.0.0.1 and answers what `script` says. asyncio only.

    Args:
        script: The model; assign another at any time.
        apis: The wire formats that it speaks; all three by default. Others get 404.
        prices: What it charges; without it `usage.cost` is None once it was called.
        api_key: The only key that it takes; any by default.
        models: What `/v1/models` lists.

    `calls` are the calls that were answered, `waiting` counts those that a `Hang` will never answer.
    """

    def __init__(
        self,
        script: Script,
        *,
        apis: Collection[Api] = tuple(DIALECTS),
        prices: Prices | None = None,
        api_key: str | None = None,
        models: Collection[str] = ("scripted",),
        port: int = 0,
    ) -> None:
        self.script, self.apis, self.prices, self.models, self.port = script, frozenset(apis), prices, models, port
        self._api_key = api_key
        self.calls: list[ScriptedCall] = []
        self.waiting = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it listens, without `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def usage(self) -> Usage:
        """The sum of what it reported."""
        return sum((call.usage for call in self.calls), Usage())

    async def start(self) -> None:
        """Listen. `port` is known after this."""
        app = web.Application(client_max_size=256 * 1024**2)
        for api, form in FORMATS.items():
            for path in (form.path, form.path.removeprefix("/v1")):
                app.router.add_post(path, partial(self._answer, api))
        app.router.add_post("/v1/messages/count_tokens", self._count_tokens)
        app.router.add_get("/v1/models", self._list_models)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Hang up on everybody. Idempotent."""
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    async def _answer(self, api: Api, request: web.Request) -> web.StreamResponse:
        """One model call: ask the script, count, answer as the request wants it."""
        raw = await request.read()
        body, dialect = json.loads(raw), DIALECTS[api]
        key = request.headers.get("x-api-key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        number = len(self.calls) + 1
        if api not in self.apis:
            return self._fail(api, Fail(404, f"this provider speaks {', '.join(sorted(self.apis))}, not {api}"))
        wrong_key = self._api_key not in {None, key}
        reply = Fail(401, "wrong API key") if wrong_key else self.script(dialect.read(body))
        counts = _counts(number, len(raw), reply, caches_writes=dialect.caches_writes)
        reply, counts = _within(FORMATS[api].output_limit(body), reply, counts)
        status = reply.status if isinstance(reply, Fail) else 200
        usage = Usage(1, 1) if isinstance(reply, Fail | Cut) else self._usage(counts)
        call = ScriptedCall(number, api, bool(body.get("stream")), status, usage, body, reply, key)
        if not isinstance(reply, Hang):
            self.calls.append(call)
        await asyncio.sleep(reply.delay)
        if isinstance(reply, Hang):
            self.waiting += 1
            await asyncio.Event().wait()
        if isinstance(reply, Fail):
            return self._fail(api, reply)
        if isinstance(reply, Cut):
            return await self._cut(request, dialect.stream(Say(reply.text), counts, number, body))
        assert not isinstance(reply, Hang)
        if not call.streamed:
            return web.json_response(dialect.plain(reply, counts, number, body))
        return await self._stream(request, reply, dialect.stream(reply, counts, number, body))

    def _usage(self, counts: Counts) -> Usage:
        usage = Usage(1, 0, counts.input, counts.output, counts.cache_read, counts.cache_creation)
        return attrs.evolve(usage, cost=self.prices.cost(usage) if self.prices else None)

    async def _stream(self, request: web.Request, reply: Reply, events: Any) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        pause = reply.pause if isinstance(reply, Say) else 0
        for event in events:
            await response.write(event)
            await asyncio.sleep(pause)
        await response.write_eof()
        return response

    async def _cut(self, request: web.Request, events: Iterator[bytes]) -> web.StreamResponse:
        """Half a stream, then a closed connection."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        said = list(events)
        await response.write(b"".join(said[: len(said) // 2]))
        assert request.transport is not None
        request.transport.close()
        return response

    def _fail(self, api: Api, fail: Fail) -> web.Response:
        after = {} if fail.retry_after is None else {"Retry-After": f"{fail.retry_after:g}"}
        return web.json_response(FORMATS[api].error(fail.status, fail.message), status=fail.status, headers=after)

    async def _count_tokens(self, request: web.Request) -> web.Response:
        return web.json_response({"input_tokens": len(await request.read()) // 4})

    async def _list_models(self, _request: web.Request) -> web.Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "scripted"} for name in self.models]
        return web.json_response({"object": "list", "data": models})


def _within(limit: int | None, reply: Reply, counts: Counts) -> tuple[Reply, Counts]:
    """A reply as far as the request's output limit lets it come: a tool call that does not fit is none."""
    if limit is None or counts.output <= limit or not isinstance(reply, Say | Call | Refuse):
        return reply, counts
    pause = reply.pause if isinstance(reply, Say) else 0.0
    return Say(reply.text[: 4 * limit], reply.delay, pause, cut=True), attrs.evolve(counts, output=limit)


def _counts(number: int, size: int, reply: Reply, *, caches_writes: bool) -> Counts:
    """Numbers as a provider reports them: they differ from call to call, so that no two can be mixed up."""
    said = reply.text if isinstance(reply, Say | Call | Refuse) else ""
    written = len(said) + (len(json.dumps(dict(reply.arguments))) if isinstance(reply, Call) else 0)
    read, creation = 128 * (number - 1), 17 * number if caches_writes else 0
    return Counts(size // 4 + 37 * number + read + creation, 3 * number + len(pieces("x" * written, 4)), read, creation)


def main() -> None:
    """Serve a script until interrupted; prints the URL as its first line."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.gateway.scripted", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="where to listen on 127.0.0.1 (default: any free port)")
    parser.add_argument("--command", default="true", help="the shell command that the model runs first")
    parser.add_argument("--say", default="Done.", help="what it says then")
    parser.add_argument("--fail", type=int, help="answer every call with this HTTP status instead")
    parser.add_argument("--api", action="append", choices=list(DIALECTS), help="wire format; may be given again")
    given = parser.parse_args()
    script: Script = Always(Fail(given.fail)) if given.fail else ShellScript(given.command, given.say)
    upstream = ScriptedUpstream(script, apis=given.api or tuple(DIALECTS), port=given.port)

    async def serve() -> None:
        async with upstream:
            print(upstream.url, flush=True)  # noqa: T201 - its first line is how a parent learns the port
            await asyncio.Event().wait()

    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
