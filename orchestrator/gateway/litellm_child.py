"""LiteLLM behind the gateway's three wire formats, as the process that `litellm_process` starts.

It listens on a unix socket, takes calls from its parent only, and answers them in the format in which they were asked,
so that to the gateway it is one more upstream. Importing litellm costs seconds of CPU and stalls an event loop, which
is why it happens here and nowhere else. It ends when its parent does: its stdin then ends.

Started as `python -m orchestrator.gateway.litellm_child FOLDER`, in that folder, where its socket will be; the first
line of stdin is the key that it takes.
Standard output carries one word, `ready`; everything that litellm prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import threading
import types
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from orchestrator.gateway.formats import CHAT, FORMATS, RESPONSES, Format
from orchestrator.gateway.portable import portable

JSON = dict[str, Any]

SOCKET = "s"
"""Its name in the folder: by a path, which may be longer than the kernel takes, it would not always be found."""
SETTINGS = "x-rollout-settings"
"""The request header with litellm's own arguments (model, api_base, api_key, ...) as JSON."""


class Translator:
    """The server's handlers, around a litellm that is imported."""

    def __init__(self, litellm: Any, key: str) -> None:
        self._litellm, self._key = litellm, key

    async def answer(self, form: Format, request: web.Request) -> web.StreamResponse:
        """Make one call as litellm makes it."""
        if request.headers.get("Authorization") != f"Bearer {self._key}":
            return web.json_response(form.error(401, "not my parent"), status=401)
        settings = {"num_retries": 0, "max_retries": 0, **json.loads(request.headers[SETTINGS])}
        self._introduce(settings["model"])
        try:
            body = portable(form, await request.json())
            reply = await self._call(form)(**{**body, **settings})
            if not body.get("stream"):
                return web.json_response(reply if isinstance(reply, dict) else reply.model_dump(mode="json"))
            return await _stream(form, request, reply)
        except Exception as error:
            return _failure(form, error)

    def _introduce(self, model: str) -> None:
        """Tell litellm that an OpenAI model which it does not know can stream.

        It would otherwise fake the stream from a plain call, in which every tool call has its arguments twice.
        """
        provider, *_, name = model.split("/")
        if provider == "openai" and name not in self._litellm.model_cost:
            known = {"litellm_provider": "openai", "mode": "responses", "supports_native_streaming": True}
            self._litellm.register_model({name: known})

    def _call(self, form: Format) -> Any:
        if form is CHAT:
            return self._litellm.acompletion
        return self._litellm.aresponses if form is RESPONSES else self._litellm.anthropic.messages.acreate


async def _stream(form: Format, request: web.Request, reply: AsyncIterator[Any]) -> web.StreamResponse:
    """Send a stream on. Its first piece is awaited before the head is sent: until then an error has its own status."""
    pieces = aiter(reply)
    first = await anext(pieces, None)
    out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await out.prepare(request)
    try:
        if first is not None:
            await out.write(_event(form, first))
        async for piece in pieces:
            await out.write(_event(form, piece))
    except Exception as error:
        body = form.error(_status(error), _message(error))
        await out.write(_sse({**body, "type": "error"}, "error"))
        return out
    if form is CHAT:
        await out.write(b"data: [DONE]\n\n")
    return out


def _event(form: Format, piece: Any) -> bytes:
    if isinstance(piece, bytes):
        return piece
    data = piece if isinstance(piece, dict) else piece.model_dump(mode="json", exclude_none=form is CHAT)
    return _sse(data, None if form is CHAT else data.get("type"))


def _sse(data: JSON, event: str | None) -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def _failure(form: Format, error: Exception) -> web.Response:
    """An exception of litellm as the provider would have answered it."""
    headers = getattr(error, "litellm_response_headers", None) or getattr(error, "headers", None) or {}
    after = headers.get("retry-after") if hasattr(headers, "get") else None
    status = _status(error)
    answer = web.json_response(form.error(status, _message(error)), status=status)
    if after:
        answer.headers["Retry-After"] = str(after)
    return answer


def _status(error: Exception) -> int:
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) and 400 <= status < 600 else 500


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _end_with_parent(folder: Path) -> None:
    """Block until stdin ends; then remove the private folder, which a killed parent could not, and end at once."""
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


class _Unlogged:
    """Stands in for two classes of litellm's proxy: bytes pass, nothing is logged."""

    @staticmethod
    async def chunk_processor(response: Any, **_: Any) -> AsyncIterator[bytes]:
        """The bytes of a stream."""
        async for chunk in response.aiter_bytes():
            yield chunk

    @staticmethod
    async def route_streaming_logging_to_handler(**_: Any) -> None:
        """The gateway counts, so nothing happens here."""


def _without_proxy() -> None:
    """Spare litellm's streamed messages the import of its proxy, which they want for logging alone.

    It needs a dozen packages that no call needs; without them a streamed call to a Claude on Bedrock or Vertex fails.
    """
    for module, name in (
        ("success_handler", "PassThroughEndpointLogging"),
        ("streaming_handler", "PassThroughStreamingHandler"),
    ):
        stub = types.ModuleType(f"litellm.proxy.pass_through_endpoints.{module}")
        stub.__dict__[name] = _Unlogged
        sys.modules[stub.__name__] = stub


async def _serve(path: str, key: str, ready: int) -> None:
    _without_proxy()
    import litellm

    litellm.suppress_debug_info = True
    litellm.drop_params = True
    litellm.modify_params = True
    translator = Translator(litellm, key)
    app = web.Application(client_max_size=256 * 1024**2)
    for form in FORMATS.values():
        app.router.add_post(form.path, partial(translator.answer, form))
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, path).start()
    os.write(ready, b"ready\n")
    os.close(ready)
    await asyncio.Event().wait()


def main() -> None:
    """Serve until stdin ends."""
    ready = os.dup(1)
    os.dup2(2, 1)
    key = sys.stdin.buffer.readline().decode().strip()
    threading.Thread(target=_end_with_parent, args=(Path(sys.argv[1]),), daemon=True).start()
    asyncio.run(_serve(SOCKET, key, ready))


if __name__ == "__main__":
    main()
