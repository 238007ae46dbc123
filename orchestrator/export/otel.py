"""A rollout's folder as OTLP JSON: what a collector's file receiver reads, and what a live trace of it looked like.

The spans are those of `orchestrator.telemetry`, fed with the journal and `llm.jsonl`. Ids are hashes of the rollout's
id, so a folder gives the same trace each time, and a collector that gets it twice has it once.
"""

from __future__ import annotations

import hashlib
from typing import Any

import attrs

from orchestrator.export.common import DISTRIBUTION, own_version
from orchestrator.export.recorded import Call, Recorded, Source, recorded
from orchestrator.telemetry import SCOPE, Attributes, Kind, Telling
from states.journal import Header, Transition

JSON = dict[str, Any]
KINDS = {"internal": 1, "client": 3}
ERROR = 2


def to_otel(source: Source) -> JSON:
    """The rollout as an OTLP `ExportTraceServiceRequest` (JSON values). Raises as `recorded` does."""
    rollout = recorded(source)
    kept = _KeptSpans(rollout.id)
    tell(rollout, Telling(kept, _header(rollout)))
    scope = {"scope": {"name": SCOPE, "version": own_version()}, "spans": [span.document() for span in kept.spans]}
    resource = {"attributes": _attributes({"service.name": DISTRIBUTION, "service.version": own_version()})}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}


def tell(rollout: Recorded, telling: Telling) -> None:
    """Feed a recorded rollout to a `Telling`, in the order in which things happened."""
    happened: list[tuple[float, int, Transition | Call]] = [
        *((move.time, 1, move) for move in rollout.records if isinstance(move, Transition)),
        *((call.ended, 0, call) for call in rollout.calls),
    ]
    telling.began()
    for _, _, one in sorted(happened, key=lambda entry: entry[:2]):
        if isinstance(one, Transition):
            telling.moved(one)
        else:
            telling.called(one)
    moves = [record for record in rollout.records if isinstance(record, Transition)]
    over = rollout.result.ending is not None and moves
    telling.over(rollout.result, moves[-1].time if over else rollout.ended)


def _header(rollout: Recorded) -> Header:
    header = rollout.records[0]
    assert isinstance(header, Header)
    return header


@attrs.define(eq=False)
class _KeptSpans:
    """Spans in memory, numbered."""

    rollout: str
    spans: list[_KeptSpan] = attrs.field(factory=list)

    def open(self, name: str, kind: Kind, at: float, attributes: Attributes, parent: _KeptSpan | None) -> _KeptSpan:
        """A new span."""
        span = _KeptSpan(
            _hash(self.rollout, 32),
            _hash(f"{self.rollout}/{len(self.spans)}", 16),
            parent.span_id if parent is not None else None,
            name,
            KINDS[kind],
            at,
            dict(attributes),
        )
        self.spans.append(span)
        return span


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


@attrs.define(eq=False)
class _KeptSpan:
    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    kind: int
    began: float
    attributes: dict[str, Any]
    ended: list[float] = attrs.field(factory=list)
    events: list[JSON] = attrs.field(factory=list)
    problems: list[str] = attrs.field(factory=list)

    def set(self, attributes: Attributes) -> None:
        self.attributes.update(attributes)

    def event(self, name: str, at: float, attributes: Attributes) -> None:
        self.events.append({"timeUnixNano": _nano(at), "name": name, "attributes": _attributes(attributes)})

    def failed(self, why: str) -> None:
        self.problems.append(why)

    def end(self, at: float) -> None:
        self.ended.append(at)

    def document(self) -> JSON:
        """As OTLP's JSON says it: ids in hex, 64-bit numbers as text."""
        parent = {"parentSpanId": self.parent_id} if self.parent_id else {}
        status = {"status": {"code": ERROR, "message": self.problems[-1]}} if self.problems else {}
        return {
            "traceId": self.trace_id,
            "spanId": self.span_id,
            **parent,
            "name": self.name,
            "kind": self.kind,
            "startTimeUnixNano": _nano(self.began),
            "endTimeUnixNano": _nano(self.ended[0] if self.ended else self.began),
            "attributes": _attributes(self.attributes),
            "events": self.events,
            **status,
        }


def _nano(seconds: float) -> str:
    return str(round(seconds * 1_000_000) * 1_000)


def _attributes(attributes: Attributes) -> list[JSON]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Any) -> JSON:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, tuple | list):
        return {"arrayValue": {"values": [_value(member) for member in value]}}
    return {"stringValue": str(value)}
