"""Sending a provider's stream on to a client, and reading what a call used off what was sent."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import web

from orchestrator.gateway.formats import stream_events
from orchestrator.gateway.meter import Call

JSON = dict[str, Any]
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")


async def pass_on(
    call: Call, request: web.Request, headers: dict[str, str], chunks: AsyncIterator[bytes]
) -> web.StreamResponse:
    """Send a stream on as it comes; when the client is gone, read on without it."""
    out = web.StreamResponse(headers=headers)
    with contextlib.suppress(ConnectionError):
        await out.prepare(request)
    try:
        async for chunk in chunks:
            call.arrived()
            call.chunks.append(chunk)
            await _send(call, out, chunk)
    except (aiohttp.ClientError, OSError):
        if request.transport:
            request.transport.abort()  # what was begun cannot be answered anew: the client sees it cut, as it is
        raise
    if not call.hung_up:
        with contextlib.suppress(ConnectionError):
            await out.write_eof()
    return out


async def _send(call: Call, out: web.StreamResponse, chunk: bytes) -> None:
    if not call.hung_up:
        try:
            await out.write(chunk)
        except (ConnectionError, RuntimeError):
            call.hung_up = True


async def without_usage(call: Call, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Chat events without the usage that we asked for and the client did not; the call keeps it."""
    rest = b""
    async for chunk in chunks:
        *whole, rest = _BLANK_LINE.split(rest + chunk)
        shown = [event + b"\n\n" for event in whole if not _is_usage(event)]
        call.chunks += [event + b"\n\n" for event in whole if _is_usage(event)]
        if shown:
            yield b"".join(shown)
    if rest:
        yield rest


def asks_usage(body: JSON) -> bool:
    """Whether a chat client wants to see the usage of its stream."""
    return bool((body.get("stream_options") or {}).get("include_usage"))


def _is_usage(event: bytes) -> bool:
    if b'"usage"' not in event:
        return False
    return any(found.get("usage") and not found.get("choices") for found in stream_events(event))


def read(call: Call) -> None:
    """Read the reply and what it used off a stream, or off the body. A provider may write anything."""
    try:
        if call.chunks:
            folded = call.format.fold(stream_events(b"".join(call.chunks)))
            call.reply = folded.reply
            call.error = call.error or folded.error or (None if folded.ended else "the stream was cut")
        if call.reply is not None and call.status < 400:
            call.usage = call.format.usage(call.reply)
    except Exception as error:
        call.error = call.error or f"the provider's answer cannot be read: {type(error).__name__}: {error}"
