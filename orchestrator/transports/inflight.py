"""A prompt on its way, and the questions asked meanwhile: the same for both transports, in one place."""

from __future__ import annotations

import enum
import typing
from collections.abc import Awaitable, Callable

import anyio
import attrs

from orchestrator._tasks import Detached, first_of
from orchestrator._words import traced
from orchestrator.questions import Answer, Questions
from states.errors import AgentError, AgentLost, OrchestratorError
from states.events import Failure, Lost, Settled, TurnEnded, TurnFailed
from states.ports import AskUserRequest, OpenTurn, Segment, StopReason

_STOPS = typing.get_args(StopReason)

STOPPED = Answer(None, "nobody", "the turn was cancelled or is over")


@attrs.frozen(eq=False)
class Turn:
    """One prompt, from when it is prepared. `stopped`: it was cancelled, or it is over.

    A prompt that finds its turn stopped is not sent, whichever task the loop runs first.
    """

    sent: anyio.Event = attrs.field(factory=anyio.Event)
    stopped: anyio.Event = attrs.field(factory=anyio.Event)

    @classmethod
    def over(cls) -> Turn:
        """What stands between turns."""
        turn = cls()
        turn.sent.set()
        turn.stopped.set()
        return turn

    async def answer(self, questions: Questions, request: AskUserRequest) -> Answer:
        """The answer to a question that was asked in this turn, or what its end makes of it, if that comes first."""

        async def stopped() -> Answer:
            await self.stopped.wait()
            return STOPPED

        async def asked() -> Answer:
            return await questions.answer(request)

        return STOPPED if self.stopped.is_set() else await first_of(stopped, asked)


@attrs.define(eq=False)
class PromptTask:
    """`states.ports.Inflight` over a session's `prompt`.

    The task lives until the agent answers or `abandon` is called; a `prompt` that swallows its cancellation is left
    behind without holding up anybody. Any error of `prompt` is a `TurnFailed`, a `TimeoutError` raised by the agent's
    own code included: only our own clock says that a deadline has passed.
    """

    _task: Detached[str]
    _segment: Segment
    _note: Callable[[str], None] | None = None

    @classmethod
    def of(
        cls,
        prompt: Callable[[str], Awaitable[str]],
        text: str,
        segment: Segment,
        note: Callable[[str], None] | None = None,
    ) -> PromptTask:
        """A prompt that is ready to be sent; nothing happens until `start`.

        `note` gets the traceback of what foreign code raises, where `prompt` runs that in our process.
        """
        return cls(Detached(prompt, (text,), name="prompt"), segment, note)

    def start(self) -> None:
        """Send it. Once."""
        self._task.start()

    @property
    def sent(self) -> bool:
        """Whether `start` was called."""
        return self._task.started

    def abandon(self) -> None:
        """Cancel the task and never look at it again."""
        self._task.cancel()

    async def outcome(self) -> TurnEnded | TurnFailed | Lost:
        """How the turn ended, as soon as it is known."""
        try:
            stop = _stop_reason(await self._task.wait())
        except AgentLost as error:
            return Lost(Failure.of(error), exit_code=error.exit_code)
        except OrchestratorError as error:
            return TurnFailed(Failure.of(error))
        except Exception as error:
            if self._note is not None:
                self._note(traced(error))
            return TurnFailed(Failure.of(error, owner="agent"))
        return TurnEnded(stop, steps=self._segment.steps)


def _stop_reason(answer: object) -> str:
    """An agent's answer as a stop reason; enums of foreign packages are read by value."""
    value = answer.value if isinstance(answer, enum.Enum) else answer
    if value not in _STOPS:
        msg = f"prompt() returned {answer!r}, which is no stop reason; expected one of {', '.join(_STOPS)}"
        raise AgentError(msg)
    return str(value)


async def settled(turn: OpenTurn) -> Settled | Lost:
    """The end of a turn that was asked to end: any answer settles it, an error included; unsent, it is settled."""
    if not turn.inflight.sent:
        return Settled("cancelled", turn.segment.steps)
    match await turn.inflight.outcome():
        case TurnEnded(stop=stop, steps=steps):
            return Settled(stop, steps)
        case TurnFailed():
            return Settled("cancelled", turn.segment.steps)
        case Lost() as lost:
            return lost
