"""After `kill -9`: a rollout is taken over from its journal alone, captured, given back and closed.

A new process folds the journal, fires `Recovered`, and drives the same kernel over a world that can only give back.
What the dead process had sealed stays sealed, an open turn gets its one capture from what is on disk, a reward that
was given stands, and every lease is returned by the reaper of its kind.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import msgspec

from orchestrator.capture import TurnSegment, recovered
from orchestrator.config import RolloutConfig
from orchestrator.journal import FileSink, JournalWriter, read_journal, read_lines
from orchestrator.leases import JournaledLeases
from orchestrator.metering import remove_socket
from orchestrator.registry import Registry
from orchestrator.result import RolloutResult, result_of
from orchestrator.rollout import Rollout
from orchestrator.sandboxes import reaper
from orchestrator.world import started_at, write_result
from states.deadlines import DEADLINES
from states.errors import ConfigError
from states.events import Failure, Recovered, SandboxFailed, Usage
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
    records = read_journal(folder)
    folded = fold(records)
    if not folded.position.closed:
        _refuse_living(folded.header)
    world = ReaperWorld.over(folder, folded, records)
    if folded.position.closed:
        try:
            for lease in world.leases.open():
                await world.leases.give_back(lease)
        finally:
            world.journal.close()
        return world.result(folded.position)
    incarnation = 2 + sum(isinstance(r, Transition) and r.event.name == "Recovered" for r in records)
    died = Failure("harness", "Killed", f"its orchestrator died in {folded.position.state}")
    rollout = Rollout.taken_over(world, folded.position, _NOTHING_MORE, Recovered(incarnation), SandboxFailed(died))
    return await rollout.run()


_NOTHING_MORE = RolloutConfig(agent="", prompt="", out=None, registry=Registry())
"""A rollout that was taken over asks for nothing: its world only gives back."""


def _refuse_living(header: Header) -> None:
    owner = header.info.get("owner") or {}
    if owner.get("host") != socket.gethostname():
        raise ConfigError(f"rollout {header.rollout} ran on {owner.get('host')!r}: reap it there")
    if owner.get("started") and started_at(owner["pid"]) == owner["started"]:
        raise ConfigError(f"rollout {header.rollout} is driven by process {owner['pid']}, which is alive: cancel it")


@attrs.frozen
class LoggedMeter:
    """A `states.ports.Meter` that counts what the dead process had written of its model calls."""

    file: Path

    def usage(self) -> Usage:
        """The sum of the calls in `llm.jsonl`; nothing when there is no such file."""
        if not self.file.exists():
            return Usage()
        return sum((_call_usage(msgspec.json.decode(line)) for line in read_lines(self.file)), Usage())

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


def _call_usage(line: dict[str, Any]) -> Usage:
    failed = bool(line.get("error")) or not 200 <= line["status"] < 300
    if line["usage"] is None:
        return Usage(1, int(failed), cost=0.0 if failed else None)
    return Usage(1, int(failed), **line["usage"])


@attrs.define(eq=False)
class ReaperWorld:
    """What the handlers of a rollout that was taken over may do: read what is on disk, and give back."""

    id: str
    folder: Path
    rules: Any
    journal: JournalWriter
    leases: JournaledLeases
    meter: LoggedMeter
    leaving: bool = False

    @classmethod
    def over(cls, folder: Path, folded: Folded, records: list[Record]) -> ReaperWorld:
        """The world of the rollout in `folder`."""
        header = folded.header
        clock = RolloutConfig(agent="", prompt="", registry=Registry()).clock
        journal = JournalWriter(FileSink(folder / "journal.jsonl"), clock, header, list(records))
        ways = {kind: _way(kind, header) for kind in ("sandbox", "agent", "gateway-key", "process", "tests")}
        return cls(
            header.rollout,
            folder,
            folded.rules,
            journal,
            JournaledLeases(journal.write, ways, dict(folded.leases)),
            LoggedMeter(folder / "llm.jsonl"),
        )

    def deadline(self, state: str, _stage: Stage) -> float:
        """Seconds that `state` may take."""
        return DEADLINES[state]

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
    return {"kind": kind, "name": lease.name, "root": f"{scratch}/{lease.name}"}
