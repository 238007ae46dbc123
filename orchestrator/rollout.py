"""The kernel: run the state's handler, journal and fire the event that it returns, repeat, until closed.

It decides nothing. Where an event leads is the table's business (`states.machine`), what a state does its handler's
(`states/<state>.py`), when a state has taken too long that of one table (`states.deadlines`). What is here is the
order of things, and that is all that is here:

1. An event is fired and journaled before the next handler runs; if the journal cannot be written, the rollout stops as
   if it had been killed.
2. A handler that has finished is heard before an event from outside that waits.
3. An outside event that moves cancels the handler, waits for it to end, then fires. One that stays never touches it.
4. A rollout never raises for what happens in it. When the host cancels the task that runs it, the rollout is cancelled,
   goes on in a shielded scope to its close, and the host's cancellation is raised again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import anyio
import anyio.lowlevel
import attrs

from orchestrator._tasks import Detached, foreign
from orchestrator._words import traced
from orchestrator.config import Hook, RolloutConfig
from orchestrator.result import RolloutResult, Verdict
from states import (
    cancelling,
    capturing,
    checking,
    connecting,
    disconnected,
    executing,
    paused,
    provisioning,
    quiescing,
    releasing,
    session,
    verifying,
)
from states.deadlines import EXPIRY, OWNERS, Deadline, crashed
from states.errors import ConfigError, JournalError, OrchestratorError, said
from states.events import ABSENT, Cancelled, Event, Failure, Interrupted, Recovered, SandboxFailed
from states.journal import Cause, Record, Transition
from states.machine import CAPTURING, SESSION, Facts, Position, fire, rows, stays
from states.ports import AskHandler, OpenTurn, Stage, Vacant

if TYPE_CHECKING:
    from orchestrator.directors import Story
    from orchestrator.journal import JournalWriter

DROP_SEC = 15.0
HOOK_SEC = 30.0
"""How long a hook may keep the rollout waiting."""

HANDLERS: dict[str, Callable[[Any, Any], Any]] = {
    "provisioning": provisioning.run,
    "disconnected": disconnected.run,
    "connecting": connecting.run,
    **dict.fromkeys(SESSION, session.run),
    "executing": executing.run,
    "paused": paused.run,
    "checking": checking.run,
    "cancelling": cancelling.run,
    **dict.fromkeys(CAPTURING, capturing.run),
    "quiescing": quiescing.run,
    "verifying": verifying.run,
    "releasing": releasing.run,
}


@attrs.define(eq=False, init=False, repr=False)
class Rollout:
    """One rollout. Made on no loop, run on asyncio or trio, once.

    Example:
        >>> from orchestrator.sandboxes.fake import FakeSandbox
        >>> async def main():
        ...     config = RolloutConfig(prompt="Do it.", agent="scripted", sandbox=FakeSandbox(), out=None)
        ...     result = await Rollout(config).run()
        ...     return result.state, result.ended_by
        >>> anyio.run(main)
        ('closed/unverified', 'end_turn')

    Raises:
        ConfigError: from the constructor, before anything exists. Nothing is raised for what happens in a rollout.
    """

    id: str
    config: RolloutConfig
    _world: Any
    _journal: JournalWriter
    _position: Position
    _stage: Stage
    _inbox: deque[Event]
    _running: list[anyio.CancelScope]
    _unheard: deque[Transition]
    listeners: list[Hook]
    """Who is told of each transition beside the config's hooks, from when it adds itself until it takes itself out."""

    def __init__(self, config: RolloutConfig) -> None:
        from orchestrator.world import build_world  # all that a rollout is made of: who only imports us waits for none

        self.config = config
        self._begin(build_world(config, config.new_id()), Position())

    def _begin(self, world: Any, position: Position) -> None:
        self.id = world.id
        self._world, self._journal = world, world.journal
        self._position, self._stage = position, Vacant()
        self._inbox, self._running, self._unheard, self.listeners = deque(), [], deque(), []
        world.on_loss.append(self.sandbox_failed)

    @classmethod
    def taken_over(
        cls, world: Any, position: Position, config: RolloutConfig, recovered: Recovered, *events: Event
    ) -> Self:
        """A rollout whose process is dead, where its journal says that it stands.

        That it was taken over is journaled now, in every state; `events` are fired next. Raises `JournalError`.
        """
        rollout = cls.__new__(cls)
        rollout.config = config
        rollout._begin(world, position)  # noqa: SLF001
        rollout._fire(recovered, "recovery")  # noqa: SLF001
        for event in events:
            rollout._post(event)  # noqa: SLF001
        return rollout

    # --- reading ---

    def __repr__(self) -> str:
        return f"<Rollout {self.id}: {self.state}>"

    @property
    def state(self) -> str:
        """The state in which it stands."""
        return self._position.state

    @property
    def facts(self) -> Facts:
        """The fold of its journal."""
        return self._position.facts

    @property
    def stage(self) -> Stage:
        """The data of the state that runs."""
        return self._stage

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        return self._position.closed

    @property
    def folder(self) -> Path | None:
        """Where its artifacts are; None when it keeps them in memory."""
        folder: Path | None = self._world.folder
        return folder

    @property
    def held(self) -> str | None:
        """Who holds it before its next turn (`pause`); None while nobody does."""
        held: str | None = self._world.held()
        return held

    @property
    def journal(self) -> tuple[Record, ...]:
        """The journal so far."""
        return tuple(self._journal.records)

    @property
    def story(self) -> Story:
        """What happened so far, as a director sees it: each turn with its steps, read from where they were written.

        That is the folder, or with `out=None` memory, while this object lives.

        >>> from orchestrator.sandboxes.fake import FakeSandbox
        >>> config = RolloutConfig(prompt="Do it.", agent="scripted", sandbox=FakeSandbox(), out=None)
        >>> rollout = Rollout(config)
        >>> _ = anyio.run(rollout.run)
        >>> [(turn.role, turn.ended_by, [step["type"] for step in turn.steps]) for turn in rollout.story.turns]
        [('agent', 'end_turn', ['user_message', 'agent_thought', 'tool_call', 'agent_message'])]
        """
        story: Story = self._world.story()
        return story

    def result(self) -> RolloutResult:
        """What came of it so far: a fold of the journal, at any time."""
        result: RolloutResult = self._world.result(self._position)
        return result

    def _repr_html_(self) -> str:
        """What a notebook shows: where it stands, and the run so far on the machine."""
        return self._repr_mimebundle_()["text/html"]

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:  # noqa: ARG002
        """The same by media type; IPython picks."""
        from orchestrator.notebook import shown

        return shown(self.result(), self.journal)

    # --- driving ---

    async def run(self) -> RolloutResult:
        """Drive it to its close (or to where it was stopped) and return what came of it."""
        try:
            while self._goes_on():
                await self.step()
        except anyio.get_cancelled_exc_class():
            await self._close_in_spite_of_cancellation()
            raise
        except JournalError as error:
            await self._drop()
            return attrs.evolve(self.result(), verdict=Verdict("harness", str(error)))
        finally:
            self._undriven()
        return self.result()

    async def run_iter(self) -> AsyncIterator[Transition]:
        """The same, transition by transition, for those who watch. Leaving early leaves it where it stands."""
        try:
            while self._goes_on():
                yield await self.step()
        finally:
            self._undriven()

    async def _close_in_spite_of_cancellation(self) -> None:
        """Cancel it and drive it to its close, which the deadlines bound, however often the host cancels us."""
        closing = Detached(self._cancel_and_close, name=f"close:{self.id}").start()
        with anyio.CancelScope(shield=True):
            while not closing.done:
                # A shield stops the cancellation of a scope; asyncio's task.cancel() goes through it, each time anew.
                with contextlib.suppress(anyio.get_cancelled_exc_class(), Exception):
                    await closing.wait()
        try:
            closing.outcome()
        except JournalError:
            await self._drop()

    async def _cancel_and_close(self) -> None:
        self.cancel("host", "the task that ran it was cancelled")
        while not self.closed:
            await self.step()

    async def _drop(self) -> None:
        """As if killed: nothing can be written any more, so nothing may be done, and leases stay open.

        But this process lives on: what an agent holds of it, or in it, is taken away.
        """
        if isinstance(self._stage, OpenTurn):
            self._stage.inflight.abandon()
        with anyio.move_on_after(DROP_SEC, shield=True):
            await self._world.abandon(self._stage)

    async def step(self) -> Transition:
        """Run one state, fire its event, and return the transition. Raises `ConfigError` when it is closed."""
        if self.closed:
            raise ConfigError(f"rollout {self.id} is closed")
        if self._running:
            raise ConfigError(f"rollout {self.id} is being driven already: one at a time")
        self._inbox = deque(event for event in self._inbox if rows(self.state, type(event)))
        if self._inbox:
            moved = self._fire(*_from_outside(self._inbox.popleft()))
        else:
            moved = self._fire(*await self._handle(self.state))
        try:
            await self._tell()
        finally:
            if self.closed:
                self._undriven()
                self._world.close(self._position)
        if not self.closed:
            await anyio.lowlevel.checkpoint()  # with hundreds on one loop, each has its turn a state at a time
        return moved

    async def _handle(self, state: str) -> tuple[Event, Cause]:
        """What the state's handler came to: its event, its crash, its expiry, or an event that took over."""
        deadline = self._world.deadline(state, self._stage, self.facts)
        with anyio.CancelScope(deadline=anyio.current_time() + deadline.seconds) as scope:
            self._running.append(scope)
            try:
                with self._world.telemetry.driving(state, self.config.clock), foreign():
                    return await HANDLERS[state](self, self._world), "handler"
            except JournalError:
                raise
            except Exception as error:
                if not self._inbox and not scope.cancel_called:
                    return self._crashed(state, error, deadline), "error"
                self._world.note(f"{state} raised while it was being left: {type(error).__name__}: {said(error)}")
            finally:
                self._running.remove(scope)
        if self._inbox:
            return _from_outside(self._inbox.popleft())
        failure = Failure(OWNERS[state], "DeadlinePassed", f"{state} took longer than {deadline.seconds:g} s")
        return EXPIRY[state](failure, deadline), "deadline"

    def _crashed(self, state: str, error: Exception, deadline: Deadline) -> Event:
        if not isinstance(error, OrchestratorError):
            self._world.note(traced(error))
        return crashed(state, Failure.of(error), deadline)

    def _fire(self, event: Event, cause: Cause) -> Transition:
        source = self.state
        position = fire(self._position, event, self._world.rules)
        moved = self._journal.moved(source, event, position.state, cause)
        self._position = position
        self._stage = stage_after(self._stage, event, position.state)
        self._unheard.append(moved)
        self._world.telemetry.moved(moved)
        return moved

    async def _tell(self) -> None:
        """Tell the hooks; they cannot break a rollout."""
        while self._unheard:
            moved = self._unheard.popleft()
            for hook in (*self.config.hooks, *self.listeners):
                try:
                    with anyio.fail_after(HOOK_SEC), foreign():
                        answer = hook(moved)
                        if inspect.isawaitable(answer):
                            await answer
                except Exception as error:
                    self._world.note(f"a hook raised {type(error).__name__} on {moved.event.name}: {said(error)}")

    # --- from outside ---

    def _post(self, event: Event) -> None:
        if self.closed or not rows(self.state, type(event)):
            return
        if stays(self.state, type(event)):
            try:
                self._fire(*_from_outside(event))
            except JournalError:
                self._inbox.append(event)  # the step that runs will meet the same error; whoever told us is not to
            return
        self._inbox.append(event)
        for scope in self._running:
            scope.cancel()

    def cancel(self, by: str = "code", why: str = "") -> bool:
        """It is not wanted any more: captured, released, closed. Legal in every state; a second one changes nothing.

        Returns whether this one changes how it ends. From another thread, call it through the loop
        (`loop.call_soon_threadsafe`, `anyio.from_thread.run_sync`); from another process, see `orchestrator.control`.
        """
        first = not self.closed and self.facts.ending is None and not self._waits_for(Cancelled)
        self._post(Cancelled(by, why))
        return first

    def interrupt(self, by: str = "operator") -> bool:
        """Cancel the turn in flight, not the rollout. Returns whether there was one; without, nothing happens."""
        turn = self.state == "executing" and not self._inbox
        self._post(Interrupted(by))
        return turn

    def stop(self, by: str = "operator") -> None:
        """Stop driving it, with its leases held, so that it can go on later (`orchestrator.recovery.resume`).

        The turn in flight is interrupted and captured, and `run` returns at the next `disconnected` or `verifying`.
        """
        with contextlib.suppress(JournalError):  # the step that runs will meet the same error
            self._world.leave(by)
        self.interrupt(by)

    async def detach(self) -> None:
        """After a stop: close what cannot outlive this process (gateway, open files), keep the leases.

        Whoever takes the rollout over finds them in its journal, which is free to be taken from now on.
        """
        await self._world.detach()

    def _waits_for(self, kind: type[Event]) -> bool:
        return any(isinstance(event, kind) for event in self._inbox)

    def _undriven(self) -> None:
        """Nobody drives it any more, for now or for good: its spans end. Idempotent."""
        last = next((record for record in reversed(self._journal.records) if isinstance(record, Transition)), None)
        over = last.time if last is not None and self.closed else None
        self._world.telemetry.over(self.result, self.config.clock, over)

    def _goes_on(self) -> bool:
        return not self.closed and not self._is_stopped()

    def _is_stopped(self) -> bool:
        return self._world.leaving and self.state in ("disconnected", "verifying")

    def sandbox_failed(self, why: str) -> None:
        """A host that watches its own sandbox says that it is gone."""
        self._post(SandboxFailed(Failure("sandbox", "SandboxError", why)))

    def pause(self, by: str = "operator") -> bool:
        """Hold the plan before its next turn; the turn in flight is taken to its end.

        Returns whether that changes anything: not where somebody holds it already, nor where no turn can follow, here.
        """
        over = self.closed or self.facts.ending is not None or self.state in ("verifying", "releasing")
        if over or self._world.leaving or self.held is not None:
            return False
        self._world.pause(by)
        return True

    def resume(self, by: str = "operator") -> bool:
        """Let a paused rollout go on. Returns whether anybody held it."""
        held = self.held is not None
        self._world.resume(by)
        return held

    def on_ask_user(self, handler: AskHandler | None) -> None:
        """Bind who answers the agents' questions, over role swaps too; None goes back to the policy."""
        self._world.questions.bind(handler)


def _from_outside(event: Event) -> tuple[Event, Cause]:
    return event, "recovery" if isinstance(event, Recovered) else "outside"


def stage_after(stage: Stage, event: Event, state: str) -> Stage:
    """The data of the state that was reached: what the event handed over, or what is left of the last one's."""
    if state not in _SOMEBODY:
        return Vacant()
    live = getattr(event, "live", ABSENT)
    if live is not ABSENT:
        return cast(Stage, live)
    if isinstance(stage, OpenTurn) and state not in _TURN:
        return stage.connection
    return stage


_TURN = ("executing", "cancelling", *CAPTURING)
_SOMEBODY = (*_TURN, *SESSION, "connecting", "paused", "checking", "quiescing")


def run_sync(config: RolloutConfig, *, backend: str = "asyncio") -> RolloutResult:
    """Run one rollout from a synchronous program. Inside a running loop, await `Rollout.run` instead.

    Example:
        >>> from orchestrator.sandboxes.fake import FakeSandbox
        >>> run_sync(RolloutConfig(prompt="Do it.", agent="scripted", sandbox=FakeSandbox(), out=None)).turns
        1

    Raises:
        ConfigError: the configuration cannot work, a loop runs in this thread, or there is no such backend here.
    """
    if backend not in anyio.get_all_backends() or importlib.util.find_spec(backend) is None:
        raise ConfigError(f"no backend {backend!r} here: there is asyncio, and trio where that is installed")
    with contextlib.suppress(RuntimeError):  # no loop runs in this thread, as it should be
        anyio.get_current_task()
        raise ConfigError("a loop runs here already: await Rollout(config).run() instead of run_sync")
    return anyio.run(Rollout(config).run, backend=backend)
