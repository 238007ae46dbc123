"""connecting: one agent is spawned (or built in process) and opens a session."""

from __future__ import annotations

from states.events import AcpOpened, FactoryOpened
from states.ports import Rollout, Seat, World


async def run(rollout: Rollout, world: World) -> AcpOpened | FactoryOpened:
    """Open a session in the seat that was assigned.

    The lease comes first, so that whatever is half spawned is found and ended in `quiescing`.
    Raises `ConnectError` (fires `ConnectFailed`).
    """
    seat = rollout.stage
    assert isinstance(seat, Seat), f"connecting needs a seat, not {seat}"
    world.leases.intend("agent", seat.handle.name)
    return await seat.transport.connecting(seat)
