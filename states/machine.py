"""The machine: every state and every transition of a rollout, in one literal table.

Two rules. Everything that decides where a rollout goes lives in this file: nothing else assigns a state, and there
is no edge outside `TABLE`. This file knows nobody: it reads an event, the fold of the journal (`Facts`) and the
frozen `Rules`, never the world, so a journal can be folded on a machine that has no sandbox.

    fire(position, event, rules) -> position

is a pure function. An event which the state does not know raises `IllegalTransition`, and nothing has changed.

How the table is read: rows with the same event and source are tried from top to bottom, and the last of them has no
guard, so an event that is legal always leads somewhere. `to=None` is a row that stays: it is journaled, and the
handler that runs is not interrupted. `ending` is set by the edge; the first ending wins and nothing overwrites it.

The table runs on one `transitions.Machine` for the whole process: synchronous, model-less, flat. (Its async machine
swallows cancellation after the model has moved, and a machine per rollout costs some 30 KiB.)
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import attrs
import transitions

from states import events as ev
from states.errors import IllegalTransition
from states.events import Ending, Event, Failure, Next, Share, Usage

# --- states --------------------------------------------------------------------------------------------------

SESSION = ("session/acp", "session/factory")
CAPTURING = ("capturing/whole", "capturing/partial")
CLOSED = ("closed/rewarded", "closed/unverified", "closed/void", "closed/failed", "closed/cancelled")

LIVE = (
    "provisioning",
    "disconnected",
    "connecting",
    *SESSION,
    "executing",
    "paused",
    "checking",
    "cancelling",
    *CAPTURING,
    "quiescing",
    "verifying",
    "releasing",
)
STATES = (*LIVE, *CLOSED)
INITIAL = "provisioning"

Link = Literal["none", "acp", "factory", "gone"]
"""What we have of an agent: nothing, a live session of one transport, or one that is unusable."""

# --- what guards read ----------------------------------------------------------------------------------------


@attrs.frozen
class Rules:
    """The part of a rollout's configuration that guards read; it stands in the journal's first line.

    `metered`: every role calls a model and every call is seen. `usage_required`: a rollout of which no call was
    metered is void. Limits count connects since the last captured turn, and runs of the verifier.
    """

    metered: bool = False
    usage_required: bool = False
    has_verifier: bool = True
    can_freeze: bool = False
    max_connects: int = 2
    max_verifies: int = 2


@attrs.frozen
class Facts:
    """A fold of the journal: all that guards may know about the past."""

    ending: Ending | None = None
    failure: Failure | None = None
    ended_by: str = ""
    link: Link = "none"
    connects: int = 0
    verifies: int = 0
    assigned: int = 0
    prompted: int = 0
    repeated: int = 0
    steps: int = 0
    tool_calls: int = 0
    usage: Usage = Usage()
    next: Next | None = None
    reward: float | None = None
    role: str = ""
    """Whose the last turn or connection is."""
    ledger: tuple[Share, ...] = ()
    """Who spent what, by role and turn: one share for each turn, and one for what a role spent outside its turns."""

    @property
    def worked(self) -> Usage:
        """What was used in turns: by agents, not by whoever decides the turns."""
        return sum((share.usage for share in self.ledger if share.turn), Usage())

    @property
    def active(self) -> bool:
        """Whether anything was seen of an agent's work: tokens or tool calls."""
        return bool(self.tool_calls or self.worked.tokens)


# --- guards --------------------------------------------------------------------------------------------------

Guard = Callable[[Facts, Event, Rules], bool]


def may_connect(facts: Facts, _event: Event, rules: Rules) -> bool:
    """Connects since the last captured turn: failures, losses and empty swaps share one limit."""
    return facts.connects < rules.max_connects


def can_freeze(_facts: Facts, _event: Event, rules: Rules) -> bool:
    """The sandbox can stop an agent's processes while a check runs."""
    return rules.can_freeze


def is_over(facts: Facts, _event: Event, _rules: Rules) -> bool:
    """No further turn may start in this session."""
    return facts.ending is not None or facts.link == "gone"


def over_acp(facts: Facts, _event: Event, _rules: Rules) -> bool:
    """The session that is kept is an ACP one."""
    return facts.link == "acp"


def is_detached(facts: Facts, _event: Event, _rules: Rules) -> bool:
    """No agent is connected."""
    return facts.link == "none"


def is_ending(facts: Facts, _event: Event, _rules: Rules) -> bool:
    """An ending is set: no verification and no further role."""
    return facts.ending is not None


def is_silent(facts: Facts, _event: Event, rules: Rules) -> bool:
    """A prompt was sent, every call would have been seen, and nothing was done (or metered, where that is required)."""
    if not facts.prompted:
        return False
    return (rules.metered and not facts.active) or (rules.usage_required and not facts.worked.calls)


def has_verifier(_facts: Facts, _event: Event, rules: Rules) -> bool:
    """We verify; otherwise the host does."""
    return rules.has_verifier


def may_reverify(facts: Facts, _event: Event, rules: Rules) -> bool:
    """The verifier may run once more. The failed run is counted after the guard, hence the + 1."""
    return facts.verifies + 1 < rules.max_verifies


def is_rewarded(facts: Facts, _event: Event, _rules: Rules) -> bool:
    """The ending is `rewarded`."""
    return facts.ending == "rewarded"


def is_unverified(facts: Facts, _event: Event, _rules: Rules) -> bool:
    """The ending is `unverified`."""
    return facts.ending == "unverified"


def is_void(facts: Facts, _event: Event, _rules: Rules) -> bool:
    """The ending is `void`."""
    return facts.ending == "void"


def is_cancelled(facts: Facts, _event: Event, _rules: Rules) -> bool:
    """The ending is `cancelled`."""
    return facts.ending == "cancelled"


# --- the table -----------------------------------------------------------------------------------------------


@attrs.frozen
class Row:
    """One line of the table. `sources` share it; `to=None` stays."""

    event: type[Event]
    sources: tuple[str, ...]
    to: str | None
    guard: Guard | None = None
    ending: Ending | None = None


def _row(
    event: type[Event],
    sources: str | tuple[str, ...],
    to: str | None,
    guard: Guard | None = None,
    *,
    ending: Ending | None = None,
) -> Row:
    return Row(event, (sources,) if isinstance(sources, str) else sources, to, guard, ending)


TABLE: tuple[Row, ...] = (
    # Coming up. The lease is journaled on entry, so every way out of provisioning leads through releasing.
    _row(ev.Provisioned, "provisioning", "disconnected"),
    _row(ev.RoleAssigned, "disconnected", "connecting", may_connect),
    _row(ev.RoleAssigned, "disconnected", "releasing", ending="failed"),
    _row(ev.AcpOpened, "connecting", "session/acp"),
    _row(ev.FactoryOpened, "connecting", "session/factory"),
    # A half-spawned agent is an agent: never straight back to connecting.
    _row(ev.ConnectFailed, "connecting", "quiescing"),
    # Between turns. Prompted is the only edge into executing.
    _row(ev.Prompted, SESSION, "executing"),
    _row(ev.RoleSwapped, SESSION, "quiescing"),
    _row(ev.PlanDone, SESSION, "quiescing"),
    _row(ev.CheckAsked, SESSION, "checking", can_freeze),
    _row(ev.CheckAsked, SESSION, "quiescing"),
    _row(ev.CheckAsked, "disconnected", "checking"),
    _row(ev.Paused, (*SESSION, "disconnected"), "paused"),
    _row(ev.Resumed, "paused", "disconnected", is_detached),
    _row(ev.Resumed, "paused", "session/acp", over_acp),
    _row(ev.Resumed, "paused", "session/factory"),
    _row(ev.Checked, "checking", "disconnected", is_detached),
    _row(ev.Checked, "checking", "session/acp", over_acp),
    _row(ev.Checked, "checking", "session/factory"),
    # Ways out of a turn.
    _row(ev.TurnEnded, "executing", "capturing/whole"),
    _row(ev.TurnFailed, "executing", "capturing/partial"),
    _row(ev.DeadlinePassed, "executing", "cancelling"),
    _row(ev.IdlePassed, "executing", "cancelling"),
    _row(ev.BudgetSpent, "executing", "cancelling"),
    _row(ev.Interrupted, "executing", "cancelling"),
    # Our own handler crashed; the agent still runs, so it is cancelled politely.
    _row(ev.Failed, "executing", "cancelling", ending="failed"),
    _row(ev.Settled, "cancelling", "capturing/whole"),
    _row(ev.Unresponsive, "cancelling", "capturing/partial"),
    _row(ev.Lost, ("executing", "cancelling"), "capturing/partial"),
    _row(ev.Lost, (*SESSION, "paused"), "quiescing"),
    # The one capture of a turn; from here the session lives on, or ends.
    _row(ev.Captured, CAPTURING, "quiescing", is_over),
    _row(ev.Captured, CAPTURING, "session/acp", over_acp),
    _row(ev.Captured, CAPTURING, "session/factory"),
    # Going down. Quiet is the only way back to disconnected, so disconnected implies "no agent is alive".
    _row(ev.Quiet, "quiescing", "releasing", is_ending),
    _row(ev.Quiet, "quiescing", "disconnected"),
    _row(ev.Unquiet, "quiescing", "releasing", ending="failed"),
    _row(ev.PlanDone, "disconnected", "releasing", is_silent, ending="void"),
    _row(ev.PlanDone, "disconnected", "verifying", has_verifier),
    _row(ev.PlanDone, "disconnected", "releasing", ending="unverified"),
    _row(ev.Failed, "disconnected", "releasing", ending="failed"),
    _row(ev.Failed, (*SESSION, "paused"), "quiescing", ending="failed"),
    _row(ev.Verified, "verifying", "releasing", ending="rewarded"),
    _row(ev.VerifierFailed, "verifying", "verifying", may_reverify),
    _row(ev.VerifierFailed, "verifying", "releasing", ending="failed"),
    # From outside: the sandbox is gone.
    _row(ev.SandboxFailed, ("provisioning", "disconnected", "verifying"), "releasing", ending="failed"),
    _row(ev.SandboxFailed, ("connecting", *SESSION, "checking", "paused"), "quiescing", ending="failed"),
    _row(ev.SandboxFailed, ("executing", "cancelling"), "capturing/partial", ending="failed"),
    _row(ev.SandboxFailed, (*CAPTURING, "quiescing"), None, ending="failed"),
    _row(ev.SandboxFailed, "releasing", None),
    # From outside: nobody wants the rollout any more. A second cancel changes nothing.
    _row(ev.Cancelled, ("provisioning", "disconnected", "verifying"), "releasing", ending="cancelled"),
    _row(ev.Cancelled, ("connecting", *SESSION, "checking", "paused"), "quiescing", ending="cancelled"),
    _row(ev.Cancelled, "executing", "cancelling", ending="cancelled"),
    _row(ev.Cancelled, ("cancelling", *CAPTURING, "quiescing"), None, ending="cancelled"),
    _row(ev.Cancelled, "releasing", None),
    # From outside: a new process took over after kill -9.
    _row(ev.Recovered, ("connecting", *SESSION, "checking", "paused"), "quiescing"),
    _row(ev.Recovered, ("executing", "cancelling"), "capturing/partial"),
    _row(ev.Recovered, ("provisioning", "disconnected", *CAPTURING, "quiescing", "verifying", "releasing"), None),
    # The end. Only Released leads to closed; the leaf is the ending.
    _row(ev.Released, "releasing", "closed/rewarded", is_rewarded),
    _row(ev.Released, "releasing", "closed/unverified", is_unverified),
    _row(ev.Released, "releasing", "closed/void", is_void),
    _row(ev.Released, "releasing", "closed/cancelled", is_cancelled),
    _row(ev.Released, "releasing", "closed/failed"),
)

EVENTS: Mapping[str, type[Event]] = types.MappingProxyType({row.event.__name__: row.event for row in TABLE})

# --- the fold ------------------------------------------------------------------------------------------------

_ENDED_BY: Mapping[type[Event], str] = types.MappingProxyType(
    {
        ev.TurnFailed: "error",
        ev.DeadlinePassed: "deadline",
        ev.IdlePassed: "idle",
        ev.Interrupted: "interrupted",
        ev.Failed: "failed",
        ev.Lost: "lost",
        ev.SandboxFailed: "sandbox",
        ev.Cancelled: "cancelled",
        ev.Recovered: "killed",
    }
)
_TURN = ("executing", "cancelling", *CAPTURING)


def _ended_by(facts: Facts, event: Event, source: str) -> str:
    """The word for what ended the last turn: set by the first event that ends it, and by nothing after it."""
    if facts.ended_by or source not in _TURN:
        return facts.ended_by
    match event:
        case ev.TurnEnded(stop=stop):
            return stop
        case ev.BudgetSpent(kind=kind):
            return f"budget:{kind}"
        case _:
            return _ENDED_BY.get(type(event), "")


def _decided(kind: Literal["done", "check"]) -> Callable[[Facts, Any, Row, Rules], dict[str, Any]]:
    """On the way through quiescing a decision is kept, so that nobody asks the plan twice."""

    def kept(_facts: Facts, event: Any, row: Row, _rules: Rules) -> dict[str, Any]:
        return {"next": Next(kind, why=getattr(event, "why", "")) if row.to == "quiescing" else None}

    return kept


def _still_due(decision: Next | None) -> Next | None:
    """What is to be done when a pause is over: not that pause again."""
    return None if decision is None or decision.kind == "pause" else decision


def _taken_over(facts: Facts, event: Any, _row: Row, _rules: Rules) -> dict[str, Any]:
    """No session outlives its process; a turn that is asked again comes before whatever was decided after it."""
    gone = {} if facts.link == "none" else {"link": "gone"}
    return gone if event.again is None else {**gone, "next": event.again, "repeated": facts.repeated + 1}


def _counted(facts: Facts, event: Any, *more: Share) -> dict[str, Any]:
    """Usage that an event brings, in the account of who used it; without shares all of it is the last turn's."""
    shares = event.shares or ((Share(facts.role, facts.prompted, event.usage),) if event.usage != Usage() else ())
    ledger = facts.ledger
    for share in (*shares, *more):
        ledger = _entered(ledger, share)
    return {"usage": facts.usage + event.usage, "ledger": ledger}


def _entered(ledger: tuple[Share, ...], share: Share) -> tuple[Share, ...]:
    """The ledger with this share added to the one of the same role and turn. Newer ones are the likelier."""
    for at in range(len(ledger) - 1, -1, -1):
        if (ledger[at].role, ledger[at].turn) == (share.role, share.turn):
            return (*ledger[:at], ledger[at] + share, *ledger[at + 1 :])
    return (*ledger, share)


def _captured(facts: Facts, event: Any, _row: Row, _rules: Rules) -> dict[str, Any]:
    turn = Share(facts.role, facts.prompted, tool_calls=event.tool_calls, seconds=event.seconds)
    return {
        "connects": 0,
        "steps": facts.steps + event.steps,
        "tool_calls": facts.tool_calls + event.tool_calls,
        **_counted(facts, event, turn),
    }


_CHANGES: Mapping[type[Event], Callable[[Facts, Any, Row, Rules], dict[str, Any]]] = types.MappingProxyType(
    {
        ev.RoleAssigned: lambda facts, event, _row, _rules: {
            "connects": facts.connects + 1,
            "assigned": facts.assigned + 1,
            "next": event.next,
            "role": event.role,
        },
        ev.AcpOpened: lambda *_: {"link": "acp"},
        ev.FactoryOpened: lambda *_: {"link": "factory"},
        ev.ConnectFailed: lambda _facts, event, _row, rules: (
            {} if event.retryable else {"connects": rules.max_connects}
        ),
        ev.Prompted: lambda facts, event, *_: {
            "prompted": facts.prompted + 1,
            "role": event.role,
            "ledger": _entered(facts.ledger, Share(event.role, facts.prompted + 1)),
            "next": None,
            "ended_by": "",
            "failure": None,
        },
        ev.RoleSwapped: lambda _facts, event, *_: {"next": event.next},
        ev.PlanDone: _decided("done"),
        ev.CheckAsked: _decided("check"),
        ev.Paused: lambda facts, event, *_: {"next": event.next or _still_due(facts.next)},
        ev.Lost: lambda *_: {"link": "gone"},
        ev.Unresponsive: lambda *_: {"link": "gone"},
        ev.Recovered: _taken_over,
        ev.Captured: _captured,
        ev.Quiet: lambda facts, event, *_: {"link": "none", **_counted(facts, event)},
        ev.Released: lambda facts, event, *_: _counted(facts, event),
        ev.VerifierFailed: lambda facts, *_: {"verifies": facts.verifies + 1},
        ev.Verified: lambda facts, event, *_: {"reward": event.reward, "failure": facts.failure},
    }
)
"""What each event changes; all others change nothing but what every event does (see `fold`)."""


def fold(facts: Facts, event: Event, row: Row, source: str, rules: Rules) -> Facts:
    """The facts after `event` took `row` out of `source`. Pure: the same on resume, without a world."""
    changes: dict[str, Any] = {"ended_by": _ended_by(facts, event, source)}
    if facts.ending is None:
        failure: Failure | None = getattr(event, "failure", None)
        changes |= {"ending": row.ending, "failure": failure or facts.failure}
    if change := _CHANGES.get(type(event)):
        changes |= change(facts, event, row, rules)
    return attrs.evolve(facts, **changes)


# --- firing --------------------------------------------------------------------------------------------------


@attrs.frozen
class Position:
    """Where a rollout stands: its state and the fold of its journal so far."""

    state: str = INITIAL
    facts: Facts = Facts()

    @property
    def closed(self) -> bool:
        """Whether the rollout is over: no event is legal here."""
        return self.state in CLOSED


@attrs.define(eq=False)
class _Cursor:
    """What the shared machine moves for the length of one `fire`."""

    state: str
    facts: Facts
    event: Event
    rules: Rules


class _State(transitions.State):
    """A state without callbacks of its own."""

    def enter(self, event_data: transitions.EventData) -> None:
        """Nothing; the library would log that."""

    def exit(self, event_data: transitions.EventData) -> None:
        """Nothing; the library would log that."""


class _Machine(transitions.Machine):
    """The library's machine, silent: moves are told by the journal, and whose program it is owns the logging."""

    state_cls = _State

    def callbacks(self, funcs: Iterable[Any], event_data: transitions.EventData) -> None:
        """Call them. The library would log each at INFO: thirty lines a rollout, where a program logs at that level."""
        for func in funcs:
            func(event_data)


def _build() -> transitions.Machine:
    machine = _Machine(
        model=None,
        states=list(STATES),
        initial=INITIAL,
        auto_transitions=False,
        send_event=True,
    )
    for row in TABLE:
        machine.add_transition(
            row.event.__name__,
            list(row.sources),
            row.to,
            conditions=[_condition(row.guard)] if row.guard else None,
            after=[_after(row)],
        )
    return machine


def _condition(guard: Guard) -> Callable[[transitions.EventData], bool]:
    def condition(data: transitions.EventData) -> bool:
        cursor = cast(_Cursor, data.model)
        return guard(cursor.facts, cursor.event, cursor.rules)

    return condition


def _after(row: Row) -> Callable[[transitions.EventData], None]:
    def after(data: transitions.EventData) -> None:
        cursor = cast(_Cursor, data.model)
        source = cast(transitions.Transition, data.transition).source
        cursor.facts = fold(cursor.facts, cursor.event, row, source, cursor.rules)

    return after


_MACHINE = _build()


def fire(position: Position, event: Event, rules: Rules) -> Position:
    """Where `event` leads from `position`.

    Raises `IllegalTransition`, naming the state and the event, when the table has no row for them; the
    position that you hold is unchanged, as it is a value.

    >>> fire(Position(), ev.Provisioned(), Rules()).state
    'disconnected'
    """
    trigger = _MACHINE.events.get(event.name)
    if trigger is None or EVENTS[event.name] is not type(event):
        raise IllegalTransition(position.state, event.name, "no such event")
    cursor = _Cursor(position.state, position.facts, event, rules)
    try:
        taken = trigger.trigger(cursor)
    except transitions.MachineError as error:
        raise IllegalTransition(position.state, event.name) from error
    if not taken:
        raise IllegalTransition(position.state, event.name, "every guard refused it")
    return Position(cursor.state, cursor.facts)


def legal(state: str) -> tuple[type[Event], ...]:
    """The events that `state` has rows for, in the order of the table."""
    return tuple(dict.fromkeys(row.event for row in TABLE if state in row.sources))


def rows(state: str, event: type[Event]) -> tuple[Row, ...]:
    """The rows that are tried, in order, when `event` is fired in `state`."""
    return tuple(row for row in TABLE if row.event is event and state in row.sources)


def stays(state: str, event: type[Event]) -> bool:
    """Whether `event` leaves the handler of `state` alone (an internal row), or is not known there at all."""
    return all(row.to is None for row in rows(state, event))
