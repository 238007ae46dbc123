"""The three wire formats as a model's provider speaks them: requests read as a `Conversation`, replies written.

One class a format, each with the same members: `read`, `plain`, `stream`. They are what a scripted upstream answers
with; the gateway itself only reads usage and passes bytes (see `formats.py`, which also holds paths and error bodies).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs

from orchestrator.gateway.formats import Api
from orchestrator.gateway.script import Call, Conversation, Refuse, Say, Tool

JSON = dict[str, Any]
Answer = Say | Call | Refuse

_INJECTED = re.compile(r"\s*<[a-zA-Z_-]+[ >]")
"""What agents put before, between and after a user's own words: `<environment_context>`, `<system-reminder>`, ..."""


@attrs.frozen
class Counts:
    """The tokens that a scripted provider reports for one call; `input` includes the cached ones."""

    input: int
    output: int
    cache_read: int = 0
    cache_creation: int = 0


class ChatDialect:
    """OpenAI chat completions."""

    caches_writes: ClassVar[bool] = False

    def read(self, body: JSON) -> Conversation:
        """The conversation in a request."""
        tools = [
            Tool(t["function"]["name"], t["function"].get("parameters") or {})
            for t in body.get("tools") or ()
            if t.get("type") == "function"
        ]
        turns = [("result" if m["role"] == "tool" else m["role"], _text(m.get("content"))) for m in body["messages"]]
        return _conversation(turns, tools, body)

    def plain(self, reply: Answer, counts: Counts, number: int, body: JSON) -> JSON:
        """The whole reply."""
        message: JSON = {"role": "assistant", "content": None if isinstance(reply, Refuse) else reply.text or None}
        if isinstance(reply, Refuse):
            message["refusal"] = reply.text
        if isinstance(reply, Call):
            function = {"name": reply.tool, "arguments": json.dumps(dict(reply.arguments))}
            message["tool_calls"] = [{"id": f"call_{number}", "type": "function", "function": function}]
        choice = {"index": 0, "message": message, "finish_reason": self._finish(reply), "logprobs": None}
        return {**self._head(number, body, "chat.completion"), "choices": [choice], "usage": self._usage(counts)}

    def stream(self, reply: Answer, counts: Counts, number: int, body: JSON) -> Iterator[bytes]:
        """The reply as server-sent events, usage last and only when asked for."""
        head = self._head(number, body, "chat.completion.chunk")

        def chunk(delta: JSON, finish: str | None = None) -> bytes:
            return sse({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        yield chunk({"role": "assistant", "content": ""})
        for piece in pieces(reply.text):
            yield chunk({"refusal" if isinstance(reply, Refuse) else "content": piece})
        if isinstance(reply, Call):
            first = {"name": reply.tool, "arguments": ""}
            yield chunk({"tool_calls": [{"index": 0, "id": f"call_{number}", "type": "function", "function": first}]})
            for piece in pieces(json.dumps(dict(reply.arguments))):
                yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
        yield chunk({}, self._finish(reply))
        if (body.get("stream_options") or {}).get("include_usage"):
            yield sse({**head, "choices": [], "usage": self._usage(counts)})
        yield b"data: [DONE]\n\n"

    def _head(self, number: int, body: JSON, kind: str) -> JSON:
        return {"id": f"chatcmpl-{number}", "object": kind, "created": 1_700_000_000, "model": body.get("model", "")}

    def _finish(self, reply: Answer) -> str:
        if _is_cut(reply):
            return "length"
        return {Call: "tool_calls", Refuse: "content_filter"}.get(type(reply), "stop")

    def _usage(self, counts: Counts) -> JSON:
        return {
            "prompt_tokens": counts.input,
            "completion_tokens": counts.output,
            "total_tokens": counts.input + counts.output,
            "prompt_tokens_details": {"cached_tokens": counts.cache_read},
        }


class ResponsesDialect:
    """OpenAI responses."""

    caches_writes: ClassVar[bool] = False

    def read(self, body: JSON) -> Conversation:
        """The conversation in a request. Namespaced tools are offered by their own names."""
        given = body.get("input") or []
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        turns = [("system", str(body.get("instructions") or ""))]
        for item in items:
            kind = item.get("type", "message")
            if kind == "message":
                turns.append((item["role"], _text(item.get("content"))))
            elif kind.endswith("_call_output"):
                turns.append(("result", _text(item.get("output"))))
        return _conversation(turns, list(self._tools(body.get("tools") or ())), body)

    def _tools(self, tools: Iterable[JSON]) -> Iterator[Tool]:
        for tool in tools:
            if tool.get("type") == "namespace":
                yield from self._tools(tool.get("tools") or ())
            else:
                yield Tool(tool.get("name") or tool["type"], tool.get("parameters") or {}, tool["type"])

    def plain(self, reply: Answer, counts: Counts, number: int, body: JSON) -> JSON:
        """The whole reply."""
        return self._response(body, number, self._status(reply), self._items(reply, number, body), counts)

    def stream(self, reply: Answer, counts: Counts, number: int, body: JSON) -> Iterator[bytes]:
        """The reply as server-sent events; usage stands in `response.completed`."""
        order = iter(range(1_000_000))

        def event(kind: str, **fields: Any) -> bytes:
            return sse({"type": kind, "sequence_number": next(order), **fields}, kind)

        yield event("response.created", response=self._response(body, number, "in_progress", [], None))
        yield event("response.in_progress", response=self._response(body, number, "in_progress", [], None))
        items = self._items(reply, number, body)
        for at, item in enumerate(items):
            hollow = {**item, "status": "in_progress"}
            if "content" in item:
                hollow["content"] = []
            elif "arguments" in item:
                hollow["arguments"] = ""
            yield event("response.output_item.added", output_index=at, item=hollow)
            yield from self._deltas(event, item, at)
            yield event("response.output_item.done", output_index=at, item=item)
        status = self._status(reply)
        yield event(f"response.{status}", response=self._response(body, number, status, items, counts))

    def _status(self, reply: Answer) -> str:
        return "incomplete" if _is_cut(reply) else "completed"

    def _deltas(self, event: Any, item: JSON, at: int) -> Iterator[bytes]:
        where = {"item_id": item["id"], "output_index": at}
        if item["type"] == "message":
            [part] = item["content"]
            key = "refusal" if part["type"] == "refusal" else "text"
            kind = "response.refusal" if key == "refusal" else "response.output_text"
            yield event("response.content_part.added", **where, content_index=0, part={**part, key: ""})
            for piece in pieces(part[key]):
                yield event(f"{kind}.delta", **where, content_index=0, delta=piece, logprobs=[])
            yield event(f"{kind}.done", **where, content_index=0, **{key: part[key]}, logprobs=[])
            yield event("response.content_part.done", **where, content_index=0, part=part)
        elif item["type"] == "function_call":
            for piece in pieces(item["arguments"]):
                yield event("response.function_call_arguments.delta", **where, delta=piece)
            yield event("response.function_call_arguments.done", **where, **_pick(item, "arguments", "name"))

    def _items(self, reply: Answer, number: int, body: JSON) -> list[JSON]:
        items: list[JSON] = []
        if reply.text:
            part: JSON = {"type": "output_text", "text": reply.text, "annotations": [], "logprobs": []}
            if isinstance(reply, Refuse):
                part = {"type": "refusal", "refusal": reply.text}
            message = {"id": f"msg_{number}", "type": "message", "role": "assistant", "status": "completed"}
            items.append({**message, "content": [part]})
        if isinstance(reply, Call):
            items.append(self._call(reply, number, body))
        return items

    def _call(self, reply: Call, number: int, body: JSON) -> JSON:
        ids = {"call_id": f"call_{number}", "status": "completed"}
        if reply.kind == "local_shell":
            action: JSON = {"type": "exec", "env": {}, **reply.arguments}
            return {"id": f"lsh_{number}", "type": "local_shell_call", **ids, "action": action}
        if reply.kind == "shell":
            return {"id": f"sh_{number}", "type": "shell_call", **ids, "action": dict(reply.arguments)}
        if reply.kind == "custom":
            free = str(next(iter(reply.arguments.values()), ""))
            return {"id": f"ctc_{number}", "type": "custom_tool_call", **ids, "name": reply.tool, "input": free}
        call = {"id": f"fc_{number}", "type": "function_call", **ids, "name": reply.tool}
        for tool in body.get("tools") or ():
            if tool.get("type") == "namespace" and any(t.get("name") == reply.tool for t in tool.get("tools") or ()):
                call["namespace"] = tool["name"]
        return {**call, "arguments": json.dumps(dict(reply.arguments))}

    def _response(self, body: JSON, number: int, status: str, items: list[JSON], counts: Counts | None) -> JSON:
        usage = counts and {
            "input_tokens": counts.input,
            "input_tokens_details": {"cached_tokens": counts.cache_read},
            "output_tokens": counts.output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts.input + counts.output,
        }
        return {
            "id": f"resp_{number}", "object": "response", "created_at": 1_700_000_000, "status": status,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.get("instructions"), "metadata": {},
            "model": body.get("model", ""), "output": items, "parallel_tool_calls": False, "temperature": None,
            "tool_choice": "auto", "tools": [], "top_p": None, "usage": usage,
        }  # fmt: skip


class MessagesDialect:
    """Anthropic messages."""

    caches_writes: ClassVar[bool] = True

    def read(self, body: JSON) -> Conversation:
        """The conversation in a request."""
        tools = [
            Tool(t["name"], t.get("input_schema") or {}, t.get("type") or "function") for t in body.get("tools") or ()
        ]
        tools = [attrs.evolve(t, kind="function") if t.kind == "custom" else t for t in tools]
        turns = [("system", _text(body.get("system")))]
        for message in body["messages"]:
            content = message["content"]
            blocks = [] if isinstance(content, str) else content
            turns += [("result", _text(b.get("content"))) for b in blocks if b["type"] == "tool_result"]
            texts = content if isinstance(content, str) else [b for b in blocks if b["type"] == "text"]
            genuine = not any(b["type"] == "tool_result" for b in blocks)
            if texts:
                turns.append((message["role"] if genuine else "note", _text(texts)))
        return _conversation(turns, tools, body)

    def plain(self, reply: Answer, counts: Counts, number: int, body: JSON) -> JSON:
        """The whole reply."""
        usage = self._usage(counts, counts.output)
        return {**self._head(number, body), **self._stop(reply), "content": self._blocks(reply, number), "usage": usage}

    def stream(self, reply: Answer, counts: Counts, number: int, body: JSON) -> Iterator[bytes]:
        """The reply as server-sent events; input tokens come first, output tokens last."""

        def event(kind: str, **fields: Any) -> bytes:
            return sse({"type": kind, **fields}, kind)

        yield event("message_start", message={**self._head(number, body), "usage": self._usage(counts, 1)})
        for at, block in enumerate(self._blocks(reply, number)):
            is_text = block["type"] == "text"
            yield event(
                "content_block_start", index=at, content_block={**block, **({"text": ""} if is_text else {"input": {}})}
            )
            yield event("ping")
            for piece in pieces(block["text"] if is_text else json.dumps(block["input"])):
                delta = (
                    {"type": "text_delta", "text": piece}
                    if is_text
                    else {"type": "input_json_delta", "partial_json": piece}
                )
                yield event("content_block_delta", index=at, delta=delta)
            yield event("content_block_stop", index=at)
        yield event("message_delta", delta=self._stop(reply), usage={"output_tokens": counts.output})
        yield event("message_stop")

    def _head(self, number: int, body: JSON) -> JSON:
        head = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": body.get("model", "")}
        return {**head, "content": [], "stop_reason": None, "stop_sequence": None}

    def _stop(self, reply: Answer) -> JSON:
        reason = {Call: "tool_use", Refuse: "refusal"}.get(type(reply), "max_tokens" if _is_cut(reply) else "end_turn")
        return {"stop_reason": reason, "stop_sequence": None}

    def _blocks(self, reply: Answer, number: int) -> list[JSON]:
        blocks: list[JSON] = [{"type": "text", "text": reply.text}] if reply.text else []
        if isinstance(reply, Call):
            use = {"type": "tool_use", "id": f"toolu_{number}", "name": reply.tool, "input": dict(reply.arguments)}
            blocks.append(use)
        return blocks

    def _usage(self, counts: Counts, output: int) -> JSON:
        return {
            "input_tokens": counts.input - counts.cache_read - counts.cache_creation,
            "cache_read_input_tokens": counts.cache_read,
            "cache_creation_input_tokens": counts.cache_creation,
            "output_tokens": output,
        }


Dialect = ChatDialect | ResponsesDialect | MessagesDialect

DIALECTS: dict[Api, Dialect] = {
    "openai-chat": ChatDialect(),
    "openai-responses": ResponsesDialect(),
    "anthropic-messages": MessagesDialect(),
}


def sse(data: JSON, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def pieces(text: str, size: int = 24) -> Sequence[str]:
    """A text cut as a stream cuts it; joined they are the text."""
    return [text[at : at + size] for at in range(0, len(text), size)]


def _is_cut(reply: Answer) -> bool:
    return isinstance(reply, Say) and reply.cut


def _pick(item: JSON, *names: str) -> JSON:
    return {name: item[name] for name in names}


def _text(content: Any) -> str:
    """The words in a content value of any of the formats."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        return _text(content.get("text") or content.get("content") or content.get("stdout") or "")
    return "\n".join(_text(part) for part in content or ())


def _conversation(turns: Sequence[tuple[str, str]], tools: list[Tool], body: JSON) -> Conversation:
    """Fold (speaker, text) pairs. A prompt starts anew; what agents inject around it does not.

    A text-only agent shows a command's output as a user message after its own fenced message: that is a result.
    """
    user, system, prompts, after_fence = "", "", 0, False
    results: list[str] = []
    for speaker, text in turns:
        if speaker in {"system", "developer"}:
            system += text
        elif speaker == "result" or (speaker == "user" and after_fence):
            results.append(text)
        elif speaker == "user" and (not _INJECTED.match(text) or not prompts):
            if not _INJECTED.match(text):
                prompts, results = prompts + 1, []
            user = text if prompts else user + text
        after_fence = speaker == "assistant" and not tools and "```" in text
    model = str(body.get("model") or "")
    return Conversation(user, tuple(tools), tuple(results), max(prompts, 1), system, model)
