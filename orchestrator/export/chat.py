"""A model call as a conversation, whatever wire format it was made in.

`llm.jsonl` keeps requests and responses as they went over the wire, in one of three formats. What exports need of them
is the same each time: who said what, which tools were called with what, why the model stopped. Reading is forgiving:
what a log holds was written by agents and providers, so an odd part is left out or kept as its JSON, never an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import attrs

JSON = Mapping[str, Any]
Finish = Literal["stop", "length", "tool_calls", "content_filter", ""]
"""Why a model stopped, in the words of OpenAI's chat format; empty where it does not say."""


@attrs.frozen
class ToolUse:
    """A model's wish to call a tool. `arguments` is the text that the model wrote: JSON, unless it wrote no JSON."""

    id: str
    name: str
    arguments: str = "{}"

    def parsed(self) -> dict[str, Any]:
        """The arguments by name; what is no JSON object stands under `input`."""
        return arguments_of(self.arguments)


@attrs.frozen
class Message:
    """One message of a conversation. `uses` is an assistant's, `use` names the call that a tool's result answers."""

    role: Literal["system", "user", "assistant", "tool"]
    text: str = ""
    thought: str = ""
    uses: tuple[ToolUse, ...] = ()
    use: str = ""


@attrs.frozen
class Tool:
    """A tool that a model may call, its parameters as JSON Schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = attrs.field(factory=dict)


def arguments_of(value: Any) -> dict[str, Any]:
    """The arguments of a call by name, from their text or from what it stands for.

    >>> arguments_of('{"command": "ls"}'), arguments_of("ls")
    ({'command': 'ls'}, {'input': 'ls'})
    """
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except ValueError:
            return {"input": value}
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {"input": value}


def text_of(content: Any) -> str:
    """The words of a content value: text, a block, or a list of blocks; pictures and the like are left out."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        found = next((content[key] for key in ("text", "refusal", "content", "output") if content.get(key)), "")
        return text_of(found)
    return "\n".join(filter(None, map(text_of, content))) if isinstance(content, list) else ""


def asked(api: str, request: JSON) -> tuple[Message, ...]:
    """The messages of a request, instructions first."""
    return tuple(_READERS.get(api, _chat)(request))


def answered(api: str, response: JSON | None) -> Message | None:
    """What the model said; None where there is no reply (an error, a call that was cut)."""
    if not response or response.get("error"):
        return None
    if api == "anthropic-messages":
        given: Iterable[Message] = _anthropic([{"role": "assistant", "content": response.get("content") or []}])
    elif api == "openai-responses":
        given = _responses_items(response.get("output") or [])
    else:
        given = _chat({"messages": [{**_map(_first_choice(response).get("message")), "role": "assistant"}]})
    whole = _joined(given)
    return whole if whole != Message("assistant") else None


def finish_of(api: str, response: JSON | None) -> Finish:
    """Why the model stopped."""
    if not response:
        return ""
    if api == "anthropic-messages":
        return _ANTHROPIC_STOPS.get(str(response.get("stop_reason")), "")
    if api == "openai-responses":
        if response.get("status") == "incomplete":
            return "content_filter" if "filter" in str(response.get("incomplete_details")) else "length"
        calls = any(str(item.get("type", "")).endswith("_call") for item in _dicts(response.get("output")))
        return "tool_calls" if calls else "stop"
    return _CHAT_STOPS.get(str(_first_choice(response).get("finish_reason")), "")


def tools_of(api: str, request: JSON) -> tuple[Tool, ...]:
    """The tools that a request offers; those of a namespace by their own names."""
    return tuple(_tools(api, request.get("tools")))


_ANTHROPIC_STOPS: dict[str, Finish] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_CHAT_STOPS: dict[str, Finish] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


def _dicts(value: Any) -> Iterator[JSON]:
    yield from (item for item in value if isinstance(item, Mapping)) if isinstance(value, list) else ()


def _map(value: Any) -> JSON:
    return value if isinstance(value, Mapping) else {}


def _first_choice(response: JSON) -> JSON:
    return next(_dicts(response.get("choices")), {})


def _joined(messages: Iterable[Message]) -> Message:
    """An assistant's messages as one: a reply may come in several items."""
    parts = [message for message in messages if message.role == "assistant"]
    return Message(
        "assistant",
        "\n".join(filter(None, (part.text for part in parts))),
        "\n".join(filter(None, (part.thought for part in parts))),
        tuple(use for part in parts for use in part.uses),
    )


def _chat(request: JSON) -> Iterator[Message]:
    for message in _dicts(request.get("messages")):
        role, text = message.get("role"), text_of(message.get("content"))
        if role == "tool":
            yield Message("tool", text, use=str(message.get("tool_call_id", "")))
        elif role == "assistant":
            uses = [
                (call, _map(call.get("function") or call.get("custom"))) for call in _dicts(message.get("tool_calls"))
            ]
            thought = text_of(message.get("reasoning_content") or message.get("reasoning") or "")
            text = text or text_of(message.get("refusal"))
            yield Message(
                "assistant",
                text,
                thought,
                tuple(
                    ToolUse(str(call.get("id", "")), str(f.get("name", "")), _raw(f.get("arguments", f.get("input"))))
                    for call, f in uses
                ),
            )
        else:
            yield Message("system" if role in {"system", "developer"} else "user", text)


def _raw(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments if arguments is not None else {})


def _messages_request(request: JSON) -> Iterator[Message]:
    if text := text_of(request.get("system")):
        yield Message("system", text)
    yield from _anthropic(request.get("messages"))


def _anthropic(messages: Any) -> Iterator[Message]:
    for message in _dicts(messages):
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(_dicts(content))
        if message.get("role") == "assistant":
            yield Message(
                "assistant",
                text_of([block for block in blocks if block.get("type") == "text"]),
                "\n".join(str(block.get("thinking", "")) for block in blocks if block.get("type") == "thinking"),
                tuple(
                    ToolUse(str(block.get("id", "")), str(block.get("name", "")), _raw(block.get("input")))
                    for block in blocks
                    if str(block.get("type", "")).endswith("tool_use")
                ),
            )
            continue
        for block in blocks:
            if block.get("type") == "tool_result":
                yield Message("tool", text_of(block.get("content")), use=str(block.get("tool_use_id", "")))
        if text := text_of([block for block in blocks if block.get("type") == "text"]):
            yield Message("user", text)


def _responses_request(request: JSON) -> Iterator[Message]:
    if text := text_of(request.get("instructions")):
        yield Message("system", text)
    given = request.get("input")
    yield from _responses_items([{"role": "user", "content": given}] if isinstance(given, str) else given)


def _responses_items(items: Any) -> Iterator[Message]:
    """Items of the responses format; what a model said at one time stands in several, so they are joined."""
    said: list[Message] = []
    for item in _dicts(items):
        kind = str(item.get("type", "message"))
        if kind == "reasoning":
            said.append(Message("assistant", thought=text_of(item.get("summary") or item.get("content"))))
        elif kind.endswith("_call"):
            name = str(item.get("name") or kind.removesuffix("_call"))
            given = item.get("arguments", item.get("input", item.get("action")))
            said.append(Message("assistant", uses=(ToolUse(str(item.get("call_id", "")), name, _raw(given)),)))
        elif kind == "message" and item.get("role") == "assistant":
            said.append(Message("assistant", text_of(item.get("content"))))
        else:
            if said:
                yield _joined(said)
                said = []
            if kind.endswith("_call_output"):
                yield Message("tool", text_of(item.get("output")), use=str(item.get("call_id", "")))
            elif kind == "message":
                system = item.get("role") in {"system", "developer"}
                yield Message("system" if system else "user", text_of(item.get("content")))
    if said:
        yield _joined(said)


_READERS = {
    "openai-chat": _chat,
    "openai-responses": _responses_request,
    "anthropic-messages": _messages_request,
}


def _tools(api: str, given: Any) -> Iterator[Tool]:
    for tool in _dicts(given):
        if tool.get("type") == "namespace":
            yield from _tools(api, tool.get("tools"))
            continue
        inner = tool.get("function")
        about: JSON = inner if isinstance(inner, Mapping) else tool
        parameters = about.get("parameters") or about.get("input_schema")
        name = str(about.get("name") or tool.get("type") or "")
        yield Tool(name, str(about.get("description") or ""), parameters if isinstance(parameters, Mapping) else {})
