"""After `kill -9`: a rollout is taken over from its journal alone, captured, given back and closed.

A new process folds the journal, fires `Recovered`, and drives the same kernel over a world that can only give back.
What the dead process had sealed stays sealed, an open turn gets its one capture from what is on disk, a reward that
was given stands, and every lease is returned by the reaper of its kind.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import msgspec

from orchestrator.capture import TurnSegment, recovered
from orchestrator.config import RolloutConfig
from orchestrator.gateway.llm_log import used_by
from orchestrator.journal import FileSink, JournalSink, JournalWriter, read_journal, read_lines
from orchestrator.leases import JournaledLeases
from orchestrator.metering import remove_socket
from orchestrator.registry import Registry
from orchestrator.result import RolloutResult, result_of
from orchestrator.rollout import Rollout
from orchestrator.sandboxes import reaper
from orchestrator.telemetry import Telemetry
from orchestrator.world import owner, started_at, write_result
from states.counting import total
from states.deadlines import DEADLINES, Deadline
from states.errors import ConfigError
from states.events import Cancelled, Event, Failure, Recovered, SandboxFailed, Share, Usage
from states.journal import Folded, Header, Record, Transition, fold
from states.machine import Facts, Position
from states.ports import Lease, Stage


async def reap(folder: Path) -> RolloutResult:
    """Close what a dead orchestrator left in `folder`; nothing happens to what is closed and holds nothing.

    Raises `ConfigError` when its orchestrator is alive or ran on another machine, `JournalError` when the journal
    cannot be read.

    >>> result = await reap(Path("runs/1b2c3d"))  # doctest: +SKIP
    >>> result.state                              # doctest: +SKIP
    'closed/failed'
    """
    taken = take(folder)
    folded, world = taken.folded, ReaperWorld.over(taken)
    if folded.position.closed:
        try:
            for lease in world.leases.open():
                await world.leases.give_back(lease)
        finally:
            world.journal.close()
        return world.result(folded.position)
    why: Event = SandboxFailed(Failure("harness", "Killed", f"its orchestrator died in {folded.position.state}"))
    if folded.stopped:
        why = Cancelled("operator", f"it was stopped by {folded.stopped}, and not resumed")
    return await Rollout.taken_over(world, folded.position, _NOTHING_MORE, taken.recovered(), why).run()


_NOTHING_MORE = RolloutConfig(agent="", prompt="", out=None, registry=Registry())
"""A rollout that was taken over asks for nothing: its world only gives back."""


@attrs.frozen
class Taken:
    """A rollout that nobody drives, its journal ours to write."""

    folder: Path
    sink: JournalSink
    records: list[Record]
    folded: Folded

    def recovered(self) -> Recovered:
        """The event of taking it over."""
        return Recovered(2 + sum(isinstance(record.event, Recovered) for record in moves(self.records)), owner())


def take(folder: Path) -> Taken:
    """Become the one who writes the journal in `folder`.

    Raises `ConfigError` when somebody else does or did elsewhere, `JournalError` when it cannot be read or written.
    """
    known = read_journal(folder)
    owned, rollout = owner_of(known), folder.name
    if owned.get("host") != socket.gethostname() and not fold(known).position.closed:
        raise ConfigError(f"rollout {rollout} ran on {owned.get('host')!r}: it can be taken over there alone")
    sink = JournalSink(folder / "journal.jsonl")
    whose = sink.claim()
    if whose == "taken" or (whose == "unknown" and is_alive(owned)):
        sink.close()
        alive = f"is driven by process {owned.get('pid')}, which is alive"
        raise ConfigError(f"rollout {rollout} {alive}: `rollout cancel {folder}` ends it")
    try:
        records = read_journal(folder)  # once more: until now somebody else may have written it
        return Taken(folder, sink, records, fold(records))
    except BaseException:
        sink.close()
        raise


def owner_of(records: Iterable[Record]) -> Mapping[str, Any]:
    """Which process drives a rollout, or was the last to: `host`, `pid`, `started`."""
    known: Mapping[str, Any] = {}
    for record in records:
        match record:
            case Header(info=info):
                known = info.get("owner") or {}
            case Transition(event=Recovered(owner=found)) if found:
                known = found
    return known


def is_alive(owned: Mapping[str, Any]) -> bool:
    """Whether the process of `owner_of` is there, on this machine."""
    return bool(owned.get("started")) and started_at(int(owned["pid"])) == owned["started"]


def moves(records: Iterable[Record]) -> Iterator[Transition]:
    """The transitions among these records."""
    return (record for record in records if isinstance(record, Transition))


@attrs.frozen
class LoggedMeter:
    """A `states.ports.Meter` that counts what the dead process had written of its model calls.

    A line that does not say whose it is belongs to the last turn.
    """

    file: Path
    role: str = ""
    turn: int = 0

    def usage(self) -> Usage:
        """The sum of the calls in `llm.jsonl`; nothing when there is no such file."""
        return total(self.shares())

    def shares(self) -> tuple[Share, ...]:
        """The same by role and turn."""
        used: dict[tuple[str, int], Usage] = {}
        for line in map(msgspec.json.decode, read_lines(self.file) if self.file.exists() else ()):
            key = line.get("role", self.role), line.get("turn", self.turn)
            used[key] = used.get(key, Usage()) + used_by(line)
        return tuple(Share(role, turn, usage) for (role, turn), usage in used.items())

    async def settle(self) -> Usage:
        """The same: nothing is in flight any more."""
        return self.usage()

    @property
    def error(self) -> Exception | None:
        """Nothing can go wrong any more."""
        return None

    def provider_failure(self) -> str | None:
        """Nobody grades what was taken over."""
        return None


@attrs.define(eq=False)
class ReaperWorld:
    """What the handlers of a rollout that was taken over may do: read what is on disk, and give back."""

    id: str
    folder: Path
    rules: Any
    journal: JournalWriter
    leases: JournaledLeases
    meter: LoggedMeter
    telemetry: Telemetry
    leaving: bool = False

    @classmethod
    def over(cls, taken: Taken) -> ReaperWorld:
        """The world of a rollout that was taken."""
        folder, folded, header = taken.folder, taken.folded, taken.folded.header
        clock = RolloutConfig(agent="", prompt="", registry=Registry()).clock
        journal = JournalWriter(taken.sink, clock, header, taken.records)
        ways = {
            kind: _way(kind, header) for kind in ("sandbox", "agent", "director", "gateway-key", "process", "tests")
        }
        return cls(
            header.rollout,
            folder,
            folded.rules,
            journal,
            JournaledLeases(journal.write, ways, dict(folded.leases)),
            LoggedMeter(folder / "llm.jsonl", folded.position.facts.role, folded.position.facts.prompted),
            Telemetry(header, str, journal.note),
        )

    def deadline(self, state: str, _stage: Stage, _facts: Facts) -> Deadline:
        """How long `state` may take."""
        return Deadline(DEADLINES[state])

    def note(self, text: str) -> None:
        """A line in the journal that moves nothing."""
        self.journal.note(text)

    def recovered_segment(self, number: int) -> TurnSegment:
        """A segment whose writer was killed, as it stands on disk."""
        return recovered(self.folder, number, FileSink(self.folder / "trajectory.jsonl"))

    async def abandon(self, _stage: Stage) -> None:
        """Nothing of it lives in this process."""

    def keeps(self, _lease: Lease, _facts: Facts) -> bool:
        """Nothing is kept: somebody asked for it to be given back."""
        return False

    async def keep(self, _lease: Lease) -> None:
        """Nothing is kept."""

    async def collect(self) -> None:
        """What the agents logged went with their sandbox."""

    def result(self, position: Position) -> RolloutResult:
        """What came of it."""
        info = self.journal.header.info
        leases: dict[tuple[str, str], Lease] = {(lease.kind, lease.name): lease for lease in self.leases.open()}
        return result_of(
            Folded(self.journal.header, position, leases),
            self.journal.records,
            task=info.get("task") or "",
            tracking="metered" if info.get("tracked") else "untracked",
            why_untracked="" if info.get("tracked") else "as its journal says",
            folder=self.folder,
        )

    def close(self, position: Position) -> None:
        """Write the result and give the file back."""
        write_result(self.folder, self.result(position), bytes)
        self.journal.close()


def _way(kind: str, header: Header) -> Callable[[Lease], Awaitable[tuple[str, ...]]]:
    async def give_back(lease: Lease) -> tuple[str, ...]:
        if kind == "gateway-key":
            remove_socket(lease.handle)
        if kind != "sandbox":
            return (f"the process that held {kind} {lease.name} is dead",)
        handle = lease.handle or _intended(lease, header)
        await reaper(handle.get("kind", ""))(handle)
        return (f"sandbox {lease.name} was reaped",)

    return give_back


def _intended(lease: Lease, header: Header) -> Mapping[str, Any]:
    """How to find a sandbox that was killed on its way up: by the name that was chosen for it."""
    kind, scratch = header.info.get("sandbox"), header.info.get("scratch")
    options = header.info.get("sandbox_options") or {}
    return {**options, "kind": kind, "name": lease.name, "root": f"{scratch}/{lease.name}"}
