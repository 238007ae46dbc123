"""releasing: logs come home, then everything is given back, newest first. Nothing here can change how it ended."""

from __future__ import annotations

import anyio

from states.counting import settled
from states.events import Released
from states.ports import Lease, Rollout, World

COLLECT_SEC = 40.0
LEASE_SEC = 30.0
SETTLE_SEC = 10.0


async def run(rollout: Rollout, world: World) -> Released:
    """Give everything back. What cannot be is leaked: data, and an open lease for the reaper."""
    try:
        with anyio.fail_after(COLLECT_SEC):
            await world.collect()
    except Exception as error:
        world.note(f"not everything was brought home: {type(error).__name__}: {error}")
    usage, shares = await settled(rollout, world, SETTLE_SEC)
    given_back: list[Lease] = []
    leaked: list[Lease] = []
    kept: list[Lease] = []
    for lease in reversed(world.leases.open()):
        if world.keeps(lease, rollout.facts):
            await _let_be(lease, world)
            kept.append(lease)
        else:
            (given_back if await _given_back(lease, world) else leaked).append(lease)
    return Released(_names(given_back), _names(leaked), _names(kept), usage, shares)


def _names(leases: list[Lease]) -> tuple[str, ...]:
    return tuple(f"{lease.kind} {lease.name}" for lease in leases)


async def _let_be(lease: Lease, world: World) -> None:
    try:
        with anyio.fail_after(LEASE_SEC):
            await world.keep(lease)
    except Exception as error:
        world.note(f"{lease.kind} {lease.name} was kept as it is: {type(error).__name__}: {error}")


async def _given_back(lease: Lease, world: World) -> bool:
    try:
        with anyio.fail_after(LEASE_SEC):
            await world.leases.give_back(lease)
    except Exception as error:
        world.note(f"{lease.kind} {lease.name} was not given back: {type(error).__name__}: {error}")
        return False
    return True
