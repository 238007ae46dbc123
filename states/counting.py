"""Counting: what was used since the journal last said so, by role and turn.

The model gateway counts; the journal says what it counted. The difference of the two is what the next record that
counts (`Captured`, `Quiet`, `Released`) adds, so that nothing is counted twice and nothing goes missing, however late
a call ends, and whoever takes the rollout over goes on where the journal stands.
"""

from __future__ import annotations

from collections.abc import Iterable

import anyio

from states.events import Share, Usage
from states.machine import Facts
from states.ports import Meter, Rollout, World


def uncounted(facts: Facts, meter: Meter) -> tuple[Usage, tuple[Share, ...]]:
    """What the meter has and the journal has not: its sum, and the shares where they are not all the last turn's."""
    known = {(share.role, share.turn): share.usage for share in facts.ledger}
    shares = []
    for share in meter.shares():
        before = known.get((share.role, share.turn), Usage())
        if share.usage != before:
            shares.append(Share(share.role, share.turn, share.usage - before))
    usage = total(shares)
    last_turns = all((share.role, share.turn) == (facts.role, facts.prompted) for share in shares)
    return usage, () if last_turns else tuple(shares)


def total(shares: Iterable[Share]) -> Usage:
    """What these shares used together."""
    return sum((share.usage for share in shares), Usage())


async def settled(rollout: Rollout, world: World, seconds: float) -> tuple[Usage, tuple[Share, ...]]:
    """The same as `uncounted`, after the calls in flight were given so many seconds to be counted. Never raises."""
    try:
        with anyio.fail_after(seconds):
            await world.meter.settle()
    except TimeoutError:
        world.note("calls at the gateway did not settle; their usage is counted later")
    except Exception as error:
        world.note(f"usage could not be settled: {type(error).__name__}: {error}")
    return uncounted(rollout.facts, world.meter)
