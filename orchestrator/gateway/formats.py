"""The three wire formats as a gateway reads them: what a reply used, what a stream adds up to, how an error looks.

`refusal` is the HTTP status of a call that is not made because there is nothing left to pay it with: the one at which
the format's clients give up at once. (Codex tries a 402 again five times, in seven seconds, and fast-agent once, after
ten; Claude Code tries a 400 again five times.)

Pure functions over parsed JSON. `usage` normalises to the OpenTelemetry GenAI sense: `input_tokens` includes cached
ones, which Anthropic counts apart. `fold` turns the events of a stream into the reply that a plain call would have
had, so that everything else reads one shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import attrs
import msgspec

from states.events import Usage

JSON = dict[str, Any]

Api = Literal["openai-chat", "openai-responses", "anthropic-messages"]
"""A wire format: how a client asks and how a provider answers."""

_ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 501: "not_implemented_error", 529: "overloaded_error",
}  # fmt: skip


LEAST_OUTPUT = 16
"""The lowest output limit that providers take."""
LEAST_THINKING = 1024
"""The lowest thinking budget that Anthropic takes; it lies below the output limit, which thinking counts against."""


@attrs.frozen
class Folded:
    """What a stream added up to. `error` is what the provider said in mid-stream; `ended` is False when it was cut."""

    reply: JSON
    error: str | None = None
    ended: bool = True


class ChatFormat:
    """OpenAI chat completions."""

    api: ClassVar[Api] = "openai-chat"
    path: ClassVar[str] = "/v1/chat/completions"
    interned: ClassVar[tuple[str, ...]] = ("messages", "tools")
    refusal: ClassVar[int] = 400

    def output_limit(self, request: JSON) -> int | None:
        """How many tokens the request wants to be written at most, all its choices together; None without a limit."""
        given = [request[name] for name in _CHAT_LIMITS if _is_count(request.get(name), least=1)]
        return min(given) * _choices(request) if given else None

    def limited(self, request: JSON, most: int, name: str = "max_tokens") -> JSON:
        """The same request with at most so many. `name` is the server's word, where the request has none of its own."""
        each = max(LEAST_OUTPUT, most // _choices(request))
        given = {name: request[name] for name in _CHAT_LIMITS if request.get(name) is not None} or {name: each}
        return request | {
            name: min(each, limit) if _is_count(limit, least=1) else each for name, limit in given.items()
        }

    def usage(self, reply: JSON) -> Usage | None:
        """The tokens of a reply; None when it does not say."""
        found = reply.get("usage")
        if not found:
            return None
        details = found.get("prompt_tokens_details") or {}
        written = details.get("cache_write_tokens")  # LiteLLM's word: OpenAI does not charge for writing its cache
        return _usage(found.get("prompt_tokens"), found.get("completion_tokens"), details.get("cached_tokens"), written)

    def fold(self, events: Iterable[JSON]) -> Folded:
        """Join the deltas of every choice."""
        reply: JSON = {}
        choices: dict[int, JSON] = {}
        error, ended = None, False
        for event in events:
            error = error or error_message(event)
            reply |= {k: v for k, v in event.items() if k not in {"choices", "error"} and v is not None}
            for choice in event.get("choices") or ():
                into = choices.setdefault(choice.get("index", 0), {"message": {}, "finish_reason": None})
                _join_delta(into["message"], choice.get("delta") or {})
                into["finish_reason"] = choice.get("finish_reason") or into["finish_reason"]
                ended = ended or into["finish_reason"] is not None
        return Folded({**reply, "choices": [{"index": i, **choices[i]} for i in sorted(choices)]}, error, ended)

    def error(self, status: int, message: str) -> JSON:
        """An error body as this format's clients read it."""
        return {"error": {"message": message, "type": error_type(status), "param": None, "code": str(status)}}


class ResponsesFormat:
    """OpenAI responses."""

    api: ClassVar[Api] = "openai-responses"
    path: ClassVar[str] = "/v1/responses"
    interned: ClassVar[tuple[str, ...]] = ("instructions", "input", "tools")
    refusal: ClassVar[int] = 400

    def output_limit(self, request: JSON) -> int | None:
        """How many tokens the request wants to be written at most, reasoning included; None without a limit."""
        found = request.get("max_output_tokens")
        return found if _is_count(found, least=1) else None

    def limited(self, request: JSON, most: int, _name: str = "") -> JSON:
        """The same request with at most so many."""
        return {**request, "max_output_tokens": max(LEAST_OUTPUT, most)}

    def usage(self, reply: JSON) -> Usage | None:
        """The tokens of a reply; None when it does not say."""
        found = reply.get("usage")
        if not found:
            return None
        details = found.get("input_tokens_details") or {}
        written = details.get("cache_write_tokens")
        return _usage(found.get("input_tokens"), found.get("output_tokens"), details.get("cached_tokens"), written)

    def fold(self, events: Iterable[JSON]) -> Folded:
        """The last event holds the whole response; until it comes, the items that are done."""
        reply: JSON = {}
        items: list[JSON] = []
        error, ended = None, False
        for event in events:
            kind = event.get("type", "")
            if kind in {"error", "response.failed"}:
                error = error_message(event) or error_message(event.get("response") or {}) or "the response failed"
            if kind == "response.output_item.done":
                items.append(event.get("item") or {})
            if isinstance(event.get("response"), dict):
                reply = event["response"]
                ended = kind in {"response.completed", "response.incomplete"}
        return Folded(reply if ended else {**reply, "output": items}, error, ended)

    def error(self, status: int, message: str) -> JSON:
        """An error body as this format's clients read it."""
        return CHAT.error(status, message)


class MessagesFormat:
    """Anthropic messages."""

    api: ClassVar[Api] = "anthropic-messages"
    path: ClassVar[str] = "/v1/messages"
    interned: ClassVar[tuple[str, ...]] = ("system", "messages", "tools")
    refusal: ClassVar[int] = 402

    def output_limit(self, request: JSON) -> int | None:
        """How many tokens the request wants to be written at most, thinking included; None without a limit."""
        found = request.get("max_tokens")
        return found if _is_count(found) else None

    def limited(self, request: JSON, most: int, _name: str = "") -> JSON:
        """The same request with at most so many; thinking gets half of them, or none where that is too little."""
        most = max(LEAST_OUTPUT, most)
        request = {**request, "max_tokens": most}
        thinking = request.get("thinking")
        if not isinstance(thinking, dict) or not _is_count(thinking.get("budget_tokens")):
            return request
        if most > LEAST_THINKING:
            budget = min(thinking["budget_tokens"], max(LEAST_THINKING, most // 2))
            return {**request, "thinking": {**thinking, "budget_tokens": budget}}
        return _without_thinking(request)

    def usage(self, reply: JSON) -> Usage | None:
        """The tokens of a reply; None when it does not say."""
        found = reply.get("usage")
        if not found:
            return None
        read, written = _count(found.get("cache_read_input_tokens")), _count(found.get("cache_creation_input_tokens"))
        return _usage(_count(found.get("input_tokens")) + read + written, found.get("output_tokens"), read, written)

    def fold(self, events: Iterable[JSON]) -> Folded:
        """Join the deltas of every content block; usage is cumulative, the last word of each number counts."""
        reply: JSON = {}
        blocks: dict[int, JSON] = {}
        inputs: dict[int, str] = {}
        error, ended = None, False
        for event in events:
            match event.get("type"):
                case "message_start":
                    reply = dict(event.get("message") or {})
                case "content_block_start":
                    blocks[event["index"]] = dict(event.get("content_block") or {})
                case "content_block_delta":
                    _join_block(blocks.setdefault(event["index"], {}), event.get("delta") or {}, inputs, event["index"])
                case "message_delta":
                    reply |= event.get("delta") or {}
                    said = {k: v for k, v in (event.get("usage") or {}).items() if v is not None}
                    reply["usage"] = {**(reply.get("usage") or {}), **said}
                case "message_stop":
                    ended = True
                case "error":
                    error = error_message(event)
        for index, text in inputs.items():
            blocks[index]["input"] = _loads(text)
        return Folded({**reply, "content": [blocks[i] for i in sorted(blocks)]}, error, ended)

    def error(self, status: int, message: str) -> JSON:
        """An error body as this format's clients read it."""
        return {"type": "error", "error": {"type": error_type(status), "message": message}}


Format = ChatFormat | ResponsesFormat | MessagesFormat

CHAT, RESPONSES, MESSAGES = ChatFormat(), ResponsesFormat(), MessagesFormat()
FORMATS: dict[Api, Format] = {"openai-chat": CHAT, "openai-responses": RESPONSES, "anthropic-messages": MESSAGES}


def error_type(status: int) -> str:
    """The word that OpenAI and Anthropic use for an error of this HTTP status."""
    return _ERROR_TYPES.get(status, "api_error")


def error_message(body: Any) -> str | None:
    """What an error body says, whichever provider wrote it; None when it holds no error."""
    if not isinstance(body, dict):
        return None
    found = body.get("error")
    if not found:
        return body.get("message") if body.get("type") == "error" else None
    return str(found.get("message") or found) if isinstance(found, dict) else str(found)


def stream_events(raw: bytes) -> Iterator[JSON]:
    """The JSON objects in a stream of server-sent events; what is no object (`[DONE]`, a cut line) is left out."""
    for line in raw.splitlines():
        if line.startswith(b"data:"):
            event = json_object(line[5:])
            if event is not None:
                yield event


def json_object(raw: bytes) -> JSON | None:
    """A JSON object that somebody else wrote; None when it is none, or is nested beyond reason."""
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


_CHAT_LIMITS = ("max_completion_tokens", "max_tokens")
"""Today's word and the one before: servers of this format know one of them, or both."""


def _is_count(value: Any, *, least: int = 0) -> bool:
    """Whether this is a limit. What is none (-1 is "no limit" to some servers) must not pass for one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _choices(request: JSON) -> int:
    """How many replies are written: `best_of` them, where a server knows that, of which `n` are shown."""
    wanted = [request.get("n"), request.get("best_of")]
    return max([1, *(math.ceil(each) for each in wanted if isinstance(each, int | float) and math.isfinite(each))])


def _without_thinking(request: JSON) -> JSON:
    """A request that does not think; the provider refuses to clear thinking in one that does none."""
    request = {**request, "thinking": {"type": "disabled"}}
    management = request.get("context_management")
    if isinstance(management, dict) and isinstance(management.get("edits"), list):
        kept = [edit for edit in management["edits"] if "thinking" not in str(edit)]
        request["context_management"] = {**management, "edits": kept}
        if not kept:
            del request["context_management"]
    return request


def _usage(given: Any, made: Any, read: Any, written: Any) -> Usage:
    return Usage(1, 0, _count(given), _count(made), _count(read), _count(written), None)


def _count(value: Any) -> int:
    """A number of tokens; a server that writes anything else there has not counted."""
    return value if isinstance(value, int) and value > 0 else 0


def _join_delta(message: JSON, delta: JSON) -> None:
    """Add a chat delta to the message so far: texts grow, tool calls grow by index, the rest is taken over."""
    for key, value in delta.items():
        if key == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for part in value or ():
                at = part.get("index", 0)
                calls.extend({} for _ in range(at + 1 - len(calls)))
                function = calls[at].setdefault("function", {"name": "", "arguments": ""})
                for name, text in (part.get("function") or {}).items():
                    function[name] = (function.get(name) or "") + (text or "")
                calls[at] |= {k: v for k, v in part.items() if k not in {"index", "function"} and v is not None}
        elif isinstance(value, str) and key != "role":
            message[key] = (message.get(key) or "") + value
        elif value is not None:
            message[key] = value


def _join_block(block: JSON, delta: JSON, inputs: dict[int, str], index: int) -> None:
    """Add an Anthropic delta to its content block; a tool's input comes as pieces of JSON text."""
    for key, value in delta.items():
        if key == "partial_json":
            inputs[index] = inputs.get(index, "") + value
        elif key == "signature" or not isinstance(value, str):
            block[key] = value
        elif key != "type":
            block[key] = (block.get(key) or "") + value


def _loads(text: str) -> Any:
    try:
        return msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return text
