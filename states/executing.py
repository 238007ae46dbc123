"""executing: one prompt in flight. Its steps are on disk as they arrive; its ways out are the table's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from states.events import BudgetSpent, IdlePassed, Lost, TurnEnded, TurnFailed
from states.ports import OpenTurn, Rollout, World

Out = TurnEnded | TurnFailed | IdlePassed | BudgetSpent | Lost


async def run(rollout: Rollout, world: World) -> TurnEnded | TurnFailed | IdlePassed | BudgetSpent | Lost:
    """Drive the turn until it ends, falls silent, or has spent a budget. The state's deadline is the turn's.

    The transport is listed first: a turn that has ended has ended, whatever else passed in the same moment.
    """
    turn = rollout.stage
    assert isinstance(turn, OpenTurn), f"executing needs an open turn, not {turn}"

    async def driven() -> Out:
        return await turn.connection.seat.transport.executing(turn)

    watches: list[Callable[[], Awaitable[Out]]] = [*world.budget(turn, rollout.facts)]
    return await world.first(driven, *watches)
