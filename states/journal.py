"""The journal's records, and the fold that turns them back into where a rollout stands.

A record is written after the table has said where an event leads and before the next handler runs, so the journal is
never behind the world by more than one side effect, and a lease is written before it is taken. Reading and writing
files is `orchestrator.journal`'s business; this module only knows what a record means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import attrs

from states.errors import IllegalTransition, JournalError
from states.events import Event, Recovered
from states.machine import Position, Rules, fire
from states.ports import Lease

SCHEMA = 1

Cause = Literal["handler", "deadline", "error", "outside", "recovery"]
"""Why an event fired: a handler returned it, its state's deadline passed, it raised, it came from outside, or a new
process took over."""


@attrs.frozen
class Header:
    """First record: whose journal this is, and the rules that its guards read."""

    rollout: str
    rules: Rules
    time: float
    schema: int = SCHEMA
    info: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Transition:
    """One move of the machine. `time` is seconds since the epoch."""

    seq: int
    time: float
    source: str
    event: Event
    dest: str
    cause: Cause = "handler"


@attrs.frozen
class LeaseRecord:
    """A lease is intended, held, or returned."""

    seq: int
    time: float
    action: Literal["intended", "held", "returned"]
    lease: Lease


@attrs.frozen
class Note:
    """Something worth knowing that moves nothing."""

    seq: int
    time: float
    text: str


@attrs.frozen
class Stopped:
    """Whoever drives it was asked to stop driving it: what it holds stays held until it goes on, or is given up."""

    seq: int
    time: float
    by: str


Record = Header | Transition | LeaseRecord | Note | Stopped


@attrs.frozen
class Folded:
    """What a journal says: where the rollout stands, what it holds, and the number of its last record.

    `stopped` is who asked that it be driven no further, empty while nobody did, and once it has been taken over.
    """

    header: Header
    position: Position = Position()
    leases: Mapping[tuple[str, str], Lease] = attrs.field(factory=dict)
    seq: int = 0
    stopped: str = ""

    @property
    def rules(self) -> Rules:
        """The rules under which this journal was written."""
        return self.header.rules


def fold_record(folded: Folded, record: Record) -> Folded:
    """The fold after one more record. Raises `JournalError` where a record contradicts the table."""
    match record:
        case Header():
            raise JournalError(f"a second header ({record.rollout}) in the journal of {folded.header.rollout}")
        case Transition():
            stopped = "" if isinstance(record.event, Recovered) else folded.stopped
            return attrs.evolve(folded, position=_moved(folded, record), seq=record.seq, stopped=stopped)
        case LeaseRecord(action=action, lease=lease):
            key = (lease.kind, lease.name)
            others = {k: v for k, v in folded.leases.items() if k != key}
            leases = others if action == "returned" else {**others, key: lease}
            return attrs.evolve(folded, leases=leases, seq=record.seq)
        case Stopped(by=by):
            return attrs.evolve(folded, seq=record.seq, stopped=by)
        case _:  # a note moves nothing
            return attrs.evolve(folded, seq=record.seq)


def _moved(folded: Folded, record: Transition) -> Position:
    where = f"record {record.seq} of {folded.header.rollout}"
    try:
        position = fire(folded.position, record.event, folded.rules)
    except IllegalTransition as error:
        raise JournalError(f"{where}: {error}") from error
    if (folded.position.state, position.state) != (record.source, record.dest):
        raise JournalError(
            f"{where} says {record.source} -> {record.dest} on {record.event.name}; "
            f"the table says {folded.position.state} -> {position.state}"
        )
    return position


def fold(records: Iterable[Record]) -> Folded:
    """Fold a whole journal. Raises `JournalError` when it does not begin with its header or does not fold."""
    remaining = iter(records)
    first = next(remaining, None)
    if not isinstance(first, Header):
        raise JournalError("a journal begins with its header; this one does not")
    if first.schema != SCHEMA:
        raise JournalError(f"journal schema {first.schema}; this version reads {SCHEMA}")
    folded = Folded(first)
    for record in remaining:
        folded = fold_record(folded, record)
    return folded
