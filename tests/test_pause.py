"""A pause, end to end: who holds, whose clock stands still, what is kept, and every way out of it."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing
from harness import TRANSPORTS, build, drive, on
from sessions import events, names
from test_kernel import TWICE, WAITS
from test_ways_out import TURN, hooked, planned

from orchestrator import Turn
from orchestrator.watch import Follower
from states import events as ev
from states.events import Failure, Next
from states.machine import legal


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Both transports."""
    return request.param


def paused_by(stand, by="code", state="capturing/whole"):
    """A rollout that is held from when it enters `state`."""
    return hooked(stand, on(state, lambda: stand.rollout.pause(by)))


def test_no_prompt_is_legal_in_a_pause():
    """It is a state because it changes what is legal: only who holds it, or what ends it, leads out."""
    assert {event.__name__ for event in legal("paused")} == {
        *("Resumed", "Lost", "Failed", "SandboxFailed", "Cancelled", "Recovered")
    }


@pytest.mark.anyio
async def test_who_pauses_and_who_resumes_is_journaled(transport):
    """The turn in flight is taken to its end first; then nothing is prompted until somebody resumes."""
    stand = paused_by(build(transport, turns=TWICE), "terminal")
    rollout = stand.rollout
    while rollout.state != "paused":
        await rollout.step()
    assert rollout.held == "terminal"
    assert rollout.pause("code") is False
    assert names(stand).count("Prompted") == 1
    assert rollout.resume("a person") is True
    assert rollout.resume("a person") is False
    await drive(stand)
    assert [event.by for event in events(stand, ev.Paused)] == ["terminal"]
    assert [event.by for event in events(stand, ev.Resumed)] == ["a person"]
    assert (rollout.state, rollout.result().turns) == ("closed/rewarded", 2)


@pytest.mark.anyio
@pytest.mark.parametrize("state", ["session", "disconnected"])
async def test_what_the_plan_decided_while_somebody_paused_is_kept(transport, state):
    """A director is asked once a decision: held while it thought, it is not asked again, and nothing is skipped."""
    stand = build(transport)
    asked = []

    class Plan:
        async def next(self, facts):
            asked.append(facts.prompted)
            if len(asked) == (1 if state == "disconnected" else 2):
                stand.rollout.pause("terminal")
                await anyio.lowlevel.checkpoint()
            return Next("turn", "agent", f"turn {len(asked)}") if len(asked) <= 3 else Next("done")

    stand = build(transport, plan=Plan())
    hooked(stand, on("paused", stand.rollout.resume))
    await drive(stand)
    prompted = [event.text for event in events(stand, ev.Prompted)]
    assert prompted == ["turn 1", "turn 2", "turn 3"]
    assert len(asked) == 4
    (held,) = events(stand, ev.Paused)
    assert held.next == Next("turn", "agent", f"turn {1 if state == 'disconnected' else 2}")


@pytest.mark.anyio
async def test_a_plan_that_asks_for_a_pause_while_somebody_holds_is_held_once(transport):
    """Two pauses are one, and one resume ends it."""
    stand = build(transport)

    class Plan:
        decisions = iter([TURN, Next("pause"), Next("done")])

        async def next(self, facts):
            decision = next(self.decisions)
            if decision.kind == "pause":
                stand.rollout.pause("terminal")
                await anyio.lowlevel.checkpoint()
            return decision

    stand = build(transport, plan=Plan())
    hooked(stand, on("paused", stand.rollout.resume))
    await drive(stand)
    assert names(stand).count("Paused") == names(stand).count("Resumed") == 1
    assert stand.rollout.state == "closed/rewarded"


@pytest.mark.anyio
async def test_a_plans_own_pause_is_the_plans(transport):
    stand = planned(build(transport), [TURN, Next("pause"), Next("done")])
    hooked(stand, on("paused", stand.rollout.resume))
    await drive(stand)
    assert [event.by for event in events(stand, ev.Paused)] == ["plan"]


@pytest.mark.anyio
async def test_a_cancel_ends_a_pause(transport):
    stand = paused_by(build(transport, turns=TWICE))
    hooked(stand, on("paused", lambda: stand.rollout.cancel("terminal")))
    await drive(stand)
    assert stand.rollout.state == "closed/cancelled"
    assert "Resumed" not in names(stand)


@pytest.mark.anyio
async def test_an_interrupt_does_not_end_a_pause(transport):
    """There is no turn in flight; whoever holds it goes on to."""
    stand = paused_by(build(transport, turns=TWICE))
    said = []

    def act():
        said.append(stand.rollout.interrupt())
        stand.rollout.resume()

    await drive(hooked(stand, on("paused", act)))
    assert said == [False]
    assert stand.rollout.state == "closed/rewarded"


@pytest.mark.anyio
async def test_an_agent_lost_in_a_pause_leaves_the_pause_held():
    """Quiesced, and then held again without an agent, until somebody resumes; the next turn connects anew."""
    stand = paused_by(build("acp", {"turns": [[{"say": "x"}, {"late": [{"die": 3}]}], [{"say": "y"}]]}, turns=TWICE))
    hooked(stand, on("paused", stand.rollout.resume, nth=2))
    await drive(stand)
    found = names(stand)
    assert found[found.index("Paused") :][:5] == ["Paused", "Lost", "Quiet", "Paused", "Resumed"]
    assert stand.rollout.state == "closed/rewarded"
    assert stand.rollout.result().turns == 2


@pytest.mark.anyio
async def test_a_pause_that_comes_when_no_turn_can_follow_holds_nothing(transport):
    """In verifying, in releasing, once an ending is set, and when it is stopping."""
    said = []
    stand = build(transport)
    for state in ("verifying", "releasing"):
        hooked(stand, on(state, lambda: said.append(stand.rollout.pause())))
    await drive(stand)
    cancelled = build(transport, WAITS)
    hooked(cancelled, on("executing", cancelled.rollout.cancel))
    hooked(cancelled, on("quiescing", lambda: said.append(cancelled.rollout.pause())))
    await drive(cancelled)
    stopping = build(transport, WAITS)
    hooked(stopping, on("executing", stopping.rollout.stop))
    hooked(stopping, on("capturing/whole", lambda: said.append(stopping.rollout.pause())))
    with anyio.fail_after(20):
        await stopping.rollout.run()
    assert said == [False] * 4
    assert stopping.rollout.state == "disconnected"


def test_the_rollouts_clock_stands_still_in_a_pause(transport):
    """An hour's pause in a rollout of ten seconds: the turn after it has what was left."""
    script = {"turns": [[{"sleep": 4}, {"say": "one"}], [{"sleep": 4}, {"say": "two"}]]}
    stand = paused_by(build(transport, script, turns=(Turn("agent"), Turn("agent")), timeout=10.0))
    rollout = stand.rollout
    paused = trio.Event()
    hooked(stand, on("paused", paused.set))

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rollout.run)
            await paused.wait()
            await trio.sleep(3600)
            rollout.resume()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert (rollout.state, rollout.result().ended_by) == ("closed/rewarded", "end_turn")
    assert rollout.result().turns == 2


def test_a_pause_that_nobody_ends_is_the_operators_failure(transport):
    """After a day; nothing is graded."""
    stand = paused_by(build(transport, turns=TWICE))
    trio.run(stand.rollout.run, clock=trio.testing.MockClock(autojump_threshold=0))
    result = stand.rollout.result()
    assert (result.state, result.reward, result.verdict.owner) == ("closed/failed", None, "operator")
    assert "paused took longer than 86400 s" in result.verdict.reason


@pytest.mark.anyio
async def test_the_view_says_who_paused_it(transport, tmp_path):
    """In the line that is shown while it runs."""
    stand = paused_by(build(transport, turns=TWICE, out=tmp_path), "terminal")
    rollout = stand.rollout
    while rollout.state != "paused":
        await rollout.step()
    follower = Follower(rollout.folder)
    follower.look()
    assert follower.line(0.0).startswith("paused by terminal")
    rollout.resume()
    await drive_on(rollout)
    follower.look()
    assert "by terminal" not in follower.line(0.0)


async def drive_on(rollout):
    with anyio.fail_after(20):
        await rollout.run()


@pytest.mark.anyio
async def test_a_sandbox_that_dies_in_a_pause_ends_it(transport):
    stand = paused_by(build(transport, turns=TWICE))
    hooked(stand, on("paused", lambda: stand.rollout.sandbox_failed("the host is down")))
    await drive(stand)
    assert stand.rollout.result().verdict.owner == "sandbox"
    assert isinstance(stand.rollout.facts.failure, Failure)
