"""After a stop, or `kill -9`: a rollout is taken over from its journal, to go on with it or to close it.

Whoever takes it over becomes the one writer of its journal, folds that, and fires `Recovered`. What the dead process
had sealed stays sealed, an open turn gets its one capture from what is on disk, and a reward that was given stands.

`resume` drives the same kernel on over a world like the one that is gone, made from the same config and attached to the
same sandbox. `reap` needs the journal alone: its world can only give back, every lease by the reaper of its kind.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import attrs
import msgspec

from orchestrator.capture import TurnSegment, recovered
from orchestrator.config import RolloutConfig
from orchestrator.control import SOCKET
from orchestrator.gateway.llm_log import used_by
from orchestrator.journal import FileSink, JournalSink, JournalWriter, read_journal, read_lines
from orchestrator.leases import JournaledLeases
from orchestrator.metering import remove_socket
from orchestrator.owners import is_alive, owner, owner_of
from orchestrator.registry import Registry
from orchestrator.result import RolloutResult, result_of
from orchestrator.rollout import Rollout
from orchestrator.sandboxes import reaper
from orchestrator.telemetry import Telemetry
from orchestrator.world import Inherited, LiveWorld, build_world, write_result
from states.counting import total
from states.deadlines import DEADLINES, Deadline
from states.errors import ConfigError, QuietError, SandboxError
from states.events import (
    Cancelled,
    Checked,
    Event,
    Failure,
    Next,
    Prompted,
    Recovered,
    SandboxFailed,
    Share,
    Usage,
)
from states.journal import Folded, Header, Record, Transition, fold
from states.machine import CAPTURING, Facts, Position
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
    with contextlib.suppress(OSError):
        (folder / SOCKET).unlink()  # of the dead process: who drives is us, and nobody asks us anything
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
    return await Rollout.taken_over(world, folded.position, _NOTHING_MORE, recovered_by_us(taken), why).run()


_NOTHING_MORE = RolloutConfig(agent="", prompt="", out=None, registry=Registry())
"""A rollout that was taken over asks for nothing: its world only gives back."""


async def resume(folder: Path, config: RolloutConfig, *, ask_again: bool = False) -> Rollout:
    """Go on with a rollout that was stopped, or whose process was killed: same plan, folder, sandbox and journal.

    `config` is the one that it began with, made again; secrets and where models are served may be others. Who drives it
    now is in the journal as `Recovered`, turns, usage and budgets go on, and the open turn gets its one capture. A
    director sees the whole story, so one that decides by that alone goes on too; what it kept for itself is gone, as is
    the agents' conversation: a new session finds their files, not their memory. A sandbox that cannot be had again
    ends the rollout as failed by the sandbox.

    A turn that was cut off counts as taken. With `ask_again` it is asked once more first.

    Returns the rollout, which is now this process's to run, or to `detach`.

    Raises:
        ConfigError: somebody drives it, it is over, or it began with other inputs; says which.
        JournalError: its journal cannot be read or written.

    >>> rollout = await resume(Path("runs/1b2c3d"), config)  # doctest: +SKIP
    >>> (await rollout.run()).state                          # doctest: +SKIP
    'closed/rewarded'
    """
    taken = take(folder)
    try:
        _refuse_what_is_over(taken)
        world = build_world(config, taken.header.rollout, taken)
        cut = cut_off(taken)
        recovered = recovered_by_us(taken, cut if ask_again else None)
        rollout = Rollout.taken_over(world, taken.folded.position, config, recovered)
        if cut is not None and not ask_again:
            world.note(f"the turn of {cut.role} that was cut off counts as taken: it is not asked again")
    except BaseException:
        taken.sink.close()
        raise
    try:
        if rollout.state != "provisioning":  # that brings everything up by itself
            await _attach(world, rollout)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await rollout.detach()
        raise
    return rollout


def _refuse_what_is_over(taken: Inherited) -> None:
    if taken.folded.position.closed:
        held = (
            f"; it still holds something, which `rollout reap {taken.folder}` gives back" if taken.folded.leases else ""
        )
        raise ConfigError(f"rollout {taken.header.rollout} is over: {taken.folded.position.state}{held}")


async def _attach(world: LiveWorld, rollout: Rollout) -> None:
    try:
        with anyio.fail_after(DEADLINES["provisioning"]):
            await world.attach()
    except (SandboxError, QuietError) as error:
        rollout.sandbox_failed(str(error))
    except TimeoutError:
        rollout.sandbox_failed(f"the sandbox was not to be had again within {DEADLINES['provisioning']:g} s")


def cut_off(taken: Inherited) -> Next | None:
    """The turn that was in flight when the rollout was stopped or killed, if it ended by nothing else.

    None as well where it was taken into account since: it is to be asked again already, or its work was checked.
    """
    position = taken.folded.position
    by = position.facts.ended_by
    open_turn = position.state in ("executing", "cancelling", *CAPTURING)
    cut = (open_turn and not by) or by == "killed" or (by == "interrupted" and taken.folded.stopped)
    if not cut or position.state in ("verifying", "releasing") or position.facts.ending is not None:
        return None
    for move in reversed([*moves(taken.records)]):
        match move.event:
            case Prompted(role=role, text=text, budgets=budgets):
                return Next("turn", role, text, budgets=budgets)
            case Checked() | Recovered(again=Next()):
                return None
    return None


def recovered_by_us(taken: Inherited, again: Next | None = None) -> Recovered:
    """The event of taking it over."""
    before = sum(isinstance(move.event, Recovered) for move in moves(taken.records))
    return Recovered(before + 2, owner(), again)


def take(folder: Path) -> Inherited:
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
        folded = fold(records)
        calls = LoggedMeter(folder / "llm.jsonl").calls
        return Inherited(folder.resolve(), sink, records, folded, calls, functools.partial(_give_back, folded.header))
    except BaseException:
        sink.close()
        raise


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

    def calls(self) -> Iterator[dict[str, Any]]:
        """Its lines; none when there is no such file."""
        return map(msgspec.json.decode, read_lines(self.file) if self.file.exists() else ())

    def usage(self) -> Usage:
        """The sum of the calls in `llm.jsonl`; nothing when there is no such file."""
        return total(self.shares())

    def shares(self) -> tuple[Share, ...]:
        """The same by role and turn."""
        used: dict[tuple[str, int], Usage] = {}
        for line in self.calls():
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
    on_loss: list[Callable[[str], None]] = attrs.field(factory=list)
    """Nobody is told: what is only given back is not watched."""

    @classmethod
    def over(cls, taken: Inherited) -> ReaperWorld:
        """The world of a rollout that was taken."""
        folder, folded, header = taken.folder, taken.folded, taken.folded.header
        clock = RolloutConfig(agent="", prompt="", registry=Registry()).clock
        journal = JournalWriter(taken.sink, clock, header, taken.records)
        return cls(
            header.rollout,
            folder,
            folded.rules,
            journal,
            JournaledLeases(journal.write, taken.reap, dict(folded.leases)),
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


async def _give_back(header: Header, lease: Lease) -> tuple[str, ...]:
    """Give back what a dead process held."""
    if lease.kind == "gateway-key":
        remove_socket(lease.handle)
    if lease.kind != "sandbox":
        return (f"the process that held {lease.kind} {lease.name} is dead",)
    handle = lease.handle or _intended(lease, header)
    await reaper(handle.get("kind", ""))(handle)
    return (f"sandbox {lease.name} was reaped",)


def _intended(lease: Lease, header: Header) -> Mapping[str, Any]:
    """How to find a sandbox that was killed on its way up: by the name that was chosen for it."""
    kind, scratch = header.info.get("sandbox"), header.info.get("scratch")
    options = header.info.get("sandbox_options") or {}
    return {**options, "kind": kind, "name": lease.name, "root": f"{scratch}/{lease.name}"}
