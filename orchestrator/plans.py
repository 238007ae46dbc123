"""Who decides what happens next: the scene's turns in order, held by an operator where one wants to."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import attrs

from orchestrator.config import Turn
from states.events import Next
from states.machine import Facts

_WENT_ON = frozenset(
    {"", "end_turn", "max_tokens", "max_turn_requests", "refusal", "cancelled", "interrupted", "killed"}
)
"""Words for the last turn's end after which the next turn of a fixed list is taken."""


def went_on(ended_by: str) -> bool:
    """Whether a fixed list goes on after a turn that ended by this word."""
    return ended_by in _WENT_ON


@attrs.frozen
class FixedPlan:
    """A list of turns. A turn that crashed, ran out of time or spent a budget is the last one."""

    turns: tuple[Turn, ...]
    instruction: str

    async def next(self, facts: Facts) -> Next:
        """The next turn of the list, by how many of it were taken."""
        taken = facts.prompted - facts.repeated
        if taken >= len(self.turns):
            return Next("done", why="every turn was taken")
        if not went_on(facts.ended_by):
            return Next("done", why=f"the last turn ended by {facts.ended_by}")
        turn = self.turns[taken]
        text = self.instruction if turn.prompt is None else turn.prompt
        return Next("turn", turn.role, text, budgets=turn.budgets.given())


@attrs.define(eq=False)
class Hold:
    """What an operator holds: while it is held, the plan's next decision is a pause. Its time is not the rollout's."""

    _monotonic: Callable[[], float]
    _held: tuple[str, anyio.Event] | None = attrs.field(default=None, init=False)
    _by: str = attrs.field(default="operator", init=False)
    paused_sec: float = attrs.field(default=0.0, init=False)

    def pause(self, by: str) -> None:
        """Hold the plan. Who holds it already goes on to."""
        if self._held is None:
            self._held = by, anyio.Event()

    def resume(self, by: str) -> None:
        """Let it go on."""
        self._by = by
        if self._held is not None:
            self._held[1].set()
            self._held = None

    @property
    def held(self) -> str | None:
        """Who holds it; None while nobody does."""
        return self._held[0] if self._held is not None else None

    async def resumed(self) -> str:
        """Wait until it is not held any more; who let it go."""
        since = self._monotonic()
        try:
            while self._held is not None:
                await self._held[1].wait()
        finally:
            self.paused_sec += self._monotonic() - since
        return self._by
