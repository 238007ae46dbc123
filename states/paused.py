"""paused: the operator holds the plan between turns; the rollout's clock stands still."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from states.events import Lost, Resumed
from states.ports import Connection, Rollout, World


async def run(rollout: Rollout, world: World) -> Resumed | Lost:
    """Wait for the operator, watching that a connected agent does not go away."""
    connection = rollout.stage

    async def resumed() -> Resumed | Lost:
        return Resumed(await world.resumed())

    if not isinstance(connection, Connection):
        return await resumed()

    watches: list[Callable[[], Awaitable[Resumed | Lost]]] = [*connection.seat.transport.watches(connection)]
    return await world.first(resumed, *watches)
