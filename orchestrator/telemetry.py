"""A rollout as OpenTelemetry spans, with the GenAI semantic conventions.

    rollout <task>                     the rollout, with its outcome, reward and usage
      provisioning, connecting, ...    a span for each stay in a state, with the event that ended it
      invoke_agent <agent>             the same for `executing`: one turn of a role
        chat <model>                   a model call, as the gateway saw it

They are there live wherever the program that runs us has a tracer provider: it is asked for through the API that is
loaded already, so that without one nothing is imported, made or kept. The rollout's span is a child of the span that
was current where it is driven; the state's span is current while its handler runs, so what an agent in this process
traces stands below its turn. Words of a conversation are in no span: they are the user's to show, and in the folder.

`Telling` says what spans there are and is fed with the journal; where they go is a `Spans`. An export of the folder
(`orchestrator.export.otel`) feeds it the same and gets the same.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs

from states.errors import JournalError, said
from states.events import (
    AcpOpened,
    Captured,
    Checked,
    Event,
    FactoryOpened,
    Failure,
    Prompted,
    RoleAssigned,
    Usage,
    Verified,
)
from states.journal import Header, Transition
from states.machine import CLOSED, INITIAL

if TYPE_CHECKING:
    from orchestrator.export.recorded import Call
    from orchestrator.result import RolloutResult

SCOPE = "rollout-orchestrator"
PROVIDERS = {"openai-chat": "openai", "openai-responses": "openai", "anthropic-messages": "anthropic"}
"""What the conventions call a provider whose wire format is spoken; who serves the model behind it is not known."""

Attributes = Mapping[str, Any]
Kind = Literal["internal", "client"]


class Span(Protocol):
    """One span while it is open. Times are seconds since the epoch."""

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""

    def event(self, name: str, at: float, attributes: Attributes) -> None:
        """Something happened in it."""

    def failed(self, why: str) -> None:
        """Its status is an error."""

    def end(self, at: float) -> None:
        """It is over."""


class Spans(Protocol):
    """Where spans go."""

    def open(self, name: str, kind: Kind, at: float, attributes: Attributes, parent: Any | None) -> Any:
        """A new `Span` below `parent`, or at the top."""


@attrs.define(eq=False)
class Telling:
    """Tells a rollout as spans: `began`, then each transition and model call, then `over`."""

    _spans: Spans
    _header: Header
    _redact: Callable[[str], str] = str
    _open: list[Any] = attrs.field(factory=list, init=False)
    """The rollout's span and that of the state in which it stands."""
    _stays: list[tuple[float, Any, list[tuple[str, Usage]]]] = attrs.field(factory=list, init=False)
    """Every stay so far: since when, its span, and format and usage of the model calls that began in it."""
    _role: str = attrs.field(default="", init=False)
    _session: str = attrs.field(default="", init=False)

    @property
    def here(self) -> Any | None:
        """The span of the state in which it stands."""
        return self._open[-1] if self._open else None

    def began(self, state: str = INITIAL, at: float | None = None) -> None:
        """Open the rollout's span, and that of the state in which it stands."""
        info, at = self._header.info, self._header.time if at is None else at
        task = str(info.get("task") or "")
        about = {"rollout.id": self._header.rollout, "rollout.task": task, "rollout.sandbox": info.get("sandbox")}
        root = self._spans.open(f"rollout {task}".strip(), "internal", at, self._known(about), None)
        self._open[:] = [root]
        self._enter(state, at, None)

    def moved(self, moved: Transition) -> None:
        """A transition was journaled."""
        event = moved.event
        self._role = event.role if isinstance(event, RoleAssigned | Prompted) else self._role
        self._session = event.session_id if isinstance(event, AcpOpened | FactoryOpened) else self._session
        if moved.source == moved.dest and moved.cause in {"outside", "recovery"}:
            self._open[-1].event(event.name, moved.time, {"rollout.cause": moved.cause})
            return
        self._leave(moved)
        if moved.dest not in CLOSED:
            self._enter(moved.dest, moved.time, event)

    def called(self, call: Call) -> None:
        """A model call ended: its span stands below the state in which it began."""
        model = call.model or call.upstream_model
        _, parent, calls = next((stay for stay in reversed(self._stays) if stay[0] <= call.began), self._stays[0])
        calls.append((call.api, call.counted))  # and not what was said in it, which would add up
        span = self._spans.open(f"chat {model}".strip(), "client", call.began, self._known(_of_call(call)), parent)
        if call.error:
            span.set({"error.type": str(call.status or "error")})
            span.failed(self._redact(call.error))
        span.end(call.ended)

    def over(self, result: RolloutResult, at: float) -> None:
        """It is closed, or is driven no more: every span ends."""
        if len(self._open) > 1:
            self._open.pop().end(at)
        for root in self._open:
            root.set(self._known(_of_result(result)))
            if result.ending in {"failed", "void"}:
                root.set({"error.type": f"rollout.{result.ending}"})
                root.failed(self._redact(result.verdict.reason))
            root.end(at)
        self._open.clear()
        self._stays.clear()

    def _enter(self, state: str, at: float, event: Event | None) -> None:
        name = state
        about: dict[str, Any] = {"rollout.id": self._header.rollout, "rollout.state": state}
        if isinstance(event, Prompted):
            role = dict(self._header.info.get("roles", {})).get(event.role, {})
            name = f"invoke_agent {role.get('agent') or event.role}"
            about |= {
                "gen_ai.operation.name": "invoke_agent",
                "gen_ai.agent.name": role.get("agent"),
                "gen_ai.conversation.id": self._session,
                "gen_ai.request.model": role.get("model"),
                "rollout.role": event.role,
                "rollout.turn": event.turn + 1,
            }
        span = self._spans.open(name, "internal", at, self._known(about), self._open[0])
        self._open[1:] = [span]
        self._stays.append((at, span, []))

    def _leave(self, moved: Transition) -> None:
        event, span = moved.event, self._open.pop()
        _, _, calls = self._stays[-1]
        failure: Failure | None = getattr(event, "failure", None)
        about = {
            "rollout.event": event.name,
            "rollout.cause": moved.cause,
            "rollout.stop": getattr(event, "stop", None),
        }
        if moved.source == "executing" and calls:
            total = sum((counted for _, counted in calls), Usage())
            about |= {"gen_ai.provider.name": PROVIDERS.get(calls[0][0]), **_of_usage(total)}
        if isinstance(event, Captured):
            about |= {
                "rollout.complete": event.complete,
                "rollout.steps": event.steps,
                "rollout.tool_calls": event.tool_calls,
            }
        span.set(self._known(about))
        for name, score in _scores(event).items():
            scored = {"gen_ai.evaluation.name": name, "gen_ai.evaluation.score.value": score}
            span.event("gen_ai.evaluation.result", moved.time, scored)
        if failure is not None:
            span.set({"error.type": failure.error})
            span.failed(self._redact(failure.message))
        span.end(moved.time)

    def _known(self, attributes: Attributes) -> dict[str, Any]:
        """Without what is not known, and without secrets."""
        return {
            name: self._redact(value) if isinstance(value, str) else value
            for name, value in attributes.items()
            if value is not None and value != ""
        }


def _scores(event: Event) -> dict[str, float]:
    if isinstance(event, Verified):
        return {"reward": event.reward, **event.rewards}
    return dict(event.feedback or {}) if isinstance(event, Checked) else {}


def _of_usage(used: Usage) -> Attributes:
    return {
        "gen_ai.usage.input_tokens": used.input_tokens,
        "gen_ai.usage.output_tokens": used.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": used.cache_read_input_tokens,
        "gen_ai.usage.cache_creation.input_tokens": used.cache_creation_input_tokens,
        "rollout.cost_usd": used.cost,
    }


def _of_call(call: Call) -> Attributes:
    asked, told = call.request, call.response or {}
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": PROVIDERS.get(call.api),
        "gen_ai.request.model": call.model or call.upstream_model,
        "gen_ai.request.max_tokens": _number(asked.get("max_tokens") or asked.get("max_output_tokens")),
        "gen_ai.request.temperature": _number(asked.get("temperature")),
        "gen_ai.request.top_p": _number(asked.get("top_p")),
        "gen_ai.request.stream": call.streamed,
        "gen_ai.response.id": _text(told.get("id")),
        "gen_ai.response.model": _text(told.get("model")),
        "gen_ai.response.finish_reasons": (call.finish,) if call.finish else None,
        "gen_ai.response.time_to_first_chunk": call.first_byte if call.streamed else None,
        "rollout.role": call.role,
        **(_of_usage(call.counted) if call.counted.calls > call.counted.failed_calls else {}),
    }


def _number(value: Any) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _of_result(result: RolloutResult) -> Attributes:
    return {
        "rollout.state": result.state,
        "rollout.ending": result.ending,
        "rollout.reward": result.reward,
        "rollout.ended_by": result.ended_by,
        "rollout.verdict.owner": result.verdict.owner,
        "rollout.verdict.reason": result.verdict.reason,
        "rollout.turns": result.turns,
        "rollout.tool_calls": result.tool_calls,
        **(_of_usage(result.usage.total) if result.usage.tracking == "metered" else {}),
    }


# --- live ------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Telemetry:
    """The spans of a rollout that runs: there while somebody listens, and harmless whatever they do.

    A host's exporter that raises is a note of the rollout, once, and nothing more is told to it.
    """

    _header: Header
    _redact: Callable[[str], str]
    _note: Callable[[str], None]
    _telling: Telling | None = attrs.field(default=None, init=False)
    _asked: bool = attrs.field(default=False, init=False)
    """Whether it was asked who listens since it is driven."""

    @contextlib.contextmanager
    def driving(self, state: str, at: Callable[[], float]) -> Iterator[None]:
        """Around a state's handler: its span is the current one. The first time, look who listens."""
        if not self._asked:
            self._asked = True
            with self._harmless():
                self._begin(state, at)
        here = self._telling.here if self._telling is not None else None
        if here is None:
            yield
            return
        from opentelemetry import context, trace

        token = context.attach(trace.set_span_in_context(here.span))
        try:
            yield
        finally:
            context.detach(token)

    def _begin(self, state: str, at: Callable[[], float]) -> None:
        spans = _listener()
        if spans is None:
            return
        telling = Telling(spans, self._header, self._redact)
        telling.began(state, None if state == INITIAL else at())
        if telling.here is not None and telling.here.span.is_recording():
            self._telling = telling

    def moved(self, moved: Transition) -> None:
        """A transition was journaled."""
        if self._telling is None:
            return
        with self._harmless():
            self._telling.moved(moved)

    def called(self, line: Mapping[str, Any]) -> None:
        """A model call was written to `llm.jsonl`."""
        if self._telling is None or line.get("via") == "refused":  # a budget was spent: no model heard of it
            return
        from orchestrator.export.recorded import Call

        with self._harmless():
            self._telling.called(Call.of(line))

    def over(self, result: Callable[[], RolloutResult], now: Callable[[], float], closed: float | None) -> None:
        """It was closed then, or is driven no more from now on. Idempotent; who drives it on begins anew."""
        # If it ends because its journal cannot be written, tracing that raises as well can be told to nobody.
        with contextlib.suppress(JournalError), self._harmless():
            if (telling := self._telling) is not None:
                self._telling = None
                telling.over(result(), now() if closed is None else closed)
        self._asked = False

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._telling = None
            self._note(f"tracing raised {type(error).__name__} and was left alone from there: {said(error)}")


def _listener() -> _LiveSpans | None:
    """Where spans go, if this program has loaded OpenTelemetry's API: whoever configures a provider has."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    from orchestrator.export.common import own_version

    return _LiveSpans(trace.get_tracer(SCOPE, own_version()))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1_000_000) * 1_000


@attrs.frozen
class _LiveSpans:
    """Spans of the caller's tracer provider."""

    tracer: Any

    def open(self, name: str, kind: Kind, at: float, attributes: Attributes, parent: _LiveSpan | None) -> _LiveSpan:
        """A span below `parent`, or below the one that is current."""
        from opentelemetry import trace

        context = trace.set_span_in_context(parent.span) if parent is not None else None
        which = trace.SpanKind.CLIENT if kind == "client" else trace.SpanKind.INTERNAL
        span = self.tracer.start_span(name, context, which, attributes, start_time=_nanoseconds(at))
        return _LiveSpan(span)


@attrs.frozen
class _LiveSpan:
    span: Any

    def set(self, attributes: Attributes) -> None:
        self.span.set_attributes(attributes)

    def event(self, name: str, at: float, attributes: Attributes) -> None:
        self.span.add_event(name, attributes, _nanoseconds(at))

    def failed(self, why: str) -> None:
        from opentelemetry import trace

        self.span.set_status(trace.StatusCode.ERROR, why)

    def end(self, at: float) -> None:
        self.span.end(_nanoseconds(at))
