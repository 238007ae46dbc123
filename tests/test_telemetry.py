"""Spans of a rollout: live where the program has a tracer provider, nothing otherwise, and the same from its folder."""

from __future__ import annotations

import base64
import enum
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import anyio
import pytest
from harness import build, on
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as conventions

from orchestrator import Role, Rollout, RolloutConfig, Scene, Turn
from orchestrator.export import document
from orchestrator.export.recorded import Call
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.script import Fail, Say, Shell, Steps
from orchestrator.gateway.scripted import ScriptedUpstream
from orchestrator.gateway.upstream import Upstream
from orchestrator.journal import MemorySink
from orchestrator.sandboxes.fake import FakeSandbox
from states.errors import JournalError
from states.ports import ExecResult

ROOT = Path(__file__).resolve().parent.parent
KEY = "provider-key-that-stays-out"
PRICES = Prices(3e-6, 15e-6, 3e-7, 3.75e-6)


@pytest.fixture
def host(monkeypatch):
    """A program with a tracer provider of its own; what it was told is in `spans`."""
    return Host.configured(monkeypatch)


class Host:
    """A tracer provider that keeps its spans."""

    def __init__(self, provider):
        self.exporter = InMemorySpanExporter()
        self.provider = provider
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @classmethod
    def configured(cls, monkeypatch, **settings):
        host = cls(TracerProvider(**settings))
        # What set_tracer_provider does once a process: each test is a program of its own.
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", host.provider)
        return host

    @property
    def spans(self):
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time)

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def names(self):
        return [span.name for span in self.spans]


def reply(conversation):
    return Steps(Shell("make it"), Say("Done."))(conversation)


async def metered(script=reply, **config):
    """A rollout of `minimal`, whose model calls go through the gateway."""
    async with ScriptedUpstream(script, apis=["openai-chat"], prices=PRICES, api_key=KEY) as provider:
        upstream = Upstream("scripted", provider.url, ["openai-chat"], api_key=KEY, prices=PRICES)
        base = {
            "prompt": "Do it.",
            "agent": "minimal",
            "sandbox": FakeSandbox(on_exec=lambda call: ExecResult("made\n", "", 0)),
            "upstream": upstream,
            "out": None,
            "verifier": None,
        }
        rollout = Rollout(RolloutConfig(**{**base, **config}))
        with anyio.fail_after(60):
            await rollout.run()
        return rollout, provider.usage


# --- what is there -----------------------------------------------------------------------------------------------


def test_a_rollout_is_a_span_its_states_are_below_it_and_model_calls_below_their_turn(host):
    rollout, counted = anyio.run(metered)
    (root,) = [span for span in host.spans if span.parent is None]
    assert root.name == "rollout"
    assert root.attributes["rollout.state"] == "closed/unverified"
    below = [span for span in host.spans if span.parent and span.parent.span_id == root.context.span_id]
    path = [moved.source for moved in rollout.journal if hasattr(moved, "dest")]
    assert [span.attributes["rollout.state"] for span in below] == path
    (turn,) = host.named("invoke_agent minimal")
    chats = host.named("chat scripted")
    assert len(chats) == counted.calls == 2
    assert {span.parent.span_id for span in chats} == {turn.context.span_id}
    for span in (root, turn):
        assert span.attributes["gen_ai.usage.input_tokens"] == counted.input_tokens
        assert span.attributes["gen_ai.usage.output_tokens"] == counted.output_tokens
        assert span.attributes["gen_ai.usage.cache_read.input_tokens"] == counted.cache_read_input_tokens
        assert span.attributes["rollout.cost_usd"] == counted.cost
    assert [span.attributes["gen_ai.response.finish_reasons"] for span in chats] == [("tool_calls",), ("stop",)]
    assert {span.kind for span in chats} == {trace.SpanKind.CLIENT}
    assert {span.instrumentation_scope.name for span in host.spans} == {"rollout-orchestrator"}


def test_every_name_of_the_genai_conventions_is_one(host):
    """Attributes are those that the conventions list, and so are the words that they may hold."""
    anyio.run(metered)
    known = {
        value for name, value in vars(conventions).items() if name.startswith("GEN_AI_") and isinstance(value, str)
    }
    used = {name for span in host.spans for name in span.attributes if name.startswith("gen_ai.")}
    assert used - known == set()
    assert len(used) >= 12
    words = {
        "gen_ai.operation.name": words_of(conventions.GenAiOperationNameValues),
        "gen_ai.provider.name": words_of(conventions.GenAiProviderNameValues),
    }
    for name, allowed in words.items():
        assert {span.attributes[name] for span in host.spans if name in span.attributes} <= allowed


def words_of(kind: type[enum.Enum]) -> set[str]:
    return {member.value for member in kind}


def test_the_rollout_is_below_the_span_in_which_the_caller_drives_it(host):
    async def driven():
        with trace.get_tracer("host").start_as_current_span("an evaluation"):
            await build("acp").rollout.run()

    anyio.run(driven)
    (outer,) = host.named("an evaluation")
    (root,) = host.named("rollout")
    assert root.parent.span_id == outer.context.span_id
    assert {span.context.trace_id for span in host.spans} == {outer.context.trace_id}


@pytest.mark.anyio
async def test_what_an_agent_in_this_process_traces_is_below_its_turn(host):
    """The span of the state is current while its handler runs, also in the tasks that it starts."""

    def execute(_call):
        with trace.get_tracer("agent").start_as_current_span("the agent's own"):
            return ExecResult("made it\n", "", 0)

    await build("session-factory", exec_result=execute).rollout.run()
    (turn,) = host.named("invoke_agent scripted")
    (own,) = host.named("the agent's own")
    assert own.parent.span_id == turn.context.span_id
    assert trace.get_current_span() is trace.INVALID_SPAN, "and nothing of it is left in the caller's context"


def test_roles_and_turns_are_told_apart(host):
    scene = Scene((Role("coder", "minimal"), Role("reviewer", "minimal")), (Turn("coder"), Turn("reviewer", "Look.")))
    anyio.run(lambda: metered(agent=None, scene=scene))
    turns = host.named("invoke_agent minimal")
    assert [(span.attributes["rollout.role"], span.attributes["rollout.turn"]) for span in turns] == [
        ("coder", 1),
        ("reviewer", 2),
    ]
    for chat in host.named("chat scripted"):
        (turn,) = [span for span in turns if span.context.span_id == chat.parent.span_id]
        assert chat.attributes["rollout.role"] == turn.attributes["rollout.role"]


def test_a_reward_is_an_evaluation_result(host):
    anyio.run(build("acp").rollout.run)
    (verifying,) = host.named("verifying")
    (scored,) = verifying.events
    assert scored.name == "gen_ai.evaluation.result"
    assert dict(scored.attributes) == {"gen_ai.evaluation.name": "reward", "gen_ai.evaluation.score.value": 1.0}


def test_what_was_said_in_a_model_call_is_not_kept_for_its_span(host, monkeypatch):
    """A trace's memory does not grow with the conversation."""
    seen, read = [], Call.of

    def of(line):
        seen.append(weakref.ref(call := read(line)))
        return call

    monkeypatch.setattr(Call, "of", of)
    rollout = build("session-factory").rollout
    telemetry = rollout._world.telemetry

    async def driven():
        async for moved in rollout.run_iter():
            if moved.dest == "executing":
                telemetry.called({"call": 1, "time": moved.time, "api": "openai-chat", "usage": None})
                assert len(host.named("chat")) == 1
                gc.collect()
                assert [ref() for ref in seen] == [None]

    anyio.run(driven)
    assert seen


# --- what went wrong -----------------------------------------------------------------------------------------------


def test_a_model_call_that_failed_and_a_rollout_that_is_void_are_errors(host):
    anyio.run(lambda: metered(lambda _: Fail(500, f"down, {KEY}")))
    chats, (root,) = host.named("chat scripted"), host.named("rollout")
    assert chats
    for span in (*chats, root):
        assert span.status.status_code is trace.StatusCode.ERROR
        assert KEY not in span.status.description
    assert {span.attributes["error.type"] for span in chats} == {"500"}
    assert root.attributes["error.type"] == "rollout.void"


def test_what_comes_from_outside_and_stays_is_an_event_of_its_state(host):
    stand = build("acp", {"turns": [[{"say": "hm"}, {"wait_cancel": True}]]}, deadlines={"executing": 0.05})
    rollout = stand.rollout
    rollout.listeners.append(on("cancelling", rollout.cancel))
    anyio.run(rollout.run)
    (cancelling,) = host.named("cancelling")
    assert [event.name for event in cancelling.events] == ["Cancelled"]
    (root,) = host.named("rollout")
    assert root.status.status_code is trace.StatusCode.UNSET, "who cancels has no failure"
    assert root.attributes["rollout.ending"] == "cancelled"


class Broken(SpanProcessor):
    """A host's processor that cannot."""

    def on_end(self, span):
        raise RuntimeError("the collector is gone")


def test_a_host_whose_tracing_raises_does_not_break_a_rollout(host):
    """It is a note, once, and the rollout ends as it would have."""
    host.provider.add_span_processor(Broken())
    rollout = build("acp").rollout
    result = anyio.run(rollout.run)
    assert (result.state, result.reward) == ("closed/rewarded", 1.0)
    assert [note for note in result.notes if "the collector is gone" in note] == list(result.notes)
    assert len(result.notes) == 1


def test_tracing_that_raises_when_the_disk_is_full_is_no_error_of_the_host(host):
    """A rollout raises nothing for what happens in it, not when nobody can be told of it either."""

    class Full(MemorySink):
        def write(self, line):
            if len(self.lines) >= 4:
                raise JournalError("no space left on device")
            super().write(line)

    class AsFull(SpanProcessor):
        def on_end(self, span):
            if span.name == "rollout":
                raise RuntimeError("the collector is full as well")

    host.provider.add_span_processor(AsFull())
    result = anyio.run(build("acp", journal=Full()).rollout.run)
    assert "no space left" in result.verdict.reason


# --- when there is nothing -----------------------------------------------------------------------------------------


def test_without_a_provider_there_is_nothing(monkeypatch):
    """The API is loaded, by this test; no span is kept, and nothing is told."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    rollout = build("acp").rollout
    anyio.run(rollout.run)
    assert rollout._world.telemetry._telling is None
    assert rollout.result().notes == ()


def test_a_trace_that_is_not_sampled_costs_one_look(monkeypatch):
    host = Host.configured(monkeypatch, sampler=ALWAYS_OFF)
    anyio.run(build("acp").rollout.run)
    assert host.spans == []


ALONE = """
import sys, anyio
sys.path.insert(0, "tests")
from orchestrator import Rollout, RolloutConfig, Scene
from orchestrator.sandboxes.fake import FakeSandbox
result = anyio.run(Rollout(RolloutConfig(agent="scripted", prompt="Do it.", sandbox=FakeSandbox(), out=None)).run)
assert result.state == "closed/unverified", result
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_a_program_that_traces_nothing_imports_nothing():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# --- driven in parts -----------------------------------------------------------------------------------------------


def test_a_rollout_that_is_stopped_ends_its_spans_and_begins_new_ones_when_it_goes_on(host):
    """Nothing stays open in the meantime: an exporter gets a span when it ends."""
    rollout = build("session-factory", turns=(Turn("agent"), Turn("agent", "More."))).rollout

    async def driven():
        moves = rollout.run_iter()
        async for moved in moves:
            if moved.dest == "executing":
                break
        await moves.aclose()
        first = host.names()
        await rollout.run()
        return first

    first = anyio.run(driven)
    began = ["provisioning", "disconnected", "connecting", "session/factory", "invoke_agent scripted", "rollout"]
    assert sorted(first) == sorted(began)
    roots = host.named("rollout")
    assert [root.attributes["rollout.state"] for root in roots] == ["executing", "closed/rewarded"]
    again = [span for span in host.spans if span.parent and span.parent.span_id == roots[1].context.span_id]
    assert again[0].attributes["rollout.state"] == "executing", "it goes on where it stood"


@pytest.mark.anyio
async def test_a_rollout_whose_host_cancels_it_ends_its_spans(host):
    stand = build("acp", {"turns": [[{"say": "hm"}, {"wait_cancel": True}]]})
    with anyio.CancelScope() as scope:
        stand.rollout.listeners.append(on("executing", scope.cancel))
        await stand.rollout.run()
    (root,) = host.named("rollout")
    assert root.attributes["rollout.state"] == "closed/cancelled"
    assert trace.get_current_span() is trace.INVALID_SPAN


# --- the same from the folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["metered", "two_roles", "void", "acp"])
def test_an_export_of_the_folder_is_the_trace_that_was_seen_live(kind, host, tmp_path):
    """Names, times to the microsecond, kinds, parents, attributes, events and errors; only ids are others."""
    scene = Scene((Role("coder", "minimal"), Role("reviewer", "minimal")), (Turn("coder"), Turn("reviewer", "Look.")))
    config = {"two_roles": {"agent": None, "scene": scene}, "void": {"script": lambda _: Fail(500, "down")}}
    if kind == "acp":
        rollout = build("acp", out=tmp_path).rollout
        anyio.run(rollout.run)
    else:
        rollout, _ = anyio.run(lambda: metered(out=tmp_path, **config.get(kind, {})))
    exported = [plain(span) for span in request_of(rollout.folder).resource_spans[0].scope_spans[0].spans]
    assert sorted(exported) == sorted(live(span, host.spans) for span in host.spans)


def request_of(folder) -> ExportTraceServiceRequest:
    """The export as OTLP's own schema reads it. Its JSON has ids in hex, protobuf's own JSON wants them in base64."""
    from google.protobuf.json_format import ParseDict

    exported = document(folder, "otel")
    for span in exported["resourceSpans"][0]["scopeSpans"][0]["spans"]:
        for key in ("traceId", "spanId", "parentSpanId"):
            if key in span:
                span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
    return ParseDict(exported, ExportTraceServiceRequest())


def plain(span) -> str:
    """A span of OTLP as text, without its ids."""
    events = [(event.name, event.time_unix_nano, attributes_of(event)) for event in span.events]
    kind = {1: "INTERNAL", 3: "CLIENT"}[span.kind]
    times = (span.start_time_unix_nano, span.end_time_unix_nano)
    top = not span.parent_span_id
    return str((times, span.name, kind, top, attributes_of(span), events, span.status.code == 2, span.status.message))


def attributes_of(thing) -> list:
    def value(given):
        kind = given.WhichOneof("value")
        return [value(one) for one in given.array_value.values] if kind == "array_value" else getattr(given, kind)

    return sorted((one.key, value(one.value)) for one in thing.attributes)


def live(span, spans) -> str:
    """The same of a span of the SDK."""
    events = [(event.name, event.timestamp, said(event.attributes)) for event in span.events]
    failed = span.status.status_code is trace.StatusCode.ERROR
    about = (span.kind.name, span.parent is None, said(span.attributes), events, failed, span.status.description or "")
    return str(((span.start_time, span.end_time), span.name, *about))


def said(attributes) -> list:
    return sorted((name, list(value) if isinstance(value, tuple) else value) for name, value in attributes.items())


def test_ids_are_of_their_length_and_the_same_each_time(tmp_path):
    rollout = build("acp", out=tmp_path).rollout
    anyio.run(rollout.run)
    spans = request_of(rollout.folder).resource_spans[0].scope_spans[0].spans
    assert {len(span.trace_id) for span in spans} == {16}
    assert {len(span.span_id) for span in spans} == {8}
    assert len({span.span_id for span in spans}) == len(spans)
    assert request_of(rollout.folder) == request_of(rollout.folder)
