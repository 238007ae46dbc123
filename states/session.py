"""session/acp and session/factory: a live, idle agent. Exactly one turn may start from here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from anyio.lowlevel import checkpoint_if_cancelled

from states.events import CheckAsked, Lost, Next, Paused, PlanDone, Prompted, RoleSwapped
from states.ports import Connection, OpenTurn, Rollout, World

Decided = Prompted | RoleSwapped | PlanDone | CheckAsked | Paused


async def run(rollout: Rollout, world: World) -> Prompted | RoleSwapped | PlanDone | CheckAsked | Paused | Lost:
    """Take the pending decision, or ask the plan, while watching that the agent does not go away."""
    connection = rollout.stage
    assert isinstance(connection, Connection), f"a session needs a connection, not {connection}"
    if by := world.held():
        return Paused(by)
    if why := world.spent(rollout.facts):
        return PlanDone(why)
    if rollout.facts.next is not None:
        return _act(rollout.facts.next, rollout, world, connection)

    async def decided() -> Next | Lost:
        return await world.plan.next(rollout.facts)

    watches: list[Callable[[], Awaitable[Next | Lost]]] = [*connection.seat.transport.watches(connection)]
    came = await world.first(decided, *watches)
    if isinstance(came, Lost):
        return came
    await checkpoint_if_cancelled()
    # Acting opens a segment, so nothing may be awaited from here on: a cancel came before it, or comes after the event.
    if (by := world.held()) and came.kind != "pause":
        return Paused(by, came)  # somebody holds it since the plan was asked: what it decided is kept
    return _act(came, rollout, world, connection)


def _act(decision: Next, rollout: Rollout, world: World, connection: Connection) -> Decided:
    if decision.kind == "turn" and (why := world.spent(rollout.facts, decision.role)):
        return PlanDone(why)
    match decision.kind:
        case "turn" if decision.role == connection.seat.role.name and not world.leaving:
            number = rollout.facts.prompted + 1
            segment = world.segment(connection, number, decision)
            inflight = connection.seat.transport.prepare(connection, segment, decision.text)
            turn = OpenTurn(connection, segment, inflight, decision.budgets)
            return Prompted(number - 1, decision.role, decision.text, decision.budgets, live=turn)
        case "turn":
            return RoleSwapped(decision)
        case "pause" if world.leaving:  # it is kept for whoever goes on: here nobody would be there to end it
            return RoleSwapped(decision)
        case "check":
            return CheckAsked()
        case "pause":
            world.pause("plan")
            return Paused("plan")
        case _:  # done
            return PlanDone(decision.why)
