"""The world of one rollout: every port that the handlers use, made from its config.

Nothing is started here; the handler of `provisioning` does that. What must be given back is journaled as a lease, and
`_ways` holds the only ways of giving back.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import attrs

from orchestrator._tasks import Bell, first_of, foreign
from orchestrator._words import shown, traced
from orchestrator.budgets import METERED, Budgets, Gone, Limit, Limits, brought_up, limits_of
from orchestrator.capture import DIRECTOR, GrowingTrajectory, TurnSegment, read_trajectory, recovered
from orchestrator.config import DirectorRole, RolloutConfig, Scene
from orchestrator.directing import AgentDirector, HeardSegment, Outside
from orchestrator.directors import Chronicle, DirectedPlan, Story
from orchestrator.identity import about, check_same
from orchestrator.journal import FileSink, JournalSink, JournalWriter, MemorySink, Sink, encode_any
from orchestrator.leases import GiveBack, JournaledLeases
from orchestrator.metering import Cast, Metering, ModelAccess
from orchestrator.owners import labels_of
from orchestrator.plans import FixedPlan, Hold
from orchestrator.questions import Questions
from orchestrator.redact import RedactingSink, Redactor
from orchestrator.registry import Place
from orchestrator.resolved import resolve, sandbox_of
from orchestrator.result import RolloutResult, driven_sec, redacted, result_of
from orchestrator.sandboxes import SandboxSpec, make_sandbox
from orchestrator.telemetry import Telemetry
from orchestrator.transports import HOME, make_transport
from states.deadlines import BOUNDED_BY_ROLLOUT, DAY, DEADLINES, Deadline
from states.errors import ConfigError, JournalError, OrchestratorError, SandboxError, VerifierError, said
from states.events import BudgetSpent, IdlePassed, Next, Share
from states.journal import Folded, Header, LeaseRecord, Record, Stopped
from states.machine import Facts, Position, Rules
from states.ports import (
    Attachable,
    Connection,
    Detachable,
    Keepable,
    Lease,
    LeaseKind,
    Meter,
    OpenTurn,
    Plan,
    Sandbox,
    SandboxHandle,
    Seat,
    Stage,
    Transport,
    Verifier,
)

T = TypeVar("T")

TURN_SEC = 900.0
_TIME = ("rollout", "wall_sec")
"""The one budget that is not spent in turns alone: `time_left` keeps it."""
MARGIN_SEC = 60.0
"""What a state gets beyond the limit of the task on a verifier or a build, for what is around these."""


@attrs.frozen
class NoVerifier:
    """The host verifies; the table never asks this one for a reward."""

    async def verify(self) -> Mapping[str, float]:
        """There is nothing to run."""
        raise VerifierError("this rollout has no verifier")

    async def check(self) -> Mapping[str, float]:
        """There is nothing to run."""
        raise VerifierError("this rollout has no verifier to check with")


@attrs.frozen(eq=False)
class BroughtVerifier:
    """A verifier of the user's: whatever it raises is the verifier's failure, its traceback a note."""

    _verifier: Verifier
    _note: Callable[[str], None]

    async def verify(self) -> Mapping[str, float]:
        """See `Verifier.verify`. What it returns is looked at by the state."""
        found: Mapping[str, float] = await self._asked("verify")
        return found

    async def check(self) -> Mapping[str, float]:
        """See `Verifier.check`. Raises `VerifierError` for what is no mapping."""
        found: Any = await self._asked("check")
        if not isinstance(found, Mapping):
            raise VerifierError(f"check() returned {shown(found)}; it must return numbers by name")
        return found

    async def _asked(self, method: str) -> Any:
        try:
            with foreign():
                found = getattr(self._verifier, method)()
                return await found if inspect.isawaitable(found) else found
        except OrchestratorError:
            raise
        except Exception as error:
            self._note(traced(error))
            raise VerifierError(f"{method}() raised {type(error).__name__}: {said(error)}") from error


@attrs.frozen
class Inherited:
    """What a rollout goes on from that another process began: its folder, its journal so far, now ours to write.

    `calls` reads what it had written of its model calls; `reap` gives back a lease of a process that is dead.
    """

    folder: Path
    sink: JournalSink
    records: list[Record]
    folded: Folded
    calls: Callable[[], Iterable[dict[str, Any]]]
    reap: Callable[[Lease], Awaitable[tuple[str, ...]]]

    @property
    def header(self) -> Header:
        """Whose journal it is, and what it was made from."""
        return self.folded.header


@attrs.define(eq=False)
class LiveWorld:
    """`states.ports.World` for one rollout. Made by `build_world`."""

    id: str
    config: RolloutConfig
    rules: Rules
    journal: JournalWriter
    questions: Questions
    cast: Mapping[str, Cast]
    tracking: Metering
    limits: Limits
    models: ModelAccess
    folder: Path | None
    task: Any
    story: Callable[[], Story]
    """What happened so far, as directors see it."""
    plan: Plan
    _redactor: Redactor
    _trajectory: Sink
    _llm: Sink
    _told: Sink
    _hold: Hold
    _bell: Bell
    telemetry: Telemetry
    _inherited: Inherited | None = None
    _left: dict[tuple[str, str], Lease] = attrs.field(factory=dict, init=False)
    """Leases of a dead process that are not ours yet."""
    _evidence: tuple[str, ...] = attrs.field(default=(), init=False)
    """How it is known that nothing which a dead process started is alive."""
    _places: dict[str, Place] = attrs.field(factory=dict, init=False)
    _sandbox: Sandbox | None = attrs.field(default=None, init=False)
    _handles: dict[str, SandboxHandle] = attrs.field(factory=dict, init=False)
    _began: float | None = attrs.field(default=None, init=False)
    """When its clock started, by the monotonic one."""
    _spent: float = attrs.field(default=0.0, init=False)
    """Seconds that an earlier process had driven it."""
    _stopped_by: str | None = attrs.field(default=None, init=False)
    on_loss: list[Callable[[str], None]] = attrs.field(factory=list, init=False)
    """Who is told when the sandbox goes away by itself."""
    _scratch: Path | None = attrs.field(default=None, init=False)
    _director: AgentDirector | None = attrs.field(default=None, init=False)
    leases: JournaledLeases = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        if self._inherited is not None:
            self._left.update(self._inherited.folded.leases)
            self.models.before = self._inherited.calls
            self._spent = driven_sec(self._inherited.records)
        self.leases = self.models.leases = JournaledLeases(self.journal.write, self._give_back, dict(self._left))

    async def _give_back(self, lease: Lease) -> tuple[str, ...]:
        """By our own way; what a dead process took, and we have not, by its reaper's."""
        if self._inherited is None or (lease.kind, lease.name) not in self._left:
            return await self._way_of(lease.kind)(lease)
        evidence = await self._inherited.reap(lease)
        del self._left[lease.kind, lease.name]
        return evidence

    def _way_of(self, kind: LeaseKind) -> GiveBack:
        match kind:
            case "sandbox":
                return self._stop_sandbox
            case "agent":
                return self._end_agent
            case "director":
                return self._end_director
            case "gateway-key" | "process":
                return self._close_models
            case "tests":
                return self._remove_tests

    # --- time and the operator ---

    def time_left(self) -> float:
        """Seconds until the rollout's own deadline. Its clock starts with the first question, and stops in pauses."""
        limit = self.limits.rollout.wall_sec
        if limit is None:
            return math.inf
        now = self.config.monotonic()
        if self._began is None:
            self._began = now
        return max(0.0, limit - self._spent - (now - self._began - self._hold.paused_sec))

    def deadline(self, state: str, stage: Stage, facts: Facts) -> Deadline:
        """How long `state` may take from now, and whose limit that is."""
        limits = [Deadline(self._usual(state))]
        if isinstance(stage, OpenTurn) and state == "executing":
            limits = list(self._wall_clock(stage, facts))
        if state in BOUNDED_BY_ROLLOUT:
            limits.append(Deadline(self.time_left(), "rollout"))
        return min(limits, key=lambda limit: limit.seconds)

    def _usual(self, state: str) -> float:
        """Seconds that `state` may take by itself: by the config, else by the task, else by the table."""
        own = self.config.deadlines.get(state, DEADLINES[state])
        if self.task is None or state in self.config.deadlines:
            return own
        if state in ("verifying", "checking"):
            return float(self.task.verification.timeout_sec + MARGIN_SEC)
        return max(own, self.task.limits.build_timeout_sec + MARGIN_SEC) if state == "provisioning" else own

    def _lifetime(self) -> float:
        """Seconds that its sandbox must live: the rollout's limit, and that of each state which it does not bound.

        When its time is up it comes by each of those once at most. Its clock stands still in a pause: one is counted.
        """
        beyond = sum(self._usual(state) for state in DEADLINES if state not in BOUNDED_BY_ROLLOUT)
        return (self.limits.rollout.wall_sec or DAY) + beyond

    def _wall_clock(self, turn: OpenTurn, facts: Facts) -> Iterator[Deadline]:
        """How long a turn may take: what is its own, and what is left of its role and its scene."""
        role = turn.connection.seat.role.name
        usual = self.config.deadlines.get("executing", self.cast[role].turn_sec)
        yield Deadline(turn.budgets.get("wall_sec", usual), "turn")
        for limit in self.limits.holding(role):
            if limit.kind == "wall_sec" and limit.scope != "rollout":
                yield Deadline(limit.limit - (self.limits.amount(limit, facts.ledger) or 0.0), limit.scope)

    def held(self) -> str | None:
        """Who holds the rollout before its next turn; None while nobody does."""
        return self._hold.held

    @property
    def leaving(self) -> bool:
        """Whether the rollout is to stop being driven at the next `disconnected`."""
        return self._stopped_by is not None

    def leave(self, by: str) -> None:
        """Keep no session, and no pause: it is to stop being driven. Raises `JournalError`."""
        self._stopped_by = by
        self._hold.resume(by)
        self.journal.write(lambda seq, now: Stopped(seq, now, by))

    def pause(self, by: str) -> None:
        """Hold the plan before its next turn; nobody would be there to let go of it when it is to be left."""
        if not self.leaving:
            self._hold.pause(by)

    def resume(self, by: str) -> None:
        """Let the plan go on."""
        self._hold.resume(by)

    async def resumed(self) -> str:
        """Wait until the plan goes on; who let it."""
        return await self._hold.resumed()

    async def first(self, *waits: Callable[[], Awaitable[T]]) -> T:
        """The result of the first wait to finish."""
        return await first_of(*waits)

    def note(self, text: str) -> None:
        """A line in the journal that moves nothing."""
        self.journal.note(text)

    # --- provisioning ---

    async def prepare(self) -> None:
        """Install the agents, and get a key at the gateway where model calls are metered."""
        self.time_left()
        for member in self.cast.values():
            if member.agent.calls_model and not self.tracking.tracked:
                self.note(
                    f"the model calls of {member.name} ({member.agent.name}) go uncounted: {self.tracking.reason}"
                )
        for member in self.cast.values():
            self._places[member.name] = await _installed(member)
        if self.tracking.tracked:
            self.leases.intend("gateway-key", self.id)
            await self.models.open(tuple(self.cast.values()))

    async def attach(self) -> None:
        """For a rollout that was taken over beyond `provisioning`: what that had brought up, once more.

        The gateway is a new one; the sandbox is the old one, with nothing alive in it. Raises `SandboxError` when it
        cannot be had again, `QuietError` when something in it cannot be ended.
        """
        for lease in self.leases.open():
            if lease.kind in ("gateway-key", "process", "director"):
                await self.leases.give_back(lease)
        await self.prepare()
        for lease in self.leases.open("sandbox"):
            if not isinstance(self.sandbox, Attachable):
                kind = type(self.sandbox).__qualname__
                raise SandboxError(f"sandbox {lease.name} cannot be had again: a {kind} has no attach")
            self._evidence += await self.sandbox.attach(lease.handle)
        self._left.clear()
        await self._bring_gateway()

    @property
    def sandbox(self) -> Sandbox:
        """Where it runs; made when first asked for, which is after `prepare`."""
        if self._sandbox is None:
            self._sandbox = make_sandbox(self._spec())
        return self._sandbox

    def _spec(self) -> SandboxSpec:
        gateway = self.models.gateway
        return attrs.evolve(
            sandbox_of(self.config, self.task),
            name=f"rollout-{self.id}",
            gateway_port=gateway.port if gateway is not None else None,
            gateway_socket=gateway.socket_path if gateway is not None else None,
            labels=labels_of(self.id, self.folder),
            ttl_sec=self._lifetime(),
            note=self.journal.note,
            lost=functools.partial(_tell, self.on_loss),
            binds=tuple(dict.fromkeys(bind for place in self._places.values() for bind in place.binds)),
        )

    async def install(self) -> None:
        """Bring the gateway within reach, and the task's files in; what is missing without a build is a note."""
        await self._bring_gateway()
        if self.task is None:
            return
        from orchestrator.tasks.environment import install, network_not_kept

        for text in self.task.notes:
            self.note(text)
        if not self.sandbox.has_environment:
            for text in (await install(self.task, self.sandbox)).missing:
                self.note(text)
        if text := network_not_kept(self.task, self.config.network):
            self.note(text)

    async def _bring_gateway(self) -> None:
        callers = [member for member in self.cast.values() if member.agent.calls_model]
        if self.tracking.tracked and any(member.agent.calls_from == "sandbox" for member in callers):
            await self.models.reach_from(self.sandbox, self.journal.note)

    # --- agents ---

    def seat(self, role: str, number: int) -> Seat:
        """A place for the `number`th connection. Nothing is started."""
        member = self.cast[role]
        self.models.meter.turn_began(role, 0, Budgets())  # what it uses to connect is of no turn, nor of its last one
        handle = self.sandbox.handle(f"{role}-{number}")
        self._handles[handle.name] = handle
        return Seat(member, self._transport(member, handle.name), handle)

    def _transport(self, member: Cast, handle: str) -> Transport:
        gateway, inside, key = self.models.gateway, self.models.url_from(self.sandbox), self.models.key_for(member)
        if key:
            self._redactor.add(key)
        direct = member.upstream if self.config.usage_tracking == "off" else None
        if direct is not None:  # an endpoint that was brought along is called as it is
            inside, key = direct.root, direct.api_key or "none"
        return make_transport(
            member,
            self._places[member.name],
            questions=self.questions,
            cwd=self.sandbox.cwd,
            home=getattr(handle, "home", HOME),
            base_url=inside if member.agent.calls_from == "sandbox" or gateway is None else gateway.url,
            sandbox_base_url=inside,
            api_key=key,
            task=self.task,
            keep_stderr=functools.partial(self._keep_stderr, handle),
            note=self.journal.note,
        )

    def _keep_stderr(self, handle: str, text: str) -> None:
        if self.folder is not None and text:
            logs = self.folder / "agent"
            logs.mkdir(exist_ok=True)
            (logs / f"{handle}.stderr.txt").write_bytes(self._redactor(text.encode("utf-8", "replace")))

    def segment(self, connection: Connection, number: int, decision: Next) -> TurnSegment:
        """Segment `number` of the trajectory, opened with its prompt. Usage counts for this turn from here on."""
        if not self.tracking.tracked and METERED & set(decision.budgets):
            why = self.tracking.reason
            raise ConfigError(f"a turn has a budget of tokens or cost, which the gateway keeps, but {why}")
        self.models.meter.turn_began(decision.role, number, Budgets.of(decision.budgets))
        unsure = self._redactor.unsure
        segment = TurnSegment(number, self._trajectory, self.config.monotonic, self._bell.ring, unsure)
        seat = connection.seat
        segment.opened(decision.text, role=seat.role.name, protocol=seat.transport.name, time=self.config.clock())
        return segment

    def led_by(self, led: DirectorRole, scene: Scene) -> None:
        """Let an agent decide what comes next."""

        def seat() -> Seat:  # numbered by the journal, so that a rollout that goes on elsewhere counts on
            known = {record.lease.name for record in self.journal.records if isinstance(record, LeaseRecord)}
            name = next(name for number in itertools.count(1) if (name := f"{led.role.name}-{number}") not in known)
            member = self.cast[led.role.name]
            return Seat(member, self._transport(member, name), Outside(name))

        numbers = itertools.count(1 + len(read_trajectory(self.folder / DIRECTOR) if self.folder else ()))

        def segment(connection: Connection, turn: int, text: str) -> HeardSegment:
            told = HeardSegment(next(numbers), self._told, self.config.monotonic, unsure=self._redactor.unsure)
            protocol = connection.seat.transport.name
            told.opened(text, role=led.role.name, protocol=protocol, time=self.config.clock(), turn=turn)
            return told

        roles = tuple(role.name for role in scene.roles)
        used = functools.partial(self.models.used_by, led.role.name)
        limits = [limit for limit in self.limits.holding(led.role.name) if limit.kind in METERED]
        director = AgentDirector(
            led,
            roles,
            scene.turns,
            self.leases,
            seat,
            segment,
            used,
            self.time_left,
            self.journal.note,
            lambda: str(self._gone(limits, Facts()) or ""),
        )
        self._director = director
        self.plan = DirectedPlan(director, self.story, roles, self.config.max_checks, self.journal.note)

    async def dismiss(self) -> None:
        """Close the sessions of a director, where an agent is one."""
        for lease in self.leases.open("director"):
            await self.leases.give_back(lease)

    async def _end_director(self, lease: Lease) -> tuple[str, ...]:
        return tuple(await self._director.end(lease.name)) if self._director is not None else ()

    def recovered_segment(self, number: int) -> TurnSegment:
        """The same segment, read back from disk by a new process."""
        if self.folder is None:
            return TurnSegment(number, self._trajectory, self.config.monotonic)
        return recovered(self.folder, number, self._trajectory)

    @property
    def meter(self) -> Meter:
        """What the gateway counted."""
        meter: Meter = self.models.meter
        return meter

    def budget(self, turn: OpenTurn, facts: Facts) -> Sequence[Callable[[], Awaitable[BudgetSpent | IdlePassed]]]:
        """One wait for what can be spent in a turn, one for its silence, where there are such limits."""
        role = turn.connection.seat.role.name
        own = limits_of("turn", Budgets.of(turn.budgets), str(turn.segment.number))
        limits = (*self.limits.holding(role), *own)
        spendable = tuple(limit for limit in limits if limit.kind in ("tokens", "cost", "tool_calls"))
        silences = [limit for limit in limits if limit.kind == "idle_sec"]
        if "idle_sec" not in turn.budgets and (usual := self.cast[role].idle_sec) is not None:
            silences.append(Limit("turn", "idle_sec", usual))

        async def spent() -> BudgetSpent:
            return (await self._bell.until(lambda: self._gone(spendable, facts, turn))).event()

        async def silent() -> IdlePassed:
            shortest = min(silences, key=lambda limit: limit.limit)
            await turn.segment.changed_since(shortest.limit)
            return IdlePassed(shortest.limit, shortest.scope)

        return (*([spent] if spendable else ()), *([silent] if silences else ()))

    def spent(self, facts: Facts, role: str = "") -> str:
        """Why no further turn may start, or none of this role. Empty while it may."""
        if self.time_left() <= 0:
            return "the rollout's time is up"
        limits = [limit for limit in self.limits.holding(role or None) if (limit.scope, limit.kind) != _TIME]
        return str(self._gone(limits, facts) or "")

    def _gone(self, limits: Iterable[Limit], facts: Facts, turn: OpenTurn | None = None) -> Gone | None:
        """The first of these that is spent, by the journal, by what the gateway counted, and by the turn in flight."""
        shares = brought_up(facts.ledger, self.meter.shares())
        if turn is not None:
            key = turn.connection.seat.role.name, turn.segment.number
            shares[key] = shares[key] + Share(*key, tool_calls=turn.segment.tool_calls)
        return next(self.limits.gone(limits, shares.values()), None)

    # --- the end ---

    @functools.cached_property
    def verifier(self) -> Verifier:
        """Who gives the reward."""
        if self.config.verifier == "task" and self.task is not None:
            from orchestrator.verifier import TaskVerifier

            return TaskVerifier(
                self.task, self.sandbox, self._artifacts() / "verifier", given=self.config.env, redactor=self._redactor
            )
        if self.config.verifier is None or isinstance(self.config.verifier, str):
            return NoVerifier()
        return BroughtVerifier(self.config.verifier, self.journal.note)

    def _artifacts(self) -> Path:
        """The rollout's folder, or one of our own that goes when it is closed."""
        if self.folder is not None:
            return self.folder
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="rollout-"))
        return self._scratch

    async def collect(self) -> None:
        """Bring the agents' logs home."""
        if self.folder is None or not (self._handles or self._evidence):
            return
        home = self.folder / "agent"
        home.mkdir(exist_ok=True)  # where there is a folder, a sandbox need not ask what will come
        try:
            await self.sandbox.download("/logs/agent", home)
            await anyio.to_thread.run_sync(self._redactor.folder, home)
        except SandboxError as error:
            self.note(f"no agent logs: {error}")

    async def abandon(self, stage: Stage) -> None:
        """Without a journal: shut what an agent holds in this process, end its processes, close the gateway's key.

        What goes wrong cannot be written anywhere; its lease stays open for the reaper.
        """
        connection = stage.connection if isinstance(stage, OpenTurn) else stage
        if isinstance(connection, Connection):
            with contextlib.suppress(Exception):
                await connection.seat.transport.quiescing(connection)
        if self._director is not None:
            await self._director.abandon()
        for handle in self._handles.values():
            with contextlib.suppress(Exception):
                await handle.end()
        with contextlib.suppress(Exception):
            await self.models.close()

    async def detach(self) -> None:
        """Nobody drives it here any more: close what cannot outlive this process, keep the leases. Idempotent."""
        await self.dismiss()
        await self.models.close()
        if isinstance(self._sandbox, Detachable):
            await self._sandbox.detach()
        self._close_files()

    def _close_files(self) -> None:
        for file in (self.journal, self._trajectory, self._llm, self._told):
            file.close()

    def keeps(self, lease: Lease, facts: Facts) -> bool:
        """Whether the sandbox is to be looked at: always, or when nothing was rewarded (`keep_sandbox`)."""
        wish = self.config.keep_sandbox
        succeeded = facts.ending == "unverified" or (facts.reward or 0.0) > 0
        keep = lease.kind == "sandbox" and (wish == "always" or (wish == "on-failure" and not succeeded))
        if keep:
            where = self.folder or self.id
            looks = f"`rollout exec {where} -- ls` looks in, " if isinstance(self.sandbox, Keepable) else ""
            self.note(f"sandbox {lease.name} was kept: {looks}`rollout reap {where}` ends it")
        return keep

    async def keep(self, _lease: Lease) -> None:
        """End what runs in the sandbox, and let it be."""
        await self.models.leave()
        if isinstance(self.sandbox, Keepable):
            await self.sandbox.leave()

    async def _stop_sandbox(self, _lease: Lease) -> tuple[str, ...]:
        await self.models.leave()
        await self.sandbox.stop()
        return ("sandbox stopped",)

    async def _end_agent(self, lease: Lease) -> tuple[str, ...]:
        handle = self._handles.get(lease.name)
        return await handle.end() if handle else self._evidence or ("no such handle in this process",)

    async def _close_models(self, _lease: Lease) -> tuple[str, ...]:
        await self.models.close()
        return ("key revoked, gateway and its child process ended",)

    async def _remove_tests(self, _lease: Lease) -> tuple[str, ...]:
        from orchestrator.verifier import TaskVerifier, remove_tests

        if not isinstance(self.verifier, TaskVerifier):
            return ("the verifier is not ours, and brought no tests of ours",)
        await remove_tests(self.sandbox)
        return ("the tests are gone from the sandbox",)

    def result(self, position: Position) -> RolloutResult:
        """What came of it so far, where it stands at `position`: what folding the journal would give, without that."""
        leases: dict[tuple[str, str], Lease] = {(lease.kind, lease.name): lease for lease in self.leases.open()}
        result = result_of(
            Folded(self.journal.header, position, leases, stopped=self._stopped_by or ""),
            self.journal.records,
            task=self.task.name if self.task is not None else "",
            tracking="metered" if self.tracking.tracked else "untracked",
            why_untracked=self.tracking.reason,
            folder=self.folder,
        )
        return redacted(result, self._redactor.text)

    def close(self, position: Position) -> None:
        """Write the result and give the files back. What is left is read, and held by nobody but its reader."""
        self._close_files()
        self.leases.close()
        self.on_loss.clear()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self.folder is not None:
            write_result(self.folder, self.result(position), self._redactor.document)


def _tell(those: Iterable[Callable[[str], None]], why: str) -> None:
    for tell in those:
        tell(why)


def write_result(folder: Path, result: RolloutResult, redact: Callable[[bytes], bytes]) -> None:
    """Write `result.json`. Raises `JournalError` when that cannot be done."""
    file = folder / "result.json"
    try:
        file.write_bytes(redact(encode_any(result.to_json())) + b"\n")
    except OSError as error:
        raise JournalError(f"{file} cannot be written: {error.strerror or error}") from error


async def _installed(member: Cast) -> Place:
    from orchestrator.install import ensure_installed

    try:
        return await ensure_installed(member.agent)
    except OSError as error:
        raise ConfigError(
            f"agent {member.agent.name} cannot be installed: {error}; set ROLLOUT_CACHE to a folder that can be written"
        ) from error


def build_world(config: RolloutConfig, rollout: str, inherited: Inherited | None = None) -> LiveWorld:
    """Check the config, resolve what it names, and open the rollout's folder and journal: new ones, or inherited ones.

    Raises `ConfigError` (a `TaskError` for a malformed task) before anything exists but the folder; also when what is
    inherited was made from other inputs.
    """
    found = resolve(config)
    redactor = found.redactor()
    header = Header(rollout, found.rules(), config.clock(), info=about(found))
    if inherited is not None:
        check_same(inherited.header, header)
        header = inherited.header
    folder = _folder(config, rollout) if inherited is None else inherited.folder
    journal = _journal(config, header, folder, inherited, redactor)
    steps, llm, told = (_lines(folder, name) for name in ("trajectory.jsonl", "llm.jsonl", DIRECTOR))
    bell, telemetry = Bell(), Telemetry(header, redactor.text, journal.note)
    calls = RedactingSink(llm, redactor)

    def model_called(line: dict[str, Any]) -> None:
        calls.write(encode_any(line))
        bell.ring()
        telemetry.called(line)

    questions = Questions(config.policy, config.answer_sec, config.terminal, journal.note)
    questions.bind(config.on_ask_user)
    tell = Chronicle(found.instruction, journal.records, GrowingTrajectory(steps).steps, found.limits)
    world = LiveWorld(
        id=rollout,
        config=config,
        rules=header.rules,
        journal=journal,
        questions=questions,
        cast=found.cast,
        tracking=found.tracking,
        limits=found.limits,
        models=ModelAccess(rollout, found.tracking, config, model_called, found.limits),
        folder=folder,
        task=found.task,
        story=tell,
        plan=_plan(config, tuple(role.name for role in found.scene.roles), tell, journal.note),
        redactor=redactor,
        trajectory=RedactingSink(steps, redactor),
        llm=calls,
        told=RedactingSink(told, redactor),
        hold=Hold(config.monotonic),
        bell=bell,
        telemetry=telemetry,
        inherited=inherited,
    )
    if found.led is not None:
        world.led_by(found.led, found.scene)
    return world


def _lines(folder: Path | None, name: str) -> FileSink | MemorySink:
    """Where the lines of one artifact go; a file is made by the first one."""
    return FileSink(folder / name) if folder else MemorySink()


def _journal(
    config: RolloutConfig, header: Header, folder: Path | None, inherited: Inherited | None, redactor: Redactor
) -> JournalWriter:
    """The journal: one that begins here, beside the config in its folder, or the one that is gone on with."""
    if inherited is not None:
        sink = RedactingSink(inherited.sink, redactor)
        return JournalWriter(sink, config.clock, header, inherited.records)
    if folder:
        (folder / "config.json").write_bytes(redactor.document(encode_any(header.info)) + b"\n")
    lines = config.journal or (JournalSink(folder / "journal.jsonl") if folder else MemorySink())
    return JournalWriter(RedactingSink(lines, redactor), config.clock, header)


def _plan(config: RolloutConfig, roles: tuple[str, ...], tell: Chronicle, note: Callable[[str], None]) -> Plan:
    if callable(config.director):
        return DirectedPlan(config.director, tell, roles, config.max_checks, note)
    return config.plan or FixedPlan(config.the_scene().turns, tell.instruction)


def _folder(config: RolloutConfig, rollout: str) -> Path | None:
    if config.out is None:
        return None
    folder = config.out / rollout
    try:
        folder.mkdir(parents=True)
        return folder.resolve()
    except OSError as error:
        raise ConfigError(f"out: {folder} cannot be made: {error.strerror or error}") from error
