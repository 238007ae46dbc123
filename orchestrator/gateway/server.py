"""The model gateway: one server for all rollouts of an orchestrator, so that every model call is seen and counted.

Agents get its URL and a key of their own; the provider's key never leaves this process. A call in a wire format that
the upstream speaks passes through: the bytes are the client's and the provider's, only the key (and the model's name)
is exchanged, and usage is read off the answer. Any other call is translated by LiteLLM in a child process, and what
that asks of the provider comes back through here: every token is read off the provider's own words, and the child
never sees the provider's key. Only providers that LiteLLM alone can reach are called by it directly.

    gateway = Gateway()
    await gateway.start()
    meter = gateway.open("r1", upstream=Upstream.for_model("openai/gpt-5", os.environ), sink=lines.append)
    ...                                  # an agent calls gateway.url with meter.key
    used = await meter.settle()
    meter.close()
    await gateway.stop()

A call runs in a task of its own: when its client hangs up, the upstream is read to the end (for at most `drain_sec`),
because what was begun is billed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import web

from orchestrator.budgets import Limits
from orchestrator.gateway.formats import CHAT, FORMATS, MESSAGES, Format, error_message, json_object
from orchestrator.gateway.litellm_child import SETTINGS
from orchestrator.gateway.litellm_process import LeaseBook, LitellmProcess
from orchestrator.gateway.meter import Call, Grant, RolloutMeter, Sink
from orchestrator.gateway.streaming import asks_usage, pass_on, read, without_usage
from orchestrator.gateway.upstream import Upstream
from states.errors import ConfigError, MissingExtra, OrchestratorError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

JSON = dict[str, Any]

MAX_REQUEST = 64 * 1024**2
"""Bytes of the largest request that is read."""

_TO_UPSTREAM = (
    "Accept", "Content-Type", "User-Agent", "anthropic-version", "anthropic-beta", "OpenAI-Beta", "originator",
    "session_id", "conversation_id",
)  # fmt: skip
_TO_CLIENT = ("Content-Type", "Retry-After", "retry-after-ms", "x-should-retry", "request-id", "x-request-id")
"""Headers that pass. All others stay: an agent must not steer the provider, nor read the account's limits."""

NO_LIMITS = Limits()
PAYMENT_REQUIRED = 402
PAID_SEC = 600.0
"""How long a call under a budget may still be read whose client has hung up."""

_WHOSE_KEY = "unknown or revoked key: this gateway takes the key of a running rollout"


class Gateway:
    """The server. It listens on 127.0.0.1, and on `socket_path` for sandboxes without a network. asyncio only.

    Args:
        socket_path: A unix socket to listen on as well; its folder exists, a stale socket is replaced.
        port: The TCP port; any free one by default.
        drain_sec: How long a call whose client has hung up may still be read, and the longest wait of `settle`.
        proxy: URL of an HTTP proxy through which providers are reached.
        leases: Is told of LiteLLM's process before it starts, and when it is gone.
        litellm_env: Variables for that process, for providers that want more than a key (`AWS_REGION`, ...).
    """

    def __init__(
        self,
        *,
        socket_path: Path | None = None,
        port: int = 0,
        drain_sec: float = 5.0,
        proxy: str | None = None,
        leases: LeaseBook | None = None,
        litellm_env: Mapping[str, str] | None = None,
    ) -> None:
        self.socket_path, self.port = socket_path, port
        self._drain_sec, self._proxy = drain_sec, proxy
        self._grants: dict[str, Grant] = {}
        self._legs: dict[str, Call] = {}
        self.litellm = LitellmProcess(leases=leases, env=litellm_env)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = contextlib.AsyncExitStack()

    def __repr__(self) -> str:
        return f"<Gateway on {self.url}, {len(self._grants)} keys>"

    @property
    def url(self) -> str:
        """Where it listens, without `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; `port` is known after this.

        Raises:
            ConfigError: not on asyncio, or an address cannot be had.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigError("the model gateway needs asyncio; under trio, run with usage_tracking=off") from None
        app = web.Application(client_max_size=MAX_REQUEST)
        app.router.add_routes(self._routes())
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        async with contextlib.AsyncExitStack() as stack:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
            connector = aiohttp.TCPConnector(limit=0)
            self._client = await stack.enter_async_context(
                aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())
            )
            stack.push_async_callback(self.litellm.stop)
            stack.push_async_callback(self._end_calls)
            if self.socket_path:
                stack.callback(self.socket_path.unlink, missing_ok=True)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            try:
                await web.TCPSite(runner, "127.0.0.1", self.port).start()
                if self.socket_path:
                    await web.SockSite(runner, _bound(self.socket_path)).start()
            except OSError as error:
                raise ConfigError(f"the gateway cannot listen: {error}") from error
            self.port = runner.addresses[0][1]
            self._closing = stack.pop_all()

    async def stop(self) -> None:
        """Hang up on everybody and end the child process. Idempotent."""
        await self._closing.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    def open(self, rollout_id: str, *, upstream: Upstream, sink: Sink, limits: Limits = NO_LIMITS) -> RolloutMeter:
        """Let a rollout in.

        Args:
            rollout_id: Whose calls these will be.
            upstream: The model that its roles talk to; `RolloutMeter.key_for` takes another one for a role.
            sink: Gets one dict a call, the lines of `llm.jsonl`, in the order in which calls end.
            limits: What may be spent; those of tokens and cost are kept here.
        """
        return RolloutMeter(rollout_id, upstream, sink, grants=self._grants, drain_sec=self._drain_sec, limits=limits)

    # --- requests ------------------------------------------------------------------------------------------------

    def _routes(self) -> list[web.RouteDef]:
        routes = [
            web.post(path, partial(self._model_call, form))
            for form in FORMATS.values()
            for path in (form.path, form.path.removeprefix("/v1"))
        ]
        return [
            *routes,
            web.post("/v1/messages/count_tokens", self._count_tokens),
            web.get("/v1/models", self._models),
            web.get("/models", self._models),
            web.route("HEAD", "/", self._alive),
            web.route("*", "/{other:.*}", self._unknown_path),
        ]

    async def _model_call(self, form: Format, request: web.Request) -> web.StreamResponse:
        """Check the key, read the request, and let a task of its own make the call."""
        key = _key(request)
        parent, grant = self._legs.get(key), self._grants.get(key)
        if parent is None and grant is None:
            return _failure(form, 401, _WHOSE_KEY)
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return _failure(form, 413, f"the request is larger than {MAX_REQUEST} bytes")
        body = json_object(raw)
        if body is None:
            return _failure(form, 400, "the request is not a JSON object")
        if parent:
            call = Call(parent.grant, form, body, parent.number, parent=parent)
        else:
            assert grant is not None
            call = grant.meter.began(grant, form, body)
        return await self._shielded(call, asyncio.create_task(self._drive(call, raw, request)))

    async def _shielded(self, call: Call, task: asyncio.Task[web.StreamResponse]) -> web.StreamResponse:
        """Wait for a call; when its client hangs up, leave it `drain_sec` to finish without one (a budget: longer)."""
        if call.parent:
            call.parent.tasks.add(task)
        else:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            call.grant.meter.track(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            call.hung_up = True
            later = asyncio.get_running_loop().call_later
            if call.limits:  # who hangs up must not spend for nothing: it is counted, but nobody waits for that
                later(self._drain_sec, call.grant.meter.forget, task)
            later(PAID_SEC if call.limits else self._drain_sec, task.cancel)
            raise

    async def _drive(self, call: Call, raw: bytes, request: web.Request) -> web.StreamResponse:
        """Make one call, whatever happens to its client, and count it."""
        try:
            if not call.parent and (why := await call.grant.meter.admit(call)):
                return _refusal(call, why)
            answer = await self._pass(call, raw, request)
            await self._end_legs(call, self._drain_sec)
            return answer
        except OrchestratorError as error:
            call.error, call.own_error = str(error), error
            return _failure(call.format, 501 if isinstance(error, MissingExtra) else 502, str(error))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            call.error = f"the provider cannot be reached or broke off: {type(error).__name__}: {error}"
            if call.via == "litellm":
                await self.litellm.look()
                call.error = f"litellm broke off: {type(error).__name__}: {error}"
                call.own_error = OrchestratorError(call.error)
            return _failure(call.format, 502, call.error)
        except asyncio.CancelledError:
            call.error = "given up: the client was gone and the provider had not finished"
            raise
        except Exception as error:
            call.error = f"the gateway failed: {type(error).__name__}: {error}"
            call.own_error = OrchestratorError(call.error)
            return _failure(call.format, 500, call.error)
        finally:
            await self._end_legs(call, 0)
            read(call)
            if call.parent:
                call.parent.legs.append(call)
            else:
                call.grant.meter.ended(call)

    async def _end_legs(self, call: Call, patience: float) -> None:
        """Let what LiteLLM asked of the provider be read to its end, for so many seconds at most."""
        if call.tasks and patience:
            await asyncio.wait(call.tasks, timeout=patience)
        for task in call.tasks:
            task.cancel()
        if call.tasks:
            await asyncio.wait(call.tasks)

    async def _pass(self, call: Call, raw: bytes, request: web.Request) -> web.StreamResponse:
        """Hand the client's bytes to whoever answers them, and the answer's to the client."""
        hide_usage, body = False, call.request
        if body.get("model") != call.grant.upstream.model:
            body = {**body, "model": call.grant.upstream.model}
        if (most := _lowered(call)) is not None:
            body = call.format.limited(body, most, call.grant.upstream.chat_limit)
        if call.format is CHAT and call.streamed and not asks_usage(body):
            hide_usage = True
            body = {**body, "stream_options": {**(body.get("stream_options") or {}), "include_usage": True}}
        # Under a budget the provider reads what was read here: of a key that comes twice, it might take the other one.
        payload = raw if body is call.request and not call.limits else msgspec.json.encode(body)
        async with self._target(call, request) as target, target(data=payload) as answer:
            call.status = answer.status
            headers = _some(answer.headers, _TO_CLIENT)
            if answer.status == 200 and answer.content_type == "text/event-stream":
                chunks = answer.content.iter_any()
                return await pass_on(call, request, headers, without_usage(call, chunks) if hide_usage else chunks)
            content = await answer.read()
            call.arrived()
            call.reply = json_object(content)
            if answer.status >= 300:
                call.error = error_message(call.reply) or content[:500].decode(errors="replace") or answer.reason
                call.retry_after = headers.get("Retry-After")
                return self._refused(call, content, headers)
            return web.Response(body=content, status=answer.status, headers=headers)

    def _refused(self, call: Call, content: bytes, headers: dict[str, str]) -> web.Response:
        """An error as the provider gave it: its own bytes, or what it said to LiteLLM in the client's format."""
        leg = call.legs[-1] if call.legs else None
        if leg and leg.failed and leg.error:
            call.status, call.error = leg.status or 502, leg.error
            answer = _failure(call.format, call.status, call.error)
            if leg.retry_after:
                answer.headers["Retry-After"] = leg.retry_after
            return answer
        if key := call.grant.upstream.api_key.encode():
            content = content.replace(key, b"[redacted]")
        return web.Response(body=content, status=call.status, headers=headers)

    @contextlib.asynccontextmanager
    async def _target(self, call: Call, request: web.Request) -> AsyncIterator[Callable[..., Any]]:
        """How to post this call: to the provider where it speaks the client's format, else to LiteLLM."""
        if call.format.api in call.grant.upstream.apis:
            url = call.grant.upstream.url(call.format.api)
            yield partial(self._client.post, **self._to_provider(call.grant.upstream, call.format, url, request))
            return
        if call.parent:
            raise OrchestratorError(
                f"litellm asked in {call.format.api}, which {call.grant.upstream.model} does not speak"
            )
        call.via = "litellm"
        client, key = await self.litellm.client()
        leg = f"leg-{secrets.token_urlsafe(32)}"
        settings = call.grant.upstream.route(call.format.api) | self._way_back(call.grant.upstream, leg)
        headers = {"Authorization": f"Bearer {key}", SETTINGS: json.dumps(settings)}
        self._legs[leg] = call
        try:
            yield partial(client.post, f"http://litellm{call.format.path}", headers=headers)
        finally:
            del self._legs[leg]

    def _way_back(self, upstream: Upstream, leg: str) -> JSON:
        """Where LiteLLM finds the provider: behind this gateway; or where the user says, if only it can call it."""
        if upstream.spoken is None:
            given = {"api_key": upstream.api_key, "api_base": upstream.base_url}
            return {name: value for name, value in given.items() if value}
        suffix = "" if upstream.spoken == MESSAGES.api else "/v1"
        return {"api_key": leg, "api_base": self.url + suffix}

    def _to_provider(self, upstream: Upstream, form: Format, url: str, request: web.Request) -> JSON:
        """Arguments of a post to the provider itself, with its key."""
        key = upstream.api_key
        secret = {"x-api-key": key} if form is MESSAGES else {"Authorization": f"Bearer {key}"}
        headers = {
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            **_some(request.headers, _TO_UPSTREAM),
            **secret,
        }
        if beta := request.query.get("beta"):
            url = f"{url}?beta={quote(beta)}"
        return {"url": url, "headers": headers, "proxy": self._proxy, "allow_redirects": False}

    async def _count_tokens(self, request: web.Request) -> web.Response:
        """Anthropic's token count: the provider's own where it has one, else a quarter of the bytes. No model call."""
        grant = self._grant(request)
        if grant is None:
            return _failure(MESSAGES, 401, _WHOSE_KEY)
        raw = await request.read()
        upstream = grant.upstream
        if MESSAGES.api not in upstream.apis:
            return web.json_response({"input_tokens": len(raw) // 4})
        body = msgspec.json.encode({**(json_object(raw) or {}), "model": upstream.model})
        url = upstream.url(MESSAGES.api, f"{MESSAGES.path}/count_tokens")
        try:
            async with self._client.post(**self._to_provider(upstream, MESSAGES, url, request), data=body) as answer:
                headers = _some(answer.headers, _TO_CLIENT)
                return web.Response(body=await answer.read(), status=answer.status, headers=headers)
        except (aiohttp.ClientError, TimeoutError) as error:
            return _failure(MESSAGES, 502, f"the provider cannot be reached: {error}")

    async def _models(self, request: web.Request) -> web.Response:
        grant = self._grant(request)
        if grant is None:
            return _failure(CHAT, 401, _WHOSE_KEY)
        model = {"id": grant.upstream.model, "object": "model", "created": 0, "owned_by": "rollout"}
        return web.json_response({"object": "list", "data": [model]})

    async def _alive(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _unknown_path(self, request: web.Request) -> web.Response:
        form = MESSAGES if request.path.startswith(MESSAGES.path) else CHAT
        return _failure(form, 404, f"this gateway has no {request.method} {request.path}")

    def _grant(self, request: web.Request) -> Grant | None:
        return self._grants.get(_key(request))

    async def _end_calls(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _lowered(call: Call) -> int | None:
    """The output limit to put on a call; None leaves its own. What LiteLLM asks for a call gets no more than that."""
    if call.parent is None or call.parent.lowered is None:
        return call.lowered
    asked = call.format.output_limit(call.request)
    return call.parent.lowered if asked is None or asked > call.parent.lowered else None


def _refusal(call: Call, why: str) -> web.Response:
    """A budget is spent: said as a provider says that the account is empty, which nobody tries again."""
    call.status, call.error = call.format.refusal, why
    body = call.format.error(PAYMENT_REQUIRED, call.error)
    return web.json_response(body, status=call.status, headers={"x-should-retry": "false"})


def _key(request: web.Request) -> str:
    """The key that came with a request, in whichever header."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return request.headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else "")


def _failure(form: Format, status: int, message: str) -> web.Response:
    return web.json_response(form.error(status, message), status=status)


def _some(headers: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: headers[name] for name in names if name in headers}


def _bound(path: Path) -> socket.socket:
    """A unix socket at `path`, in place of a stale one.

    Bound below a descriptor of its folder: the kernel takes no name beyond 107 bytes, and a path may be longer.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
                    os.unlink(path.name, dir_fd=folder)
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
    except OSError:
        listener.close()
        raise
    return listener
