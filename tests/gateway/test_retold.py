"""A whole reply told as a stream."""

from __future__ import annotations

import pytest

from orchestrator.gateway.dialects import DIALECTS, Counts
from orchestrator.gateway.formats import FORMATS, stream_events
from orchestrator.gateway.retold import as_stream
from orchestrator.gateway.script import Call, Refuse, Say
from orchestrator.gateway.scripted import ScriptedUpstream, ShellScript

REPLIES = {
    "words": Say("Three words here."),
    "call": Call("bash", {"command": "echo '\"x\"'"}, text="Let me see."),
    "refusal": Refuse("No."),
}


@pytest.mark.parametrize("said", REPLIES)
@pytest.mark.parametrize("api", DIALECTS)
def test_what_is_told_folds_back_into_the_reply(api, said):
    """Words, calls, stop reason and usage: a client that reads the stream has what it would have got plain."""
    reply = DIALECTS[api].plain(REPLIES[said], Counts(100, 20, 30), 1, {"model": "m"})
    folded = FORMATS[api].fold(stream_events(b"".join(as_stream(api, reply))))
    plain = FORMATS[api].fold(
        stream_events(b"".join(DIALECTS[api].stream(REPLIES[said], Counts(100, 20, 30), 1, ASKED)))
    )
    assert folded.ended
    assert folded.error is None
    assert FORMATS[api].usage(folded.reply) == FORMATS[api].usage(reply)
    assert essence(folded.reply) == essence(plain.reply)


ASKED = {"model": "m", "stream_options": {"include_usage": True}}


def essence(reply: dict) -> dict:
    """A reply without what a format does not keep in a stream."""
    kept = {key: value for key, value in reply.items() if key not in {"object", "usage"}}
    for choice in kept.get("choices", ()):
        choice["message"] = {key: value for key, value in choice["message"].items() if value}
        choice.pop("logprobs", None)
    return kept


def test_thinking_is_told_with_its_signature():
    """Without it the provider refuses the thought when the agent sends it back."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
    reply = {"id": "m1", "type": "message", "role": "assistant", "model": "m", "content": [thought], "usage": {}}
    folded = FORMATS["anthropic-messages"].fold(stream_events(b"".join(as_stream("anthropic-messages", reply))))
    assert folded.reply["content"] == [thought]


@pytest.fixture
def anyio_backend():
    """The SDKs and the scripted provider are asyncio's."""
    return "asyncio"


@pytest.mark.anyio
@pytest.mark.parametrize("api", DIALECTS)
async def test_real_sdks_read_what_is_told(api, monkeypatch):
    """A tool call, its result and the last words, as the vendors' own clients put a stream together."""
    talks = pytest.importorskip("sdk_clients").TALKS
    dialect = DIALECTS[api]

    def retold(_self, reply, counts, number, body):
        return as_stream(api, dialect.plain(reply, counts, number, body))

    monkeypatch.setattr(type(dialect), "stream", retold)
    async with ScriptedUpstream(ShellScript("echo 7"), apis=[api]) as model:
        given, last = await talks[api](model.url, "any", stream=True)
    assert given == {"command": "echo 7"}
    assert last == "Done."
