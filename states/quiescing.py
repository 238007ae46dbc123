"""quiescing: the session is closed, the agent's processes are proven dead, its usage is counted to the end.

There is no way to `disconnected`, and so none to a verifier or another agent, but through here.
"""

from __future__ import annotations

import anyio

from states.counting import settled
from states.events import Quiet
from states.ports import Connection, Rollout, World

CLOSE_SEC = 10.0
SETTLE_SEC = 10.0


async def run(rollout: Rollout, world: World) -> Quiet:
    """Close politely, end for certain, count what came late.

    Raises `QuietError` (fires `Unquiet`) when death cannot be proven: no reward, ever.
    """
    connection = rollout.stage
    evidence: tuple[str, ...] = ()
    if isinstance(connection, Connection):
        evidence = await _closed(connection, world)
    for lease in reversed(world.leases.open("agent")):
        evidence += await world.leases.give_back(lease)
    for lease in world.leases.open("tests"):
        evidence += await world.leases.give_back(lease)
    usage, shares = await settled(rollout, world, SETTLE_SEC)
    return Quiet(evidence, usage, shares)


async def _closed(connection: Connection, world: World) -> tuple[str, ...]:
    """Whatever comes of the polite way, the certain one follows."""
    with anyio.move_on_after(CLOSE_SEC):
        try:
            return await connection.seat.transport.quiescing(connection)
        except Exception as error:
            world.note(f"the session's end raised {type(error).__name__}: {error}")
            return ()
    world.note(f"the session did not end within {CLOSE_SEC:g} s and was abandoned")
    return ()
