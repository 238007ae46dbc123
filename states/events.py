"""Events: what happened, as frozen facts in the past tense, with the data that the journal keeps.

Nothing here acts. A handler returns one of these; the kernel journals it and asks the table where it leads.
`live` is the one field that is never journaled: it hands a live value (a session, an open turn) to the next
state. After `kill -9` it is gone, which is why `Recovered` only leads to states that do not need it.

Usage names are those of the OpenTelemetry GenAI conventions (`gen_ai.usage.input_tokens`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import attrs

from states.errors import AgentLost, ConfigError, ConnectError, OrchestratorError, Owner, said

Ending = Literal["rewarded", "unverified", "void", "failed", "cancelled"]
"""How a rollout ends: the leaf of `closed` that it will reach."""

Scope = Literal["turn", "role", "scene", "rollout"]
"""What a limit, a deadline or an interruption applies to."""


class _Absent:
    """Nothing was handed over."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Any = _Absent()


@attrs.frozen
class Usage:
    """What model calls used. Sums only grow; `cost` is US dollars, None when any price is unknown.

    `input_tokens` includes cached ones. Add and subtract to get the usage of a span:

    >>> (Usage(calls=2, input_tokens=30) - Usage(calls=1, input_tokens=10)).input_tokens
    20
    """

    calls: int = 0
    failed_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cost: float | None = 0.0

    def __add__(self, other: Usage) -> Usage:
        return self._with(other, 1)

    def __sub__(self, other: Usage) -> Usage:
        return self._with(other, -1)

    def _with(self, other: Usage, sign: int) -> Usage:
        cost = None if self.cost is None or other.cost is None else round(self.cost + sign * other.cost, 12)
        return Usage(
            self.calls + sign * other.calls,
            self.failed_calls + sign * other.failed_calls,
            self.input_tokens + sign * other.input_tokens,
            self.output_tokens + sign * other.output_tokens,
            self.cache_read_input_tokens + sign * other.cache_read_input_tokens,
            self.cache_creation_input_tokens + sign * other.cache_creation_input_tokens,
            cost,
        )

    @property
    def tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens


@attrs.frozen
class Share:
    """What one role spent in one of its turns; `turn` 0 is outside its turns: connecting, or deciding the next one.

    `seconds` are those of the turn, from its prompt to its seal. Shares of one role and turn add up:

    >>> (Share("coder", 1, Usage(calls=1)) + Share("coder", 1, tool_calls=2)).tool_calls
    2
    """

    role: str
    turn: int
    usage: Usage = Usage()
    tool_calls: int = 0
    seconds: float = 0.0

    def __add__(self, other: Share) -> Share:
        return attrs.evolve(
            self,
            usage=self.usage + other.usage,
            tool_calls=self.tool_calls + other.tool_calls,
            seconds=round(self.seconds + other.seconds, 6),
        )


@attrs.frozen
class Failure:
    """An error as data: who owns it, what kind it is, what it said, and the agent's last words."""

    owner: Owner
    error: str
    message: str
    stderr: str = ""
    retryable: bool = True

    @classmethod
    def of(cls, error: BaseException, owner: Owner | None = None) -> Failure:
        """Read a failure off an exception; a foreign one is the harness's own fault."""
        ours = isinstance(error, OrchestratorError)
        return cls(
            owner=owner or (error.owner if ours else "harness"),  # type: ignore[attr-defined]
            error=type(error).__name__,
            message=said(error),
            stderr=error.stderr if isinstance(error, ConnectError | AgentLost) else "",
            retryable=error.retryable if isinstance(error, ConnectError) else not isinstance(error, ConfigError),
        )


@attrs.frozen
class Next:
    """What the plan decided: a turn for a role, a soft check, a pause, or the end.

    Consecutive turns of one role share its session. `budgets` are this turn's own limits, by kind.
    """

    kind: Literal["turn", "check", "pause", "done"] = attrs.field(
        validator=attrs.validators.in_(("turn", "check", "pause", "done"))
    )
    role: str = ""
    text: str = ""
    why: str = ""
    budgets: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen
class Event:
    """Base of all events. `name` is the word the table and the journal use."""

    @property
    def name(self) -> str:
        """The event's name in the table."""
        return type(self).__name__

    def data(self) -> dict[str, Any]:
        """What the journal keeps: every field but live ones."""
        return attrs.asdict(self, filter=lambda a, _: "live" not in a.metadata)

    def without_live(self) -> Self:
        """The same for whoever keeps it: a live value is for the next state alone."""
        return self


@attrs.frozen
class Handover(Event):
    """Base of the events that hand a live value to the next state."""

    live: Any = attrs.field(default=ABSENT, eq=False, repr=False, kw_only=True, metadata={"live": True})

    def without_live(self) -> Self:
        """See `Event.without_live`."""
        return attrs.evolve(self, live=ABSENT)


# --- coming up -----------------------------------------------------------------------------------------------


@attrs.frozen
class Provisioned(Event):
    """The sandbox is up, the task's files are in it, the agents are installed, the gateway has a key for us."""

    sandbox: str = ""


@attrs.frozen
class RoleAssigned(Handover):
    """The plan gave the next turn to this role; an agent is to be connected."""

    role: str
    next: Next


@attrs.frozen
class AcpOpened(Handover):
    """An agent answered the ACP handshake and opened a session."""

    session_id: str
    agent: str = ""


@attrs.frozen
class FactoryOpened(Handover):
    """A session-factory's `connect` returned a Session."""

    session_id: str
    agent: str = ""


@attrs.frozen
class ConnectFailed(Event):
    """No session came up. Something may be half spawned, so the way on leads through quiescing."""

    failure: Failure

    @property
    def retryable(self) -> bool:
        """Whether a second try may help."""
        return self.failure.retryable


# --- between turns -------------------------------------------------------------------------------------------


@attrs.frozen
class Prompted(Handover):
    """A prompt is about to be sent: the turn is open."""

    turn: int
    role: str
    text: str
    budgets: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen
class RoleSwapped(Event):
    """The next turn belongs to another role (or the same one with other settings)."""

    next: Next


@attrs.frozen
class PlanDone(Event):
    """The plan holds no further turn. `failure` is the provider's, where nothing was done for that."""

    why: str = ""
    failure: Failure | None = None


@attrs.frozen
class CheckAsked(Event):
    """The plan asks for a soft verification: feedback, never a reward."""


@attrs.frozen
class Checked(Event):
    """The soft verification is over; `feedback` is None when it failed or hung."""

    feedback: Mapping[str, float] | None = None
    failure: Failure | None = None


@attrs.frozen
class Paused(Event):
    """Somebody holds the plan between turns. What it had decided meanwhile is kept, so that nobody asks it twice."""

    by: str = "operator"
    next: Next | None = None


@attrs.frozen
class Resumed(Event):
    """The operator lets the plan go on."""

    by: str = "operator"


# --- a turn and its ways out ---------------------------------------------------------------------------------


@attrs.frozen
class TurnEnded(Event):
    """The prompt was answered. The stop reason is data: a refusal ends a turn like any other."""

    stop: str
    steps: int = 0


@attrs.frozen
class TurnFailed(Event):
    """The prompt was answered with an error, or `prompt()` raised. The session may live."""

    failure: Failure


@attrs.frozen
class DeadlinePassed(Event):
    """The turn outlasted a wall-clock limit: its own, or what was left of its role's, its scene's, its rollout's."""

    seconds: float
    scope: Scope = "turn"


@attrs.frozen
class IdlePassed(Event):
    """Nothing was heard of the agent for the idle limit."""

    seconds: float
    scope: Scope = "turn"


@attrs.frozen
class BudgetSpent(Event):
    """A budget of tokens, cost or tool calls is spent; `spent` may overshoot `limit` by one call's input."""

    scope: Scope
    kind: str
    limit: float
    spent: float


@attrs.frozen
class Interrupted(Event):
    """Somebody wants the turn, not the rollout, cancelled."""

    by: str = "operator"
    scope: Scope = "turn"


@attrs.frozen
class Failed(Event):
    """Our own handler crashed, or the plan gave up."""

    failure: Failure


@attrs.frozen
class Settled(Event):
    """The cancelled turn answered: its steps are complete, the session may take another prompt."""

    stop: str
    steps: int = 0


@attrs.frozen
class Unresponsive(Event):
    """The cancelled turn did not answer in time; the session is unusable from here."""

    seconds: float = 0.0
    failure: Failure | None = None


@attrs.frozen
class Lost(Event):
    """The agent is gone."""

    failure: Failure
    exit_code: int | None = None


@attrs.frozen
class Captured(Event):
    """The turn's segment is sealed: what it holds, once and for all.

    `usage` is all that was counted since the journal last said so. `shares` splits it by role and turn, where it is not
    all of this turn.
    """

    segment: int = 0
    steps: int = 0
    tool_calls: int = 0
    usage: Usage = Usage()
    complete: bool = True
    truncated: bool = False
    shares: tuple[Share, ...] = ()
    seconds: float = 0.0


# --- going down ----------------------------------------------------------------------------------------------


@attrs.frozen
class Quiet(Event):
    """No process of an agent is alive and no handle is open, and this is how we know."""

    evidence: tuple[str, ...] = ()
    usage: Usage = Usage()
    """Usage that arrived after the last seal: flushed last, counted here."""
    shares: tuple[Share, ...] = ()
    """The same by role and turn, where it is not all of the last turn."""


@attrs.frozen
class Unquiet(Event):
    """It could not be proven that the agent is dead."""

    failure: Failure


@attrs.frozen
class Verified(Event):
    """The verifier ran on a dead scene and left this reward."""

    reward: float
    rewards: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen
class VerifierFailed(Event):
    """The verifier left nothing that can be trusted as a reward."""

    failure: Failure


@attrs.frozen
class SandboxFailed(Event):
    """The sandbox never came up, or is gone."""

    failure: Failure


@attrs.frozen
class Cancelled(Event):
    """The rollout is not wanted any more. `by`: code, host, operator, terminal, or a signal's name."""

    by: str = "code"
    why: str = ""


@attrs.frozen
class Recovered(Event):
    """A new process, `owner`, took the rollout over from its journal: host, pid, and when that process started.

    `again` is a turn that the dead one cut off, and that is to be asked once more; None: it counts as taken.
    """

    incarnation: int
    owner: Mapping[str, Any] = attrs.field(factory=dict)
    again: Next | None = None


@attrs.frozen
class Released(Event):
    """Everything that was held was given back; what was not stays open in the journal.

    `kept` was to be kept by the user's own wish, `leaked` could not be given back.
    """

    given_back: tuple[str, ...] = ()
    leaked: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    usage: Usage = Usage()
    """Usage that arrived after the last agent was gone: of whoever decides the turns."""
    shares: tuple[Share, ...] = ()


OUTSIDE: tuple[type[Event], ...] = (Cancelled, SandboxFailed, Recovered, Interrupted)
"""Events that come from outside a handler: they stand in the table, not in a handler's annotation."""
