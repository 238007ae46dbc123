"""disconnected: the sandbox is up and no agent is alive. The plan decides what comes next, or that it is over."""

from __future__ import annotations

from states.errors import ConnectError, ProviderError
from states.events import CheckAsked, Failure, Next, Paused, PlanDone, RoleAssigned
from states.machine import is_silent
from states.ports import Rollout, World


async def run(rollout: Rollout, world: World) -> RoleAssigned | CheckAsked | Paused | PlanDone:
    """Take the pending decision, or ask the plan for one.

    Raises (fires `Failed`) when the rollout may not be graded: no agent ever connected, or the provider failed.
    """
    facts = rollout.facts
    if by := world.held():
        return Paused(by)
    spent = world.spent(facts)
    decision = Next("done", why=spent) if spent else facts.next or await world.plan.next(facts)
    if not spent and (by := world.held()) and decision.kind != "pause":
        return Paused(by, decision)  # somebody holds it since the plan was asked: what it decided is kept
    if decision.kind == "turn" and (spent := world.spent(facts, decision.role)):
        decision = Next("done", why=spent)
    match decision.kind:
        case "turn" if world.leaving:  # since the plan was asked: nobody is connected for whoever goes on later
            return Paused("stop", decision)
        case "turn":
            seat = world.seat(decision.role, facts.assigned + 1)
            return RoleAssigned(decision.role, decision, live=seat)
        case "check":
            return CheckAsked()
        case "pause":
            world.pause("plan")
            return Paused("plan")
        case _:  # done
            for lease in world.leases.open("director"):  # what is verified is a scene that nobody directs any more
                await world.leases.give_back(lease)
            return PlanDone(decision.why, _spoilt(rollout, world, spent))


def _spoilt(rollout: Rollout, world: World, spent: str) -> Failure | None:
    """Work of which we know that somebody else than the agent spoilt it is not graded: that is raised.

    Where there is no work at all the table makes it void; then this is what the provider had said, if it had failed.
    """
    facts = rollout.facts
    if not facts.prompted and (facts.assigned or spent):
        why = facts.failure.message if facts.failure else spent
        raise ConnectError(f"no agent ever took a prompt: {why}")
    if world.meter.error is not None:
        raise world.meter.error
    refused = world.meter.provider_failure()
    if not refused:
        return None
    if not is_silent(facts, PlanDone(), world.rules):
        raise ProviderError(f"the model's provider failed while the agent was at work: {refused}")
    return Failure.of(ProviderError(refused))
