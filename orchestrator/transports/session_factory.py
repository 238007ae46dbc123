"""The session-factory transport: an agent that is built in our own process by a `module:callable`.

The same methods as `orchestrator.transports.acp`, one a state: read the two files side by side. What is special here:
the agent's code runs beside ours, so whatever it does with time, cancellation or exceptions is kept away from the
rollout by running it in tasks of its own, and what it holds of the sandbox is a gate that can be shut.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import anyio
import anyio.from_thread
import attrs

from orchestrator._tasks import Detached
from orchestrator._words import shown, traced
from orchestrator.questions import Questions, answer_fields, question_step, read_request
from orchestrator.transports.gate import GatedHandle
from orchestrator.transports.inflight import PromptTask, Turn, settled
from orchestrator.transports.steps import StepReader
from states.errors import AgentError, ConfigError, ConnectError, OrchestratorError, ProviderError, SandboxError, said
from states.events import FactoryOpened, Lost, Settled, TurnEnded, TurnFailed
from states.ports import Connection, OpenTurn, Seat, Segment, Session

T = TypeVar("T")

CLOSE_SEC = 5.0


@attrs.define(eq=False)
class LiveSession:
    """What a connection of this transport holds: the foreign session, its gate, and what was read of its steps."""

    session: Any
    gate: GatedHandle
    reader: StepReader
    questions: Questions
    turn: Turn = attrs.field(factory=Turn.over)
    closing: list[Detached[str]] = attrs.field(factory=list)
    heard: list[LiveSession] = attrs.field(factory=list)
    """Itself while the foreign session is heard, which has no more of ours than this list: emptied when it is closed,
    so that what a dead session holds is nothing, and whoever keeps one keeps no rollout."""

    async def answer(self, asked: Any) -> str | None:
        """The answer to a question of the session's, which is a step of its turn."""
        request = read_request(asked)
        update = self.reader.note(question_step(request))
        answer = await self.turn.answer(self.questions, request)
        update(answer_fields(answer))
        return answer.option


@attrs.define(eq=False)
class SessionFactoryTransport:
    """Drives sessions that `factory` builds.

    `factory` is called with those of `offered` (`task`, `model`, `env`) that its signature names, and returns an
    `Agent`. `agent_env` is what the agent may know: where its model is and as whom to call it. `exec_env` is what its
    commands in the sandbox see of that.
    """

    factory: Callable[..., Any]
    questions: Questions
    agent_env: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    cwd: str = "/app"
    connect_sec: float = 60.0
    offered: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    exec_env: Mapping[str, str] = attrs.field(
        default=attrs.Factory(lambda self: self.agent_env, takes_self=True), repr=False
    )
    note: Callable[[str], None] = attrs.field(default=lambda _text: None, repr=False)
    """Gets the traceback of what the agent's code raised: nobody else would see it."""
    name: Literal["acp", "session-factory"] = "session-factory"

    async def connecting(self, seat: Seat) -> FactoryOpened:
        """Build the agent and connect it.

        Raises `ConnectError`: it raised, took longer than `connect_sec`, or returned what is no `Session`. A session
        that comes after we stopped waiting is closed.
        """
        await seat.handle.open()
        gate = GatedHandle(self.cwd, seat.handle, self.exec_env, dict(self.agent_env))
        connecting = Detached(self._connect, (gate, seat.role.name), name="connect").start()
        try:
            return self._opened(await self._in_time(connecting), seat, gate)
        except BaseException as error:
            await _discard(connecting, gate)
            if isinstance(error, _MEANT) or not isinstance(error, Exception):
                raise
            if not isinstance(error, OrchestratorError):
                self.note(traced(error))
            raise ConnectError(f"connect() raised {type(error).__name__}: {said(error)}") from error

    async def _connect(self, gate: GatedHandle, role: str) -> Any:
        gate.open()
        agent = self.factory(**_accepted(self.factory, self.offered))
        if inspect.isawaitable(agent):
            agent = await agent
        if not callable(getattr(agent, "connect", None)):
            name, wanted = self._factory_name(), "an Agent, an object with connect(sandbox, role)"
            raise ConnectError(f"the factory {name} returned {shown(agent)}; it must return {wanted}", retryable=False)
        keywords = _accepted(agent.connect, {"agent_env": dict(self.agent_env)})
        session = agent.connect(gate, role, **keywords)
        return await session if inspect.isawaitable(session) else session

    def _factory_name(self) -> str:
        module, name = (getattr(self.factory, part, "") for part in ("__module__", "__qualname__"))
        return f"{module}:{name}" if name else type(self.factory).__qualname__

    async def _in_time(self, connecting: Detached[Any]) -> Any:
        with anyio.move_on_after(self.connect_sec):
            return await connecting.wait()
        raise ConnectError(f"connect() did not return within {self.connect_sec:g} s")

    def _opened(self, session: Any, seat: Seat, gate: GatedHandle) -> FactoryOpened:
        live = LiveSession(session, gate, StepReader(), self.questions)
        live.heard.append(live)
        _bind(session, live.heard)
        gate.close()
        kind = type(session).__qualname__
        return FactoryOpened(_session_id(session, seat), kind, live=Connection(seat, live))

    def prepare(self, connection: Connection, segment: Segment, text: str) -> PromptTask:
        """A prompt that is ready to be sent; its steps will go to `segment`."""
        live: LiveSession = connection.session
        live.reader.turn(segment, text)
        live.turn = Turn()
        return PromptTask.of(functools.partial(_prompt, live.session, live.turn), text, segment, self.note)

    async def executing(self, turn: OpenTurn) -> TurnEnded | TurnFailed | Lost:
        """Open the gate, send the prompt, and wait for its end."""
        live: LiveSession = turn.connection.session
        live.gate.open()
        turn.inflight.start()
        return await turn.inflight.outcome()

    async def cancelling(self, turn: OpenTurn) -> Settled | Lost:
        """Ask the session to cancel, in a task of its own, and wait for the prompt to return."""
        live: LiveSession = turn.connection.session
        live.turn.stopped.set()
        if not live.turn.sent.is_set():
            return Settled("cancelled", turn.segment.steps)
        asking = Detached(_cancel, (live.session,), name="cancel").start()
        try:
            return await settled(turn)
        finally:
            asking.cancel()

    async def capturing(self, turn: OpenTurn) -> None:
        """Close the gate and compare every step of the turn once more."""
        live: LiveSession = turn.connection.session
        live.gate.close()
        live.reader.look(_asked("steps", lambda: live.session.steps), thorough=True)

    async def quiescing(self, connection: Connection) -> tuple[str, ...]:
        """Revoke what the agent holds, then close its session, once, for at most `CLOSE_SEC`."""
        live: LiveSession = connection.session
        revoked = await live.gate.revoke()
        if not live.closing:
            live.closing.append(Detached(_close, (live.session,), name="close").start())
        closing = live.closing[0]
        with anyio.move_on_after(CLOSE_SEC):
            try:
                return revoked, await closing.wait()
            except Exception as error:
                return revoked, f"close() raised {type(error).__name__}: {said(error)}"
            finally:
                if closing.done:
                    live.heard.clear()
        closing.cancel()
        return revoked, f"close() did not return within {CLOSE_SEC:g} s and was abandoned, holding nothing"

    def watches(self, connection: Connection) -> tuple[()]:  # noqa: ARG002 - the Transport's signature
        """None: an agent in our own process does not go away by itself."""
        return ()


_MEANT = (ConfigError, ConnectError, ProviderError, SandboxError)
"""Errors of ours that an agent may raise to say what went wrong in `connect`."""


def _bind(session: Any, heard: list[LiveSession]) -> None:
    """Take our places in a foreign session, checking that it is one."""
    kind = type(session).__qualname__
    home = threading.get_ident()

    def look() -> None:
        for live in heard:
            live.reader.look(live.session.steps)

    def changed(_session: Any = None) -> None:
        # An error of ours must not be raised inside the agent. Nothing is lost by that: what could not be read
        # or written now is still missing in `capturing`, whose thorough look raises what then goes wrong.
        with contextlib.suppress(Exception):
            if threading.get_ident() == home:
                look()
            else:
                anyio.from_thread.run_sync(look)

    async def answer(request: Any) -> str | None:
        return await heard[0].answer(request) if heard else None

    try:
        _asked("on_change", lambda: setattr(session, "on_change", changed))
    except AgentError as error:
        _check_whole(session, ("prompt", "cancel", "on_ask_user", "steps"))
        raise ConnectError(f"{kind} refuses the assignment of on_change: {error}", retryable=False) from error
    if not _asked("its members", lambda: isinstance(session, Session)):
        _check_whole(session, ("on_change", "prompt", "cancel", "on_ask_user", "steps"))
    _asked("on_ask_user()", lambda: session.on_ask_user(answer))


def _check_whole(session: Any, wanted: tuple[str, ...]) -> None:
    """Raise `ConnectError` for what lacks one of these members; says which."""
    if missing := [name for name in wanted if not _asked(name, functools.partial(hasattr, session, name))]:
        lacks = f"which is no Session: it lacks {', '.join(missing)}"
        raise ConnectError(f"connect() returned {shown(session)}, {lacks}", retryable=False)


async def _discard(connecting: Detached[Any], gate: GatedHandle) -> None:
    """Nobody waits for this connect any more: take its handle away, and close what it returned or may yet return."""
    connecting.cancel()
    Detached(_close_late, (connecting,), name="close").start()
    with anyio.move_on_after(CLOSE_SEC, shield=True):
        await gate.revoke()


async def _close_late(connecting: Detached[Any]) -> None:
    session = await connecting.wait()
    with anyio.move_on_after(CLOSE_SEC):
        await _close(session)


async def _prompt(session: Any, turn: Turn, text: str) -> str:
    if turn.stopped.is_set():
        return "cancelled"  # before it was sent
    turn.sent.set()
    try:
        stop: str = await session.prompt(text)
    finally:
        turn.stopped.set()
    return stop


async def _cancel(session: Any) -> None:
    returned = session.cancel()
    if inspect.isawaitable(returned):
        await returned


async def _close(session: Any) -> str:
    close = getattr(session, "close", None)
    if close is None:
        return "the session has no close()"
    returned = close()
    if inspect.isawaitable(returned):
        await returned
    return "close() returned"


def _asked(what: str, call: Callable[[], T]) -> T:
    """What plain code of an agent returns. All that it raises, be it an exit or a cancellation, is an AgentError."""
    try:
        return call()
    except BaseException as error:
        raise AgentError(f"{what} raised {type(error).__name__}: {said(error)}") from error


def _accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those keywords of `offered` that `function` names: read off its signature, never by trying.

    `**keywords` names none: factories of other harnesses hand what they get there to a constructor of their own.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins have none
        return {}
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in offered.items() if name in names}


def _session_id(session: Any, seat: Seat) -> str:
    given = _asked("session_id", lambda: getattr(session, "session_id", None))
    return str(given) if isinstance(given, str) else seat.handle.name
