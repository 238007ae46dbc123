"""Ports: how a state handler reaches the world, as Protocols, and the plain values that cross them.

A handler is `async def run(rollout, world) -> A | B`. `rollout` is what it may read (`Rollout` below), `world` is what
it may do (`World`). Whoever brings a sandbox, a verifier or a transport of their own implements one of these; nothing
has to be inherited. Seconds are floats, sizes are bytes, paths inside a sandbox are absolute POSIX strings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import attrs

from states.events import (
    AcpOpened,
    BudgetSpent,
    FactoryOpened,
    IdlePassed,
    Lost,
    Next,
    Settled,
    Share,
    TurnEnded,
    TurnFailed,
    Usage,
)
from states.machine import Facts, Rules

T = TypeVar("T")

StopReason = Literal["end_turn", "max_tokens", "max_turn_requests", "refusal", "cancelled"]
"""Why a turn ended; the Agent Client Protocol's own words."""

AskHandler = Callable[["AskUserRequest"], "Awaitable[str | None] | str | None"]
"""Answers a question of an agent with the id of one of its options (or free text, where there are none); None
declines."""

# --- values --------------------------------------------------------------------------------------------------


@attrs.frozen
class ExecResult:
    """What a command did. Output beyond the cap is cut in the middle and `truncated` says so."""

    stdout: str
    stderr: str
    return_code: int
    truncated: bool = False


@attrs.frozen
class AgentCapabilities:
    """What an agent says of itself."""

    protocol: str = "session-factory"
    nudges: bool = False
    ask_user: bool = False
    token_logprobs: bool = False


@attrs.frozen
class AskUserRequest:
    """A question of an agent: an elicitation, a permission request or an approval.

    `options` are ids, `option_kinds` their kinds in the same order (`allow_once`, `allow_always`, `reject_once`,
    `reject_always` for permissions; `choice` otherwise). No options: free text is wanted.
    """

    prompt: str
    options: tuple[str, ...] = ()
    option_kinds: tuple[str, ...] = ()
    request_id: str = ""
    kind: Literal["permission", "elicitation", "approval"] = "permission"


LeaseKind = Literal["sandbox", "agent", "director", "gateway-key", "process", "tests"]


@attrs.frozen
class Lease:
    """Something that we hold and must give back. `name` is chosen by us and journaled before it is taken."""

    kind: LeaseKind
    name: str
    handle: Mapping[str, Any] = attrs.field(factory=dict)


# --- the sandbox ---------------------------------------------------------------------------------------------


class ByteChannel(Protocol):
    """A process in a sandbox whose stdin and stdout are a raw, bidirectional stream of bytes.

    stderr never mixes with stdout: its last 64 KiB are kept for `stderr_tail`.
    """

    async def send(self, data: bytes) -> None:
        """Write all of `data`, waiting while the reader is slow. Raises `SandboxError` when stdin is closed."""

    async def receive(self, max_bytes: int = 262_144) -> bytes:
        """The next bytes of stdout, as soon as there are any; b"" at its end."""

    async def close_stdin(self) -> None:
        """Tell the process that nothing more will come. Idempotent."""

    async def wait(self) -> int:
        """Its exit code (negative: the signal that ended it), once it has ended."""

    async def kill(self) -> None:
        """End it now. Idempotent; what it started may live on until the handle is ended."""

    def stderr_tail(self) -> str:
        """The last 64 KiB of stderr, decoded with replacement."""


class SandboxHandle(Protocol):
    """One role's way into the sandbox, and the unit of ending: everything started through it dies with it.

    Nothing happens until `open`. `end` may be called on any handle at any time, also on one that never opened.
    """

    name: str

    async def open(self) -> None:
        """Make it usable. Raises `SandboxError`. Idempotent."""

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_sec: float | None = None,
    ) -> ExecResult:
        """Run a command to its end. A string goes through `/bin/sh -c`. Raises `ExecTimeout`, `SandboxError`."""

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> ByteChannel:
        """Start a process whose stdin and stdout we hold."""

    async def read_file(self, path: str) -> bytes:
        """The bytes of a file. Raises `SandboxError` naming the path when there is none."""

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file, making its folders."""

    async def end(self) -> tuple[str, ...]:
        """Kill everything started through this handle and prove it gone: the evidence, as sentences.

        Raises `QuietError` when it cannot be proven. Idempotent.
        """


class Sandbox(Protocol):
    """Where a rollout runs. One object is one sandbox; nothing exists until `start`.

    `name` is chosen when the object is made (so that it can be journaled first) and `cwd` is where tasks work.
    `gateway_url` is the model gateway's base URL as seen from inside, None where it cannot be reached.
    `has_environment`: it runs the task's own image, so nothing of the task's environment is to be brought in.
    """

    name: str
    cwd: str
    gateway_url: str | None
    has_environment: bool

    async def start(self) -> Mapping[str, Any]:
        """Bring it up. Returns what a reaper needs to find it again (JSON values). Raises `SandboxError`."""

    async def stop(self) -> None:
        """Give everything back. Idempotent, also on a sandbox that never started."""

    def handle(self, name: str, *, trusted: bool = False) -> SandboxHandle:
        """A handle that is not open yet.

        `trusted` ones are ours (task set-up, verifier): only they see `/tests`
        and `/logs/verifier`. An agent's handle has its own HOME and `/tmp` and shares `/app` with other roles.
        """

    async def upload(self, source: Path, target: str) -> None:
        """Copy a file, or a folder's content, in; modes are kept, links are not followed out of `source`."""

    async def download(self, source: str, target: Path) -> None:
        """Copy a file, or a folder's content, out.

        Links that lead out are not followed: `PathEscape`.
        A missing `source` is a `SandboxError` that names it.
        """


class ExecSandbox(Protocol):
    """A host's own sandbox, with the least that a rollout needs: what it lacks is made of this, inside it.

    `RolloutConfig(sandbox=...)` takes one as it is. Several `exec` may run at once, and it has Python 3.8 or newer as
    `python3`. Optional members: `name`, `cwd` (where tasks work, the task's own or `/app` by default), `gateway_url`
    (as in `Sandbox`; without it model calls come back by a relay), `has_environment` (False where the task's
    environment is to be brought in: a host has usually done that) and `stop()`. Whatever a member raises is the
    sandbox's failure.

    Example:
        >>> class Mine:
        ...     async def start(self): ...
        ...     async def exec(self, command, *, timeout_sec=None): ...
        ...     async def upload(self, source, target): ...
        ...     async def download(self, source, target): ...
    """

    async def start(self) -> Any:
        """Bring it up, where it is not. What it returns is not used."""

    async def exec(self, command: str, *, timeout_sec: float | None = None) -> Any:
        """Run a POSIX shell command to its end: an object with `stdout`, `stderr` (text or None) and `return_code`."""

    async def upload(self, source: Path, target: str) -> None:
        """Copy one file in."""

    async def download(self, source: str, target: Path) -> None:
        """Copy one file out."""


@runtime_checkable
class Keepable(Protocol):
    """A sandbox that can be kept, to be looked into once its rollout is closed."""

    async def leave(self) -> None:
        """End all that was started through any handle, and let its files be.

        Nothing sweeps it away then. This process holds nothing of it any more: `stop` does nothing. Idempotent.
        """


@runtime_checkable
class Attachable(Protocol):
    """A sandbox that outlives its orchestrator: what one may have beside `Sandbox`, so that rollouts can be resumed."""

    async def attach(self, handle: Mapping[str, Any]) -> tuple[str, ...]:
        """Instead of `start`: take over the sandbox for which a dead orchestrator's `start` returned `handle`.

        Its files are as they were. Whatever was started through any handle is ended first, and the proof of that is
        returned, as sentences. Raises `SandboxError` when it is gone, `QuietError` when something cannot be ended.
        """


@runtime_checkable
class Detachable(Protocol):
    """A sandbox with connections of ours: what one may have beside `Sandbox`, so that a stop leaves none open."""

    async def detach(self) -> None:
        """Let go of it as if our process had died; what it is made of stays, for who attaches to it, or a reaper.

        Idempotent, and nothing where it was not started or is stopped. It raises nothing.
        """


# --- agents --------------------------------------------------------------------------------------------------


@runtime_checkable
class Session(Protocol):
    """One live conversation with an agent. `close()` is optional and therefore outside the Protocol.

    `steps` is cumulative: dicts of `type` `user_message | agent_message | agent_thought` with `text`, or
    `tool_call` with `tool_call_id, kind, title, status, content`. `on_change` is assigned by the kernel after
    connect and called by the session after each change of `steps`.
    """

    on_change: Callable[[Any], None] | None

    async def prompt(self, text: str) -> str:
        """Send one prompt; returns its `StopReason` when the turn has ended."""

    async def cancel(self) -> None:
        """Ask the turn in flight to end; `prompt` then returns `cancelled`."""

    def on_ask_user(self, handler: AskHandler | None) -> None:
        """Bind who answers questions; None goes back to the permission policy."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Everything that happened so far."""


class Agent(Protocol):
    """What a session-factory builds."""

    async def connect(self, sandbox: Any, role: str) -> Session:
        """Open a session in `sandbox` for `role` (optionally with a keyword `agent_env`)."""

    def capabilities(self) -> AgentCapabilities:
        """What this agent can do."""


class Role(Protocol):
    """A role as handlers see it."""

    @property
    def name(self) -> str:
        """Its name in the scene."""


class Segment(Protocol):
    """One turn's part of the trajectory: written as it comes, sealed once. What comes later is marked late."""

    number: int

    def started(self, step: Mapping[str, Any]) -> int:
        """A new step; returns its index in this segment."""

    def grew(self, index: int, text: str) -> None:
        """The text of a message or thought grew by `text`."""

    def updated(self, index: int, fields: Mapping[str, Any]) -> None:
        """Fields of a step changed."""

    def compacted(self, why: str) -> None:
        """The session dropped steps of its own; nothing that was written here is lost."""

    @property
    def steps(self) -> int:
        """How many steps this segment holds."""

    @property
    def tool_calls(self) -> int:
        """How many of them are tool calls."""

    @property
    def seconds(self) -> float:
        """How long ago it was opened."""

    @property
    def sealed(self) -> Mapping[str, Any] | None:
        """What it was sealed with; None while it is open."""

    async def changed_since(self, seconds: float) -> None:
        """Return once nothing has been written for `seconds`, while no question waited for its answer."""

    def seal(self, *, complete: bool, usage: Usage) -> None:
        """Commit it. A second seal is an error of ours."""


class Inflight(Protocol):
    """A prompt on its way, in a task of its own: it outlives the handler that sent it, and may be abandoned."""

    def start(self) -> None:
        """Send it. Once."""

    async def outcome(self) -> TurnEnded | TurnFailed | Lost:
        """`TurnEnded`, `TurnFailed` or `Lost`, as soon as it is known. May be awaited again."""

    @property
    def sent(self) -> bool:
        """Whether it was started: a turn that ends before that is settled at once."""

    def abandon(self) -> None:
        """Cancel the task and never look at it again."""


@attrs.frozen
class Seat:
    """Data of `connecting`: which role, through which transport, in which sandbox handle."""

    role: Role
    transport: Transport
    handle: SandboxHandle


@attrs.frozen
class Connection:
    """Data of the states with a live agent. Made anew by each connect, so cursors start at zero by construction."""

    seat: Seat
    session: Any


@attrs.frozen
class OpenTurn:
    """Data of `executing`, `cancelling` and `capturing`: the prompt that is in flight and where it is written.

    `budgets` are the limits of this turn alone, by kind.
    """

    connection: Connection
    segment: Segment
    inflight: Inflight
    budgets: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen
class Vacant:
    """Data of every other state: nobody is connected."""


Stage = Vacant | Seat | Connection | OpenTurn


class Transport(Protocol):
    """How a session is opened and driven: one method a state, named after it. Both transports read side by side."""

    name: Literal["acp", "session-factory"]

    async def connecting(self, seat: Seat) -> AcpOpened | FactoryOpened:
        """Open a session: `AcpOpened` or `FactoryOpened`, the session in `live`. Raises `ConnectError`."""

    def prepare(self, connection: Connection, segment: Segment, text: str) -> Inflight:
        """A prompt that is ready to be sent; its steps will go to `segment`."""

    async def executing(self, turn: OpenTurn) -> TurnEnded | TurnFailed | Lost:
        """Drive the turn to its end: `TurnEnded`, `TurnFailed` or `Lost`."""

    async def cancelling(self, turn: OpenTurn) -> Settled | Lost:
        """Ask the turn to end and wait for its answer, without bound (the state has a deadline): `Settled`, `Lost`."""

    async def capturing(self, turn: OpenTurn) -> None:
        """Read what is still missing of the turn's steps into its segment."""

    async def quiescing(self, connection: Connection) -> tuple[str, ...]:
        """Close the session, bounded, and return the evidence. The handle is ended by the state, after this."""

    def watches(self, connection: Connection) -> Sequence[Callable[[], Awaitable[Lost]]]:
        """Waits that end when the agent goes away between turns; none where it cannot go away by itself."""


# --- the rest of the world -----------------------------------------------------------------------------------


class Plan(Protocol):
    """Who decides what happens next: a list of turns, or a director."""

    async def next(self, facts: Facts) -> Next:
        """The next turn, a check, a pause or the end. Asked once per decision."""


class Meter(Protocol):
    """One rollout's view of the model gateway."""

    def usage(self) -> Usage:
        """What was used so far; only grows."""

    def shares(self) -> Sequence[Share]:
        """The same by role and turn: whose key a call came with, and the turn of that role in which it began."""

    async def settle(self) -> Usage:
        """The same, after every call in flight has been counted."""

    @property
    def error(self) -> Exception | None:
        """What went wrong on our own side of the gateway, so that calls failed or were not recorded."""

    def provider_failure(self) -> str | None:
        """The last thing the provider said when it failed and nothing succeeded since; None otherwise."""


class Verifier(Protocol):
    """Gives the reward."""

    async def verify(self) -> Mapping[str, float]:
        """Run on a dead scene; `reward` is the reward, other names are details. Raises `VerifierError`.

        May be called again: each run starts by ending the one before it and emptying its folder.
        """

    async def check(self) -> Mapping[str, float]:
        """The same, as feedback in the middle of a rollout."""


class Leases(Protocol):
    """What we hold, journaled. A lease is intended before it is taken and open until it is returned."""

    def intend(self, kind: str, name: str) -> None:
        """We are about to take it."""

    def hold(self, kind: str, name: str, handle: Mapping[str, Any]) -> None:
        """We have it; `handle` finds it again."""

    def returned(self, kind: str, name: str) -> None:
        """It was given back."""

    def open(self, kind: str | None = None) -> tuple[Lease, ...]:
        """What is not returned yet, oldest first."""

    async def give_back(self, lease: Lease) -> tuple[str, ...]:
        """Give it back, whatever its kind, also when it was only intended, and journal that.

        Returns the evidence;
        raises what went wrong, and then the lease stays open.
        """


class Rollout(Protocol):
    """What a handler may read of its rollout."""

    @property
    def id(self) -> str:
        """Its id, unique among rollouts."""

    @property
    def state(self) -> str:
        """The state that runs."""

    @property
    def facts(self) -> Facts:
        """The fold of its journal."""

    @property
    def stage(self) -> Stage:
        """The data of the state that runs."""


class World(Protocol):
    """What a handler may do."""

    rules: Rules
    plan: Plan
    meter: Meter
    verifier: Verifier
    leases: Leases

    @property
    def sandbox(self) -> Sandbox:
        """Where it runs; made when `prepare` is done."""

    def held(self) -> str | None:
        """Who holds the rollout before its next turn; None while nobody does."""

    def pause(self, by: str) -> None:
        """Hold the plan before its next turn; the plan itself may ask for that."""

    @property
    def leaving(self) -> bool:
        """Whether the rollout is to stop being driven at the next `disconnected`: no session is kept."""

    async def prepare(self) -> None:
        """What a sandbox is made with: every role's agent installed, this rollout's key at the model gateway."""

    async def install(self) -> None:
        """Bring the task's files into the sandbox, which is up."""

    def seat(self, role: str, number: int) -> Seat:
        """A place for the `number`th connection of this rollout. Nothing is started."""

    def segment(self, connection: Connection, number: int, decision: Next) -> Segment:
        """Segment `number` of the trajectory, opened with its prompt. Usage counts for this turn from here on."""

    def recovered_segment(self, number: int) -> Segment:
        """The same segment, read back from disk by a new process."""

    def budget(self, turn: OpenTurn, facts: Facts) -> Sequence[Callable[[], Awaitable[BudgetSpent | IdlePassed]]]:
        """What to wait for, of the budgets that hold for this turn; it returns the event when one is gone.

        Wall clock is not among them: it is the state's own deadline.
        """

    def spent(self, facts: Facts, role: str = "") -> str:
        """Why no further turn may start, or none of this role: which budget is spent. Empty while it may."""

    async def first(self, *waits: Callable[[], Awaitable[T]]) -> T:
        """The result of the first wait to finish; the others are cancelled, the earliest listed wins a tie."""
        ...

    async def resumed(self) -> str:
        """Wait until the operator lets a paused rollout go on; who it was."""

    def keeps(self, lease: Lease, facts: Facts) -> bool:
        """Whether the user wants to keep this one, as it ended so."""

    async def keep(self, lease: Lease) -> None:
        """Let go of what is kept, as it is."""

    async def collect(self) -> None:
        """Bring home what is worth keeping (logs), before the sandbox goes."""

    def note(self, text: str) -> None:
        """Something worth knowing that moves nothing: a line in the journal."""
