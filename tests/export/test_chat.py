"""A model call as a conversation: the three wire formats say the same, and odd logs are no error."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.export import chat
from orchestrator.gateway.dialects import DIALECTS, Counts
from orchestrator.gateway.script import Call, Refuse, Say

every_api = pytest.mark.parametrize("api", DIALECTS)
COUNTS = Counts(10, 5)
TOOL = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}


def reply(api, answer):
    """What the scripted provider says in this format."""
    return DIALECTS[api].plain(answer, COUNTS, 7, {"model": "m"})


@every_api
def test_words_and_a_tool_call_are_read_alike(api):
    message = chat.answered(api, reply(api, Call("bash", {"command": "ls"}, text="Let me look.")))
    assert (message.role, message.text) == ("assistant", "Let me look.")
    ((name, arguments),) = [(use.name, use.parsed()) for use in message.uses]
    assert (name, arguments) == ("bash", {"command": "ls"})
    assert message.uses[0].id.endswith("_7")
    assert chat.finish_of(api, reply(api, Call("bash", {}))) == "tool_calls"


@every_api
def test_a_refusal_is_words(api):
    assert chat.answered(api, reply(api, Refuse("I will not."))).text == "I will not."


@every_api
def test_plain_words_end_the_turn(api):
    assert chat.finish_of(api, reply(api, Say("Done."))) == "stop"


REQUESTS = {
    "openai-chat": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "image_url", "image_url": {}}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "Hm.",
                "tool_calls": [{"id": "c1", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "a b"},
        ],
        "tools": [{"type": "function", "function": {"name": "bash", "description": "runs", "parameters": TOOL}}],
    },
    "openai-responses": {
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Look."}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "c1", "name": "bash", "arguments": '{"command": "ls"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "a b"},
        ],
        "tools": [
            {
                "type": "namespace",
                "tools": [{"type": "function", "name": "bash", "description": "runs", "parameters": TOOL}],
            }
        ],
    },
    "anthropic-messages": {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "Look."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm."},
                    {"type": "tool_use", "id": "c1", "name": "bash", "input": {"command": "ls"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "a b"}]},
        ],
        "tools": [{"name": "bash", "description": "runs", "input_schema": TOOL}],
    },
}


@every_api
def test_a_conversation_is_the_same_in_every_format(api):
    use = chat.ToolUse("c1", "bash", '{"command": "ls"}')
    assert chat.asked(api, REQUESTS[api]) == (
        chat.Message("system", "Be brief."),
        chat.Message("user", "Look."),
        chat.Message("assistant", "", "Hm.", (use,)),
        chat.Message("tool", "a b", use="c1"),
    )
    assert chat.tools_of(api, REQUESTS[api]) == (chat.Tool("bash", "runs", TOOL),)


def test_a_tool_that_takes_no_json_is_called_with_its_input():
    """Custom tools of the responses format get text, a local shell an action."""
    items = [
        {"type": "custom_tool_call", "call_id": "1", "name": "patch", "input": "*** Begin"},
        {"type": "local_shell_call", "call_id": "2", "action": {"command": ["ls"]}},
    ]
    uses = chat.answered("openai-responses", {"output": items}).uses
    assert [(use.name, use.parsed()) for use in uses] == [
        ("patch", {"input": "*** Begin"}),
        ("local_shell", {"command": ["ls"]}),
    ]


KEYS = (
    *("messages", "role", "content", "tool_calls", "function", "name", "arguments", "type", "input", "output"),
    *("choices", "message", "system", "tools", "call_id", "id", "text", "summary", "action", "parameters"),
    *("input_schema", "finish_reason", "stop_reason", "required", "properties"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    body=st.dictionaries(
        st.sampled_from(["messages", "input", "system", "tools", "choices", "output", "content"]), JSON
    )
)
@every_api
def test_whatever_stands_in_a_log_is_no_error(api, body):
    """Agents write requests and providers replies: any JSON is read as far as it goes."""
    for message in chat.asked(api, body):
        for use in message.uses:
            json.dumps(use.parsed())
    chat.answered(api, body)
    chat.finish_of(api, body)
    chat.tools_of(api, body)
