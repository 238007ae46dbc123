"""Reading what providers write: folding of streams, usage, errors, prices, and the references of llm.jsonl."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gateway.dialects import DIALECTS, Counts
from orchestrator.gateway.formats import CHAT, FORMATS, MESSAGES, RESPONSES, error_message, json_object, stream_events
from orchestrator.gateway.llm_log import Interner, expand, redact
from orchestrator.gateway.portable import LEFT_OUT, portable
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.script import Call, Refuse, Say
from orchestrator.gateway.streaming import without_usage
from states.events import Usage

REPLIES = {
    "words": Say("Everything is done, as far as I can tell."),
    "a refusal": Refuse("No, I would rather not do that."),
    "a tool call": Call("bash", {"command": "echo '\"quoted\"' > ü"}, text="First I look."),
}
every_api = pytest.mark.parametrize("api", FORMATS)


@every_api
@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_a_folded_stream_is_the_plain_reply(api, reply):
    """What the deltas add up to has the content, the reason and the usage that the plain reply has."""
    body, counts = {"model": "m", "stream_options": {"include_usage": True}}, Counts(100, 20, 30, 7)
    dialect, form = DIALECTS[api], FORMATS[api]
    plain = dialect.plain(reply, counts, 1, body)
    folded = form.fold(stream_events(b"".join(dialect.stream(reply, counts, 1, body))))
    assert folded.ended
    assert folded.error is None
    assert form.usage(folded.reply) == form.usage(plain)
    key = {"openai-chat": "choices", "openai-responses": "output", "anthropic-messages": "content"}[api]

    def trimmed(value):
        return json.loads(json.dumps(value).replace(', "logprobs": null', "").replace('"content": null, ', ""))

    got, want = trimmed(folded.reply[key]), trimmed(plain[key])
    for choice in got if api == "openai-chat" else ():
        if choice["message"]["content"] == "":
            del choice["message"]["content"]
    assert got == want


@every_api
def test_a_cut_stream_keeps_what_came_and_says_that_it_was_cut(api):
    """Half a stream has half the words and no end."""
    events = list(DIALECTS[api].stream(Say("one two three four five six seven eight"), Counts(9, 9), 1, {}))
    folded = FORMATS[api].fold(stream_events(b"".join(events[: len(events) // 2])))
    assert not folded.ended
    assert FORMATS[api].fold([]).ended is False


def test_an_error_in_mid_stream_is_found_in_each_format():
    """Providers answer 200 and fail later; each has its own way to say so."""
    said = {"error": {"message": "overloaded", "type": "server_error"}}
    assert CHAT.fold([{"choices": [{"delta": {"content": "x"}}]}, said]).error == "overloaded"
    assert MESSAGES.fold([{"type": "error", **said}]).error == "overloaded"
    failed = {"type": "response.failed", "response": {"id": "r", **said}}
    assert RESPONSES.fold([failed]).error == "overloaded"
    assert RESPONSES.fold([{"type": "error", "message": "bad"}]).error == "bad"
    assert RESPONSES.fold([{"type": "response.failed"}]).error == "the response failed"


def test_errors_of_all_kinds_have_a_message():
    """Whatever a server puts under `error`, words come out."""
    assert error_message({"error": "plain words"}) == "plain words"
    assert error_message({"error": {"code": 7}}) == "{'code': 7}"
    assert error_message({"error": None}) is None
    assert error_message(["no object"]) is None


def test_anthropic_usage_is_normalised_and_cumulative():
    """Anthropic counts cached tokens apart; here input includes them. The last word of a stream counts."""
    start = {"input_tokens": 10, "cache_read_input_tokens": 200, "cache_creation_input_tokens": 30, "output_tokens": 1}
    events = [
        {"type": "message_start", "message": {"id": "m", "usage": start}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "s"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ]
    folded = MESSAGES.fold(events)
    assert folded.reply["content"] == [{"type": "thinking", "thinking": "hm", "signature": "s"}]
    assert MESSAGES.usage(folded.reply) == Usage(1, 0, 240, 5, 200, 30, None)


@pytest.mark.parametrize("number", [-5, "12", None, 1.5, [], {}])
@every_api
def test_a_number_of_tokens_that_is_none_counts_nothing(api, number):
    """Sums only grow, whatever a server writes."""
    usage = {"prompt_tokens": number, "input_tokens": number, "output_tokens": number, "completion_tokens": number}
    assert FORMATS[api].usage({"usage": usage}) == Usage(1, 0, 0, 0, 0, 0, None)
    assert FORMATS[api].usage({"usage": None}) is None


def test_json_of_others_never_raises():
    """Garbage, lists and towers of brackets are no object."""
    assert json_object(b"{") is None
    assert json_object(b"[]") is None
    assert json_object(b"[" * 50_000) is None
    assert list(stream_events(b'data: [DONE]\n\ndata: {"a": 1}\r\n\r\n: a comment\nevent: x\ndata: {"cut')) == [
        {"a": 1}
    ]


def test_a_broken_tool_input_is_kept_as_text():
    """Models write invalid JSON now and then; the line in llm.jsonl shows it."""
    events = [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "input": {}}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"a": '}},
    ]
    assert MESSAGES.fold(events).reply["content"][0]["input"] == '{"a": '


def test_prices_know_list_prices_tiers_and_what_they_do_not_know():
    """A model with a price by prompt size costs more beyond the step; an unknown one has no price at all."""
    tiered = Prices(1.0, 10.0, tiers=((100, Prices(2.0, 20.0)), (1000, Prices(4.0, 40.0))))
    assert [tiered.cost(Usage(1, 0, n, 1)) for n in (100, 101, 1001)] == [110.0, 222.0, 4044.0]
    assert Prices.known("nobody/has-this-model") is None
    pytest.importorskip("mcp")
    gemini = Prices.known("gemini/gemini-2.5-pro")
    assert gemini.tiers[0][0] == 200_000
    assert gemini.tiers[0][1].input == 2 * gemini.input
    assert Prices.known("anthropic/claude-sonnet-4-5").cache_read > 0


def test_references_of_a_log_are_resolved_and_strangers_left_alone():
    """Short values are written as they are; a reference to nothing known stays what it is."""
    log = Interner()
    body = {"system": "s" * 200, "messages": [{"role": "user", "content": "short"}, {"sha256": "ab"}], "n": 1}
    lines = [{"request": log.compact(body, ["system", "messages"]), "response": None} for _ in range(2)]
    assert set(lines[1]["request"]["system"]) == {"sha256"}
    assert [line["request"] for line in expand(lines)] == [body, body]


def test_secrets_are_cut_out_wherever_they_stand():
    """In keys, values and the middle of words; a value without any is the very same object."""
    value = {"a-hidden": ["say hidden", {"b": "x"}]}
    assert redact(value, ["hidden", ""]) == {"a-[redacted]": ["say [redacted]", {"b": "x"}]}
    assert redact(value, ["absent"]) is value


@every_api
def test_an_agent_cannot_steer_litellm_through_its_request(api):
    """Fields that are litellm's own arguments, or another provider's handles, never get there."""
    evil = {
        "api_base": "http://evil", "api_key": "k", "base_url": "http://evil", "fallbacks": [{"model": "x"}],
        "mock_response": "42", "extra_headers": {}, "metadata": {}, "vertex_credentials": "/etc/passwd",
        "previous_response_id": "r", "model": "other", "custom_llm_provider": "x", "num_retries": 9,
    }  # fmt: skip
    good = {"messages": [], "input": [], "temperature": 1, "stream": True}
    left = portable(FORMATS[api], evil | good)
    assert set(left) <= set(good)
    assert left["stream"] is True


@every_api
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://evil/?secret"}},
        {"type": "input_image", "image_url": "https://evil/"},
        {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}},
        {"type": "document", "source": {"type": "file", "file_id": "f"}},
        {"type": "file", "file": {"file_data": "/etc/passwd"}},
    ],
)
def test_media_that_lie_elsewhere_are_left_out(api, part):
    """LiteLLM would fetch them from the host's network, which a sandbox without one must not reach."""
    body = {"messages": [{"role": "user", "content": [part]}], "input": [{"role": "user", "content": [part]}]}
    nested = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [part]}]}
    body["messages"].append(nested)
    left = json.dumps(portable(FORMATS[api], body))
    assert LEFT_OUT in left
    assert "evil" not in left
    assert "passwd" not in left


def test_what_a_request_itself_holds_is_kept():
    """Inline images, tool calls with URLs in their arguments, and functions go through untouched."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    use = {"type": "tool_use", "id": "t", "name": "fetch", "input": {"url": "http://example.org"}}
    message = {"role": "assistant", "content": [image, use, {"type": "text", "text": "http://example.org"}]}
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "web_search"}]
    left = portable(CHAT, {"messages": [message], "tools": tools, "tool_choice": "auto"})
    assert left == {"messages": [message], "tools": tools[:1], "tool_choice": "auto"}
    assert portable(CHAT, {"tools": tools[1:], "tool_choice": "auto"}) == {}
    call = {"type": "function_call_output", "call_id": "c", "output": "http://example.org"}
    assert portable(RESPONSES, {"input": [{"type": "reasoning"}, call]}) == {"input": [call]}


MEMBER = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "tool"]), "content": st.integers(0, 3).map(lambda n: f"{n}" * 99)}
)


@given(st.lists(st.lists(MEMBER | st.fixed_dictionaries({"role": st.just("x")}), max_size=8), max_size=8))
def test_whatever_a_conversation_does_its_lines_can_be_expanded(requests):
    """It may grow, shrink, branch or repeat itself: every request comes back as it was sent."""
    log = Interner()
    lines = [json.loads(json.dumps({"request": log.compact({"messages": r}, ["messages"])})) for r in requests]
    assert [line["request"]["messages"] for line in expand(lines)] == requests


@given(st.data())
def test_usage_is_hidden_however_a_stream_is_cut_into_chunks(data):
    """The client sees every event but the usage, in order, wherever the network cuts."""
    body = {"model": "m", "stream_options": {"include_usage": True}}
    events = list(DIALECTS["openai-chat"].stream(Say("some words that are streamed"), Counts(9, 9), 1, body))
    raw = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]

    async def shown():
        async def network():
            for chunk in chunks:
                yield chunk

        call = SimpleNamespace(chunks=[])
        seen = [chunk async for chunk in without_usage(call, network())]
        return b"".join(seen), b"".join(call.chunks)

    seen, kept = asyncio.run(shown())
    assert seen == b"".join(event for event in events if b'"usage"' not in event)
    assert b'"prompt_tokens": 9' in kept
