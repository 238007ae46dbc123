"""An agent as the director: it is told what was said, and its answer is the next turn.

    RolloutConfig(scene=scene, director="lead")                  # a role of the scene that takes no turns
    RolloutConfig(..., director=model_user("openai/gpt-5-mini", persona="You are in a hurry."))

The director is a session-factory agent. It is connected when it is first asked, with a sandbox handle that opens
nothing; it works only between turns, within the deadline of the state that asks it (300 s); its session is closed
before anything is verified, and on every other way out. What it was told and said is `director.jsonl`, in the form of
the trajectory, a segment a question; what it decided is in the journal. Its model calls have its own role's key.

What it is told is text: its brief, the task and the scene's roles when its session is new, then for each turn since it
was asked last what was said in it, how it ended where that was not by its answer, and what a check found. At the end
stands what may be answered. Its last message is the answer:

    any other text       the prompt of the next turn of the role that works, or of several the one that spoke last
    TO reviewer:         a first line: the role of the next turn; the rest is its prompt (nothing: the task)
    CHECK                alone: a soft verification, where it may ask for one
    DONE                 a last line, `DONE: why` as well: the end; what stands above it is sent to nobody

While the scene's own turns last, an answer is added to the next one's prompt and `DONE` adds nothing. An answer that
cannot be followed is answered once with what is wrong; the second one is a `DirectorError`, owned by the harness.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import anyio
import attrs

from orchestrator.agents.factories.common import shortened
from orchestrator.capture import TurnSegment
from orchestrator.config import DirectorRole, Turn
from orchestrator.directors import CHECK, Story, TurnTaken
from orchestrator.plans import went_on
from states.errors import (
    ConfigError,
    ConnectError,
    DirectorError,
    HandleRevoked,
    JournalError,
    OrchestratorError,
    ProviderError,
)
from states.events import Failure, Lost, Next, TurnEnded, TurnFailed, Usage
from states.ports import ByteChannel, Connection, ExecResult, Leases, OpenTurn, Seat

Decision = Turn | Next

# --- what it answers -----------------------------------------------------------------------------------------

_TO = re.compile(r"[*_`]*TO\s+(?P<role>[A-Za-z0-9][\w.-]*)[*_`]*\s*:[*_`]*\s*(?P<rest>.*)")
_DONE = re.compile(r"[*_`]*DONE[*_`]*[.!]?(?::\s*(?P<why>.+?))?[*_`]*")
_CHECK = re.compile(r"[*_`]*CHECK[*_`]*[.!]?")


class Unclear(Exception):
    """An answer that cannot be followed; says why, to whoever gave it."""


def read_answer(answer: str, roles: Sequence[str], last: str | None = None, *, checks: bool = False) -> Decision:
    r"""A director's answer as its decision; `last` is the role that spoke last. Raises `Unclear`.

    >>> read_answer("Please review it.", ["reviewer"])
    Turn(role='reviewer', prompt='Please review it.', budgets=Budgets())
    >>> read_answer("TO coder:\nMend it.", ["coder", "reviewer"])
    Turn(role='coder', prompt='Mend it.', budgets=Budgets())
    >>> read_answer("Thank you.\nDONE", ["coder"]).why
    'Thank you.'
    """
    lines = answer.strip().splitlines()
    if not lines:
        raise Unclear("your answer was empty")
    if done := _DONE.fullmatch(lines[-1].strip()):
        return Next("done", why="\n".join([*lines[:-1], done["why"] or ""]).strip())
    if any(_CHECK.fullmatch(line.strip()) for line in (lines[0], lines[-1])):
        if not checks or len(lines) > 1:
            raise Unclear("CHECK has to stand alone" if checks else "CHECK cannot be asked for")
        return CHECK
    addressed = _TO.fullmatch(lines[0].strip())
    if addressed is None:
        whom = roles[0] if len(roles) == 1 else last
        if whom is None:
            raise Unclear(f'it is not clear whom you mean: begin with a line "TO {roles[0]}:"')
        return Turn(whom, answer.strip())
    if addressed["role"] not in roles:
        raise Unclear(f"nobody is called {addressed['role']}; there is {', '.join(roles)}")
    return Turn(addressed["role"], "\n".join([addressed["rest"], *lines[1:]]).strip() or None)


def read_addition(answer: str) -> str:
    """What an answer adds to a turn that is written already; nothing for `DONE`. Raises `Unclear`."""
    if not answer.strip():
        raise Unclear("your answer was empty")
    lines = answer.strip().splitlines()
    return "" if _DONE.fullmatch(lines[-1].strip()) else answer.strip()


# --- what it is told -----------------------------------------------------------------------------------------


def introduction(brief: str, roles: Sequence[str], instruction: str) -> str:
    """What a session is told before anything else."""
    parts = [brief.strip()] if brief.strip() else []
    parts.append(f"You say what comes next in a scene. {_listed(roles)} at work on this task:")
    return "\n\n".join([*parts, instruction.strip() or "(no task was written down)"])


def what_happened(turns: Sequence[TurnTaken], own: str) -> str:
    """Turns as a director is told of them. A prompt that is its `own` last answer is not told again."""
    return "\n\n".join(part for turn in turns for part in _told(turn, own))


def _told(turn: TurnTaken, own: str) -> list[str]:
    parts = [] if turn.prompt == own else [f"{turn.role} was asked:\n{shortened(turn.prompt)}"]
    calls = sum(step.get("type") == "tool_call" for step in turn.steps)
    said = shortened(turn.said.strip()) or f"(no words; {calls} tool calls)"
    how = "" if turn.ended_by in ("", "end_turn") else f" (the turn ended by {turn.ended_by})"
    return [*parts, f"{turn.role} said{how}:\n{said}"]


def what_was_found(feedback: Mapping[str, float] | None) -> str:
    """What a check said."""
    found = ", ".join(f"{name} {value:g}" for name, value in (feedback or {}).items())
    return f"The work was checked: {found or 'nothing that can be read'}."


def addition(role: str) -> str:
    """What may be answered while a turn that is written already comes next."""
    return f"{role} has the next turn. What do you add to it? Say DONE, alone, to add nothing."


def question(roles: Sequence[str], last: str | None = None, *, checks: bool = False) -> str:
    """What may be answered when the director leads; `last` is the role that spoke last."""
    whom = roles[0] if len(roles) == 1 else last
    if whom is None:
        ask = f'Who is next? Begin with a line "TO {roles[0]}:" ({", ".join(roles)}); the rest is passed on.'
    else:
        ask = f"What do you say to {whom}? Your whole answer is passed on."
    if whom is not None and (others := [role for role in roles if role != whom]):
        ask += f' To speak to another, begin with a line "TO {others[0]}:" ({", ".join(others)}).'
    check = " Say CHECK, alone, to have the work checked first." if checks else ""
    return f"{ask}{check} Say DONE on the last line when nothing more is to be said."


def _listed(roles: Sequence[str]) -> str:
    return f"{' and '.join(roles)} {'is' if len(roles) == 1 else 'are'}"


# --- what it holds -------------------------------------------------------------------------------------------


@attrs.define
class Outside:
    """The sandbox handle of a director: it opens nothing. A `states.ports.SandboxHandle`."""

    name: str

    async def open(self) -> None:
        """There is nothing to open."""

    async def exec(self, command: str | Sequence[str], **_about: Any) -> ExecResult:  # noqa: ARG002 - the signature
        """Raises `HandleRevoked`."""
        self._refuse()

    async def spawn(self, argv: Sequence[str], **_about: Any) -> ByteChannel:  # noqa: ARG002 - the signature
        """Raises `HandleRevoked`."""
        self._refuse()

    async def read_file(self, path: str) -> bytes:  # noqa: ARG002 - the signature
        """Raises `HandleRevoked`."""
        self._refuse()

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:  # noqa: ARG002 - the signature
        """Raises `HandleRevoked`."""
        self._refuse()

    async def end(self) -> tuple[str, ...]:
        """Nothing was started."""
        return ("a director's handle opens nothing",)

    def _refuse(self) -> NoReturn:
        raise HandleRevoked(f"{self.name} directs: it must not touch the sandbox in which others work")


@attrs.define(eq=False)
class HeardSegment(TurnSegment):
    """A segment that remembers the messages which were written to it."""

    _messages: dict[int, str] = attrs.field(factory=dict)

    def started(self, step: Mapping[str, Any]) -> int:
        """A new step; returns its index in this segment."""
        index = super().started(step)
        if step.get("type") == "agent_message":
            self._messages[index] = str(step.get("text", ""))
        return index

    def grew(self, index: int, text: str) -> None:
        """The text of a message or thought grew by `text`."""
        super().grew(index, text)
        if index in self._messages:
            self._messages[index] += text

    def updated(self, index: int, fields: Mapping[str, Any]) -> None:
        """Fields of a step changed."""
        super().updated(index, fields)
        if index in self._messages and "text" in fields:
            self._messages[index] = str(fields["text"] or "")

    @property
    def answer(self) -> str:
        """Its last message; nothing where there is none."""
        return self._messages[max(self._messages)] if self._messages else ""


# --- the director --------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class AgentDirector:
    """A `Director` that is an agent. What it needs of the world is handed over as functions.

    `seat` gives a place for a new session, in which nothing is started; `segment` opens the record of a question, about
    the turn of that number; `used` is what its model calls used so far; `time_left` are the seconds that
    the rollout still has; `spent` says which budget is, so that it cannot be asked.
    """

    led: DirectorRole
    roles: tuple[str, ...]
    opening: tuple[Turn, ...]
    leases: Leases
    seat: Callable[[], Seat]
    segment: Callable[[Connection, int, str], HeardSegment]
    used: Callable[[], Usage]
    time_left: Callable[[], float]
    note: Callable[[str], None]
    spent: Callable[[], str] = lambda: ""
    _sessions: dict[str, Connection] = attrs.field(factory=dict, init=False)
    """Every session that is not closed yet, by the name of its lease; only the last one is talked to."""
    _talk: list[Connection] = attrs.field(factory=list, init=False)
    _told: tuple[int, int] = attrs.field(default=(0, 0), init=False)
    """How many turns and checks the session has been told of."""
    _own: str = attrs.field(default="", init=False)

    @property
    def name(self) -> str:
        """Its name in the scene."""
        return self.led.role.name

    async def __call__(self, story: Story) -> Decision:
        """The next decision.

        Raises:
            DirectorError: its agent cannot be connected, raised, or twice gave no answer that can be followed.
            ProviderError: its model failed.
        """
        taken = len(story.turns)
        if taken and not went_on(story.turns[-1].ended_by):
            return Next("done", why=f"the last turn ended by {story.turns[-1].ended_by}")
        coming = self.opening[taken] if taken < len(self.opening) else None
        if coming is None and self.led.limit is not None and taken >= self.led.limit:
            return Next("done", why=f"the limit of {self.led.limit} turns of {self.name} is reached")
        if coming is not None and not taken:
            return coming
        if why := self.spent():
            return Next("done", why=why)
        with anyio.move_on_after(self.time_left()):
            try:
                return await self._asked(story, coming)
            except (DirectorError, ProviderError) as error:
                if not (why := self.spent()):
                    raise
                self.note(str(error))  # it was refused its next model call, and that is nobody's failure
                return Next("done", why=why)
        return Next("done", why="the rollout's time is up")

    async def _asked(self, story: Story, coming: Turn | None) -> Decision:
        """Ask, and once more with what was wrong with the answer."""
        checks = story.checks < self.led.checks
        last = story.turns[-1].role if story.turns else None
        asking = addition(coming.role) if coming else question(self.roles, last, checks=checks)
        told = await self._news(story)
        try:
            return self._read(await self._ask(f"{told}\n\n{asking}", story.coming), story, coming, checks)
        except Unclear as error:
            again = f"That cannot be followed: {error}. {asking}"
        try:
            return self._read(await self._ask(again, story.coming), story, coming, checks)
        except Unclear as error:
            raise DirectorError(f"the director {self.name} gave no answer that can be followed: {error}") from error

    def _read(self, answer: str, story: Story, coming: Turn | None, checks: bool) -> Decision:
        if coming is not None:
            added = read_addition(answer)
            prompt = story.instruction if coming.prompt is None else coming.prompt
            return Turn(coming.role, f"{prompt}\n\n{added}") if added else coming
        last = story.turns[-1].role if story.turns else None
        decision = read_answer(answer, self.roles, last, checks=checks)
        if isinstance(decision, Turn):
            self._own = decision.prompt or ""
        elif decision.kind == "done":
            return attrs.evolve(decision, why=f"{self.name} ended it{f': {decision.why}' if decision.why else ''}")
        return decision

    async def _news(self, story: Story) -> str:
        """What the session is to be told: everything, where it is new."""
        turns, checks = self._told if self._talk else (0, 0)
        parts = [] if self._talk else [introduction(self.led.brief, self.roles, story.instruction)]
        await self._connected()
        parts += [what_happened(story.turns[turns:], self._own)] if story.turns[turns:] else []
        parts += [what_was_found(story.turns[-1].feedback)] if story.checks > checks and story.turns else []
        self._told = (len(story.turns), story.checks)
        return "\n\n".join(parts) or "Nothing has happened since."

    # -- its session

    async def _connected(self) -> None:
        """Open a session where none can be talked to."""
        if self._talk:
            return
        for lease in self.leases.open("director"):  # one that was left in the middle of an answer
            await self.leases.give_back(lease)
        seat = self.seat()
        self.leases.intend("director", seat.handle.name)
        try:
            opened = await seat.transport.connecting(seat)
        except ConnectError as error:
            raise DirectorError(f"the director {self.name} cannot be connected: {error}") from error
        self._sessions[seat.handle.name] = opened.live
        self._talk, self._own = [opened.live], ""

    async def _ask(self, text: str, turn: int) -> str:
        """One prompt to the session; what it answered. One that is left in the middle of that is not used again."""
        connection, before = self._talk[0], self.used()
        transport = connection.seat.transport
        segment = self.segment(connection, turn, text)
        asked = OpenTurn(connection, segment, transport.prepare(connection, segment, text))
        try:
            outcome = await transport.executing(asked)
            await transport.capturing(asked)
        except BaseException as error:
            asked.inflight.abandon()
            self._talk.clear()
            with contextlib.suppress(JournalError):
                segment.seal(complete=False, usage=self.used() - before)
            if isinstance(error, Exception) and not isinstance(error, JournalError):
                raise DirectorError(f"the director {self.name} raised {type(error).__name__}: {error}") from error
            if not isinstance(error, Exception):
                self.note(f"the director {self.name} was left while it was asked for turn {turn}")
            raise
        segment.seal(complete=isinstance(outcome, TurnEnded), usage=self.used() - before)
        return self._answered(outcome, segment)

    def _answered(self, outcome: TurnEnded | TurnFailed | Lost, segment: HeardSegment) -> str:
        if isinstance(outcome, TurnEnded):
            if outcome.stop in ("refusal", "cancelled"):
                why = f": {shortened(segment.answer, 500)}" if segment.answer else ""
                raise DirectorError(f"the director {self.name} gave no answer ({outcome.stop}){why}")
            return segment.answer
        self._talk.clear()
        raise _raised(self.name, outcome.failure)

    async def end(self, name: str) -> tuple[str, ...]:
        """Close the session of this lease; the evidence."""
        if name not in self._sessions:
            return ("no such session in this process",)
        connection = self._sessions[name]
        if connection in self._talk:
            self._talk.clear()
        evidence = await connection.seat.transport.quiescing(connection)
        self._sessions.pop(name, None)
        return evidence

    async def abandon(self) -> None:
        """Close every session, without a journal."""
        for name in list(self._sessions):
            with contextlib.suppress(Exception):
                await self.end(name)


def _raised(name: str, failure: Failure) -> OrchestratorError:
    if failure.owner == "provider":
        return ProviderError(f"the model of the director {name} failed: {failure.message}")
    return DirectorError(f"the director {name} raised {failure.error}: {failure.message}")


def check_agent_of(led: DirectorRole, agent: Any) -> None:
    """Raise `ConfigError` for an agent that cannot direct."""
    where = f"the director {led.role.name!r} is played by {agent.name}, which"
    if agent.protocol != "session-factory":
        raise ConfigError(f"{where} speaks {agent.protocol}: a director is a session-factory, outside the sandbox")
    if agent.calls_model and agent.calls_from == "sandbox":
        raise ConfigError(f"{where} calls its model from the sandbox: a director is outside of it")
