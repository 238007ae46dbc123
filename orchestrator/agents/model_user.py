"""A conversation with a model and nothing else: no tools, no sandbox. It plays simulated users.

One model call a prompt, in whichever wire format the model speaks (`ROLLOUT_API`), so that no translation is needed.
A call that the provider asks to repeat (429, 5xx) is repeated twice; the deadline is whoever waits for the answer.
Needs asyncio, as the gateway does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import anyio
import attrs
import msgspec

from orchestrator.agents.factories.common import Endpoint, RecordedSession
from states.errors import AgentError, ConnectError, ProviderError
from states.ports import AgentCapabilities, AskHandler

TRIES = 3
WAIT_SEC = 20.0
"""The longest pause before a call is repeated, whatever the provider asks for."""

_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
_MAX_TOKENS = 4096
_STOPS = {
    "length": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_tokens": "max_tokens",
    "content_filter": "refusal",
    "refusal": "refusal",
}
Json = dict[str, Any]


@attrs.frozen
class ModelUser:
    """Builds conversations."""

    async def connect(self, sandbox: Any, role: str, *, agent_env: Mapping[str, str]) -> ModelUserSession:  # noqa: ARG002
        """Begin a conversation. Raises `ConnectError` when `agent_env` names no model, and off asyncio."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise ConnectError("model-user needs asyncio, as the gateway does", retryable=False) from None
        endpoint = Endpoint.of(agent_env, f"the role {role} (model-user)")
        return ModelUserSession(endpoint, agent_env.get("ROLLOUT_API", "openai-chat"))

    def capabilities(self) -> AgentCapabilities:
        """It never asks."""
        return AgentCapabilities()


@attrs.define(eq=False)
class ModelUserSession(RecordedSession):
    """One conversation. A cancel ends the wait for the model."""

    endpoint: Endpoint
    api: str
    _messages: list[Json] = attrs.field(factory=list, init=False)
    _turns: list[anyio.CancelScope] = attrs.field(factory=list, init=False)

    async def prompt(self, text: str) -> str:
        """Ask the model; its words are a message. Raises `ProviderError` with its status."""
        self.record.prompted(text)
        self._messages.append({"role": "user", "content": text})
        with anyio.CancelScope() as scope:
            self._turns[:] = [scope]
            said, why = _read(self.api, await self._call())
            self._messages.append({"role": "assistant", "content": said or "(nothing)"})
            self.record.said(said)
            return _STOPS.get(why, "end_turn")
        return "cancelled"

    async def _call(self) -> Json:
        import aiohttp

        path, headers, body = _request(self.api, self.endpoint, self._messages)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        async with aiohttp.ClientSession(timeout=timeout, headers=headers) as client:
            for last in (*[False] * (TRIES - 1), True):
                try:
                    async with client.post(self.endpoint.base_url + path, json=body, allow_redirects=False) as answer:
                        content = await answer.read()
                        if answer.status == 200:
                            return _decoded(content)
                        if last or answer.status not in _AGAIN or answer.headers.get("x-should-retry") == "false":
                            said = content[:2000].decode("utf-8", "replace")
                            raise ProviderError(
                                f"the model answered HTTP {answer.status}: {said}", status=answer.status
                            )
                        pause = answer.headers.get("Retry-After", "1")
                except aiohttp.ClientError as error:
                    if last:
                        raise ProviderError(f"the model cannot be reached: {error}") from error
                    pause = "1"
                await anyio.sleep(min(float(pause) if pause.isdigit() else 1.0, WAIT_SEC))
        raise AssertionError

    async def cancel(self) -> None:
        """End the turn in flight."""
        for scope in self._turns:
            scope.cancel()

    def on_ask_user(self, handler: AskHandler | None) -> None:
        """It never asks."""


def _request(api: str, endpoint: Endpoint, messages: list[Json]) -> tuple[str, dict[str, str], Json]:
    """Path after `/v1`, headers and body of a call."""
    bearer = {"Authorization": f"Bearer {endpoint.api_key}"}
    if api == "anthropic-messages":
        headers = {"x-api-key": endpoint.api_key, "anthropic-version": "2023-06-01"}
        return "/messages", headers, {"model": endpoint.model, "max_tokens": _MAX_TOKENS, "messages": messages}
    if api == "openai-responses":
        return "/responses", bearer, {"model": endpoint.model, "input": messages, "store": False}
    return "/chat/completions", bearer, {"model": endpoint.model, "messages": messages}


def _read(api: str, reply: Json) -> tuple[str, str]:
    """The words of an answer, and the provider's word for why it stopped. Raises `AgentError`."""
    try:
        if api == "anthropic-messages":
            texts = [block["text"] for block in reply["content"] if block["type"] == "text"]
            return "".join(texts), reply.get("stop_reason") or ""
        if api == "openai-responses":
            parts = [part for item in reply["output"] if item["type"] == "message" for part in item["content"]]
            said = "".join(part.get("text") or part.get("refusal") or "" for part in parts)
            refused = any(part["type"] == "refusal" for part in parts)
            return said, "refusal" if refused else (reply.get("incomplete_details") or {}).get("reason", "")
        choice = reply["choices"][0]
        message = choice["message"]
        refusal = message.get("refusal")
        return refusal or message.get("content") or "", "refusal" if refusal else choice.get("finish_reason") or ""
    except (LookupError, TypeError, AttributeError) as error:
        raise AgentError(f"the model's answer cannot be read: {type(error).__name__}: {error}") from error


def _decoded(content: bytes) -> Json:
    try:
        reply: Json = msgspec.json.decode(content, type=dict)
    except msgspec.DecodeError as error:
        raise AgentError(f"the model's answer is no JSON object: {error}") from error
    return reply
