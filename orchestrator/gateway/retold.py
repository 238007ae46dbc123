"""A whole reply, told as the stream that a client asked for.

Some endpoints answer only in whole (a host's model behind its own Python API); agents ask for streams. What comes out
folds back into the reply (`formats.fold`), so that a client which reads the stream has what it would have got plain.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from orchestrator.gateway.dialects import sse
from orchestrator.gateway.formats import Api

JSON = dict[str, Any]


def as_stream(api: Api, reply: JSON) -> Iterator[bytes]:
    """The server-sent events of a reply in this wire format. Usage is always told."""
    return _TELLERS[api](reply)


def _chat(reply: JSON) -> Iterator[bytes]:
    head = {**{k: v for k, v in reply.items() if k not in {"choices", "usage"}}, "object": "chat.completion.chunk"}
    for choice in reply["choices"]:
        message = dict(choice["message"])
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls)]
        told = {"index": choice["index"], "delta": message, "finish_reason": None}
        yield sse({**head, "choices": [told]})
        yield sse({**head, "choices": [{**told, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    yield sse({**head, "choices": [], "usage": reply.get("usage")})
    yield b"data: [DONE]\n\n"


def _responses(reply: JSON) -> Iterator[bytes]:
    order = iter(range(10_000_000))

    def event(kind: str, **fields: Any) -> bytes:
        return sse({"type": kind, "sequence_number": next(order), **fields}, kind)

    begun = {**reply, "status": "in_progress", "output": [], "usage": None}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for at, item in enumerate(reply["output"]):
        yield event("response.output_item.added", output_index=at, item=_hollow(item))
        where = {"item_id": item.get("id"), "output_index": at}
        if item["type"] == "message":
            for index, part in enumerate(item["content"]):
                yield from _content_part(event, {**where, "content_index": index}, part)
        elif item["type"] == "function_call":
            yield event("response.function_call_arguments.delta", **where, delta=item["arguments"])
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield event("response.function_call_arguments.done", **where, **done)
        yield event("response.output_item.done", output_index=at, item=item)
    kind = "incomplete" if reply.get("status") == "incomplete" else "completed"
    yield event(f"response.{kind}", response=reply)


def _hollow(item: JSON) -> JSON:
    """An item as it is announced: its content and arguments are still to come."""
    emptied = {"content": [], "arguments": "", "status": "in_progress"}
    return {**item, **{key: empty for key, empty in emptied.items() if key in item}}


def _content_part(event: Callable[..., bytes], where: JSON, part: JSON) -> Iterator[bytes]:
    key, kind = ("refusal", "response.refusal") if part["type"] == "refusal" else ("text", "response.output_text")
    yield event("response.content_part.added", **where, part={**part, key: ""})
    yield event(f"{kind}.delta", **where, delta=part[key], logprobs=[])
    yield event(f"{kind}.done", **where, **{key: part[key]}, logprobs=[])
    yield event("response.content_part.done", **where, part=part)


def _messages(reply: JSON) -> Iterator[bytes]:
    def event(kind: str, **fields: Any) -> bytes:
        return sse({"type": kind, **fields}, kind)

    stop = {"stop_reason": reply.get("stop_reason"), "stop_sequence": reply.get("stop_sequence")}
    usage = reply.get("usage") or {}
    yield event("message_start", message={**reply, "content": [], "stop_reason": None, "stop_sequence": None})
    for at, block in enumerate(reply["content"]):
        hollow, deltas = _block(block)
        yield event("content_block_start", index=at, content_block=hollow)
        for delta in deltas:
            yield event("content_block_delta", index=at, delta=delta)
        yield event("content_block_stop", index=at)
    yield event("message_delta", delta=stop, usage={"output_tokens": usage.get("output_tokens", 0)})
    yield event("message_stop")


def _block(block: JSON) -> tuple[JSON, list[JSON]]:
    """A block as it is announced, and the deltas that fill it."""
    match block["type"]:
        case "text":
            return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]
        case "tool_use":
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
        case "thinking":
            signed = {"type": "signature_delta", "signature": block.get("signature") or ""}
            told = [{"type": "thinking_delta", "thinking": block["thinking"]}, signed]
            return {**block, "thinking": "", "signature": ""}, told
        case _:
            return block, []


_TELLERS: dict[Api, Callable[[JSON], Iterator[bytes]]] = {
    "openai-chat": _chat,
    "openai-responses": _responses,
    "anthropic-messages": _messages,
}
