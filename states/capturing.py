"""capturing/whole and capturing/partial: the turn's segment is completed and sealed, exactly once.

Every way out of a turn leads through here. Reading what is missing is bounded inside the state's own deadline, so
that the seal always follows, whatever the agent does.
"""

from __future__ import annotations

import anyio

from states.counting import settled
from states.events import Captured, Usage
from states.ports import OpenTurn, Rollout, Segment, World

READ_SEC = 10.0
SETTLE_SEC = 10.0


async def run(rollout: Rollout, world: World) -> Captured:
    """Read what is missing, count usage, seal."""
    turn = rollout.stage
    whole = rollout.state == "capturing/whole"
    if not isinstance(turn, OpenTurn):  # a new process after kill -9: what is on disk is what there is
        return await _recovered(rollout, world)
    truncated = not await _read(turn, world)
    if not whole:
        turn.inflight.abandon()
    return await _sealed(rollout, world, turn.segment, complete=whole and not truncated, truncated=truncated)


async def _read(turn: OpenTurn, world: World) -> bool:
    """Whether everything that the transport still had was read in time."""
    try:
        with anyio.fail_after(_bound(READ_SEC)):
            await turn.connection.seat.transport.capturing(turn)
    except Exception as error:
        world.note(f"capture is truncated: {type(error).__name__}: {error}")
        return False
    return True


def _bound(seconds: float) -> float:
    """At most a third of what is left of the state's own deadline, so that the seal is never cut off."""
    return min(seconds, (anyio.current_effective_deadline() - anyio.current_time()) / 3)


async def _recovered(rollout: Rollout, world: World) -> Captured:
    """A seal that is on disk already is the turn's only one: its process died before the journal said so."""
    segment = world.recovered_segment(rollout.facts.prompted)
    seal = segment.sealed
    if seal is None:
        return await _sealed(rollout, world, segment, complete=False, truncated=False)
    usage, shares = await settled(rollout, world, _bound(SETTLE_SEC))
    complete = seal["complete"]
    return Captured(segment.number, seal["steps"], seal["tool_calls"], usage=usage, shares=shares, complete=complete)


async def _sealed(rollout: Rollout, world: World, segment: Segment, *, complete: bool, truncated: bool) -> Captured:
    usage, shares = await settled(rollout, world, _bound(SETTLE_SEC))
    own = (share.usage for share in shares if share.turn == rollout.facts.prompted)
    segment.seal(complete=complete, usage=next(own, Usage()) if shares else usage)
    return Captured(
        segment.number,
        steps=segment.steps,
        tool_calls=segment.tool_calls,
        usage=usage,
        complete=complete,
        truncated=truncated,
        shares=shares,
        seconds=segment.seconds,
    )
